"""Batches of a user's records: which token, which picture, which row; cut, packed, mixed, streamed and fetched by other processes."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.data import chat
from mmfast.data.records import Records, Stream
from mmfast.data.sources import Conversations, PreferencePairs, Streamed
from mmfast.spec import Data, Fixed, Pairs

IMAGE = 3


class Speller:
    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


def encoder(**kwargs):
    return chat.Encoder(Speller(), "bare", image_tokens=2, image_token=IMAGE, pad_token=0, **kwargs)


def text(ids):
    return "".join({0: "", 1: "^", 2: "$", IMAGE: "@"}.get(i) if i < 4 else chr(i) for i in ids)


def data(folder: Path, records, **kwargs):
    for i in range(4):
        Image.fromarray(np.full((9, 9, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Data("mine", path=str(folder / "data.jsonl"), **kwargs)


def said(question, answer, *images):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": [f"{i}.png" for i in images],
    }


RECORDS = [
    said("<image>and<image>", "x", 1, 2),
    said("text", "yy"),
    said("<image>q", "zzz", 2),
    {"text": "a<image>b<image>", "images": ["0.png", "3.png"]},
]


def shown(batch):
    """The grey of the picture at each placeholder run."""
    if "pictures" not in batch:
        return []
    return [int(batch["pictures"][i, 0, 0, 0]) // 50 for i in batch["image_rows"]]


def test_a_batch_of_all_kinds(tmp_path):
    source = Conversations([Records(data(tmp_path, RECORDS))], encoder(), plan=4)
    assert (len(source), source.picture_count) == (4, 4)
    batch = source.batch(torch.tensor([2, 1, 0, 3]))
    assert [text(row) for row in batch["input_ids"].tolist()] == ["^@@qzzz$", "^textyy$", "^@@and@@x$", "^a@@b@@$"]
    assert shown(batch) == [2, 1, 2, 0, 3]
    assert len(batch["picture_ids"]) == 4, "a picture that two rows show is loaded once"
    assert batch["pictures"].shape == (4, 4, 4, 3)
    assert batch["counts"].tolist() == [4 + 3 + 2 + 3]
    alone = source.batch(torch.tensor([1]))
    assert "pictures" not in alone
    assert len(alone["image_rows"]) == 0
    source.with_pictures = False
    assert "pictures" not in source.batch(torch.tensor([0]))


def test_what_is_cut_loses_its_pictures_too(tmp_path):
    long = [{"text": "abc<image>d<image>efg", "images": ["1.png", "2.png"]}]
    for limit, want, pictures in ((20, "^abc@@d@@efg$", [1, 2]), (8, "^abc@@d", [1]), (7, "^abc@@d", [1]), (5, "^abc", [])):
        source = Conversations([Records(data(tmp_path, long))], encoder(max_length=limit), plan=4)
        batch = source.batch(torch.tensor([0]))
        assert text(batch["input_ids"][0].tolist()) == want
        assert shown(batch) == pictures


def test_packed_rows(tmp_path):
    source = Conversations([Records(data(tmp_path, RECORDS))], encoder(), plan=4)
    source.packing = True
    batch = source.batch(torch.tensor([1, 2]))
    assert text(batch["input_ids"][0].tolist()) == "^textyy$^@@qzzz$"
    assert batch["position_ids"][0].tolist() == [*range(8), *range(8)]
    assert batch["rows"][0].tolist() == [0] * 8 + [1] * 8


def test_a_document_is_parsed_once_for_all_its_pictures(tmp_path, monkeypatch):
    long = [{"text": "<image>".join("abcdef"), "images": [f"{i % 4}.png" for i in (1, 2, 3, 0, 2)]}, said("<image>", "x", 3)]
    source = Conversations([Records(data(tmp_path, long))], encoder(), plan=4)
    calls, parse = [], Records.parse
    monkeypatch.setattr(Records, "parse", lambda self, number: (calls.append(number), parse(self, number))[1])
    assert shown(source.batch(torch.tensor([1, 0]))) == [3, 1, 2, 3, 0, 2]
    assert len(calls) == 1, "every picture of the batch is first seen in the document"


def test_a_tokenizer_whose_unknown_token_ends_texts_knows_all_words(tmp_path, capsys):
    class Whole(Speller):
        unk_token_id, unk_token = 2, "$"

    class Lacking(Speller):
        unk_token_id, unk_token = ord("z"), "z"

    for kind, want in ((Whole, ""), (Lacking, "data.jsonl: warning: 3 of 24 tokens (12.5%)")):
        spec = data(tmp_path, RECORDS)
        Conversations([Records(spec)], chat.Encoder(kind(), "bare", image_tokens=2, image_token=IMAGE, pad_token=0), plan=4)
        out = capsys.readouterr().out
        assert want in out
        assert ("warning" in out) == bool(want)


def test_mixtures_draw_by_weight(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few = data(tmp_path / "a", [said(f"few{i}", "x") for i in range(4)], weight=3.0)
    many = data(tmp_path / "b", [said(f"many{i}", "x") for i in range(12)], weight=1.0)
    source = Conversations([Records(few), Records(many)], encoder(), plan=4, seed=5)
    drawn = [text(source.batch(source.permutation(0)[i : i + 1])["input_ids"][0].tolist()) for i in range(16)]
    assert sum("few" in t for t in drawn) == 12
    assert len({t for t in drawn if "many" in t}) == 4
    assert Conversations([Records(few)], encoder(), plan=4).permutation is None


def test_encodings_need_not_be_kept(tmp_path, monkeypatch):
    kept = Conversations([Records(data(tmp_path, RECORDS))], encoder(), plan=4)
    monkeypatch.setattr("mmfast.data.sources.KEEP_TOKENS", 0)
    fresh = Conversations([Records(data(tmp_path, RECORDS))], encoder(), plan=4)
    assert not fresh._kept
    for index in ([0, 1], [3]):
        a, b = kept.batch(torch.tensor(index)), fresh.batch(torch.tensor(index))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_source_travels_to_other_processes(tmp_path):
    source = Conversations([Records(data(tmp_path, RECORDS))], encoder(), plan=4)
    sent = pickle.dumps(source)
    assert len(sent) < 20_000, "no pixels in it"
    a, b = source.batch(torch.tensor([0, 3])), pickle.loads(sent).batch(torch.tensor([0, 3]))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_questions_are_all_that_stands_before_an_answer(tmp_path):
    """Of every turn, with the earlier answers and pictures; a document asks nothing, and one picture with one answer is a caption."""
    talk = [("<image>what", "a"), ("and <image>?", "b"), ("so", "c")]
    turns = {
        "messages": [{"role": r, "content": t} for turn in talk for r, t in zip(("user", "assistant"), turn, strict=True)],
        "images": ["3.png", "0.png"],
    }
    asked = {"image": "3.png", "question": "how", "answers": ["x", "y", "y"], "id": "h"}
    source = Conversations([Records(data(tmp_path, [turns, RECORDS[3], asked, said("text", "yy")]))], encoder(), plan=4)
    questions = list(source.questions(range(4)))
    prompts = ["^@@what", "^@@whataand @@?", "^@@whataand @@?bso", "^@@\nhow", "^text"]
    assert [text(q.ids) for q in questions] == prompts
    assert [(q.item, q.record.id, q.text, q.answer, q.answers) for q in questions] == [
        (0, "#0", "what", "a", ("a",)), (0, "#0", "and ?", "b", ("b",)), (0, "#0", "so", "c", ("c",)),
        (2, "h", "how", "y", ("x", "y", "y")), (3, "#3", "text", "yy", ("yy",)),
    ]  # fmt: skip
    assert [shown(source.show(q.shown)) for q in questions] == [[3], [3, 0], [3, 0], [3], []]
    assert [q for q, *_ in source.prompts(3)] == ["so", "<image>\nhow"]
    assert source.captions() == [2]
    short = Conversations([Records(data(tmp_path, [turns]))], encoder(max_length=16), plan=4)
    assert [text(q.ids) for q in short.questions([0])] == prompts[:2], "what is cut off in training is not asked"
    assert [q for q, *_ in short.prompts(1)] == ["and <image>?"]


def test_pairs(tmp_path):
    records = [
        {"image": "1.png", "prompt": "p", "chosen": "good", "rejected": "bad"},
        {"images": ["2.png"], "prompt": "q", "chosen": "yes", "rejected": "no"},
    ]
    mine = data(tmp_path, records)
    source = PreferencePairs(Records(Pairs("mine", path=mine.path)), encoder(), plan=4)
    batch = source.batch(torch.tensor([1, 0]))
    assert [text(row) for row in batch["input_ids"].tolist()] == ["^@@\nqyes$", "^@@\npgood$", "^@@\nqno$", "^@@\npbad$"]
    assert batch["counts"].tolist() == [2, 9, 7]
    assert batch["scored"].tolist() == [4, 5, 3, 4]
    assert shown(batch) == [2, 1, 2, 1]
    assert len(batch["pictures"]) == 2, "both answers share a picture"
    assert batch["index"].tolist() == [1, 0]
    shuffled = PreferencePairs(Records(Pairs("mine", path=mine.path)), encoder(), plan=4, shuffled=True)
    assert [text(row) for row in shuffled.batch(torch.tensor([0]))["input_ids"].tolist()] == ["^@@\npgood$", "^@@\npno$"]


def test_pairs_score_only_the_answers_that_differ(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    pair = {"prompt": turns, "chosen": [{"role": "assistant", "content": "D"}], "rejected": [{"role": "assistant", "content": "E"}]}
    mine = data(tmp_path, [pair, pair])
    batch = PreferencePairs(Records(Pairs("mine", path=mine.path)), encoder(), plan=4).batch(torch.tensor([0]))
    assert text(batch["input_ids"][0].tolist()) == "^abcD$"
    assert [text([i for i in row if i != -100]) for row in batch["labels"].tolist()] == ["D$", "E$"]


def test_pairs_that_a_cut_makes_alike_are_faulty(tmp_path):
    pairs = [{"prompt": "p", "chosen": chosen, "rejected": "aaab"} for chosen in ("aaac", "b", "aab")]
    path = data(tmp_path, pairs).path
    assert len(PreferencePairs(Records(Pairs("mine", path=path)), encoder(max_length=6), plan=4)) == 3
    with pytest.raises(ValueError, match=r"1 of 3 .*\n  record 0 \(#0\): chosen and rejected are the same after the cut at max_length=5$"):
        PreferencePairs(Records(Pairs("mine", path=path)), encoder(max_length=5), plan=4)
    # Words that a tokenizer does not have are another matter, of which it warns.
    deaf = replace(encoder(), tokenizer=type("Deaf", (Speller,), {"__call__": lambda self, text, **_: {"input_ids": [9] * len(text)}})())
    assert len(PreferencePairs(Records(Pairs("mine", path=path)), deaf, plan=4)) == 3
    kept = PreferencePairs(Records(Pairs("mine", path=path, on_bad_record="skip")), encoder(max_length=5), plan=4, shuffled=True)
    assert len(kept) == 2, "the control has the same pairs"


@pytest.mark.parametrize("processes", [1, 2])
def test_streams_continue_where_they_were(tmp_path, processes):
    pytest.importorskip("datasets")
    spec = data(tmp_path, [said(f"<image>{i}", "x" * (i % 3 + 1), i % 4) for i in range(10)], streaming=True)

    def taken(source, n, rank):
        return [[text(row) for row in source.take(4, rank, processes)["input_ids"].tolist()] for _ in range(n)]

    for rank in range(processes):
        whole = Streamed(Stream(spec, seed=1, block=4), encoder(), plan=4)
        want = taken(whole, 6, rank)
        first = Streamed(Stream(spec, seed=1, block=4), encoder(), plan=4)
        assert taken(first, 2, rank) == want[:2]
        second = Streamed(Stream(spec, seed=1, block=4), encoder(), plan=4)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert taken(second, 4, rank) == want[2:]
    assert sum(map(len, want)) == 24 // processes
    batch = Streamed(Stream(spec), encoder(), plan=4).take(3)
    assert shown(batch) == [0, 1, 2]
    assert batch["counts"].tolist() == [2 + 3 + 4]


def test_other_processes_are_handed_few_tensors(tmp_path):
    """Each tensor that a loader's process is given costs it a file handle, of which a system allows about a thousand."""
    source = Conversations([Records(data(tmp_path, RECORDS * 100))], encoder(), plan=8)
    want = source.batch(torch.tensor([3, 1, 399]))
    handed = []

    class Counting(pickle.Pickler):
        def reducer_override(self, it):
            handed.extend([it] if isinstance(it, torch.Tensor) else [])
            return NotImplemented

    out = io.BytesIO()
    Counting(out).dump(source)
    assert 0 < len(handed) < 20
    there = pickle.loads(out.getvalue())
    for other in (source, there):
        got = other.batch(torch.tensor([3, 1, 399]))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_processes_share_a_stream_and_cut_records_lose_their_pictures(tmp_path):
    pytest.importorskip("datasets")
    spec = data(tmp_path, [said(f"<image>{i}", "x", i % 4) for i in range(4)], streaming=True)
    shares = [Streamed(Stream(spec), encoder(), plan=4).take(4, rank, 2) for rank in range(2)]
    assert [[text(row) for row in share["input_ids"].tolist()] for share in shares] == [["^@@0x$", "^@@2x$"], ["^@@1x$", "^@@3x$"]]
    assert [shown(share) for share in shares] == [[0, 2], [1, 3]]
    long = [{"text": "abc<image>d<image>efg", "images": ["1.png", "2.png"]}, said("<image>", "x", 3)]
    batch = Streamed(Stream(data(tmp_path, long, streaming=True)), encoder(max_length=8), plan=4).take(2)
    assert [text(row) for row in batch["input_ids"].tolist()] == ["^abc@@d", "^@@x$"]
    assert shown(batch) == [1, 3]


