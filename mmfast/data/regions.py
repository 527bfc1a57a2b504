"""Boxes and points as text, in the words of each published system, and where they go when a picture is resized.

    KOSMOS2.encode((0, 0, 320, 240), (640, 480), "a cat")     # "<phrase>a cat</phrase><object><patch_index_0000>..</object>"
    SHIKRA.parse("It is there: [0.156,0.203,0.469,0.438].", (640, 480))
    moved = cropped((640, 480), 224).keep((100, 50, 300, 200))  # the box in the picture that images.load makes, or None

A region is pixels of the upright picture (as ``images.load`` sees it), x to the right and y down: a point ``(x, y)``, a box
``(x1, y1, x2, y2)`` with x1 <= x2 and y1 <= y2, or a quadrilateral ``(x1, y1, .., x4, y4)``. Sizes are ``(width, height)``; with
``(1, 1)`` all coordinates are shares of the picture. A system's text belongs to the picture that the system sees: encode with the size
of the whole picture where it is squashed or padded, and of the crop, after ``Placement.keep``, where it is cropped.

Reading never fails on what a model wrote: what looks like a region and is none is a ``Fault``, told and passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from mmfast.data import images
from mmfast.spec import BoxTokens, Fixed, NoRegions

Coords = tuple[float, ...]
Size = tuple[float, float]
KINDS = {2: "point", 4: "box", 8: "quad"}


@dataclass(frozen=True)
class Region:
    """A phrase and where it is: one or several boxes (or points, or quadrilaterals), in pixels."""

    boxes: tuple[Coords, ...]
    phrase: str = ""  # empty where the system's text does not mark it
    start: int = 0  # of the phrase in ``Reading.text``; an empty range where there is none
    end: int = 0


@dataclass(frozen=True)
class Fault:
    """A piece of the text that looks like a region and is none."""

    piece: str
    start: int  # in the text as it was given
    why: str


@dataclass(frozen=True)
class Reading:
    text: str  # without tags and coordinates
    regions: tuple[Region, ...]
    faults: tuple[Fault, ...]


class Written(NamedTuple):
    """How the regions of one phrase are written, ``#`` for a number: ``open one (between one)* close``."""

    one: str
    open: str = ""
    between: str = ""
    close: str = ""


