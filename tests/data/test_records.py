"""Every published form of data against records written by hand, streams against lists, mixtures against counts."""

import base64
import io
import json
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.data import images
from mmfast.data.formats import parse, split
from mmfast.data.images import Picture
from mmfast.data.mixtures import Mixed
from mmfast.data.records import Record, Records, Stream, check
from mmfast.spec import Data, Pairs

ROOT = "/data"


def png(shade=200, size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def shown(*names):
    return tuple(Picture(f"{ROOT}/{name}") for name in names)


def llava(*said, **more):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(said)], **more}


def chat(*said, **more):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": v} for i, v in enumerate(said)], **more}


def part(kind, value=None, key=None):
    return {"type": kind} | ({key or kind: value} if value is not None else {})


ask = {"role": "user", "content": "q"}
say = lambda text: {"role": "assistant", "content": text}  # noqa: E731
URL = "data:image/png;base64," + base64.b64encode(png()).decode()

SCIENCE = {
    "question": "Which is colder?", "choices": ["ice", "fire", "both"], "answer": 1, "hint": "Two pans.", "lecture": "Heat flows.",
    "solution": "Ice melts.", "task": "closed choice",
}  # fmt: skip
# name: (row, what it says). The number is 7 and the id #7 wherever the row gives none.
FORMS = {
    "llava": (
        llava("What is it?\n<image>", "a cat", "Sure?", "yes", id="a1", image="c.jpg"),
        Record(7, "a1", (("<image>\nWhat is it?", "a cat"), ("Sure?", "yes")), pictures=shown("c.jpg")),
    ),
    "llava, the place in a later question": (
        llava("Hello", "hello", "And <image> this?", "b", image="c.jpg"),
        Record(7, "#7", (("Hello", "hello"), ("<image>\nAnd  this?", "b")), pictures=shown("c.jpg")),
    ),
    "llava without a place": (
        llava("What is it?", "a cat", image="c.jpg"),
        Record(7, "#7", (("<image>\nWhat is it?", "a cat"),), pictures=shown("c.jpg")),
    ),
    "llava, text alone": (llava("q", "a", id=3), Record(7, "3", (("q", "a"),))),
    "llava, null is not there": (llava("q", "a", image=None, id=float("nan")), Record(7, "#7", (("q", "a"),))),
    "llava, a question that is a picture": (
        llava("<image>", "a cat", image="c.jpg"),
        Record(7, "#7", (("<image>", "a cat"),), pictures=shown("c.jpg")),
    ),
    "llava drops an opening answer": (
        {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Record(7, "#7", (("q", "a"),)),
    ),
    "llava, several pictures stay where they are": (
        llava("<image> and <image>?", "differ", "<image>?", "same", image=["a.png", "b.png", "/abs/c.png"]),
        Record(
            7,
            "#7",
            (("<image> and <image>?", "differ"), ("<image>?", "same")),
            pictures=(*shown("a.png", "b.png"), Picture("/abs/c.png")),
        ),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "see <image> it"},
                {"from": "assistant", "value": "a"},
            ],
            "images": ["c.jpg"],
        },
        Record(7, "#7", (("<image>\nsee  it", "a"),), "s", shown("c.jpg")),
    ),
    "sharegpt with role and content, system beside": (
        {"conversations": [ask, say("a")], "system": "s"},
        Record(7, "#7", (("q", "a"),), "s"),
    ),
    "messages": (
        chat("see <image> it", "a", images=["c.jpg"]),
        Record(7, "#7", (("see <image> it", "a"),), pictures=shown("c.jpg")),
    ),
    "messages without places, as TRL reads them": (
        chat("differ?", "yes", images=["a.png", "b.png"]),
        Record(7, "#7", (("<image><image>\ndiffer?", "yes"),), pictures=shown("a.png", "b.png")),
    ),
    "messages with parts": (
        chat(
            [part("text", "from"), part("image", "a.png"), part("text", "to"), part("image", "b.png", "path"), part("image", URL, "url")],
            [part("text", "up")],
        ),
        Record(
            7,
            "#7",
            (("from\n<image>\nto\n<image>\n<image>", "up"),),
            pictures=(*shown("a.png", "b.png"), Picture(png(), None, "image 2 of record 7")),
        ),
    ),
    "messages with parts to fill": (
        chat([part("image"), part("text", "what?")], [part("text", "a cat")], images=[{"bytes": png(), "path": "c.png"}]),
        Record(7, "#7", (("<image>\nwhat?", "a cat"),), pictures=(Picture(png(), None, "c.png of record 7"),)),
    ),
    "messages with image_url parts": (
        chat([part("image_url", {"url": "a.png"}), part("text", "what?")], "a cat"),
        Record(7, "#7", (("<image>\nwhat?", "a cat"),), pictures=shown("a.png")),
    ),
    "parts that arrow filled with null": (
        chat([{"type": "image", "text": None}, {"type": "text", "text": "q", "image": None}], "a", image="a.png"),
        Record(7, "#7", (("<image>\nq", "a"),), pictures=shown("a.png")),
    ),
    "question and answer": (
        {"question": "what?", "answer": "a cat", "image": "c.jpg"},
        Record(7, "#7", (("<image>\nwhat?", "a cat"),), pictures=shown("c.jpg")),
    ),
    "several humans' answers, the most frequent learnt": (
        {"question": "what?", "answers": ["cat", {"answer": "a dog", "answer_id": 2}, "a dog"], "image": "c.jpg"},
        Record(7, "#7", (("<image>\nwhat?", "a dog"),), pictures=shown("c.jpg"), answers=("cat", "a dog", "a dog")),
    ),
    "several humans' answers, the first among equals learnt": (
        {"question": "what?", "answers": ["dog", "cat", "cat", "dog"]},
        Record(7, "#7", (("what?", "dog"),), answers=("dog", "cat", "cat", "dog")),
    ),
    "several humans' answers and the one that is learnt": (
        {"question": "what?", "answers": ["dog", "dog"], "answer": "cat"},
        Record(7, "#7", (("what?", "cat"),), answers=("dog", "dog")),
    ),
    "an answer, and humans of whom none is told": (
        {"question": "what?", "answers": [], "answer": "cat"},
        Record(7, "#7", (("what?", "cat"),)),
    ),
    "an image_id out of a column of numbers": (
        {"image": "c.jpg", "caption": "a cat", "image_id": 139.0},
        Record(7, "#7", (("<image>", "a cat"),), pictures=shown("c.jpg"), image_id="139"),
    ),
    "alpaca": (
        {"instruction": "q", "input": "", "output": "a"},
        Record(7, "#7", (("q", "a"),)),
    ),
    "alpaca with an input and a picture": (
        {"instruction": "q", "input": "i", "output": "a", "image": "c.jpg"},
        Record(7, "#7", (("<image>\nq\n\n### Input:\ni", "a"),), pictures=shown("c.jpg")),
    ),
    "one pair of unnatural instructions": (
        {"instruction": "q", "instances": [{"instruction_with_input": "q i", "input": "i", "constraints": "None.", "output": "a"}]},
        Record(7, "#7", (("q i", "a"),)),
    ),
    "flan": ({"inputs": "q", "targets": "a", "task": "cot", "_template_idx": 3}, Record(7, "#7", (("q", "a"),))),
    "prompt and completion": (
        {"prompt": [{"role": "system", "content": "s"}, ask], "completion": [say("a")]},
        Record(7, "#7", (("q", "a"),), "s"),
    ),
    "caption": ({"image": "c.jpg", "caption": "a cat"}, Record(7, "#7", (("<image>", "a cat"),), pictures=shown("c.jpg"))),
    "captions": (
        {"image": "c.jpg", "captions": ["a cat", "it sits"], "image_id": 139},
        Record(7, "#7", (("<image>", "a cat"),), pictures=shown("c.jpg"), captions=("a cat", "it sits"), image_id="139"),
    ),
    "scienceqa": (
        {**SCIENCE, "image": "c.jpg"},
        Record(
            7,
            "#7",
            (
                (
                    "<image>\nWhich is colder?\nContext: Two pans.\nOptions: (A) ice (B) fire (C) both\n",
                    "Heat flows. Ice melts. The answer is B.",
                ),
            ),
            pictures=shown("c.jpg"),
            letter="B",
        ),
    ),
    "scienceqa without a word more": (
        {"question": "Which?", "choices": ["{x}", "y"], "answer": 0, "hint": "", "lecture": "", "image": None},
        Record(7, "#7", (("Which?\nContext: N/A\nOptions: (A) {x} (B) y\n", "The answer is A."),), letter="A"),
    ),
    "a question with choices that says its answer": (
        {"question": "Which?", "choices": ["x", "y"], "answer": "y"},
        Record(7, "#7", (("Which?", "y"),)),
    ),
    "text": ({"text": "once"}, Record(7, "#7", document="once")),
    "text with places": (
        {"text": "a <image> b <image>", "images": ["a.png", "b.png"]},
        Record(7, "#7", document="a <image> b <image>", pictures=shown("a.png", "b.png")),
    ),
    "obelics": (
        {"texts": ["one", None, "two", None], "images": [None, "a.png", None, "b.png"]},
        Record(7, "#7", document="one\n<image>\ntwo\n<image>", pictures=shown("a.png", "b.png")),
    ),
    "mmc4, pictures in the order of sentences": (
        {
            "text_list": ["one", "two", "three"],
            "image_info": [
                {"image_name": "late.png", "matched_text_index": 2},
                {"image_name": "early.png", "matched_text_index": 0},
                {"image_name": "later.png", "matched_text_index": 2},
            ],
        },
        Record(7, "#7", document="<image>one two <image><image>three", pictures=shown("early.png", "late.png", "later.png")),
    ),
    "mmc4 with the picture inside": (
        {"text_list": ["one"], "image_info": [{"image_base64": base64.b64encode(png()).decode(), "matched_text_index": 0}]},
        Record(7, "#7", document="<image>one", pictures=(Picture(png(), None, "image 0 of record 7"),)),
    ),
    "items": (
        {"items": [{"image": "a.png"}, {"text": "one"}]},
        Record(7, "#7", document="<image>\none", pictures=shown("a.png")),
    ),
    "preference, text": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "image": "a.png"},
        Record(7, "#7", (("<image>\nq", None),), pictures=shown("a.png"), chosen="a", rejected="b"),
    ),
    "preference, messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, ask, say("x"), ask],
            "chosen": [say("a")],
            "rejected": [say("b")],
            "images": ["a.png"],
        },
        Record(7, "#7", (("<image>\nq", "x"), ("q", None)), "s", shown("a.png"), chosen="a", rejected="b"),
    ),
    "preference, the prompt inside": (
        {"chosen": [ask, say("x"), ask, say("a")], "rejected": [ask, say("x"), ask, say("b")]},
        Record(7, "#7", (("q", "x"), ("q", None)), chosen="a", rejected="b"),
    ),
    "preference, the prompt inside and beside": (
        {"prompt": "q", "chosen": [ask, say("a")], "rejected": [ask, say("b")]},
        Record(7, "#7", (("q", None),), chosen="a", rejected="b"),
    ),
    "preference, parts": (
        {
            "prompt": [{"role": "user", "content": [part("image"), part("text", "q")]}],
            "chosen": [{"role": "assistant", "content": [part("text", "a")]}],
            "rejected": [{"role": "assistant", "content": [part("text", "b")]}],
            "images": ["a.png"],
        },
        Record(7, "#7", (("<image>\nq", None),), pictures=shown("a.png"), chosen="a", rejected="b"),
    ),
    "preference over a sharegpt conversation": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        Record(7, "#7", (("q", None),), chosen="a", rejected="b"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_says_what_it_says(form):
    row, record = FORMS[form]
    before = json.dumps(row, default=repr)
    assert parse(row, 7, root=ROOT) == record
    assert json.dumps(row, default=repr) == before, "parsing changed the row"


def test_documented_examples_are_records(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "data.md"
    examples = re.findall(r"```json\n(.*?)\n```", page.read_text(), re.S)
    animated(tmp_path / "clip.gif")
    records = [parse(json.loads(example), 0, root=str(tmp_path)) for example in examples]
    assert len(records) == 26
    assert [len(r.pictures) for r in records] == [1, 1, 2, *[1] * 6, 0, 0, 0, 1, 2, *[1] * 5, 3, 2, *[1] * 4, 8]
    assert [len(r.boxes) for r in records] == [0] * 21 + [1, 1, 0, 0, 0]
    assert [len(r.captions) for r in records] == [0] * 8 + [2] + [0] * 17
    assert [len(r.answers) for r in records] == [0] * 5 + [3] + [0] * 20
    assert [r.chosen for r in records] == [None] * 23 + ["A cat."] * 2 + [None]


def test_columns_rename_rows_and_turns():
    row = {"file": "c.jpg", "dialog": [{"speaker": "human", "says": "q"}, {"speaker": "gpt", "says": "a"}], "image": "theirs wins"}
    columns = {"file": "image", "dialog": "conversations", "speaker": "from", "says": "value"}
    assert parse(row, 0, root=ROOT, columns=columns) == Record(0, "#0", (("<image>\nq", "a"),), pictures=shown("c.jpg"))


# ---------------------------------------------------------------------------------------------------------------- sources


def rows_of(count):
    return [llava(f"<image> question {i}", f"answer {i}", id=f"r{i}", image=f"{i % 3}.png") for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(50 * i))
    return tmp_path


def write(path, rows):
    jsonl = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_text(json.dumps(rows) if path.suffix == ".json" else jsonl)
    return str(path)


def expected(folder, count):
    return [
        Record(i, f"r{i}", ((f"<image>\nquestion {i}", f"answer {i}"),), pictures=(Picture(str(folder / f"{i % 3}.png")),))
        for i in range(count)
    ]


def to_parquet(folder, count):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows_of(count)).to_parquet(str(folder / "a.parquet"))
    return str(folder / "a.parquet")


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path_factory, monkeypatch):
    """What ``datasets`` prepares stays in the test's folder."""
    try:
        import datasets
    except ImportError:
        return  # tests that need it skip and say so
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("source", ["json", "jsonl", "folder", "pattern", "parquet", "hub"])
def test_every_source_gives_the_same_records(folder, source):
    if source in ("json", "jsonl"):
        path = write(folder / f"a.{source}", rows_of(5))
    elif source in ("folder", "pattern"):
        write(folder / "a.jsonl", rows_of(5)[:2])
        write(folder / "b.json", rows_of(5)[2:])
        path = str(folder if source == "folder" else folder / "*.json*")
    elif source == "parquet":
        path = to_parquet(folder, 5)
    else:
        pytest.importorskip("datasets")
        (folder / "set").mkdir()
        write(folder / "set" / "train.jsonl", rows_of(5))
        path = f"hub:{folder / 'set'}"
    records = Records(Data("mine", path, images=str(folder) if source == "hub" else None))
    assert len(records) == 5
    assert [records[i] for i in range(5)] == expected(folder, 5) == list(records)
    assert records[-1].number == 4
    assert list(pickle.loads(pickle.dumps(records))) == expected(folder, 5)
    assert check(records, None, on_bad_record="fail") == [0, 1, 2, 3, 4]


