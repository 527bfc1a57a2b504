"""Training a system and aligning it, a few steps on few scenes: who learns, what is logged, and that a killed run continues as if it had not been."""

import json
import math
import subprocess
import sys
import types
import typing
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from mmfast.trainers import demo, preference, supervised, trackers
from mmfast.trainers.checkpoint import Run, RunError
from mmfast.trainers.evaluate import Exam, caption_all
from mmfast.trainers.loop import Options
from mmfast.trainers.plan import out_of_memory_hint
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
        first = supervised.run_stage(session, run, stage, first_step=first, options=Options(quiet=True))
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
import os, random, signal, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from mmfast.data import supervised as data
from mmfast.models import tiny
from mmfast.trainers import checkpoint, supervised
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.loop import Options
from mmfast.trainers.plan import out_of_memory_hint
from mmfast.trainers.recipes.architectures.llava import RECIPE

torch.set_num_threads(1)
data.Shapes = partial(data.Shapes, count=96)
system = tiny(RECIPE)
optims = [replace(s.optim, steps=n, batch=8, accumulate=2) for s, n in zip(system.stages, (10, 10, 40))]
system = replace(system, stages=tuple(replace(s, optim=o) for s, o in zip(system.stages, optims)))
folder = Path(sys.argv[1])


def start(name, resume, torn_at=None):
    "A process of its own; with ``torn_at`` it dies while that step's checkpoint is half written."
    if child := os.fork():
        return child
    if torn_at is not None:
        def torn(tensors, path, whole=checkpoint.save_file):
            whole(tensors, path)
            if f".step-{torn_at}." in str(path):
                path.write_bytes(path.read_bytes()[:-100])
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_file = torn
    run = Run(folder / name, resume=resume)
    supervised.train_system(system, run, options=Options(resume=resume, save_every=3, quiet=True))
    os._exit(0)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


assert os.waitpid(start("whole", False), 0)[1] == 0
draw, killed = random.Random(int(sys.argv[2])), 0
for i, at in enumerate(sorted(draw.sample(range(1, 45), 19))):
    child = start("cut", i > 0)
    while lines(folder / "cut" / "metrics.jsonl") < at and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.002)
    time.sleep(draw.random() * 0.05)  # anywhere in a step, or in a checkpoint's write
    os.kill(child, signal.SIGKILL)
    killed += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
