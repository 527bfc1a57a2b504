"""Places and found pictures of a user's records: answers put in a model's mouth, and ranks counted from single pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmfast.trainers import config, records, runs, supervised
from mmfast.trainers.captions import recall
from mmfast.trainers.checkpoint import RunError
from mmfast.trainers.session import Session
from PIL import Image
from torch.nn import functional as F

from mmfast.data import regions
from mmfast.eval import grounding
from mmfast.models import tiny
from mmfast.spec import Data

# ------------------------------------------------------------------------------------------------------------------ places

KOSMOS_2 = tiny(config.load_recipe("kosmos_2"))
BOX, OTHER = [60, 10, 140, 90], [110, 50, 150, 100]
ASKED = {"image": "a.png", "question": "<grounding><phrase>a red circle</phrase>", "answer": "<region>"}


def session_of(fit):
    return Session(replace(KOSMOS_2, stages=(), image=replace(KOSMOS_2.image, fit=fit)), seed=0)


def source_of(session, folder, rows):
    Image.fromarray(np.full((100, 200, 3), 90, np.uint8)).save(folder / "a.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return session.source(Data("mine", path=str(folder / "data.jsonl"), boxes=1.0), "bare")


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_places_are_told_in_the_pictures_file(fit, tmp_path, monkeypatch):
    """A wide picture; an answer is read in what the model sees of it, and compared where the record's boxes are."""
    session = session_of(fit)
    rows = [
        {**ASKED, "boxes": [BOX]},
        {**ASKED, "boxes": [BOX]},
        {**ASKED, "boxes": [BOX]},
        {**ASKED, "boxes": [[OTHER, BOX]]},
        {**ASKED, "box_shares": [[0.3, 0.1, 0.7, 0.9]]},
        {**ASKED, "answer": "<phrase>a red circle</phrase><region> and <phrase>a blue star</phrase><region>", "boxes": [BOX, OTHER]},
        {"image": "a.png", "caption": "<phrase>a red circle</phrase><region>", "boxes": [BOX]},
        {"image": "a.png", "question": "is there a red circle ?", "answer": "yes"},
    ]
    source = source_of(session, tmp_path, rows)
    form = regions.format_of(session.system.regions)
    # What the tower sees: the middle square, the whole squashed, or between margins.
    seen = {
        "crop": lambda x, y: ((x - 50) * 0.01, y * 0.01),
        "squash": lambda x, y: (x / 200, y / 100),
        "pad": lambda x, y: (x / 200, y / 200 + 0.25),
    }[fit]
    back = {
        "crop": lambda x, y: (x * 100 + 50, y * 100),
        "squash": lambda x, y: (x * 200, y * 100),
        "pad": lambda x, y: (x * 200, y * 200 - 50),
    }[fit]
    shares = [[*seen(*box[:2]), *seen(*box[2:])] for box in (BOX, OTHER)]
    right, wrong = (form.encode(box, (1, 1)) for box in shares)
    said = [right, "nothing", right + wrong, right + wrong, right, right + wrong, right, "yes ."]
    tokens = [session.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    monkeypatch.setattr(records, "generated", lambda *a, **k: tokens)
    measured, told = records.answered(session, source)

    x1, y1, x2, y2 = form.parse(right, (1, 1))[0].boxes[0]
    found = [*back(x1, y1), *back(x2, y2)]
    iou = grounding.iou(found, BOX)
    assert 0.6 < iou < 1, "a cell or two of the grid are lost, and no more"
    assert [row.get("iou") for row in told] == [pytest.approx(iou), 0, 0, pytest.approx(iou), pytest.approx(iou), None, None, None]
    assert told[0]["box"] == pytest.approx(found)
    assert [row.get("box") is None for row in told] == [False, True, True, False, False, True, True, True]
    assert measured == pytest.approx({
        "grounding_accuracy": 3 / 5, "grounding_mean_iou": 3 * iou / 5, "grounding_unread": 2 / 5, "grounding_questions": 5,
        "vqa_accuracy": 1.0, "vqa_questions": 1,
    })  # fmt: skip
    assert [row.get("vqa_accuracy") for row in told] == [None] * 7 + [1.0]


def test_places_are_told_in_questions_that_are_made_squares_otherwise(tmp_path):
    """Pictures in questions are padded, those in documents cropped: one box in either."""
    session = Session(replace(KOSMOS_2, stages=(), image=replace(KOSMOS_2.image, fit="crop", fit_asked="pad")), seed=0)
    rows = [{**ASKED, "boxes": [BOX]}, {"image": "a.png", "text": "<image><phrase>a red circle</phrase><region>", "boxes": [BOX]}]
    source = source_of(session, tmp_path, rows)
    form = regions.format_of(session.system.regions)
    shares = ([0.3, 0.3, 0.7, 0.7], [0.1, 0.1, 0.9, 0.9])  # y over 200 with a margin of 50, and x less 50 over 100
    for number, box in enumerate(shares):
        told = source.encoder.placed(source.parts[0].parse(number))
        text = told.document or told.turns[0][1]
        assert text.endswith(form.encode(box, (1, 1)))


def test_pictures_that_are_to_be_drawn_have_no_score(monkeypatch, tmp_path):
    recipe = tiny(config.load_recipe("chameleon"))
    session = Session(replace(recipe, stages=()), seed=0)
    rows = [
        {"image": "a.png", "question": "draw a red circle", "answer": "<image>"},
        {"image": "a.png", "question": "<image>is there a red circle ?", "answer": "yes"},
    ]
    source = source_of(session, tmp_path, rows)
    tokens = session.tokenizer("yes", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(records, "generated", lambda *a, **k: [tokens] * 2)
    measured, told = records.answered(session, source)
    assert measured == {"vqa_accuracy": 1.0, "vqa_questions": 1}
    assert [row.get("vqa_accuracy") for row in told] == [None, 1.0]


@pytest.mark.parametrize("choices", ["llava", "llama_adapter"])
def test_of_choices_the_letter_counts(choices, monkeypatch, tmp_path):
    """Whatever reason is given for it; a question beside them is scored as ever."""
    session = session_of("crop")
    row = {"image": "a.png", "question": "which ?", "choices": ["red", "blue"], "answer": 1, "lecture": "it is .", "solution": "yes ."}
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [row, {**row, "answer": 0}, row, {"image": "a.png", "question": "is there a circle ?", "answer": "yes"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = session.source(Data("mine", path=str(tmp_path / "a.json"), choices=choices), "bare", 128)
    said = iter(["no reason . The answer is B.", "The answer is (B)", "The answer is blue", "yes"])
    monkeypatch.setattr(records, "generated", lambda *a, **k: [[]] * 4)
    monkeypatch.setattr(records, "plain_text", lambda *a: next(said))
    measured, told = records.answered(session, source)
    assert measured == {"vqa_accuracy": 1.0, "vqa_questions": 1, "choice_accuracy": pytest.approx(1 / 3), "choice_questions": 3}
    assert [row.get("choice_accuracy") for row in told] == [1.0, 0.0, 0.0, None]


def test_a_model_from_nothing_tells_no_place(tmp_path):
    """All of it, decoded."""
    session = session_of("crop")
    source = source_of(session, tmp_path, [{**ASKED, "boxes": [BOX]}] * 3)
    measured, told = records.answered(session, source, max_new_tokens=6)
    assert measured["grounding_unread"] == 1
    assert measured["grounding_accuracy"] == 0
    assert len({row["said"] for row in told}) == 1


# ---------------------------------------------------------------------------------------------------------- found pictures

PICTURES, CAPTIONS = 7, 11


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Seven pictures, of which four have two captions; a record that is no caption is not among them."""
    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    words = [f"{colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in ("circle", "square", "star")]
    rows = [{"image": f"{i % PICTURES}.png", "caption": f"a {words[i]} ."} for i in range(CAPTIONS)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows[:5], {"text": "a red circle ."}, *rows[5:]])))
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, [row["caption"] for row in rows]


def counted(scores, name):
    """Recall in both directions of scores [texts, pictures], text i being of picture i % 7, by sorting."""
    told = {}
    for of, table, own in (
        ("image", scores, lambda i, j: j == i % PICTURES),
        ("text", scores.T, lambda i, j: j % PICTURES == i),
    ):
        first = [next(n for n, j in enumerate(row.argsort(descending=True).tolist()) if own(i, j)) for i, row in enumerate(table)]
        told |= {f"{name}{of}_retrieval/recall@{k}": sum(n < k for n in first) / len(first) for k in (1, 5, 10)}
        told[f"{name}{of}_retrieval/chance@1"] = CAPTIONS / (PICTURES * CAPTIONS)
    return told


def spread(model, names):
    """A model from nothing sees hardly a difference between two pictures; larger weights make ranks that rounding does not move."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(names) and p.ndim > 1:
                p.copy_(torch.randn_like(p) * 0.2)


@pytest.fixture(scope="module")
def fromage():
    recipe = tiny(config.load_recipe("fromage"))
    recipe = replace(recipe, stages=recipe.stages[-1:])
    session = Session(recipe, seed=0)
    spread(session.model, ("connector", "fusion", "encoder"))
    return session, recipe


def test_an_answer_ends_where_its_template_ends(pairs, fromage, monkeypatch):
    session, recipe = fromage
    end, asked = session.tokenizer.convert_tokens_to_ids("[RET]"), []
    monkeypatch.setattr(session.model, "generate", lambda ids, **more: asked.append(more["end"]) or torch.tensor([[9, 8, end]] * len(ids)))
    source = records.source_of(session, recipe, runs.to_measure(recipe, str(pairs[0] / "captions.jsonl"), None))
    assert records.generated(session, source, list(source.questions(range(3)))) == [[9, 8]] * 3
    assert asked == [end]


def piecemeal(monkeypatch, session):
    """Pictures whose states do not fit in memory at once: three at a time, and never all."""
    monkeypatch.setattr(supervised, "_STATE_BYTES", 0)
    monkeypatch.setattr(records, "SHOWN", 3)
    monkeypatch.setattr(type(session), "states_of", lambda *_: pytest.fail("the states of all pictures were made"))
    states = session.states
    monkeypatch.setattr(session, "states", lambda pictures: states(pictures) if len(pictures) <= 3 else pytest.fail("too many at a time"))


def test_fromage_finds_pictures(pairs, fromage, monkeypatch):
    session, recipe = fromage
    model = session.model.eval()
    folder, captions = pairs
    measured, said = records.measure(session, recipe, runs.to_measure(recipe, str(folder / "pairs.jsonl"), None))
    lm, fusion, rows = model.language, model.fusion, []
    pixels = session.pixels(torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))) for i in range(PICTURES)]))
    with torch.no_grad():
        pictures = F.normalize(fusion.visual_fc(model.encoder.vision(pixels).pooler_output), dim=-1)
        for caption in captions:
            ids = [session.tokenizer.bos_token_id, *session.tokenizer(f"{caption}[RET]", add_special_tokens=False)["input_ids"]]
            state = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            rows.append(pictures @ F.normalize(fusion.text_hidden_fcs[0][0](state), dim=-1))
    want = counted(torch.stack(rows), "")
    assert {k: v for k, v in measured.items() if "retrieval" in k} == pytest.approx(want)
    assert 0 < want["text_retrieval/recall@5"] < 1, "or it would not show an order"
    assert measured["loss"] > 0
    assert said == []
    piecemeal(monkeypatch, session)
    source = records.source_of(session, recipe, runs.to_measure(recipe, str(folder / "pairs.jsonl"), None))
    assert records.retrieved(session, source) == pytest.approx(want)


