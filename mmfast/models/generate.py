"""Decoding: greedy or sampled, with a key/value cache, many prompts at once, all at the end or token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy, deepcopy
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from mmfast.models import encoder_decoder
from mmfast.models.decoding import check_repetition, unrepeating
from mmfast.models.tokenizer import plain_text

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel


@torch.no_grad()
def steps(
    model: MultimodalModel,
    input_ids: Tensor,
    *,
    end: int | None = None,
    stops: Sequence[int] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    no_repeat: int = 0,
    repetition_penalty: float = 1.0,
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
        stops: tokens that end a row as well; each is told as ``end``. ``model.stops`` for a text alone.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn with ``generator``.
        top_p: draw from the likeliest tokens that together have this probability (arXiv:1904.09751); 1: from all.
        no_repeat: no run of so many tokens comes a second time, the prompt's among them (transformers' ``no_repeat_ngram_size``); 0: any may.
        repetition_penalty: makes all tokens rarer that came before, the prompt's among them (``decoding.penalised``); 1: none.
        allowed: which tokens may come, bool ``[V]``, after so many new ones. Tokens that only pictures are made of never come by default.
        rule: what is made of the logits ``[B, V]`` of those that may, after so many new ones (``mmfast.models.decoding``).
        images: pixel_values, image_states or image_embeds, image_rows, image_embeds_position_mask, as for the model's forward.
    """
    check_repetition(no_repeat, repetition_penalty)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    check_stops(end, stops)
    if max_new_tokens < 1:
        return
    reading = Reading(model, input_ids, attention_mask, **images)
    told, done = reading.told, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for count in range(max_new_tokens):
        logits = reading.logits if allowed is None else reading.any_logits.masked_fill(~allowed(count), -torch.inf)
        logits = unrepeating(logits, told, no_repeat=no_repeat, repetition_penalty=repetition_penalty)
        logits = logits if rule is None else rule(count, logits)
        token = next_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        if end is not None:
            token = torch.where(done, end, stopped(token, end, stops))
            done |= token == end
        yield token
        if done.all() or count + 1 == max_new_tokens:
            break
        told = torch.cat([told, token[:, None]], 1)
        reading.say(token)


def check_stops(end: int | None, stops: Sequence[int]) -> None:
    if len(stops) and end is None:
        raise ValueError("generate: stops are told as the token end, and none is given; say end=")


def stopped(token: Tensor, end: int, stops: Sequence[int]) -> Tensor:
    """Tokens with ``end`` in the place of each of ``stops``."""
    for stop in stops:
        token = torch.where(token == stop, end, token)
    return token


