"""Records that speak of places: GRIT's captions and boxes in any record, moved as the picture is, in a system's words; pictures between tags."""

import base64
import io
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmfast import spec
from mmfast.data import chat, regions, sources, supervised
from mmfast.data.formats import parse
from mmfast.data.records import Records, Stream, check
from mmfast.data.regions import KOSMOS2, MINIGPT_V2, QWEN_VL, REGION, SHIKRA, write
from mmfast.data.sources import Conversations
from mmfast.data.synthetic import World
from mmfast.models.tokenizer import tagged_text, word_tokenizer

SNOWMAN = "An image of a snowman warming himself by a fire."
BOXES = [[0.39, 0.05, 0.98, 0.82], [0.17, 0.02, 0.48, 0.88]]
GRIT = {"image": "a.png", "caption": SNOWMAN, "noun_chunks": [[12, 21, *BOXES[0], 0.9], [41, 47, *BOXES[1], 0.8]], "ref_exps": []}
TAGS = spec.BoxTokens(bins=32).tokens


def grit(**changes):
    return parse({**GRIT, **changes}, 0, root="/x")


def test_grit_becomes_marks_and_shares():
    record = grit()
    text = f"<grounding> An image of <phrase>a snowman</phrase>{REGION} warming himself by <phrase>a fire</phrase>{REGION}."
    assert record.turns == (("<image>", text),)
    assert record.boxes == tuple((tuple(box),) for box in BOXES)
    assert record.shares


def test_the_published_example():
    """The snowman's string, but for the blank that Kosmos-2's tokenizer moves into the phrase; read back it is the published reading."""
    text = write(grit().turns[0][1], [[tuple(b)] for b in BOXES], KOSMOS2, (1, 1))
    assert text == (
        "<grounding> An image of <phrase>a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming himself by "
        "<phrase>a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
    )
    reading = KOSMOS2.read(text.replace("<grounding> ", "<grounding>"), (1, 1))
    assert reading.text == SNOWMAN
    assert [(r.phrase, (r.start, r.end), r.boxes) for r in reading.regions] == [
        ("a snowman", (12, 21), ((0.390625, 0.046875, 0.984375, 0.828125),)),
        ("a fire", (41, 47), ((0.171875, 0.015625, 0.484375, 0.890625),)),
    ]


def test_what_the_released_code_leaves_out():
    low = grit(noun_chunks=[[12, 21, *BOXES[0], 0.6499], [41, 47, *BOXES[1], 0.65]])
    assert low.turns[0][1].count(REGION) == 1
    assert "<phrase>a fire</phrase>" in low.turns[0][1]
    # Expressions come before noun chunks, and one inside another is left out; several boxes of one span stay together.
    nested = grit(ref_exps=[[12, 47, *BOXES[0], 0.9], [41, 47, *BOXES[1], 0.9], [12, 47, *BOXES[1], 0.7]])
    assert nested.turns[0][1] == f"<grounding> An image of <phrase>a snowman warming himself by a fire</phrase>{REGION}."
    assert nested.boxes == ((tuple(BOXES[0]), tuple(BOXES[1])),)
    joined = write(nested.turns[0][1], nested.boxes, KOSMOS2, (1, 1))
    assert "<patch_index_0863></delimiter_of_multi_objects/><patch_index_0005>" in joined
    assert grit(noun_chunks=[[12, 21, *BOXES[0], 0.1]]).turns == (("<image>", SNOWMAN),)


def test_half_of_the_captions_tell_places():
    told = [bool(parse(GRIT, i, root="/x", boxes=0.5).boxes) for i in range(400)]
    assert 160 < sum(told) < 240
    assert told == [bool(parse(GRIT, i, root="/x", boxes=0.5).boxes) for i in range(400)]
    plain = parse(GRIT, told.index(False), root="/x", boxes=0.5)
    assert plain.turns == (("<image>", SNOWMAN),)


