"""Few-shot episodes: some pictures with what is said of each, then one more, of which the model is to say it.

    world = World()
    pool = Pool(world, "single", 3000)                            # pictures of one object, by class
    episode = pool.episode(Draws(0, 1), Plan("naming", ways=2))   # two classes, each bound to a nonsense word
    say = PROMPTS["frozen"]
    say.prompt(episode)     # "<image>This is a dax. <image>This is a blicket. <image>Q: What is this? A: This is a"
    say.document(episode)   # the same with the answer, "dax.": what models train on that learn from interleaved documents
    say.turns(episode, pool.told)  # the same for a model that does not see: other words in the place of a picture, "scarlet disc"

Source: Frozen (arXiv:2106.13884, section 4.2 and appendix) and Flamingo (arXiv:2204.14198, appendix C). Files of the published form
(``image_1``, ``caption_1``, .., ``question_image``, ``question``, ``answer``) are records like others: ``mmfast.data.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmfast.data.synthetic import COLOURS, COLUMNS, ROWS, SHAPES, Draws, Scene, World

# Names that no picture has before an episode gives it to a class; the first of Open-Ended miniImageNet.
NONSENSE = ("dax", "blicket", "shously", "slation", "perpo")
# What may be asked of a picture without saying so: an example's answer tells.
ATTRIBUTES: dict[str, Callable[[Scene, World], str]] = {
    "colour": lambda scene, world: COLOURS[scene.objects[0].colour][0],
    "shape": lambda scene, world: SHAPES[scene.objects[0].shape][0],
    "object": lambda scene, world: world.class_name(world.class_ids(scene)[0]),
    "place": lambda scene, world: f"{ROWS[world.third(scene.objects[0].row)]} {COLUMNS[world.third(scene.objects[0].col)]}",
}


@dataclass(frozen=True)
class Plan:
    """How episodes are made.

    attribute: ``shots`` pictures, each with its colour (or its shape, or both, one of ``attributes`` an episode), then one to answer likewise;
    without shots nobody can know which. naming: ``ways`` classes, each bound to a nonsense word and shown in ``inner_shots`` pictures, then
    another picture of one of them.

    ``repeats``: how often the examples are said again; ``induction``: a sentence before all that says what is wanted.
    """

    task: Literal["attribute", "naming"] = "attribute"
    shots: int = 4
    attributes: tuple[str, ...] = ("colour", "shape", "object")
    ways: int = 2
    inner_shots: int = 1
    repeats: int = 0
    induction: bool = False
    order: Literal["interleaved", "shuffled"] = "interleaved"  # naming: every class once, then again, or as it comes

    def __post_init__(self):
        for name, holds, expected in (
            ("ways", 1 <= self.ways <= len(NONSENSE), f"1 to {len(NONSENSE)}, as many as there are words"),
            ("shots", self.shots >= 0, "0 or more"),
            ("inner_shots", self.inner_shots >= 0, "0 or more"),
            ("repeats", self.repeats >= 0, "0 or more"),
            ("attributes", set(self.attributes) <= ATTRIBUTES.keys() and self.attributes, f"some of {', '.join(ATTRIBUTES)}"),
        ):
            if not holds:
                raise ValueError(f"Plan: {name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True)
class Episode:
    """Pictures by their numbers in a pool. ``words``: what an induction names as possible answers."""

    examples: tuple[tuple[int, str], ...]  # picture and answer, in order
    query: int
    answer: str
    task: str
    induction: bool = False
    words: tuple[str, ...] = ()
    question: str = ""  # about the last picture (Fast-VQA); "": the prompt's own

    @property
    def pictures(self) -> list[int]:
        """In reading order."""
        return [picture for picture, _ in self.examples] + [self.query]


@dataclass(frozen=True)
class Prompts:
    """The words around pictures and answers. Frozen does not fix the space between two examples; Flamingo has none."""

    example: str  # behind a picture; {answer}
    query: str  # behind the last picture, up to the answer
    turn: str = "Question: {question} Answer: {answer}"  # behind the last picture where the episode has a question
    choose: str = "Answer with {words}."  # induction where the words are few
    induce: str = "Please answer the question."  # any other
    between: str = " "

    @property
    def after(self) -> str:
        """What ends an answer."""
        return self.example.partition("{answer}")[2]

    def prompt(self, episode: Episode, show: Callable[[int], str] = lambda picture: "<image>", unseen: bool = False) -> str:
        """Everything before the answer. ``show``: what stands for a picture. ``unseen``: the examples without their pictures (Flamingo's
        prompt of a task of which it has seen no picture)."""
        said = [self.induction(episode)] if episode.induction else []
        said += [("" if unseen else show(picture)) + self.example.format(answer=answer) for picture, answer in episode.examples]
        return self.between.join([*said, show(episode.query) + self.asked(episode)])

    def document(self, episode: Episode) -> str:
        """Prompt, answer and what ends it."""
        return f"{self.prompt(episode)} {episode.answer}{self.after}"

    def turns(self, episode: Episode, show: Callable[[int], str]) -> list[tuple[str, str]]:
        """The document as a conversation: what stands for a picture is a question, what is said of it the answer."""
        first = self.induction(episode) + self.between if episode.induction else ""
        turns = [(show(picture) + " ", self.example.format(answer=answer) + self.between) for picture, answer in episode.examples]
        turns.append((f"{show(episode.query)} {self.asked(episode)} ", episode.answer + self.after))
        return [(first + turns[0][0], turns[0][1]), *turns[1:]]

    def asked(self, episode: Episode) -> str:
        """Between the last picture and its answer."""
        return self.turn.partition("{answer}")[0].format(question=episode.question).rstrip() if episode.question else self.query

    def induction(self, episode: Episode) -> str:
        *others, last = episode.words or ("",)
        return self.choose.format(words=" or ".join(filter(None, (", ".join(others), last)))) if episode.words else self.induce


# By a stage's template; one that is not here speaks as Frozen.
PROMPTS = {
    "frozen": Prompts(example="This is a {answer}.", query="Q: What is this? A: This is a"),
    "flamingo": Prompts(
        example="Output: {answer}<|endofchunk|>",
        query="Output:",
        turn="Question: {question} Answer: {answer}<|endofchunk|>",
        between="",
    ),
}
# OpenFlamingo's questions are the same but for one word (arXiv:2308.01390, appendix).
PROMPTS["open_flamingo"] = replace(
    PROMPTS["flamingo"], example="Output:{answer}<|endofchunk|>", turn="Question:{question} Short answer:{answer}<|endofchunk|>"
)
# The words of episodes that the shapes world does not have; they come behind its own in a tiny model's vocabulary.
OTHER_COLOURS = ("scarlet", "emerald", "navy", "golden", "amber", "violet", "chestnut", "jet")
FILLERS = tuple(
    [
        "there",
        "is",
        "in",
        "the",
        "picture",
        "we",
        "see",
        "at",
        "of",
        "above",
        "below",
        "left",
        "right",
        "top",
        "middle",
        "bottom",
        "centre",
        "and",
    ]
)
WORDS = (
    "This",
    "Q",
    "What",
    "this",
    "A",
    "Output",
    "Question",
    "Answer",
    "with",
    "or",
    "Please",
    "answer",
    "question",
    *NONSENSE,
    *OTHER_COLOURS,
)


def prompts_of(template: str) -> Prompts:
    return PROMPTS.get(template, PROMPTS["frozen"])


class Pool:
    """Pictures of one object each, and the episodes that can be made of them; every class is as likely."""

    def __init__(self, world: World, split: str, count: int):
        self.world = world
        self.scenes = [scene for scene in world.scenes(split, count, classes=(1, 1)) if len(scene.objects) == 1]
        self.of_class: dict[int, list[int]] = {}
        for number, scene in enumerate(self.scenes):
            self.of_class.setdefault(world.class_ids(scene)[0], []).append(number)

    def name(self, picture: int) -> str:
        """ "red circle"."""
        return ATTRIBUTES["object"](self.scenes[picture], self.world)

    def told(self, picture: int) -> str:
        """The same in words that answers never use, anywhere among up to four that say nothing: "of scarlet the disc". What a language model
        reads where a seeing one has a picture; it has to look for the words, as no place is theirs."""
        thing, draws = self.scenes[picture].objects[0], Draws(self.world.config.seed, 9, 5, picture)
        words = [OTHER_COLOURS[thing.colour], SHAPES[thing.shape][2]]
        words += [FILLERS[draws.below(len(FILLERS))] for _ in range(draws.below(5))]
        return " ".join(draws.shuffled(words))

    def episode(self, draws: Draws, plan: Plan) -> Episode:
        return self._naming(draws, plan) if plan.task == "naming" else self._attribute(draws, plan)

    def _attribute(self, draws: Draws, plan: Plan) -> Episode:
        said = ATTRIBUTES[plan.attributes[draws.below(len(plan.attributes))]]
        *shown, query = (self._picture(draws, self._classes(draws, 1)[0]) for _ in range(plan.shots + 1))
        examples = [(picture, said(self.scenes[picture], self.world)) for picture in shown]
        return Episode(tuple(examples * (plan.repeats + 1)), query, said(self.scenes[query], self.world), plan.task, plan.induction)

    def _naming(self, draws: Draws, plan: Plan) -> Episode:
        classes, words = self._classes(draws, plan.ways), draws.shuffled(NONSENSE)[: plan.ways]
        rounds = []
        for _ in range(plan.inner_shots):
            pairs = draws.shuffled(zip(classes, words, strict=True))
            rounds += [(self._picture(draws, k, {p for p, _ in rounds}), word) for k, word in pairs]
        examples = (draws.shuffled(rounds) if plan.order == "shuffled" else rounds) * (plan.repeats + 1)
        asked = draws.below(plan.ways)
        query = self._picture(draws, classes[asked], {p for p, _ in rounds})
        return Episode(tuple(examples), query, words[asked], plan.task, plan.induction, tuple(words))

    def _classes(self, draws: Draws, count: int) -> list[int]:
        left = sorted(self.of_class)
        return [left.pop(draws.below(len(left))) for _ in range(count)]

    def _picture(self, draws: Draws, k: int, but: set[int] = frozenset()) -> int:
        """A picture of a class, another than those in ``but`` where there is one."""
        there = [p for p in self.of_class[k] if p not in but] or self.of_class[k]
        return there[draws.below(len(there))]


def mixed(pool: Pool, count: int, *, purpose: int, plans: Sequence[Plan]) -> list[Episode]:
    """Episodes of all plans in turn; those of one seed and purpose are always the same."""
    return [pool.episode(Draws(pool.world.config.seed, 9, purpose, i), plans[i % len(plans)]) for i in range(count)]


def orderings(episode: Episode, draws: Draws, count: int = 6) -> list[Episode]:
    """The same episode with its examples in so many drawn orders; what a model says of all is averaged (Flamingo's prompt ensembling)."""
    return [replace(episode, examples=tuple(draws.shuffled(episode.examples))) for _ in range(count)]


def most_similar(queries: Tensor, support: Tensor, shots: int) -> Tensor:
    """Which pictures to show before each query: the ``shots`` of the support with the largest cosine to it, the most similar last (RICES,
    arXiv:2109.05014, as Flamingo uses it). queries [Q, D], support [S, D], shots at most S -> indices [Q, shots]."""
    cosine = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(support, dim=-1).T
    return cosine.topk(shots).indices.flip(-1)


# What documents teach: either task, with few examples or more, announced or not.
TAUGHT = (
    *(Plan("attribute", shots=n) for n in (0, 1, 2, 4)),
    *(Plan("naming", inner_shots=1, induction=i % 2 == 0, repeats=i // 2) for i in range(4)),
)
# What a language model reads before it sees: longer ones, each of which is an episode of every smaller number of examples, too.
TOLD = (
    *(Plan("attribute", shots=n) for n in (7, 7, 7, 1, 0)),
    *(Plan("naming", inner_shots=3, induction=i < 2) for i in range(3)),
)
