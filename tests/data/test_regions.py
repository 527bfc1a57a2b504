"""Regions as text: published values, transformers' own functions, formulas in exact arithmetic, and text that is none."""

import math
import random
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow
from transformers.models.kosmos2 import processing_kosmos2 as published

from mmfast.data import images, regions
from mmfast.data.regions import (
    FERRET,
    KOSMOS2,
    KOSMOS2_PROCESSOR,
    MINIGPT_V2,
    QWEN_VL,
    QWEN_VL_999,
    SHIKRA,
    SHIKRA_BINS,
    cropped,
    from_xywh,
    kosmos2,
    padded,
    squashed,
)
from mmfast.data.synthetic import World
from mmfast.eval import grounding

FORMATS = [KOSMOS2, KOSMOS2_PROCESSOR, kosmos2(8), SHIKRA, SHIKRA_BINS, FERRET, MINIGPT_V2, QWEN_VL, QWEN_VL_999]
SIZE = (640, 480)
BOX = (100, 50, 300, 200)
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming himself by"
    "<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)


def pair(a, b):
    return f"<object><patch_index_{a:04d}><patch_index_{b:04d}></object>"


def random_boxes(count, size, seed=0):
    """Boxes of every size and place; a third of their coordinates on an edge or on a cell edge of Kosmos' grid."""
    draw = random.Random(seed)
    for _ in range(count):
        sides = []
        for side in size:
            low, high = sorted(draw.choice((0.0, 1.0, draw.randrange(33) / 32, *(draw.random() for _ in range(5)))) for _ in "ab")
            sides.append((low * side, high * side))
        (x1, x2), (y1, y2) = sides
        yield (x1, y1, x2, y2)


# ------------------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize(
    ("form", "region", "size", "text"),
    [
        (KOSMOS2, (0.25, 0.25, 0.5, 0.5), (1, 1), pair(264, 528)),
        (KOSMOS2_PROCESSOR, (0.25, 0.25, 0.5, 0.5), (1, 1), pair(264, 495)),
        (KOSMOS2, (0.5, 0.5, 0.51, 0.51), (1, 1), pair(528, 528)),
        (KOSMOS2, (-0.5, -9, 1.5, 2), (1, 1), pair(0, 1023)),  # transformers: beyond the grid
        (KOSMOS2_PROCESSOR, (-0.5, -9, 1.5, 2), (1, 1), pair(0, 1023)),
        (SHIKRA, BOX, SIZE, "[0.156,0.203,0.469,0.438]"),
        (SHIKRA, (320, 240), SIZE, "[0.500,0.500]"),
        (SHIKRA, (50, 100, 200, 300), (480, 640), "[0.203,0.156,0.438,0.469]"),  # the margin lies left
        (SHIKRA, (0, 0, 5, 4), (5, 4), "[0.000,0.000,1.000,0.800]"),  # a margin of one half is none
        (SHIKRA, [BOX, (0, 0, 640, 480)], SIZE, "[0.156,0.203,0.469,0.438;0.000,0.125,1.000,0.875]"),
        (SHIKRA_BINS, BOX, SIZE, "<b_st><bin_156> <bin_203> <bin_469> <bin_438><b_ed>"),
        (SHIKRA_BINS, [(0, 80), (640, 480)], SIZE, "<p_st><bin_0> <bin_250><p_sep><bin_1000> <bin_875><p_ed>"),
        (FERRET, BOX, SIZE, "[156, 104, 468, 416]"),
        (FERRET, (320, 240), SIZE, "[500, 500]"),
        (FERRET, (19, 0), (38, 38), "[499, 0]"),  # int(x * 1000 / w) would be 500
        (FERRET, (0, 0, 640, 480), SIZE, "[0, 0, 999, 999]"),
        (MINIGPT_V2, from_xywh((64, 48, 128, 96)), SIZE, "{<10><10><30><30>}"),
        (MINIGPT_V2, (29, 57, 100, 100), (100, 100), "{<28><56><100><100>}"),  # .29 * 100 is a little less than 29
        (QWEN_VL, from_xywh((64, 48, 128, 96)), SIZE, "<box>(100,100),(300,300)</box>"),
        (QWEN_VL, (0, 0, 640, 480), SIZE, "<box>(0,0),(999,999)</box>"),
        (QWEN_VL, (0, 0, 64, 0, 64, 48, 0, 48), SIZE, "<quad>(0,0),(100,0),(100,100),(0,100)</quad>"),
    ],
)
def test_worked_values(form, region, size, text):
    assert form.encode(region, size) == text