def test_the_plain_template_keeps_as_many_places_as_there_are_pictures(tmp_path):
    records = [said("a<image>b<image>", "x", 2, 1), said("words alone", "y"), said("<image>", "z", 3)]
    plain = chat.Encoder(Speller(), "plain", image_tokens=2, image_token=IMAGE, pad_token=0)
    batch = Conversations([Records(data(tmp_path, records))], plain, plan=4).batch(torch.tensor([0, 1, 2]))
    assert [text(row) for row in batch["input_ids"].tolist()] == ["^@@@@x\n", "^y\n", "^@@z\n"]
    assert shown(batch) == [2, 1, 3]


def test_a_records_later_pictures_are_opened_too(tmp_path):
    spec = data(tmp_path, [said("<image><image>", "x", 1, 2), said("<image>", "x", 2), said("<image>", "x", 1)])
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 3 records are faulty") as error:
        Conversations([Records(spec)], encoder(), plan=4)
    assert "record 0" in str(error.value)
    assert "record 1" in str(error.value)


# -------------------------------------------------------------------------------------------------------- pictures to be drawn


BEGIN, END = 6, 7


def drawing_encoder(**kwargs):
    return encoder(borders=(BEGIN, END), learn_pictures=True, **kwargs)


def test_pictures_in_answers_are_supervised_and_those_in_questions_are_not(tmp_path):
    """Tokens and labels written out; pictures in reading order, over turns."""
    first = said("<image>q<image>", "a<image>b", 1, 2, 3)
    first["messages"] += [{"role": "user", "content": "r"}, {"role": "assistant", "content": "<image>"}]
    first["images"].append("0.png")
    source = Conversations([Records(data(tmp_path, [first]))], drawing_encoder(), plan=5)
    batch = source.batch(torch.tensor([0]))
    picture = [BEGIN, IMAGE, IMAGE, END]
    ids = [1, *picture, ord("q"), *picture, ord("a"), *picture, ord("b"), ord("r"), *picture, 2]
    assert batch["input_ids"].tolist() == [ids]
    masked = [-100] * (1 + 4 + 1 + 4)
    assert batch["labels"].tolist() == [[*masked, ord("a"), *picture, ord("b"), -100, *picture, 2]]
    assert batch["pictures"][batch["image_rows"]][:, 2, 2, 0].tolist() == [50, 100, 150, 0]


