"""Measuring what a model makes of pictures and captions: what it says of a picture, and whether it finds the picture of a caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.eval import chair
from mmfast.spec import Retrieval, System

from .evaluate import caption_all


def captions_exam(session: Any, system: System, *, scenes: int = 500) -> dict[str, float]:
    """Captions of held-out scenes, and where a model compares texts with pictures, how well the true caption of each finds its picture."""
    world, template = session.world, system.stages[-1].template
    shown = world.scenes("eval", scenes)
    states = session.states(_pictures(session, shown))
    said, ended = caption_all(session, states, template)
    told = chair.caption_metrics(world, shown, said, chair.Cooccurrence(world, world.scenes("train", 2000)))
    measured = {f"caption/{name}": told[name] for name in ("recall", "chair_s", "chair_i", "len")} | {"caption/ended": ended}
    if isinstance(system.fusion, Retrieval):
        measured |= recall(scores(session, template, [world.caption(s).text for s in shown], states))
    return measured


def _pictures(session: Any, scenes: list) -> Tensor:
    pictures = torch.from_numpy(session.world.render(scenes))
    return torch.zeros_like(pictures) if session.blind else pictures


@torch.no_grad()
def scores(session: Any, template: str, texts: list[str], states: Tensor) -> Tensor:
    """Cosines ``[texts, pictures]`` of FROMAGe's space."""
    model, encode, found = session.model.eval(), session.encoder(template), []
    for text in texts:
        ids, _ = encode([("", text)])
        found.append(model.hidden(torch.tensor([ids], device=session.place.device))[:, -1])
    return model.fusion.texts(torch.cat(found)) @ model.fusion.pictures(model.connector.pooled(states)).T


def recall(scores: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of texts whose own picture is among the first k of all, ``scores`` [N, N]; of equal ones each is as likely to come first."""
    own = scores.diagonal()[:, None]
    before, equal = (scores > own).sum(1), (scores == own).sum(1)
    measured = {f"retrieval/recall@{k}": ((k - before) / equal).clamp(0, 1).mean().item() for k in at}
    return measured | {"retrieval/chance@1": 1 / len(scores)}
