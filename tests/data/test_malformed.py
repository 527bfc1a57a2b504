"""What is wrong with data, and what is said about it: every row of these tables is an input and its documented result (docs/data.md)."""

import base64
import copy
import io
import json
import os
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmfast.data import formats, images
from mmfast.data.formats import Record, parse
from mmfast.data.images import Picture
from mmfast.data.records import Records, Stream, check
from mmfast.spec import Data, Pairs


def llava(*said, **more):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(said)], **more}


def chat(*said, **more):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": v} for i, v in enumerate(said)], **more}


def pair(prompt="q", chosen="a", rejected="b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def spell(record):
    """Ids and labels in code points; answers are scored."""
    said = record.turns or (("", record.document),)
    ids = [ord(c) for q, a in said for c in q + (a or "")]
    labels = [label for q, a in said for label in [-100] * len(q) + [ord(c) for c in a or ""]]
    return ids, labels + [ord(c) for c in record.chosen or ""]


def told(call, *arguments, **more):
    """(what a call returns, None) or (None, the sentence of its ValueError)."""
    try:
        return call(*arguments, **more), None
    except ValueError as error:
        return None, str(error)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A PNG of a hundred bytes whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def encoded(picture, kind="PNG", **more):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
PICTURES = {
    "ok.png": encoded(NOISE),
    "broken.jpg": b"not a picture at all",
    "empty.png": b"",
    "torn.png": encoded(NOISE)[:900],
    "torn.jpg": encoded(NOISE, "JPEG")[:700],
    "bomb.png": bomb(60_000, 60_000),
    "small_bomb.png": bomb(11_000, 11_000),  # above our limit and below Pillow's
    "float.tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
    "page.html": b"<html>404 not found</html>",
    "a.pt": pickle.dumps({"weights": 1}),
    "still.gif": encoded(NOISE, "GIF"),
}


@pytest.fixture
def folder(tmp_path):
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    return tmp_path


# --------------------------------------------------------------------------------------------- a faulty record among good ones

DEEP = []
for _ in range(50):
    DEEP = [DEEP]

# What is wrong: the row, and words of the sentence. Under "fail" the sentence is told by number; under "skip" the others are kept.
ROWS = {
    "broken image": (llava("<image> q", "a", image="broken.jpg"), "broken.jpg cannot be read: it holds no picture format"),
    "0-byte image": (llava("<image> q", "a", image="empty.png"), "empty.png cannot be read: it holds no bytes"),
    "truncated png": (llava("<image> q", "a", image="torn.png"), "torn.png cannot be read"),
    "truncated jpeg": (llava("<image> q", "a", image="torn.jpg"), "torn.jpg cannot be read"),
    "decompression bomb": (llava("<image> q", "a", image="bomb.png"), "bomb.png cannot be read"),
    "bomb below Pillow's limit": (llava("<image> q", "a", image="small_bomb.png"), "11000 x 11000 pixels, more than 100,000,000"),
    "floating-point pixels": (llava("<image> q", "a", image="float.tiff"), "float.tiff has floating-point pixels"),
    "a web page for an image": (llava("<image> q", "a", image="page.html"), "page.html cannot be read"),
    "a pickle for an image": (llava("<image> q", "a", image="a.pt"), "a.pt cannot be read"),
    "missing image": (llava("<image> q", "a", image="gone.png"), "gone.png does not exist"),
    "a folder for an image": (llava("<image> q", "a", image="folder"), "folder cannot be read: it is a folder"),
    "empty image name": (llava("<image> q", "a", image=""), "image 0 is an empty name"),
    "image name with a zero byte": (llava("<image> q", "a", image="a\0b"), "does not exist"),
    "image of a wrong type": (llava("<image> q", "a", image=7), "image 0 is a number, expected a file name"),
    "nested list of images": (llava("<image> q", "a", image=[["ok.png"]]), "image 0 is a list"),
    "null among images": (llava("<image><image> q", "a", image=["ok.png", None]), "image 1 is null"),
    "null image with a place": (llava("<image> q", "a", image=None), "1 <image> places but 0 pictures"),
    "http image": (llava("<image> q", "a", image="http://x.test/a.png"), "web address 'http://x.test/a.png'"),
    "s3 image": (llava("<image> q", "a", image="s3://bucket/a.png"), "web address"),
    "bad data url": (chat([{"type": "image", "image": "data:image/png;base64,@@@"}], "a"), "data: URL that cannot be read"),
    "broken picture in a data url": (
        chat([{"type": "image", "image": "data:image/png;base64," + base64.b64encode(b"junk").decode()}], "a"),
        "image 0 of record 1 cannot be read",
    ),
    "image and images": (llava("q", "a", image="ok.png", images=["ok.png"]), 'has both "image" and "images"'),
    "more places than images": (llava("<image> <image> q", "a", image="ok.png"), "2 <image> places but 1 pictures"),
    "one image over many places": (llava("<image>" * 50 + "q", "a", image=["ok.png"]), "50 <image> places but 1 pictures"),
    "fewer places than images": (llava("<image> q", "a", image=["ok.png", "ok.png"]), "1 <image> places but 2 pictures"),
    "no place for several images": (llava("q", "a", image=["ok.png", "ok.png"]), "0 <image> places but 2 pictures"),
    "a video in an answer": (llava("q", "see <video>", video="ok.png"), "answer 0 holds <video>; only questions may"),
    "a picture of an answer that has no place": (llava("q", "see <image> and <image>", image="ok.png"), "2 <image> places but 1 pictures"),
    "a place in an earlier answer of a pair": (
        pair(prompt=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "<image>"}, {"role": "user", "content": "r"}], image="ok.png"),
        "answer 0 holds <image>",
    ),
    "a place in the system message": (
        {"messages": [{"role": "system", "content": "<image>"}, *chat("q", "a")["messages"]], "image": "ok.png"},
        "system message holds <image>",
    ),
    "empty answer": (llava("q", ""), "answer 0 is empty"),
    "blank answer": (llava("q", "a", "q", " \n"), "answer 1 is empty"),
    "empty question": (llava("q", "a", "", "a"), "question 1 is empty"),
    "no answer": (llava("q"), "ends with a question that has no answer"),
    "two questions": ({"messages": [{"role": "user", "content": "q"}] * 2}, "must alternate"),
    "system message in the middle": (
        {"messages": [*chat("q", "a")["messages"], {"role": "system", "content": "s"}]},
        "a system message only come first",
    ),
    "only a system message": ({"messages": [{"role": "system", "content": "s"}]}, "has a system message and nothing else"),
    "system message twice": ({"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]], "system": "t"}, "twice"),
    "no messages": ({"messages": []}, "has no messages"),
    "unknown role": (
        {"conversations": [{"from": "humman", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "unknown role 'humman' (did you mean 'human'?)",
    ),
    "no role": ({"conversations": [{"value": "q"}]}, "conversations[0] has no role"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "q"}]}, "messages[0] has no role"),
    "text of a wrong type": (llava("q", 3), "the text of conversations[1] is a number, expected text"),
    "null text": (llava("q", None), "the text of conversations[1] is null"),
    "NaN text": (llava(float("nan"), "a"), "the text of conversations[0] is null"),
    "unknown part": (chat([{"type": "audio", "audio": "a.wav"}], "a"), "is not of a type that is read here"),
    "a part that is no object": (chat(["q"], "a"), "part 0, is not of a type"),
    "conversations that are text": ({"conversations": "q"}, '"conversations" is text, expected a list'),
    "turns that are text": ({"conversations": ["q", "a"]}, "conversations[0] is text, expected an object"),
    "nested lists": (DEEP, "expected an object, got a list"),
    "nested conversations": ({"conversations": [llava("q", "a")["conversations"]]}, "conversations[0] is a list"),
    "a number": (17, "expected an object, got a number"),
    "null": (None, "holds no record"),
    "an empty object": ({}, "holds no record"),
    "missing columns": ({"id": "x", "image": "ok.png"}, 'it has "id", "image"'),
    "a misspelt column": ({"conversation": []}, "(did you mean 'conversations'?)"),
    "a question without answer": ({"question": "q"}, 'has "question" but no "answer"'),
    "no answers": ({"question": "q", "answers": []}, '"answers" is an empty list'),
    "answers that are text": ({"question": "q", "answers": "a"}, '"answers" is text, expected a list'),
    "an answer that is a number": ({"question": "q", "answers": ["a", 2]}, "answers[1] is a number, expected text"),
    "an answer that is another object": ({"question": "q", "answers": [{"said": "a"}]}, "answers[0] is null, expected text"),
    "a question's answers without it": ({"answers": ["a"]}, 'it has "answers"'),
    "inputs without targets": ({"inputs": "q", "task": "t"}, 'has "inputs" but no "targets"'),
    "empty targets": ({"inputs": "q", "targets": " "}, "answer 0 is empty"),
    "instances that are text": ({"instruction": "q", "instances": "a"}, '"instances" is text, expected a list'),
    "no instances": ({"instruction": "q", "instances": []}, 'has 0 pairs of instruction and output: there is nothing in its "instances"'),
    "an instance that is text": ({"instruction": "q", "instances": ["a"]}, "its instance is text, expected an object with"),
    "several instances that are text": ({"instruction": "q", "instances": ["a", "b"]}, "its instance is text, expected an object with"),
    "instances of other names": ({"instruction": "q", "instances": [{"q": "a"}, {"q": "b"}]}, 'its instance has no "instruction_with_input"'),
    "an instance without output": ({"instances": [{"instruction_with_input": "q", "input": "i"}]}, 'its instance has no "output"'),
    "an instance without a question": ({"instances": [{"input": "i", "output": "a"}]}, 'its instance has no "instruction_with_input"'),
    "an instance of a wrong type": (
        {"instances": [{"instruction_with_input": 3, "output": "a"}]},
        '"instruction_with_input" is a number, expected a list',
    ),
    "reformulations that are text": (
        {"instances": [{"instruction_with_input": "q", "output": "a"}], "reformulations": "r"},
        '"reformulations" is text, expected a list',
    ),
    "instances of lists of unlike length": (
        {"instances": {"instruction_with_input": ["q", "q"], "output": ["a"]}},
        '"instances" is an object, expected a list',
    ),
    "a question of LLaVA's evaluation": (
        {"question_id": 3, "image": "ok.png", "text": "what?", "category": "conv"},
        'is a question ("question_id", "text") without an answer to learn or compare with; mmfast eval --generate answers it',
    ),
    "an empty one of them": ({"question_id": 3, "image": "ok.png", "text": " "}, '"text" is empty'),
    "one of them with places": (
        {"question_id": 3, "image": "ok.png", "text": "<region>?", "boxes": [[0, 0, 1, 1]]},
        'is a question without an answer with "boxes"; places are told in questions with answers, and documents',
    ),
    "a caption without image": ({"caption": "a"}, 'has a "caption" but no "image"'),
    "a choice that is none": (
        {"question": "q", "choices": ["x", "y"], "answer": 2},
        '"answer" is 2, expected the number of one of 2 choices, from 0 on',
    ),
    "choices without an answer": ({"question": "q", "choices": ["x", "y"]}, '"answer" is null, expected the number of one of 2'),
    "a choice that is true": ({"question": "q", "choices": ["x", "y"], "answer": True}, '"answer" is true, expected the number'),
    "choices of a wrong type": ({"question": "q", "choices": "xy", "answer": 0}, '"choices" is text, expected a list'),
    "a choice of a wrong type": ({"question": "q", "choices": ["x", 3], "answer": 0}, "choices[1] is a number, expected text"),
    "choices without a question": ({"choices": ["x", "y"], "answer": 0}, '"question" is null, expected text'),
    "captions without image": ({"captions": ["a"]}, 'has "captions" but no "image"'),
    "captions of a wrong type": ({"captions": "a", "image": "ok.png"}, '"captions" is text, expected a list'),
    "no captions": ({"captions": [], "image": "ok.png"}, '"captions" is an empty list'),
    "an empty one of several captions": ({"captions": ["a", " "], "image": "ok.png"}, "captions[1] is empty"),
    "a place in one of several captions": ({"captions": ["a <image>"], "image": "ok.png"}, "captions[0] holds <image>"),
    "a caption and captions": ({"caption": "a", "captions": ["a"], "image": "ok.png"}, 'has both "caption" and "captions"'),
    "an image_id that is a list": ({"caption": "a", "image": "ok.png", "image_id": [1]}, '"image_id" is a list, expected text or a whole number'),
    "an id that is a list": (llava("q", "a", id=["x"]), '"id" is a list'),
    "half a surrogate pair": (llava("q", "a\ud800"), "half a surrogate pair"),
    "huge text": (llava("q", "a" * 1_000_001), "has 1,000,002 characters or more, above 1,000,000"),
    "preference pair in supervised data": (pair(), "is a preference pair"),
    "texts and images of unlike length": ({"texts": ["a", None], "images": ["ok.png"]}, "2 texts but 1 images"),
    "text and image at one place": ({"texts": ["a"], "images": ["ok.png"]}, "texts[0] has a text and an image at one place"),
    "a document of pictures alone": ({"texts": [None], "images": ["ok.png"]}, "the document holds no text"),
    "an empty document": ({"text": " "}, "the document holds no text"),
    "a place inside an interleaved text": ({"texts": ["<image> a"], "images": [None]}, "texts[0] holds <image>"),
    "an image matched to no text": ({"text_list": ["a"], "image_info": [{"image_name": "ok.png", "matched_text_index": 3}]}, "matched_text_index 3"),
    "a matched image without a name": ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "empty name"),
    "a video that is missing": (llava("<video> q", "a", video="gone.gif"), "video gone.gif does not exist"),
    "a video of no bytes": (llava("<video> q", "a", video="empty.png"), "it holds no bytes"),
    "a video of a folder without frames": (llava("<video> q", "a", video="folder"), "is a folder without pictures"),
    "a video of an empty list": (llava("<video> q", "a", video=[]), "empty list of frames"),
    "a video of a wrong type": (llava("<video> q", "a", video=3), "video 0 is a number"),
    "a place for a video that is not there": (llava("<video> q", "a"), "1 <video> places but 0 videos"),
}  # fmt: skip

