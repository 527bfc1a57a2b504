"""LLaVA: ``LlavaForConditionalGeneration`` and a prefix behind a projection, with a CLIP, SigLIP or DINOv2 tower and any language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mmfast import spec
from mmfast.models.build import MultimodalModel, Tower
from mmfast.models.lora import merged
from mmfast.models.pretrained import TOWERS, check_head, language_sizes, set_decoder, tower_sizes
from mmfast.nn.projector import Projector

STOCK = LlavaForConditionalGeneration


def system_of(config: LlavaConfig, name: str) -> spec.System:
    """The choices that a stock LLaVA's configuration stands for."""
    vision, text = config.vision_config, config.text_config
    kinds = [kind for kind, (_, types) in TOWERS.items() if vision.model_type in types]
    *scales, layer = [config.vision_feature_layer] if isinstance(config.vision_feature_layer, int) else config.vision_feature_layer
    if not kinds or (scales and kinds[0] is not spec.Clip):
        raise ValueError(
            f"{name}: expected a tower of {', '.join(kind.__name__ for kind in TOWERS)} read at one layer, got {vision.model_type} at layer "
            f"{config.vision_feature_layer}"
        )
    whole = config.vision_feature_select_strategy == "full"
    if kinds[0] is spec.Siglip and not whole:
        raise ValueError(f"{name}: a SigLIP tower has no class token, and vision_feature_select_strategy 'default' drops a patch for it")
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise ValueError(f"{name}: projector_hidden_act is {config.projector_hidden_act!r}, expected 'gelu' or 'linear'")
    check_head(text, name)
    extra = {} if kinds[0] is spec.Siglip else {"keep_class_token": whole}
    extra |= {"scales": tuple(scales)} if scales else {}
    return spec.System(
        name=Path(name).name,
        paper="arXiv:2304.08485",
        encoder=tower_sizes(kinds[0](weights=None, layer=layer, **extra), vision),
        connector=spec.Linear() if config.projector_hidden_act == "linear" else spec.Mlp(2),
        language=language_sizes(spec.LanguageModel(weights=None), text),
        image=spec.Fixed(size=vision.image_size),
    )


def from_stock(stock: LlavaForConditionalGeneration, name: str = "llava") -> MultimodalModel:
    """Take the parts out of a stock LLaVA; weights are shared with it, not copied."""
    config, parts = stock.config, stock.model
    system = system_of(config, name)
    first, second = parts.multi_modal_projector.linear_1, parts.multi_modal_projector.linear_2
    linear = isinstance(system.connector, spec.Linear)
    if linear and not (torch.equal(second.weight, torch.eye(len(second.weight)).to(second.weight)) and not second.bias.any()):
        raise ValueError(
            f"{name}: projector_hidden_act is 'linear' and linear_2 is not the identity; two maps without activation are unknown"
        )
    connector = Projector(first.in_features, first.out_features, 1 if linear else 2)
    for slot, layer in ((0, first),) if linear else ((0, first), (2, second)):
        connector[slot] = layer
    with torch.device("meta"):  # only the shell of the causal model; its insides are the checkpoint's
        language = AutoModelForCausalLM.from_config(config.text_config)
    set_decoder(language, parts.language_model)
    language.set_output_embeddings(stock.lm_head)
    skip = int(config.vision_feature_select_strategy == "default")
    tower = Tower(parts.vision_tower, layer=system.encoder.layer, skip=skip, scales=getattr(system.encoder, "scales", ()))
    return MultimodalModel(system, tower, connector, language, image_token=config.image_token_id).eval()


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[LlavaForConditionalGeneration]:
    """The model's parts in a stock LLaVA that gives the same logits; adapters are folded in meanwhile.

    A single affine connector is written as ``linear_1`` with the identity behind it, the stock class having no other form for it.
    """
    system, vision, text = model.system, model.encoder.vision.config, model.language.config
    maps = [m for m in model.connector if isinstance(m, nn.Linear)]
    if len(maps) > 2:
        raise ValueError(f"{system.name}: the stock class has a connector of two affine maps, this one has {len(maps)}")
    head = model.language.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"{system.name}: the stock class has a head without bias, that of {text.model_type} has one")
    if getattr(model.language, "is_quantized", False):
        raise ValueError(f"{system.name}: 4-bit weights are not written back; load them with language.quantize=none")
    if text.tie_word_embeddings and not hasattr(model.language.base_model, "embed_tokens"):
        # The stock class ties its head to a table of that name; GPT-2's and OPT's have others, and are written as two equal tables.
        text, head = copy.deepcopy(text), copy.deepcopy(head)
        text.tie_word_embeddings = False
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=model.image_token,
        image_seq_length=system.encoder.tokens,
        projector_hidden_act="linear" if len(maps) == 1 else "gelu",
        vision_feature_layer=list(model.encoder.layers) if len(model.encoder.layers) > 1 else model.encoder.layers[0],
        vision_feature_select_strategy="default" if model.encoder.skip else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    if len(maps) == 1:
        width = maps[0].out_features
        maps.append(nn.Linear(width, width, device=maps[0].weight.device, dtype=maps[0].weight.dtype))
        nn.init.eye_(maps[1].weight)
        nn.init.zeros_(maps[1].bias)
    with merged(model):
        stock.model.vision_tower, stock.model.language_model = model.encoder.vision, model.language.base_model
        stock.model.multi_modal_projector.linear_1, stock.model.multi_modal_projector.linear_2 = maps
        stock.lm_head = head
        yield stock