def test_the_page_shows_what_is_written():
    """Every call of docs/regions.md whose result stands beside it."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "regions.md").read_text()
    shown = re.findall(r"^(\w+\.encode\(.*\)) +# ('.*')$", page, re.M)
    assert len(shown) == 2
    for call, result in shown:
        assert eval(call, vars(regions)) == eval(result)
    for form in (KOSMOS2, SHIKRA, SHIKRA_BINS, FERRET, MINIGPT_V2, QWEN_VL):
        region = {KOSMOS2: (160, 120, 320, 240), MINIGPT_V2: (64, 48, 192, 144), QWEN_VL: (64, 48, 192, 144)}.get(form, BOX)
        assert f"`{form.encode(region, SIZE)}`" in page, form.name


def test_phrases_and_several_boxes():
    boxes = [(79 % 32 / 32, 79 // 32 / 32, 24.5 / 32, 31.5 / 32), (7.5 / 32, 4.5 / 32, 16.5 / 32, 31.5 / 32)]
    assert KOSMOS2.encode(boxes, (1, 1), "Two puppies") == (
        "<phrase>Two puppies</phrase><object><patch_index_0079><patch_index_1016></delimiter_of_multi_objects/>"
        "<patch_index_0135><patch_index_1008></object>"
    )
    assert MINIGPT_V2.encode((0.1, 0.2, 0.3, 0.4), (1, 1), "red car") == "<p>red car</p> {<10><20><30><40>}"
    two = [(0, 0, 64, 48), (64, 48, 128, 96)]
    assert MINIGPT_V2.encode(two, SIZE) == "{<0><0><10><10>}<delim>{<10><10><20><20>}"
    assert QWEN_VL.encode(two, SIZE, "a dog") == "<ref>a dog</ref><box>(0,0),(100,100)</box><box>(100,100),(200,200)</box>"
    assert FERRET.encode(BOX, SIZE, "a cat") == "a cat [156, 104, 468, 416]"
    assert SHIKRA.encode(BOX, SIZE, "a cat") == "a cat[0.156,0.203,0.469,0.438]"


def test_kosmos_cells_back():
    """Cell centres, and outer edges within one cell, column or row."""
    for cells, box in (
        ((44, 863), (0.390625, 0.046875, 0.984375, 0.828125)),
        ((5, 911), (0.171875, 0.015625, 0.484375, 0.890625)),
        ((528, 528), (0.5, 0.5, 0.53125, 0.53125)),
        ((0, 992), (0, 0, 1 / 32, 1)),
        ((0, 31), (0, 0, 1, 1 / 32)),
    ):
        assert KOSMOS2.parse(pair(*cells), (1, 1))[0].boxes == (box,)


def test_a_grounded_caption():
    got = KOSMOS2.read(SNOWMAN, (1, 1))
    assert got.text == "An image of a snowman warming himself by a fire."
    assert [(r.phrase, r.start, r.end) for r in got.regions] == [("a snowman", 12, 21), ("a fire", 41, 47)]
    assert not got.faults


def test_what_is_read_of_each_system():
    two = "(0,0),(100,100)", "(100,100),(200,200)"
    first, second = (0, 0, 64, 48), (64, 48, 128, 96)
    for form, text, words, found in (
        (QWEN_VL, f"<ref>a dog</ref><box>{two[0]}</box><box>{two[1]}</box> runs", "a dog runs", [("a dog", (first, second))]),
        (QWEN_VL, f"{two[0]}</box>", "", [("", (first,))]),  # after a prompt that ends in <box>
        (QWEN_VL, two[0] + two[1], "", [("", (first, second))]),  # a tokenizer dropped the tags
        (QWEN_VL, ",".join(two), "", [("", ((*first, *second),))]),
        (MINIGPT_V2, "<p>a dog</p> {<0><0><10><10>}<delim>{<10><10><20><20>} runs", "a dog runs", [("a dog", (first, second))]),
        (FERRET, "A dog [0, 0, 100,100] <region_fea>, at [100, 100].", "A dog , at.", [("", (first,)), ("", (second[:2],))]),
    ):
        got = form.read(text, SIZE)
        assert (got.text, [(r.phrase, r.boxes) for r in got.regions], got.faults) == (words, found, ()), text
    assert QWEN_VL_999.parse("(0,0),(999,333)", SIZE)[0].boxes == (pytest.approx((0, 0, 640, 160)),)
    assert QWEN_VL.parse("(0,0),(999,333)", SIZE)[0].boxes == (pytest.approx((0, 0, 639.36, 159.84)),)
    got = SHIKRA.read("Answer: [0.0,0.125,0.1,0.2;0.5,0.5,1,0.875] .", SIZE)
    assert got.text == "Answer: ."
    assert got.regions[0].boxes == (pytest.approx((0, 0, 64, 48)), pytest.approx((320, 240, 640, 480)))
    assert regions.sole(got.regions) is None
    assert regions.sole(SHIKRA.parse("[0,0.125,1,0.875]", SIZE)) == (0, 0, 640, 480)


# ------------------------------------------------------------------------------------------------- independent references


def test_every_box_is_written_as_transformers_writes_it():
    converter = SimpleNamespace(num_patch_index_tokens=1024)
    for box in random_boxes(3000, (1, 1)):
        if box[0] < box[2] and box[1] < box[3]:
            tokens = published.Kosmos2Processor._convert_bbox_to_patch_index_tokens(converter, box)
            assert KOSMOS2_PROCESSOR.encode(box, (1, 1)) == f"<object>{''.join(tokens)}</object>"


def test_every_caption_is_read_as_transformers_reads_it():
    draw = random.Random(1)
    read = 0
    for _ in range(500):
        text = "<grounding>" + draw.choice(["", " ", " See"])
        for _ in range(draw.randrange(4)):
            pairs = []
            for _ in range(1 + draw.randrange(2)):
                (x1, x2), (y1, y2) = (sorted(draw.choices(range(32), k=2)) for _ in "xy")
                pairs.append(f"<patch_index_{32 * y1 + x1:04d}><patch_index_{32 * y2 + x2:04d}>")
            text += draw.choice([" and", "", " then "]) + f"<phrase>{draw.choice([' a cat', 'dogs', ' two '])}</phrase><object>"
            text += "</delimiter_of_multi_objects/>".join(pairs) + "</object>"
        words, entities = published.clean_text_and_extract_entities_with_bboxes(text)
        got = KOSMOS2.read(text, (1, 1))
        assert (got.text, got.faults) == (words, ())
        assert [(r.phrase, (r.start, r.end), list(r.boxes)) for r in got.regions] == entities
        read += len(entities)
    assert read > 500


def test_numbers_by_exact_arithmetic():
    """The published rules on fractions. Floating point may differ only where the exact value is a whole number or halfway between two."""
    for size in (SIZE, (333, 500), (38, 997)):
        for box in random_boxes(300, size, seed=size[0]):
            exact = [Fraction(v) / size[i % 2] for i, v in enumerate(box)]
            side = max(size)
            square = [(Fraction(v) + (side - size[i % 2]) // 2) / side for i, v in enumerate(box)]
            for form, wanted in (
                (KOSMOS2, [math.floor(32 * v) if i < 2 else math.floor(32 * min(v, Fraction(0.99999))) for i, v in enumerate(exact)]),
                (SHIKRA_BINS, [round(1000 * v) for v in square]),
                (SHIKRA, [round(1000 * v) for v in square]),
                (FERRET, [min(math.floor(1000 * v), 999) for v in exact]),
                (MINIGPT_V2, [math.floor(100 * v) for v in exact]),
                (QWEN_VL, [min(math.floor(1000 * v), 999) for v in exact]),
            ):
                got = [int(n) for n in re.findall(r"\d+", form.encode(box, size).replace("0.", "").replace("1.000", "1000"))]
                if form is KOSMOS2:
                    got = [got[0] % 32, got[0] // 32, got[1] % 32, got[1] // 32]
                    wanted = [min(v, 31) for v in wanted]
                steps = {KOSMOS2: 32, MINIGPT_V2: 100}.get(form, 1000)
                values = square if form in (SHIKRA, SHIKRA_BINS) else exact
                for g, w, v in zip(got, wanted, values, strict=True):
                    doubtful = abs(v * steps * 2 - round(v * steps * 2)) < Fraction(1, 10**9)
                    assert g == w or (doubtful and abs(g - w) == 1), (form.name, box, size)


@every_format
@pytest.mark.parametrize("size", [(1, 1), SIZE, (3, 1000)])
def test_round_trip(form, size):
    """Within the format's quantum: a cell, or a step of the longer side where the picture is padded."""
    steps = {"kosmos2": math.isqrt(form.highest + 1), "minigpt_v2": 100}.get(form.name, 1000)
    for box in random_boxes(300, size):
        if form is KOSMOS2_PROCESSOR and not (box[0] < box[2] and box[1] < box[3]):
            with pytest.raises(ValueError, match="no area"):
                form.encode(box, size)
            continue
        got = form.read("see " + form.encode([box, box], size, "it") + " .", size)
        assert not got.faults
        (region,) = got.regions
        assert region.phrase == ("it" if "<" in form.phrase else "")
        assert got.text[: got.text.index("it") + 2] == "see it"
        for back in region.boxes:
            for i, (a, b) in enumerate(zip(box, back, strict=True)):
                quantum = (max(size) * 0.5 if "shikra" in form.name else size[i % 2]) / steps
                assert abs(a - b) <= quantum * 1.0001, (box, back)
                assert 0 <= b <= size[i % 2]


