"""The loop: order and schedule as functions of the step, resume bit for bit, checkpoints whole or absent."""

import errno
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from mmfast.trainers import loop
from torch import nn

from mmfast.spec import Optim

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


def fit(folder, *, resume=False, stop_at=None, optim=OPTIM, stages=("one", "two"), save_every=5):
    """Two stages over one model; ``stop_at`` kills the run in the middle of that step."""
    torch.manual_seed(42)
    model, run, first = Noisy(), loop.Run(folder, resume=resume), 0
    taken = [0]
    if resume and (last := run.last_checkpoint()):
        loop.load_model(model, last[1] / "model.safetensors")

    def step(index):
        if stop_at is not None and len(run_steps(folder)) == stop_at:
            raise KeyboardInterrupt
        taken[0] += 1
        return (model(DATA[index]) - DATA[index]).square().mean(), {"tokens": index.numel()}

    for stage in stages:
        parameters = list(model.parameters()) if stage == "one" else list(model.b.parameters())
        options = dict(optim=optim, items=len(DATA), seed=3, stage=stage, save_every=save_every, quiet=True)
        first = loop.train(run, model, parameters, step, first_step=first, resume=resume, **options)
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
    from dataclasses import replace

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
    with pytest.raises(loop.RunError, match=r"exists and is not empty; continue it with --resume or choose another --out"):
        loop.Run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(loop.RunError, match="is a file"):
        loop.Run(tmp_path / "file")


def test_order_is_a_function_of_the_step():
    order = loop.Order(10, 4, seed=3)
    seen = [order(step).tolist() for step in range(6)]
    assert [loop.Order(10, 4, seed=3)(step).tolist() for step in (5, 0, 3)] == [seen[5], seen[0], seen[3]]
    assert all(len(set(seen[2 * e] + seen[2 * e + 1])) == 8 for e in range(3)), "an epoch repeats nothing"
    assert seen[:2] != seen[2:4], "epochs differ"
    assert seen != [loop.Order(10, 4, seed=4)(step).tolist() for step in range(6)]
    assert sorted(loop.Order(3, 8, seed=0)(5).tolist()) == [0, 1, 2]


def test_schedule():
    cosine = [loop.rate(OPTIM, step, 12) / 0.05 for step in range(12)]
    want = [min(1, (s + 1) / 3) * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * max(0, (s / 12 - 0.2) / 0.8)))) for s in range(12)]
    assert cosine == pytest.approx(want)
    constant = Optim(lr=1.0, steps=100, schedule="constant", warmup=0.1)
    assert [loop.rate(constant, s, 100) for s in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert loop.total_steps(Optim(lr=1, epochs=3, batch=4, accumulate=2), items=100) == 38


def test_accumulation_equals_one_large_batch(tmp_path):
    """Same items, cut in three: the same gradient to rounding. The model without its noise."""

    def train(optim, folder):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        order = loop.Order(12, 12, seed=0)(0)
        data = torch.randn(12, 3)

        def step(index):
            return (model(data[order[index]]) - 1).square().mean(), {}

        class InOrder(loop.Order):
            def __call__(self, at):
                return torch.arange(self.batch) + (at * self.batch) % 12

        original, loop.Order = loop.Order, InOrder
        try:
            loop.train(loop.Run(folder), model, list(model.parameters()), step, optim=optim, items=12, seed=0, stage="s", quiet=True)
        finally:
            loop.Order = original
        return model.weight

    one = train(Optim(lr=0.01, steps=4, batch=12), tmp_path / "one")
    three = train(Optim(lr=0.01, steps=4, batch=4, accumulate=3), tmp_path / "three")
    torch.testing.assert_close(one, three, atol=1e-6, rtol=0)


def test_no_clipping_at_zero(tmp_path):
    model = nn.Linear(3, 3)
    start = model.weight.detach().clone()
    options = dict(optim=Optim(lr=0.1, steps=2, batch=4, clip=0.0), items=10, seed=0, stage="s", quiet=True)
    loop.train(loop.Run(tmp_path), model, list(model.parameters()), lambda i: (model(DATA[i]).square().mean(), {}), **options)
    assert (model.weight - start).abs().max() > 0.1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = nn.Linear(3, 3)
    options = dict(optim=OPTIM, items=10, seed=0, stage="s", quiet=True)
    with pytest.raises(loop.RunError, match=r"step 1 \(s\) has loss nan"):
        loop.train(loop.Run(tmp_path), model, list(model.parameters()), lambda i: (model(DATA[i]).sum() * math.nan, {}), **options)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "the step that failed must not have been taken"


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

    monkeypatch.setattr(*((loop.os, "replace") if where == "replace" else (loop, where)), full)
    run, model = loop.Run(tmp_path, resume=True), Noisy()
    monkeypatch.setattr(run, "last_checkpoint", lambda: (12, tmp_path / "checkpoints" / "step-12"))
    with pytest.raises(loop.RunError, match=r"checkpoint of step 99 could not be written.*No space left.*step 12 is intact.*--resume"):
        run.save(99, dict(model.state_dict(keep_vars=True)), {"stage": "one"})
    monkeypatch.undo()
    assert checkpoints(tmp_path) == kept
    assert loop.Run(tmp_path, resume=True).last_checkpoint()[0] == 12


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from mmfast.trainers import loop
run = loop.Run(Path(sys.argv[1]))
small, large = {"w": torch.zeros(10)}, {"w": torch.zeros(100_000)}
run.save(1, small, {"x": torch.zeros(3)})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond this fails, as on a full disk
for tensors, state in ((large, {}), (small, {"x": torch.zeros(100_000)})):
    try:
        run.save(2, tensors, state)
    except loop.RunError as error:
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
    run = loop.Run(tmp_path, resume=True)
    assert run.last_checkpoint()[0] == 22
    assert "step-24 is damaged" in capsys.readouterr().out
    (newest / "hashes.json").unlink()
    assert run.last_checkpoint()[0] == 22


def test_a_leftover_of_a_crash_is_ignored(tmp_path):
    fit(tmp_path, stages=("one",))
    (tmp_path / "checkpoints" / ".step-13.partial").mkdir()
    assert loop.Run(tmp_path, resume=True).last_checkpoint()[0] == 12


def test_weights_that_do_not_fit_are_refused(tmp_path):
    fit(tmp_path, stages=("one",))
    path = tmp_path / "checkpoints" / "step-12" / "model.safetensors"
    loop.load_model(Noisy(), path)
    model = Noisy()
    model.c = nn.Linear(1, 1)
    with pytest.raises(loop.RunError, match=r"does not fit this model: missing \['c"):
        loop.load_model(model, path)


def test_state_files_are_read_without_pickled_code(tmp_path, capsys):
    fit(tmp_path, stages=("one",))

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "checkpoints" / "step-12"
    (path / "state.pt").write_bytes(pickle.dumps(Evil()))
    hashes = {name: loop._sha256(path / name) for name in ("model.safetensors", "state.pt")}
    (path / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fit(tmp_path, resume=True, stages=("one",))
    assert "executed" not in capsys.readouterr().out
