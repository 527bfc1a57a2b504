"""Training a system and aligning it, a few steps on few scenes: who learns, what is logged, and that a killed run continues as if it had not been."""

import json
import math
import signal
import subprocess
import sys
import time
import typing
from dataclasses import replace
from functools import partial

import pytest
import torch
from mmfast.trainers import demo, preference, supervised
from mmfast.trainers.evaluate import Exam, caption_all
from mmfast.trainers.loop import Run, RunError
from mmfast.trainers.recipes.align.dpo import RECIPE as DPO
from mmfast.trainers.recipes.architectures.llava import RECIPE as LLAVA

from mmfast import spec
from mmfast.data import supervised as data
from mmfast.models import tiny
from mmfast.ops.preference import LOSSES


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data, "Shapes", partial(data.Shapes, count=96))


def steps(system, *counts):
    return replace(system, stages=tuple(replace(s, optim=replace(s.optim, steps=n)) for s, n in zip(system.stages, counts, strict=True)))


SMALL = steps(tiny(LLAVA), 6, 4, 8)


def rows(folder, *keys):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(k) for k in keys) for line in lines]


def test_each_stage_moves_its_parts_and_no_other(tmp_path):
    session = supervised.Session(SMALL, seed=0)
    run, first = Run(tmp_path), 0
    parts = {"encoder": "encoder.", "connector": "connector.", "embeddings": "language.model.embed_tokens.", "language": "language."}
    for stage in SMALL.stages:
        before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
        first = supervised.run_stage(session, run, stage, first_step=first, resume=False, save_every=None, quiet=True)
        moved = {name for name, p in session.model.named_parameters() if not torch.equal(p, before[name])}
        unread = {name for name in before if name.startswith(("encoder.vision.encoder.layers.2.", "encoder.vision.post_layernorm."))}
        expected = {name for name in before if name.startswith(tuple(parts[p] for p in stage.train))} - unread
        assert moved == expected, stage.name
    assert [n for (n,) in rows(tmp_path, "step")] == list(range(1, 19))
    assert [s for (s,) in rows(tmp_path, "stage")] == ["words"] * 6 + ["align"] * 4 + ["instruct"] * 8


def test_the_same_seed_gives_the_same_curve_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        supervised.train_system(SMALL, Run(tmp_path / name), seed=seed, quiet=True)
    a, b, c = (rows(tmp_path / name, "loss", "grad_norm") for name in "abc")
    assert a == b != c


def test_losses_fall(tmp_path):
    supervised.train_system(steps(tiny(LLAVA), 40, 4, 60), Run(tmp_path), quiet=True)
    loss = [value for (value,) in rows(tmp_path, "loss")]
    assert sum(loss[34:40]) < 0.8 * sum(loss[:6])
    assert sum(loss[-6:]) < 0.7 * sum(loss[44:50])


