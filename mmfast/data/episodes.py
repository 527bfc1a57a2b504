"""Few-shot episodes: some pictures with what is said of each, then one more, of which the model is to say it.

    world = World()
    pool = Pool(world, "single", 3000)                            # pictures of one object, by class
    episode = pool.episode(Draws(0, 1), Plan("naming", ways=2))   # two classes, each bound to a nonsense word
    say = PROMPTS["frozen"]
    say.prompt(episode)     # "<image>This is a dax. <image>This is a blicket. <image>Q: What is this? A: This is a"
    say.document(episode)   # the same with the answer, "dax.": what models train on that learn from interleaved documents
    say.turns(episode, pool.told)  # the same for a model that does not see: other words in the place of a picture, "scarlet disc"
    say.prompt(pool.episode(Draws(0, 2), Plan("vqa", shots=1)))  # "<image>Question: is there a red star? Answer: no <image>Question: .. Answer:"

Source: Frozen (arXiv:2106.13884, section 4.2 and appendix), Flamingo (arXiv:2204.14198, appendix C), OpenFlamingo (arXiv:2308.01390, appendix)
and Kosmos-1 (arXiv:2302.14045). Files of the published form (``image_1``, ``caption_1``, .., ``question_image``, ``question``, ``answer``)
are records like others: ``of_record`` makes episodes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmfast.data.synthetic import COLOURS, COLUMNS, ROWS, SHAPES, Draws, Scene, World
from mmfast.spec import Shots

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
    another picture of one of them. vqa: ``shots`` pictures, each with a question of its own whether something is there (half of it is) and the
    answer, then one more with a question.

    ``repeats``: how often the examples are said again; ``induction``: a sentence before all that says what is wanted.
    """

    task: Literal["attribute", "naming", "vqa"] = "attribute"
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


class Shown(NamedTuple):
    """An example: a picture, what is said of it, and what was asked about it; "": the prompt's own words."""

    picture: int
    answer: str
    question: str = ""


@dataclass(frozen=True)
class Episode:
    """Pictures by their numbers in a pool. ``words``: what an induction names as possible answers."""

    examples: tuple[Shown | tuple, ...]  # in order
    query: int
    answer: str
    task: str
    induction: bool = False
    words: tuple[str, ...] = ()
    question: str = ""  # about the last picture (Fast-VQA); "": the prompt's own

    def __post_init__(self):
        object.__setattr__(self, "examples", tuple(Shown(*example) for example in self.examples))

    @property
    def pictures(self) -> list[int]:
        """In reading order."""
        return [shown.picture for shown in self.examples] + [self.query]


def chosen(episode: Episode, shots: Shots) -> Episode:
    """The episode with those of its examples, in their order, that ``shots`` keeps and repeats.

    Raises:
        ValueError: it has fewer of them than are asked for.
    """
    answers, kept = list(dict.fromkeys(shown.answer for shown in episode.examples)), episode.examples
    if shots.ways is not None:
        if episode.answer not in answers:
            raise ValueError(f"has no example of the right answer, {episode.answer[:40]!r}, which ways keeps")
        if len(answers) < shots.ways:
            raise ValueError(f"has examples of {len(answers)} answers, and ways is {shots.ways}")
        answers = [episode.answer, *(a for a in answers if a != episode.answer)][: shots.ways]
        kept = tuple(shown for shown in kept if shown.answer in answers)
    if shots.inner_shots is not None:
        count = {answer: sum(shown.answer == answer for shown in kept) for answer in answers}
        if few := next((a for a in answers if count[a] < shots.inner_shots), None):
            raise ValueError(f"has {count[few]} examples of {few[:40]!r}, and inner_shots is {shots.inner_shots}")
        kept = tuple(s for i, s in enumerate(kept) if sum(o.answer == s.answer for o in kept[:i]) < shots.inner_shots)
    if shots.shots is not None:
        if len(kept) < shots.shots:
            raise ValueError(f"has {len(kept)} examples, and shots is {shots.shots}")
        kept = kept[: shots.shots]
    words = tuple(word for word in episode.words if word in answers)
    return replace(episode, examples=kept * (shots.repeats + 1), words=words, induction=episode.induction or shots.induction)