def places(**changes):
    row = {
        "image": "a.png",
        "question": "Where is <phrase>the cat</phrase>?",
        "answer": f"There{REGION}, beside <phrase>two dogs</phrase>{REGION}.",
        "boxes": [[10, 20, 30, 40], [[0, 0, 5, 5], [50, 50, 64, 64]]],
    }
    return {k: v for k, v in {**row, **changes}.items() if v is not None}


def test_any_record_may_speak_of_places():
    record = parse(places(), 3, root="/x")
    assert record.boxes == (((10.0, 20.0, 30.0, 40.0),), ((0.0, 0.0, 5.0, 5.0), (50.0, 50.0, 64.0, 64.0)))
    assert not record.shares
    answer = record.turns[0][1]
    size = (100, 100)
    assert (
        write(answer, record.boxes, SHIKRA, size)
        == "There[0.100,0.200,0.300,0.400], beside two dogs[0.000,0.000,0.050,0.050;0.500,0.500,0.640,0.640]."
    )
    assert write(answer, record.boxes, QWEN_VL, size).startswith(
        "There<box>(100,200),(300,400)</box>, beside <ref>two dogs</ref><box>(0,0)"
    )
    assert "<p>two dogs</p> {<0><0><5><5>}<delim>{<50><50><64><64>}" in write(answer, record.boxes, MINIGPT_V2, size)
    # The asked phrase is tagged where the system has tags.
    assert write(record.turns[0][0], [], KOSMOS2, size) == "<image>\nWhere is <phrase>the cat</phrase>?"
    assert write(record.turns[0][0], [], SHIKRA, size) == "<image>\nWhere is the cat?"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (places(boxes=None), r'has 2 <region> places but no "boxes" \(pixels\) and no "box_shares"'),
        (places(boxes=[[1, 2, 3, 4]]), "2 <region> places but 1 boxes"),
        (places(boxes=[[1, 2, 3], [1, 2, 3, 4]]), r"boxes\[0\] is \[1, 2, 3\], expected \[x1, y1, x2, y2\] or several"),
        (places(boxes=[[9, 2, 3, 4], [1, 2, 3, 4]]), r"boxes\[0\] is \[9, 2, 3, 4\]: its second corner is left of or above its first"),
        (places(boxes=[[], [1, 2, 3, 4]]), r"boxes\[0\] is an empty list"),
        (places(box_shares=[[0, 0, 1, 1]] * 2), 'has both "boxes" and "box_shares"'),
        (places(image=None, images=["a.png", "b.png"]), 'are places in one picture, and the record has 2'),
        ({**GRIT, "noun_chunks": [[12, 21, 0, 0, 1, 1]]}, r"noun_chunks\[0\] is .*, expected \[start, end, x1, y1, x2, y2, score\]"),
        ({**GRIT, "noun_chunks": [[40, 99, 0, 0, 1, 1, 1]]}, r"noun_chunks\[0\] is the span 40 .. 99 of a caption of 48 characters"),
    ],
)  # fmt: skip
def test_faults_are_told(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(row, 0, root="/x")


def encoder(plan, form=KOSMOS2, **more):
    words = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *dict.fromkeys(f"{SNOWMAN} There beside two dogs , Where is the cat ?".split()))
    tok = word_tokenizer((*words, "snowman", "fire", "."), ("</image>", *TAGS))
    borders = tuple(tok.convert_tokens_to_ids(["<image>", "</image>"]))
    return chat.Encoder(tok, "bare", 3, len(tok), 0, borders=borders, regions=form, plan=plan, **more)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_boxes_move_with_the_picture(fit, tmp_path):
    """A picture twice as wide as high with one bright block; where the block lies in what the tower sees is where the tokens say it is."""
    block, size = (70, 20, 110, 60), (200, 100)
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), block)
    picture.save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Where is the cat ?", "answer": f"There {REGION}", "boxes": [list(block)]}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    encode = encoder(spec.Fixed(size=64, fit=fit))
    source = Conversations([Records(spec.Data("d", path=str(tmp_path / "d.json")))], encode, plan=encode.plan)
    batch = source.batch(torch.tensor([0]))
    found = KOSMOS2.parse(tagged_text(encode.tokenizer, [i for i in batch["input_ids"][0].tolist() if i != encode.image_token]), (64, 64))
    bright = batch["pictures"][0].float().mean(-1) > 128
    rows, columns = (bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten())
    seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert len(found) == 1
    assert found[0].boxes[0] == pytest.approx([float(v) for v in seen], abs=2.1)