def test_picture_names_are_relative_to_their_own_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", rows_of(2))
    data = Data("mine", str(tmp_path / "*" / "a.jsonl"))
    want = [str(tmp_path / name / f"{i}.png") for name in ("one", "two") for i in range(2)]
    assert [r.pictures[0].source for r in Records(data)] == want
    assert [r.number for r in Records(data)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="in several folders"):
        Stream(data)


def test_pictures_inside_parquet_stay_encoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [ask, say(f"a{i}")], "images": [{"bytes": png(i), "path": None}] * 2} for i in range(3)]
    text = datasets.Value("string")
    features = datasets.Features({"messages": [{"role": text, "content": text}], "images": [datasets.Image()]})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    for records in (Records(Data("mine", str(tmp_path / "a.parquet"))), Stream(Data("mine", str(tmp_path / "a.parquet"), streaming=True))):
        got = list(records)
        assert [r.turns for r in got] == [(("<image><image>\nq", f"a{i}"),) for i in range(3)]
        assert [r.pictures[1].source for r in got] == [png(i) for i in range(3)]
        assert got[2].pictures[0].load(4)[0, 0].tolist() == [2, 0, 0]


def test_columns_of_several_types_come_back_from_datasets(tmp_path):
    """Text and lists of parts in one column: ``datasets`` keeps such columns as JSON text."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "0.png").write_bytes(png())
    write(tmp_path / "set" / "train.jsonl", [chat("q", "a"), chat([part("image", "0.png"), part("text", "q")], "a")])
    data = Data("mine", f"hub:{tmp_path / 'set'}", images=str(tmp_path))
    want = [(("q", "a"),), (("<image>\nq", "a"),)]
    assert [r.turns for r in Records(data)] == want
    assert [r.turns for r in Stream(data)] == want


def to_tar(path, members):
    pytest.importorskip("datasets")
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_webdataset(tmp_path):
    inner = json.dumps(llava("<image> q", "a", id="own", image="elsewhere.png")).encode()
    path = to_tar(tmp_path / "a.tar", {"x0.png": png(1), "x0.json": inner, "x1.png": png(2), "x1.json": inner})
    captions = to_tar(tmp_path / "b.tar", {"y0.png": png(3), "y0.txt": b"a cat"})
    for kind in (Records, Stream):
        a, b = kind(Data("mine", path)), kind(Data("mine", captions))
        assert [(r.id, r.turns, r.pictures[0].source) for r in a] == [
            ("own", (("<image>\nq", "a"),), png(1)),
            ("own", (("<image>\nq", "a"),), png(2)),
        ]
        assert [(r.id, r.turns, r.pictures[0].source) for r in b] == [("y0", (("<image>", "a cat"),), png(3))]


def test_fingerprint_is_of_content(folder):
    def fingerprint(rows, **more):
        return Records(Data("mine", write(folder / "a.json", rows), **more)).fingerprint

    same = fingerprint(rows_of(3))
    assert fingerprint(rows_of(3)) == same
    others = [
        fingerprint(rows_of(4)), fingerprint(rows_of(3)[::-1]), fingerprint(rows_of(3), frames=4), fingerprint(rows_of(3), images="elsewhere"),
        fingerprint(rows_of(3), columns={"id": "id"}),
    ]  # fmt: skip
    assert len({same, *others}) == 6


def test_pairs_and_data_are_told_apart(folder):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(folder / "a.jsonl", [llava("q", "a"), pair])
    assert Records(Data("mine", path))[0].turns == (("q", "a"),)
    assert Records(Pairs("mine", path))[1].chosen == "a"
    with pytest.raises(ValueError, match=r"a\.jsonl: record 1 \(#1\): is a preference pair"):
        Records(Data("mine", path))[1]
    with pytest.raises(ValueError, match=r"record 0 .*is no preference pair"):
        Records(Pairs("mine", path))[0]


# ------------------------------------------------------------------------------------------------------------------ video


def animated(path, count=10):
    frames = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(count)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, **lossless)
    return path


@pytest.mark.parametrize("kind", ["a.gif", "a.webp", "a.png", "folder", "list", "bytes"])
def test_a_video_is_some_of_its_frames(tmp_path, kind):
    """Ten frames of shades 0, 20, .. 180, of which 4 are frames 0, 3, 6 and 9."""
    if kind in ("folder", "list"):
        (tmp_path / "clip").mkdir()
        files = [tmp_path / "clip" / f"{i}.png" for i in range(1, 11)]  # 10.png comes after 9.png
        for i, file in enumerate(files):
            file.write_bytes(png(20 * i))
        (tmp_path / "clip" / "notes.txt").write_text("no frame")
        value = "clip" if kind == "folder" else [f"clip/{i}.png" for i in range(1, 11)]
    else:
        value = animated(tmp_path / (kind if kind != "bytes" else "a.webp")).name
        value = {"bytes": (tmp_path / value).read_bytes(), "path": None} if kind == "bytes" else value
    record = parse(llava("what <video> happens?", "a", video=value), 0, root=str(tmp_path), frames=4)
    assert record.turns == (("<image><image><image><image>\nwhat  happens?", "a"),)
    assert [int(p.load(4)[0, 0, 0]) for p in record.pictures] == [0, 60, 120, 180]
    assert len({p.key for p in record.pictures}) == 4


@pytest.mark.parametrize("said", ["what?", "<video>\nwhat?", "<image>\nwhat?", "what?\n<image>"])
def test_where_a_video_goes(tmp_path, said):
    """In front where nothing is said, and where LLaVA's video data says <image>."""
    animated(tmp_path / "a.gif")
    for row in (llava(said, "a", video="a.gif"), llava(said, "a", videos=["a.gif"])):
        assert parse(row, 0, root=str(tmp_path), frames=2).turns == (("<image><image>\nwhat?", "a"),)


