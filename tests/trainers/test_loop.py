"""The loop: order and schedule as functions of the step, resume bit for bit, checkpoints whole or absent."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mmfast.trainers import checkpoint, config, loop, place
from torch import nn

from mmfast.models import build
from mmfast.spec import Compute, Dino, Optim

OPTIM = Optim(lr=0.05, steps=12, batch=4, warmup=3, hold=0.2, floor=0.1, weight_decay=0.01)


class Noisy(nn.Module):
    """Draws random numbers in every step, as dropout does, and has tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)
        self.tied = self.b

    def forward(self, x):
        return self.tied(torch.dropout(torch.tanh(self.a(x)), 0.3, self.training))


DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))


class Numbers:
    """Rows of DATA; a batch counts its rows."""

    def __init__(self, data=DATA):
        self.data = data

    def __len__(self):
        return len(self.data)

    def batch(self, index):
        return {"x": self.data[index], "counts": torch.tensor([len(index)], dtype=torch.float64)}


def squared(model, target=None):
    """Mean over the step's rows of the squared distance to the input, or to a number."""

    def step(batch, totals):
        x = batch["x"]
        loss = (model(x) - (x if target is None else target)).square().mean(-1).sum() / totals[0].float()
        return loss, {"tokens": len(x), "rows": len(x) / totals[0]}

    return loop.Objective(step, model)


def fit(folder, *, resume=False, stop_at=None, optim=OPTIM, stages=("one", "two"), save_every=5, compute=None):
    """Two stages over one model; ``stop_at`` kills the run in the middle of that step."""
    torch.manual_seed(42)
    model, run, first = Noisy(), checkpoint.Run(folder, resume=resume), 0
    taken = [0]
    if resume and (last := run.last_checkpoint()):
        checkpoint.load_model(model, last[1])
    objective = squared(model)
    inner = objective.step

    def step(batch, totals):
        if stop_at is not None and len(run_steps(folder)) == stop_at:
            raise KeyboardInterrupt
        taken[0] += 1
        return inner(batch, totals)

    objective.step = step
    options = loop.Options(seed=3, resume=resume, save_every=save_every, quiet=True, compute=compute or Compute())
    for stage in stages:
        model.requires_grad_(stage == "one")
        model.b.requires_grad_(True)
        first = loop.train(run, objective, Numbers(), optim=optim, stage=stage, options=options, first_step=first)
    return model, taken[0]


def run_steps(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(folder):
    return [(row["step"], row["stage"], row["loss"], row["lr"], row["grad_norm"]) for row in run_steps(folder)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop_at", [1, 5, 7, 11, 12, 13, 14, 17, 23])
def test_resume_continues_the_curve_bit_for_bit(tmp_path, stop_at, accumulate):
    """Stopped before the first checkpoint, on one, between two, at the border of the stages and right behind it."""
    optim = replace(OPTIM, accumulate=accumulate)
    whole, _ = fit(tmp_path / "whole", optim=optim)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=stop_at, optim=optim)
    resumed, _ = fit(tmp_path / "cut", resume=True, optim=optim)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_not_trained_again(tmp_path):
    whole, _ = fit(tmp_path)
    before = curve(tmp_path)
    again, taken = fit(tmp_path, resume=True)
    assert taken == 0
    assert curve(tmp_path) == before
    assert torch.equal(whole.a.weight, again.a.weight)


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(checkpoint.RunError, match=r"exists and is not empty; continue it with --resume or choose another --out"):
        checkpoint.Run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.RunError, match="is a file"):
        checkpoint.Run(tmp_path / "file")


def test_order_is_a_function_of_the_step():
    order = loop.Order(10, 4, seed=3)
    seen = [order(step).tolist() for step in range(6)]
    assert [loop.Order(10, 4, seed=3)(step).tolist() for step in (5, 0, 3)] == [seen[5], seen[0], seen[3]]
    assert all(len(set(seen[2 * e] + seen[2 * e + 1])) == 8 for e in range(3)), "an epoch repeats nothing"
    assert seen[:2] != seen[2:4], "epochs differ"
    assert seen != [loop.Order(10, 4, seed=4)(step).tolist() for step in range(6)]
    assert sorted(loop.Order(3, 8, seed=0)(5).tolist()) == [0, 1, 2]


