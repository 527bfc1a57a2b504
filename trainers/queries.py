"""BLIP-2's first stage (arXiv:2301.12597, section 3.2): a Q-Former learns to see what texts say, no language model beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data import chat
from mmfast.eval import chair
from mmfast.losses import hard_negatives, image_text_contrast, smoothed_cross_entropy
from mmfast.models.matching import captions, rank
from mmfast.nn.query_connector import QueryConnector, similarity
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
        return (lambda *where: self._texts(found(*where))) if name in ("batch", "take") else found

    def _texts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        shown, rows = batch["image_rows"], len(batch["input_ids"])
        if len(shown) != rows or (batch["labels"][:, :1] != chat.IGNORE).any() or (batch["labels"][:, 1:2] == chat.IGNORE).any():
            raise ValueError("objective queries compares pictures with texts, a text and a picture each; another record is among them")
        mask = (batch["labels"][:, 1:] != chat.IGNORE).long()
        keys = batch["keys"] if "keys" in batch else batch["picture_ids"][shown]
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


def losses(
    connector: QueryConnector, image: Tensor, ids: Tensor, mask: Tensor, keys: Tensor, *, rows: Tensor | float, words: Tensor | float, decode: int,
    place: Place,
) -> dict[str, Tensor]:  # fmt: skip
    """Contrast, matching and captioning of a micro-batch, as shares of a step with ``rows`` rows and ``words`` words; and the share of pairs that
    are matched rightly.

    Contrast and hard negatives see the rows of one micro-batch on all processes, and nothing of the step's other micro-batches: they alone
    depend on how a step is cut. Features to contrast with are gathered without gradient, so that one process computes what many do; pictures
    to match are gathered with it. A row beside which no other picture stands has nothing to be told from: matching leaves it out, its right pair
    too, and none of its pairs counts as right.

    Args:
        image: normed states [B, N, W], each row's own. ids, mask: [B, S]. keys: [B].
        decode: the token that takes the first one's place where text is written.
    """
    read = connector.read(image)
    images, texts = connector.images(read), connector.texts(ids, mask)
    all_keys = place.gather(keys)
    i2t = similarity(images, place.gather(texts.detach())).float() / connector.temp
    t2i = similarity(place.gather(images.detach()), texts).T.float() / connector.temp
    contrast = image_text_contrast(i2t, t2i, keys, all_keys, total=rows)

    image_for, text_for = hard_negatives(t2i, keys, all_keys), hard_negatives(i2t, keys, all_keys)
    wide, real, all_images = ids, mask, image
    if place.processes > 1:
        more = int(place.gather(ids.new_tensor([ids.shape[1]])).max()) - ids.shape[1]
        wide, real, all_images = F.pad(ids, (0, more)), F.pad(mask, (0, more)), _Gathered.apply(image, place)
    all_ids, all_mask = place.gather(wide), place.gather(real)
    logits = connector.match(
        torch.cat([image, all_images[image_for], image]),
        torch.cat([wide, wide, all_ids[text_for]]),
        torch.cat([real, real, all_mask[text_for]]),
    ).float()
    belongs = (torch.arange(len(logits), device=logits.device) < len(ids)).long()
    belongs = belongs.masked_fill((image_for < 0).repeat(3), chat.IGNORE)
    matching = F.cross_entropy(logits, belongs, reduction="sum") / (3 * rows)

    told, _ = connector.continued(read.cache, torch.cat([torch.full_like(ids[:, :1], decode), ids[:, 1:]], 1), mask)
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, chat.IGNORE)
    captioning = smoothed_cross_entropy(told[:, :-1], labels, total=words)
    right = (logits.argmax(1) == belongs).sum() / (3 * rows)
    return {"contrast": contrast, "matching": matching, "captioning": captioning, "right": right}


def queries_objective(session: Session, stage: Stage, states: Tensor | None) -> Objective:
    """``L = contrast + matching + captioning``, each with weight 1; ``states`` of all pictures, where there are any, in place of pixels."""
    model, place, decode = session.model, session.place, session.text_side(stage.max_length).decode

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        image = model.connector.normed(session.states_in(batch, states))[batch["shown"]]
        rows, words = totals.float().unbind()
        found = losses(
            model.connector, image, batch["ids"], batch["mask"], batch["keys"], rows=rows, words=words, decode=decode, place=place
        )
        right = found.pop("right")
        measures = {f"loss/{name}": value.detach() for name, value in found.items()}
        return sum(found.values()), {**measures, "matching_accuracy": right, "tokens": batch["ids"].numel()}

    return Objective(step, model)


@torch.no_grad()
def measure(session: Session, scenes: list, states: Tensor, *, top: int = 16) -> dict[str, float]:
    """How a Q-Former compares held-out scenes with their clean captions, and what it says of them by itself.

    ``retrieval``: a text's picture among all, ``retrieval_text``: a picture's text; by the contrast, and ``reranked``: the best ``top`` anew by
    matching. ``matching/accuracy``: pairs that belong together, and as many whose picture or text is the most similar wrong one.
    """
    from .captions import recall

    world, side, connector = session.world, session.text_side(64), session.model.eval().connector
    told = [world.caption(scene).text for scene in scenes]
    ids, mask = (x.to(states.device) for x in side.texts(told))
    measured: dict[str, float] = {}
    for name, best in (("retrieval", 0), ("reranked", top)):
        of_pictures, of_texts = rank(connector, states, ids, mask, top=best)
        measured |= recall(of_texts, name) | recall(of_pictures, f"{name}_text")
        if not best:
            cosine = of_pictures
    same = torch.tensor([[a == b for b in told] for a in told], device=states.device)
    wrong, image, rows = cosine.masked_fill(same, -2), connector.normed(states), torch.arange(len(told), device=states.device)
    right = []
    for pictures, texts, belongs in ((rows, rows, 1), (wrong.argmax(0), rows, 0), (rows, wrong.argmax(1), 0)):
        said = torch.cat(
            [connector.match(image[p], ids[t], mask[t]) for p, t in zip(pictures.split(250), texts.split(250), strict=True)]
        ).argmax(1)
        right.append((said == belongs).double().mean().item())
    measured["matching/accuracy"] = right[0] / 2 + (right[1] + right[2]) / 4
    own = captions(connector, states, first=side.decode, last=side.last, max_new_tokens=60)
    texts = [side.tokenizer.decode(row[: row.index(side.last)] if side.last in row else row) for row in own.tolist()]
    judged = chair.caption_metrics(world, scenes, texts, chair.Cooccurrence(world, world.scenes("train", 2000)))
    return measured | {f"own_caption/{name}": judged[name] for name in ("recall", "chair_i")}