def test_what_samples_are_made_of_shows_no_picture_that_is_to_be_drawn(tmp_path):
    source = Conversations([Records(data(tmp_path, [said("<image>draw", "<image>", 1, 2)]))], drawing_encoder(), plan=5)
    ((question, ids, _, pictures),) = source.prompts(1)
    assert (question, ids.count(IMAGE), pictures[:, 0, 0, 0].tolist()) == ("<image>draw", 2, [50])


def test_a_question_shows_what_was_drawn_before_it(tmp_path):
    """Three turns with pictures in questions and answers: before each answer, all pictures of the turns before and of its question."""
    row, more = said("<image>draw", "a<image>", 1, 2), said("<image>again", "<image>", 3, 0)
    row = {name: [*row[name], *more[name], *({"messages": said("q", "x")["messages"]}.get(name, []))] for name in row}
    source = Conversations([Records(data(tmp_path, [row]))], drawing_encoder(), plan=5)
    questions = list(source.questions([0]))
    assert [q.text for q in questions] == ["draw", "again", "q"]
    assert [q.answer for q in questions] == ["a<image>", "<image>", "x"]
    assert [source.load_pictures(torch.tensor(q.shown, dtype=torch.long).flatten())[:, 0, 0, 0].tolist() for q in questions] == [
        [50],
        [50, 100, 150],
        [50, 100, 150, 0],
    ]
    assert [q.ids.count(IMAGE) for q in questions] == [2, 6, 8]