KILLED = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from mmfast.data import supervised as data
from mmfast.models import tiny
from mmfast.trainers import supervised
from mmfast.trainers.loop import Run
from mmfast.trainers.recipes.architectures.llava import RECIPE
torch.set_num_threads(1)
data.Shapes = partial(data.Shapes, count=96)
system = tiny(RECIPE)
stages = tuple(replace(s, optim=replace(s.optim, steps=n)) for s, n in zip(system.stages, (6, 4, 30)))
resume = sys.argv[2] == "resume"
run = Run(Path(sys.argv[1]), resume=resume)
supervised.train_system(replace(system, stages=stages), run, resume=resume, save_every=3, quiet=True)
"""


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    """kill -9 at whatever moment it is, twice, then --resume: curve and weights are those of the run that was left alone."""

    def start(name, mode):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / name), mode])

    assert start("whole", "new").wait() == 0
    for at, mode in ((8, "new"), (25, "resume")):
        process, metrics, deadline = start("cut", mode), tmp_path / "cut" / "metrics.jsonl", time.time() + 120
        while time.time() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < at):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("cut", "resume").wait() == 0
    keys = ("step", "stage", "loss", "lr", "grad_norm")
    assert rows(tmp_path / "cut", *keys) == rows(tmp_path / "whole", *keys)
    weights = [(tmp_path / n / "checkpoints" / "step-40" / "model.safetensors").read_bytes() for n in ("cut", "whole")]
    assert weights[0] == weights[1]


# -------------------------------------------------------------------------------------------------------------- preference


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that has seen enough to say something false."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Shapes", partial(data.Shapes, count=96))
        session = supervised.train_system(steps(tiny(LLAVA), 30, 4, 80), Run(tmp_path_factory.mktemp("base")), quiet=True)
    return session, {k: v.clone() for k, v in session.model.state_dict().items()}


ALIGN = replace(tiny(DPO), data=replace(tiny(DPO).data, scenes=120), optim=replace(tiny(DPO).optim, steps=12, batch=8, lr=1e-3, warmup=0.0))


def test_dpo_starts_at_ln_2_and_learns_the_pairs(base, tmp_path):
    session, weights = base
    session.model.load_state_dict(weights)
    preference.train_alignment(ALIGN, session, Run(tmp_path), quiet=True)
    logged = rows(tmp_path, "loss", "rewards/margins", "rewards/accuracies")
    assert logged[0][0] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are the same model at the start"
    assert logged[0][1] == pytest.approx(0, abs=1e-6)
    assert logged[-1][0] < 0.6
    assert logged[-1][1] > 0.2
    assert logged[-1][2] > 0.7
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "len"} <= set(first)
    assert "len" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    frozen = [
        name
        for name, p in session.model.state_dict().items()
        if name.startswith(("encoder.", "connector.")) and not torch.equal(p, weights[name])
    ]
    assert frozen == []


@pytest.mark.parametrize("loss_type", typing.get_args(spec.PairLoss))
def test_every_pair_loss_pulls_the_answers_apart(base, tmp_path, loss_type):
    assert loss_type in LOSSES
    session, weights = base
    session.model.load_state_dict(weights)
    term = replace(ALIGN.terms[0], loss_type=loss_type, label_smoothing=0.1 if loss_type in ("exo_pair", "robust") else 0.0)
    optim = replace(ALIGN.optim, steps=6)
    preference.train_alignment(replace(ALIGN, terms=(term,), optim=optim), session, Run(tmp_path), quiet=True)
    margins = [m for (m,) in rows(tmp_path, "rewards/margins")]
    assert margins[-1] > margins[0]


def test_pairs_are_the_models_own_false_captions(base):
    session, weights = base
    session.model.load_state_dict(weights)
    pictures, pairs = preference.own_pairs(session, ALIGN)
    assert len(pictures) == len(pairs) > 20
    scenes = session.world.scenes("pairs", 120)
    spoken, _ = caption_all(session, session.states(torch.from_numpy(session.world.render(scenes))), "bare")
    false = {text: scene for scene, text in zip(scenes, spoken, strict=True)}
    for i, (at, prompt, chosen, rejected) in enumerate(pairs):
        assert at == i
        assert prompt == "<image> describe the picture:"
        assert rejected in false
        assert chosen != rejected


def test_log_probabilities_are_those_of_one_row_at_a_time(base):
    """Padding, packing two views into one pass and sharing a picture change nothing."""
    session, weights = base
    session.model.load_state_dict(weights)
    source = preference.make_source(session, ALIGN)
    states = session.states(source.pictures)
    index = torch.tensor([3, 0, 7])
    with torch.no_grad():
        (chosen, rejected), (count, _) = preference.view_logps(session, source, states, ["chosen", "rejected"], index)
        for text, got in (("chosen", chosen), ("rejected", rejected)):
            for at, value in zip(index.tolist(), got.tolist(), strict=True):
                ids, labels = source.rows[text].batch(torch.tensor([at]))
                logits = session.model(ids, image_states=states[source.picture_of[at]][None]).logits.double()
                want = sum(
                    torch.log_softmax(logits[0, t], -1)[labels[0, t + 1]] for t in range(ids.shape[1] - 1) if labels[0, t + 1] != -100
                )
                assert value == pytest.approx(want.item(), abs=1e-4)
    assert count[0] == (source.rows["chosen"].labels[3] != -100).sum()


def test_shuffled_control_keeps_the_texts(base):
    session, weights = base
    session.model.load_state_dict(weights)
    plain = preference.make_source(session, ALIGN)
    shuffled = preference.make_source(session, replace(ALIGN, data=replace(ALIGN.data, shuffled=True)))
    assert torch.equal(plain.rows["chosen"].ids, shuffled.rows["chosen"].ids)
    assert sorted(map(tuple, plain.rows["rejected"].ids.tolist())) == sorted(map(tuple, shuffled.rows["rejected"].ids.tolist()))
    assert not torch.equal(plain.rows["rejected"].ids, shuffled.rows["rejected"].ids)


def test_a_term_that_names_no_view(base, tmp_path):
    session, _ = base
    with pytest.raises(RunError, match="speaks of the view 'chozen'"):
        preference.train_alignment(replace(ALIGN, terms=(spec.Contrast("chozen", "rejected"),)), session, Run(tmp_path), quiet=True)


def test_preference_records_of_ones_own(base, tmp_path):
    from PIL import Image

    session, weights = base
    session.model.load_state_dict(weights)
    Image.new("RGB", (80, 70), "red").save(tmp_path / "a.png")
    good = {"image": "a.png", "prompt": "describe the picture:", "chosen": "we see a red circle.", "rejected": "we see a green ring."}
    for bad, words in (
        ({**good, "chosen": ""}, "lacks chosen"),
        ({**good, "rejected": good["chosen"]}, "same text"),
        ({**good, "image": "b.png"}, "b.png does not exist"),
    ):
        (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in [good, good, bad]))
        own = replace(ALIGN, data=spec.Pairs("mine", path=str(tmp_path / "p.jsonl")))
        with pytest.raises(ValueError, match=f"record 2: .*{words}"):
            preference.make_source(session, own)
        assert len(preference.make_source(session, replace(own, data=replace(own.data, on_bad_record="skip")))) == 2


def test_bases_are_cached_by_world_recipe_and_seed(tmp_path):
    small = steps(tiny(LLAVA), 2, 2, 2)
    session, folder = supervised.base_model(small, seed=0, cache=tmp_path, quiet=True)
    began = (folder / "metrics.jsonl").stat().st_mtime_ns
    again, same = supervised.base_model(small, seed=0, cache=tmp_path, quiet=True)
    assert same == folder
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == began, "not trained again"
    assert all(torch.equal(a, b) for a, b in zip(session.model.parameters(), again.model.parameters(), strict=True))
    others = {supervised.base_name(small, 0), supervised.base_name(small, 1), supervised.base_name(steps(small, 2, 2, 3), 0)}
    assert len(others) == 3
    assert supervised.base_name(replace(small, paper="elsewhere"), 0) == supervised.base_name(small, 0)


def test_exam(base):
    session, weights = base
    session.model.load_state_dict(weights)
    exam = Exam(session, scenes=30, statistics_scenes=300)
    metrics, details = exam(session)
    assert {"chair_i", "chair_s", "recall", "len", "pope_random_f1", "pope_popular_f1", "pope_adversarial_f1", "yes_ratio"} <= set(metrics)
    assert metrics["chair_i"] == pytest.approx(details["false"].sum() / details["mentions"].sum())
    assert metrics["chair_s"] == pytest.approx((details["false"] > 0).mean())
    # One question at a time, its picture through the tower: the same answers.
    states = session.states(exam.pictures)
    said = exam.answers(session, states, "bare")
    yes, no = session.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for i in (0, 5, 11):
        ids, _ = session.encoder("bare")([(f"<image> {exam.questions[i].text}", None)])
        pixels = session.pixels(exam.pictures[exam.questions[i].image][None])
        with torch.no_grad():
            logits = session.model(torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        assert said[i] == bool(logits[yes] > logits[no])


@pytest.mark.slow
def test_demo_smoke(tmp_path, monkeypatch):
    """Every step of the demo, far too short to learn anything: all files appear, and the page holds pictures and curves."""
    pytest.importorskip("easy_vqa")
    monkeypatch.setenv("MMFAST_CACHE", str(tmp_path / "cache"))
    summary = demo.run_demo(tmp_path / "demo", steps=30, scenes=30, quiet=True)
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {"recipe.json", "metrics.jsonl", "eval.json", "before.json", "checkpoints", "samples", "report.html", "summary.json"} <= names
    on_disk = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(on_disk) >= {"before", "after", "easy_vqa_accuracy", "seconds", "seed"}
    assert 0 < summary["easy_vqa_accuracy"] < 1
    assert json.loads((tmp_path / "demo" / "recipe.json").read_text())["seed"] == 0
    text = (tmp_path / "demo" / "report.html").read_text()
    assert text.count("<img") >= 12
    assert text.count("<polyline") >= 5
