"""Measuring a model on the shapes world: captions by CHAIR, questions by POPE, and whether the picture matters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmfast.data.synthetic import PROMPT, Scene, parse
from mmfast.eval import chair, pope
from mmfast.models.tokenizer import plain_text

from .supervised import Session


class Exam:
    """Held-out scenes, their pictures and questions; the same for every model of a seed."""

    def __init__(self, session: Session, *, scenes: int = 500, statistics_scenes: int = 10_000):
        world = session.world
        self.scenes = world.scenes("eval", scenes)
        self.pictures = torch.from_numpy(world.render(self.scenes))
        self.statistics = chair.Cooccurrence(world, world.scenes("train", statistics_scenes))
        self.questions = pope.build(world, self.scenes, self.statistics)

    def __call__(self, session: Session, *, template: str = "bare", permuted: bool = False) -> tuple[dict[str, float], dict]:
        """All metrics, flat, and per-image details: captions, false mentions and mentions.

        ``permuted`` shows every question and caption another scene's picture: what is left is what the words alone give away.
        """
        session.model.eval()
        states = session.states(self.pictures)
        if permuted:
            states = states.roll(len(states) // 2, 0)
        captions, ended = caption_all(session, states, template)
        metrics = chair.caption_metrics(session.world, self.scenes, captions, self.statistics)
        metrics["ended"] = ended
        metrics |= pope.score(self.questions, self.answers(session, states, template))
        false, total = claims(session, self.scenes, captions)
        return metrics, {"captions": captions, "false": false, "mentions": total}

    @torch.no_grad()
    def answers(self, session: Session, states: Tensor, template: str, batch: int = 1000) -> list[bool]:
        """Whether "yes" is likelier than "no" as the first word of the answer."""
        encode = session.encoder(template)
        yes, no = session.tokenizer.convert_tokens_to_ids(["yes", "no"])
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for i, q in enumerate(self.questions):
            ids, _ = encode([(f"<image> {q.text}", None)])
            by_length.setdefault(len(ids), []).append((i, ids))
        said = [False] * len(self.questions)
        for rows in by_length.values():
            for first in range(0, len(rows), batch):
                part = rows[first : first + batch]
                pictures = torch.tensor([self.questions[i].image for i, _ in part], device=states.device)
                ids = torch.tensor([ids for _, ids in part], device=session.place.device)
                hidden = session.model.hidden(ids, image_states=states[pictures])
                logits = session.model.language.get_output_embeddings()(hidden[:, -1])
                for (i, _), value in zip(part, (logits[:, yes] > logits[:, no]).tolist(), strict=True):
                    said[i] = value
        return said


def caption_all(session: Session, states: Tensor, template: str = "bare", batch: int = 250) -> tuple[list[str], float]:
    """Greedy captions of pictures given by their states, and the share that came to an end."""
    ids, _ = session.encoder(template)([(f"<image> {PROMPT}", None)])
    texts, ended = [], 0
    for part in states.split(batch):
        end = session.tokenizer.eos_token_id
        out = session.model.generate(
            torch.tensor([ids] * len(part), device=session.place.device), image_states=part, end=end, max_new_tokens=64
        )
        ended += int((out == end).any(1).sum())
        texts += [plain_text(session.tokenizer, row) for row in out.tolist()]
    return texts, ended / max(len(texts), 1)


def claims(session: Session, scenes: list[Scene], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """False mentions and mentions of every caption."""
    found = [parse(text) for text in texts]
    false = [sum(session.world.claim_error(s, m) in ("object", "colour") for m in f) for s, f in zip(scenes, found, strict=True)]
    return np.array(false), np.array([len(f) for f in found])