child = start("cut", True, torn_at=56)
killed += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
assert os.waitpid(start("cut", True), 0)[1] == 0
print(killed)
"""


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp_path):
    """kill -9 at random moments of a run of 60 steps in three stages, once in the middle of a checkpoint's write, each time followed by
    --resume: curve and weights are those of the run that was left alone."""
    out = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "0"], capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout.split()[-1]) == 20
    keys = ("step", "stage", "loss", "lr", "grad_norm")
    assert rows(tmp_path / "cut", *keys) == rows(tmp_path / "whole", *keys)
    assert len(rows(tmp_path / "whole", "step")) == 60
    weights = [(tmp_path / n / "checkpoints" / "step-60" / "model.safetensors").read_bytes() for n in ("cut", "whole")]
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
    optim = replace(ALIGN.optim, steps=6, lr=2e-4)
    preference.train_alignment(replace(ALIGN, terms=(term,), optim=optim), session, Run(tmp_path), quiet=True)
    margins = [m for (m,) in rows(tmp_path, "rewards/margins")]
    # DiscoPOP's slope at a margin of 0 is upward (its modulation changes fastest there): it starts the wrong way, into a valley below 0.
    assert (margins[-1] < margins[0]) if loss_type == "discopop" else (margins[-1] > margins[0])


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
        batch = source.batch(index)
        chosen, rejected = preference.view_logps(session, batch, states).chunk(2)
        count = batch["scored"]
        source.packing = True
        packed = preference.view_logps(session, source.batch(index), states)
        torch.testing.assert_close(packed, torch.cat([chosen, rejected]), atol=1e-4, rtol=0)
        for text, got in (("chosen", chosen), ("rejected", rejected)):
            for at, value in zip(index.tolist(), got.tolist(), strict=True):
                ids, labels, _ = source.texts[text].batch(torch.tensor([at]))
                logits = session.model(ids, image_states=states[source.shown[at][0]][None]).logits.double()
                want = sum(
                    torch.log_softmax(logits[0, t], -1)[labels[0, t + 1]] for t in range(ids.shape[1] - 1) if labels[0, t + 1] != -100
                )
                assert value == pytest.approx(want.item(), abs=1e-4)
    assert count[0] == (source.texts["chosen"].labels[3] != -100).sum()


def test_shuffled_control_keeps_the_texts(base):
    session, weights = base
    session.model.load_state_dict(weights)
    plain = preference.make_source(session, ALIGN)
    shuffled = preference.make_source(session, replace(ALIGN, data=replace(ALIGN.data, shuffled=True)))
    assert torch.equal(plain.texts["chosen"].ids, shuffled.texts["chosen"].ids)
    assert sorted(map(tuple, plain.texts["rejected"].ids.tolist())) == sorted(map(tuple, shuffled.texts["rejected"].ids.tolist()))
    assert not torch.equal(plain.texts["rejected"].ids, shuffled.texts["rejected"].ids)


def test_a_term_that_names_no_view(base, tmp_path):
    session, _ = base
    with pytest.raises(RunError, match="speaks of the view 'chozen'"):
        preference.train_alignment(replace(ALIGN, terms=(spec.Contrast("chozen", "rejected"),)), session, Run(tmp_path), quiet=True)


def test_preference_records_of_ones_own(base, tmp_path):
    """Records take the way of built-in pairs: the same log-probabilities, the same start."""
    from PIL import Image

    session, weights = base
    session.model.load_state_dict(weights)
    Image.new("RGB", (80, 70), "red").save(tmp_path / "a.png")
    good = {"image": "a.png", "prompt": "describe the picture:", "chosen": "we see a red circle.", "rejected": "we see a green ring."}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in [good, good, good, {**good, "rejected": "nothing."}]))
    own = replace(ALIGN, data=spec.Pairs("mine", path=str(tmp_path / "p.jsonl")), optim=replace(ALIGN.optim, batch=4))
    source = preference.make_source(session, own)
    got = preference.view_logps(session, source.batch(torch.tensor([0, 3])), None)
    for at, text in ((0, good["chosen"]), (1, good["chosen"]), (2, good["rejected"]), (3, "nothing.")):
        ids, labels = session.encoder("bare")([("<image>\ndescribe the picture:", text)])
        logits = session.model(torch.tensor([ids]), pixel_values=session.pixels(source.load_pictures(torch.tensor([0])))).logits
        want = sum(torch.log_softmax(logits[0, t], -1)[labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] != -100)
        assert got[at].item() == pytest.approx(want.item(), abs=1e-4)
    preference.train_alignment(own, session, Run(tmp_path / "run"), quiet=True)
    assert rows(tmp_path / "run", "loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in [good, {**good, "chosen": ""}]))
    with pytest.raises(ValueError, match=r"record 1 "):
        preference.make_source(session, own)


def test_three_references_are_one(base, tmp_path):
    """Cached, a frozen copy: the same losses. A cache of other weights is refused by its key."""
    session, weights = base
    curves = {}
    for kind in ("cached", "frozen"):
        session.model.load_state_dict(weights)
        optim = replace(ALIGN.optim, steps=4)
        preference.train_alignment(replace(ALIGN, reference=kind, optim=optim), session, Run(tmp_path / kind), quiet=True)
        curves[kind] = rows(tmp_path / kind, "loss")
    torch.testing.assert_close(torch.tensor(curves["cached"]), torch.tensor(curves["frozen"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["cached", "frozen", "adapter_off"])
def test_policy_and_reference_see_the_same_pictures(base, tmp_path, kind):
    """Also those of a policy whose own training saw them augmented: before the first step they do not differ."""
    session, weights = base
    session = supervised.Session(replace(session.system, image=replace(session.system.image, augment=True)), seed=0)
    session.model.load_state_dict(weights)
    lora = spec.Lora(rank=2, alpha=2, dropout=0.0) if kind == "adapter_off" else None
    train = () if lora else ALIGN.train
    optim = replace(ALIGN.optim, steps=1)
    preference.train_alignment(
        replace(ALIGN, reference=kind, lora=lora, train=train, optim=optim), session, Run(tmp_path), quiet=True
    )  # fmt: skip
    ((margin, loss),) = rows(tmp_path, "rewards/margins", "loss")
    assert (margin, loss) == (pytest.approx(0, abs=1e-6), pytest.approx(math.log(2), abs=1e-6))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom", "qwen3_next"])
def test_rows_that_are_not_kept_apart_are_not_packed(tmp_path, monkeypatch, family):
    monkeypatch.setattr(preference, "own_pairs", few_pairs)
    system = replace(SMALL, language=replace(SMALL.language, family=family, tied=False), stages=SMALL.stages[-1:])
    stage = replace(system.stages[0], optim=replace(system.stages[0].optim, steps=1, batch=4))
    alignment = replace(ALIGN, policy=system, optim=replace(ALIGN.optim, steps=1))
    session, options = supervised.Session(system, seed=0), Options(quiet=True, compute=spec.Compute(packing=True))
    torch.manual_seed(5)
    before, training = torch.get_rng_state(), session.model.training
    if leaks := family in ("bloom", "qwen3_next"):
        told = pytest.raises(RunError, match=f"^compute.packing: the decoder of {family} cannot keep packed rows apart; leave packing off$")
    with told if leaks else nullcontext():
        session.check_packing()
    assert torch.equal(torch.get_rng_state(), before)
    assert session.model.training == training
    with told if leaks else nullcontext():
        supervised.run_stage(session, Run(tmp_path / "a"), stage, first_step=0, options=options)
    with told if leaks else nullcontext():
        preference.train_alignment(alignment, session, Run(tmp_path / "b"), options=options)


def test_losses_without_a_reference_compute_none(base, tmp_path, monkeypatch):
    session, weights = base
    session.model.load_state_dict(weights)
    monkeypatch.setattr(preference, "cached_reference", lambda *a: pytest.fail("a reference was computed"))
    alignment = replace(ALIGN, terms=(replace(ALIGN.terms[0], loss_type="simpo"),), optim=replace(ALIGN.optim, steps=2))
    preference.train_alignment(alignment, session, Run(tmp_path), quiet=True)


def test_a_stale_reference_is_not_used(base, tmp_path, capsys):
    session, weights = base
    session.model.load_state_dict(weights)
    source = preference.make_source(session, ALIGN)
    first = preference.cached_reference(ALIGN, session, source, None, tmp_path)
    stamp = (tmp_path / "reference.safetensors").stat().st_mtime_ns
    again = preference.cached_reference(ALIGN, session, source, None, tmp_path)
    assert torch.equal(first, again)
    assert (tmp_path / "reference.safetensors").stat().st_mtime_ns == stamp, "read, not computed"
    assert "anew" not in capsys.readouterr().out
    with torch.no_grad():
        session.model.language.get_input_embeddings().weight[0, 0] += 1
    preference.cached_reference(ALIGN, session, source, None, tmp_path)
    assert "belongs to other data, weights or settings" in capsys.readouterr().out
    source.texts["chosen"].labels[0, -3:] = -100
    preference.cached_reference(ALIGN, session, source, None, tmp_path)
    assert "belongs to other data" in capsys.readouterr().out
    session.model.load_state_dict(weights)


def test_bases_are_cached_by_world_recipe_and_seed(tmp_path):
    small = steps(tiny(LLAVA), 2, 2, 2)
    session, folder = supervised.base_model(small, options=Options(quiet=True), cache=tmp_path)
    began = (folder / "metrics.jsonl").stat().st_mtime_ns
    again, same = supervised.base_model(small, options=Options(quiet=True), cache=tmp_path)
    assert same == folder
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == began, "not trained again"
    assert all(torch.equal(a, b) for a, b in zip(session.model.parameters(), again.model.parameters(), strict=True))
    others = {supervised.base_name(small, 0), supervised.base_name(small, 1), supervised.base_name(steps(small, 2, 2, 3), 0)}
    assert len(others) == 3
    assert supervised.base_name(replace(small, paper="elsewhere"), 0) == supervised.base_name(small, 0)
    half = Options(quiet=True, compute=spec.Compute(precision="bf16"))  # an alignment's; the policy's own is fp32
    trained, other = supervised.base_model(small, options=half, cache=tmp_path)
    assert other != folder
    assert not all(torch.equal(a, b) for a, b in zip(session.model.parameters(), trained.model.parameters(), strict=True))
    again, same = supervised.base_model(small, options=half, cache=tmp_path)
    assert (same, again.dtype) == (other, trained.dtype)
    assert all(torch.equal(a, b) for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True))


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


# ------------------------------------------------------------------------------------------------------------------ the loop's options


def losses_with(tmp_path, name, **compute):
    system = replace(SMALL, compute=replace(SMALL.compute, **compute))
    supervised.train_system(system, Run(tmp_path / name), quiet=True)
    return torch.tensor(rows(tmp_path / name, "loss", "grad_norm"), dtype=torch.float64)


def test_how_it_is_computed_changes_nothing(tmp_path):
    """Recomputed activations, packed rows, padding to a multiple: the same curve."""
    plain = losses_with(tmp_path, "plain")
    for name, options in (("checkpointing", dict(checkpointing=True)), ("packing", dict(packing=True)), ("pad_to", dict(pad_to=16))):
        torch.testing.assert_close(losses_with(tmp_path, name, **options), plain, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_activations_are_recomputed(tmp_path, monkeypatch):
    import torch.utils.checkpoint as module

    calls, whole = [], module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: calls.append(1) or whole(*a, **k))
    session = supervised.Session(SMALL, seed=0)
    session.let_train(("encoder", "connector", "language"), None)
    session.model.checkpoint_activations()
    model = session.model
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert len(layers) >= 3 + 2, "the language model's and the tower's blocks"
    assert model.language.is_gradient_checkpointing


def test_out_of_memory_names_what_to_change(tmp_path):
    session = supervised.Session(SMALL, seed=0)

    def boom(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    session.model.hidden = boom
    options = Options(quiet=True, out_of_memory=lambda stage: out_of_memory_hint(SMALL, stage))
    with pytest.raises(RunError, match=r"out of memory at step 1 \(instruct\).*--[a-z.]+.*--[a-z.]+.*--[a-z.]+.*Tried to allocate"):
        supervised.run_stage(session, Run(tmp_path), SMALL.stages[2], first_step=0, options=options)


def test_measures_and_samples_during_training(tmp_path):
    supervised.train_system(SMALL, Run(tmp_path), options=Options(quiet=True, eval_every=4, compute=SMALL.compute))
    measured = [n for n, stage, value in rows(tmp_path, "step", "stage", "recall") if value is not None]
    assert measured == [7, 10, 11, 14, 18], "the first step of a stage, every fourth, and the last"
    told = rows(tmp_path, "pope_adversarial_accuracy", "recall", "len")
    assert all(v is not None for v in told[-1])
    assert len((tmp_path / "samples" / "steps.jsonl").read_text().splitlines()) >= 3 * 4


def test_trackers_hear_every_step(tmp_path, monkeypatch):
    heard = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: heard.append(options) or types.SimpleNamespace(log=lambda values, step: heard.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else True)
    with pytest.raises(RunError, match="trackio: the package is not installed; pip install trackio"):
        trackers.open_trackers("wandb,trackio", tmp_path / "run", {})
    heard.clear()
    options = Options(quiet=True, trackers=trackers.open_trackers("wandb", tmp_path / "run", {"name": "x"}))
    supervised.train_system(SMALL, Run(tmp_path / "run"), options=options)
    assert heard[0] == {"project": "mmfast", "name": "run", "config": {"name": "x"}}
    assert [step for step, _ in heard[1:]] == list(range(1, 19))
    assert heard[-1][1]["loss"] == rows(tmp_path / "run", "loss")[-1][0]


# ------------------------------------------------------------------------------------------------------ adapters over what trained

ADAPTERS = spec.Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj"))


@pytest.mark.parametrize(("parts", "lora"), [(("language",), None), (("connector",), None), ((), ADAPTERS)])
def test_activations_are_recomputed_whatever_trains(monkeypatch, parts, lora):
    """A frozen language model that gradients pass holds as many activations as one that learns."""
    session = supervised.Session(SMALL, seed=0)
    batch = session.source(SMALL.stages[2].data, "bare").batch(torch.arange(2))
    session.let_train(parts, lora)
    session.model.train()
    if lora is not None:  # B is 0, and with it A's gradient
        torch.manual_seed(0)
        [torch.nn.init.normal_(p, std=0.1) for p in session.model.parameters() if p.requires_grad]

    def gradients():
        session.model.zero_grad()
        supervised.token_logps(session, batch, None)[0].sum().backward()
        return [p.grad for p in session.model.parameters() if p.requires_grad]

    calls = []
    for layer in session.model.language.get_decoder().layers:
        layer.input_layernorm.register_forward_hook(lambda *a: calls.append(1))
    plain, once = gradients(), len(calls)
    session.model.checkpoint_activations()
    again = gradients()
    assert len(calls) == 3 * once, "forward, and once more in backward"
    torch.testing.assert_close(again, plain)
    session.model.eval()
    assert not any(module.training for module in session.model.modules())


def test_stages_agree_on_their_adapters(tmp_path):
    stages = [replace(s, train=("connector",), lora=replace(ADAPTERS, rank=r)) for s, r in zip(SMALL.stages[1:], (4, 2), strict=True)]
    with pytest.raises(RunError, match=r"an earlier stage added Lora\(rank=4.*another asks for Lora\(rank=2"):
        supervised.train_system(replace(SMALL, stages=tuple(stages)), Run(tmp_path), quiet=True)


def test_a_policy_s_own_adapters_belong_to_the_reference(tmp_path):
    """Switched off would be the alignment's adapters alone, and its checkpoint opens without those of the stages."""
    system = replace(SMALL, stages=(*SMALL.stages[:2], replace(SMALL.stages[2], train=("connector",), lora=ADAPTERS)))
    session = supervised.train_system(system, Run(tmp_path / "base"), quiet=True)
    ids = torch.tensor([[1, 9, 8, 7]])
    with torch.no_grad():
        [p.add_(0.1) for n, p in session.model.named_parameters() if ".lora_B" in n]
        want = session.model.hidden(ids)
    align = replace(ALIGN, policy=system, reference="adapter_off", lora=ADAPTERS, train=(), optim=replace(ALIGN.optim, steps=2, lr=1e-2))
    run = Run(tmp_path / "run")
    preference.own_pairs, whole = few_pairs, preference.own_pairs
    try:
        preference.train_alignment(align, session, run, quiet=True)
    finally:
        preference.own_pairs = whole
    assert rows(tmp_path / "run", "loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    model = session.model.eval()
    with torch.no_grad(), preference.adapters_off(model):
        torch.testing.assert_close(model.hidden(ids), want)
    with torch.no_grad():
        assert (model.hidden(ids) - want).abs().max() > 1e-3
    again = supervised.Session(system, seed=0)
    supervised.restore(again, (align,), run.last_checkpoint()[1])
    with torch.no_grad():
        assert torch.equal(again.model.hidden(ids), model.hidden(ids))


def few_pairs(session, alignment):
    texts = [("we see a red circle .", "we see a green ring and a blue square ."), ("we see two red rings .", "we see a star .")] * 8
    pictures = torch.from_numpy(session.world.render(session.world.scenes("train", 16)))
    return pictures, [(i, "<image> describe the picture:", *t) for i, t in enumerate(texts)]


def test_a_base_s_steps_are_not_the_tracker_s(tmp_path):
    """Its steps are numbered like those of the run that asks for it, and a tracker takes each number once."""
    heard = []
    options = Options(quiet=True, trackers=(heard.append,))
    supervised.base_model(steps(tiny(LLAVA), 1, 1, 1), options=options, cache=tmp_path)
    assert heard == []


def test_terms_add_up_with_their_weights_over_micro_batches(base, tmp_path, monkeypatch):
    """By hand from the log-probabilities: a smoothed, weighted contrast and a likelihood per token."""
    session, weights = base
    session.model.load_state_dict(weights)
    monkeypatch.setattr(preference, "own_pairs", few_pairs)
    caught = {}
    monkeypatch.setattr(preference, "train", lambda run, objective, source, **k: caught.update(objective=objective, source=source))
    terms = (
        spec.Contrast("chosen", "rejected", weight=0.5, loss_type="robust", label_smoothing=0.2),
        spec.Likelihood("chosen", weight=2.0),
    )
    preference.train_alignment(replace(ALIGN, terms=terms, beta=0.3), session, Run(tmp_path), quiet=True)
    objective, source = caught["objective"], caught["source"]
    states = session.states(source.pictures)

    def scores():
        batch = source.batch(torch.arange(7))
        with torch.no_grad():
            return preference.view_logps(session, batch, states).double().view(2, -1), batch["scored"].view(2, -1)

    start, tokens = scores()
    with torch.no_grad():
        [p.add_(0.02 * torch.randn_like(p)) for p in session.model.language.parameters()]
    policy, _ = scores()
    margin = 0.3 * ((policy[0] - start[0]) - (policy[1] - start[1]))
    # Robust DPO, arXiv:2403.00409.
    pair = (-0.8 * torch.nn.functional.logsigmoid(margin) + 0.2 * torch.nn.functional.logsigmoid(-margin)) / 0.6
    want = 0.5 * pair.mean() + 2 * -policy[0].sum() / tokens[0].sum()
    parts = [source.batch(index) for index in torch.arange(7).split([5, 2])]
    totals = sum(part["counts"] for part in parts)
    got, measures = zip(*(objective(part, totals) for part in parts), strict=True)
    assert float(sum(got)) == pytest.approx(float(want), rel=1e-5)
    assert float(sum(m["rewards/margins"] for m in measures)) == pytest.approx(float(margin.mean()), rel=1e-4)
    assert float(sum(m["rewards/accuracies"] for m in measures)) == pytest.approx(float((margin > 0).double().mean()))
    session.model.load_state_dict(weights)
