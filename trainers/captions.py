"""Measuring what a model makes of pictures and captions: what it says of a picture, and whether it finds the picture of a caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.data import chat
from mmfast.data.synthetic import PROMPT
from mmfast.eval import chair
from mmfast.spec import Retrieval, System

from . import queries
from .evaluate import caption_all


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
        measured |= recall(scores(session, template, texts, states))
    return measured


@torch.no_grad()
def likelihood(session: Any, template: str, texts: list[str], states: Tensor, batch: int = 100) -> float:
    """Mean log-probability of the tokens of captions under pictures given by their states."""
    model, encode = session.model.eval(), session.encoder(template)
    rows = chat.Rows([encode([(f"<image> {PROMPT}", text)]) for text in texts], encode.pad_token)
    total, tokens = 0.0, 0
    for index in torch.arange(len(texts)).split(batch):
        ids, labels, _ = (part.to(session.place.device) for part in rows.batch(index))
        scored = int((labels[:, 1:] != chat.IGNORE).sum())
        total -= model(ids, labels=labels, image_states=states[index], **session.beside(ids, labels)).loss.item() * scored
        tokens += scored
    return total / max(tokens, 1)


@torch.no_grad()
def scores(session: Any, template: str, texts: list[str], states: Tensor) -> Tensor:
    """Cosines ``[texts, pictures]`` of FROMAGe's space."""
    model, encode, found = session.model.eval(), session.encoder(template), []
    for text in texts:
        ids, _ = encode([("", text)])
        found.append(model.hidden(torch.tensor([ids], device=session.place.device))[:, -1])
    return model.fusion.texts(torch.cat(found)) @ model.fusion.pictures(model.connector.pooled(states)).T


def recall(scores: Tensor, name: str = "retrieval", at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of texts whose own picture is among the first k of all, ``scores`` [N, N]; of equal ones each is as likely to come first."""
    own = scores.diagonal()[:, None]
    before, equal = (scores > own).sum(1), (scores == own).sum(1)
    measured = {f"{name}/recall@{k}": ((k - before) / equal).clamp(0, 1).mean().item() for k in at}
    return measured | {f"{name}/chance@1": 1 / len(scores)}
