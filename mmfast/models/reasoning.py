"""Kosmos-1's two ways to ask that take a model more than once (arXiv:2302.14045): Raven's matrices, and a rationale before an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.models.build import MultimodalModel
from mmfast.models.generate import option_logps
from mmfast.models.interleaved import Part, encode, write

# Of n pictures; the exact words of the paper's test are not settled.
RAVEN = ("Here are {n} images:", "The following image is:", "Is it correct?")
RATIONALE = "Introduce this picture in detail:"


def raven(
    model: MultimodalModel, tokenizer: Any, matrix: Sequence[Part], candidates: Sequence[Part], *, words: tuple[str, str, str] = RAVEN,
    answer: str = " Yes",
) -> Tensor:  # fmt: skip
    """Log-probability of ``answer`` behind each candidate ``[C]``; the largest is the model's choice.

    Args:
        matrix: its pictures but the last, in reading order.
        candidates: pictures for the last place, six in the paper, each asked about by itself.
        words: before the matrix (``{n}``: how many pictures), before the candidate, and behind it.

    Raises:
        ValueError: as ``mmfast.models.interleaved.encode``, or no candidate, or an answer without a token.
    """
    options = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not len(candidates) or not options:
        raise ValueError(f"raven: expected at least one candidate and an answer of a token or more, got {len(candidates)} and {answer!r}")
    first = words[0].format(n=len(matrix))
    rows = [encode(model, tokenizer, [first, *matrix, words[1], candidate, words[2]]) for candidate in candidates]
    ids, pictures = torch.cat([ids for ids, _ in rows]), {name: torch.cat([given[name] for _, given in rows]) for name in rows[0][1]}
    return option_logps(model, ids, [options], **pictures)[:, 0]


def explained(
    model: MultimodalModel, tokenizer: Any, parts: Sequence[Part], question: str, *, rationale: str = RATIONALE, **options: Any
) -> tuple[str, str]:
    """What the model says of texts and pictures when ``rationale`` asks, and its answer to ``question`` with that before it (multimodal chain of
    thought); ``options`` as for ``mmfast.models.interleaved.write``, which also raises what is wrong."""
    why = write(model, tokenizer, [*parts, rationale], **options)
    return why, write(model, tokenizer, [*parts, f"{rationale} {why}".rstrip(), question], **options)
