"""What a supervised stage reads: pictures in memory and encoded conversations about them, behind one interface for every origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfast.data import chat, images
from mmfast.data.episodes import ATTRIBUTES, TAUGHT, TOLD, WORDS, Plan, Pool, mixed, prompts_of
from mmfast.data.formats import Record
from mmfast.data.mixtures import Mixed
from mmfast.data.regions import REGION
from mmfast.data.synthetic import COLOURS, PROMPT, SHAPES, Scene, World
from mmfast.spec import Data

# encode(turns) -> ids, labels: chat.encode with the tokenizer, template and picture size filled in.
Encode = Callable[[Sequence[tuple[str, str | None]]], tuple[list[int], list[int]]]


class Source:
    """Items, each one row of every column of conversations and the pictures that all these rows show, in their order; all in memory.

    Each column's loss is a mean over its own answer tokens and the columns' losses add up, so that long captions do not drown short answers:
    ``counts`` of a batch are the answer tokens by column, and a row's tokens weigh one over the step's total of its column.
    """

    def __init__(
        self, pictures: np.ndarray | Tensor, columns: Sequence[chat.Rows], pad_token: int, shown: Sequence[Sequence[int]] | None = None
    ):
        """``shown``: the numbers of each item's pictures; None: item i shows picture i."""
        self.pictures = torch.as_tensor(pictures)  # uint8 [M, H, W, 3]
        self.columns, self.pad_token = columns, pad_token
        self.shown = [[i] for i in range(len(self.pictures))] if shown is None else shown
        self.packing, self.pad_to, self.with_pictures = False, 1, True
        self.asked: chat.Questions | None = None  # that a Q-Former reads beside the pictures

    def __len__(self) -> int:
        return len(self.shown)

    @property
    def picture_count(self) -> int:
        return len(self.pictures)

    def load_pictures(self, ids: Tensor) -> Tensor:
        """uint8 ``[M, H, W, 3]``."""
        return self.pictures[ids]

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The items' rows, column after column.

        ``input_ids``, ``labels`` and ``rows`` as of :func:`chat.lay_out`; ``groups`` ``[B]`` the column of each row and ``counts``; the
        pictures (unless ``with_pictures`` is off, for whoever has their states) with their ``picture_ids``, and ``image_rows``: which of
        them stands at each row's placeholders.
        """
        batch, scored = self.lay_out(index, self.columns)
        groups = torch.arange(len(self.columns)).repeat_interleave(len(index))
        return {**batch, "groups": groups, "counts": scored.view(len(self.columns), -1).sum(1).double()}

    def lay_out(self, index: Tensor, columns: Sequence[chat.Rows]) -> tuple[dict[str, Tensor], Tensor]:
        """The items' rows of some columns with their pictures, and the scored tokens of each row."""
        ids, labels, lengths = chat.stack([column.batch(index) for column in columns], self.pad_token)
        shown = torch.tensor([picture for i in index.tolist() for picture in self.shown[i]], dtype=torch.long)
        pictures, rows = shown.unique(return_inverse=True)  # one that several rows show is read once
        return {
            **chat.lay_out(ids, labels, lengths, packing=self.packing, pad_to=self.pad_to, pad_token=self.pad_token, questions=self.asked),
            "picture_ids": pictures,
            "image_rows": rows.repeat(len(columns)),
            **({"pictures": self.load_pictures(pictures)} if self.with_pictures else {}),
        }, (labels[:, 1:] != chat.IGNORE).sum(1)


class Shapes(Source):
    """The shapes world: a caption and four packed yes/no turns a scene (one for a language model that learns one answer a row), planted errors
    among them, or clean captions alone (``turns`` 0)."""

    def __init__(
        self, world: World, encode: Encode, pad_token: int, *, split: str = "train", count: int = 10_000, turns: int = 4, planted: bool = True
    ):  # fmt: skip
        self.world, self.scenes = world, world.scenes(split, count)
        columns = [[encode([(f"<image> {PROMPT}", world.caption(s, planted=planted).text)]) for s in self.scenes]]
        if turns:
            asked = [world.turns(scene, turns, planted=planted) for scene in self.scenes]
            columns.append([encode([(f"<image> {first}", answer), *rest]) for (first, answer), *rest in asked])
        super().__init__(world.render(self.scenes), [chat.Rows(column, pad_token) for column in columns], pad_token)

    def words(self) -> tuple[list[str], Tensor, Tensor]:
        """Colour, shape and position words, whether each is true of a picture ``[M, W]``, and the classes in it ``[M, C]``."""
        c = self.world.config
        names = (
            [n for n, _ in COLOURS[: c.colours]]
            + [s[0] for s in SHAPES[: c.shapes]]
            + ["top", "middle", "bottom", "left", "centre", "right"]
        )
        true, classes = torch.zeros(len(self.scenes), len(names)), torch.zeros(len(self.scenes), c.classes)
        for i, scene in enumerate(self.scenes):
            for o in scene.objects:
                place = c.colours + c.shapes
                hit = [o.colour, c.colours + o.shape, place + self.world.third(o.row), place + 3 + self.world.third(o.col)]
                true[i, hit] = 1
            classes[i, self.world.class_ids(scene)] = 1
        return names, true, classes