def test_a_q_former_finds_pictures_and_matches_the_best_anew(pairs, monkeypatch):
    recipe = config.load_recipe("blip2", tiny=True)
    recipe = replace(recipe, stages=tuple(stage for stage in recipe.stages if stage.objective != "lm"))
    assert records.compares(recipe)
    session = Session(recipe, seed=0)
    model, connector = session.model.eval(), session.model.connector
    spread(model, ("connector", "encoder"))
    folder, captions = pairs
    measured, _ = records.measure(session, recipe, runs.to_measure(recipe, str(folder / "captions.jsonl"), None))
    pixels = session.pixels(torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))) for i in range(PICTURES)]))
    cosines, matched = torch.empty(CAPTIONS, PICTURES), torch.empty(CAPTIONS, PICTURES)
    with torch.no_grad():
        images = connector.ln_vision(model.encode(pixels))
        for i, caption in enumerate(captions):
            text = torch.tensor([session.text_side(32).text(caption)])
            words = connector.text_proj(connector.qformer(text=text).text[0, 0])
            for j in range(PICTURES):
                seen = connector.qformer(connector.query_tokens, images[j : j + 1]).queries[0]
                cosines[i, j] = max(F.cosine_similarity(connector.vision_proj(query), words, dim=0) for query in seen)
                both = connector.qformer(connector.query_tokens, images[j : j + 1], text=text).queries
                matched[i, j] = connector.itm_head(both).mean(1)[0, 1]
    want = counted(cosines, "") | counted(cosines + matched, "reranked_")
    assert measured == pytest.approx(want)
    assert counted(cosines, "") != counted(cosines + matched, ""), "or it would not show that anything was ranked anew"
    piecemeal(monkeypatch, session)
    measured, _ = records.measure(session, recipe, runs.to_measure(recipe, str(folder / "captions.jsonl"), None))
    assert measured == pytest.approx(want)
    (folder / "one.jsonl").write_text(json.dumps({"image": "0.png", "caption": "a red circle ."}))
    with pytest.raises(RunError, match=r"one.jsonl: pictures are compared with captions, and there are not two records of one picture"):
        records.source_of(session, recipe, runs.to_measure(recipe, str(folder / "one.jsonl"), None))


