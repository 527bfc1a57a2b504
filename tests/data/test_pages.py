"""Interleaved pages as Flamingo and OpenFlamingo read them, and the loss of a mixture whose sets have weights."""

import base64
import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.data import chat
from mmfast.data.chat import LeftOut
from mmfast.data.formats import assign, parse
from mmfast.data.records import Records, Stream, check
from mmfast.data.sources import Conversations
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import Data, Pages


@pytest.mark.parametrize("seed", range(12))
def test_assignment_is_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    n, m = draw.integers(1, 6, 2)
    cost = draw.normal(size=(n, m)) if seed % 2 else draw.integers(0, 3, (n, m)).astype(float)  # ties too
    rows, columns = assign(cost)
    assert len(rows) == min(n, m) == len(set(rows)) == len(set(columns))
    assert rows == sorted(rows)
    short, long = (cost, range(m)) if n <= m else (cost.T, range(n))
    best = min(sum(short[i, j] for i, j in enumerate(order)) for order in itertools.permutations(long, len(short)))
    assert cost[rows, columns].sum() == pytest.approx(best)


MATRIX = [[0.30, 0.10, 0.26], [0.31, 0.20, 0.25], [0.10, 0.20, 0.23]]
RECORD = {
    "text_list": ["one", "two", "three"],
    "image_info": [{"image_name": f"{name}.png", "matched_text_index": 0} for name in "abc"],
    "similarity_matrix": MATRIX,
}


def read(record, number=7, **pages):
    made = parse(record, number, root="", pages=Pages(**pages))
    return made.document, "".join(p.source[0] for p in made.pictures)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_share_of_documents_with_one_picture_is_left_out(tmp_path, streaming):
    """No others, the same ones each time; two pictures of which ``pictures`` keeps one are one. A pair is no document."""
    if streaming:
        pytest.importorskip("datasets")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [{"items": [{"text": "t"}, *[{"image": "a.png"}] * n]} for _ in range(200) for n in (1, 2, 0)]
    rows += [{"image": "a.png", "caption": "t"}] * 50
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def kept(**pages):
        heard, data = [], Data("d", path=str(tmp_path / "d.jsonl"), pages=Pages(**pages), streaming=streaming)
        if streaming:
            return [record.number for record in Stream(data, say=heard.append)], heard
        return check(Records(data), None, on_bad_record="fail", say=heard.append), heard

    assert kept() == (list(range(650)), [])
    some, heard = kept(single=0.5)
    assert "a document of one picture, of which data.pages.single keeps 0.5" in heard[0]
    assert [n for n in some if n % 3 or n >= 600] == [n for n in range(650) if n % 3 or n >= 600]
    assert 80 < len(some) - 450 < 120
    assert kept(single=0.5)[0] == some
    assert len(kept(single=0.0)[0]) == 450
    fewer, _ = kept(single=0.5, pictures=1)
    assert 160 < len(fewer) - 250 < 240


def test_mmc4_is_matched_one_to_one():
    """By their records all three stand before "one". The best assignment is a: three (.26), b: one (.31), c: two (.20), which is below .24; and
    pictures come in the order of the sentences, b before a."""
    assert read(RECORD) == ("<image><image><image>one two three", "abc")
    assert read(RECORD, similarity=0.24) == ("<image>one two <image>three", "ba")
    assert read(RECORD, similarity=0.1) == ("<image>one <image>two <image>three", "bca")
    assert read(RECORD, similarity=0.24, pictures=1) == ("one two <image>three", "a")  # the first of the record, as there
    for unlike in ({**RECORD, "similarity_matrix": [[0.1] * 3] * 3}, {"text_list": ["one"], "image_info": []}):
        with pytest.raises(LeftOut, match=r"without a picture that is as similar to a sentence as data.pages.similarity, 0.24"):
            read(unlike, similarity=0.24)
    for wrong in (None, [[1.0]], "x", [[0.1, 0.2, "y"]] * 3, [[0.1, 0.2], [0.1]]):
        with pytest.raises(ValueError, match="similarity_matrix"):
            read({**RECORD, "similarity_matrix": wrong}, similarity=0.24)


def test_of_mmc4_with_pictures_in_it_the_others_were_not_to_be_had():
    """Nor are they matched: b, which is best of all, has no picture, so a gets its sentence."""
    infos = [
        {**info, "image_base64": base64.b64encode(name.encode()).decode()} for info, name in zip(RECORD["image_info"], "abc", strict=True)
    ]
    infos[1] = RECORD["image_info"][1]
    record = {**RECORD, "image_info": infos}
    assert shown(record) == ("<image><image>one two three", [b"a", b"c"])
    assert shown(record, similarity=0.24) == ("<image>one two three", [b"a"])
    assert shown(record, similarity=0.2) == ("<image>one two <image>three", [b"a", b"c"])
    infos[1] = {"image_name": "b.png"}  # nobody asks where it would have stood
    assert shown(record)[1] == [b"a", b"c"]


