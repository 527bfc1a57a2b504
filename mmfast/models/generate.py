"""Decoding: greedy or sampled, with a key/value cache, many prompts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel


@torch.no_grad()
def generate(
    model: MultimodalModel,
    input_ids: Tensor,
    *,
    end: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    **images: Tensor | None,
) -> Tensor:
    """Continue every prompt until the token ``end`` or the limit.

    Args:
        input_ids: ``[B, T]`` with placeholders; prompts of one length, or padded on the **left** with an ``attention_mask`` that is 0 there
            (positions then count real tokens only).
        temperature: 0 takes the likeliest token, otherwise tokens are drawn with ``generator``.
        images: pixel_values, image_states or image_embeds, and image_rows, as for the model's forward.

    Returns:
        New tokens ``[B, up to max_new_tokens]``; ``end`` is included, and fills what comes after it.
    """
    head, cache = model.language.get_output_embeddings(), DynamicCache(config=model.language.config)
    embeds = model.embed_images(**images)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
    step, out = input_ids, [input_ids.new_zeros(len(input_ids), 0)]
    for _ in range(max_new_tokens):
        masks = {} if attention_mask is None else {"attention_mask": attention_mask, "position_ids": positions}
        hidden, cache = model.fusion(model.language, step, embeds, model.image_token, past_key_values=cache, use_cache=True, **masks)
        logits = head(hidden[:, -1]).float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        if end is not None:
            token = torch.where(done, end, token)
            done |= token == end
        out.append(token[:, None])
        if done.all():
            break
        step, embeds = token[:, None], None
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], 1)
            positions = positions[:, -1:] + 1
    return torch.cat(out, 1)