def test_videos_and_pictures_in_one_record(tmp_path):
    animated(tmp_path / "a.gif")
    row = chat([part("video", "a.gif"), part("image", "0.png"), part("text", "same?")], "no")
    record = parse(row, 0, root=str(tmp_path), frames=2)
    assert record.turns == (("<image><image>\n<image>\nsame?", "no"),)
    assert [p.frame for p in record.pictures] == [0, 9, None]


def test_a_video_in_one_place(tmp_path):
    """For a system that reads it as one picture of several frames."""
    animated(tmp_path / "a.gif")
    row = chat([part("video", "a.gif"), part("image", "0.png"), part("text", "same?")], "no")
    record = parse(row, 0, root=str(tmp_path), frames=2, clips=True)
    assert record.turns == (("<image>\n<image>\nsame?", "no"),)
    assert [[p.frame for p in shown.frames] for shown in record.pictures] == [[0, 9], [None]]
    video = record.pictures[0]
    assert video.size() == (8, 8)
    assert len({*record.keys, *(frame.key for frame in video.frames)}) == 4
    with pytest.raises(ValueError, match=r"image .*gone\.png does not exist"):
        parse(llava("q", "a", video=["gone.png"]), 0, root=str(tmp_path), frames=2, clips=True).pictures[0].check()


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av", reason="the package av is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    record = parse(llava("<video> what?", "a", video="a.mp4"), 0, root=str(tmp_path), frames=4)
    shades = [int(p.load(4)[0, 0, 0]) for p in record.pictures]
    assert np.allclose(shades, [0, 60, 120, 180], atol=8)