def shown(record, **pages):
    made = parse(record, 0, root="", pages=Pages(**pages))
    return made.document, [p.source for p in made.pictures]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_openflamingo_rejects_is_left_out_and_told(tmp_path, streaming, capsys):
    """A document of which no picture is like a sentence, and one whose first picture comes too late, are no faults; a torn one is."""
    if streaming:
        pytest.importorskip("datasets")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    info = [{"image_name": "a.png", "matched_text_index": 0}]
    good, unlike, late = (
        {"text_list": ["a " * before, "b"], "image_info": info, "similarity_matrix": [matrix]}
        for before, matrix in ((1, [0.3, 0.1]), (1, [0.2, 0.1]), (9, [0.1, 0.3]))
    )
    tokenizer = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "b"), ("<|endofchunk|>",))
    encoder = chat.Encoder(tokenizer, "open_flamingo", 1, 4, 0, max_length=8)

    def read_all(*rows):
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = Data("d", path=str(tmp_path / "d.jsonl"), pages=Pages(similarity=0.24), streaming=streaming)
        if not streaming:
            return [number for _, number in Conversations([Records(data)], encoder, plan=8).items]
        stream = Stream(data)
        stream.check = encoder.record
        return [record.number for record in stream]

    assert read_all(good, unlike, late, {"text": "a"}, good) == [0, 4]
    said = capsys.readouterr().out
    assert "data.pages.similarity, 0.24" in said
    assert said.count("no picture in the first 8 tokens") == 2
    with pytest.raises(ValueError, match="similarity_matrix"):
        read_all(good, unlike, {**good, "similarity_matrix": [[0.3]]})


def test_generated_sequences():
    def carried(text):
        return {"base64_image": base64.b64encode(text.encode()).decode()}

    record = {
        "is_gpt": True, "example": "A. _!_IMAGE2_!_ B. _!_IMAGE1_!_ _!_IMAGE10_!_C.",
        "image_map": {"_!_IMAGE1_!_": carried("1"), "_!_IMAGE2_!_": carried("2"), "_!_IMAGE10_!_": carried("10")},
    }  # fmt: skip
    assert shown(record) == ("A. <image> B. <image><image>C.", [b"2", b"1", b"10"])
    assert shown(record, pictures=2) == ("A. <image> B. <image>C.", [b"2", b"1"])
    assert shown(record, following=1.0) == ("<image>A. <image><image> B. C.", [b"2", b"1", b"10"])
    for change, sentence in (
        ({"image_map": {"_!_IMAGE2_!_": carried("2")}}, '"example" has the place _!_IMAGE1_!_, of which "image_map" has no base64_image'),
        ({"example": "A. _!_IMAGE1_!_"}, '"example" has 1 places of pictures but "image_map" 3 pictures'),
        ({"image_map": ["x"]}, '"image_map" is a list, expected an object'),
        ({"example": None}, '"example" is null, expected text'),
        ({"example": "<image>"}, '"example" holds <image>'),
    ):
        with pytest.raises(ValueError, match=sentence):
            shown({**record, **change})


PLAIN = {"text": "one <image> two\n<image> <image> three", "images": ["a.png", "b.png", "c.png"]}
MATCHED = {
    "text_list": ["one", "two", "three"],
    "image_info": [{"image_name": f"{name}.png", "matched_text_index": place} for name, place in (("c", 2), ("a", 1), ("b", 1))],
}


def test_pages_are_read_alike_in_every_form():
    """In plain text and of MMC4 too: the first pictures, those before the text that precedes them, and a beginning at any piece."""
    assert read(PLAIN) == (PLAIN["text"], "abc"), "to the last blank"
    assert read(PLAIN, pictures=2) == ("one <image> two\n<image> three", "ab")
    assert read(PLAIN, following=1.0) == ("<image>one <image><image> two\n three", "abc")
    assert read(MATCHED) == ("one <image><image>two <image>three", "abc")
    assert read(MATCHED, following=1.0) == ("<image><image>one <image>two three", "abc")
    assert read(MATCHED, pictures=2) == ("one <image>two <image>three", "ac"), "of the record the first, as OpenFlamingo"
    for record, count in ((PLAIN, 6), (MATCHED, 6)):
        whole, names = read(record)
        drawn = {read(record, number, window=True) for number in range(200)}
        assert len(drawn) == count
        for text, pictures in drawn:
            assert whole.replace("> <", "><").endswith(text.replace("> <", "><"))
            assert names.endswith(pictures)
            assert text.count("<image>") == len(pictures)
        some = {read(record, number, window=True, pictures=1) for number in range(200)}
        assert {pictures for _, pictures in some} == {"a", "b", "c", ""}, "the first of the window"
    placed = {"text": "a <region> <image> b", "image": "a.png", "boxes": [[0, 0, 1, 1]]}
    assert read(placed, following=1.0) == ("a <region> <image> b", "a"), "places are told in order"