@dataclass(frozen=True)
class Format:
    """One system's text of regions. ``numbers`` and ``coords`` are inverse up to the system's rounding.

    Args:
        numbers: coordinates inside the picture and its size, to what is written.
        coords: what is written and the picture's size, to coordinates in pixels.
        number: regular expression of one number; ``shown`` its format; ``highest`` its largest value (its least is 0).
        box, point, quad: how each is written, None where the system has none.
        phrase: how the phrase before is written, ``#`` for its words; only tags make it readable again.
        attempt: regular expression of whatever looks like a region; what of it cannot be read is a fault.
        tags: regular expression of marks that are no words.
        bare: tags may be missing, because a prompt ends in one or a tokenizer drops them.
    """

    name: str
    numbers: Callable[[Coords, Size], tuple[float, ...]]
    coords: Callable[[tuple[float, ...], Size], Coords]
    number: str
    highest: int
    box: Written
    point: Written | None = None
    quad: Written | None = None
    shown: str = ""
    phrase: str = "# "
    attempt: str = ""
    tags: str = ""
    bare: bool = False

    def encode(self, box: Sequence[float] | Sequence[Sequence[float]], size: Size, phrase: str = "") -> str:
        """The text of one region, or of several of one phrase, with the phrase in front if one is given.

        What reaches over the picture's edge is clamped to it.

        Raises:
            ValueError: a region that is not finite, not ordered, wholly outside, or of a kind that the system does not write; a phrase
                with ``<`` in it where phrases stand in tags.
        """
        _check_size(size)
        regions = list(box) if len(box) and hasattr(box[0], "__len__") else [box]
        kinds = {KINDS.get(len(r), f"list of {len(r)} numbers") for r in regions}
        kind = kinds.pop() if len(kinds) == 1 else "mixture of kinds" if kinds else "list of nothing"
        how = getattr(self, kind, None) if kind in KINDS.values() else None
        if how is None:
            can = ", ".join(k for k in KINDS.values() if getattr(self, k))
            raise ValueError(f"{self.name}: cannot write a {kind}, expected one of {can}, as 2, 4 or 8 numbers")
        said = []
        for region in regions:
            numbers = iter(self.numbers(_inside(self.name, region, size), size))
            said.append(re.sub("#", lambda _, n=numbers: format(next(n), self.shown), how.one))
        if "<" in phrase and "<" in self.phrase:
            raise ValueError(f"{self.name}: the phrase {phrase!r} holds '<', which begins a tag")
        words = self.phrase.replace("#", phrase) if phrase else ""
        return words + how.open + how.between.join(said) + how.close

    def parse(self, text: str, size: Size) -> list[Region]:
        """The regions of a text, in order. Whatever the text is, this raises nothing; ``read`` tells what could not be read."""
        return list(self.read(text, size).regions)

    def read(self, text: str, size: Size) -> Reading:
        """Regions, faults and the words alone, stripped. ValueError only for a size that is none."""
        _check_size(size)
        words, regions, faults, last = "", [], [], 0
        for match in self._pattern.finditer(text):
            faults += self._attempts(text[last : match.start()], last)
            words += re.sub(self.tags, "", text[last : match.start()]) if self.tags else text[last : match.start()]
            phrase = match["phrase"] or ""
            start = len(words) + len(phrase) - len(phrase.lstrip())
            words += phrase
            last = match.end()
            boxes = []
            for one in re.finditer(self._ones[match.lastgroup], match[match.lastgroup], re.ASCII):
                numbers = tuple(float(n) if "." in n else int(n) for n in re.findall(self.number, one[0], re.ASCII))
                coords = self.coords(numbers, size)
                why = self._fault(numbers, coords)
                if why:
                    faults.append(Fault(one[0], match.start(match.lastgroup) + one.start(), why))
                else:
                    boxes.append(coords)
            if boxes:
                regions.append(Region(tuple(boxes), phrase.strip(), start, start + len(phrase.strip())))
        faults += self._attempts(text[last:], last)
        words += re.sub(self.tags, "", text[last:]) if self.tags else text[last:]
        # Spans move with the blanks that stripping takes away, and stay within what is left.
        cut, words = len(words) - len(words.lstrip()), words.strip()
        moved = [replace(r, start=min(max(r.start - cut, 0), len(words)), end=min(max(r.end - cut, 0), len(words))) for r in regions]
        return Reading(words, tuple(moved), tuple(faults))

    def _fault(self, numbers: tuple[float, ...], coords: Coords) -> str:
        beyond = [n for n in numbers if n > self.highest]
        if beyond:
            return f"{beyond[0]} is not within 0 .. {self.highest}"
        if len(coords) == 4 and (coords[2] < coords[0] or coords[3] < coords[1]):
            return "its second corner is left of or above its first"
        return ""

    def _attempts(self, text: str, start: int) -> list[Fault]:
        why = f"it is not of the form {self.box.open}{self.box.one}{self.box.close}"
        return [Fault(m[0], start + m.start(), why) for m in re.finditer(self.attempt, text, re.ASCII | re.DOTALL)]

    @cached_property
    def _ones(self) -> dict[str, str]:
        """The regular expression of one region, by kind. A blank may be missing or repeated."""
        return {k: self._literal(getattr(self, k).one).replace("\\#", self.number) for k in KINDS.values() if getattr(self, k)}

    @cached_property
    def _pattern(self) -> re.Pattern:
        kinds = []
        for kind, one in self._ones.items():
            how = getattr(self, kind)
            opening, between, closing = (self._literal(tag) for tag in (how.open, how.between, how.close))
            if self.bare:  # without tags, but never the beginning or the middle of a longer list, or in another kind's tags
                opening, between, closing = rf"(?:{opening}|(?<![,>]))", f"(?:{between})?", rf"(?:{closing}|(?!,\(|</))"
            kinds.append(f"{opening}(?P<{kind}>{one}(?:{between}{one})*){closing}")
        before, after = self.phrase.split("#")
        # Unmarked words cannot be told from the sentence; the blank between them and the region is the region's.
        marked = f"(?:{before}(?P<phrase>[^<]+){after.rstrip()} *)?" if before else " ?(?P<phrase>(?!))?"
        return re.compile(marked + "(?:" + "|".join(kinds) + ")", re.ASCII)

    @staticmethod
    def _literal(text: str) -> str:
        return re.escape(text).replace("\\ ", " *")


# What stands in a record's text: a phrase of which places are told or asked, and a place, whose boxes the record lists.
REGION = "<region>"
_SPOKEN = re.compile(r"<phrase>(?P<phrase>[^<]*)</phrase>(?P<told><region>)?|<region>")