def test_recall_where_several_belong_together():
    """By drawing orders of equals: a query with two right ones among four equals behind one that is better."""
    scores = torch.tensor([[9.0, 5, 5, 5, 5, 1], [1.0, 2, 3, 4, 5, 6], [0.0] * 6])
    own = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    told = recall(scores, at=(1, 2, 3, 4), own=own)
    want = {k: 0.0 for k in (1, 2, 3, 4)}
    for row, right in zip(scores, own, strict=True):
        for _ in range(2000):
            order = torch.randperm(6)
            order = order[row[order].argsort(descending=True, stable=True)]
            first = int(right[order].int().argmax())
            want = {k: v + (first < k) / 6000 for k, v in want.items()}
    assert [told[f"retrieval/recall@{k}"] for k in want] == pytest.approx(list(want.values()), abs=0.02)
    assert told["retrieval/recall@2"] == pytest.approx((1 / 2 + 1 + 1 - 3 / 6 * 2 / 5) / 3)
    assert told["retrieval/chance@1"] == pytest.approx((3 + 2 + 3) / 18)


def test_a_tokenizer_of_pictures_answers_nothing():
    chameleon = config.load_recipe("chameleon", tiny=True)
    drawing = replace(chameleon, stages=tuple(stage for stage in chameleon.stages if stage.objective == "tokenizer"))
    assert drawing.stages
    with pytest.raises(RunError, match="its last stage trains an image tokenizer, which answers nothing"):
        runs.to_measure(drawing, "x.jsonl", None)


def test_what_was_trained_in_the_dark_is_measured_in_the_dark(tmp_path):
    """By its last stage, whatever the others showed; records that are named on the command line and those of the recipe alike."""
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "question": "is there a star ?", "answer": "no"}]))
    for blind in (False, True):
        built_in, _ = config.layered("frozen", tiny=True, rest=["--stages.captions.data.blind", str(blind).lower()])
        for recipe in (built_in, runs.with_data(built_in, path=str(tmp_path / "a.json"))):
            data = runs.to_measure(recipe, str(tmp_path / "a.json"), None)
            source = records.source_of(Session(recipe, seed=0, with_model=False), recipe, data)
            assert bool(source.load_pictures(torch.arange(1)).any()) != blind
