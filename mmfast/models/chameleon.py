"""Chameleon's language model (arXiv:2405.09818): transformers' decoder without the image tokenizer that its class holds.

That tokenizer is a tower here, and the head's logits are whole: the stock class puts those of pictures' tokens out of reach, so that it cannot
learn or draw pictures. What it has that a llama has not: LayerNorm with weight and bias over each head's queries and keys, before rotation, and
in the 34B model norms over what a sub-layer adds in place of norms before it.
"""

from __future__ import annotations

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