def write(text: str, boxes: Sequence[Sequence[Coords]], form: Format, size: Size) -> str:
    """A record's text in a system's words: each ``<region>`` with the boxes that are listed for it, the phrase before it as the system marks it.

    A ``<region>`` without boxes (all cut off with the picture's edges) is left out, and its phrase is words like others. A phrase that no
    region follows asks for one, and is marked likewise where the system has tags.

    Raises:
        ValueError: more or fewer places than lists of boxes, or a box that ``Format.encode`` refuses.
    """
    given = iter(boxes)
    if (places := text.count(REGION)) != len(boxes):
        raise ValueError(f"{places} {REGION} places but {len(boxes)} lists of boxes")

    def said(match: re.Match) -> str:
        phrase = match["phrase"] or ""
        if match["phrase"] is not None and not match["told"]:
            return form.phrase.replace("#", phrase) if "<" in form.phrase else phrase
        found = next(given)
        return form.encode(found, size, phrase) if found else phrase

    return _SPOKEN.sub(said, text)


def sole(regions: Iterable[Region]) -> Coords | None:
    """The one box of an answer; None where there is none or more than one, which is how Shikra's metric reads (arXiv:2306.15195)."""
    boxes = [box for region in regions for box in region.boxes if len(box) == 4]
    return boxes[0] if len(boxes) == 1 else None


def from_xywh(box: Sequence[float]) -> Coords:
    """COCO's corner and size to two corners."""
    x, y, width, height = box
    return (x, y, x + width, y + height)


def _check_size(size: Size) -> None:
    if len(size) != 2 or not all(math.isfinite(side) and side > 0 for side in size):
        raise ValueError(f"a picture's size is {tuple(size)}, expected (width, height), both positive")


def _inside(name: str, region: Sequence[float], size: Size) -> Coords:
    """The region clamped to the picture."""
    if not all(math.isfinite(v) for v in region):
        raise ValueError(f"{name}: region {tuple(region)} is not finite")
    if len(region) == 4 and (region[2] < region[0] or region[3] < region[1]):
        raise ValueError(f"{name}: box {tuple(region)} is not ordered, expected (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")
    for values, side in zip((region[0::2], region[1::2]), size, strict=True):
        low, high = min(values), max(values)
        if low > side or high < 0 or (low < high and (low >= side or high <= 0)):
            raise ValueError(f"{name}: region {tuple(region)} lies outside a picture of {size[0]} x {size[1]}")
    return tuple(float(min(max(v, 0), size[i % 2])) for i, v in enumerate(region))


# --------------------------------------------------------------------------------------------------------------- Kosmos-2


def kosmos2(cells: int = 32, *, processor: bool = False) -> Format:
    """Kosmos-2 (arXiv:2306.14824, section 2): the upper left and the lower right cell of a grid over the picture, ``cells`` a side.

    Training: ``floor(cells x)``, with 1 falling into the last cell. ``processor``: the lower right corner is ``ceil(cells x - 1)``, as in
    transformers; the two differ on exact cell edges. Beyond the picture transformers writes cells that do not exist, and here the box is
    clamped; a box without area it refuses, and so does this. Back, a box within one row or column of cells reaches to their outer edges,
    and any other from cell centre to cell centre.
    """

    def numbers(box: Coords, size: Size) -> tuple[int, int]:
        x1, y1, x2, y2 = (v / size[i % 2] for i, v in enumerate(box))
        if processor and not (x1 < x2 and y1 < y2):
            raise ValueError(f"kosmos2: box {box} has no area, which the processor's rule cannot write")
        if processor:  # exact, where the sum's order in transformers loses an x2 near 0
            right, lower = (math.ceil(cells * v) - 1 for v in (x2, y2))
        else:
            right, lower = (math.floor(cells * min(v, 0.99999)) for v in (x2, y2))
        # A box without area on the far edge would begin in a cell outside.
        left, upper = (min(math.floor(cells * v), cells - 1) for v in (x1, y1))
        return upper * cells + left, lower * cells + right

    def coords(pair: tuple[float, ...], size: Size) -> Coords:
        (upper, left), (lower, right) = (divmod(int(n), cells) for n in pair)
        if (left == right and upper <= lower) or (upper == lower and left <= right):
            found = (left / cells, upper / cells, (right + 1) / cells, (lower + 1) / cells)
        else:
            found = tuple((n + 0.5) / cells for n in (left, upper, right, lower))
        return tuple(v * size[i % 2] for i, v in enumerate(found))

    return Format(
        name="kosmos2", numbers=numbers, coords=coords, number=r"\d{1,6}", shown="04d", highest=cells * cells - 1,
        box=Written("<patch_index_#><patch_index_#>", "<object>", "</delimiter_of_multi_objects/>", "</object>"),
        phrase="<phrase>#</phrase>", tags="<[^<>]*>",
        attempt=r"<object>(?:(?!</?object>|<phrase>).)*(?:</object>)?|(?:<patch_index_[^<>]*>)+",
    )  # fmt: skip