PAIRS = {
    "empty prompt": (pair(prompt=""), "question 0 is empty"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, 'has no "prompt"'),
    "null prompt": (pair(prompt=None), 'has no "prompt"'),
    "no rejected": ({"prompt": "q", "chosen": "a"}, 'has "chosen" but no "rejected"'),
    "chosen == rejected": (pair(rejected=" a"), "chosen and rejected are the same"),
    "chosen == rejected, conversations": (
        {"chosen": chat("q", "a")["messages"], "rejected": chat("q", "a")["messages"]},
        "chosen and rejected are the same",
    ),
    "empty rejected": (pair(rejected=""), "the rejected answer is empty"),
    "a place in chosen": (pair(chosen="<image>", image="ok.png"), "the chosen answer holds <image>"),
    "prompt that ends with an answer": (pair(prompt=chat("q", "a")["messages"]), "the prompt ends with an answer"),
    "answer and conversation": (pair(chosen=chat("q", "a")["messages"]), "one of chosen and rejected is a conversation"),
    "nothing shared": ({"chosen": chat("q", "a")["messages"], "rejected": chat("p", "b")["messages"]}, "share no beginning"),
    "chosen goes on": ({"chosen": chat("q", "a", "q", "a")["messages"], "rejected": chat("q", "b")["messages"]}, "chosen has 3 messages"),
    "chosen of a wrong type": (pair(chosen=3), '"chosen" is a number'),
    "a supervised record in preference data": (llava("q", "a"), "is no preference pair"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", [*ROWS, *PAIRS])
def test_a_faulty_record(folder, name):
    row, words = {**ROWS, **PAIRS}[name]
    kind, good = (Pairs, pair(image="ok.png")) if name in PAIRS else (Data, llava("<image> q", "a", image="ok.png"))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [good, row, good])))
    records, heard = Records(kind("mine", str(folder / "data.jsonl"))), []
    with pytest.raises(ValueError, match="1 of 3 records are faulty") as error:
        check(records, spell, on_bad_record="fail")
    told = str(error.value).split("\n")
    assert len(told) == 2, told
    assert told[1].startswith("  record 1 (")
    assert words in told[1].replace(f"{folder}/", "")
    assert len(told[1]) < 500
    assert check(records, spell, on_bad_record="skip", say=heard.append) == [0, 2]
    assert "left out 1 of 3 records" in heard[0]
    assert words in heard[0].replace(f"{folder}/", "")


