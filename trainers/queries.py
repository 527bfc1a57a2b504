"""BLIP-2's first stage (arXiv:2301.12597, section 3.2): a Q-Former learns to see what texts say, no language model beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data import chat
from mmfast.losses import hard_negatives, image_text_contrast, smoothed_cross_entropy
from mmfast.nn.query_connector import similarity
from mmfast.spec import Stage

from .loop import Objective
from .place import Place

if TYPE_CHECKING:
    from .session import Session


class Texts:
    """A source whose rows, one picture each, are laid out for a text side: ``ids`` and ``mask`` [B, S], ``keys`` [B], equal where two rows
    show one picture, ``shown`` [B], which of the batch's pictures. ``counts``: rows, and words that captioning scores."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # not there yet: a loader's process is making its copy
            raise AttributeError(name)
        found = getattr(self.source, name)
        return (lambda *where: self._texts(found(*where), *where)) if name in ("batch", "take") else found

    def _texts(self, batch: dict[str, Tensor], *where: Any) -> dict[str, Tensor]:
        shown, rows = batch["image_rows"], len(batch["input_ids"])
        if len(shown) != rows or (batch["labels"][:, :1] != chat.IGNORE).any() or (batch["labels"][:, 1:2] == chat.IGNORE).any():
            raise ValueError("objective queries compares pictures with texts, a text and a picture each; another record is among them")
        mask = (batch["labels"][:, 1:] != chat.IGNORE).long()
        # A stream does not know which pictures are the same; its rows are shared out one by one.
        keys = batch["picture_ids"][shown] if "picture_ids" in batch else torch.arange(rows) * where[2] + where[1]
        return {
            **{name: batch[name] for name in ("pictures", "picture_ids") if name in batch},
            "ids": batch["input_ids"][:, 1:], "mask": mask, "keys": keys, "shown": shown,
            "counts": torch.tensor([rows, int(mask[:, 1:].sum())], dtype=torch.float64),
        }  # fmt: skip


class _Gathered(torch.autograd.Function):
    """All processes' rows; a row's gradient is the sum of what all processes make of it."""

    @staticmethod
    def forward(context: Any, rows: Tensor, place: Place) -> Tensor:
        context.place, context.rows = place, len(rows)
        return place.gather(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        place = context.place
        counts = place.sum(torch.eye(place.processes, dtype=torch.float64)[place.rank] * context.rows).long().tolist()
        return place.sum(gradient.contiguous()).split(counts)[place.rank], None


def queries_objective(session: Session, stage: Stage, states: Tensor | None) -> Objective:
    """``L = contrast + matching + captioning``, each with weight 1.

    Contrast and hard negatives see the rows of one micro-batch on all processes, and nothing of the step's other micro-batches: they alone
    depend on how a step is cut. Features to contrast with are gathered without gradient, so that one process computes what many do; pictures
    to match are gathered with it.
    """
    model, place, decode = session.model, session.place, session.text_side(stage.max_length).decode
    connector, pad = model.connector, session.text_side(stage.max_length).pad_token

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        rows, words = totals[0].float(), totals[1].float()
        ids, mask, keys = batch["ids"], batch["mask"], batch["keys"]
        if states is not None:
            seen = states[batch["picture_ids"].to(states.device)].to(place.device)
        else:
            seen = model.encode(session.pixels(batch["pictures"]))
        image = connector.normed(seen)[batch["shown"]]
        read = connector.read(image)

        images, texts = connector.images(read), connector.texts(ids, mask)
        all_keys = place.gather(keys)
        i2t = similarity(images, place.gather(texts.detach())).float() / connector.temp
        t2i = similarity(place.gather(images.detach()), texts).T.float() / connector.temp
        contrast = image_text_contrast(i2t, t2i, keys, all_keys, total=rows)

        image_for, text_for = hard_negatives(t2i, keys, all_keys), hard_negatives(i2t, keys, all_keys)
        width = int(place.gather(ids.new_tensor([ids.shape[1]])).max())
        all_ids = place.gather(F.pad(ids, (0, width - ids.shape[1]), value=pad))
        all_mask = place.gather(F.pad(mask, (0, width - ids.shape[1])))
        wide, real = (F.pad(x, (0, width - ids.shape[1]), value=v) for x, v in ((ids, pad), (mask, 0)))
        pictures = torch.cat([image, _Gathered.apply(image, place)[image_for], image])
        logits = connector.match(pictures, torch.cat([wide, wide, all_ids[text_for]]), torch.cat([real, real, all_mask[text_for]])).float()
        belongs = (torch.arange(len(logits), device=logits.device) < len(ids)).long()
        matching = F.cross_entropy(logits, belongs, reduction="sum") / (3 * rows)

        told, _ = connector.continued(read.cache, torch.cat([torch.full_like(ids[:, :1], decode), ids[:, 1:]], 1), mask)
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, chat.IGNORE)
        captioning = smoothed_cross_entropy(told[:, :-1], labels, total=words)

        right = ((logits.argmax(1) == belongs).sum() / (3 * rows)).detach()
        return contrast + matching + captioning, {
            "loss/contrast": contrast.detach(), "loss/matching": matching.detach(), "loss/captioning": captioning.detach(),
            "matching_accuracy": right, "tokens": ids.numel() * 4,
        }  # fmt: skip

    return Objective(step, model)