class Documents(Source):
    """Interleaved documents over pictures in memory, all their text supervised. ``shown``: each one's pictures, in reading order."""

    def __init__(self, pictures: np.ndarray, texts: Sequence[str], shown: Sequence[Sequence[int]], encode: chat.Encoder):
        encoded = [encode.record(Record(i, f"#{i}", document=text)) for i, text in enumerate(texts)]
        # One that was cut shows the pictures that are left of it.
        left = [pictures[: ids.count(encode.image_token) // encode.image_tokens] for pictures, (ids, _) in zip(shown, encoded, strict=True)]
        super().__init__(pictures, [chat.Rows(encoded, encode.pad_token)], encode.pad_token, left)


def shapes_text(world: World, encode: chat.Encoder, count: int = 10_000) -> Documents:
    """Captions as text alone, two of every scene: what a language model has read before it sees."""
    texts = [" ".join(world.caption(s, variant=v).text for v in (0, 1)) for s in world.scenes("train", count)]
    return Documents(np.empty((0, world.config.pixels, world.config.pixels, 3), np.uint8), texts, [[]] * len(texts), encode)


def shapes_single(world: World, encode: chat.Encoder, count: int = 6000) -> Documents:
    """Pictures of one object, each with three captions in the words of an episode's examples: "This is a red circle.", "This is a red.", "This
    is a circle.". Which of them is meant, a picture alone does not tell."""
    pool, say = Pool(world, "single", count), prompts_of(encode.template)
    said = [(i, ATTRIBUTES[name](scene, world)) for i, scene in enumerate(pool.scenes) for name in Plan().attributes]
    texts = ["<image>" + say.example.format(answer=answer) for _, answer in said]
    return Documents(world.render(pool.scenes), texts, [[i] for i, _ in said], encode)


def shapes_episodes(world: World, encode: chat.Encoder, count: int = 6000) -> Documents:
    """Episodes as interleaved documents."""
    pool, say = Pool(world, "single", 3000), prompts_of(encode.template)
    episodes = mixed(pool, count, purpose=1, plans=TAUGHT)
    return Documents(world.render(pool.scenes), [say.document(e) for e in episodes], [e.pictures for e in episodes], encode)


def shapes_told(world: World, encode: chat.Encoder, count: int = 10_000) -> Source:
    """Episodes without pictures: a language model that never changes knows from here what examples are for. Other words stand where a picture
    would, and like pictures they are read and not said."""
    pool, say = Pool(world, "single", 3000), prompts_of(encode.template)
    bare = replace(encode, template="bare")  # the turns have all their words
    rows = [bare(say.turns(episode, pool.told)) for episode in mixed(pool, count, purpose=2, plans=TOLD)]
    nothing = np.empty((0, world.config.pixels, world.config.pixels, 3), np.uint8)
    return Source(nothing, [chat.Rows(rows, encode.pad_token)], encode.pad_token, [[]] * len(rows))


def shapes_instructions(world: World, encode: chat.Encoder, count: int = 3000) -> Source:
    """Instructions of text alone: a caption is the input, and whether, or how often, it tells of something is asked. Only the answer is learnt."""
    rows = [encode(instruction(world, scene, i)) for i, scene in enumerate(world.scenes("train", count))]
    nothing = np.empty((0, world.config.pixels, world.config.pixels, 3), np.uint8)
    return Source(nothing, [chat.Rows(rows, encode.pad_token)], encode.pad_token, [[]] * len(rows))


def instruction(world: World, scene: Scene, number: int) -> list[tuple[str, str]]:
    """The instruction of a scene and its answer: "yes" or "no", and for every other ``number`` a count."""
    asked = world.count_turns(scene) if number % 2 else world.turns(scene, 1)
    question, answer = asked[number // 2 % len(asked)]
    return [(f"{question} {world.caption(scene).text}", answer)]


class Grounded(Source):
    """The shapes world with places: of every scene a caption, half of them with boxes behind what they name, and questions for places, a class a
    turn. The clean caption; several boxes of one phrase in reading order."""

    def __init__(self, world: World, encode: chat.Encoder, *, split: str = "train", count: int = 6000):
        self.world, self.scenes = world, world.scenes(split, count)
        columns: list[list] = [[], []]
        for i, scene in enumerate(self.scenes):
            for rows, row in zip(columns, (self.caption(world, scene, told=i % 2 == 0), self.places(world, scene)), strict=True):
                turns, boxes = row
                rows.append(encode.record(Record(i, f"#{i}", turns=turns, boxes=boxes, pictures=(_Drawn(world.config.pixels),))))
        super().__init__(world.render(self.scenes), [chat.Rows(rows, encode.pad_token) for rows in columns], encode.pad_token)

    @staticmethod
    def boxes(scene: Scene, k: int, shapes: int) -> tuple[tuple[float, ...], ...]:
        """Those of a class, in reading order."""
        found = sorted((o.row, o.col, o.box) for o in scene.objects if shapes * o.colour + o.shape == k)
        return tuple(box for *_, box in found)

    @classmethod
    def caption(cls, world: World, scene: Scene, *, told: bool):
        """(turns, boxes): "<grounding> we see <phrase>a red circle</phrase><region> top left and .."."""
        said, text, boxes, last = world.caption(scene), "", [], 0
        if not told:
            return (("<image>", said.text),), ()
        for clause in said.clauses:
            end = said.text.rindex(" ", 0, said.text.rindex(" ", 0, clause.end))  # its last two words say where
            text += f"{said.text[last : clause.start]}<phrase>{said.text[clause.start : end]}</phrase>{REGION}"
            boxes.append(cls.boxes(scene, clause.class_id, world.config.shapes))
            last = end
        return (("<image>", f"<grounding> {text}{said.text[last:]}"),), tuple(boxes)

    @classmethod
    def places(cls, world: World, scene: Scene):
        """(turns, boxes): "<grounding><phrase>a red circle</phrase>" and where it is, for every class."""
        turns, boxes = [], []
        for i, (k, n) in enumerate(zip(world.class_ids(scene), scene.classes, strict=True)):
            turns.append(("<image>" * (i == 0) + f"<grounding><phrase>{world.counted(k, n.count)}</phrase>", REGION))
            boxes.append(cls.boxes(scene, k, world.config.shapes))
        return tuple(turns), tuple(boxes)


@dataclass(frozen=True)
class _Drawn:
    """What records ask of a picture that is in memory already: its size."""

    pixels: int

    def size(self) -> tuple[int, int]:
        return (self.pixels, self.pixels)


def mixture(sources: Sequence[Source], weights: Sequence[float | None], seed: int, *, by_tokens: bool = False) -> Source:
    """Several sources in one stage: each row of each of their columns is an item. ``weights`` as of ``Mixed``, ``by_tokens`` as of
    ``mmfast.data.sources.Conversations``."""
    pictures, rows, shown, sizes = [], [], [], []
    if by_tokens:
        tokens = [sum(int(c.lengths.sum()) for c in s.columns) / sum(map(len, s.columns)) for s in sources]
        weights = [None if w is None else w / mean for w, mean in zip(weights, tokens, strict=True)]
    for source in sources:
        first = sum(map(len, pictures))
        pictures.append(source.pictures)
        rows += [column.batch(torch.arange(len(column))) for column in source.columns]
        for _ in source.columns:
            shown += [[first + picture for picture in pictures_of] for pictures_of in source.shown]
        sizes.append(len(source) * len(source.columns))
    mixed = Source(torch.cat(pictures), [chat.Rows.of(*chat.stack(rows, sources[0].pad_token))], sources[0].pad_token, shown)
    mixed.permutation = Mixed(sizes, weights, seed).order
    return mixed


def shapes_crowded(world: World, encode: chat.Encoder, count: int = 3000) -> Documents:
    """Centred pictures of up to twelve classes, without words: what an image tokenizer of few codes learns from in few steps."""
    scenes = world.centred(world.scenes("train", count, classes=(1, 12)))
    return Documents(world.render(scenes), ["<image>"] * len(scenes), [[i] for i in range(len(scenes))], encode)


def shapes_drawing(world: World, encode: chat.Encoder, count: int = 6000) -> Documents:
    """Centred scenes of one class, a quarter of them of two, with their clean captions: half of them the caption first, half the picture."""
    one = count * 3 // 4
    scenes = world.centred([*world.scenes("train", one, classes=(1, 1)), *world.scenes("train", count - one, one, classes=(2, 2))])
    captions = [drawing_caption(world, scene) for scene in scenes]
    texts = [f"{caption}<image>" if i % 2 else f"<image>{caption}" for i, caption in enumerate(captions)]
    return Documents(world.render(scenes), texts, [[i] for i in range(len(scenes))], encode)


def drawing_caption(world: World, scene: Scene) -> str:
    """The clauses alone: "a red circle top left and two blue stars middle right"."""
    caption = world.caption(scene)
    return caption.text[caption.clauses[0].start : -1]


class EasyVQA(Source):
    """The ``easy-vqa`` package (MIT): 64 x 64 pictures of one coloured shape, with questions and one-word answers; an item is a question."""

    def __init__(self, encode: Encode, pad_token: int, *, train: bool = True):
        root, part = easy_vqa_folder(), "train" if train else "test"
        self.records = [tuple(r) for r in json.loads((root / part / "questions.json").read_text())]
        count = 1 + max(picture for _, _, picture in self.records)
        pictures = np.stack([images.load(root / part / "images" / f"{i}.png", 64) for i in range(count)])
        rows = chat.Rows([encode([(f"<image> {question}", answer)]) for question, answer, _ in self.records], pad_token)
        super().__init__(pictures, [rows], pad_token, [[picture] for _, _, picture in self.records])

    @staticmethod
    def vocabulary() -> tuple[str, ...]:
        """Every word of both parts, lower and upper case as they stand; the special tokens first."""
        import re

        words: dict[str, None] = dict.fromkeys(("<pad>", "<bos>", "<eos>", "<unk>", "<image>"))
        for part in ("train", "test"):
            for question, answer, _ in json.loads((easy_vqa_folder() / part / "questions.json").read_text()):
                words.update(dict.fromkeys(re.findall(r"\w+|[^\w\s]+", f"{question} {answer}")))
        return tuple(words)

    @staticmethod
    def answer_words() -> list[str]:
        """What what-questions of the training part are answered with."""
        records = json.loads((easy_vqa_folder() / "train" / "questions.json").read_text())
        return sorted({answer for _, answer, _ in records} - {"yes", "no"})

    def words(self) -> tuple[list[str], Tensor, Tensor]:
        """The words that answers to what-questions give, whether each is such an answer of a picture, and the same as classes."""
        told: list[set[str]] = [set() for _ in self.pictures]
        for _, answer, picture in self.records:
            if answer not in ("yes", "no"):
                told[picture].add(answer)
        names = sorted(set().union(*told))
        true = torch.tensor([[float(n in t) for n in names] for t in told])
        return names, true, true


def easy_vqa_folder() -> Path:
    try:
        import easy_vqa
    except ImportError:
        raise ValueError("the easy-vqa data is a package of its own: pip install easy-vqa") from None
    return Path(easy_vqa.__file__).parent / "data"


def vocabulary(names: set[str], world: World) -> tuple[str, ...]:
    """The words of a tiny model that reads these built-in sets."""
    if "easy_vqa" in names:
        return EasyVQA.vocabulary()
    return (*world.vocabulary, *WORDS) if any(name in EPISODES for name in names) else world.vocabulary


# The sets that are episodes, or belong to them.
EPISODES = ("shapes_single", "shapes_episodes", "shapes_told")


def make(data: Data, world: World, encode: chat.Encoder) -> Source:
    """The source of a built-in data set (``mmfast.spec.BUILT_IN``)."""
    source = {
        "shapes": lambda: Shapes(world, encode, encode.pad_token, turns=1 if getattr(encode, "one_run", "") else 4),
        "shapes_captions": lambda: Shapes(world, encode, encode.pad_token, turns=0, planted=False),
        "shapes_text": lambda: shapes_text(world, encode),
        "easy_vqa": lambda: EasyVQA(encode, encode.pad_token),
        "shapes_single": lambda: shapes_single(world, encode),
        "shapes_episodes": lambda: shapes_episodes(world, encode),
        "shapes_told": lambda: shapes_told(world, encode),
        "shapes_grounded": lambda: Grounded(world, encode),
        "shapes_instructions": lambda: shapes_instructions(world, encode),
        "shapes_crowded": lambda: shapes_crowded(world, encode),
        "shapes_drawing": lambda: shapes_drawing(world, encode),
    }[data.name]()
    if data.blind:
        source.pictures = torch.zeros_like(source.pictures)
    return source