def test_what_the_crop_cuts_off_is_not_told(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "x", "answer": None}
    row = {"image": "a.png", "question": "Where is <phrase>the cat</phrase> ?", "answer": f"There beside <phrase>two dogs</phrase>{REGION} .",
           "boxes": [[[0, 0, 40, 40], [90, 40, 110, 60]]]}  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps([row, {**row, "boxes": [[0, 0, 40, 40]]}]))
    encode = encoder(spec.Fixed(size=64))
    records = Records(spec.Data("d", path=str(tmp_path / "d.json")))
    texts = [tagged_text(encode.tokenizer, encode.record(records.parse(i))[0]) for i in range(2)]
    assert texts[0].count("<object>") == 1
    assert "delimiter" not in texts[0]
    assert texts[1].endswith("There beside two dogs.")


def test_a_system_without_places_says_so(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    record = parse({**GRIT, "image": str(tmp_path / "a.png")}, 0, root="/x")
    with pytest.raises(ValueError, match=r"speaks of places in its picture, and this system does not; set regions, or data.boxes to 0"):
        encoder(spec.Fixed(size=64), form=None).record(record)
    plain = parse({**GRIT, "image": "a.png"}, 0, root="/x", boxes=0.0)
    assert encoder(spec.Fixed(size=64), form=None).record(plain)[1].count(chat.IGNORE) == 6


# ---------------------------------------------------------------------------------------------------------- pictures between tags


def test_67_positions_are_not_text():
    """<s>, <image>, 64 places and </image>; the first thing that is scored is the first word, the last the end token."""
    tok = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "cat"), ("</image>", *TAGS))
    system = spec.System("k", connector=spec.AttentionPool(), fusion=spec.Prefix("<image>", "</image>"))
    assert (system.image_places, system.borders, system.added_tokens) == (64, ("<image>", "</image>"), ("</image>",))
    borders = tuple(tok.convert_tokens_to_ids(list(system.borders)))
    encode = chat.Encoder(tok, "bare", system.image_places, len(tok), 0, borders=borders)
    ids, labels = encode([("<image>", "a cat")])
    assert len(ids) - 3 == 67
    assert labels == [chat.IGNORE] * 67 + [5, 6, 2]
    assert ids[:2] == [1, 4]
    assert ids[66] == tok.convert_tokens_to_ids("</image>")


def test_a_document_announces_its_pictures():
    tok = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "cat"), ("</image>",))
    encode = chat.Encoder(tok, "bare", 2, 99, 0, borders=(4, 7))
    items = [{"image": "x.png"}, {"text": "a"}, {"image": "y.png"}, {"text": "cat"}]
    record = parse({"items": items}, 0, root="/x")
    ids, labels = encode.record(record)
    assert ids == [1, 4, 99, 99, 7, 5, 4, 99, 99, 7, 6, 2]
    no = chat.IGNORE
    assert labels == [no, no, no, no, no, 5, 4, no, no, no, 6, 2]
    # A picture that the cut would tear goes whole, tags and all; so does one that would lose its last tag.
    for length in (7, 8, 9):
        cut = chat.Encoder(tok, "bare", 2, 99, 0, length, (4, 7))
        assert cut.record(record)[0] == [1, 4, 99, 99, 7, 5]