def test_a_steps_seed_is_torchs():
    here = place.Place(torch.device("cpu"))
    for seed in (0, 5, (1 << 63) - 1):
        here.seed(seed)
        got = torch.randn(7), torch.dropout(torch.ones(7), 0.5, True)
        torch.manual_seed(seed)
        torch.testing.assert_close((torch.randn(7), torch.dropout(torch.ones(7), 0.5, True)), got, rtol=0, atol=0)


def test_schedules():
    """Against transformers' own where it has the schedule."""
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for kind, stock in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = stock(optimizer, 10, 100)
        optim = Optim(lr=1.0, steps=100, schedule=kind, warmup=10)
        for step in range(100):
            if step >= 10:  # theirs starts its warm-up at 0, ours takes the first step too
                assert loop.rate(optim, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"]), (kind, step)
            optimizer.step()
            scheduler.step()
    held = [loop.rate(OPTIM, step, 12) / 0.05 for step in range(12)]
    want = [(s + 1) / 3 if s < 3 else 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (s - 3) / 9)) for s in range(12)]
    assert held == pytest.approx(want), "the plateau ends before warm-up does"
    plateau = Optim(lr=1.0, steps=100, warmup=10, hold=0.5)
    assert [loop.rate(plateau, s, 100) for s in (9, 30, 50, 75, 99)] == pytest.approx([1, 1, 1, 0.5, 0.5 + 0.5 * math.cos(math.pi * 0.98)])
    constant = Optim(lr=1.0, steps=100, schedule="constant", warmup=0.1)
    assert [loop.rate(constant, s, 100) for s in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert loop.total_steps(Optim(lr=1, epochs=3, batch=4, accumulate=2), items=100) == 38
    for items in (1, 40, 64, 100):  # a step has no more rows than there are items
        order = loop.Order(items, 128, seed=0)
        assert loop.total_steps(Optim(lr=1, epochs=3, batch=128), items) * order.rows == 3 * items


def trained(folder, optim, *, stage="s", model=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Linear(3, 3)
    options = loop.Options(quiet=True, **kwargs)
    loop.train(checkpoint.Run(folder), squared(model, 1.0), Numbers(), optim=optim, stage=stage, options=options)
    return model


def test_accumulation_equals_one_large_batch(tmp_path):
    """1 x 8, 8 x 1 and 3 + 3 + 2 take the same items in the same steps: one curve, to rounding."""
    curves = []
    for batch, accumulate in ((8, 1), (1, 8), (4, 2)):
        trained(tmp_path / str(batch), Optim(lr=0.01, steps=5, batch=batch, accumulate=accumulate))
        curves.append([(row["loss"], row["grad_norm"]) for row in run_steps(tmp_path / str(batch))])
        assert all(row["rows"] == pytest.approx(1) for row in run_steps(tmp_path / str(batch)))
    for other in curves[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(curves[0]), atol=1e-6, rtol=1e-6)


def test_no_clipping_at_zero(tmp_path):
    torch.manual_seed(0)
    start = nn.Linear(3, 3).weight.detach().clone()
    model = trained(tmp_path, Optim(lr=0.1, steps=2, batch=4, clip=0.0))
    assert (model.weight - start).abs().max() > 0.1


class Sometimes(nn.Linear):
    """NaN in the forward passes named."""

    def __init__(self, bad):
        super().__init__(3, 3)
        self.bad, self.at = bad, 0

    def forward(self, x):
        self.at += 1
        return super().forward(x) * (math.nan if self.at in self.bad else 1.0)


def test_steps_that_are_no_number_are_skipped_counted_and_end_the_run(tmp_path):
    model = Sometimes({2, 3})
    trained(tmp_path / "a", Optim(lr=0.1, steps=6, batch=4), model=model)
    rows = run_steps(tmp_path / "a")
    assert [row["loss"] is None for row in rows] == [False, True, True, False, False, False]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 2, 2, 2, 2]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    model = Sometimes({3, 4, 5, 6})
    with pytest.raises(checkpoint.RunError, match=r"step 6 \(s\) has loss nan.*the 4th in a row.*none of these steps was taken"):
        trained(tmp_path / "b", Optim(lr=0.1, steps=20, batch=4), model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def part(self, name):
        return getattr(self, name)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_parts_learn_at_their_own_rates(tmp_path):
    torch.manual_seed(0)
    model = Parts()
    before = [p.detach().clone() for p in model.parameters()]
    trained(tmp_path, Optim(lr=0.1, steps=1, batch=4, warmup=0, lr_of={"b": 0.003}), model=model)
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == pytest.approx([0.1, 0.1, 0.003, 0.003], rel=1e-3), "AdamW's first step is the learning rate"


def beit_layer(name: str, count: int) -> int:
    """A parameter's number as BEiT's and LAVIS's optimisers give it: embeddings 0, block i i + 1, all that is no tower's ``count`` + 1."""
    if ".blocks." in name or ".layers." in name or ".layer." in name:
        return int(re.search(r"\.(?:blocks|layers|layer)\.(\d+)\.", name)[1]) + 1
    return 0


@pytest.mark.parametrize("name", ["blip2", "llava", "dino"])
def test_a_tower_s_layers_learn_the_slower_the_lower_they_are(name):
    """Groups against numbers by name; a part's own rate, no-decay rules and the layers' factor hold at once."""
    recipe = config.load_recipe("llava" if name == "dino" else name, tiny=True)
    if name == "dino":
        recipe = replace(recipe, encoder=Dino(weights=None, width=64, depth=3, heads=4, ffn=128, patch=16, size=64, layer=-1))
    model = build(replace(recipe, language=replace(recipe.language, vocab=100)))
    parts = ("encoder", "connector")
    model.train_only(parts)
    optim = Optim(lr=0.1, steps=1, lr_of={"encoder": 0.02}, layer_decay=0.5, weight_decay=0.3, decay_vectors=False)
    objective = loop.Objective(None, model)
    got = {id(p): (g["peak"], g["weight_decay"]) for g in loop._groups(objective, optim) for p in g["params"]}
    count = recipe.encoder.depth if recipe.encoder.layer == -1 else recipe.encoder.depth - 1
    scales = [0.5 ** (count + 1 - i) for i in range(count + 2)]
    told = set()
    for where, p in model.named_parameters():
        if p.requires_grad:
            its = 0.02 * scales[beit_layer(where, count)] if where.startswith("encoder.") else 0.1
            assert got.pop(id(p)) == pytest.approx((its, 0.3 if p.ndim > 1 else 0.0)), where
            told.add(its)
    assert not got
    assert len(told) == count + 2, "every block, the embeddings, and all else"
    plain = {g["peak"] for g in loop._groups(objective, replace(optim, layer_decay=1.0))}
    assert plain == {0.1, 0.02}


def test_parts_decay_as_told(tmp_path):
    """Without a gradient a step of AdamW is its decay alone: a factor 1 - lr x decay."""
    optim = Optim(lr=0.1, steps=1, batch=4, warmup=0, weight_decay=0.5, weight_decay_of={"b": 0.2}, decay_vectors=False)
    for partly, expected in ((False, [0.95, 1.0, 0.98, 1.0]), (True, [0.95, 1.0, 1.0, 1.0])):
        torch.manual_seed(0)
        model = Parts()
        if partly:
            model.partly_trained = lambda model=model: [model.b.weight]
        before = [p.detach().clone() for p in model.parameters()]

        def step(batch, totals, model=model):
            return sum(p.sum() * 0 for p in model.parameters()), {"tokens": 4}

        options = loop.Options(seed=0, quiet=True)
        loop.train(checkpoint.Run(tmp_path / str(partly)), loop.Objective(step, model), Numbers(), optim=optim, stage="s", options=options)
        left = [(p / q).mean().item() for p, q in zip(model.parameters(), before, strict=True)]
        assert left == pytest.approx(expected, rel=1e-5)


def test_moving_average_is_what_a_stage_hands_on(tmp_path):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.detach().clone())
            return super().forward(x)

    torch.manual_seed(0)
    model = Watched(3, 3)
    trained(tmp_path, Optim(lr=0.1, steps=4, batch=4, warmup=0, ema=0.5), model=model)
    plain = trained(tmp_path / "plain", Optim(lr=0.1, steps=4, batch=4, warmup=0), model=None)
    average = seen[0]
    for weight in [*seen[1:], plain.weight.detach()]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(model.weight.detach(), average)
    stored = Watched(3, 3)
    checkpoint.load_model(stored, checkpoint.Run(tmp_path, resume=True).last_checkpoint()[1])
    assert torch.equal(stored.weight, model.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_on_fp32_weights(tmp_path, precision):
    model = trained(tmp_path, Optim(lr=0.05, steps=30, batch=4), compute=Compute(precision=precision))
    rows = run_steps(tmp_path)
    assert model.weight.dtype == torch.float32
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_a_stage_without_gradient_is_told(tmp_path, capsys):
    class Deaf(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    torch.manual_seed(0)
    trained(tmp_path, Optim(lr=0.1, steps=12, batch=4), model=Deaf(3, 3))
    out = capsys.readouterr()
    assert "grad_norm has been 0 for 10 steps of s" in out.out + out.err
    frozen = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(checkpoint.RunError, match="stage s trains nothing"):
        trained(tmp_path / "b", OPTIM, model=frozen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(tmp_path, number):
    _whole, _ = fit(tmp_path / "whole", stages=("one",))

    class Killer(Numbers):
        at = 0

        def batch(self, index):
            self.at += 1
            if self.at == 4:
                os.kill(os.getpid(), number)
            return super().batch(index)

    torch.manual_seed(42)
    model, run = Noisy(), checkpoint.Run(tmp_path / "cut")
    with pytest.raises(loop.Stopped, match="stopped after step 4 as asked"):
        loop.train(run, squared(model), Killer(), optim=OPTIM, stage="one", options=loop.Options(seed=3, quiet=True))
    assert run.last_checkpoint()[0] == 4
    assert signal.getsignal(number) is not None
    _resumed, taken = fit(tmp_path / "cut", resume=True, stages=("one",))
    assert taken == 8
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_workers_deliver_the_same_batches(tmp_path):
    _a, _ = fit(tmp_path / "a", stages=("one",))
    _b, _ = fit(tmp_path / "b", stages=("one",), compute=Compute(workers=2))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


# -------------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_last_two_are_kept(tmp_path):
    fit(tmp_path)
    assert checkpoints(tmp_path) == ["step-22", "step-24"]


@pytest.mark.parametrize("where", ["save_file", "_sha256", "replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, where):
    fit(tmp_path, stages=("one",))
    kept = checkpoints(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((checkpoint.os, "replace") if where == "replace" else (checkpoint, where)), full)
    run, model = checkpoint.Run(tmp_path, resume=True), Noisy()
    monkeypatch.setattr(run, "last_checkpoint", lambda: (12, tmp_path / "checkpoints" / "step-12"))
    with pytest.raises(
        checkpoint.RunError, match=r"checkpoint of step 99 could not be written.*No space left.*step 12 is intact.*--resume"
    ):
        run.save(99, dict(model.state_dict(keep_vars=True)), {"stage": "one"})
    monkeypatch.undo()
    assert checkpoints(tmp_path) == kept
    assert checkpoint.Run(tmp_path, resume=True).last_checkpoint()[0] == 12


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from mmfast.trainers import checkpoint, loop
run = checkpoint.Run(Path(sys.argv[1]))
small, large = {"w": torch.zeros(10)}, {"w": torch.zeros(100_000)}
run.save(1, small, {"x": torch.zeros(3)})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond this fails, as on a full disk
for tensors, state in ((large, {}), (small, {"x": torch.zeros(100_000)})):
    try:
        run.save(2, tensors, state)
    except checkpoint.RunError as error:
        print(error)
print(run.last_checkpoint()[0], sorted(p.name for p in (run.folder / "checkpoints").iterdir()))
"""


def test_a_write_that_really_fails(tmp_path):
    """The kernel refuses, first the weights' file and then the optimiser's: both writers must be caught."""
    out = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert len(lines) == 3, out.stdout
    assert all("checkpoint of step 2 could not be written" in line and "step 1 is intact" in line for line in lines[:2])
    assert lines[2] == "1 ['step-1']"


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    fit(tmp_path)
    newest = tmp_path / "checkpoints" / "step-24"
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    run = checkpoint.Run(tmp_path, resume=True)
    assert run.last_checkpoint()[0] == 22
    assert "step-24 is damaged" in capsys.readouterr().out
    (newest / "hashes.json").unlink()
    assert run.last_checkpoint()[0] == 22


def test_a_leftover_of_a_crash_is_ignored(tmp_path):
    fit(tmp_path, stages=("one",))
    (tmp_path / "checkpoints" / ".step-13.partial").mkdir()
    assert checkpoint.Run(tmp_path, resume=True).last_checkpoint()[0] == 12


def test_weights_that_do_not_fit_are_refused(tmp_path):
    fit(tmp_path, stages=("one",))
    path = tmp_path / "checkpoints" / "step-12"
    checkpoint.load_model(Noisy(), path)
    model = Noisy()
    model.c = nn.Linear(1, 1)
    with pytest.raises(checkpoint.RunError, match=r"does not fit this model: missing \['c"):
        checkpoint.load_model(model, path)


def test_state_files_are_read_without_pickled_code(tmp_path, capsys):
    fit(tmp_path, stages=("one",))

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "checkpoints" / "step-12"
    (path / "state.pt").write_bytes(pickle.dumps(Evil()))
    hashes = {name: checkpoint._sha256(path / name) for name in ("model.safetensors", "state.pt")}
    (path / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(checkpoint.RunError, match=r"state.pt holds something other than tensors and plain values"):
        fit(tmp_path, resume=True, stages=("one",))
    assert "executed" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- signals again


class Killing(Numbers):
    """Sends signals when the batch of a step is asked for."""

    def __init__(self, step, *numbers):
        super().__init__()
        self.step, self.numbers, self.at = step, numbers, 0

    def batch(self, index):
        self.at += 1
        for number in self.numbers if self.at == self.step else ():
            os.kill(os.getpid(), number)
        return super().batch(index)


def killed(folder, source, tracker=None):
    options = loop.Options(seed=3, quiet=True, trackers=(tracker,) if tracker else ())
    loop.train(checkpoint.Run(folder), squared(Noisy()), source, optim=OPTIM, stage="one", options=options)


def test_a_signal_in_a_stage_s_last_step_is_heard_too(tmp_path):
    """Otherwise the next stage would begin as if nothing had been asked."""
    with pytest.raises(loop.Stopped, match="stopped after step 12"):
        killed(tmp_path / "a", Killing(12, signal.SIGTERM))
    assert checkpoint.Run(tmp_path / "a", resume=True).last_checkpoint()[0] == 12

    def late(record):  # after the processes have told each other who was asked to stop
        if record["step"] == 12:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been told to ignore it
    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "b", Numbers(), late)
    signal.signal(signal.SIGINT, before)
    assert checkpoint.Run(tmp_path / "b", resume=True).last_checkpoint()[0] == 12


def test_only_a_second_ctrl_c_does_not_wait(tmp_path):
    """Under torchrun a job's SIGTERM comes twice: from the system to every process, and passed on by the launcher."""
    with pytest.raises(loop.Stopped, match="stopped after step 4"):
        killed(tmp_path / "a", Killing(4, signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "b", Killing(4, signal.SIGINT, signal.SIGINT))
    assert checkpoint.Run(tmp_path / "b", resume=True).last_checkpoint() is None


GROUP = """
import os, signal, sys, time
from pathlib import Path
import torch
from mmfast.spec import Compute, Optim
from mmfast.trainers import checkpoint, loop


class Slow:
    def __len__(self):
        return 1000

    def batch(self, index):
        time.sleep(0.02)
        return {"x": torch.ones(len(index), 3), "counts": torch.tensor([len(index)], dtype=torch.float64)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = torch.nn.Linear(3, 3)
    objective = loop.Objective(lambda batch, totals: (model(batch["x"]).square().sum() / totals[0].float(), {}), model)

    def tell(record):
        if record["step"] == 30:
            os.killpg(0, getattr(signal, sys.argv[2]))  # as a terminal's Ctrl-C or a scheduler does: the loader's processes too
            time.sleep(0.5)

    options = loop.Options(quiet=True, compute=Compute(workers=2), trackers=(tell,))
    try:
        loop.train(checkpoint.Run(Path(sys.argv[1])), objective, Slow(), optim=Optim(lr=0.1, steps=200, batch=4), stage="s", options=options)
    except loop.Stopped as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_job_leaves_the_loader_s_processes_alone(tmp_path, name):
    (tmp_path / "program.py").write_text(GROUP)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "run"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True, check=False)
    assert "stopped after step 31 as asked" in done.stdout, done.stderr[-2000:]
    assert checkpoint.Run(tmp_path / "run", resume=True).last_checkpoint()[0] == 31


def test_a_run_goes_on_in_another_precision(tmp_path, monkeypatch):
    """How a run is computed may change when it is resumed; there is no loss scale to read then."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=8.0, **k))  # nothing overflows
    for i, precision in enumerate(("fp32", "fp16", "fp16", "bf16")):
        options = loop.Options(seed=3, resume=True, quiet=True, compute=Compute(precision=precision))
        torch.manual_seed(42)
        model, run = Noisy(), checkpoint.Run(tmp_path, resume=True)
        optim = Optim(lr=0.05, steps=3 * (i + 1), batch=4, warmup=0)
        loop.train(run, squared(model), Numbers(), optim=optim, stage="one", options=options)
        state = checkpoint.load_state(run.last_checkpoint()[1])["scaler"]
        assert state.get("_growth_tracker") == (None, 3, 6, None)[i], "it goes on counting"
    assert [row["step"] for row in run_steps(tmp_path)] == list(range(1, 13))


def test_a_probe_leaves_no_trace(tmp_path):
    """It turns dropout off and draws random numbers; the next step is what it would have been."""
    curves = []
    for name in ("with", "without"):
        torch.manual_seed(42)
        model = Noisy()
        probe = (lambda step, model=model: model.eval() and {"seen": torch.rand(1).item()}) if name == "with" else None
        options = loop.Options(seed=3, quiet=True, eval_every=1)
        loop.train(checkpoint.Run(tmp_path / name), squared(model), Numbers(), optim=OPTIM, stage="s", options=options, probe=probe)
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1]
    assert "seen" in run_steps(tmp_path / "with")[5]


BY_HAND = Optim(lr=0.05, steps=8, batch=4, warmup=0, schedule="constant", betas=(0.8, 0.9), weight_decay=0.3, clip=0.05, ema=0.7)


def test_steps_are_those_of_a_loop_written_by_hand(tmp_path):
    """Betas, decay, clipping and average, with two steps that are no number: neither weights nor average move in them."""
    torch.manual_seed(0)
    model = Sometimes({3, 6})
    want = nn.Linear(3, 3)
    want.load_state_dict(model.state_dict())
    trained(tmp_path, BY_HAND, model=model)
    optimizer = torch.optim.AdamW(want.parameters(), lr=0.05, betas=(0.8, 0.9), weight_decay=0.3)
    order, averages = loop.Order(10, 4, seed=0), [p.detach().clone() for p in want.parameters()]
    for step in range(8):
        if step in (2, 5):
            continue
        optimizer.zero_grad()
        (want(DATA[order(step)]) - 1).square().mean().backward()
        assert nn.utils.clip_grad_norm_(want.parameters(), 0.05) > 0.05
        optimizer.step()
        averages = [0.7 * a + 0.3 * p.detach() for a, p in zip(averages, want.parameters(), strict=True)]
    for got, average in zip(model.parameters(), averages, strict=True):
        torch.testing.assert_close(got.detach(), average)


def test_an_average_and_a_count_of_skipped_steps_go_on(tmp_path):
    def go(folder, steps, bad, first=0):
        torch.manual_seed(0)
        model = Sometimes({at - first for at in bad})
        loop.train(
            checkpoint.Run(folder, resume=True), squared(model, 1.0), Numbers(), optim=replace(BY_HAND, steps=steps), stage="s",
            options=loop.Options(quiet=True, resume=True, save_every=4, compute=Compute(bad_steps=1)),
        )  # fmt: skip
        return model

    whole = go(tmp_path / "whole", 8, {2, 4, 6})  # one at a time: never two in a row
    go(tmp_path / "cut", 8, {2, 4, 6})
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-8")
    again = go(tmp_path / "cut", 8, {2, 4, 6}, first=4)
    assert torch.equal(whole.weight, again.weight)
    assert [row.get("skipped", 0) for row in run_steps(tmp_path / "cut")] == [0, 1, 1, 2, 2, 3, 3, 3]
