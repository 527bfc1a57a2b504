"""What models are measured by beside captions and questions: a built-in data set brings its exam.

An exam takes a session whose model is trained, and its recipe; it returns flat measures, shares as fractions. ``evaluate.Exam`` is the one
for captions and questions, which every model of the shapes world's words takes whose data has no exam here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmfast.data import supervised
from mmfast.data.chat import behind_a_word
from mmfast.data.episodes import ATTRIBUTES, Episode, Plan, Pool, Prompts, mixed, most_similar, orderings, prompts_of
from mmfast.data.synthetic import COLOURS, SHAPES, Draws
from mmfast.models.generate import option_logps
from mmfast.models.tokenizer import plain_text
from mmfast.spec import System

from .captions import captions_exam
from .drawn import drawing_exam
from .evaluate import alike
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


def few_shot(session: Any, system: System, *, episodes: int = 300, plans: Mapping[str, Plan] | None = None) -> dict[str, float]:
    """Shares of episodes whose answer is exactly right: generated greedily, and at its end right behind it.

    ``few_shot/N``: an attribute that N examples tell (0: nobody can know which of three is meant, so that a third is the most); by chance: the
    best blind guess, which knows the attribute. ``naming/..``: ``NAMINGS``; by chance one of the two words. A model whose last stage was
    blind is shown black pictures here, too. ``plans``: other ones by name, in place of these.
    """
    (pool, states), stage = pool_states(session, system), system.stages[-1]
    colours, shapes = session.world.config.colours, session.world.config.shapes
    own = {f"few_shot/{n}": Plan("attribute", shots=n) for n in SHOTS} | NAMINGS
    measured = {
        name: right_share(session, mixed(pool, episodes, purpose=3, plans=(plan,)), prompts_of(stage.template), states)
        for name, plan in (own if plans is None else plans).items()
    }
    if plans is not None:
        return measured
    return measured | {"few_shot/chance": (1 / colours + 1 / shapes + 1 / (colours * shapes)) / 3, "naming/chance": 1 / 2}


def pool_states(session: Any, system: System) -> tuple[Pool, torch.Tensor]:
    """Pictures that no training has shown, and the tower's states of them."""
    pool = Pool(session.world, "eval", 1500)
    return pool, session.states(session.exam_pictures(pool.scenes))