@dataclass(frozen=True)
class Prompts:
    """The words around pictures and answers. Frozen does not fix the space between two examples; Flamingo has none."""

    example: str  # behind a picture; {answer}
    query: str  # behind the last picture, up to the answer
    turn: str = "Question: {question} Answer: {answer}"  # behind a picture that has a question, up to the answer behind the last
    choose: str = "Answer with {words}."  # induction where the words are few
    induce: str = "Please answer the question."  # any other
    between: str = " "

    def after(self, question: str = "") -> str:
        """What ends an answer: to a question, or without one."""
        return (self.turn if question else self.example).partition("{answer}")[2]

    def prompt(self, episode: Episode, show: Callable[[int], str] = lambda picture: "<image>", unseen: bool = False) -> str:
        """Everything before the answer. ``show``: what stands for a picture. ``unseen``: the examples without their pictures (Flamingo's
        prompt of a task of which it has seen no picture)."""
        said = [self.induction(episode)] if episode.induction else []
        said += [("" if unseen else show(shown.picture)) + "".join(self.said(shown)) for shown in episode.examples]
        return self.between.join([*said, show(episode.query) + self.asked(episode)])

    def document(self, episode: Episode) -> str:
        """Prompt, answer and what ends it."""
        return self.prompt(episode) + self.gap(episode.question) + episode.answer + self.after(episode.question)

    def turns(self, episode: Episode, show: Callable[[int], str]) -> list[tuple[str, str]]:
        """The document as a conversation: what stands for a picture, and what is asked about it, is a question, what is said of it the answer."""
        first = self.induction(episode) + self.between if episode.induction else ""
        turns = []
        for shown in episode.examples:
            asked, answer = self.said(shown)
            turns.append((f"{show(shown.picture)} {asked}", answer + self.between))
        last = f"{show(episode.query)} {self.asked(episode)}{self.gap(episode.question)}"
        turns.append((last, episode.answer + self.after(episode.question)))
        return [(first + turns[0][0], turns[0][1]), *turns[1:]]

    def said(self, shown: Shown) -> tuple[str, str]:
        """What is asked about an example ("" without a question), and what is said of it."""
        if not shown.question:
            return "", self.example.format(answer=shown.answer)
        asked, _, after = self.turn.partition("{answer}")
        return asked.format(question=shown.question), shown.answer + after

    def asked(self, episode: Episode) -> str:
        """Between the last picture and its answer."""
        return self.turn.partition("{answer}")[0].rstrip().format(question=episode.question) if episode.question else self.query

    def gap(self, question: str) -> str:
        """Between what is asked and the answer: a space, where answers have one before them."""
        return " " if (self.turn if question else self.example).partition("{answer}")[0].endswith(" ") else ""

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
# HatefulMemes as OpenFlamingo asks it: a question is the meme's text.
PROMPTS["hateful_memes"] = replace(
    PROMPTS["open_flamingo"], turn="is an image with: '{question}' written on it. Is it hateful? Answer:{answer}<|endofchunk|>"
)
# What stands between Kosmos' examples is not published.
PROMPTS["kosmos"] = Prompts(example="An image of {answer}", query="An image of")
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
        return {"attribute": self._attribute, "naming": self._naming, "vqa": self._vqa}[plan.task](draws, plan)

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

    def _vqa(self, draws: Draws, plan: Plan) -> Episode:
        examples = []
        for _ in range(plan.shots + 1):
            here, other = self._classes(draws, 2)
            picture, asked = self._picture(draws, here), (here, other)[draws.below(2)]
            examples.append(Shown(picture, self.world.exists(self.scenes[picture], asked), self.world.ask_exists(asked)))
        *examples, last = examples
        examples *= plan.repeats + 1
        return Episode(tuple(examples), last.picture, last.answer, plan.task, plan.induction, question=last.question)

    def _classes(self, draws: Draws, count: int) -> list[int]:
        left = sorted(self.of_class)
        return [left.pop(draws.below(len(left))) for _ in range(count)]

    def _picture(self, draws: Draws, k: int, but: set[int] = frozenset()) -> int:
        """A picture of a class, another than those in ``but`` where there is one."""
        there = [p for p in self.of_class[k] if p not in but] or self.of_class[k]
        return there[draws.below(len(there))]


def of_record(texts: Mapping[str, str], answer: str, shots: Shots) -> tuple[Episode, Prompts]:
    """The episode of a record, its pictures numbered in order, and the words that it is asked in.

    Args:
        texts: of example i ``caption_i``, or ``answer_i`` and perhaps ``question_i``; ``question``, which the words may have.

    Frozen's own words are known: a caption "This is a dax." is the answer "dax", and its question asks nothing else. Other captions stand as
    they are, and so does the question where neither ``shots.prompt`` nor an example with an answer asks for words around it.
    """
    own, say, question = PROMPTS["frozen"], PROMPTS[shots.prompt or "frozen"], texts.get("question", "")
    captions = [text for name, text in texts.items() if name.startswith("caption_")]
    answers = [text for name, text in texts.items() if name.startswith("answer_")]
    if captions and answers:
        raise ValueError("has examples with captions and examples with answers, expected one kind")
    naming = question in ("", own.query) and not any(name.startswith("question_") for name in texts)
    if shots.prompt is None and not answers:
        say, question = replace(say, query=question), ""
    elif question == own.query:
        question = ""
    if captions:
        form = re.escape(own.example).replace(r"\{answer\}", "(.+)")
        known = [re.fullmatch(form, caption) for caption in captions]
        answers = [match[1] for match in known] if all(known) else captions
        say = say if all(known) else replace(say, example="{answer}")
    examples = tuple(Shown(i, said, texts.get(f"question_{i + 1}", "")) for i, said in enumerate(answers))
    words = tuple(dict.fromkeys(answers)) if naming and answer in answers else ()
    return chosen(Episode(examples, len(answers), answer, "record", words=words, question=question), shots), say


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
