"""What models are measured by beside captions and questions: a built-in data set brings its exam.

An exam takes a session whose model is trained, and its recipe; it returns flat measures, shares as fractions. ``evaluate.Exam`` is the one
for captions and questions, which every model of the shapes world's words takes whose data has no exam here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmfast.data.episodes import Episode, Plan, Pool, Prompts, mixed, prompts_of
from mmfast.models.tokenizer import plain_text
from mmfast.spec import System

from .captions import captions_exam
from .drawn import drawing_exam
from .grounding import grounded

# ---------------------------------------------------------------------------------------------------------------- few shots

SHOTS = (0, 1, 2, 4)
# Of two classes that were just given nonsense words, the one that is shown: by how often each was shown, with and without the sentence that
# names the words, and with the examples said twice.
NAMINGS = {
    "naming/plain": Plan("naming"),
    "naming/inner_1": Plan("naming", induction=True),
    "naming/inner_3": Plan("naming", inner_shots=3, induction=True),
    "naming/repeats_1": Plan("naming", induction=True, repeats=1),
}


def few_shot(session: Any, system: System, *, episodes: int = 300) -> dict[str, float]:
    """Shares of episodes whose answer is exactly right: generated greedily, and at its end right behind it.

    ``few_shot/N``: an attribute that N examples tell (0: nobody can know which of three is meant, so that a third is the most); by chance: the
    best blind guess, which knows the attribute. ``naming/..``: ``NAMINGS``; by chance one of the two words. A model whose last stage was
    blind is shown black pictures here, too.
    """
    pool, stage = Pool(session.world, "eval", 1500), system.stages[-1]
    pictures = torch.from_numpy(session.world.render(pool.scenes))
    states = session.states(torch.zeros_like(pictures) if getattr(stage.data, "blind", False) else pictures)
    colours, shapes = session.world.config.colours, session.world.config.shapes
    plans = {f"few_shot/{n}": Plan("attribute", shots=n) for n in SHOTS} | NAMINGS
    measured = {
        name: right_share(session, mixed(pool, episodes, purpose=3, plans=(plan,)), prompts_of(stage.template), states)
        for name, plan in plans.items()
    }
    return measured | {"few_shot/chance": (1 / colours + 1 / shapes + 1 / (colours * shapes)) / 3, "naming/chance": 1 / 2}


def right_share(session: Any, episodes: Sequence[Episode], say: Prompts, states: torch.Tensor) -> float:
    """The share of episodes that are answered exactly; ``states`` of their pool's pictures."""
    said = answers(session, [(say.prompt(e), e.pictures) for e in episodes], states, end=say.after)
    return sum(got == e.answer for got, e in zip(said, episodes, strict=True)) / max(len(episodes), 1)


def answers(
    session: Any, asked: Sequence[tuple[str, Sequence[int]]], states: torch.Tensor, *, end: str = "", max_new_tokens: int = 8
) -> list[str | None]:
    """Greedy answers to interleaved prompts: a text with ``<image>`` places and its pictures' numbers among ``states [M, N, D]``.

    Args:
        end: text whose first token ends an answer, as the end token does. An answer that comes to no end is None.
    """
    tokenizer, place, model = session.tokenizer, session.place, session.model.eval()
    ends = {tokenizer.eos_token_id, *tokenizer(end, add_special_tokens=False)["input_ids"][:1]}
    encode, by_length = session.encoder("bare", 1 << 30), {}
    for i, (text, _) in enumerate(asked):
        ids, _ = encode([(text, None)])
        by_length.setdefault(len(ids), []).append((i, ids))  # rows of one length need no padding
    said: list[str | None] = [None] * len(asked)
    for rows in by_length.values():
        shown = torch.tensor([p for i, _ in rows for p in asked[i][1]], dtype=torch.long, device=states.device)
        ids = torch.tensor([ids for _, ids in rows], device=place.device)
        out = model.generate(ids, image_states=states, image_rows=shown, max_new_tokens=max_new_tokens)
        for (i, _), row in zip(rows, out.tolist(), strict=True):
            at = next((at for at, token in enumerate(row) if token in ends), None)
            said[i] = None if at is None else plain_text(tokenizer, row[:at]).strip()
    return said


def recall(scores: torch.Tensor, name: str = "retrieval", at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of texts whose own picture is among the first k of all, ``scores`` [N, N]; of equal ones each is as likely to come first."""
    own = scores.diagonal()[:, None]
    before, equal = (scores > own).sum(1), (scores == own).sum(1)
    measured = {f"{name}/recall@{k}": ((k - before) / equal).clamp(0, 1).mean().item() for k in at}
    return measured | {f"{name}/chance@1": 1 / len(scores)}


EXAMS: dict[str, Callable[[Any, System], dict[str, float]]] = {
    "shapes_captions": captions_exam,
    "shapes_single": few_shot,
    "shapes_episodes": few_shot,
    "shapes_drawing": drawing_exam,
    "shapes_grounded": grounded,
}
