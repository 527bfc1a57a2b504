"""Visual Storytelling and Visual Dialog: official files in small, every number counted anew from the tower and the language model alone."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from mmfast.trainers import benchmarks, config, exams
from mmfast.trainers.__main__ import main
from mmfast.trainers.checkpoint import RunError
from mmfast.trainers.session import Session
from PIL import Image
from torch.nn import functional as F

from mmfast.data import supervised as data
from mmfast.models import tiny

# Of three words each, so that stories of one length are read together.
WORDS = [f"{some} {colour} {shape}" for some, colour, shape in zip(
    ["a", "no", "yes", "a", "is", "there", "and", "no"], ["red", "blue", "green", "yellow", "red", "green", "blue", "yellow"],
    ["circle", "square", "circle", "triangle", "square", "triangle", "circle", "square"], strict=True,
)]  # fmt: skip
RIGHT = {(0, 0): 2, (0, 1): 0, (1, 0): 3, (1, 1): 1, (2, 0): 1, (2, 1): 2}


def draw(folder, names, size=(90, 60), seed=0):
    folder.mkdir()
    for number, name in enumerate(names):
        rng = np.random.default_rng(seed + number)
        rough = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8))
        rough.resize(size, Image.Resampling.NEAREST).save(folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both data sets: six stories of pictures 101 .. 112 of which one is not there, three dialogues of two rounds."""
    folder = tmp_path_factory.mktemp("published")
    draw(folder / "photos", [f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(101, 112)])
    (folder / "photos" / "110.jpg").write_bytes(b"<html>gone</html>")
    rows = [
        (101, 102, 103, 104, 105), (105, 104, 103, 102, 101), (106, 107, 108, 109, 103), (111, 101, 106, 107, 108),
        (101, 102, 103, 104, 112), (110, 102, 103, 104, 105), (109, 111, 105, 103, 107),
    ]  # fmt: skip
    stories = [
        [{"story_id": str(s), "photo_flickr_id": str(p), "worker_arranged_photo_order": i, "text": WORDS[(3 * s + 2 * i) % 8]}]
        for s, row in enumerate(rows)
        for i, p in enumerate(row)
    ]
    (folder / "val.story-in-sequence.json").write_text(json.dumps({"images": [], "annotations": stories, "type": "sis"}))
    draw(folder / "coco", [f"VisualDialog_val2018_{i:012d}.jpg" for i in (7, 42, 185565)], seed=50)
    dialogs = [
        {
            "image_id": picture,
            "caption": "a circle",
            "dialog": [
                {
                    "question": (d + r) % 3,
                    "answer": (d + RIGHT[d, r]) % 8,
                    "answer_options": [(d + i) % 8 for i in range(4)],
                    "gt_index": RIGHT[d, r],
                }
                for r in range(2)
            ],
        }
        for d, picture in enumerate((185565, 7, 42))
    ]
    questions = ["is there a circle", "is there a red square", "a blue star"]
    raw = {"version": "1.0", "split": "val", "data": {"dialogs": dialogs, "questions": questions, "answers": WORDS}}
    (folder / "visdial_1.0_val.json").write_text(json.dumps(raw))
    dense = [
        {"image_id": 185565, "round_id": 1, "gt_relevance": [0.0, 0.4, 1.0, 0.0]},
        {"image_id": 7, "round_id": 2, "gt_relevance": [0.2, 0.0, 0.0, 0.8]},
        {"image_id": 42, "round_id": 2, "gt_relevance": [0.0, 0.0, 1.0, 0.6]},
    ]
    (folder / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    return folder


@pytest.fixture(scope="module", params=[1, 4])
def session(request):
    """With weights so large that ranks are not decided by rounding."""
    recipe = tiny(config.load_recipe("fromage"))
    recipe = replace(recipe, connector=replace(recipe.connector, tokens=request.param), stages=recipe.stages[-1:])
    session = Session(recipe, seed=0)
    with torch.no_grad():
        for name, p in session.model.named_parameters():
            if name.startswith(("connector", "fusion", "encoder", "language")) and p.ndim > 1:
                p.copy_(torch.randn_like(p) * 0.2)
    session.model.eval()
    return session


def squashed(session, file):
    """CLIP's pooler_output of a picture that is resized without regard to its shape."""
    side = session.system.image.size
    pixels = np.array(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    return session.model.encoder.vision(session.pixels(torch.from_numpy(pixels)[None])).pooler_output


def states(session, parts):
    """Last hidden states and logits of texts, each behind its own beginning token, and of pictures by their pooled output."""
    lm, k = session.model.language, session.system.image_tokens
    embed, line = lm.get_input_embeddings(), []
    for part in parts:
        if isinstance(part, str):
            ids = [session.tokenizer.bos_token_id, *session.tokenizer(part, add_special_tokens=False)["input_ids"]]
            line.append(embed(torch.tensor(ids)))
        else:
            line.append(session.model.connector.linear(part).view(k, -1))
    out = lm(inputs_embeds=torch.cat(line)[None], output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def found(session, parts, pictures):
    """Cosines of the last token with pictures by their pooled outputs."""
    fusion = session.model.fusion
    text = F.normalize(fusion.text_hidden_fcs[0][0](states(session, parts)[0][-1]), dim=-1)
    return F.normalize(fusion.visual_fc(torch.cat(pictures)), dim=-1) @ text


def place(scores, right):
    """From 1; no two scores are equal here."""
    return int((scores > scores[right]).sum()) + 1


def opened(session, files, name, folder):
    return benchmarks.opened(session, str(files / name), str(files / folder))


@torch.no_grad()
def test_pictures_are_found_from_stories(session, files, capsys):
    exam = opened(session, files, "val.story-in-sequence.json", "photos")
    assert exam.name == "Visual Storytelling"
    told = exam.take()
    assert "5 stories, 10 pictures; 2 stories lack a picture" in capsys.readouterr().err
    notes = [row[0] for row in json.loads((files / "val.story-in-sequence.json").read_text())["annotations"]]
    stories = [notes[i : i + 5] for i in range(0, len(notes), 5)]
    names = [i for i in range(101, 112) if i != 110]
    pooled = {i: squashed(session, next((files / "photos").glob(f"{i}.*"))) for i in names}
    ranks, blind = {}, []
    for story in stories:
        pictures, texts = [int(note["photo_flickr_id"]) for note in story], [note["text"] for note in story]
        if not set(pictures) <= set(names):
            continue
        texts[-1] += "[RET]"
        mixed = [part for text, i in zip(texts[:4], pictures, strict=False) for part in (text, pooled[i])] + texts[-1:]
        for context, parts, shown in (
            ("1_caption", texts[-1:], []),
            ("5_captions", texts, []),
            ("5_captions_4_images", mixed, pictures[:4]),
        ):
            scores = found(session, parts, list(pooled.values()))
            if shown:
                blind.append(place(scores, names.index(pictures[-1])))
            scores[[names.index(i) for i in shown]] -= 10_000
            ranks.setdefault(context, []).append(place(scores, names.index(pictures[-1])))
    for context, row in ranks.items():
        for k in (1, 5, 10):
            assert told[f"vist/{context}/recall@{k}"] == pytest.approx(sum(r <= k for r in row) / 5), context
        assert told[f"vist/{context}/chance@1"] == pytest.approx(1 / 10)
    assert (told["vist/stories"], told["vist/pictures"]) == (5, 10)
    assert blind != ranks["5_captions_4_images"], "or it would not show that pictures are left out"
    assert len({tuple(row) for row in ranks.values()}) == 3, "or it would not show what is told"


@torch.no_grad()
def test_dialogues_find_pictures_and_rank_answers(session, files, capsys):
    exam = opened(session, files, "visdial_1.0_val.json", "coco")
    assert exam.name == "Visual Dialog"
    assert "3 dialogues; 3 rated rounds" in capsys.readouterr().err
    told = exam.take()
    raw = json.loads((files / "visdial_1.0_val.json").read_text())["data"]
    dense = json.loads((files / "visdial_1.0_val_dense_annotations.json").read_text())
    pooled, texts, losses, right = [], [], {"answers": [], "answers_released": []}, []
    for dialog in raw["dialogs"]:
        pooled.append(squashed(session, files / "coco" / f"VisualDialog_val2018_{dialog['image_id']:012d}.jpg"))
        said, before = [], ""
        for turn in dialog["dialog"]:
            question, answer = raw["questions"][turn["question"]], raw["answers"][turn["answer"]]
            said += [f"Q: {question}?", f"A: {answer}."]
            before += f"Q: {question}?\nA: "
            row = {name: [] for name in losses}
            for option in turn["answer_options"]:
                line = raw["answers"][option]
                ids = [session.tokenizer.bos_token_id, *session.tokenizer(line, add_special_tokens=False)["input_ids"]]
                _, logits = states(session, [pooled[-1], before, line])
                for name, first in (("answers", -1), ("answers_released", 0)):
                    at = logits[len(logits) - len(ids) + first : len(logits) + first]
                    row[name].append(F.cross_entropy(at, torch.tensor(ids), reduction="sum").item())
            before += f"{answer}\n"
            for name in losses:
                losses[name].append(row[name])
            right.append(turn["gt_index"])
        texts.append(" ".join(said) + "[RET]")
    table = torch.stack([found(session, [text], pooled) for text in texts])
    for name, scores in (("image", table), ("text", table.T)):
        ranks = [place(row, i) for i, row in enumerate(scores)]
        assert told[f"visdial/{name}_retrieval/recall@1"] == pytest.approx(sum(r == 1 for r in ranks) / 3)
        assert told[f"visdial/{name}_retrieval/recall@5"] == 1
    for name, rows in losses.items():
        ranks = [place(-torch.tensor(row), i) for row, i in zip(rows, right, strict=True)]
        for key, want in (
            *((f"recall@{k}", sum(r <= k for r in ranks) / 6) for k in (1, 5, 10, 20)),
            ("mrr", sum(1 / r for r in ranks) / 6),
            ("mean_rank", sum(ranks) / 6),
        ):
            assert told[f"visdial/{name}/{key}"] == pytest.approx(want), (name, key)
        gains = []
        for d, note in enumerate(dense):
            at = 2 * d + note["round_id"] - (name == "answers")  # the released script counts the round from 0
            if at < 6:
                relevance = torch.tensor(note["gt_relevance"])
                weights = 1 / torch.log2(torch.arange(2, 4).float())
                best = relevance.sort(descending=True).values[:2] @ weights
                gains.append((relevance[torch.tensor(rows[at]).argsort()[:2]] @ weights / best).item())
        assert len(gains) == (3 if name == "answers" else 2)
        assert told[f"visdial/{name}/ndcg"] == pytest.approx(sum(gains) / len(gains))
    assert told["visdial/dialogues"] == 3
    assert losses["answers"] != losses["answers_released"]


def test_what_is_not_there(session, files, tmp_path):
    for name, folder, sentence in (
        (
            "visdial_1.0_val.json",
            "photos",
            r"3 of 3 pictures are not in .*photos, the first is that of id 185565 \(VisualDialog_val2018_000000185565",
        ),
        ("val.story-in-sequence.json", "coco", r"no story has all its pictures in .*coco, whose names end with Flickr's ids \(101.jpg\)"),
        ("visdial_1.0_val.json", "gone", "folder of pictures .*gone does not exist"),
    ):
        with pytest.raises(RunError, match=sentence):
            opened(session, files, name, folder)
    (tmp_path / "records.json").write_text('[{"image": "a.png", "caption": "a"}]')
    (tmp_path / "broken.json").write_text('{"data": ')
    (tmp_path / "problems.json").write_text('{"1": {"question": "a"}}')
    for name in ("records.json", "broken.json", "problems.json", "none.json"):
        assert benchmarks.opened(session, str(tmp_path / name), None) is None
    raw = json.loads((files / "visdial_1.0_val.json").read_text())
    raw["data"]["questions"][0] = "red " * 300
    (tmp_path / "long.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=r"dialogue of picture 185565 takes \d+ places, and the model has 256"):
        benchmarks.opened(session, str(tmp_path / "long.json"), str(files / "coco")).take()
    raw["data"]["questions"][0] = "red <image>"
    (tmp_path / "marked.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=r"the dialogue of picture 185565: the text 'Q: .*' holds <image>"):
        benchmarks.opened(session, str(tmp_path / "marked.json"), str(files / "coco")).take()
    for broken in (b"[", b"\xff\xfe[]"):
        (tmp_path / "long_dense_annotations.json").write_bytes(broken)
        with pytest.raises(RunError, match=r"long_dense_annotations.json is no JSON"):
            benchmarks.opened(session, str(tmp_path / "long.json"), str(files / "coco"))


@torch.no_grad()
def test_in_half_precision(session, files):
    half = deepcopy(session)
    half.model.language.bfloat16()
    half.model.encoder.bfloat16()
    for name, folder in (("visdial_1.0_val.json", "coco"), ("val.story-in-sequence.json", "photos")):
        whole, told = (opened(s, files, name, folder).take() for s in (session, half))
        assert whole.keys() == told.keys()
        assert all(0 <= value <= 10 for value in told.values())


def test_in_the_dark(session, files, monkeypatch):
    """All pictures are alike to a model that was trained on black ones."""
    monkeypatch.setattr(Session, "blind", True)
    states, _ = benchmarks._pooled(session, sorted((files / "coco").iterdir()))
    assert len(states) == 3
    assert torch.equal(states, states[:1].expand_as(states))


def test_other_models(files):
    llava = Session(replace(tiny(config.load_recipe("llava")), stages=()), seed=0)
    with pytest.raises(
        RunError,
        match=r"Visual Dialog is measured with a model that finds pictures \(fusion Retrieval, FROMAGe\); this one's fusion is Prefix",
    ):
        opened(llava, files, "visdial_1.0_val.json", "coco")


def call(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_one_command(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(data, "Shapes", partial(data.Shapes, count=24))
    monkeypatch.setitem(exams.EXAMS, "shapes_captions", lambda session, system: {"caption/recall": 0.0})
    run = tmp_path / "run"
    train = (
        "train",
        "fromage",
        "--tiny",
        "--device",
        "cpu",
        "--steps",
        1,
        "--quiet",
        "--eval-data",
        files / "val.story-in-sequence.json",
        "--images",
    )
    code, _, err = call(capsys, *train, files / "coco", "--out", tmp_path / "none")
    assert (code, err.count("\n")) == (1, 1)
    assert "no story has all its pictures in" in err, "before training"
    code, _, err = call(capsys, *train, files / "photos", "--out", run)
    assert code in (0, None), err
    assert json.loads((run / "eval.json").read_text())["vist/stories"] == 5
    code, out, err = call(capsys, "eval", run, "--data", files / "val.story-in-sequence.json", "--images", files / "photos")
    assert code in (0, None), err
    told = json.loads(out)
    assert 0 <= told["vist/5_captions_4_images/recall@5"] <= 1
    code, out, err = call(capsys, "eval", run, "--data", files / "visdial_1.0_val.json", "--images", files / "coco")
    assert code in (0, None), err
    told = json.loads(out)
    assert told == json.loads((run / "eval.json").read_text())
    assert {"visdial/answers/ndcg", "visdial/answers_released/mrr", "visdial/image_retrieval/recall@10"} <= told.keys()
    code, _, err = call(capsys, "eval", run, "--data", files / "visdial_1.0_val.json", "--images", files / "coco", "--generate")
    assert code == 2
    assert "Visual Dialog has its own prompts and decodes nothing; leave --generate and --shots out" in err
    code, _, err = call(capsys, "eval", run, "--data", files / "visdial_1.0_val.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "3 of 3 pictures are not in" in err