def test_the_world_with_places():
    world = World()
    form, side = regions.kosmos2(16), world.config.pixels
    tok = word_tokenizer(world.vocabulary, ("</image>", *spec.BoxTokens(16).tokens))
    encode = chat.Encoder(
        tok, "bare", 2, len(tok), 0, borders=(4, tok.convert_tokens_to_ids("</image>")), regions=form, plan=spec.Fixed(size=side)
    )
    source = supervised.Grounded(world, encode, count=40)
    assert not (source.columns[0].ids == tok.unk_token_id).any()
    for i, scene in enumerate(source.scenes):
        caption, asked = (
            form.read(tagged_text(tok, [t for t in column.ids[i].tolist() if t != encode.image_token]), (side, side))
            for column in source.columns
        )
        assert not caption.faults + asked.faults
        if i % 2 == 0:
            assert caption.text == world.caption(scene).text
            assert [caption.text[r.start : r.end] for r in caption.regions] == [r.phrase for r in caption.regions]
        for reading in (caption, asked) if i % 2 == 0 else (asked,):
            boxes = sorted(box for region in reading.regions for box in region.boxes)
            true = sorted(form.parse(form.encode(o.box, (side, side)), (side, side))[0].boxes[0] for o in scene.objects)
            assert boxes == true
    labels = source.columns[1].labels[0]
    told = tok.convert_ids_to_tokens(labels[labels != chat.IGNORE].tolist())
    assert set(told) - {"<object>", "</object>", "</delimiter_of_multi_objects/>", "<eos>"} <= set(spec.BoxTokens(16).tokens[6:])


def test_mixtures_of_built_in_sets():
    world, tok = World(), word_tokenizer((*World().vocabulary, *supervised.WORDS))
    encode = chat.Encoder(tok, "bare", 2, 4, 0)
    makers = (lambda: supervised.shapes_text(world, encode, 30), lambda: supervised.shapes_episodes(world, encode, 20))
    parts = [make() for make in makers]
    mixed = supervised.mixture(parts, [3.0, 1.0], 0)
    assert len(mixed) == 50
    order = mixed.permutation(0)
    assert (order < 30).sum() == 38  # three quarters of 50, to the nearest
    batch, alone = mixed.batch(torch.tensor([3, 34])), parts[1].batch(torch.tensor([4]))
    width = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][1, :width], alone["input_ids"][0])
    assert torch.equal(batch["pictures"][batch["image_rows"]], alone["pictures"][alone["image_rows"]])


def texts_file(folder, texts, name="t"):
    (folder / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]))
    return str(folder / f"{name}.json")


def test_texts_fill_whole_rows(tmp_path, monkeypatch):
    """Documents end to end, each begun and ended, cut wherever a row is full: nothing lost, nothing doubled."""
    tok = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "b", "c"))
    encode = chat.Encoder(tok, "bare", 2, 4, 0, 5)
    path = texts_file(tmp_path, ["a b c", "c", "b b", "a"])
    source = Conversations([Records(spec.Data("t", path=path, full=True))], encode, plan=64)
    batch = source.batch(torch.arange(len(source)))
    stream = [1, 5, 6, 7, 2, 1, 7, 2, 1, 6, 6, 2, 1, 5, 2]
    assert batch["input_ids"].tolist() == [stream[i : i + 5] for i in (0, 5, 10)]
    assert batch["labels"].flatten().tolist() == [chat.IGNORE if t == 1 else t for t in stream]
    assert source.prompts(4) == []
    # A text that is longer than rows are fills as many as it takes, also where encodings are not kept.
    long = ["a b c b a " * 3, "c", "b " * 9]
    uncut = [token for text in long for token in chat.encode_document(tok, text, image_tokens=2, image_token=4)[0]]
    path = texts_file(tmp_path, long, "long")
    for most in (None, 0):
        if most is not None:
            monkeypatch.setattr(sources, "KEEP_TOKENS", most)
        source = Conversations([Records(spec.Data("t", path=path, full=True)), Records(spec.Data("u", path=path))], encode, plan=64)
        told = [source.encoded(i, "answer") for i in range(len(source))]
        rows = [ids for ids, _ in told[: source.sizes[0]]]
        assert [token for row in rows for token in row] == uncut
        assert [len(row) for row in rows] == [5] * 6 + [1]
        assert all(labels == [chat.IGNORE if i == 1 else i for i in ids] for ids, labels in told)
        assert [ids for ids, _ in told[source.sizes[0] :]] == [[1, 5, 6, 7, 6], [1, 7, 2], [1, 6, 6, 6, 6]], "texts of other sets are cut"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "i.json").write_text(json.dumps([{"items": [{"text": "a"}, {"image": "a.png"}]}]))
    with pytest.raises(ValueError, match=r"record #0 has a picture, and data.full lays texts alone end to end"):
        Conversations([Records(spec.Data("t", path=str(tmp_path / "i.json"), full=True))], encode, plan=64)