def format_of(choice: NoRegions | BoxTokens) -> Format | None:
    """How a system's choice of regions is written."""
    return kosmos2(choice.bins) if isinstance(choice, BoxTokens) else None


KOSMOS2 = kosmos2()
KOSMOS2_PROCESSOR = kosmos2(processor=True)


# ----------------------------------------------------------------------------------------------------------------- Shikra


def _in_square(region: Coords, size: Size) -> tuple[float, ...]:
    """Shares of the picture padded to a square, rounded to three places (Python's round: to even where binary is exact)."""
    square = padded(size, max(size))
    return tuple(round(v / max(size), 3) for v in square.move(region))


def _from_square(numbers: tuple[float, ...], size: Size) -> Coords:
    return padded(size, max(size)).back(tuple(v * max(size) for v in numbers))


# A bracket of numbers with something between them: [12] is a citation. (Nothing here tries one text twice, however long it is.)
_BRACKET = r"\[[- ]*\d[-\d ]*[.,;][-\d.,; ]*\]?"

# Shikra (arXiv:2306.15195, section 4.2): decimals of the padded square in brackets, several joined by a semicolon.
SHIKRA = Format(
    name="shikra", numbers=_in_square, coords=_from_square, number=r"\d(?:\.\d*)?", shown=".3f", highest=1,
    box=Written("#,#,#,#", "[", ";", "]"), point=Written("#,#", "[", ";", "]"),
    phrase="#", attempt=_BRACKET,
)  # fmt: skip

# The paper's ablation: the same thousandths as tokens of their own.
SHIKRA_BINS = replace(
    SHIKRA, name="shikra_bins", number=r"\d{1,4}", shown="", highest=1000,
    numbers=lambda region, size: tuple(round(v * 1000) for v in padded(size, max(size)).move(region, max(size))),
    coords=lambda numbers, size: _from_square(tuple(n / 1000 for n in numbers), size),
    box=Written("<bin_#> <bin_#> <bin_#> <bin_#>", "<b_st>", "<b_sep>", "<b_ed>"),
    point=Written("<bin_#> <bin_#>", "<p_st>", "<p_sep>", "<p_ed>"),
    tags=r"</?[bp]_(?:st|ed|sep)>|<bin_\d*>", attempt=r"<(?:[bp]_st|bin_)(?:(?!<[bp]_st>|<[bp]_ed>).)*(?:<[bp]_ed>)?",
)  # fmt: skip


# ------------------------------------------------------------------------------------------ shares of each side, in whole numbers


def _per_side(number: Callable[[float, float], int]) -> Callable[[Coords, Size], tuple[int, ...]]:
    return lambda region, size: tuple(number(v, size[i % 2]) for i, v in enumerate(region))


def _share(whole: int) -> Callable[[tuple[float, ...], Size], Coords]:
    return lambda numbers, size: tuple(n / whole * size[i % 2] for i, n in enumerate(numbers))


# Ferret (arXiv:2310.07704, section 3.1), the text part of its regions. The order of operations is the released code's and matters: x = 19
# of 38 is 499. Its data end at width - 1, so that 1000 is never written; a box that ends at the width is written 999. The release has one
# placeholder a box, and no words of its own between several: the blank is ours.
FERRET = Format(
    name="ferret", numbers=_per_side(lambda v, side: min(int(v * (1000.0 / side)), 999)), coords=_share(1000),
    number=r"\d{1,4}", highest=1000, box=Written("[#, #, #, #]", between=" "), point=Written("[#, #]", between=" "),
    attempt=_BRACKET, tags="<region_fea>",
)  # fmt: skip