@pytest.mark.parametrize("form", [SHIKRA, SHIKRA_BINS, FERRET], ids=lambda f: f.name)
def test_points_round_trip(form):
    for x1, y1, x2, y2 in random_boxes(200, SIZE, seed=5):
        (region,) = form.parse(form.encode([(x1, y1), (x2, y2)], SIZE), SIZE)[:1]
        got = region.boxes
        assert len(got) == 2
        assert np.abs(np.subtract(got, [(x1, y1), (x2, y2)])).max() <= 0.6401


def test_quadrilaterals_round_trip():
    for x1, y1, x2, y2 in random_boxes(200, SIZE, seed=6):
        quad = (x1, y1, x2, y1, x2, y2, x1, y2)
        (region,) = QWEN_VL.parse(QWEN_VL.encode(quad, SIZE, "a sign"), SIZE)
        assert region.phrase == "a sign"
        assert np.abs(np.subtract(region.boxes, [quad])).max() <= 0.6401


# ------------------------------------------------------------------------------------------------------ text that is none


@pytest.mark.parametrize(
    ("form", "text", "piece", "why"),
    [
        (KOSMOS2, "<phrase>a</phrase><object><patch_index_0001></object>", "<object><patch_index_0001></object>", "form"),
        (KOSMOS2, "a <patch_index_0001><patch_index_0002>", "<patch_index_0001><patch_index_0002>", "form"),
        (KOSMOS2, pair(1, 1024), "<patch_index_0001><patch_index_1024>", "1024 is not within 0 .. 1023"),
        (KOSMOS2, pair(33, 32), "<patch_index_0033><patch_index_0032>", "second corner"),
        (KOSMOS2, "<object><patch_index_0001><patch_index_0040>", "<object><patch_index_0001><patch_index_0040>", "form"),
        (
            KOSMOS2,
            f"<object><patch_index_0001><patch_index_{'9' * 5000}></object>",
            f"<object><patch_index_0001><patch_index_{'9' * 5000}></object>",
            "form",
        ),
        (SHIKRA, "[0.1,0.2,0.3]", "[0.1,0.2,0.3]", "form"),
        (SHIKRA, "[0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4]", "form"),  # the published parser allows no blank
        (SHIKRA, "[12,3,40,50]", "[12,3,40,50]", "form"),
        (SHIKRA, "[0.1,0.2,1.5,0.4]", "0.1,0.2,1.5,0.4", "1.5 is not within 0 .. 1"),
        (SHIKRA, "[0.5,0.2,0.3,0.4", "[0.5,0.2,0.3,0.4", "form"),
        (SHIKRA_BINS, "<b_st><bin_1> <bin_2><b_ed>", "<b_st><bin_1> <bin_2><b_ed>", "form"),
        (FERRET, "[1, 2, 3]", "[1, 2, 3]", "form"),
        (FERRET, "[-1, 2, 3, 4]", "[-1, 2, 3, 4]", "form"),
        (FERRET, "[300, 2, 100, 4]", "[300, 2, 100, 4]", "second corner"),
        (MINIGPT_V2, "{<1><2><3>}", "{<1><2><3>}", "form"),
        (MINIGPT_V2, "{<1><2><3><101>}", "{<1><2><3><101>}", "101 is not within 0 .. 100"),
        (QWEN_VL, "<box>(1,2),(3,4),(5,6),(7,8)</box>", "<box>(1,2),(3,4),(5,6),(7,8)</box>", "form"),
        (QWEN_VL, "(1,2),(3,4),(5,6)", "(1,2),(3,4),(5,6)", "form"),
        (QWEN_VL, "<box>(1,2),(3,", "<box>(1,2),(3,", "form"),
        (QWEN_VL, "<box>(1,2),(1000,4)</box>", "(1,2),(1000,4)", "1000 is not within 0 .. 999"),
    ],
)
def test_unreadable_pieces_are_told(form, text, piece, why):
    got = form.read(f"so {text} there", SIZE)
    assert not got.regions
    assert [f.piece.strip().removesuffix(" there") for f in got.faults] == [piece]
    assert why in got.faults[0].why
    assert f"so {text} there"[got.faults[0].start :].startswith(got.faults[0].piece)