def test_a_system_that_does_not_draw_refuses_them(tmp_path):
    row = said("draw", "<image>", 1)
    with pytest.raises(ValueError, match=r"record 0 \(#0\): answer 0 holds <image>, and this system does not draw; only questions may"):
        Conversations([Records(data(tmp_path, [row]))], encoder(), plan=5)
    with pytest.raises(ValueError, match="answer 0 holds <image>, and this system does not draw"):
        Streamed(Stream(data(tmp_path, [row], streaming=True)), encoder(), plan=5).take(1)
    texts = chat.TextSide(Speller(), 1, 2, 1, 0)
    with pytest.raises(ValueError, match="holds a picture in an answer, and captions that are compared with pictures are texts"):
        texts([("draw", "<image>")])


def test_the_place_of_a_single_picture_in_an_answer_stays(tmp_path):
    """LLaVA moves a picture to the front of its question; an answer is what it is."""
    rows = [
        {"image": "1.png", "conversations": [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "here: <image> done"}]},
        {"image": "1.png", "conversations": [{"from": "human", "value": "see <image>"}, {"from": "gpt", "value": "yes"}]},
    ]
    records = Records(data(tmp_path, rows))
    assert [record.turns for record in records] == [(("draw", "here: <image> done"),), (("<image>\nsee", "yes"),)]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_questions_may_be_made_squares_otherwise(tmp_path, streaming):
    """One file in a question (padded), an answer and a document (cropped): three times as long as it is high, and white."""
    rows = [said("<image>again", "<image>", 1, 1), {"text": "a<image>", "image": "1.png"}]
    given = data(tmp_path, rows, streaming=streaming)
    Image.fromarray(np.full((10, 30, 3), 255, np.uint8)).save(tmp_path / "1.png")
    plan = Fixed(size=9, fit="crop", fit_asked="pad")
    if streaming:
        batch = Streamed(Stream(given), drawing_encoder(), plan=plan).take(2)
    else:
        source = Conversations([Records(given)], drawing_encoder(), plan=plan)
        assert source.picture_count == 2
        assert Conversations([Records(given)], drawing_encoder(), plan=9).picture_count == 1
        batch = source.batch(torch.tensor([0, 1]))
    top, middle = (batch["pictures"][batch["image_rows"]][:, row, 4, 0].tolist() for row in (0, 4))
    assert (top, middle) == ([0, 255, 255], [255, 255, 255])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_blind_set_shows_black_pictures(tmp_path, streaming):
    """In questions and documents, in squares of any kind; a picture that is not there is a fault all the same."""
    plan, given = Fixed(size=4, fit="pad_mean"), data(tmp_path, RECORDS, blind=True, streaming=streaming)
    if streaming:
        batch = Streamed(Stream(given), encoder(), plan=plan).take(4)
    else:
        batch = Conversations([Records(given)], encoder(), plan=plan).batch(torch.arange(4))
    assert batch["image_rows"].shape == (5,)
    assert not batch["pictures"].any()
    (tmp_path / "2.png").unlink()
    opened = (lambda: list(Stream(given))) if streaming else (lambda: Conversations([Records(given)], encoder(), plan=plan))
    with pytest.raises(ValueError, match=r"2\.png does not exist"):
        opened()


