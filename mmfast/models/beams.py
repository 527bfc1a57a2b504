"""Beam search: several texts are followed side by side, and the likeliest is what is said.

Captions of BLIP-2 and InstructBLIP are searched with 5 beams, Flamingo's answers with 3. Which text wins is what transformers'
``generate(num_beams=.., length_penalty=..)`` says, its rule of when to stop included.

Letters: B prompts, K beams, V vocabulary, n tokens said so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast.models.decoding import check_repetition, unrepeating
from mmfast.models.generate import Reading, check_stops, stopped

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel


@torch.no_grad()
def search(
    model: MultimodalModel,
    input_ids: Tensor,
    *,
    beams: int,
    end: int | None = None,
    stops: Sequence[int] = (),
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    no_repeat: int = 0,
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    **images: Tensor | None,
) -> Tensor:
    """The best text behind each prompt, ``[B, up to max_new_tokens]``, filled with ``end``; arguments as for ``generate.steps``.

    Of the 2K likeliest continuations of a prompt's K texts, the K likeliest that do not end go on. One among the first K that ends, or that
    has come to ``max_new_tokens``, is kept with its log-probability over ``n ** length_penalty``, n counting ``end``; of those kept the K best
    stay. A prompt is done once K are kept and the likeliest text that goes on, by the same measure at its present length, is no better than
    the worst of them.
    """
    if beams < 2:
        raise ValueError(f"generate: expected beams >= 1, got {beams}")
    check_repetition(no_repeat, repetition_penalty)
    check_stops(end, stops)
    if max_new_tokens < 1:
        return input_ids.new_zeros(len(input_ids), 0)
    reading, prompts, never = Reading(model, input_ids, attention_mask, **images), len(input_ids), -1e9
    reading.spread(beams)
    told, device = reading.told, input_ids.device
    length, filling = told.shape[1], 0 if end is None else end
    row = torch.arange(prompts, device=device)[:, None]
    going = torch.full((prompts, beams), never, device=device)  # log-probabilities of the texts that go on
    going[:, 0] = 0  # all are the prompt: one of them counts
    kept, best = going.new_full((prompts, beams), never), told.new_full((prompts, beams, max_new_tokens), filling)
    open_ = torch.ones(prompts, 1, dtype=torch.bool, device=device)
    for n in range(1, max_new_tokens + 1):
        next_logp = unrepeating(reading.logits.log_softmax(-1), told, no_repeat=no_repeat, repetition_penalty=repetition_penalty)
        every = going[:, :, None] + next_logp.unflatten(0, (prompts, beams))  # [B, K, V]
        logp, at = every.flatten(1).topk(min(2 * beams, every[0].numel()))
        source, token = at // every.shape[-1], at % every.shape[-1]  # [B, 2K]
        token = token if end is None else stopped(token, end, stops)
        texts = torch.cat([told.unflatten(0, (prompts, beams))[row, source], token[..., None]], -1)
        ends = torch.full_like(token, n == max_new_tokens, dtype=torch.bool) if end is None else (token == end) | (n == max_new_tokens)

        counts = ends & open_ & (torch.arange(ends.shape[1], device=device) < beams)
        scores = torch.cat([kept, torch.where(counts, logp / n**length_penalty, never)], 1)
        said = torch.cat([best, torch.nn.functional.pad(texts[..., length:], (0, max_new_tokens - n), value=filling)], 1)
        kept, first = scores.topk(beams)
        best = said[row, first]
        if n == max_new_tokens:
            break

        going, on = torch.where(ends, logp + never, logp).topk(beams)
        told = texts[row, on].flatten(0, 1)
        open_ &= going[:, :1] / n**length_penalty > torch.where(kept > never / 2, kept, never).amin(1, keepdim=True)
        if not open_.any():
            break
        reading.follow((row * beams + source[row, on]).flatten())
        reading.say(told[:, -1])
    chosen = best[:, 0]
    return chosen if end is None else chosen[:, : _longest(chosen, end)]


def _longest(said: Tensor, end: int) -> int:
    """Tokens of the longest text, its ``end`` among them."""
    ended = (said == end).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, said.shape[1])
    return int(lengths.max())