@every_format
def test_ordinary_text_has_no_faults(form):
    text = "As [12] says (see 3), {a} < b > c [sic], x(1) and f(2.5)."
    got = form.read(text, SIZE)
    assert (got.regions, got.faults) == ((), ())
    assert got.text == (text if form.tags != "<[^<>]*>" else text.replace("< b >", ""))


def test_the_readable_regions_of_a_broken_answer():
    """One bad pair of two, and a good region after an unfinished one."""
    got = KOSMOS2.read(f"<object><patch_index_0000><patch_index_2000></delimiter_of_multi_objects/>{pair(0, 33)[8:]}", (1, 1))
    assert [len(r.boxes) for r in got.regions] == [1]
    assert len(got.faults) == 1
    got = QWEN_VL.read("<box>(1,2),(3 <ref>a</ref><box>(1,2),(3,4)</box>", (1000, 1000))
    assert got.regions[0].boxes == ((1, 2, 3, 4),)
    assert [f.piece for f in got.faults] == ["<box>(1,2),(3 "]


@every_format
def test_any_text_at_all(form):
    """Whatever is written: no exception, spans that hold their phrase, boxes inside the picture, faults that are where they say."""
    pieces = [
        "<phrase>",
        "</phrase>",
        "<object>",
        "</object>",
        "<patch_index_0044>",
        "<patch_index_9999>",
        "<grounding>",
        "[",
        "]",
        "{",
        "}",
    ]
    pieces += [
        "<p>",
        "</p>",
        "<box>",
        "</box>",
        "<quad>",
        "</quad>",
        "<ref>",
        "</ref>",
        "<delim>",
        "(",
        ")",
        ",",
        ";",
        "<",
        ">",
        "0.5",
        "12",
    ]
    pieces += [
        " ",
        " a cat",
        "\n",
        "٣",
        "\0",
        "-1",
        "{<1><2><3><4>}",
        "[0.1,0.2,0.3,0.4]",
        "[1, 2, 3, 4]",
        "(1,2),(3,4)",
        "<b_st>",
        "<bin_3> ",
    ]
    pieces += [form.encode(BOX, SIZE, "it"), form.encode([BOX, BOX], SIZE), form.box.open, form.box.between, form.box.close]
    draw = random.Random(2)
    found = 0
    for _ in range(1500):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        got = form.read(text, SIZE)
        for region in got.regions:
            assert got.text[region.start : region.end] == region.phrase, text
            for box in region.boxes:
                assert all(0 <= v <= SIZE[i % 2] for i, v in enumerate(box)), text
        for fault in got.faults:
            assert text[fault.start : fault.start + len(fault.piece)] == fault.piece, text
        found += len(got.regions)
    assert found > 200