def test_a_mixture_by_tokens(tmp_path):
    """Texts of 4 and of 10 tokens, equal shares of tokens: the short ones are drawn two and a half times as often."""
    tok = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a"))
    encode = chat.Encoder(tok, "bare", 2, 4, 0)
    paths = [texts_file(tmp_path, [" ".join("a" * n)] * 70, f"t{n}") for n in (2, 8)]
    parts = [Records(spec.Data(f"t{i}", path=path, weight=1.0)) for i, path in enumerate(paths)]
    by_items, by_tokens = (Conversations(parts, encode, plan=64, by_tokens=flag) for flag in (False, True))
    assert (by_items.permutation(0) < 70).sum() == 70
    order = by_tokens.permutation(0)
    assert (order < 70).sum() == 100
    drawn = [sum(len(by_tokens.encoded(int(i), "answer")[0]) for i in order if (i < 70) == first) for first in (True, False)]
    assert drawn == [400, 400]


# ------------------------------------------------------------------------------------------------------------- GRIT's tables


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(buffer, "png")
    return buffer.getvalue()


def grit_line(name, size=(300, 200), spans="{'phrase': [(12, 21, 0.39, 0.05, 0.98, 0.82, 0.9)], 'expression_v1': []}"):
    return "\t".join([name, SNOWMAN, base64.b64encode(png(size)).decode(), *map(str, size), spans])


def test_grits_table_has_no_names(tmp_path):
    """Hash, caption, JPEG in base64, width, height, and a Python dict: with tuples and single quotes, so no JSON."""
    nested = "{'phrase': [[41, 47, 0, 0, 1, 1, 0.9]], 'expression_v1': [[12, 47, 0.25, 0.25, 0.5, 0.5, 0.9]]}"
    lines = [
        grit_line("h0"),
        grit_line("h1", spans=nested),
        grit_line("h2", spans="{'phrase': []}"),
        grit_line("h3", spans="__import__('os')"),
    ]
    (tmp_path / "00000.tsv").write_text("\n".join([*lines, "h4\tno picture"]) + "\n")
    records = Records(spec.Data("grit", path=str(tmp_path / "00000.tsv"), boxes=1.0))
    assert len(records) == 5
    assert [r.id for r in (records[0], records[1], records[2])] == ["h0", "h1", "h2"]
    assert [r.turns[0][1] for r in (records[0], records[1], records[2])] == [
        f"<grounding> An image of <phrase>a snowman</phrase>{REGION} warming himself by a fire.",
        f"<grounding> An image of <phrase>a snowman warming himself by a fire</phrase>{REGION}.",
        SNOWMAN,
    ]
    assert records[0].boxes == (((0.39, 0.05, 0.98, 0.82),),)
    assert records[0].shares
    assert records[0].pictures[0].source == png((300, 200))
    for number, why in ((3, "line 4 of 00000.tsv has the spans \"__import__\\('os'\\)\", expected a dict"),
                        (4, "line 5 of 00000.tsv has 2 fields, expected six: hash, caption, picture")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            records[number]
    pytest.importorskip("datasets")
    stream = Stream(spec.Data("grit", path=str(tmp_path / "00000.tsv"), boxes=1.0, on_bad_record="skip"), say=lambda _: None)
    assert list(stream) == [records[0], records[1], records[2]]
    assert stream.left_out == 2


def test_small_pictures_are_left_out_and_told(tmp_path):
    """LAION's filter: whatever becomes of faults, and by the shorter side as the picture's own bytes have it."""
    sizes = [(300, 200), (300, 199), (200, 200), (150, 400)]
    (tmp_path / "g.tsv").write_text("\n".join(grit_line(f"h{i}", size) for i, size in enumerate(sizes)))
    heard, data = [], spec.Data("grit", path=str(tmp_path / "g.tsv"), min_side=200)
    assert check(Records(data), None, on_bad_record="fail", say=heard.append) == [0, 2]
    assert heard == [
        f"{data.path}: left out 2 of 4 records:\n  record 1 (h1): a picture has 300 x 199 pixels, and data.min_side is 200\n"
        "  record 3 (h3): a picture has 150 x 400 pixels, and data.min_side is 200"
    ]
    assert check(Records(replace(data, min_side=0)), None, on_bad_record="fail") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="left out 4 of 4 records"):
        check(Records(replace(data, min_side=500)), None, on_bad_record="fail")
    broken = grit_line("h4").replace(base64.b64encode(png((300, 200))).decode(), "%%%")
    (tmp_path / "g.tsv").write_text("\n".join([grit_line("h0"), grit_line("h1", (9, 9)), broken]))
    with pytest.raises(ValueError, match="1 of 3 records are faulty"):
        check(Records(data), None, on_bad_record="fail")
    pytest.importorskip("datasets")
    heard.clear()
    stream = Stream(data, say=heard.append, open_pictures=False)
    with pytest.raises(ValueError, match="record 2: image 0 is a data: URL that cannot be read"):
        list(stream)
    assert heard[0].endswith("record 1: a picture has 9 x 9 pixels, and data.min_side is 200")