def test_a_blind_part_of_a_mixture_leaves_the_others_their_pictures(tmp_path):
    seeing = data(tmp_path, [said("<image>q", "a", 2)])
    source = Conversations([Records(seeing), Records(replace(seeing, blind=True))], encoder(), plan=4)
    assert source.picture_count == 2
    batch = source.batch(torch.tensor([0, 1]))
    assert batch["pictures"][batch["image_rows"]][:, 0, 0, 0].tolist() == [100, 0]


def test_captions_come_first_in_a_share_of_pairs(tmp_path):
    """Documents, all of them learnt, drawn once a record; whatever is no pair stays what it is."""
    pairs = [{"image": f"{i % 4}.png", "caption": f"C{i}."} for i in range(400)]
    others = [said("<image>q", "a", 1), {"text": "t<image>", "image": "1.png"}, said("q", "a")]
    given = data(tmp_path, [*pairs, *others])
    half, none, all_of_them = (Records(replace(given, captions_first=share)) for share in (0.5, 0.0, 1.0))
    texts = [half[i].document for i in range(400)]
    assert texts == [half[i].document for i in range(400)]
    assert all(text in (f"<image>C{i}.", f"C{i}.<image>") for i, text in enumerate(texts))
    assert 160 < sum(text.endswith("<image>") for text in texts) < 240
    assert [none[i].document for i in (0, 1)] == ["<image>C0.", "<image>C1."]
    assert [all_of_them[i].document for i in (0, 1)] == ["C0.<image>", "C1.<image>"]
    assert [half[400 + i] for i in range(3)] == [Records(given)[400 + i] for i in range(3)]
    assert Records(given)[0].turns == (("<image>", "C0."),)
    assert Records(replace(given, captions_first=1.0, clean=True))[7].document == "c7<image>"
    with pytest.raises(ValueError, match="has a picture in an answer, and clean is for captions"):
        Records(data(tmp_path, [said("draw", "<image>", 1)], clean=True)).parse(0)
    source = Conversations([all_of_them], drawing_encoder(), plan=5)
    batch = source.batch(torch.tensor([2]))
    ids = [1, ord("C"), ord("2"), ord("."), BEGIN, IMAGE, IMAGE, END, 2]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [[-100, *ids[1:]]]
    assert batch["pictures"][0, 0, 0, 0] == 100