@every_format
@pytest.mark.parametrize(
    "piece", ["[", "[1", "1", "[1,", "(1,", "(1,2),", "{<1>", "<object>", "<patch_index_1>", "<p>x</p> ", "<ref>a", " "]
)
def test_long_nonsense_takes_no_time(form, piece):
    """A pattern that tries the same text twice would take hours, not seconds."""
    form.read("[1" + piece * (100_000 // len(piece)), SIZE)


@pytest.mark.parametrize(
    ("form", "region", "words"),
    [
        (SHIKRA, (1, 2, 3), "list of 3 numbers"),
        (SHIKRA, (), "list of 0 numbers"),
        (SHIKRA, [(1, 2), (1, 2, 3, 4)], "mixture"),
        (KOSMOS2, (1, 2), "cannot write a point, expected one of box,"),
        (FERRET, (1, 2, 3, 4, 5, 6, 7, 8), "cannot write a quad, expected one of point, box,"),
        (QWEN_VL, (30, 2, 10, 4), "not ordered"),
        (QWEN_VL, (700, 2, 710, 4), r"outside a picture of 640 x 480"),
        (QWEN_VL, (640, 2, 710, 4), "outside"),
        (FERRET, (3, 481), "outside"),
        (MINIGPT_V2, (1, 2, float("nan"), 4), "not finite"),
    ],
)
def test_regions_that_cannot_be_written(form, region, words):
    with pytest.raises(ValueError, match=words):
        form.encode(region, SIZE)


def test_other_mistakes_of_the_caller():
    with pytest.raises(ValueError, match="begins a tag"):
        KOSMOS2.encode(BOX, SIZE, "a < b")
    assert FERRET.encode(BOX, SIZE, "a < b").startswith("a < b [")
    for size in ((0, 10), (10, float("nan")), (10,)):
        with pytest.raises(ValueError, match="size"):
            KOSMOS2.read("", size)


# ----------------------------------------------------------------------------------------------------- where pictures go


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (201, 333), (64, 64), (97, 41), (40, 1200), (1500, 50)])
def test_boxes_follow_the_picture(size, tmp_path):
    """A painted rectangle is where the box says, after the cut of very long pictures too."""
    w, h = size
    box = (int(0.45 * w), int(0.45 * h), max(int(0.6 * w), int(0.45 * w) + 4), max(int(0.6 * h), int(0.45 * h) + 4))
    canvas = np.zeros((h, w, 3), np.uint8)
    canvas[box[1] : box[3], box[0] : box[2]] = 255
    Pillow.fromarray(canvas).save(tmp_path / "a.png")
    seen = images.load(tmp_path / "a.png", 224)[..., 0] > 127
    rows, cols = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    got = cropped(size, 224).keep(box, least=0)
    assert got == pytest.approx((cols[0], rows[0], cols[-1] + 1, rows[-1] + 1), abs=1.01)