# ----------------------------------------------------------------------------------------------------------------- whole files

GOOD = json.dumps(llava("q", "a"))
# What is wrong: name and bytes of the file, the sentence, and the records that are good under "skip" (None: it raises all the same).
FILES = {
    "empty file": ("a.jsonl", b"", "holds no record", None),
    "blank file": ("a.jsonl", b" \n\n", "holds no record", None),
    "empty array": ("a.json", b"[]", "holds no record", None),
    "truncated jsonl": ("a.jsonl", f'{GOOD}\n{GOOD}\n{{"conversations": [{{"from"'.encode(), "line 3 of a.jsonl is not valid JSON", [0, 1]),
    "a bad line in the middle": ("a.jsonl", f"{GOOD}\n\noops\n{GOOD}".encode(), "line 3 of a.jsonl is not valid JSON", [0, 2]),
    "truncated array": ("a.json", f"[{GOOD},\n{GOOD[:20]}".encode(), "a.json is not valid JSON: Expecting property name enclosed in double quotes at line 2", None),
    "non-UTF-8 line": ("a.jsonl", f"{GOOD}\n".encode() + b'{"text": "caf\xe9"}', "line 2 of a.jsonl is not UTF-8", [0]),
    "non-UTF-8 array": ("a.json", b'[{"text": "caf\xe9"}]', "a.json is not UTF-8: invalid continuation byte at byte 14", None),
    "UTF-16": ("a.json", GOOD.encode("utf-16"), "a.json is UTF-16; save it as UTF-8", None),
    "a whole file of something else": ("a.json", b"name,answer\nx,y\n", "is neither JSON nor JSONL: line 1 of a.json", None),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00" + bytes(50), "is neither JSON nor JSONL", None),
    "lists beyond any depth": ("a.json", b"[" * 200_000, "lists in lists", None),
    "a number beyond any length": ("a.jsonl", f'{GOOD}\n{{"id": {"9" * 5000}}}'.encode(), "line 2 of a.jsonl is not valid JSON", [0]),
    "an object of columns": ("a.json", b'{"conversations": {"0": []}}', '"conversations" is an object, expected a list', None),
    "an array of nothing but numbers": ("a.json", b"[1, 2]", "record 0 (#0): expected an object, got a number", None),
    "an unknown kind": ("a.csv", b"x,y", "is of no kind that is read here", None),
    "no parquet": ("a.parquet", b"PAR1 it is not", "a.parquet cannot be read", None),
    "no tar": ("a.tar", b"it is not", "a.tar cannot be read", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_file(tmp_path, name, monkeypatch):
    file, content, words, kept = FILES[name]
    if file.endswith((".parquet", ".tar")):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / file).write_bytes(content)
    data = Data("mine", str(tmp_path / file))
    with pytest.raises(ValueError) as error:
        check(Records(data), spell, on_bad_record="fail")
    assert words in str(error.value)
    assert file in str(error.value)
    if kept is None:
        with pytest.raises(ValueError):
            check(Records(data), spell, on_bad_record="skip", say=lambda _: None)
    else:
        assert check(Records(data), spell, on_bad_record="skip", say=lambda _: None) == kept


# path, more of Data, words.
SETTINGS = {
    "no file": ("gone.json", {}, "gone.json does not exist"),
    "empty folder": ("folder", {}, "folder holds no data file"),
    "a pattern that matches nothing": ("*.jsonl", {}, "matches no file"),
    "a folder of several kinds": (".", {}, "mixes json and parquet files"),
    "columns of a name that no record has": ("a.json", {"columns": {"imag": "image"}}, "columns maps 'imag', which no record has (did you mean 'image'?)"),
    "columns to a name that is none": ("a.json", {"columns": {"image": "picture"}}, "columns maps 'image' to 'picture', which is no name of ours"),
    "no path": (None, {}, "'mine' is not built in; its records need a path"),
    "a hub name that is not there": ("hub:/nowhere/at/all", {}, "hub:/nowhere/at/all cannot be read"),
    "a split that is not there": ("hub:{folder}/set", {"split": "tset"}, "Unknown split"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_faulty_setting(folder, name, monkeypatch):
    path, more, words = SETTINGS[name]
    if name.startswith(("a hub", "a split")):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "a.json").write_text(json.dumps([llava("q", "a", image="ok.png")]))
    (folder / "b.parquet").write_bytes(b"")
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text(GOOD)
    if path is not None:
        path = path.format(folder=folder) if path.startswith("hub:") else str(folder / path)
    with pytest.raises(ValueError) as error:
        Records(Data("mine", path, **more))
    assert words in str(error.value)


def test_a_stream_of_an_array_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf [1]")
    with pytest.raises(ValueError, match="streaming reads JSONL"):
        Stream(Data("mine", str(tmp_path / "a.json"), streaming=True))


# ------------------------------------------------------------------------------------------------ what is odd and still right


def record_of(folder, text, **more):
    (folder / "data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Records(Data("mine", str(folder / "data.jsonl"), **more))


def test_a_byte_order_mark_is_no_text(folder):
    assert record_of(folder, b"\xef\xbb\xbf" + GOOD.encode())[0] == Record(0, "#0", (("q", "a"),))
    (folder / "array.json").write_bytes(b"\xef\xbb\xbf[" + GOOD.encode() + b"]")
    assert Records(Data("mine", str(folder / "array.json")))[0].turns == (("q", "a"),)


def test_null_and_nan_mean_not_there(folder):
    text = json.dumps(llava("q", "a", image=None, id="x")) + "\n" + json.dumps(llava("q", "a", image=float("nan"), system=None))
    assert "NaN" in text
    assert [r.pictures for r in record_of(folder, text)] == [(), ()]


def test_windows_line_ends_and_separators_inside_text(folder):
    """U+2028 ends a line for Python's splitlines and not for JSONL."""
    records = record_of(folder, json.dumps(llava("q\u2028r", "a"), ensure_ascii=False) + "\r\n" + GOOD + "\r\n")
    assert [r.turns for r in records] == [(("q\u2028r", "a"),), (("q", "a"),)]


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(llava("q", "a"), indent=2))
    assert Records(Data("mine", str(tmp_path / "a.json")))[0].turns == (("q", "a"),)


def test_ids_that_come_twice_are_told_and_kept(folder):
    heard = []
    rows = [llava("q", "a", id=name) for name in ("x", "y", "x", "x", "z", "y")] + [llava("q", "a")] * 2
    records = record_of(folder, "\n".join(map(json.dumps, rows)))
    assert check(records, spell, on_bad_record="fail", say=heard.append) == list(range(8))
    assert len(heard) == 1
    assert "warning: 2 ids occur more than once (x, y); all their records are kept" in heard[0]


def test_a_set_of_nothing_good_is_an_error_under_skip_too(folder):
    with pytest.raises(ValueError, match="2 of 2 records are faulty"):
        check(record_of(folder, f"{json.dumps(llava('q', ''))}\n{{}}\n"), spell, on_bad_record="skip", say=lambda _: None)


def test_one_by_one_a_record_names_itself(folder):
    with pytest.raises(ValueError, match=r"data\.jsonl: record 1 \(x\): answer 0 is empty"):
        record_of(folder, GOOD + "\n" + json.dumps(llava("q", "", id="x")))[1]


# -------------------------------------------------------------------------------------------------------------------- pictures


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "a.png")
    assert (images.load(tmp_path / "a.png", 5) == [9, 8, 7]).all()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 20_000)])
