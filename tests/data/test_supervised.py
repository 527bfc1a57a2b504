"""Sources: what a batch weighs, what user records must be, and the built-in sets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.data import supervised
from mmfast.data.synthetic import World


def spell(turns):
    """Ids and labels of `question answer` in code points; the answer is scored."""
    ids, labels = [1], [-100]
    for question, answer in turns:
        ids += [ord(c) for c in question + answer]
        labels += [-100] * len(question) + [ord(c) for c in answer]
    return ids, labels


def test_every_column_weighs_one():
    rows = [supervised.chat.Rows([spell([("q", "a" * n)]) for n in lengths], 0) for lengths in ((5, 9, 1), (1, 1, 2))]
    source = supervised.Source(np.zeros((3, 4, 4, 3), np.uint8), rows, 0)
    batch = source.batch(torch.tensor([0, 2]))
    assert batch["image_rows"].tolist() == [0, 1, 0, 1]
    scored = batch["labels"] != -100
    weights = (1 / batch["counts"])[batch["groups"]][batch["rows"]]
    assert (weights * scored)[:2].sum().item() == pytest.approx(1)
    assert (weights * scored)[2:].sum().item() == pytest.approx(1)
    assert scored.sum(1).tolist() == [5, 1, 1, 2]


def test_shapes_source_speaks_about_its_pictures():
    world, heard = World(), []

    def listen(turns):
        heard.append(turns)
        return spell(turns)

    source = supervised.Shapes(world, listen, 0, count=12)
    assert len(source) == 12
    captions, questions = heard[:12], heard[12:]
    for scene, caption, asked in zip(source.scenes, captions, questions, strict=True):
        assert caption == [("<image> describe the picture:", world.caption(scene, planted=True).text)]
        assert [a for _, a in asked] == [a for _, a in world.turns(scene, 4, planted=True)]
        assert asked[0][0].startswith("<image> ")
    names, true, classes = source.words()
    for scene, row, present in zip(source.scenes, true, classes, strict=True):
        said = {n for n, v in zip(names, row, strict=True) if v}
        assert said & {"red", "green", "blue", "yellow", "orange", "purple"} == {supervised.COLOURS[o.colour][0] for o in scene.objects}
        assert torch.nonzero(present).flatten().tolist() == sorted(world.class_ids(scene))


def test_easy_vqa_source():
    pytest.importorskip("easy_vqa")
    source = supervised.EasyVQA(spell, 0)
    assert len(source) == 38575
    assert source.pictures.shape == (4000, 64, 64, 3)
    assert source.records[:2] == [("what is the blue shape?", "rectangle", 0), ("what color is the shape?", "blue", 0)]
    names, true, _ = source.words()
    assert sorted(n for n, v in zip(names, true[0], strict=True) if v) == ["blue", "rectangle"]
    assert {"triangle", "?", "<image>", "what"} <= set(source.vocabulary())


# ------------------------------------------------------------------------------------------------------------------ records


def folder(tmp_path, records, jsonl=False):
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "ok.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "ok.png").read_bytes()[:40])
    text = "\n".join(map(json.dumps, records)) if jsonl else json.dumps(records)
    (tmp_path / "data.json").write_text(text)
    return str(tmp_path / "data.json")


def record(*said, image="ok.png", **extra):
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": v} for i, v in enumerate(said)]
    return {"id": "x", **({"image": image} if image else {}), "conversations": turns, **extra}


@pytest.mark.parametrize("jsonl", [False, True])
def test_records_are_read_and_the_picture_comes_first(tmp_path, jsonl):
    heard = []
    path = folder(tmp_path, [record("What is\n<image>", "grey"), record("And?", "still grey", "Sure?", "yes")], jsonl)
    source = supervised.Records(path, None, lambda turns: heard.append(turns) or spell(turns), 0, size=16)
    assert heard == [[("<image>\nWhat is", "grey")], [("<image>\nAnd?", "still grey"), ("Sure?", "yes")]]
    assert source.pictures.shape == (2, 16, 16, 3)


BAD = [
    (record("<image> q", "a", image="gone.png"), "gone.png does not exist"),
    (record("<image> q", "a", image="torn.png"), "torn.png cannot be read"),
    (record("<image> q <image>", "a"), "2 <image> places but 1 pictures"),
    (record("<image> q", "look: <image>"), "answer holds <image>"),
    (record("<image> q"), "must alternate"),
    (record("<image> q", ""), "nothing to learn"),
    (record("q", "a", image=None), 'needs "image"'),
    (record("<image> q", 3), 'text "value"'),
    (record("<image> q", "a", image=7), '"image", a file name'),
    ({"id": "x", "image": "ok.png"}, "conversations"),
    ("text", "conversations"),
    (None, "conversations"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[w for _, w in BAD])
def test_a_faulty_record_is_numbered_and_explained(tmp_path, bad, words):
    path = folder(tmp_path, [record("<image> q", "a"), bad])
    with pytest.raises(ValueError, match="1 of 2 records are faulty") as error:
        supervised.Records(path, None, spell, 0, size=16)
    assert "record 1 (" in str(error.value)
    assert words in str(error.value)


def test_all_faults_are_told_at_once_or_skipped(tmp_path, capsys):
    path = folder(tmp_path, [b for b, _ in BAD] + [record("<image> q", "a")])
    with pytest.raises(ValueError) as error:
        supervised.Records(path, None, spell, 0, size=16)
    assert all(f"record {i} (" in str(error.value) for i in range(len(BAD)))
    source = supervised.Records(path, None, spell, 0, size=16, on_bad_record="skip")
    assert len(source) == 1
    assert f"left out {len(BAD)} of {len(BAD) + 1} records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no record"),
        (b"[]", "holds no record"),
        (b'{"a": 1}\n{"a": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid"),
        (b'{"id": 1}', "conversations"),
    ],
)
def test_a_file_that_is_no_data(tmp_path, content, words):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        supervised.Records(str(path), None, spell, 0, size=16)
    assert "data.json" in str(error.value)