# ------------------------------------------------------------------------------------------------------ grounded instructions


def test_six_templates_of_grounded_instructions():
    """Kosmos-2's, letter by letter, with the released code's tags; each is drawn about as often, once for a record."""
    a = [parse(GRIT, i, root="/x", boxes=0.1, instruct=1.0) for i in range(1200)]
    said = Counter((question, answer.replace("a snowman", "X").replace("a fire", "X")) for ((question, answer),) in (r.turns for r in a))
    front, place = "<image><grounding>", REGION
    assert set(said) == {
        (f"{front} What is <phrase>it</phrase>{place}?", "It is X."),
        (f"{front} What is <phrase>this</phrase>{place}?", "This is X."),
        (f"{front} Describe <phrase>this object</phrase>{place}.", "This object is X."),
        (f"{front}<phrase>It</phrase>{place} is", "X."),
        (f"{front}<phrase>This</phrase>{place} is", "X."),
        (f"{front}<phrase>The object</phrase>{place} is", "X."),
    }
    assert all(150 < count < 250 for count in said.values())
    of = Counter("snowman" in r.turns[0][1] for r in a)
    assert 500 < of[True] < 700
    for record in a[:50]:  # the place is that of the expression
        assert record.boxes == ((tuple(BOXES[0 if "snowman" in record.turns[0][1] else 1]),),)
        assert record.shares
    assert a == [parse(GRIT, i, root="/x", boxes=0.1, instruct=1.0) for i in range(1200)]
    question, answer = next(
        r.turns[0] for r in a if r.turns[0][0].endswith(" is") and "It<" in r.turns[0][0] and "snowman" in r.turns[0][1]
    )
    written = write(question, [[tuple(BOXES[0])]], KOSMOS2, (1, 1))
    assert written == "<image><grounding><phrase>It</phrase><object><patch_index_0044><patch_index_0863></object> is"
    assert answer == "a snowman."


def test_what_is_not_asked_stays_a_caption():
    rows = [parse(GRIT, i, root="/x", boxes=1.0, instruct=0.25) for i in range(800)]
    asked = [r for r in rows if r.turns[0][0] != "<image>"]
    assert 150 < len(asked) < 250
    assert all(r.turns[0][1].startswith("<grounding> An image of <phrase>") for r in rows if r.turns[0][0] == "<image>")
    # Without places there is nothing to ask; told of none, nothing is asked.
    assert grit(noun_chunks=[]).turns == parse({**GRIT, "noun_chunks": []}, 0, root="/x", instruct=1.0).turns == (("<image>", SNOWMAN),)
    assert parse(GRIT, 0, root="/x", boxes=0.0, instruct=1.0).turns == (("<image>", SNOWMAN),)