def test_a_strip_does_not_explode(tmp_path, size):
    """Its middle, as if all of it had been resized, in the memory of its middle."""
    import tracemalloc

    wide = np.linspace(0, 255, max(size)).astype(np.uint8)
    array = np.repeat(wide[None] if size[0] > size[1] else wide[:, None], min(size), 0 if size[0] > size[1] else 1)
    Image.fromarray(array).save(tmp_path / "a.png")
    calls = []
    real = Image.Image.resize

    def resize(self, to, *a, **k):
        calls.append(to)
        return real(self, to, *a, **k)

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        got = images.load(tmp_path / "a.png", 64)
    tracemalloc.stop()
    assert got.shape == (64, 64, 3)
    assert abs(got.astype(int) - 127).max() <= 2
    assert max(calls[0]) <= 64 * images.LONGEST


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert (images.load(tmp_path / "a.png", 64)[..., 0] == deep >> 8).all()
    Image.fromarray(deep // 512).save(tmp_path / "b.png")  # as dark as it is: its neighbour in a film may have a light in it
    assert (images.load(tmp_path / "b.png", 64)[..., 0] == 0).all()


def test_exif_says_what_is_up(tmp_path):
    """Orientation 6: the camera was turned, so the first stored row is the right column."""
    stored = np.zeros((40, 40, 3), np.uint8)
    stored[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    got = images.load(tmp_path / "a.png", 40)
    assert (got[:, :20] == 0).all()
    assert (got[:, 20:] == 255).all()


def test_a_palette_with_transparency(tmp_path):
    Image.new("P", (8, 8), 1).save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert images.load(tmp_path / "a.png", 4).shape == (4, 4, 3)


def test_a_frame_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"still\.gif has no frame 3"):
        images.load(folder / "still.gif", 4, frame=3)


def test_a_video_file_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"a\.mp4 is not an animated picture.*pip install av"):
        images.video(tmp_path / "a.mp4", 4)