def test_sampling():
    assert images.frame_indices(10, 4) == np.linspace(0, 9, 4).astype(int).tolist()
    assert images.frame_indices(3, 8) == np.linspace(0, 2, 8).astype(int).tolist()
    assert images.frame_indices(5, 1) == [0]


# --------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_known_by_what_it_shows(tmp_path):
    keys = [
        Picture(str(tmp_path / "a.gif"), 1).key, Picture(str(tmp_path / "a.gif"), 2).key, Picture(str(tmp_path / "a.gif")).key,
        Picture(png(1)).key, Picture(png(2)).key,
    ]  # fmt: skip
    assert len(set(keys)) == 5
    assert Picture(png(1), name="x").key == Picture(png(1), name="y").key
    assert Picture(str(tmp_path / "sub/../a.gif")).key == keys[2]


# ----------------------------------------------------------------------------------------------------------------- stream


def source_of(folder, kind):
    pytest.importorskip("datasets")
    if kind == "parquet":
        return to_parquet(folder, 23)
    if kind == "tar":
        members = {}
        for i, row in enumerate(rows_of(23)):
            members |= {f"{i:03}.png": png(i), f"{i:03}.json": json.dumps(row).encode()}
        return to_tar(folder / "a.tar", members)
    write(folder / "a.jsonl", rows_of(10))
    (folder / "b.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows_of(23)[10:])))  # blank lines do not count
    return str(folder / "*.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_a_stream_is_the_list(folder, kind):
    path = source_of(folder, kind)
    assert list(Stream(Data("mine", path))) == list(Records(Data("mine", path)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_continues_exactly(folder, kind, seed):
    """Stopped after any number of records, in the second epoch too, and continued by another stream."""
    data = Data("mine", source_of(folder, kind))
    whole = Stream(data, seed=seed, block=5)
    want = [[r.number for r in whole] for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in want)
    assert (want[0] == want[1]) == (seed is None)
    want = [number for epoch in want for number in epoch]
    for stop in (0, 1, 4, 5, 6, 10, 22, 23, 24, 28, 40):
        first, got = Stream(data, seed=seed, block=5), []
        while len(got) < stop:
            for record in first:
                got.append(record.number)
                if len(got) == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        second = Stream(data, seed=seed, block=5)
        second.load_state_dict(state)
        while len(got) < 69:
            got += [r.number for r in second]
        assert got[:69] == want, f"stopped after {stop}"


def test_parts_of_a_stream_are_its_records_once(folder):
    data = Data("mine", source_of(folder, "jsonl"))
    parts = [[r.number for r in Stream(data, seed=1, block=5, part=(i, 3))] for i in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(23))
    assert [len(p) for p in parts] == [8, 8, 7]


def test_a_stream_tells_one_of_several_captions(folder):
    """By (seed, epoch, record): another one in another epoch, and the same wherever the stream is continued."""
    pytest.importorskip("datasets")
    rows = [{"image": "0.png", "captions": [f"{i}a", f"{i}b", f"{i}c"]} for i in range(30)] + [{"image": "0.png", "caption": "one"}]
    data, epochs = Data("mine", write(folder / "a.jsonl", rows)), []
    stream = Stream(data, seed=3, block=4)
    for _ in range(2):
        told = {record.number: record.turns for record in stream}
        assert told.pop(30) == (("<image>", "one"),)
        assert all(turns[0][1][:-1] == str(number) for number, turns in told.items())
        epochs.append("".join(told[i][0][1][-1] for i in range(30)))
    assert epochs[0] != epochs[1]
    assert all(min(epoch.count(which) for which in "abc") >= 4 for epoch in epochs)
    half, again = Stream(data, seed=3, block=4), Stream(data, seed=3, block=4)
    first = [record for record, _ in zip(half, range(11), strict=False)][:10]
    again.load_state_dict({**half.state_dict()})
    assert {r.number: r.turns[0][1][-1] for r in [*first, *again] if r.number < 30}.items() <= dict(enumerate(epochs[0])).items()


def test_a_stream_skips_and_counts(folder):
    pytest.importorskip("datasets")
    path = folder / "a.jsonl"
    good = json.dumps(llava("q", "a"))
    path.write_bytes(
        f'{good}\n{{"conv\n{good}\n'.encode() + b'{"id": "\xff"}\n' + json.dumps(llava("<image>", "a", image="no.png")).encode()
    )
    heard = []
    stream = Stream(Data("mine", str(path), on_bad_record="skip"), say=heard.append)
    assert [r.number for r in stream] == [0, 2]
    assert stream.left_out == 3
    assert [
        "not valid JSON" in heard[0],
        "not UTF-8" in heard[1],
        "no.png does not exist" in heard[2],
        "left out 3 records so far" in heard[3],
    ] == [True] * 4
    with pytest.raises(ValueError, match=r"a\.jsonl: record 1: its line is not valid JSON"):
        list(Stream(Data("mine", str(path))))


# ---------------------------------------------------------------------------------------------------------------- mixture


def test_without_weights_every_item_once_an_epoch():
    mixed = Mixed([5, 7, 1], seed=4)
    assert len(mixed) == 13
    assert mixed.starts == [0, 5, 12]
    epochs = [mixed.order(e) for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(13)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    assert torch.equal(Mixed([5, 7, 1], [None] * 3, seed=4).order(2), epochs[2]), "a pure function of (seed, epoch)"
    assert not torch.equal(Mixed([5, 7, 1], seed=5).order(2), epochs[2])


def test_weights_are_shares_of_the_draws():
    sizes, weights = [1000, 50, 200], [1.0, 2.0, 1.0]
    mixed = Mixed(sizes, weights, seed=0)
    order = mixed.order(0)
    part = torch.bucketize(order, torch.tensor(mixed.starts[1:]), right=True)
    assert part.bincount().tolist() in ([312, 625, 313], [313, 625, 312])  # of 1250, to the nearest
    # ... all along the epoch: any run of 250 draws is within 5 standard deviations of its share.
    for run in part.split(250):
        assert abs((run == 1).float().mean().item() - 0.5) < 5 * (0.25 / 250) ** 0.5


def test_a_part_is_walked_without_repeats_until_exhausted():
    mixed = Mixed([40, 7, 30], [1, 3, 2], seed=1)
    walks, parts = [[], [], []], set()
    for epoch in range(6):
        order = mixed.order(epoch)
        parts.add(tuple(torch.bucketize(order, torch.tensor([40, 47]), right=True).tolist()))
        for index in order.tolist():
            p = 2 if index >= 47 else 1 if index >= 40 else 0
            walks[p].append(index - mixed.starts[p])
    assert len(parts) == 6, "the sequence of parts is shuffled anew"
    for walk, size in zip(walks, mixed.sizes, strict=True):
        assert len(walk) > size
        laps = [walk[i : i + size] for i in range(0, len(walk) - size + 1, size)]
        assert all(sorted(lap) == list(range(size)) for lap in laps)
        assert len(laps) == 1 or len({tuple(lap) for lap in laps}) > 1
    assert torch.equal(Mixed([40, 7, 30], [1, 3, 2], seed=1).order(5), mixed.order(5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "items in them"), (([3, 0],), "items in them"), (([3, 3], [1.0]), "1 weights"), (([3, 3], [1.0, None]), "some none"),
        (([3, 3], [1.0, 0.0]), "above 0"), (([3, 3], [1.0, float("nan")]), "above 0"), (([3, 3], [1e-9, 1.0]), "too small a weight"),
    ],
)  # fmt: skip
def test_a_mixture_that_is_none(arguments, words):
    with pytest.raises(ValueError, match=words):
        Mixed(*arguments)


# -------------------------------------------------------------------------------------------------------------------- check


def spell(record):
    """Ids and labels in code points; answers are scored."""
    ids, labels = [1], [-100]
    for question, answer in record.turns:
        ids += [ord(c) for c in question + (answer or "")]
        labels += [-100] * len(question) + [ord(c) for c in answer or ""]
    return ids, labels


def test_a_picture_is_opened_once_and_records_share_its_fault(folder, monkeypatch):
    (folder / "2.png").write_bytes(png()[:50])
    records, opened = Records(Data("mine", write(folder / "a.json", rows_of(600)))), Counter()
    real = Picture.check
    monkeypatch.setattr(Picture, "check", lambda self: (opened.update([self.key]), real(self))[1])
    good = check(records, spell, on_bad_record="skip", say=lambda _: None)
    assert good == [i for i in range(600) if i % 3 != 2]
    assert sorted(opened.values()) == [1, 1, 1]


def test_faults_are_told_at_once_first_twenty_and_a_count(folder):
    rows = rows_of(50)
    for row in rows[:30]:
        row["image"] = "gone.png"
    records = Records(Data("mine", write(folder / "a.json", rows)))
    with pytest.raises(ValueError, match="30 of 50 records are faulty") as error:
        check(records, spell, on_bad_record="fail")
    lines = str(error.value).split("\n")
    assert len(lines) == 22
    assert lines[1].startswith("  record 0 (r0): image ")
    assert lines[-1] == "  and 10 more"
    heard = []
    assert check(records, spell, on_bad_record="skip", say=heard.append) == list(range(30, 50))
    assert "left out 30 of 50 records" in heard[0]
    assert check(records, spell, on_bad_record="fail", open_pictures=False) == list(range(50))


def test_what_encoding_refuses_is_a_fault(folder):
    records = Records(Data("mine", write(folder / "a.json", rows_of(3))))

    def encode(record):
        if record.number == 0:
            raise ValueError("a picture ends beyond max_length")
        return spell(record) if record.number == 1 else ([1, 2], [-100, -100])

    with pytest.raises(ValueError) as error:
        check(records, encode, on_bad_record="fail")
    assert "record 0 (r0): a picture ends beyond max_length" in str(error.value)
    assert "record 2 (r2): has nothing to learn" in str(error.value)


def test_a_table_of_captions(tmp_path):
    """Conceptual Captions as FROMAGe's release lays it out: names first, tabs between, quotes that are the caption's own."""
    (tmp_path / "train.tsv").write_bytes(
        b'caption\timage\nsays "hi"\ta.png\n\nno picture\n\xff\tb.png\n\xd0\xba\xd0\xbe\xd1\x82\tc.png\r\n'
    )
    records = Records(Data("cc3m", path=str(tmp_path / "train.tsv")))
    assert len(records) == 4
    for number, caption, name in ((0, 'says "hi"', "a.png"), (3, "кот", "c.png")):
        assert records[number].turns == (("<image>", caption),)
        assert records[number].pictures == (Picture(str(tmp_path / name)),)
    for number, why in ((1, "line 4 of train.tsv has 1 fields, the first line names 2"), (2, "line 5 of train.tsv is not UTF-8")):
        with pytest.raises(ValueError, match=why):
            records[number]
    with pytest.raises(ValueError, match="tables with names in their first line are read whole; leave streaming off"):
        Stream(Data("cc3m", path=str(tmp_path / "train.tsv"), streaming=True))
    (tmp_path / "train.tsv").write_text("caption\timage\n")
    with pytest.raises(ValueError, match="holds no record"):
        Records(Data("cc3m", path=str(tmp_path / "train.tsv")))


def test_problems_by_id(tmp_path):
    """ScienceQA's file: an object of problems of all splits, whose pictures lie in folders of their ids."""
    problems = {
        "4": {**SCIENCE, "split": "train", "image": "image.png"},
        "11": {**SCIENCE, "split": "test", "image": None},
        "12": {**SCIENCE, "split": "train", "image": None, "answer": 0},
    }
    for indent in (None, 1):
        (tmp_path / "problems.json").write_text(json.dumps(problems, indent=indent))
        records = Records(Data("scienceqa", path=str(tmp_path / "problems.json"), choices="llama_adapter"))
        assert [r.id for r in records] == ["4", "12"]
        asked = "Question: Which is colder? Context: Two pans. Choices: (A) ice (B) fire (C) both Answer:"
        assert [r.turns for r in records] == [((f"<image>\n{asked}", "The answer is (B)"),), ((asked, "The answer is (A)"),)]
        assert records[0].pictures == (Picture(str(tmp_path / "4" / "image.png")),)
    assert [r.id for r in Records(Data("scienceqa", path=str(tmp_path / "problems.json"), split="test"))] == ["11"]
    with pytest.raises(ValueError, match=r"has no record of split 'tran' \(did you mean 'train'\?\); they are of test, train"):
        Records(Data("scienceqa", path=str(tmp_path / "problems.json"), split="tran"))
    (tmp_path / "pair.json").write_text(json.dumps({"prompt": ask, "chosen": say("a"), "rejected": say("b")}))
    assert Records(Pairs("mine", path=str(tmp_path / "pair.json")))[0].rejected == "b"


# ------------------------------------------------------------------------------------------------- lines that tell several


def instance(name, **more):
    return {"instruction_with_input": f"do {name}", "input": name, "output": f"done {name}", **more}


# core_data.jsonl and full_data.jsonl of Unnatural Instructions, among records that tell one thing each.
SEVERAL = [
    {"instruction": "do", "instances": [instance("a", constraints="None."), instance("b", constraints="None.")]},
    {"inputs": "do c", "targets": "done c"},
    {"instruction": "do", "instances": [instance("d", constraints="None.")], "reformulations": [instance("e"), instance("f")]},
    {"instruction": "do", "instances": [instance("g", constraints="None.")], "reformulations": None},
]
PAIRS = [Record(i, f"#{i}", ((f"do {name}", f"done {name}"),)) for i, name in enumerate("abcdefg")]


def several(folder, kind):
    if kind == "parquet":
        datasets = pytest.importorskip("datasets")
        names = {name for row in SEVERAL for name in row}
        datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in SEVERAL]).to_parquet(str(folder / "s.parquet"))
        return str(folder / "s.parquet")
    (folder / "s").mkdir(exist_ok=True)
    write(folder / "s" / f"1{kind}", SEVERAL[:2])
    write(folder / "s" / f"2{kind}", SEVERAL[2:])
    return str(folder / "s")


@pytest.mark.parametrize("kind", [".json", ".jsonl", "parquet"])
def test_a_line_of_instances_is_a_record_for_each(tmp_path, kind):
    data = Data("mine", several(tmp_path, kind))
    records = Records(data)
    assert list(records) == PAIRS
    assert records[-1] == PAIRS[-1]
    assert isinstance(records.rows, list) == (kind != "parquet"), "what lies in a table is read a row at a time"
    if kind != ".json":
        pytest.importorskip("datasets")
        assert list(Stream(data)) == PAIRS


def test_a_stream_of_such_lines_continues_exactly(tmp_path):
    pytest.importorskip("datasets")
    data = Data("mine", several(tmp_path, ".jsonl"))
    for seed in (None, 4):
        whole = [r.number for r in Stream(data, seed=seed, block=2)]
        assert sorted(whole) == list(range(7))
        for stop in range(8):
            first = Stream(data, seed=seed, block=2)
            got = [record.number for _, record in zip(range(stop), first, strict=False)]
            second = Stream(data, seed=seed, block=2)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert got + [r.number for r in second][: 7 - stop] == whole, f"stopped after {stop}"


def test_instances_by_other_names_and_as_columns(tmp_path):
    """``data.columns`` reaches the lists and what is in them; hub copies have an object of lists in place of a list of objects."""
    row = {"examples": [{"ask": "do a", "output": "done a"}, {"ask": "do b", "output": "done b"}]}
    columns = {"examples": "instances", "ask": "instruction_with_input"}
    data = Data("mine", write(tmp_path / "a.jsonl", [row]), columns=columns)
    assert list(Records(data)) == PAIRS[:2]
    lists = {"instruction_with_input": ["do a", "do b"], "output": ["done a", "done b"]}
    assert list(Records(Data("mine", write(tmp_path / "b.jsonl", [{"instruction": "do", "instances": lists}])))) == PAIRS[:2]


def test_things_that_a_picture_shows_are_no_such_pairs(tmp_path):
    """Detection's files call them instances, too: a record with some is one record of its own form."""
    things = [{"bbox": [0, 0, 4, 4], "bbox_label": 1}, {"bbox": [2, 2, 8, 8], "bbox_label": 0}]
    said = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": "a.png", "conversations": said, "instances": things}, {"image": "a.png", "caption": "a", "instances": things}]
    records = list(Records(Data("mine", write(tmp_path / "a.jsonl", rows))))
    assert [r.turns for r in records] == [(("<image>\nq", "a"),), (("<image>", "a"),)]


def test_what_is_no_such_line_stays_as_it_is():
    for row in (None, 3, {"text": "a"}, {"instances": []}, {"instances": "a"}, {"instances": [1, 2], "reformulations": "a"}):
        assert split(row) == [row]
    assert split({"instances": {"output": ["a", "b"], "instruction_with_input": ["q"]}}) == [
        {"instances": {"output": ["a", "b"], "instruction_with_input": ["q"]}}
    ]


def test_answers_are_cleaned_as_captions_are(tmp_path):
    """BLIP's captions: worked by hand."""
    (tmp_path / "a.json").write_text(
        json.dumps([{"image": "a.png", "caption": 'A "Big" Dog;  (brown) runs!\n'}, {"image": "a.png", "caption": " ".join(["Word"] * 60)}])
    )
    plain, clean = (Records(Data("mine", path=str(tmp_path / "a.json"), clean=clean)) for clean in (False, True))
    assert [r.parse(0).turns[-1][1].strip() for r in (plain, clean)] == ['A "Big" Dog;  (brown) runs!', "a big dog brown runs"]
    assert clean.parse(1).turns[-1][1] == " ".join(["word"] * 50)
    (tmp_path / "c.json").write_text(json.dumps([{"image": "a.png", "captions": ["A cat!", "(It) sits."]}]))
    record = Records(Data("mine", path=str(tmp_path / "c.json"), clean=True)).parse(0)
    assert (record.turns, record.captions) == ((("<image>", "a cat"),), ("a cat", "it sits"))
    (tmp_path / "b.json").write_text(json.dumps([{"image": "a.png", "caption": "!.."}]))
    with pytest.raises(ValueError, match="has an answer without words"):
        Records(Data("mine", path=str(tmp_path / "b.json"), clean=True)).parse(0)