# MiniGPT-v2 (arXiv:2310.09478, section 2.2 and released code): per cent, both ends, rounded down in this order (29 of 100 is 28).
MINIGPT_V2 = Format(
    name="minigpt_v2", numbers=_per_side(lambda v, side: int(v / side * 100)), coords=_share(100),
    number=r"\d{1,3}", highest=100, box=Written("{<#><#><#><#>}", between="<delim>"),
    phrase="<p>#</p> ", attempt=r"\{\s*<[^{}]*\}?", tags="</?p>|<delim>",
)  # fmt: skip

# Qwen-VL (arXiv:2308.12966, section 3.3): thousandths in [0, 1000). How they are rounded is not published; here down, so that the far
# edge is 999. The prompt of its grounding evaluation ends in <box>, and its tokenizer may drop the tags.
QWEN_VL = Format(
    name="qwen_vl", numbers=_per_side(lambda v, side: min(int(v * 1000 / side), 999)), coords=_share(1000),
    number=r"\d{1,4}", highest=999, box=Written("(#,#),(#,#)", "<box>", "</box><box>", "</box>"),
    quad=Written("(#,#),(#,#),(#,#),(#,#)", "<quad>", "</quad><quad>", "</quad>"), bare=True,
    phrase="<ref>#</ref>", tags="</?(?:ref|box|quad)>",
    attempt=r"<(?:box|quad)>(?:(?!</?(?:box|quad|ref)>).)*(?:</(?:box|quad)>)?|\([-\d. ]*,[-\d., ]*\)(?:,?\([-\d., ]*\)?)*",
)  # fmt: skip
# Its released evaluation divides by 999, so that the far edge is the picture's; README and drawing by 1000.
QWEN_VL_999 = replace(QWEN_VL, name="qwen_vl_999", coords=_share(999))


# -------------------------------------------------------------------------------------------------------- where pictures go


@dataclass(frozen=True)
class Placement:
    """Where a picture's pixels come to lie: ``scale v + shift`` a side, in a picture of another size."""

    source: Size
    size: Size
    scale: tuple[float, float]
    shift: tuple[float, float]

    def move(self, region: Sequence[float], divisor: float = 1) -> Coords:
        """A region of the source in the new picture, not clamped; ``divisor`` gives shares of a side."""
        return tuple((v * self.scale[i % 2] + self.shift[i % 2]) / divisor for i, v in enumerate(region))

    def back(self, region: Sequence[float]) -> Coords:
        """A region of the new picture in the source, clamped to it."""
        moved = ((v - self.shift[i % 2]) / self.scale[i % 2] for i, v in enumerate(region))
        return tuple(min(max(v, 0.0), float(self.source[i % 2])) for i, v in enumerate(moved))

    def keep(self, box: Sequence[float], least: float = 0.2) -> Coords | None:
        """A box in the new picture, clamped to it; None where under ``least`` of its area, or nothing, is left (Kosmos-2's code)."""
        whole = self.move(box)
        left = tuple(min(max(v, 0.0), float(self.size[i % 2])) for i, v in enumerate(whole))
        kept, area = (max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in (left, whole))
        return left if kept > 0 and kept >= least * area else None


def squashed(size: Size, to: Size) -> Placement:
    """Resized without regard to its shape: Kosmos-2's processor, MiniGPT-v2, Ferret, Qwen-VL."""
    _check_size(size)
    return Placement(size, to, (to[0] / size[0], to[1] / size[1]), (0.0, 0.0))


def cropped(size: tuple[int, int], side: int) -> Placement:
    """As ``images.load`` makes a picture: shorter side resized, middle square kept."""
    _check_size(size)
    cut, resized, corner = images.crop_plan(size, side)
    scale = tuple(resized[i] / (cut[i + 2] - cut[i]) for i in (0, 1))
    return Placement(size, (side, side), scale, tuple(-cut[i] * scale[i] - corner[i] for i in (0, 1)))


def placed(size: tuple[int, int], plan: Fixed) -> Placement:
    """As ``images.load`` makes a picture of ``size`` by a plan."""
    if plan.fit == "crop":
        return cropped(size, plan.size)
    return squashed(size, (plan.size, plan.size)) if plan.fit == "squash" else padded(size, plan.size)


def padded(size: Size, side: float) -> Placement:
    """In the middle of a square of its longer side (Shikra and LLaVA, rounding the margin down), which is resized to ``side``."""
    _check_size(size)
    long = max(size)
    return Placement(size, (side, side), (side / long,) * 2, tuple((long - s) // 2 * (side / long) for s in size))