def test_a_window_leaves_some_text():
    for record in (
        {"items": [{"text": "one"}, {"image": "a.png"}, {"image": "b.png"}]},
        {"text": "one<image><image>", "images": ["a.png", "b.png"]},
    ):
        assert len({read(record, number, window=True) for number in range(50)}) == 1


PAGE = {"items": [{"text": "one"}, {"image": "a.png"}, {"text": "two"}, {"image": "b.png"}, {"image": "c.png"}, {"text": "three"}]}


def test_pictures_of_a_page():
    assert read(PAGE) == ("one\n<image>\ntwo\n<image>\n<image>\nthree", "abc")
    assert read(PAGE, pictures=2) == ("one\n<image>\ntwo\n<image>\nthree", "ab")


def test_a_picture_before_the_text_that_precedes_it():
    assert read(PAGE, following=1.0) == ("<image>\none\n<image>\n<image>\ntwo\nthree", "abc")
    drawn = Counter(read(PAGE, number, following=0.5)[0] for number in range(400))
    assert len(drawn) == 2
    assert abs(min(drawn.values()) - 200) < 40
    assert [read(PAGE, n, following=0.5) for n in range(20)] == [read(PAGE, n, following=0.5) for n in range(20)], "the same in every run"


def test_a_window_begins_at_any_piece():
    whole, shown = read(PAGE)
    begins = {read({**PAGE, "items": [*PAGE["items"], {"text": "end"}]}, number, window=True) for number in range(200)}
    assert len(begins) == 7
    for text, pictures in begins:
        assert f"{whole}\nend".endswith(text)
        assert shown.endswith(pictures)
        assert text.count("<image>") == len(pictures)


def source(tmp_path, losses):
    """Two sets of captions in one mixture."""
    words = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "b", "c")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    parts = []
    for name, count, length, loss in (("long", 5, 6, losses[0]), ("short", 3, 1, losses[1])):
        rows = [{"image": "x.png", "caption": " ".join(random.Random(i).choices("abc", k=length))} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        parts.append(Records(Data(name, path=str(tmp_path / f"{name}.json"), loss=loss)))
    tokenizer = word_tokenizer(words, ("<|endofchunk|>",))
    return Conversations(parts, chat.Encoder(tokenizer, "flamingo", 1, 4, 0), plan=8)


def test_a_mixture_counts_each_set_apart_where_losses_have_weights(tmp_path):
    made = source(tmp_path, (1.0, 0.2))
    batch = made.batch(torch.arange(8))
    assert batch["groups"].tolist() == [0] * 5 + [1] * 3
    assert batch["counts"].tolist() == [5 * 8.0, 3 * 3.0]  # with the chunk's end and the end
    assert made.loss_weights.tolist() == pytest.approx([1.0, 0.2])
    plain = source(tmp_path, (None, None))
    assert plain.loss_weights is None
    assert plain.batch(torch.arange(8))["counts"].tolist() == [49.0]


def test_the_loss_is_the_weighed_sum_of_the_sets_own_means(tmp_path):
    from gated import SYSTEM
    from made import Session
    from mmfast.trainers.supervised import answer_objective

    from mmfast.models import build

    made = source(tmp_path, (1.0, 0.2))
    torch.manual_seed(0)
    model = build(replace(SYSTEM, language=replace(SYSTEM.language, vocab=9)), tokenizer=made.encoder.tokenizer)
    model.train_only(("adapter",))
    session = Session.__new__(Session)
    session.model, session.system = model, model.system
    batch = made.batch(torch.arange(8))
    states = torch.randn(1, 4, 32)
    session.place = type("Here", (), {"device": torch.device("cpu")})
    session.states_in = lambda batch, states: states[batch["picture_ids"]]
    loss, _ = answer_objective(session, states, shares=made.loss_weights)(batch, batch["counts"])
    with torch.no_grad():
        logits = model(batch["input_ids"], image_states=states, image_rows=batch["image_rows"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert float(loss) == pytest.approx(float(each[:5][labels[:5] >= 0].mean() + 0.2 * each[5:][labels[5:] >= 0].mean()), abs=1e-5)
