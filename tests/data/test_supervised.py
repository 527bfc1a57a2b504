"""Sources: what a batch weighs, what user records must be, and the built-in sets."""

import numpy as np
import pytest
import torch

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


def test_clean_captions_alone():
    from mmfast.data import chat
    from mmfast.models.tokenizer import word_tokenizer
    from mmfast.spec import Data

    world = World()
    tokenizer = word_tokenizer(world.vocabulary)
    source = supervised.make(Data("shapes_captions"), world, chat.Encoder(tokenizer, "bare", 2, 4, tokenizer.pad_token_id))
    assert len(source) == source.picture_count == 10_000
    batch = source.batch(torch.tensor([7, 30]))
    for i, row, labels in zip((7, 30), batch["input_ids"], batch["labels"], strict=True):
        clean = world.caption(source.scenes[i]).text
        assert tokenizer.convert_ids_to_tokens(labels[labels != -100])[:-1] == clean.replace(",", " ,").replace(".", " .").split()
        assert row.tolist()[:3] == [tokenizer.bos_token_id, 4, 4]
    assert np.array_equal(batch["pictures"], world.render([source.scenes[7], source.scenes[30]]))
    assert batch["counts"].tolist() == [(batch["labels"] != -100).sum()]


def text_alone(make, count):
    """World, tokenizer and the one batch of a source that shows no picture."""
    from mmfast.data import chat
    from mmfast.models.tokenizer import word_tokenizer

    world = World()
    tokenizer = word_tokenizer(world.vocabulary)
    source = make(world, chat.Encoder(tokenizer, "bare", 2, 4, tokenizer.pad_token_id), count)
    batch = source.batch(torch.arange(count))
    assert (len(source), source.picture_count, len(batch["image_rows"])) == (count, 0, 0)
    return world, tokenizer, batch


def test_captions_as_text_alone():
    from mmfast.models.tokenizer import plain_text

    world, tokenizer, batch = text_alone(supervised.shapes_text, 5)
    for scene, row, labels in zip(world.scenes("train", 5), batch["input_ids"].tolist(), batch["labels"], strict=True):
        assert row[0] == tokenizer.bos_token_id
        assert plain_text(tokenizer, row[1:]) == " ".join(world.caption(scene, variant=v).text for v in (0, 1))
        assert (labels != -100).sum() == row.index(tokenizer.eos_token_id), "all but the beginning, the end among it"


def test_instructions_of_text_alone():
    """Only the answer and the end are learnt, the words are known, and the caption that is the input tells the answer."""
    from mmfast.data import chat
    from mmfast.data.synthetic import COUNTS, parse
    from mmfast.models.tokenizer import plain_text

    _, tokenizer, batch = text_alone(supervised.shapes_instructions, 200)
    assert not (batch["input_ids"] == tokenizer.unk_token_id).any()
    heard = set()
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        learnt = [i for i, label in enumerate(labels) if label != chat.IGNORE]
        end = row.index(tokenizer.eos_token_id)
        assert learnt == [end - 1, end]
        said, answer = plain_text(tokenizer, row[1 : end - 1]), tokenizer.convert_ids_to_tokens(labels[end - 1])
        asked, *told = parse(said)
        number = sum(m.count for m in told if (m.colour, m.shape) == (asked.colour, asked.shape))
        assert answer == (["zero", *COUNTS][number] if said.startswith("how many") else "yes" if number else "no"), said
        heard.add(answer)
    assert {"yes", "no", "zero", "one", "two"} <= heard


def test_easy_vqa_source():
    pytest.importorskip("easy_vqa")
    source = supervised.EasyVQA(spell, 0)
    assert len(source) == 38575
    assert source.pictures.shape == (4000, 64, 64, 3)
    assert source.records[:2] == [("what is the blue shape?", "rectangle", 0), ("what color is the shape?", "blue", 0)]
    names, true, _ = source.words()
    assert sorted(n for n, v in zip(names, true[0], strict=True) if v) == ["blue", "rectangle"]
    assert {"triangle", "?", "<image>", "what"} <= set(source.vocabulary())
