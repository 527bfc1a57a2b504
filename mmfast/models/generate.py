"""Decoding: greedy or sampled, with a key/value cache, many prompts at once, all at the end or token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from mmfast.models.tokenizer import plain_text
from mmfast.ops import linear_logp

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel


@torch.no_grad()
def steps(
    model: MultimodalModel,
    input_ids: Tensor,
    *,
    end: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    no_repeat: int = 0,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    allowed: Callable[[int], Tensor] | None = None,
    rule: Callable[[int, Tensor], Tensor] | None = None,
    **images: Tensor | None,
) -> Iterator[Tensor]:
    """The next token of every prompt, ``[B]``, again and again, until the token ``end`` in all rows or the limit.

    Args:
        input_ids: ``[B, T]`` with placeholders; prompts of one length, or padded on the **left** with an ``attention_mask`` that is 0 there
            (positions then count real tokens only).
        end: ends a row, and fills what comes after it.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn with ``generator``.
        top_p: draw from the likeliest tokens that together have this probability (arXiv:1904.09751); 1: from all.
        no_repeat: no run of so many tokens comes a second time, the prompt's among them (transformers' ``no_repeat_ngram_size``); 0: any may.
        allowed: which tokens may come, bool ``[V]``, after so many new ones. Tokens that only pictures are made of never come by default.
        rule: what is made of the logits ``[B, V]`` of those that may, after so many new ones (``mmfast.models.decoding``).
        images: pixel_values, image_states or image_embeds, image_rows, image_embeds_position_mask, as for the model's forward.
    """
    if no_repeat < 0:
        raise ValueError(f"generate: expected no_repeat >= 0, got {no_repeat}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    head, cache = model.language.get_output_embeddings(), DynamicCache(config=model.language.config)
    input_ids = model.with_slots(input_ids, images)
    embeds = model.embed_images(**images)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
    told = input_ids
    step, codes = input_ids, getattr(model.encoder, "words", None)
    for count in range(max_new_tokens):
        masks = {} if attention_mask is None else {"attention_mask": attention_mask, "position_ids": positions}
        hidden, cache = model.fusion(model.language, step, embeds, model.image_token, past_key_values=cache, use_cache=True, **masks)
        logits = head(hidden[:, -1]).float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed(count), -torch.inf)
        elif codes is not None:
            logits = logits.index_fill(-1, codes.to(logits.device), -torch.inf)
        if no_repeat:
            logits = unrepeated(logits, told, no_repeat)
        logits = logits if rule is None else rule(count, logits)
        token = next_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        if end is not None:
            token = torch.where(done, end, token)
            done |= token == end
        yield token
        if done.all():
            break
        told = torch.cat([told, token[:, None]], 1) if no_repeat else told
        step, embeds = token[:, None], model.fusion.carry(step, embeds, model.image_token)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], 1)
            positions = positions[:, -1:] + 1


def next_token(logits: Tensor, *, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row of ``logits [B, V]``: the likeliest, or drawn."""
    if temperature > 0:
        return torch.multinomial(nucleus((logits / temperature).softmax(-1), top_p), 1, generator=generator)[:, 0]
    return logits.argmax(-1)


def unrepeated(logits: Tensor, told: Tensor, size: int) -> Tensor:
    """``logits [B, V]`` without the tokens that would end a run of ``size`` tokens which ``told [B, T]`` holds already."""
    if told.shape[1] < size:
        return logits
    runs = told.unfold(1, size, 1)  # [B, T - size + 1, size]
    again = (runs[..., :-1] == told[:, None, told.shape[1] - size + 1 :]).all(-1) & (runs[..., -1] < logits.shape[-1])
    row, at = again.nonzero(as_tuple=True)
    return logits.index_put((row, runs[row, at, -1]), logits.new_tensor(-torch.inf))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``[B, V]`` with all but the smallest set of likeliest tokens that holds ``top_p`` set to 0; the likeliest always stays."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # what lies before a token already has top_p
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


def generate(model: MultimodalModel, input_ids: Tensor, **options) -> Tensor:
    """All new tokens ``[B, up to max_new_tokens]``, ``end`` included; arguments as for ``steps``."""
    tokens = list(steps(model, input_ids, **options))
    return torch.stack(tokens, 1) if tokens else input_ids.new_zeros(len(input_ids), 0)


@torch.no_grad()
def option_logps(model: MultimodalModel, input_ids: Tensor, options: Sequence[Sequence[int]], **images: Tensor | None) -> Tensor:
    """Log-probability of each of some answers behind each prompt, ``[B, len(options)]``: closed questions are answered by the likeliest.

    Args:
        input_ids: ``[B, T]``, prompts of one length.
        options: token ids of the answers.
        images: as for ``steps``.
    """
    embeds, head = model.embed_images(**images), model.language.get_output_embeddings()
    logps = []
    for option in options:
        said = torch.tensor(option, device=input_ids.device).expand(len(input_ids), -1)
        hidden = model.hidden(torch.cat([input_ids, said], 1), image_embeds=embeds)[:, input_ids.shape[1] - 1 : -1]
        logps.append(linear_logp(hidden, head.weight, said, head.bias).sum(-1))
    return torch.stack(logps, 1)


def text_pieces(tokenizer, tokens: Iterable[Tensor]) -> Iterator[list[str]]:
    """Every step's new text, a piece a row, from the tokens of ``steps``; joined, a row's pieces are ``plain_text`` of its tokens.

    A piece is given out once no later token can change it: half a character waits for its other bytes, and a space for what follows it.
    """
    ids: list[list[int]] = []
    told: list[str] = []
    for token in tokens:
        if not ids:
            ids, told = [[] for _ in token], [""] * len(token)
        pieces = []
        for row, new in enumerate(token.tolist()):
            ids[row].append(new)
            # The replacement character stands for the beginning of one that is not complete yet.
            pieces.append(_beyond(told, row, plain_text(tokenizer, ids[row]).rstrip("\ufffd").rstrip(" ")))
        yield pieces
    if ids:
        yield [_beyond(told, row, plain_text(tokenizer, ids[row])) for row in range(len(ids))]


def _beyond(told: list[str], row: int, text: str) -> str:
    if not text.startswith(told[row]):  # it shrank: wait until it has grown past what was told
        return ""
    piece, told[row] = text[len(told[row]) :], text
    return piece