def test_placements_by_hand():
    assert cropped((640, 480), 224).keep((80, 0, 560, 480)) == pytest.approx((0, 0, 224, 224), abs=0.5)
    # 298 x 224, 37 cut off on the left: x = 100 * 298 / 640 - 37
    assert cropped((640, 480), 224).move((100, 240)) == pytest.approx((100 * 298 / 640 - 37, 112))
    assert squashed((640, 480), (224, 224)).move((320, 240, 640, 480)) == pytest.approx((112, 112, 224, 224))
    assert padded((640, 480), 224).move((0, 0, 640, 480)) == pytest.approx((0, 28, 224, 196))
    assert padded((5, 4), 5).move((0, 0)) == (0, 0)
    assert padded((7, 4), 7).move((0, 0)) == (0, 1)


def test_a_box_that_a_crop_leaves_is_dropped():
    """Under a fifth of its area: 80 of 640 columns are cut off on either side."""
    place = cropped((640, 480), 480)
    assert place.keep((0, 0, 99, 50)) is None
    assert place.keep((0, 0, 101, 50)) == pytest.approx((0, 0, 21, 50))
    assert place.keep((0, 0, 80, 50), least=0) is None
    assert place.keep((200, 10, 200, 50)) is None


@pytest.mark.parametrize(
    "place", [cropped((301, 200), 97), padded((301, 200), 97), squashed((301, 200), (97, 55))], ids=["crop", "pad", "squash"]
)
def test_back_to_the_picture(place):
    for box in random_boxes(50, (301, 200)):
        assert place.back(place.move(box)) == pytest.approx(box, abs=1e-9)
    assert place.back((-1000, -1000, 1000, 1000)) == (0, 0, 301, 200)


def test_objects_of_the_shapes_world_by_their_text():
    """What the grids cost: mean IoU of true boxes said and read again, the most that a model can reach; and what looking at nothing gets."""
    world = World()
    size = (world.config.pixels,) * 2
    train, test = ([o.box for scene in world.scenes(split, 200) for o in scene.objects] for split in ("train", "eval"))
    for form, mean in (
        (kosmos2(8), 0.54),
        (kosmos2(16), 0.71),
        (KOSMOS2, 0.84),
        (MINIGPT_V2, 0.89),
        (SHIKRA, 0.99),
        (FERRET, 0.99),
        (QWEN_VL, 0.99),
    ):
        back = [regions.sole(form.parse(form.encode(box, size), size)) for box in test]
        assert grounding.score(back, test)["grounding_mean_iou"] == pytest.approx(mean, abs=0.01), form.name
    sizes = [size] * len(train)
    constant, centre = (grounding.score([f(train, sizes, size)] * len(test), test) for f in (grounding.constant_box, grounding.centre_box))
    assert 0 < centre["grounding_mean_iou"] < constant["grounding_mean_iou"] < 0.1