def test_damage_anywhere_in_a_picture_is_a_picture_or_a_sentence():
    """Bytes changed and cut at random in every format: nothing but ValueError comes out."""
    draw, outcomes = random.Random(0), set()
    sources = [encoded(NOISE, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")]
    for _ in range(300):
        raw = bytearray(draw.choice(sources))
        for _ in range(draw.randint(1, 8)):
            raw[draw.randrange(min(len(raw), draw.choice([64, len(raw)])))] = draw.randrange(256)
        raw = bytes(raw[: draw.randint(1, len(raw))] if draw.random() < 0.3 else raw)
        pixels, sentence = told(images.load, raw, 8)
        assert pixels is None or pixels.shape == (8, 8, 3)
        assert sentence is None or sentence.startswith("image of ")
        assert told(Picture(raw).check)[1] == sentence, "what is checked is what is loaded"
        outcomes.add(sentence is None)
    assert outcomes == {True, False}


# ------------------------------------------------------------------------------------------------------------------- any JSON


def mutated(draw, value):
    """The value with one thing in it replaced, dropped, doubled or wrapped."""
    junk = [None, 0, 1.5, True, "", "<image>", "<video>", "text", [], {}, [[]], [None], {"a": 1}, float("nan"), "\ud800", b"x", -1]
    value = copy.deepcopy(value)
    places = []

    def walk(at):
        for key in list(at) if isinstance(at, dict) else range(len(at)):
            places.append((at, key))
            if isinstance(at[key], dict | list):
                walk(at[key])

    walk(value)
    for _ in range(draw.randint(1, 3)):
        at, key = draw.choice(places)
        if key not in (at if isinstance(at, dict) else range(len(at))):
            continue
        match draw.randrange(4):
            case 0:
                at[key] = draw.choice(junk)
            case 1:
                del at[key]
            case 2:
                at[key] = [at[key]]
            case 3 if isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
    return value


def test_any_json_is_a_record_or_a_sentence(folder):
    """Thousands of damaged rows of every form: a ValueError of one line, or a record in which places and pictures agree."""
    from data.test_records import FORMS

    draw, read = random.Random(1), 0
    rows = [row for row, _ in FORMS.values()] + [
        llava("<video> q", "a", video="still.gif", image="ok.png"),
        llava("q", "a", videos=["folder"]),
    ]
    for _ in range(6000):
        row = mutated(draw, draw.choice(rows))
        record, sentence = told(parse, row, 0, root=str(folder), frames=3)
        if sentence is not None:
            assert 0 < len(sentence) < 600
            assert "\n" not in sentence
            continue
        read += 1
        text = record.document if record.document is not None else "".join(q + (a or "") for q, a in record.turns)
        assert text.count("<image>") == len(record.pictures), row
        assert "<video>" not in text
        assert record.turns or record.document
        assert all(a and a.strip() for _, a in record.turns[: -1 if record.chosen else None]), row
        assert all(q.strip() for q, _ in record.turns)
        assert (record.chosen is None) == (record.rejected is None)
    assert 500 < read < 5500


def test_parsing_is_linear(monkeypatch):
    """A record of many turns counts its characters once."""
    monkeypatch.setattr(formats, "MAX_CHARACTERS", 2000)
    assert parse(llava(*["q", "a"] * 1000), 0, root="").turns[-1] == ("q", "a")
    with pytest.raises(ValueError, match="above 2,000"):
        parse(llava(*["q", "a"] * 1000, "q", "a"), 0, root="")


# -------------------------------------------------------------------------------------------------------------------- weights


class Touch:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torn", "empty", "none", "bin", "missing weights", "other shapes"])
def test_weights_that_are_none(tmp_path, kind):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmfast.models import from_pretrained

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14), text_config=LlamaConfig(**sizes, vocab_size=32),
        image_token_index=3, image_seq_length=4,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    file, left = tmp_path / "model.safetensors", tmp_path / "left"
    raw = file.read_bytes()
    said = {"none": "holds no *.safetensors", "bin": "holds pickled weights only", "torn": "cannot be read"}
    words = said.get(kind, "is no safetensors file, whatever its name says")
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Touch(str(left))))
    elif kind == "torch.save":
        torch.save({"a": torch.zeros(2)}, file)
    elif kind in ("torn", "empty"):
        file.write_bytes(raw[: len(raw) // 2] if kind == "torn" else b"")
    elif kind in ("none", "bin"):
        file.unlink()
        if kind == "bin":
            (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(left))))
    else:
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("linear_1.weight"))
        tensors[name] = torch.zeros(3, 3)
        if kind == "missing weights":
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        words = "holds no model.multi_modal_projector.linear_1.weight of the right shape"
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not left.exists()
