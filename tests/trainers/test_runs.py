"""Training from given weights on records of one's own, through the command line: adapters, what a checkpoint holds, resume, a run as another's
start, chat, export, measures. The weights are tiny random ones in the published layouts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmfast.trainers import config, evaluate, preference, records, runs, supervised
from mmfast.trainers.__main__ import main
from mmfast.trainers.checkpoint import Run, RunError
from mmfast.trainers.loop import Options
from mmfast.trainers.recipes.align.dpo import RECIPE as DPO
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from mmfast.data.images import load
from mmfast.models import tiny
from mmfast.models.lora import lora_parameters
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import Data, Lora, Pairs, Shots, to_dict

WORDS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<image>",
    "what",
    "is",
    "this",
    "?",
    "red",
    "green",
    "blue",
    "USER",
    "ASSISTANT",
    ":",
    "colour",
)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
RECIPE = """
from mmfast.spec import Clip, Compute, Data, LanguageModel, Lora, Mlp, Optim, Stage, System
RECIPE = System(
    name="mine",
    encoder=Clip(weights="{folder}/tower", layer=-2),
    connector=Mlp(2),
    language=LanguageModel(weights="{folder}/lm"),
    stages=(
        Stage("align", train=("connector",), data=Data("mine", path="{folder}/data.jsonl"), template="bare", max_length=64,
              optim=Optim(lr=1e-2, steps=4, batch=6)),
        Stage("answers", train=("connector",), data=Data("mine", path="{folder}/data.jsonl"), template="bare", max_length=64,
              lora=Lora(rank=4, alpha=8, dropout=0.1, targets=("q_proj", "v_proj", "down_proj")),
              optim=Optim(lr=1e-2, steps=12, batch=6, accumulate=2, lr_of={{"connector": 5e-3}})),
    ),
    compute=Compute(device="cpu"),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tower, language model, pictures, records and a recipe over them."""
    path = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model("llama", vocab_size=len(WORDS), intermediate_size=48, max_position_embeddings=64, **sizes, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "lm")
    word_tokenizer(WORDS).save_pretrained(path / "lm")
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, intermediate_size=48, initializer_factor=3.0, **sizes)).save_pretrained(
        path / "tower"
    )
    records, pairs, draw = [], [], np.random.default_rng(0)
    for i in range(24):
        name = list(COLOURS)[i % 3]
        pixels = np.clip(np.array(COLOURS[name]) + draw.integers(-20, 20, (30, 30, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path / f"{i}.png")
        record = {"id": str(i), "image": f"{i}.png"}
        said = [{"from": "human", "value": "<image>\nwhat colour is this ?"}, {"from": "gpt", "value": name}]
        records.append(record | {"conversations": said})
        pairs.append(record | {"prompt": "what colour is this ?", "chosen": name, "rejected": list(COLOURS)[(i + 1) % 3]})
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (path / "mine.py").write_text(RECIPE.format(folder=path))
    return path


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def steps(run, *keys):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(line.get(k) for k in keys) for line in lines]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.raises(SystemExit) as stop:
        main(
            ["train", str(folder / "mine.py"), "--out", str(out), "--eval-data", str(folder / "data.jsonl"), "--save-every", "5", "--quiet"]
        )
    assert stop.value.code == 0
    return out


def tensors(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_what_is_read_and_not_trained_is_not_saved(trained):
    names = tensors(trained / "checkpoints" / "step-16").keys()
    assert {n.split(".")[0] for n in names} == {"connector", "language"}
    assert all("lora_" in n for n in names if n.startswith("language."))
    assert len([n for n in names if "lora_A" in n]) == 2 * 3
    losses = [loss for (loss,) in steps(trained, "loss")]
    assert losses[-1] < 0.95 * losses[0]
    assert json.loads((trained / "eval.json").read_text())["answers"] == 24


def test_adapters_and_connector_learn_at_their_rates_and_nothing_else_moves(folder, trained, capsys):
    session, recipe = runs.open_run(trained)
    start = supervised.Session(recipe, seed=0)
    start.add_adapters(recipe.stages[1].lora)
    before, after = start.model.state_dict(), session.model.state_dict()
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert moved == {n for n in after if n.startswith("connector.") or "lora_B" in n or "lora_A" in n}
    code, out, _ = call(capsys, "train", folder / "mine.py", "--out", trained.parent / "told", "--steps", "1")
    assert code == 0
    assert "align trains 2,112 parameters: connector.{0,2}.weight, connector.{0,2}.bias" in out
    assert "language.model.layers.{0-1}.self_attn.q_proj.lora_A.default.weight" in out


def test_resume_through_a_stage_with_adapters(folder, trained, tmp_path, capsys):
    argv = ["train", folder / "mine.py", "--out", tmp_path / "cut", "--save-every", "5", "--quiet"]
    assert call(capsys, *argv)[0] == 0
    whole = steps(tmp_path / "cut", "step", "loss", "grad_norm")
    for last in (14, 9, 4):  # the run as it was when a later checkpoint was not there yet
        for path in (tmp_path / "cut" / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > last:
                shutil.rmtree(path)
        if not list((tmp_path / "cut" / "checkpoints").iterdir()):
            break
        saved = json.loads((tmp_path / "cut" / "recipe.json").read_text())
        for stage in saved["stages"]:  # as before there was such a field
            del stage["optim"]["layer_decay"], stage["z_loss"]
        (tmp_path / "cut" / "recipe.json").write_text(json.dumps(saved))
        code, _, err = call(capsys, *argv, "--resume")
        assert code == 0, err
        assert steps(tmp_path / "cut", "step", "loss", "grad_norm") == whole
    assert whole == steps(trained, "step", "loss", "grad_norm")


def test_eval_chat_and_export(folder, trained, tmp_path, capsys):
    code, out, err = call(capsys, "eval", trained, "--data", folder / "data.jsonl")
    assert code == 0, err
    told = json.loads(out)
    assert 0 < told["loss"] < 5
    code, said, err = call(capsys, "chat", trained, "--image", folder / "0.png", "--prompt", "what colour is this ?", "--max-new-tokens", 4)
    assert code == 0, err
    code, out, err = call(capsys, "export", trained, "--out", tmp_path / "stock")
    assert code == 0, err
    processor, model = AutoProcessor.from_pretrained(tmp_path / "stock"), LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock")
    assert not any("lora" in name for name, _ in model.named_parameters())
    picture = Image.open(folder / "0.png")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is this ?"}]}]
    batch = processor(images=picture, text=processor.apply_chat_template(talk, add_generation_prompt=True), return_tensors="pt")
    new = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert processor.decode(new, skip_special_tokens=True).strip() == said.strip()
    code, _, err = call(capsys, "export", trained, "--out", tmp_path / "stock")
    assert code == 1
    assert "is not empty" in err


@pytest.mark.parametrize("reference", ["adapter_off", "cached", "frozen"])
def test_aligning_a_run_with_adapters(folder, trained, tmp_path, capsys, reference):
    """The policy starts from a run; the three references see the same start."""
    argv = [
        "train", "dpo", "--policy.weights", trained, "--data", folder / "pairs.jsonl", "--out", tmp_path / "a", "--quiet", "--reference", reference,
        "--train", "[]", "--lora", '{"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["v_proj", "down_proj"]}', "--optim.lr", "3e-2", "--steps", "8",
        "--optim.batch", "6", "--template", "bare", "--max_length", "64", "--device", "cpu",
    ]  # fmt: skip
    code, _, err = call(capsys, *argv)
    assert code == 0, err
    logged = steps(tmp_path / "a", "loss", "rewards/margins", "rewards/accuracies")
    assert logged[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert logged[-1][1] > 1e-3
    test_aligning_a_run_with_adapters.curves = curves = getattr(test_aligning_a_run_with_adapters, "curves", {})
    curves[reference] = [row[0] for row in logged]
    for other in curves.values():
        assert other == pytest.approx(curves[reference], abs=2e-6)
    session, _ = runs.open_run(tmp_path / "a")
    assert len(lora_parameters(session.model)) == 2 * 2 * 2


def test_preview_of_what_is_supervised(folder, capsys):
    code, out, err = call(capsys, "train", folder / "mine.py", "--dry-run")
    assert code == 0
    assert json.loads(out)["name"] == "mine"
    assert "answers: <bos> [4 image tokens] what colour is this ? «red <eos>»" in err


def test_a_run_that_is_none(tmp_path, capsys):
    with pytest.raises(RunError, match="is no run folder"):
        runs.open_run(tmp_path)
    for argv in (["eval", tmp_path], ["chat", tmp_path, "--prompt", "x"], ["export", tmp_path, "--out", tmp_path / "x"]):
        code, _, err = call(capsys, *argv)
        assert code == 2
        assert "is no run folder" in err


def test_wrong_records_are_told_before_anything_is_trained(folder, tmp_path, capsys):
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "bad.jsonl").write_text("\n".join([lines[0], '{"image": "gone.png"}', lines[1].replace("1.png", "gone.png"), lines[2]]))
    code, _, err = call(capsys, "train", folder / "mine.py", "--data", folder / "bad.jsonl", "--out", tmp_path / "x")
    assert code == 1
    assert "2 of 4 records are faulty" in err
    assert not (tmp_path / "x" / "metrics.jsonl").exists()
    code, out, _ = call(
        capsys,
        "train",
        folder / "mine.py",
        "--data",
        folder / "bad.jsonl",
        "--out",
        tmp_path / "y",
        "--on-bad-record",
        "skip",
        "--steps",
        "1",
        "--quiet",
    )
    assert code == 0
    assert "left out 2 of 4" in out


def test_streamed_records_resume_where_they_were(folder, tmp_path, capsys):
    pytest.importorskip("datasets")
    argv = [
        "train",
        folder / "mine.py",
        "--save-every",
        "3",
        "--quiet",
        "--stages.align.data.streaming",
        "true",
        "--stages.answers.data.streaming",
        "true",
    ]
    assert call(capsys, *argv, "--out", tmp_path / "a")[0] == 0
    whole = steps(tmp_path / "a", "step", "loss")
    newest = max((tmp_path / "a" / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    shutil.rmtree(newest)
    code, _, err = call(capsys, *argv, "--out", tmp_path / "a", "--resume")
    assert code == 0, err
    assert steps(tmp_path / "a", "step", "loss") == whole


def test_samples_appear_while_it_trains(folder, tmp_path, capsys):
    argv = ["train", folder / "mine.py", "--out", tmp_path / "a", "--steps", "3", "--eval-every", "2", "--quiet", "--track", "nothing"]
    assert "unknown tracker" in call(capsys, *argv)[2]
    assert call(capsys, *argv[:-2])[0] == 0
    rows = [json.loads(line) for line in (Path(tmp_path) / "a" / "samples" / "steps.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3, 4, 5, 6}
    assert set(rows[0]) == {"step", "asked", "said", "images"}
    picture = np.asarray(Image.open(tmp_path / "a" / "samples" / rows[0]["images"][0]))
    assert picture.shape == (28, 28, 3)
    assert picture[..., 0].mean() > 2 * picture[..., 1].mean(), "the first record shows red"
    page = (tmp_path / "a" / "report.html").read_text()
    assert "while it trained" in page.lower()
    assert page.count("<img") == 4
    assert "Right answers" not in page, "nothing was measured"


# ------------------------------------------------------------------------------------------------- what a checkpoint must hold


def mine(folder, *stages, precision="fp32", **changes):
    """The recipe of ``folder`` with other trained parts a stage: (parts, lora)."""
    scope: dict = {}
    exec((folder / "mine.py").read_text(), scope)
    recipe = scope["RECIPE"]
    made = [
        replace(recipe.stages[0], name=f"s{i}", train=parts, lora=lora, optim=replace(recipe.stages[0].optim, steps=2))
        for i, (parts, lora) in enumerate(stages)
    ]
    return replace(recipe, stages=tuple(made), compute=replace(recipe.compute, precision=precision), **changes)


ADAPTERS = Lora(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))


def test_weights_that_trained_before_they_got_adapters_are_saved(folder, tmp_path):
    """Their names change when adapters are put around them; they are no less trained."""
    recipe = mine(folder, (("connector", "language"), None), (("connector",), ADAPTERS))
    session = supervised.train_system(recipe, Run(tmp_path), options=Options(quiet=True, compute=recipe.compute))
    again = supervised.Session(recipe, seed=0)
    supervised.restore(again, recipe.stages, Run(tmp_path, resume=True).last_checkpoint()[1])
    for (name, a), b in zip(session.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("parts", [("connector",), ("connector", "embeddings"), ("connector", "language")])
def test_half_precision_is_measured_while_and_after_it_trains(folder, tmp_path, parts):
    """Frozen parts in bf16 beside trained ones in fp32, with the tower's states kept and read, sampled and measured without autocast."""
    recipe = mine(folder, (parts, None), precision="bf16")
    session = supervised.train_system(recipe, Run(tmp_path), options=Options(quiet=True, eval_every=1, compute=recipe.compute))
    assert next(session.model.encoder.parameters()).dtype == torch.bfloat16
    source = session.source(recipe.stages[0].data, "bare")
    told = evaluate.measure_answers(session, source)
    assert 0 < told["loss"] < 20
    assert (tmp_path / "samples" / "steps.jsonl").exists()


def test_an_aligned_policy_is_opened_in_the_precision_it_trained_in(folder, tmp_path):
    policy = mine(folder, precision="bf16")
    recipe = tiny(DPO)
    recipe = replace(
        recipe, policy=policy, data=Pairs("mine", path=str(folder / "pairs.jsonl")), template="bare", train=("language",),
        optim=replace(recipe.optim, steps=2, batch=6), compute=policy.compute,
    )  # fmt: skip
    run = Run(tmp_path)
    session = supervised.Session(policy, seed=0, precision="bf16")
    preference.train_alignment(recipe, session, run, options=Options(quiet=True, compute=recipe.compute))
    run.write_json("recipe.json", to_dict(recipe) | {"seed": 0})
    again, _ = runs.open_run(tmp_path)
    for (name, a), b in zip(session.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_samples_are_asked_about_their_own_pictures(folder, trained, monkeypatch):
    session, recipe = runs.open_run(trained)
    seen = []
    monkeypatch.setattr(session.model, "generate", lambda ids, **given: seen.append(given["pixel_values"]) or torch.tensor([[2]]))
    asked = session.source(recipe.stages[1].data, "bare").prompts(3)
    assert evaluate.answer(session, asked) == ["", "", ""]
    for i, pixels in enumerate(seen):
        assert torch.equal(pixels, session.pixels(torch.from_numpy(load(folder / f"{i}.png", 28))[None]))
    assert len(seen) == 3


def test_the_page_shows_the_measures_of_own_records(trained):
    page = (trained / "report.html").read_text()
    told = json.loads((trained / "eval.json").read_text())
    assert f">{told['loss']:.3f}<" in page
    assert "Right answers" in page
    assert ">24<" in page, "how many answers there were, under the name that the file has"
    assert page.count("polyline") == 1


def test_right_answers_are_those_that_greedy_decoding_gives(folder, trained):
    """Two turns a record, of which the model is right about some: counted from ``generate`` instead."""
    session, recipe = runs.open_run(trained)
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    said = []
    for line in lines:
        encode, picture = session.encoder("bare"), session.pixels(torch.from_numpy(load(folder / line["image"], 28))[None])
        ids, _ = encode([(line["conversations"][0]["value"], None)])
        out = session.model.generate(torch.tensor([ids]), end=2, max_new_tokens=3, pixel_values=picture)[0].tolist()
        said.append(session.tokenizer.decode(out[: out.index(2)] if 2 in out else out))
    share = np.mean([s == line["conversations"][1]["value"] for s, line in zip(said, lines, strict=True)])
    assert 0 < share < 1, "so that both kinds are counted"
    told = records.measure(session, recipe, runs.to_measure(recipe, str(folder / "data.jsonl"), None))[0]
    assert told["answer_accuracy"] == pytest.approx(share)
    assert told["answers"] == 24
    logp, count = 0.0, 0
    for line in lines:
        ids, labels = encode([(line["conversations"][0]["value"], line["conversations"][1]["value"])])
        picture = session.pixels(torch.from_numpy(load(folder / line["image"], 28))[None])
        logits = session.model(torch.tensor([ids]), pixel_values=picture).logits[0].log_softmax(-1)
        scored = [(at, label) for at, label in enumerate(labels) if label != -100]
        logp, count = logp + sum(float(logits[at - 1, label]) for at, label in scored), count + len(scored)
    assert told["loss"] == pytest.approx(-logp / count, rel=1e-5)


def test_episodes_are_asked_as_shots_say(folder, trained, tmp_path, capsys):
    recipe, own = runs.open_run(trained)[1], Shots(prompt="flamingo", repeats=1)
    stage = recipe.stages[-1]
    other = replace(recipe, stages=(replace(stage, data=replace(stage.data, shots=own)),))
    assert runs.to_measure(recipe, "x.json", None).shots == Shots()
    assert runs.to_measure(other, "x.json", None).shots == own
    assert runs.to_measure(other, "x.json", None, "{shots: 2, induction: true}").shots == replace(own, shots=2, induction=True)
    with pytest.raises(RunError) as error:
        runs.to_measure(recipe, "x.json", None, "{prompt: flamngo, ways: 0, shot: 1}")
    for sentence in (
        "--shots.shot: Shots has no field 'shot' (did you mean 'shots'?)",
        "--shots.ways: expected at least 1, got 0",
        "--shots.prompt: unknown prompt 'flamngo' (did you mean 'flamingo'?), expected one of frozen, flamingo",
    ):
        assert sentence in str(error.value)
    row = {
        "image_1": "0.png",
        "answer_1": "red",
        "question_1": "what colour is this?",
        "question_image": "1.png",
        "question": "and this?",
        "answer": "red",
    }
    (tmp_path / "vqa.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    argv = ["eval", trained, "--data", tmp_path / "vqa.jsonl", "--images", folder]
    lost = []
    for shots in ("{shots: 1}", "{shots: 0}", "{shots: 1}"):
        code, out, err = call(capsys, *argv, "--shots", shots)
        assert code == 0, err
        told = json.loads(out[out.index("{\n") :])
        assert told["answers"] == 2
        lost.append(told["loss"])
    assert lost[0] == lost[2] != lost[1], "the example is part of the question"
    code, _, err = call(capsys, *argv, "--shots", "{inner_shots: 2}")
    assert code == 1
    assert "has 1 examples of 'red', and inner_shots is 2" in err
    code, _, err = call(capsys, "eval", trained, "--shots", "{shots: 1}")
    assert code == 2
    assert "--shots is about records, and none are given; add --data FILE" in err


def asked_of_humans(folder):
    """A question to each picture, ten humans' answers to it, and a caption: which of these are right is a table."""
    answers = [{"answer": a} for a in ["Red", "red."] * 2 + ["the red"] + ["green"] * 3 + ["blue"] * 2]
    rows = [{"id": f"q{i}", "image": f"{i}.png", "question": "what colour is this ?", "answers": answers} for i in range(24)]
    (folder / "humans.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "0.png", "caption": "red"}])))
    return folder / "humans.jsonl", {"red": 1.0, "green": 0.9, "blue": 0.6}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"--beams": 3, "--length-penalty": 2.0, "--max-new-tokens": 3},
        {"--no-repeat-ngram-size": 1, "--repetition-penalty": 3.0, "--max-new-tokens": 2},
    ],
)
def test_generated_answers_are_scored_and_written(folder, trained, tmp_path, capsys, asked):
    """Row by row with ``generate`` alone, and the humans' table."""
    shutil.copytree(trained, run := tmp_path / "run")
    data, worth = asked_of_humans(folder)
    code, out, err = call(capsys, "eval", run, "--data", data, "--generate", *(str(word) for pair in asked.items() for word in pair))
    assert code == 0, err
    session, _ = runs.open_run(run)
    names = {"--no-repeat-ngram-size": "no_repeat"}
    (ids, _), said = session.encoder("bare")([("<image>\nwhat colour is this ?", None)]), []
    room = 64 - len(ids)  # in the model's context
    options = {"max_new_tokens": room} | {names.get(k, k[2:].replace("-", "_")): v for k, v in asked.items()}
    for i in range(24):
        picture = session.pixels(torch.from_numpy(load(folder / f"{i}.png", 28))[None])
        row = session.model.generate(torch.tensor([ids]), end=2, pixel_values=picture, **options)[0].tolist()
        said.append(session.tokenizer.decode(row[: row.index(2)] if 2 in row else row))
    assert len(set(said)) > 1, "the picture must matter"
    right = [worth.get(words, 0) for words in said]
    measured, rows = json.loads(out), [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert measured["vqa_accuracy"] == pytest.approx(np.mean(right))
    assert measured["vqa_questions"] == 24
    assert measured["answers"] == 25
    assert json.loads((run / "eval.json").read_text()) == pytest.approx(measured)
    assert [row["said"] for row in rows[:24]] == said
    assert [row["vqa_accuracy"] for row in rows[:24]] == pytest.approx(right)
    assert rows[3]["id"] == "q3"
    assert rows[3]["question"] == "what colour is this ?"
    assert rows[3]["answers"][:2] == ["Red", "red."]
    assert "vqa_accuracy" not in rows[24], "a caption is decoded, and not a right answer to anything"
    assert not {"grounding_accuracy", "image_retrieval/recall@1"} & set(measured)
    assert f"answers in {run / 'predictions.jsonl'}" in err


def test_open_questions_are_answered_and_not_scored(folder, trained, tmp_path, capsys):
    """LLaVA's evaluation file: beside an answered question it is what was said of the same question there, alone it has no measure."""
    shutil.copytree(trained, run := tmp_path / "run")
    opened = [{"question_id": i, "image": f"{i}.png", "text": "what colour is this ?", "category": "conv"} for i in range(3)]
    known = {"id": "known", "image": "1.png", "question": "what colour is this ?", "answer": "red"}
    argv = ["eval", run, "--images", folder, "--generate", "--data", tmp_path / "q.jsonl"]
    for rows in ([*opened, known], opened):
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, out, err = call(capsys, *argv)
        assert code == 0, err
        measured, said = json.loads(out), [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        assert [row["id"] for row in said[:3]] == ["0", "1", "2"]
        assert [(row["question"], row["answers"]) for row in said[:3]] == [("what colour is this ?", [])] * 3
        assert not any("vqa_accuracy" in row for row in said[:3])
        if len(rows) == 4:
            assert (measured["answers"], measured["vqa_questions"], said[1]["said"]) == (1, 1, said[3]["said"])
        else:
            assert measured == {}
    sentence = 'is a question ("question_id", "text") without an answer to learn or compare with; mmfast eval --generate answers it'
    code, _, err = call(capsys, "eval", run, "--images", folder, "--data", tmp_path / "q.jsonl")
    assert (code, err.count(sentence)) == (1, 3)
    code, _, err = call(
        capsys,
        "train",
        "llava",
        "--tiny",
        "--data",
        tmp_path / "q.jsonl",
        "--images",
        folder,
        "--out",
        tmp_path / "none",
        "--device",
        "cpu",
    )
    assert (code, err.count(sentence)) == (1, 3)


def test_documents_ask_nothing(folder, trained, capsys):
    (folder / "texts.jsonl").write_text('{"text": "this is red"}\n')
    code, out, _ = call(capsys, "eval", trained, "--data", folder / "texts.jsonl")
    assert code == 0
    assert "vqa_accuracy" not in json.loads(out)
    code, _, err = call(capsys, "eval", trained, "--data", folder / "texts.jsonl", "--generate")
    assert code == 1
    assert "texts.jsonl: holds documents alone, which ask nothing, so no answer can be generated" in err


def test_workers_change_nothing(folder, trained, tmp_path, capsys):
    argv = ["train", folder / "mine.py", "--out", tmp_path / "w", "--quiet", "--compute.workers", 2, "--steps", 4]
    code, _, err = call(capsys, *argv)
    assert code == 0, err
    assert steps(tmp_path / "w", "step", "loss")[:4] == steps(trained, "step", "loss")[:4]


def test_a_picture_that_goes_away_is_one_sentence_from_a_worker_too(folder, tmp_path, capsys, monkeypatch):
    for path in folder.glob("*.png"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(supervised, "_STATE_BYTES", 0)  # pictures are read with every batch
    run_stage = supervised.run_stage

    def without(*args, **kwargs):
        for path in tmp_path.glob("*.png"):
            path.unlink()
        return run_stage(*args, **kwargs)

    monkeypatch.setattr(supervised, "run_stage", without)
    argv = ["train", folder / "mine.py", "--images", tmp_path, "--out", tmp_path / "run", "--quiet", "--compute.workers", 1]
    code, _, err = call(capsys, *argv)
    assert code == 1
    (line,) = [line for line in err.splitlines() if "mmfast:" in line or "Traceback" in line]
    assert line.startswith("mmfast: image ")
    assert line.endswith("does not exist")


def aligned(folder, run, *more):
    return [
        "train", "dpo", "--policy.weights", run, "--data", folder / "pairs.jsonl", "--quiet", "--reference", "adapter_off", "--train", "[]",
        "--lora", '{"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["v_proj"]}', "--steps", "2", "--optim.batch", "6", "--template", "bare",
        "--max_length", "64", "--device", "cpu", *more,
    ]  # fmt: skip


def test_rows_beyond_the_context_that_weights_have_are_refused(folder, trained, tmp_path, capsys):
    code, _, err = call(capsys, *aligned(folder, trained, "--out", tmp_path / "a", "--max_length", "65"))
    assert (code, err.splitlines()[-1]) == (2, "mmfast: dpo: max_length: 65 is more than the language model's context of 64; at most 64")
    assert not (tmp_path / "a").exists()


def test_preview_and_plan_of_a_run_as_the_start_of_another(folder, trained, tmp_path, capsys):
    code, _, err = call(capsys, *aligned(folder, trained, "--dry-run"))
    assert code == 0, err
    assert "dpo, chosen: <bos> [4 image tokens] what colour is this ? «red <eos>»" in err
    assert "dpo, rejected: <bos> [4 image tokens] what colour is this ? «green <eos>»" in err
    code, out, err = call(capsys, "plan", "dpo", "--policy.weights", trained, "--template", "bare")
    assert code == 0, err
    session, _ = runs.open_run(trained)
    merged = sum(p.numel() for n, p in session.model.named_parameters() if "lora_" not in n)
    assert f"{merged:,}" in out or f"{merged / 1e3:.1f}" in out, out


def test_a_run_does_not_depend_on_where_it_was_begun(folder, trained, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.chdir(trained.parent)
    code, _, err = call(capsys, *aligned(folder, trained.name, "--out", tmp_path / "a"))
    assert code == 0, err
    assert not [w for w in recwarn if "peft_config" in str(w.message)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    code, _, err = call(capsys, "eval", "b", "--data", folder / "data.jsonl")
    assert code == 0, err
    saved = json.loads((tmp_path / "b" / "recipe.json").read_text())
    (tmp_path / "b" / "recipe.json").write_text(json.dumps(saved).replace(str(trained), str(trained) + "-gone"))
    code, _, err = call(capsys, "eval", "b", "--data", folder / "data.jsonl")
    assert code == 2
    assert "mine-gone: there is no such folder" in err


def test_preview_of_streams_and_of_stages_without_data(folder, capsys):
    pytest.importorskip("datasets")
    code, _, err = call(capsys, "train", folder / "mine.py", "--dry-run", "--stages.align.data.streaming", "true")
    assert code == 0, err
    assert len([line for line in err.splitlines() if line.startswith("align: <bos> [4 image tokens]")]) == 2
    code, _, err = call(capsys, "train", folder / "mine.py", "--dry-run", "--stages.align.data.path", "null")
    assert code == 0, err
    assert "align: no preview, its data is not built in and was not given" in err
    assert "answers: <bos>" in err
    assert "what the policy says" in call(capsys, "train", "dpo", "--tiny", "--dry-run")[2]


def test_streamed_records_that_cannot_be_encoded(folder, tmp_path, capsys):
    pytest.importorskip("datasets")
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "long.jsonl").write_text("\n".join([*lines[:3], lines[0].replace("what colour", "what " * 3000), *lines[3:]]))
    argv = ["train", folder / "mine.py", "--data", folder / "long.jsonl", "--quiet", "--config", folder / "stream.yaml"]
    (folder / "stream.yaml").write_text("stages: {align: {data.streaming: true}, answers: {data.streaming: true}}")
    code, _, err = call(capsys, *argv, "--out", tmp_path / "fail")
    assert code == 1
    assert "record 3: nothing to learn is left after the cut" in err
    code, out, err = call(capsys, *argv, "--out", tmp_path / "skip", "--on-bad-record", "skip")
    assert code == 0, err
    assert "left out: " in out
    assert len(steps(tmp_path / "skip", "loss")) == 16


def test_images_and_on_bad_record_count_for_the_recipes_own_records(folder, tmp_path, capsys):
    argv = ["train", folder / "mine.py", "--steps", "1", "--quiet"]
    code, out, err = call(capsys, *argv, "--images", tmp_path, "--out", tmp_path / "a")
    assert code == 1
    assert "24 of 24 records are faulty" in err
    shutil.copy(folder / "0.png", tmp_path)
    code, out, err = call(capsys, *argv, "--images", tmp_path, "--on-bad-record", "skip", "--out", tmp_path / "b", "--optim.batch", "1")
    assert code == 2
    batch = ["--stages.align.optim.batch", "1", "--stages.answers.optim.batch", "1", "--stages.answers.optim.accumulate", "1"]
    code, out, err = call(capsys, *argv, *batch, "--images", tmp_path, "--on-bad-record", "skip", "--out", tmp_path / "b")
    assert code == 0, err
    assert "left out 23 of 24 records" in out
    (folder / "skip.yaml").write_text("stages: {align: {data.on_bad_record: skip}, answers: {data.on_bad_record: skip}}")
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "worse.jsonl").write_text("\n".join([*lines, '{"image": "gone.png"}']))
    argv += ["--config", folder / "skip.yaml", "--data", folder / "worse.jsonl", "--out", tmp_path / "c"]
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    assert "left out 1 of 25 records" in out, "a file's skip is not undone by --data"


def test_measured_records_have_the_names_of_the_trained_ones(folder, tmp_path, capsys):
    rows = [{"bild": f"{i}.png", "frage": "what is this ?", "antwort": "red"} for i in range(6)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = "{bild: image, frage: question, antwort: answer}"
    argv = ["train", folder / "mine.py", "--data", folder / "own.jsonl", "--eval-data", folder / "own.jsonl", "--out", tmp_path / "a"]
    columns = ["--stages.align.data.columns", columns, "--stages.answers.data.columns", columns]
    code, _, err = call(capsys, *argv, *columns, "--steps", "1", "--quiet")
    assert code == 0, err
    assert json.loads((tmp_path / "a" / "eval.json").read_text())["answers"] == 6
    code, _, err = call(capsys, "eval", tmp_path / "a", "--data", folder / "own.jsonl")
    assert code == 0, err


def test_words_that_the_tokenizer_lacks_are_told(folder, tmp_path, capsys):
    rows = [
        {"image": "0.png", "question": "what zebra is this ?", "answer": "red red zebu"},
        {"image": "1.png", "question": "this ?", "answer": "red"},
    ]
    (folder / "zebra.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["train", folder / "mine.py", "--data", folder / "zebra.jsonl", "--steps", "1", "--quiet", "--stages.align", "null"]
    argv += ["--stages.answers.optim.batch", "2", "--stages.answers.optim.accumulate", "1"]
    code, out, err = call(capsys, *argv, "--out", tmp_path / "a")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "warning" in line]
    assert "2 of 15 tokens (13.3%)" in line, "8 words and marks, 3 answer tokens and 3 more, less pictures, and begin and end of both"
    assert "<unk>" in line
    code, out, err = call(capsys, *argv[:2], "--out", tmp_path / "b", "--steps", "1", "--quiet")
    assert code == 0, err
    assert "warning" not in out


def test_problems_are_measured_on_their_test_split():
    """A file of all splits (ScienceQA), put as the recipe puts them."""
    recipe = config.load_recipe("llama_adapter")
    stage = recipe.stages[-1]
    trained = replace(recipe, stages=(replace(stage, data=replace(stage.data, path="problems.json")),))
    assert stage.data.choices == "llama_adapter"
    assert runs.to_measure(trained, "problems.json", "pictures") == Data(
        "eval", "problems.json", "pictures", split="test", choices="llama_adapter"
    )
    assert runs.to_measure(trained, "hub:mine", None).split == "train"
