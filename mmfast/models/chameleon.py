"""Chameleon's language model (arXiv:2405.09818): transformers' decoder without the image tokenizer that its class holds.

That tokenizer is a tower here, and the head's logits are whole: the stock class puts those of pictures' tokens out of reach, so that it cannot
learn or draw pictures. What it has that a llama has not: LayerNorm with weight and bias over each head's queries and keys, before rotation, and
in the 34B model norms over what a sub-layer adds in place of norms before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

# The class cannot be made without a tokenizer: the smallest one, to be thrown away.
_LEAST = dict(embed_dim=1, num_embeddings=1, latent_channels=1, resolution=1, base_channels=32, channel_multiplier=[1], num_res_blocks=1)


def language(**sizes) -> ChameleonForConditionalGeneration:
    """Decoder and head of these sizes, arguments of ``ChameleonConfig``; ``get_decoder()`` and the head are what is run."""
    return without_pictures(ChameleonForConditionalGeneration(ChameleonConfig(**sizes, vocabulary_map={}, vq_config=_LEAST)))


def without_pictures(stock: ChameleonForConditionalGeneration) -> ChameleonForConditionalGeneration:
    """The same model, its image tokenizer taken out."""
    del stock.model.vqmodel
    return stock


# How the released files (``consolidated.*.pth``) name and cut what a layer holds: our name, and the dimension that shards split.
_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "attention.q_normalization.weight": ("self_attn.q_norm.weight", 0),
    "attention.q_normalization.bias": ("self_attn.q_norm.bias", 0),
    "attention.k_normalization.weight": ("self_attn.k_norm.weight", 0),
    "attention.k_normalization.bias": ("self_attn.k_norm.bias", 0),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_AROUND = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}


def official_state(shards: Sequence[Mapping[str, Tensor]], *, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The released files of a Chameleon, in their order, as the state of :func:`language`.

    There a head's dimensions are rotated in pairs that lie beside each other and here in halves, so the rows of ``wq`` and ``wk`` and their
    norms go to other places; and a file's heads share one pair of norm vectors, of which every head here has a copy.

    Raises:
        ValueError: no file, a name that is unknown or not in all of them, or norms that should be the same in all files and are not.
    """
    if not shards or any(shard.keys() != shards[0].keys() for shard in shards):
        raise ValueError(f"official_state: expected one file or more with the same names, got {len(shards)}")
    state = {}
    for name in shards[0]:
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        known = (_LAYER if found else _AROUND).get(found[2] if found else name)
        if known is None:
            raise ValueError(f"official_state: {name} is no name of a released Chameleon")
        ours, split = known
        parts = [shard[name] for shard in shards]
        if split is None:
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise ValueError(f"official_state: {name} is not the same in all files")
            whole = parts[0]
        elif "normalization" in name:
            copies = (heads if ".q_" in name else kv_heads) // len(parts)
            whole = torch.cat([_halves(part).expand(copies, -1) for part in parts])
        else:
            whole = torch.cat(parts, split)
            if ours.endswith(("q_proj.weight", "k_proj.weight")):
                whole = (
                    _halves(whole.unflatten(0, (heads if "q_proj" in ours else kv_heads, -1)).movedim(1, -1)).movedim(-1, 1).flatten(0, 1)
                )
        state[f"model.layers.{found[1]}.{ours}" if found else ours] = whole
    return state


def _halves(pairs: Tensor) -> Tensor:
    """``[.., d]`` with the first of every pair in the first half, and the second in the second."""
    return torch.cat([pairs[..., ::2], pairs[..., 1::2]], -1)