def test_one_of_several_captions_comes_first_too(tmp_path):
    """Every caption of such a record makes a document, all with the picture on the same side."""
    given = data(tmp_path, [{"image": "1.png", "captions": ["A.", "BB."]}, {"image": "2.png", "caption": "C"}], clean=True)
    for share, first, second in ((1.0, "a@", "bb@"), (0.0, "@a", "@bb")):
        spec = replace(given, captions_first=share)
        source = Conversations([Records(spec)], drawing_encoder(), plan=5)
        picture = "".join(map(chr, (BEGIN, IMAGE, IMAGE, END)))
        told = [[1, *(ord(c) for c in words.replace("@", picture)), 2] for words in (first, second)]
        assert [source.encoded(item, "answer")[0] for item in (0, 2)] == told
        assert source.encoded(0, "answer")[1] == [-100, *told[0][1:]]
        assert source.tellings == [2, 1]
        streamed = Streamed(Stream(replace(spec, streaming=True)), drawing_encoder(), plan=5)
        rows = [streamed.take(2)["input_ids"][0].tolist() for _ in range(12)]
        assert {tuple(t for t in row if t) for row in rows} == set(map(tuple, told))


# --------------------------------------------------------------------------------------------------- several captions, one picture

SEVERAL = [
    {"image": "0.png", "captions": ["a", "bb", "ccc"]},
    {"image": "1.png", "caption": "dddd"},
    {"image": "2.png", "captions": ["e", "ff"]},
]


