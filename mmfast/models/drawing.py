"""Pictures out of a language model that shares its vocabulary with an image tokenizer (Chameleon, arXiv:2405.09818).

A picture is exactly N codes between a token that begins it and one that ends it: ``may_follow`` is that rule, ``draw`` makes one picture for
each prompt, under guidance, and ``write`` text and pictures as the model likes. Letters: B rows, T tokens, V vocabulary, N codes a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmfast.models.fusions import SharedTokensFusion
from mmfast.models.generate import next_token, steps
from mmfast.models.interleaved import Part, encode
from mmfast.models.tokenizer import plain_text

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel


@dataclass(frozen=True)
class Guidance:
    """Logits of three prompts become ``u + image (i - u) + text (f - i)``: f the whole prompt, i what of it is pictures, u nothing but the
    sequence's first token. 1 and 1 is the whole prompt alone."""

    image: float = 1.2
    text: float = 3.0


def may_follow(model: MultimodalModel, ids: Tensor, *, room: int, pictures: bool = True) -> Tensor:
    """Which tokens may follow a row ``ids [T]``, bool ``[V]``.

    In a picture only codes, and after N of them only its end. In text neither codes nor an end; the beginning of a picture only with
    ``pictures``, and where ``room`` (tokens that can still come) holds the whole of it.
    """
    begin, end, *_ = model.new_tokens
    codes, count = model.encoder.words.to(ids.device), model.system.encoder.tokens
    allowed = torch.zeros(model.language.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=ids.device)
    begun = (ids == begin).nonzero()
    drawn = len(ids) - 1 - int(begun[-1]) if len(begun) else count + 1
    if drawn < count:
        allowed[codes] = True
    elif drawn == count:
        allowed[end] = True
    else:
        allowed[:] = True
        allowed[codes] = allowed[end] = allowed[model.image_token] = False
        allowed[begin] = pictures and room >= count + 2
    return allowed


@torch.no_grad()
def draw_codes(
    model: MultimodalModel, input_ids: Tensor, *, attention_mask: Tensor | None = None, guidance: Guidance | None = Guidance(),
    temperature: float = 0.7, top_p: float = 0.9, generator: torch.Generator | None = None, **images: Tensor | None,
) -> Tensor:  # fmt: skip
    """Codes ``[B, N]`` of a picture behind each prompt.

    Args:
        input_ids: ``[B, T]`` prompts of text, and of pictures by their placeholders or their tokens; of one length, or padded on the **left**
            with an ``attention_mask`` that is 0 there. The token that begins the picture is put behind them.
        guidance: None draws from the whole prompt alone.
        temperature, top_p, generator, images: as for ``mmfast.models.generate.steps``.

    Raises:
        ValueError: a model without shared tokens, or prompts that leave no room for a picture.
    """
    _check(model)
    count, codes = model.system.encoder.tokens, model.encoder.words.to(input_ids.device)
    begin, end, *_ = model.new_tokens
    context = model.language.config.max_position_embeddings
    if input_ids.shape[1] + count + 2 > context:
        raise ValueError(f"draw: a prompt of {input_ids.shape[1]} tokens leaves no room for {count + 2} within the context of {context}")
    ids = model.fusion.tokens(input_ids, model.embed_images(**images), model.image_token)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    ids, mask = (torch.cat([t, t.new_full((len(t), 1), last)], 1) for t, last in ((ids, begin), (mask, 1)))
    rows = 1
    if guidance is not None:
        ids, mask, rows = *_three(ids, mask, torch.tensor([begin, end], device=ids.device), codes), 3
    cache, drawn, step = DynamicCache(config=model.language.config), [], ids
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for _ in range(count):
        hidden, cache = model.fusion(
            model.language,
            step,
            None,
            model.image_token,
            past_key_values=cache,
            use_cache=True,
            attention_mask=mask,
            position_ids=positions,
        )
        logits = torch.nn.functional.linear(hidden[:, -1], model.language.get_output_embeddings().weight[codes]).float()
        if guidance is not None:
            whole, seen, free = logits.chunk(3)
            logits = free + guidance.image * (seen - free) + guidance.text * (whole - seen)
        drawn.append(next_token(logits, temperature=temperature, top_p=top_p, generator=generator))
        step = codes[drawn[-1]].repeat(rows)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.stack(drawn, 1)


