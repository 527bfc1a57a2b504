"""Measuring what a model makes of pictures and captions: what it says of a picture, and whether it finds the picture of a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.data import chat
from mmfast.data.synthetic import PROMPT
from mmfast.eval import chair
from mmfast.ops import linear_logp
from mmfast.spec import Retrieval, System

from . import queries
from .evaluate import alike, caption_all


def captions_exam(session: Any, system: System, *, scenes: int = 500) -> dict[str, float]:
    """Captions of held-out scenes up to their first full stop, and ``caption/gain``: how much likelier a token of the true caption is under its
    picture than under another scene's, in nats. Where a model compares texts with pictures, how well each caption finds its picture; a
    Q-Former only while it was last trained to, for what it learns after that for a language model its heads do not follow."""
    world, template = session.world, system.stages[-1].template
    shown = world.scenes("eval", scenes)
    states = session.states(session.exam_pictures(shown))
    if system.stages[-1].objective == "queries":
        return queries.measure(session, shown, states)
    texts = [world.caption(s).text for s in shown]
    said, ended = caption_all(session, states, template)
    said = [text.partition(".")[0] + "." * ("." in text) for text in said]
    told = chair.caption_metrics(world, shown, said, chair.Cooccurrence(world, world.scenes("train", 2000)))
    measured = {f"caption/{name}": told[name] for name in ("recall", "chair_s", "chair_i", "len")} | {"caption/ended": ended}
    own, other = (likelihood(session, template, texts, seen) for seen in (states, states.roll(scenes // 2, 0)))
    measured["caption/gain"] = own - other
    if isinstance(system.fusion, Retrieval):
        encode = session.encoder(template)
        measured |= recall(scores(session, [encode([("", text)])[0] for text in texts], states))
    return measured


@torch.no_grad()
def likelihood(session: Any, template: str, texts: list[str], states: Tensor, batch: int = 100) -> float:
    """Mean log-probability of the tokens of captions under pictures given by their states."""
    model, encode = session.model.eval(), session.encoder(template)
    head = model.language.get_output_embeddings()
    rows = chat.Rows([encode([(f"<image> {PROMPT}", text)]) for text in texts], encode.pad_token)
    total, tokens = 0.0, 0
    for index in torch.arange(len(texts)).split(batch):
        ids, labels, _ = (part.to(session.place.device) for part in rows.batch(index))
        scored = int((labels[:, 1:] != chat.IGNORE).sum())
        hidden = model.hidden(ids, labels=labels, image_states=states[index], **session.beside(ids, labels))
        total += linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias).sum().item()
        tokens += scored
    return total / max(tokens, 1)


@torch.no_grad()
def scores(session: Any, texts: Sequence[Sequence[int]], states: Tensor, shown: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Cosines ``[texts, pictures]`` of FROMAGe's space; texts by their token ids up to [RET], with ``shown``, the numbers of the pictures among
    ``states`` that stand in each."""
    model = session.model.eval()
    rets: list[Tensor] = [states.new_empty(0)] * len(texts)
    for numbers, ids in alike(texts):
        rows = [] if shown is None else [picture for number in numbers for picture in shown[number]]
        images = {"image_states": states[torch.tensor(rows, device=states.device)]} if rows else {}
        _, last = model.fusion.read(model, ids.to(session.place.device), (slice(None), -1), **images)
        for number, state in zip(numbers, last, strict=True):
            rets[number] = state
    return model.fusion.texts(torch.stack(rets)) @ model.fusion.pictures(model.connector.pooled(states)).T


def recall(scores: Tensor, name: str = "retrieval", at: tuple[int, ...] = (1, 5, 10), own: Tensor | None = None) -> dict[str, float]:
    """Share of texts that have a picture of their own among the first k of all, and that share by chance for k = 1.

    Args:
        scores: ``[texts, pictures]``, or the other way round; of equal ones each is as likely to come first.
        own: which belong together, bool; by default the same numbers.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device) if own is None else own
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    before, equal = (scores > best).sum(1), scores == best
    wrong, tied = (equal & ~own).sum(1), equal.sum(1)
    missed, found = torch.ones(len(scores), dtype=torch.double, device=scores.device), {}
    for k in range(1, max(at) + 1):  # place k holds one of the tied that are left, if there is any
        drawn = (k - 1 - before).clamp_min(0)
        missed *= torch.where(k > before, (wrong - drawn).clamp_min(0) / (tied - drawn).clamp_min(1), 1)
        found[k] = 1 - missed.mean().item()
    return {f"{name}/recall@{k}": found[k] for k in at} | {f"{name}/chance@1": own.double().mean().item()}