def told(source, index):
    return [text(row) for row in source.batch(torch.tensor(index))["input_ids"].tolist()]


def test_one_of_several_captions_is_drawn(tmp_path):
    """An item is a picture; which caption stands beside it is a function of (seed, epoch, place), and every one of them comes."""
    sources = [Conversations([Records(data(tmp_path, SEVERAL))], encoder(), plan=4, seed=seed) for seed in (0, 0, 1)]
    source = sources[0]
    assert (len(source), source.picture_count) == (3, 3)
    assert told(source, [0, 1, 2, 3, 5, 6]) == ["^@@a$", "^@@dddd$", "^@@e$", "^@@bb$", "^@@ff$", "^@@ccc$"]
    epochs = [source.permutation(epoch) for epoch in range(40)]
    assert all(sorted((order % 3).tolist()) == [0, 1, 2] for order in epochs)
    assert {int(i) for order in epochs for i in order} == {0, 1, 2, 3, 5, 6}
    counts = torch.cat(epochs).bincount(minlength=7).tolist()
    assert counts[1] == 40
    assert all(6 <= counts[i] <= 21 for i in (0, 3, 6))  # thirteen of each expected
    assert torch.equal(sources[1].permutation(7), source.permutation(7))
    alone = Conversations([Records(data(tmp_path, SEVERAL[:1]))], encoder(), plan=4)
    assert {int(alone.permutation(epoch)) for epoch in range(20)} == {0, 1, 2}
    assert any(not torch.equal(sources[2].permutation(e), source.permutation(e)) for e in range(3))
    batch = source.batch(torch.tensor([6, 2]))
    assert shown(batch) == [0, 2]
    assert batch["counts"].tolist() == [4 + 2]