def in_context(session: Any, system: System, *, episodes: int = 300) -> dict[str, float]:
    """``few_shot``, and how Flamingo is asked (arXiv:2204.14198, section 3 and appendix B):

    ``few_shot/0_told``: the words of two examples without their pictures. ``ranked/..``: the likeliest of all colours and shapes, after four
    examples; ``rices``: those most like the query by the tower's states, out of 300 pictures; ``ensemble``: of the mean log-probability over
    six orders of the examples; ``swapped``: a control, every picture that of another episode.
    """
    measured, (pool, states), stage = few_shot(session, system, episodes=episodes), pool_states(session, system), system.stages[-1]
    say, world, tokenizer = prompts_of(stage.template), session.world, session.tokenizer
    told = mixed(pool, episodes, purpose=3, plans=(Plan("attribute", shots=2),))
    said = answers(session, [(say.prompt(e, unseen=True), [e.query]) for e in told], states, end=say.after())
    measured["few_shot/0_told"] = sum(got == e.answer for got, e in zip(said, told, strict=True)) / len(told)

    words = [name for name, _ in COLOURS[: world.config.colours]] + [shape[0] for shape in SHAPES[: world.config.shapes]]
    ends, encode = say.after().strip(), session.encoder("bare", 1 << 30)
    options = [tokenizer(f"{word}{ends}", add_special_tokens=False)["input_ids"] for word in words]
    asked = mixed(pool, episodes, purpose=3, plans=(Plan("attribute", attributes=("colour", "shape")),))

    def logps(episodes: Sequence[Episode], states: torch.Tensor) -> torch.Tensor:
        """[episodes, options]; all prompts have one length, as every answer is one word."""
        ids = torch.tensor([encode([(say.prompt(e), None)])[0] for e in episodes], device=session.place.device)
        shown = torch.tensor([p for e in episodes for p in e.pictures], device=states.device)
        return option_logps(session.model.eval(), ids, options, image_states=states, image_rows=shown, **session.beside(ids))

    def right(logps: torch.Tensor) -> float:
        best = logps.argmax(-1).tolist()
        return sum(words[i] == e.answer for i, e in zip(best, asked, strict=True)) / len(asked)

    queries, pooled = [e.query for e in asked], states.mean(1)
    support = torch.tensor(sorted(set(range(len(pool.scenes))) - set(queries))[:300])
    near = support[most_similar(pooled[queries], pooled[support.to(states.device)], min(4, len(support))).cpu()].tolist()
    colours = words[: world.config.colours]
    similar = []
    for e, shown in zip(asked, near, strict=True):
        name = ATTRIBUTES["colour" if e.answer in colours else "shape"]
        similar.append(replace(e, examples=tuple((p, name(pool.scenes[p], world)) for p in shown)))
    orders = [orderings(e, Draws(world.config.seed, 9, 4, i)) for i, e in enumerate(asked)]
    each = torch.stack([logps(same, states) for same in zip(*orders, strict=True)])
    return measured | {
        "ranked/4": right(logps(asked, states)),
        "ranked/4_rices": right(logps(similar, states)),
        "ranked/4_ensemble": right(each.mean(0)),
        "ranked/4_swapped": right(logps(asked, states.roll(len(states) // 2, 0))),
    }


def right_share(session: Any, episodes: Sequence[Episode], say: Prompts, states: torch.Tensor) -> float:
    """The share of episodes of one plan that are answered exactly; ``states`` of their pool's pictures."""
    end = say.after(episodes[0].question) if episodes else ""
    said = answers(session, [(say.prompt(e), e.pictures) for e in episodes], states, end=end)
    return sum(got == e.answer for got, e in zip(said, episodes, strict=True)) / max(len(episodes), 1)


def answers(
    session: Any, asked: Sequence[tuple[str, Sequence[int]]], states: torch.Tensor, *, end: str = "", max_new_tokens: int = 8
) -> list[str | None]:
    """Greedy answers to interleaved prompts: a text with ``<image>`` places and its pictures' numbers among ``states [M, N, D]``.

    Args:
        end: text whose first token ends an answer, as the end token does. An answer that comes to no end is None.
    """
    tokenizer, place, model = session.tokenizer, session.place, session.model.eval()
    ends = {tokenizer.eos_token_id, *behind_a_word(tokenizer, end)[:1]}
    encode = session.encoder("bare", 1 << 30)
    said: list[str | None] = [None] * len(asked)
    for numbers, ids in alike([encode([(text, None)])[0] for text, _ in asked]):
        shown = torch.tensor([p for i in numbers for p in asked[i][1]], dtype=torch.long, device=states.device)
        ids = ids.to(place.device)
        out = model.generate(ids, image_states=states, image_rows=shown, max_new_tokens=max_new_tokens, **session.beside(ids))
        for i, row in zip(numbers, out.tolist(), strict=True):
            at = next((at for at, token in enumerate(row) if token in ends), None)
            said[i] = None if at is None else plain_text(tokenizer, row[:at]).strip()
    return said


def instructed(session: Any, system: System, *, scenes: int = 300) -> dict[str, float]:
    """``instructions/right``: the share of instructions in text about held-out captions that are answered exactly; ``instructions/constant``: that
    of the answer which is right most often."""
    shown = session.world.scenes("eval", scenes)
    asked = [supervised.instruction(session.world, scene, i)[0] for i, scene in enumerate(shown)]
    said = answers(session, [(text, ()) for text, _ in asked], session.states(session.exam_pictures(shown[:1])))
    right = [got == answer for got, (_, answer) in zip(said, asked, strict=True)]
    commonest = Counter(answer for _, answer in asked).most_common(1)[0][1]
    return {"instructions/right": sum(right) / len(asked), "instructions/constant": commonest / len(asked)}


EXAMS: dict[str, Callable[[Any, System], dict[str, float]]] = {
    "shapes_captions": captions_exam,
    "shapes_single": few_shot,
    "shapes_episodes": in_context,
    "shapes_drawing": drawing_exam,
    "shapes_grounded": grounded,
    "shapes_instructions": instructed,
}