class Reading:
    """Rows of tokens that a model has read, and what it makes of what comes next.

    ``told``: the prompts ``[B, T]``; of an encoder-decoder, whose encoder has these, the decoder's start token. ``any_logits``: of every next
    token, ``[B, V]`` in fp32; ``logits``: those of codes of pictures, which text cannot have, at minus infinity.
    """

    def __init__(self, model: MultimodalModel, input_ids: Tensor, attention_mask: Tensor | None = None, **images: Tensor | None):
        self.model, config, split = model, model.language.config, model.is_encoder_decoder
        if attention_mask is not None and not split and not attention_mask[:, -1].all():
            raise ValueError(
                "attention_mask: a prompt is padded on its right, where its answer begins; pad on the left (tokenizer.padding_side)"
            )
        input_ids = model.with_slots(input_ids, images)
        self.told = torch.full_like(input_ids[:, :1], encoder_decoder.start_token(config)) if split else input_ids
        self._cache, self._mask = encoder_decoder.empty_cache() if split else DynamicCache(config=config), attention_mask
        self._positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
        self._images = model.embed_images(**images)
        self._read(input_ids)

    @property
    def logits(self) -> Tensor:
        return self.model.without_codes(self.any_logits)

    def say(self, token: Tensor) -> None:
        """Goes on with a token ``[B]``."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], 1)
            self._positions = self._positions[:, -1:] + 1
        self._read(token[:, None])

    def logits_of(self, ids: Tensor) -> Tensor:
        """Goes on with ``ids [B, T]`` at once: what it makes of the token behind each, ``[B, T, V]`` in fp32. What pads a row on the right is not
        seen by what stands before it."""
        if self._mask is not None:
            raise ValueError("logits_of: rows that are padded on the left go on token by token")
        return self.model.language.get_output_embeddings()(self._read(ids)).float()

    def __copy__(self) -> Reading:
        """One that can go on otherwise: what was read is copied, pictures are not."""
        new = object.__new__(Reading)
        new.__dict__.update(self.__dict__, _cache=deepcopy(self._cache))
        return new

    def spread(self, count: int) -> None:
        """Every row ``count`` times, one after another."""
        self._cache.batch_repeat_interleave(count)
        if self._mask is not None:
            self._mask, self._positions = (x.repeat_interleave(count, 0) for x in (self._mask, self._positions))
        self._images = None if self._images is None else self._images.spread(count)
        self.told, self.any_logits = (x.repeat_interleave(count, 0) for x in (self.told, self.any_logits))

    def follow(self, rows: Tensor) -> None:
        """Goes on from these rows ``[B]``, each of which has the prompt and the pictures of the one whose place it takes."""
        self._cache.reorder_cache(rows)

    def _read(self, ids: Tensor) -> Tensor:
        model, masks = self.model, {} if self._mask is None else {"attention_mask": self._mask, "position_ids": self._positions}
        hidden, self._cache = model.fusion(
            model.language, ids, self._images, model.image_token, past_key_values=self._cache, use_cache=True, **masks
        )
        self.any_logits = model.language.get_output_embeddings()(hidden[:, -1]).float()
        self._images = model.fusion.carry(ids, self._images, model.image_token)
        return hidden


def next_token(logits: Tensor, *, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row of ``logits [B, V]``: the likeliest, or drawn."""
    if temperature > 0:
        return torch.multinomial(nucleus((logits / temperature).softmax(-1), top_p), 1, generator=generator)[:, 0]
    return logits.argmax(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``[B, V]`` with all but the smallest set of likeliest tokens that holds ``top_p`` set to 0; the likeliest always stays."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # what lies before a token already has top_p
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


def generate(model: MultimodalModel, input_ids: Tensor, *, beams: int = 1, length_penalty: float = 1.0, **options) -> Tensor:
    """All new tokens ``[B, up to max_new_tokens]``, ``end`` included; other arguments as for ``steps``.

    Args:
        beams: above 1, the best of so many texts that are followed side by side (``mmfast.models.beams``); no token is drawn then.
        length_penalty: of beams: a text's log-probability is divided by its length to this power, so that more favours longer ones.
    """
    if beams != 1:
        from mmfast.models.beams import search

        return search(model, input_ids, beams=beams, length_penalty=length_penalty, **options)
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
    prompt, logps = Reading(model, input_ids, **images), []
    first = prompt.any_logits.log_softmax(-1)
    for option in options:
        logp, reading = first[:, option[0]], copy(prompt) if len(option) > 1 else prompt
        for before, token in pairwise(option):
            reading.say(input_ids.new_full((len(input_ids),), before))
            logp = logp + reading.any_logits.log_softmax(-1)[:, token]
        logps.append(logp)
    return torch.stack(logps, 1)


def text_pieces(tokenizer, tokens: Iterable[Tensor], stop: str = "") -> Iterator[list[str]]:
    """Every step's new text, a piece a row, from the tokens of ``steps``; joined, a row's pieces are ``plain_text`` of its tokens.

    A piece is given out once no later token can change it: half a character waits for its other bytes, and a space for what follows it.
    ``stop`` ends a row's text (``until``): what may be its beginning waits, and when all rows have it no more tokens are asked for.
    """
    ids: list[list[int]] = []
    told: list[str] = []
    for token in tokens:
        if not ids:
            ids, told = [[] for _ in token], [""] * len(token)
        pieces, over = [], bool(stop)
        for row, new in enumerate(token.tolist()):
            ids[row].append(new)
            # The replacement character stands for the beginning of one that is not complete yet.
            text = plain_text(tokenizer, ids[row]).rstrip("\ufffd").rstrip(" ")
            over &= stop in text
            text = until(text, stop)
            waits = max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            pieces.append(_beyond(told, row, text[: len(text) - waits]))
        yield pieces
        if over:
            break
    if ids:
        yield [_beyond(told, row, until(plain_text(tokenizer, ids[row]), stop)) for row in range(len(ids))]


def until(text: str, stop: str) -> str:
    """A text up to where ``stop`` is in it, if it is."""
    return text.partition(stop)[0] if stop else text


def _beyond(told: list[str], row: int, text: str) -> str:
    if not text.startswith(told[row]):  # it shrank: wait until it has grown past what was told
        return ""
    piece, told[row] = text[len(told[row]) :], text
    return piece