def _three(ids: Tensor, mask: Tensor, borders: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Whole prompts, their pictures alone, and nothing of them, below each other and padded on the left, ``[3 B, T]``. Each row's first token
    and the beginning of the picture to come are in all three."""
    first = mask.cumsum(-1) == 1
    first &= mask.bool()
    last = torch.zeros_like(first)
    last[:, -1] = True
    picture = torch.isin(ids, torch.cat([borders, codes])) & mask.bool()
    kept = [mask.bool(), picture | first | last, first | last]
    # What is kept goes to the right, in its order.
    order = torch.cat(kept).int().argsort(dim=1, stable=True)
    return ids.repeat(3, 1).gather(1, order), torch.cat(kept).long().gather(1, order)


def draw(model: MultimodalModel, input_ids: Tensor, **options) -> Tensor:
    """A picture behind each prompt, uint8 ``[B, H, W, 3]``; arguments as for ``draw_codes``."""
    return pixels(model, draw_codes(model, input_ids, **options))


def pixels(model: MultimodalModel, codes: Tensor) -> Tensor:
    """Codes ``[B, n]`` -> uint8 ``[B, H, W, 3]`` through the tokenizer's decoder; a picture cut short is filled up with its first code."""
    _check(model)
    vq = model.encoder.vision
    side = model.system.encoder.size // vq.patch
    return ((vq.draw(codes, grid=(side, side)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def write(
    model: MultimodalModel, input_ids: Tensor, *, end: int | None = None, max_new_tokens: int = 512, pictures: bool = True,
    guidance: Guidance | None = Guidance(), temperature: float = 0.7, top_p: float = 0.9, generator: torch.Generator | None = None,
    **images: Tensor | None,
) -> Iterator[tuple[str, list[int]]]:  # fmt: skip
    """What one prompt ``[1, T]`` goes on with, piece by piece: ("text", ids) and ("picture", codes) in turn, until the token ``end`` (which is
    the last of its text) or the limit, in which a picture counts N + 2. ``pictures`` False is text alone."""
    _check(model)
    if len(input_ids) != 1:
        raise ValueError(f"write: expected one prompt [1, T], got {list(input_ids.shape)}")
    begin, close, *_ = model.new_tokens
    options = dict(temperature=temperature, top_p=top_p, generator=generator)
    ids = model.fusion.tokens(input_ids, model.embed_images(**images), model.image_token)
    limit = min(ids.shape[1] + max_new_tokens, model.language.config.max_position_embeddings)
    while ids.shape[1] < limit:
        start, said = ids.shape[1], []

        def allowed(new: int, ids: Tensor = ids, start: int = start) -> Tensor:
            return may_follow(model, ids[0], room=limit - start - new, pictures=pictures)

        for token in steps(model, ids, end=begin, max_new_tokens=limit - start, allowed=allowed, **options):
            said.append(int(token))
            if said[-1] in (begin, end):
                break
        drawing = said[-1] == begin
        if text := said[:-1] if drawing else said:
            yield "text", text
        ids = torch.cat([ids, ids.new_tensor([text])], 1)
        if not drawing:
            return
        codes = draw_codes(model, ids, guidance=guidance, **options)
        yield "picture", codes[0].tolist()
        picture = [begin, *model.encoder.words[codes[0].to(model.encoder.words.device)].tolist(), close]
        ids = torch.cat([ids, ids.new_tensor([picture])], 1)


def compose(model: MultimodalModel, tokenizer: Any, parts: Sequence[Part], **options) -> list[str | Tensor]:
    """What the model goes on with behind texts and pictures: texts and pictures, uint8 [H, W, 3], in turn, up to the end token. ``parts`` as for
    ``mmfast.models.interleaved.encode``, so that what was composed can be asked about; ``options`` as for ``write``."""
    ids, shown = encode(model, tokenizer, parts)
    composed: list[str | Tensor] = []
    for kind, said in write(model, ids, **{"end": tokenizer.eos_token_id, **options}, **shown):
        composed.append(plain_text(tokenizer, said) if kind == "text" else pixels(model, torch.tensor([said], device=ids.device))[0])
    return [part for part in composed if not isinstance(part, str) or part]


def _check(model: MultimodalModel) -> None:
    if not isinstance(model.fusion, SharedTokensFusion):
        raise ValueError(
            f"{model.system.name}: only a model of shared tokens draws, and its fusion is {type(model.system.fusion).__name__}"
        )
