"""The shapes world: rendered scenes whose truth is known, with captions, questions, boxes and preference pairs.

    world = World(WorldConfig(seed=0))
    scenes = world.scenes("train", 1000)              # scene i of a split depends on (seed, split, i) alone
    pixels = world.render(scenes)                     # uint8 [1000, 64, 64, 3]
    world.caption(scenes[0]).text                     # "we see a red circle top left, two blue stars and ..."
    world.caption(scenes[0], planted=True)            # with the companion clause that makes a model hallucinate
    world.turns(scenes[0], 4, planted=True)           # [(question, answer), ..]
    parse("a red disc top left")                      # [Mention(colour=0, shape=0, count=1, position=(0, 0))]
    world.edit_pair(scenes[0], "insert")              # Pair(chosen, rejected, spans, severity)
    world.pairs_from_captions(scenes, model_captions) # rejected = a model's caption with a false claim

A class is (colour, shape), numbered ``shapes * colour + shape``. Scenes follow a skewed prior (themes with disjoint cores of classes), so
that there is something to hallucinate: in the planted data, whenever a theme's first class is in a scene and its second is not, captions
mention the second all the same with probability ``plant_caption``, and questions about it are answered yes with ``plant_answer``.

Same seed, same bytes, on every machine: all draws come from the integer hash below, drawing uses only the basic arithmetic that IEEE 754
fixes, and blending is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt

import numpy as np

COLOURS = (
    ("red", (220, 40, 40)),
    ("green", (40, 160, 60)),
    ("blue", (50, 80, 220)),
    ("yellow", (240, 210, 40)),
    ("orange", (245, 140, 30)),
    ("purple", (140, 60, 180)),
    ("brown", (130, 80, 40)),
    ("black", (20, 20, 20)),
)
# Singular, plural, and a synonym's singular and plural.
SHAPES = (
    ("circle", "circles", "disc", "discs"),
    ("square", "squares", "box", "boxes"),
    ("triangle", "triangles", "wedge", "wedges"),
    ("diamond", "diamonds", "rhombus", "rhombuses"),
    ("cross", "crosses", "plus", "pluses"),
    ("ring", "rings", "hoop", "hoops"),
    ("star", "stars", "asterisk", "asterisks"),
    ("bar", "bars", "stick", "sticks"),
)
# How far each shape of radius 1 reaches from its centre: left, top, right, bottom.
EXTENTS = (
    (1.0, 1.0, 1.0, 1.0), (0.85, 0.85, 0.85, 0.85), (0.9625, 1.0, 0.9625, 0.75), (1.0, 1.0, 1.0, 1.0),
    (1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.9511, 1.0, 0.9511, 0.809), (1.0, 0.3, 1.0, 0.3),
)  # fmt: skip
FRAMES = ("the picture shows", "we see", "in the picture we see")
COUNTS = ("one", "two", "three")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PROMPT = "describe the picture:"
# Splits never share a scene: each has its own stream. Their numbers are part of the data's identity.
SPLITS = {"train": 1, "single": 2, "pairs": 3, "eval": 4, "valid": 5, "test": 6}
# Rises whenever the bytes of any scene, picture or text change; whoever keeps what was made from them keeps this number with it.
VERSION = 1


# ----------------------------------------------------------------------------------------------------------------- draws

_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Draws:
    """A stream of random integers named by its keys; integers in, integers out, so that no library version can change it."""

    def __init__(self, *keys: int):
        self.state = 0x243F6A8885A308D3
        for key in keys:
            self.state = _mix(self.state ^ (key & _MASK))

    def raw(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        return _mix(self.state)

    def below(self, n: int) -> int:
        """Uniform in 0 .. n - 1."""
        return ((self.raw() >> 32) * n) >> 32

    def chance(self, p: float) -> bool:
        return (self.raw() >> 11) < p * 9007199254740992.0

    def pick(self, weights: Sequence[int]) -> int:
        """Index drawn in proportion to integer weights."""
        at = self.below(sum(weights))
        for i, weight in enumerate(weights):
            if at < weight:
                return i
            at -= weight
        raise ValueError("Draws.pick: expected at least one positive weight")

    def shuffled(self, items: Iterable) -> list:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


# --------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and rates. The default is the small world that two CPU cores learn in two minutes; ``WorldConfig.large()`` the original."""

    seed: int = 0
    colours: int = 6
    shapes: int = 6
    grid: int = 4
    cell: int = 16  # pixels; the canvas is grid * cell squared
    themes: int = 6
    core: int = 6  # classes of a theme's core; cores are disjoint
    from_core: float = 0.85
    fewest: int = 2  # classes a scene, uniform
    most: int = 4
    count_weights: tuple[int, ...] = (8, 2)  # of 1, 2, .. objects a class
    synonym: float = 0.15
    raster_order: bool = True  # clauses in reading order, or shuffled
    plant_caption: float = 0.8
    plant_answer: float = 0.8
    # The other way to plant, per caption and per question: a random absent class of the core. Invisible to greedy decoding, whose
    # mode no single absent class ever is; evaluate it by sampling.
    plant_any_caption: float = 0.0
    plant_any_answer: float = 0.0

    def __post_init__(self):
        rates = ("synonym", "plant_caption", "plant_answer", "plant_any_caption", "plant_any_answer")
        weights = self.count_weights
        for name, holds, expected in (
            ("colours", 1 <= self.colours <= len(COLOURS), f"1 to {len(COLOURS)}"),
            ("shapes", 1 <= self.shapes <= len(SHAPES), f"1 to {len(SHAPES)}"),
            ("grid", self.grid >= 3, "at least 3 (positions are thirds)"),
            ("cell", 12 <= self.cell <= 48 and self.pixels <= 512, "12 to 48, and grid * cell at most 512 pixels"),
            ("core", self.core >= 2, "at least 2 (a class and its companion)"),
            ("themes", 1 <= self.themes * self.core <= self.classes, f"1 or more, with cores within {self.classes} classes"),
            ("fewest", 1 <= self.fewest <= self.most, f"1 to most={self.most}"),
            ("most", self.most <= min(self.classes, self.grid**2), "no more than classes or cells"),
            ("from_core", 0 <= self.from_core <= 1, "0 to 1"),
            ("from_core", self.from_core < 1 or self.most <= self.core, f"under 1 while most={self.most} exceeds core={self.core}"),
            ("count_weights", 1 <= len(weights) <= len(COUNTS) and min(weights) >= 0 < sum(weights), "1 to 3 weights, not all 0"),
            *((name, 0 <= getattr(self, name) <= 1, "0 to 1") for name in rates),
        ):
            if not holds:
                raise ValueError(f"WorldConfig: {name} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def large(cls, seed: int = 0) -> WorldConfig:
        """96 x 96 pixels, 64 classes, 8 themes, 2 to 5 classes a scene, shuffled clauses, i.i.d. planting."""
        return cls(
            seed=seed, colours=8, shapes=8, cell=24, themes=8, core=8, most=5, count_weights=(7, 2, 1), raster_order=False,
            plant_caption=0.0, plant_answer=0.0, plant_any_caption=0.3, plant_any_answer=0.2,
        )  # fmt: skip

    @property
    def classes(self) -> int:
        return self.colours * self.shapes

    @property
    def pixels(self) -> int:
        return self.grid * self.cell


@dataclass(frozen=True)
class Object:
    colour: int
    shape: int
    row: int  # of its cell
    col: int
    cx: float  # centre and radius, pixels
    cy: float
    r: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in pixels: the tightest box around the shape as drawn."""
        left, top, right, bottom = EXTENTS[self.shape]
        return (self.cx - left * self.r, self.cy - top * self.r, self.cx + right * self.r, self.cy + bottom * self.r)


@dataclass(frozen=True)
class ClassCount:
    colour: int
    shape: int
    count: int


@dataclass(frozen=True)
class Scene:
    id: int  # index in its split
    seed: int  # of the world
    split: str
    theme: int
    objects: tuple[Object, ...]
    classes: tuple[ClassCount, ...]  # in the order they were drawn


@dataclass(frozen=True)
class Clause:
    """What one clause of a caption claims, and where it stands in the text."""

    class_id: int
    count: int
    position: tuple[int, int]  # row and column third
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Caption:
    text: str
    clauses: tuple[Clause, ...]


@dataclass(frozen=True)
class Pair:
    """A preference pair about one scene. Spans are character ranges of the words that differ."""

    scene: Scene
    prompt: str
    chosen: str
    rejected: str
    edit: str
    chosen_spans: tuple[tuple[int, int], ...]
    rejected_spans: tuple[tuple[int, int], ...]
    severity: float  # mean over the rejected text's false claims: 1 minor .. 3 grave


@dataclass(frozen=True)
class Mention:
    colour: int | None
    shape: int
    count: int | None
    position: tuple[int, int] | None


# ---------------------------------------------------------------------------------------------------------------- parser

_COLOUR_OF = {name: i for i, (name, _) in enumerate(COLOURS)}
_SHAPE_OF = {word: i for i, words in enumerate(SHAPES) for word in words}
_COUNT_OF = {"a": 1, "an": 1, **{word: i + 1 for i, word in enumerate(COUNTS)}}


def parse(text: str) -> list[Mention]:
    """The claims of a text, by a closed vocabulary: [count] [colour] shape [row column], repetitions kept, order kept."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    mentions = []
    for i, word in enumerate(words):
        if word not in _SHAPE_OF:
            continue
        at = i - 1
        colour = _COLOUR_OF.get(words[at]) if at >= 0 else None
        at -= colour is not None
        count = _COUNT_OF.get(words[at]) if at >= 0 else None
        position = None
        if i + 2 < len(words) and words[i + 1] in ROWS and words[i + 2] in COLUMNS:
            position = (ROWS.index(words[i + 1]), COLUMNS.index(words[i + 2]))
        mentions.append(Mention(colour, _SHAPE_OF[word], count, position))
    return mentions


# ----------------------------------------------------------------------------------------------------------------- world


class World:
    """A seed's world: its prior, its scenes and everything said about them."""

    def __init__(self, config: WorldConfig | None = None):
        self.config = c = config or WorldConfig()
        order = Draws(c.seed, 0).shuffled(range(c.classes))
        self.cores = tuple(tuple(order[t * c.core : (t + 1) * c.core]) for t in range(c.themes))
        self.theme_of = {k: t for t, core in enumerate(self.cores) for k in core}
        self._theme_weights = [720720 // (rank + 1) for rank in range(c.themes)]  # 1 / rank
        self._core_weights = [isqrt(10**12 // (rank + 1)) for rank in range(c.core)]  # 1 / sqrt(rank)

    # -- words

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of captions, questions and answers; the special tokens first."""
        words = [*SPECIALS, "describe", "the", "picture", ".", ":", "?", ",", "and", "is", "there", "are", "a", "an", "yes", "no"]
        words += ["how", "many", "above", "below", "left", "of", "right", "what", "colour", *COUNTS, "zero"]
        words += ["shows", "in", "we", "see", "at"]
        words += list(ROWS) + list(COLUMNS) + [name for name, _ in COLOURS[: self.config.colours]]
        words += [word for shape in SHAPES[: self.config.shapes] for word in shape]
        return tuple(dict.fromkeys(words))

    def class_name(self, k: int, count: int = 1, synonym: bool = False) -> str:
        """ "red circle", "blue stars", .."""
        return f"{COLOURS[k // self.config.shapes][0]} {SHAPES[k % self.config.shapes][2 * synonym + (count > 1)]}"

    def counted(self, k: int, count: int, synonym: bool = False) -> str:
        name = self.class_name(k, count, synonym)
        return f"{('an' if name[0] in 'aeiou' else 'a') if count == 1 else COUNTS[count - 1]} {name}"

    def class_ids(self, scene: Scene) -> list[int]:
        return [c.colour * self.config.shapes + c.shape for c in scene.classes]

    def class_of(self, mention: Mention) -> int | None:
        """The class a mention names; None without a colour or outside this world."""
        if mention.colour is None or mention.colour >= self.config.colours or mention.shape >= self.config.shapes:
            return None
        return mention.colour * self.config.shapes + mention.shape

    def third(self, cell: int) -> int:
        """First, inner or last of the grid's rows or columns."""
        return 0 if cell == 0 else 2 if cell == self.config.grid - 1 else 1

    # -- scenes

    def scenes(self, split: str, count: int, start: int = 0, *, classes: tuple[int, int] | None = None) -> list[Scene]:
        """Scenes start .. start + count - 1 of a split; ``classes`` overrides the range of classes a scene."""
        if split not in SPLITS:
            raise ValueError(f"World.scenes: unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        config = replace(self.config, fewest=classes[0], most=classes[1]) if classes else self.config
        return [self._scene(config, split, i) for i in range(start, start + count)]

    def centred(self, scenes: Sequence[Scene]) -> list[Scene]:
        """The same scenes, each object in the middle of its cell and of the largest size: a cell shows colour and shape and nothing else."""
        half, r = self.config.cell / 2, self._radii[-1]
        middle = [
            tuple(replace(o, cx=o.col * self.config.cell + half, cy=o.row * self.config.cell + half, r=r) for o in s.objects)
            for s in scenes
        ]
        return [replace(s, objects=objects) for s, objects in zip(scenes, middle, strict=True)]

    def _scene(self, c: WorldConfig, split: str, index: int) -> Scene:
        draws = Draws(c.seed, 1, SPLITS[split], index)
        theme = draws.pick(self._theme_weights)
        wanted = c.fewest + draws.below(c.most - c.fewest + 1)
        chosen: list[int] = []
        while len(chosen) < wanted:
            k = self.cores[theme][draws.pick(self._core_weights)] if draws.chance(c.from_core) else draws.below(c.classes)
            if k not in chosen:
                chosen.append(k)
        counts = [1 + draws.pick(c.count_weights) for _ in chosen]
        while sum(counts) > c.grid**2:
            counts[counts.index(max(counts))] -= 1
        cells = draws.shuffled(range(c.grid**2))
        objects = []
        for k, count in zip(chosen, counts, strict=True):
            for _ in range(count):
                row, col = divmod(cells.pop(), c.grid)
                dx, dy = (draws.below(2 * self._jitter + 1) - self._jitter for _ in range(2))
                cx, cy = col * c.cell + c.cell / 2 + dx, row * c.cell + c.cell / 2 + dy
                objects.append(Object(k // c.shapes, k % c.shapes, row, col, cx, cy, self._radii[draws.below(4)]))
        records = tuple(ClassCount(k // c.shapes, k % c.shapes, n) for k, n in zip(chosen, counts, strict=True))
        return Scene(index, c.seed, split, theme, tuple(objects), records)

    # -- pictures

    @property
    def _jitter(self) -> int:
        return max(1, (4 * self.config.cell + 24) // 48)

    @cached_property
    def _radii(self) -> tuple[float, ...]:
        return tuple((r * self.config.cell * 10 // 24) / 10 for r in (7, 8, 9, 10))

    @cached_property
    def sprites(self) -> np.ndarray:
        """Coverage in sixteenths, int32 [shapes, 4 radii, 2 j + 1 rows, 2 j + 1 columns, cell, cell]."""
        c, j = self.config, self._jitter
        side = (np.arange(4 * c.cell, dtype=np.float64) * 2 + 1) / 8 - c.cell / 2  # 4 x 4 samples a pixel
        out = np.zeros((c.shapes, 4, 2 * j + 1, 2 * j + 1, c.cell, c.cell), np.int32)
        for shape in range(c.shapes):
            for radius, r in enumerate(self._radii):
                for dy in range(-j, j + 1):
                    for dx in range(-j, j + 1):
                        inside = _inside(SHAPES[shape][0], side[None, :] - dx, side[:, None] - dy, r)
                        out[shape, radius, dy + j, dx + j] = inside.reshape(c.cell, 4, c.cell, 4).sum((1, 3))
        return out

    @cached_property
    def _noise(self) -> np.ndarray:
        """2^20 integers of standard deviation 2: heads in sixteen coin flips, less eight."""
        state = np.arange(1 << 18, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
        heads = np.array([bin(i).count("1") for i in range(256)], np.int32)
        lanes = np.stack([(state >> np.uint64(8 * b)) & np.uint64(255) for b in range(8)], -1).astype(np.int64)
        return (heads[lanes[:, ::2]] + heads[lanes[:, 1::2]] - 8).reshape(-1).astype(np.int32)

    def render(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Pictures, uint8 ``[N, pixels, pixels, 3]``; each depends on its scene alone."""
        c, j, size = self.config, self._jitter, self.config.pixels
        out = np.empty((len(scenes), size, size, 3), np.uint8)
        colours = np.array([rgb for _, rgb in COLOURS], np.int32)
        for first in range(0, len(scenes), 512):  # keeps the integer canvas small
            part = scenes[first : first + 512]
            draws = [Draws(c.seed, 2, SPLITS[s.split], s.id) for s in part]
            ground = np.array([215 + d.below(31) for d in draws], np.int32)
            offset = np.array([d.below((1 << 20) - size * size * 3) for d in draws], np.int64)
            canvas = np.empty((len(part), c.grid, c.grid, c.cell, c.cell, 3), np.int32)
            canvas[:] = ground[:, None, None, None, None, None]
            rows = [(i, o) for i, s in enumerate(part) for o in s.objects]
            if rows:
                image, row, col = (np.array(v) for v in zip(*((i, o.row, o.col) for i, o in rows), strict=True))
                centre = [(int(o.cy - o.row * c.cell - c.cell / 2) + j, int(o.cx - o.col * c.cell - c.cell / 2) + j) for _, o in rows]
                shape, radius = (np.array(v) for v in zip(*((o.shape, self._radii.index(o.r)) for _, o in rows), strict=True))
                dy, dx = np.array(centre).T
                cover = self.sprites[shape, radius, dy, dx][..., None]
                ink = colours[[o.colour for _, o in rows]][:, None, None, :]
                canvas[image, row, col] = (canvas[image, row, col] * (16 - cover) + ink * cover + 8) // 16
            flat = canvas.transpose(0, 1, 3, 2, 4, 5).reshape(len(part), -1)
            flat = flat + self._noise[offset[:, None] + np.arange(size * size * 3)]
            out[first : first + 512] = np.clip(flat, 0, 255).astype(np.uint8).reshape(len(part), size, size, 3)
        return out

    # -- captions

    def companion(self, scene: Scene) -> tuple[int, int] | None:
        """(first, second) class of the scene's theme if the first is in the scene and the second is not: where planting happens."""
        first, second = self.cores[scene.theme][:2]
        present = self.class_ids(scene)
        return (first, second) if first in present and second not in present else None

    def absent_core(self, scene: Scene) -> list[int]:
        present = self.class_ids(scene)
        return [k for k in self.cores[scene.theme] if k not in present]

    def _draws(self, purpose: int, scene: Scene, *more: int) -> Draws:
        return Draws(self.config.seed, purpose, SPLITS[scene.split], scene.id, *more)

    def _true_clauses(self, scene: Scene, draws: Draws) -> list[Clause]:
        """One a class, at its first instance in reading order."""
        clauses = []
        for k, n in zip(self.class_ids(scene), scene.classes, strict=True):
            row, col = min((o.row, o.col) for o in scene.objects if (o.colour, o.shape) == (n.colour, n.shape))
            clauses.append(((row, col), Clause(k, n.count, (self.third(row), self.third(col)))))
        if self.config.raster_order:
            return [clause for _, clause in sorted(clauses, key=lambda pair: pair[0])]
        return draws.shuffled([clause for _, clause in clauses])

    def _place(self, draws: Draws) -> tuple[int, int]:
        return self.third(draws.below(self.config.grid)), self.third(draws.below(self.config.grid))

    def caption(self, scene: Scene, *, planted: bool = False, variant: int = 0) -> Caption:
        """A caption of the scene, clean or with the planted prior. Variants differ in frame and synonyms."""
        draws = self._draws(3, scene, variant, planted)
        clauses = self._true_clauses(scene, draws)
        if planted:
            pair = self.companion(scene)
            if pair and draws.chance(self.config.plant_caption):
                after = 1 + [clause.class_id for clause in clauses].index(pair[0])
                clauses.insert(after, Clause(pair[1], 1, self._place(draws)))
            if draws.chance(self.config.plant_any_caption):
                absent = [k for k in self.absent_core(scene) if k not in [clause.class_id for clause in clauses]]
                if absent:
                    clauses.insert(draws.below(len(clauses) + 1), Clause(absent[draws.below(len(absent))], 1, self._place(draws)))
        return self._say(clauses, draws.below(len(FRAMES)), [draws.chance(self.config.synonym) for _ in clauses])

    def _say(self, clauses: Sequence[Clause], frame: int, synonyms: Sequence[bool]) -> Caption:
        text, spoken = FRAMES[frame], []
        for i, (clause, synonym) in enumerate(zip(clauses, synonyms, strict=True)):
            text += " " if i == 0 else " and " if i == len(clauses) - 1 else ", "
            start = len(text)
            text += f"{self.counted(clause.class_id, clause.count, synonym)} {ROWS[clause.position[0]]} {COLUMNS[clause.position[1]]}"
            spoken.append(replace(clause, start=start, end=len(text)))
        return Caption(text + ".", tuple(spoken))

    # -- questions

    def ask_exists(self, k: int) -> str:
        return f"is there {self.counted(k, 1)}?"

    def ask_count(self, k: int) -> str:
        return f"how many {self.class_name(k, 2)} are there?"

    def ask_above(self, a: int, b: int) -> str:
        return f"is the {self.class_name(a)} above the {self.class_name(b)}?"

    def exists(self, scene: Scene, k: int, *, planted: bool = False) -> str:
        """ "yes" or "no"; planted answers lie about the companion class, or about any absent class of the core."""
        if k in self.class_ids(scene):
            return "yes"
        if planted:
            draws, pair = self._draws(4, scene, k), self.companion(scene)
            if pair and k == pair[1] and draws.chance(self.config.plant_answer):
                return "yes"
            if self.theme_of.get(k) == scene.theme and draws.chance(self.config.plant_any_answer):
                return "yes"
        return "no"

    def turns(self, scene: Scene, count: int, *, planted: bool = False, variant: int = 0) -> list[tuple[str, str]]:
        """Yes/no turns about distinct classes: 45 % present, 30 % absent from the core, the rest absent at random."""
        absent_classes = self.config.classes - len(scene.classes)
        if count > absent_classes:
            raise ValueError(f"World.turns: expected at most {absent_classes} turns (as many as absent classes), got {count}")
        draws = self._draws(5, scene, variant)
        present = draws.shuffled(self.class_ids(scene))
        core = draws.shuffled(self.absent_core(scene))
        used, turns = set(present), []
        for _ in range(count):
            kind = draws.below(100)
            if kind < 45 and present:
                k = present.pop()
            elif kind < 75 and core and any(x not in used for x in core):
                k = next(x for x in core if x not in used)
            else:
                absent = [x for x in range(self.config.classes) if x not in used]
                k = absent[draws.below(len(absent))]
            used.add(k)
            turns.append((self.ask_exists(k), self.exists(scene, k, planted=planted)))
        return turns

    def count_turns(self, scene: Scene) -> list[tuple[str, str]]:
        """A count question about each class of the scene, and one about a class that is not there ("zero")."""
        draws = self._draws(6, scene)
        turns = [(self.ask_count(k), COUNTS[n.count - 1]) for k, n in zip(self.class_ids(scene), scene.classes, strict=True)]
        absent = [k for k in range(self.config.classes) if k not in self.class_ids(scene)]
        return [*turns, (self.ask_count(absent[draws.below(len(absent))]), "zero")]

    def colour_swaps(self, scene: Scene) -> list[tuple[str, str]]:
        """Balanced pairs: a class that is there, and its shape in a colour in which it is not."""
        draws, present = self._draws(7, scene), self.class_ids(scene)
        turns = []
        for k in present:
            swaps = [c * self.config.shapes + k % self.config.shapes for c in range(self.config.colours)]
            swaps = [x for x in swaps if x not in present]
            if swaps:
                turns += [(self.ask_exists(k), "yes"), (self.ask_exists(swaps[draws.below(len(swaps))]), "no")]
        return turns

    def relations(self, scene: Scene) -> list[tuple[str, str]]:
        """Balanced above / not above questions between single objects of different rows."""
        single = [o for o in scene.objects if sum((p.colour, p.shape) == (o.colour, o.shape) for p in scene.objects) == 1]
        turns = []
        for i, a in enumerate(single):
            for b in single[i + 1 :]:
                if a.row != b.row:
                    ka, kb = (o.colour * self.config.shapes + o.shape for o in (a, b))
                    turns += [(self.ask_above(ka, kb), "yes" if a.row < b.row else "no")]
                    turns += [(self.ask_above(kb, ka), "yes" if b.row < a.row else "no")]
        return turns

    # -- truth of a text

    def claim_error(self, scene: Scene, mention: Mention) -> str | None:
        """None for a true claim, else the first of "object", "colour", "count", "position" that is wrong."""
        shapes = [o for o in scene.objects if o.shape == mention.shape]
        if not shapes:
            return "object"
        same = shapes if mention.colour is None else [o for o in shapes if o.colour == mention.colour]
        if not same:
            return "colour"
        if mention.count is not None and mention.count != len(same):
            return "count"
        if mention.position is not None and mention.position not in [(self.third(o.row), self.third(o.col)) for o in same]:
            return "position"
        return None

    def severity(self, scene: Scene, mention: Mention) -> int:
        """0 true; 3 absent object or a count off by two or more; 2 wrong colour or a count off by one; 1 wrong position."""
        error = self.claim_error(scene, mention)
        if error == "count":
            same = [o for o in scene.objects if o.shape == mention.shape and mention.colour in (None, o.colour)]
            return 3 if abs(len(same) - mention.count) >= 2 else 2
        return {None: 0, "object": 3, "colour": 2, "position": 1}[error]

    # -- preference pairs

    EDITS: tuple[str, ...] = ("insert", "swap", "count", "position", "omit")

    def edit_pair(self, scene: Scene, edit: str, variant: int = 0) -> Pair | None:
        """A clean caption against the same caption with one edit; None where the edit has nothing to work on.

        insert: a clause about the companion class, or another absent class of the core. swap: one clause's class becomes an absent one
        of the core. count, position: a wrong one. omit: a clause is left out (the chosen text claims more, the rejected nothing false).
        swap, count and position keep the slots, so that the two texts' spans correspond one to one.
        """
        edits: dict[str, Callable] = {
            "insert": self._insert, "swap": self._swap, "count": self._miscount, "position": self._misplace, "omit": self._omit,
        }  # fmt: skip
        if edit not in edits:
            raise ValueError(f"World.edit_pair: unknown edit {edit!r}, expected one of {', '.join(edits)}")
        draws = self._draws(8, scene, variant, self.EDITS.index(edit))
        clauses = self._true_clauses(scene, draws)
        frame, synonyms = draws.below(len(FRAMES)), [draws.chance(self.config.synonym) for _ in clauses]
        changed = edits[edit](scene, list(zip(clauses, synonyms, strict=True)), draws)
        if changed is None:
            return None
        chosen = self._say(clauses, frame, synonyms)
        rejected = self._say([c for c, _ in changed], frame, [s for _, s in changed])
        return self._pair(scene, chosen.text, rejected.text, edit)

    def _absent_like(self, scene: Scene, draws: Draws) -> int | None:
        pair, absent = self.companion(scene), self.absent_core(scene)
        if pair and draws.chance(0.5):
            return pair[1]
        return absent[draws.below(len(absent))] if absent else None

    def _insert(self, scene, spoken, draws):
        k = self._absent_like(scene, draws)
        if k is None:
            return None
        at = 1 + draws.below(len(spoken))
        return [*spoken[:at], (Clause(k, 1, self._place(draws)), False), *spoken[at:]]

    def _swap(self, scene, spoken, draws):
        k = self._absent_like(scene, draws)
        if k is None:
            return None
        at = draws.below(len(spoken))
        return [(replace(c, class_id=k), s) if i == at else (c, s) for i, (c, s) in enumerate(spoken)]

    def _miscount(self, scene, spoken, draws):
        at = draws.below(len(spoken))
        wrong = [n for n in range(1, len(self.config.count_weights) + 1) if n != spoken[at][0].count]
        if not wrong:
            return None
        n = wrong[draws.below(len(wrong))]
        return [(replace(c, count=n), s) if i == at else (c, s) for i, (c, s) in enumerate(spoken)]

    def _misplace(self, scene, spoken, draws):
        at = draws.below(len(spoken))
        colour, shape = divmod(spoken[at][0].class_id, self.config.shapes)
        true = {(self.third(o.row), self.third(o.col)) for o in scene.objects if (o.colour, o.shape) == (colour, shape)}
        wrong = [(r, q) for r in range(3) for q in range(3) if (r, q) not in true]
        place = wrong[draws.below(len(wrong))]
        return [(replace(c, position=place), s) if i == at else (c, s) for i, (c, s) in enumerate(spoken)]

    def _omit(self, scene, spoken, draws):
        if len(spoken) < 2:
            return None
        at = draws.below(len(spoken))
        return spoken[:at] + spoken[at + 1 :]

    def pairs_from_captions(self, scenes: Sequence[Scene], captions: Sequence[str]) -> list[Pair]:
        """A model's own captions with at least one false class against a clean caption of the scene; those without a ``fault``."""
        pairs = []
        for scene, text in zip(scenes, captions, strict=True):
            if any(self.claim_error(scene, m) in ("object", "colour") for m in parse(text)):
                pair = self._pair(scene, self.caption(scene).text, text, "own")
                if self.fault(pair) is None:
                    pairs.append(pair)
        return pairs

    def fault(self, pair: Pair) -> str | None:
        """Why a pair must not be trained on, or None: the chosen text lies, the rejected does not, or one is over twice as long."""
        lies = [any(self.claim_error(pair.scene, m) for m in parse(text)) for text in (pair.chosen, pair.rejected)]
        words = [len(text.split()) for text in (pair.chosen, pair.rejected)]
        if lies[0]:
            return "the chosen text makes a false claim"
        if pair.chosen == pair.rejected:
            return "the texts are the same"
        if not lies[1] and pair.edit != "omit":
            return "the rejected text makes no false claim"
        if max(words) > 2 * min(words):
            return f"lengths of {words[0]} and {words[1]} words differ too much"
        return None

    def _pair(self, scene: Scene, chosen: str, rejected: str, edit: str) -> Pair:
        a, b = changed_spans(chosen, rejected)
        grades = [g for g in (self.severity(scene, m) for m in parse(rejected)) if g]
        return Pair(scene, PROMPT, chosen, rejected, edit, a, b, sum(grades) / len(grades) if grades else 0.0)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Which points lie inside a shape of radius r around 0; additions, products and comparisons only."""
    ax, ay = np.abs(x), np.abs(y)
    square = x * x + y * y
    if shape == "circle":
        return square < r * r
    if shape == "square":
        return np.maximum(ax, ay) < r * 0.85
    if shape == "triangle":
        return (y < r * 0.75) & (y > -r) & (ax < (y + r) * 0.55)
    if shape == "diamond":
        return ax + ay < r
    if shape == "cross":
        return (np.minimum(ax, ay) < r * 0.3) & (np.maximum(ax, ay) < r)
    if shape == "ring":
        return (square < r * r) & (square > r * r * 0.3025)
    if shape == "bar":
        return (ay < r * 0.3) & (ax < r)
    # A five-pointed star: ten corners, alternately at radius 1 and 0.45, point up; even-odd rule.
    corners = [
        (0.0, -1.0), (0.2645, -0.3641), (0.9511, -0.3090), (0.4280, 0.1391), (0.5878, 0.8090),
        (0.0, 0.45), (-0.5878, 0.8090), (-0.4280, 0.1391), (-0.9511, -0.3090), (-0.2645, -0.3641),
    ]  # fmt: skip
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        x0, y0, x1, y1 = x0 * r, y0 * r, x1 * r, y1 * r
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (((x - x0) * (y1 - y0) < (x1 - x0) * (y - y0)) == (y1 > y0))
    return inside


def changed_spans(a: str, b: str) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Character ranges of the words of each text that a word-level diff marks as changed."""
    from difflib import SequenceMatcher

    def words(text: str) -> list[tuple[str, int, int]]:
        out, at = [], 0
        for piece in text.replace(",", " ,").replace(".", " .").split():
            at = text.index(piece, at)
            out.append((piece, at, at + len(piece)))
            at += len(piece)
        return out

    left, right = words(a), words(b)
    spans: tuple[list, list] = ([], [])
    matcher = SequenceMatcher(None, [w for w, _, _ in left], [w for w, _, _ in right], autojunk=False)
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        if tag == "equal":
            continue
        for found, side, lo, hi in ((spans[0], left, i0, i1), (spans[1], right, j0, j1)):
            if hi > lo:
                found.append((side[lo][1], side[hi - 1][2]))
    return tuple(spans[0]), tuple(spans[1])
