"""Gated prompts in the last layers. Letters: B batch, T tokens, M images, N vectors an image, D width, S sequences (rows, or more where they
are laid end to end), L adapted layers.
"""

import copy
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmfast import spec
from mmfast.models.fusions.prefix import blocks, run_decoder, starts
from mmfast.nn.adapter import AdapterPrompt


@dataclass
class ByRow:
    """Image vectors ``[S, N, D]`` of sequences, 0 for one without an image."""

    embeds: Tensor

    def spread(self, count: int) -> "ByRow":
        """Each row ``count`` times."""
        return ByRow(self.embeds.repeat_interleave(count, 0))


@dataclass
class _Prompts:
    """What the adapted layers of one forward pass read; an argument of theirs, so that a layer that is computed again reads the same."""

    layers: nn.ModuleDict  # by the layer's number
    condition: Tensor | None
    cu_seqlens: Tensor | None


class AdapterFusion(nn.Module):
    """Gated prompts in the last L layers of a live causal language model (LLaMA-Adapter, arXiv:2303.16199).

    Nothing of the language model changes: its modules, names and weights stay, and without this fusion it computes what it did. Its adapted
    layers call another attention function, which calls the one before and adds what the prompts say (``mmfast.nn.AdapterPrompt``) to the
    heads, before the output map. The function gets the queries as the layer uses them, so after rotation, which is also how the released
    code has it. Prompts are computed anew in every pass and never enter the key/value cache.

    An image's vector is added to the prompts of the sequence that shows it, in every adapted layer; other sequences keep the prompts as they
    are. Which sequence that is says its ``<image>`` token, which is a token like any other to the language model; in a batch without such
    tokens the i-th of as many images as sequences belongs to the i-th. Layers below the first adapted one keep no activations unless the
    embeddings learn.

    Keys: ``layers.{i}.prompt``, ``layers.{i}.gate``, i counted in the language model. ``mmfast.models.adapter`` reads the published names.
    """

    def __init__(self, choice: spec.AdapterPrompts, language: nn.Module):
        super().__init__()
        config, layers = language.config, blocks(language)
        if not 1 <= choice.layers <= len(layers):
            raise ValueError(f"AdapterPrompts: expected 1 to {len(layers)} layers, the language model's, got {choice.layers}")
        adapted = range(len(layers) - choice.layers, len(layers))
        self.layers = nn.ModuleDict()
        for i in adapted:
            attention = getattr(layers[i], "self_attn", None)
            if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "scaling", "layer_idx", "config")):
                raise ValueError(
                    f"AdapterPrompts: layer {i} of {config.model_type} has no self_attn with q_proj, k_proj and v_proj; known are the likes of "
                    "llama, mistral and qwen2"
                )
            self.layers[str(i)] = AdapterPrompt(choice.length, config.hidden_size, config.num_attention_heads, gate_activation=choice.gate)
            if not hasattr(attention, "plain_config"):
                attention.plain_config, attention.config = attention.config, copy.copy(attention.config)
                attention.config._attn_implementation_internal = _NAME

    def forward(
        self, language: nn.Module, input_ids: Tensor, image_embeds: Tensor | ByRow | None, image_token: int, **kwargs
    ) -> tuple[Tensor, object]:
        """As for ``PrefixFusion``, with image_embeds [M, N, D], N 1 or the prompts' number."""
        cu_seqlens = None
        if image_embeds is not None and kwargs.get("attention_mask") is None and kwargs.get("position_ids") is not None:
            cu_seqlens = starts(kwargs["position_ids"].expand(input_ids.shape))
        condition = None if image_embeds is None else self._by_row(input_ids, image_embeds, image_token, cu_seqlens).embeds
        prompts = _Prompts(self.layers, condition, cu_seqlens)
        return run_decoder(language, language.get_input_embeddings()(input_ids), adapter_prompts=prompts, **kwargs)

    def carry(self, input_ids: Tensor, image_embeds: Tensor | ByRow | None, image_token: int) -> ByRow | None:
        """What steps after this one need of the images: each row's own vector."""
        return None if image_embeds is None else self._by_row(input_ids, image_embeds, image_token, None)

    def _by_row(self, input_ids: Tensor, images: Tensor | ByRow, image_token: int, cu_seqlens: Tensor | None) -> ByRow:
        if isinstance(images, ByRow):
            return images
        places = (input_ids == image_token).flatten().nonzero().flatten()
        if cu_seqlens is None:
            count, rows = len(input_ids), places // input_ids.shape[1]
        else:
            count, rows = len(cu_seqlens) - 1, torch.searchsorted(cu_seqlens, places.to(cu_seqlens.dtype), right=True) - 1
        if not len(places) and len(images) == count:
            return ByRow(images)
        if len(places) != len(images):
            raise ValueError(f"the batch has {len(places)} image placeholders, but {len(images)} images came with it")
        if len(rows.unique()) != len(rows):
            raise ValueError("adapter prompts hold one image a row, and a row of the batch shows several")
        return ByRow(images.new_zeros(count, *images.shape[1:]).index_copy(0, rows, images))


_NAME = "mmfast_adapter_prompts"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The layer's own attention function, and the prompts' part beside it: query [B, H, T, d] -> [B, T, H, d]."""
    prompts: _Prompts | None = kwargs.pop("adapter_prompts", None)
    plain = sys.modules[type(module).__module__].eager_attention_forward  # what a family does where no other function is chosen
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.plain_config._attn_implementation, plain)
    out, weights = attend(module, query, key, value, mask, **kwargs)
    if prompts is not None:
        norm = getattr(module, "k_norm", None)  # Qwen3 normalises a head's keys
        wk = module.k_proj if norm is None else lambda x: norm(module.k_proj(x).unflatten(-1, (-1, key.shape[-1]))).flatten(-2)
        adapter = prompts.layers[str(module.layer_idx)]
        out = out + adapter(
            query.transpose(1, 2), wk, module.v_proj, condition=prompts.condition, cu_seqlens=prompts.cu_seqlens,
            scale=module.scaling,
        )  # fmt: skip
    return out, weights


# transformers' way to another attention function is a name for it.
ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