def test_a_record_that_a_mixture_draws_twice_may_say_something_else(tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    one = [{"image": "0.png", "captions": ["a", "b" * 46]}]
    parts = [Records(data(many, RECORDS * 10, weight=1.0, loss=1.0)), Records(data(tmp_path, one, weight=3.0, loss=1.0))]
    source = Conversations(parts, encoder(), plan=4)
    order = source.permutation(0)
    of_last = order[order % 41 == 40]
    assert len(of_last) == 31  # three quarters of 41, to the nearest
    assert set((of_last // 41).tolist()) == {0, 1}
    assert source.batch(torch.tensor([40 + 41, 3, 40]))["groups"].tolist() == [1, 0, 1]
    # Tokens of a record, ^, $ and two places a picture among them: 27.5 in the mean of both captions, 8.5 of the others.
    assert [len(source.encoded(i, "answer")[0]) for i in (40, 40 + 41, 0, 1, 2, 3)] == [5, 50, 10, 8, 8, 8]
    share = 41 * (3 / 27.5) / (3 / 27.5 + 1 / 8.5)
    order = Conversations(parts, encoder(), plan=4, by_tokens=True).permutation(0)
    assert abs(int((order % 41 == 40).sum()) - share) <= 0.5


def test_captions_beyond_what_is_kept_are_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfast.data.sources.KEEP_TOKENS", 0)
    source = Conversations([Records(data(tmp_path, SEVERAL))], encoder(), plan=4)
    assert told(source, [0, 3, 6, 5]) == ["^@@a$", "^@@bb$", "^@@ccc$", "^@@ff$"]


def test_pictures_of_one_id_are_one(tmp_path):
    """``image_id`` or the file itself; ids of two sets have nothing to do with each other; each record shows its own file."""
    other = tmp_path / "other"
    other.mkdir()
    rows = [{"image": f"{i}.png", "caption": "x", **more} for i, more in enumerate([{"image_id": 5}, {}, {"image_id": 5}])]
    rows += [{"image": "1.png", "caption": "y"}]
    spec = data(tmp_path, rows)
    parts = [Records(spec), Records(data(other, [{"image": "3.png", "caption": "x", "image_id": 5}]))]
    batch = Conversations(parts, encoder(), plan=4).batch(torch.tensor([0, 1, 2, 3, 4]))
    keys = batch["keys"].tolist()
    assert keys[0] == keys[2]
    assert keys[1] == keys[3]
    assert len(set(keys)) == 3
    assert shown(batch) == [0, 1, 2, 1, 3]
    pytest.importorskip("datasets")
    stream = [Streamed(Stream(spec), encoder(), plan=4).take(4, rank, 2)["keys"].tolist() for rank in range(2)]
    assert stream[0][0] == stream[0][1] != stream[1][0] == stream[1][1]  # records 0 and 2, 1 and 3


def test_videos_as_pictures_of_several_frames(tmp_path):
    """A picture is shown once a batch, and a frame loaded once a set, whichever video or picture it is in; from a file and streamed."""
    row = {
        "messages": [{"role": "user", "content": "<video>and<image>"}, {"role": "assistant", "content": "x"}],
        "video": ["1.png", "2.png"],
    }
    rows = [{**row, "images": ["2.png"]}, said("<image>q", "yy", 3), {**row, "images": ["0.png"]}]
    source = Conversations([Records(data(tmp_path, rows, frames=3), clips=True)], encoder(), plan=5)
    assert source.picture_count == 4
    batch = source.batch(torch.arange(3))
    assert batch["frames"].tolist() == [3, 1, 1, 1]
    assert batch["image_rows"].tolist() == [0, 1, 2, 0, 3]
    assert batch["pictures"][:, 0, 0, 0].tolist() == [50, 50, 100, 100, 150, 0]
    assert torch.equal(source.load_pictures(batch["picture_ids"]), batch["pictures"])
    assert [text(ids[ids != 0].tolist()) for ids in batch["input_ids"]] == ["^@@and@@x$", "^@@qyy$", "^@@and@@x$"]
    assert len(batch["keys"]) == 5
    assert batch["keys"][0] == batch["keys"][3]
    assert "frames" not in source.batch(torch.tensor([1]))
    (_, ids, frames, pictures), *_ = source.prompts(1)
    assert (frames, pictures[:, 0, 0, 0].tolist(), ids.count(IMAGE)) == ([3, 1], [50, 50, 100, 100], 4)
    taken = Streamed(Stream(Data("mine", path=str(tmp_path / "data.jsonl"), frames=3), clips=True), encoder(), plan=5).take(2)
    assert taken["frames"].tolist() == [3, 1, 1]
    assert taken["image_rows"].tolist() == [0, 1, 2]
    assert taken["pictures"][:, 0, 0, 0].tolist() == [50, 50, 100, 100, 150]
    dark = Conversations([Records(data(tmp_path, rows, frames=3, blind=True), clips=True)], encoder(), plan=5).batch(torch.arange(3))
    assert dark["frames"].tolist() == [3, 1, 1, 1]
    assert not dark["pictures"].any()
    plain = Conversations([Records(data(tmp_path, rows, frames=3))], encoder(), plan=5).batch(torch.tensor([0]))
    assert text(plain["input_ids"][0].tolist()) == "^@@@@@@and@@x$"
    assert "frames" not in plain
