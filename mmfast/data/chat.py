"""From conversations to token ids and labels: text is tokenised piece by piece and labels are made on ids, so neither can drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.spec import nearest

IGNORE = -100


@dataclass(frozen=True)
class Template:
    """The words around turns. Only answers, and the end token where it follows one, are supervised."""

    system: str = ""
    before: str = ""  # a question
    between: str = ""  # question and answer
    after: str = ""  # an answer
    end_each: bool = True  # the end token after every answer, or after the last alone
    keep_question: bool = True


TEMPLATES = {
    # Nothing but the words: the tiny models.
    "bare": Template(end_each=False),
    # LLaVA's alignment stage: the picture, then its caption; the question is dropped.
    "plain": Template(after="\n", end_each=False, keep_question=False),
    # Vicuna v1, LLaVA's instruction stage.
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        before="USER: ",
        between=" ASSISTANT: ",
    ),
}


def check_template(name: str) -> None:
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}{nearest(name, TEMPLATES)}, expected one of {', '.join(map(repr, TEMPLATES))}")


def encode(
    tokenizer: Any, template: str, turns: Sequence[tuple[str, str | None]], *, image_tokens: int, image_token: int, max_length: int = 2048
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; an answer of None leaves the prompt open for generation.

    Each ``<image>`` in a question becomes ``image_tokens`` places. What is longer than ``max_length`` (places counted) loses its end, but
    never a part of a picture.

    Raises:
        ValueError: unknown template, or a picture beyond ``max_length``.
    """
    check_template(template)
    form, ids, labels = TEMPLATES[template], [tokenizer.bos_token_id], [IGNORE]

    def add(text: str, supervised: bool = False) -> None:
        pieces = text.split("<image>")
        for i, piece in enumerate(pieces):
            if i:
                ids.extend([image_token] * image_tokens)
                labels.extend([IGNORE] * image_tokens)
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids.extend(new)
            labels.extend(new if supervised else [IGNORE] * len(new))

    add(form.system)
    for i, (question, answer) in enumerate(turns):
        if not form.keep_question:
            question = "<image>" * question.count("<image>")
        add(form.before + question + form.between)
        if answer is None:
            break
        add(answer + form.after, supervised=True)
        if form.end_each or (i == len(turns) - 1 and not form.after):
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    if len(ids) > max_length:
        if image_token in ids[max_length:]:
            raise ValueError(f"a picture ends beyond max_length={max_length}; raise it above {len(ids)} or drop turns")
        ids, labels = ids[:max_length], labels[:max_length]
    return ids, labels


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as ``[B, T]``, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out


class Rows:
    """Encoded conversations, padded once; ``batch`` cuts the columns that a selection does not need."""

    def __init__(self, encoded: Sequence[tuple[list[int], list[int]]], pad_token: int):
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self.ids = pad([ids for ids, _ in encoded], pad_token)
        self.labels = pad([labels for _, labels in encoded], IGNORE)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids and labels ``[B, T]`` and lengths ``[B]`` of some rows."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(index) else 0
        return self.ids[index, :width], self.labels[index, :width], lengths


def stack(parts: Sequence[tuple[Tensor, Tensor, Tensor]], pad_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batches of different widths on top of each other."""
    if len(parts) == 1:
        return parts[0]
    width = max(ids.shape[1] for ids, _, _ in parts)

    def widen(t: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)

    ids, labels = (torch.cat([widen(part[i], fill) for part in parts]) for i, fill in ((0, pad_token), (1, IGNORE)))
    return ids, labels, torch.cat([lengths for _, _, lengths in parts])


def lay_out(ids: Tensor, labels: Tensor, lengths: Tensor, *, packing: bool) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``rows`` (which row a token belongs to) of a batch: padded ``[B, T]``, or with ``packing`` end to end
    ``[1, sum of lengths]`` with ``position_ids`` that start anew at each row, from which transformers' attention keeps rows apart."""
    rows = torch.arange(len(ids)).unsqueeze(1).expand(ids.shape)
    if not packing:
        return {"input_ids": ids, "labels": labels, "rows": rows}
    places = torch.arange(ids.shape[1])
    keep = places < lengths.unsqueeze(1)
    labels = labels.where(places > 0, IGNORE)  # a row's first token follows nothing, least of all the row before it
    laid = {"input_ids": ids, "labels": labels, "rows": rows, "position_ids": places.expand(ids.shape)}
    return {name: value[keep].unsqueeze(0) for name, value in laid.items()}
