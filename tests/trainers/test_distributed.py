"""Several processes: the same items give the same curve however they are cut, under DDP and FSDP2; saving on four and resuming on two works.

Every run is a program of its own under torchrun with gloo, on the CPU.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from mmfast.trainers import checkpoint

PROGRAM = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from mmfast.data import supervised as data
from mmfast.models import tiny
from mmfast.spec import Compute, Data, Lora
from mmfast.trainers import place, preference, supervised
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.loop import Options
from mmfast.trainers.recipes.align.dpo import RECIPE as DPO
from mmfast.trainers.recipes.architectures.fromage import RECIPE as FROMAGE
from mmfast.trainers.recipes.architectures.llava import RECIPE as LLAVA

out, kind, batch, accumulate, parallel, packing, last = sys.argv[1:8]
torch.set_num_threads(1)
data.Shapes = partial(data.Shapes, count=64)
batch, accumulate = int(batch), int(accumulate)
compute = Compute(parallel=parallel, packing=packing == "packed")


def few(optim, steps):
    return replace(optim, steps=steps, batch=batch, accumulate=accumulate, warmup=0, lr=1e-3)


where = place.find(compute, "cpu")
options = Options(resume=True, quiet=True, compute=compute, place=where, save_every=3)
system = tiny(LLAVA)
system = replace(system, stages=tuple(replace(s, optim=few(s.optim, n)) for s, n in zip(system.stages, (3, 2, int(last)))))
if kind == "adapters":
    last = replace(system.stages[-1], train=("connector",), lora=Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj")))
    system = replace(system, stages=(*system.stages[:-1], last))
if kind == "some pictures":  # in every batch some ranks' rows have no picture
    import json
    from PIL import Image
    folder = Path(out).parent
    if where.main:
        Image.new("RGB", (64, 64), "red").save(folder / "red.png")
        said = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "a red circle ."}]
        rows = [{"conversations": said} | ({"image": "red.png"} if i == 3 else {}) for i in range(8)]
        (folder / "data.json").write_text(json.dumps(rows))
    where.barrier()
    mine = replace(system.stages[-1], train=("encoder", "connector", "language"), data=Data("mine", path=str(folder / "data.json")))
    system = replace(system, stages=(mine,))
if kind == "contrast":  # nobody joins rows: each process would join its own
    torch.rand = lambda *a: torch.ones(())
    system = tiny(FROMAGE)
    system = replace(system, stages=(replace(system.stages[-1], optim=few(system.stages[-1].optim, int(last))),))
if kind in ("system", "adapters", "some pictures", "contrast"):
    session = supervised.train_system(system, Run(Path(out), resume=True, main=where.main), options=options)
else:
    torch.manual_seed(0)
    session = supervised.Session(system, seed=0, place=where)
    align = replace(tiny(DPO), reference=kind, optim=few(tiny(DPO).optim, int(last)))
    if kind == "adapter_off":
        align = replace(align, train=(), lora=Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj")))
    texts = [("we see a red circle .", "we see a green ring and a blue square ."), ("we see two red rings .", "we see a star .")] * 8
    pictures = torch.from_numpy(session.world.render(session.world.scenes("train", 16)))
    preference.own_pairs = lambda *a: (pictures, [(i, "<image> describe the picture:", *t) for i, t in enumerate(texts)])
    preference.caption_length = lambda *a: None
    session = preference.train_alignment(align, session, Run(Path(out), resume=True, main=where.main), options=options)
if where.main:
    torch.save(session.model.state_dict(), Path(out) / "end.pt")
if where.processes > 1:
    torch.distributed.destroy_process_group()
"""


def run(out, *, kind="system", processes=1, batch=8, accumulate=1, parallel="ddp", packing="padded", last=4):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    script = out.parent / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, *launcher, str(script), str(out), kind, str(batch), str(accumulate), parallel, packing, str(last)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)
    return curve, torch.load(out / "end.pt", weights_only=True), lines


CUTS = {
    "8 x 1": dict(batch=1, accumulate=8),
    "packed": dict(packing="packed"),
    "2 ranks x 4, DDP": dict(processes=2),
    "2 ranks x 2 x 2, DDP": dict(processes=2, batch=4, accumulate=2),
    "2 ranks x 4, FSDP2": dict(processes=2, parallel="fsdp"),
    "2 ranks x 2 x 2, FSDP2": dict(processes=2, batch=4, accumulate=2, parallel="fsdp"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_step_does_not_depend_on_how_it_is_cut(whole, tmp_path, cut):
    curve, weights, lines = run(tmp_path / "run", **cut)
    # AdamW divides by tiny second moments in its first steps and so magnifies rounding; the losses stay within 1e-6 of their size.
    torch.testing.assert_close(curve[:, 0], whole[0][:, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(curve[:, 1], whole[0][:, 1], atol=1e-5, rtol=1e-5)
    assert [line["stage"] for line in lines] == ["words"] * 3 + ["align"] * 2 + ["instruct"] * 4
    for name, value in weights.items():
        torch.testing.assert_close(value, whole[1][name], atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "frozen", "adapter_off"])
def test_alignment_does_not_depend_on_how_it_is_cut(tmp_path, kind):
    alone = run(tmp_path / "alone", kind=kind)
    for name, cut in (("ddp", dict(processes=2)), ("fsdp", dict(processes=2, parallel="fsdp", packing="packed"))):
        curve, _, lines = run(tmp_path / name, kind=kind, **cut)
        torch.testing.assert_close(curve[:, 0], alone[0][:, 0], atol=1e-6, rtol=1e-6)
        for key in ("rewards/margins", "logps/chosen", "rewards/accuracies"):
            want = torch.tensor([line[key] for line in alone[2]])
            torch.testing.assert_close(torch.tensor([line[key] for line in lines]), want, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "some pictures"])
def test_adapters_and_ranks_without_pictures(tmp_path, kind):
    """Adapters in shards; a rank whose rows are text alone has gradients for tower and connector like the others, so that none waits."""
    alone = run(tmp_path / "alone", kind=kind)
    for parallel in ("ddp", "fsdp"):
        curve, weights, _ = run(tmp_path / parallel, kind=kind, processes=2, parallel=parallel)
        torch.testing.assert_close(curve[:, 0], alone[0][:, 0], atol=1e-6, rtol=1e-6)
        assert weights.keys() == alone[1].keys()


@pytest.mark.slow
def test_a_contrast_sees_the_rows_of_all_processes(tmp_path):
    """The batch's, whoever holds them; their gradients add up to those of one process that holds them all."""
    alone, ranks = run(tmp_path / "alone", kind="contrast"), run(tmp_path / "ranks", kind="contrast", processes=2)
    torch.testing.assert_close(ranks[0], alone[0], atol=1e-5, rtol=1e-5)
    for key in ("loss/caption", "loss/text", "loss/contrast", "recall@1"):
        for line, want in zip(ranks[2], alone[2], strict=True):
            assert line[key] == pytest.approx(want[key], abs=1e-5), key
    for name, value in ranks[1].items():
        torch.testing.assert_close(value, alone[1][name], atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_saved_on_four_resumed_on_two(whole, tmp_path, parallel):
    run(tmp_path / "run", processes=4, parallel=parallel, last=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 7
    # The last stage is longer now: its steps 8 and 9 are made by two processes from what four have saved.
    curve, _, _ = run(tmp_path / "run", processes=2, parallel=parallel, last=4)
    torch.testing.assert_close(curve[:5, 0], whole[0][:5, 0], atol=1e-6, rtol=1e-6)


TOTALS = """
import sys
from pathlib import Path
import torch
from mmfast.spec import Compute, Optim
from mmfast.trainers import checkpoint, loop, place

compute = Compute(parallel="fsdp", precision="bf16")
where = place.find(compute, "cpu")
out, last = Path(sys.argv[1]), int(sys.argv[2])


class Numbers:
    def __len__(self):
        return 3000

    def batch(self, index):
        return {"x": index[:, None].float().remainder(7), "counts": torch.tensor([len(index)], dtype=torch.float64)}


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Linear(4, 1))


def step(batch, totals):
    loss = (model(batch["x"]) - 1).square().sum() / totals[0].float()
    return loss, {"total": totals[0] / where.processes}


options = loop.Options(quiet=True, resume=True, compute=compute, place=where, save_every=3)
run, objective = checkpoint.Run(out, resume=True, main=where.main), loop.Objective(step, model, blocks=[model[0]])
optim = Optim(lr=0.05, steps=last, batch=1002, ema=0.5, schedule="constant")
loop.train(run, objective, Numbers(), optim=optim, stage="s", options=options)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_in_half_precision_know_their_totals_and_their_average(tmp_path):
    """1002 is 1000 in bf16, and 70,000 tokens are infinitely many in fp16; what counts a step is no input to be cast. And a moving average
    goes on where the checkpoint left it."""
    (tmp_path / "program.py").write_text(TOTALS)

    def go(name, *lasts):
        for last in lasts:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "program.py")]
            done = subprocess.run([*command, str(tmp_path / name), str(last)], capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Linear(4, 1))
        checkpoint.load_model(model, tmp_path / name / "checkpoints" / f"step-{lasts[-1]}")
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()], model.state_dict()

    lines, whole = go("whole", 5)
    assert [line["total"] for line in lines] == [1002.0] * 5
    # Stopped between two checkpoints: the one of step 3 is what remains.
    go("cut", 5)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-5")
    again, resumed = go("cut", 5)
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in lines]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


CODES = """
import sys
from dataclasses import replace
import torch
from mmfast.spec import Compute, Optim
from mmfast.models import tiny
from mmfast.trainers import checkpoint, config, loop, place
from mmfast.trainers.session import Session

compute = Compute(parallel="fsdp", precision="bf16")
where = place.find(compute, "cpu")
session = Session(tiny(config.load_recipe("chameleon")), seed=0, place=where, precision="bf16")
model, pixels = session.model, torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
with torch.no_grad():
    z = model.encoder.vision.encode(pixels).flatten(2).transpose(1, 2).flatten(0, 1)
    model.encoder.vision.codebook.copy_(z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:64]])
alone = model.encoder.vision.tokenise(pixels)
assert len(alone.unique()) > 32
model.train_only(sys.argv[2].split(","))


def step(batch, totals):
    assert torch.equal(model.encoder.vision.tokenise(pixels), alone)
    drawn, ids, codebook = model.encoder.vision(pixels)  # which moves the codes, where they learn
    assert torch.equal(ids.flatten(1), alone)
    table = model.language.get_input_embeddings().weight
    if not model.encoder_learns:
        assert torch.equal(model.encoder(pixels), model.encoder.words[alone]) and table.dtype == torch.bfloat16
    return drawn.float().square().mean() + codebook + table.float().sum() * 0, {}


class Nothing:
    def __len__(self):
        return 2

    def batch(self, index):
        return {"counts": torch.ones(1, dtype=torch.float64)}


run, objective = checkpoint.Run(sys.argv[1], main=where.main), loop.Objective(step, model)
options = loop.Options(quiet=True, compute=compute, place=where)
loop.train(run, objective, Nothing(), optim=Optim(lr=1e-6, steps=1, batch=2), stage="s", options=options)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["encoder", "language"])
def test_shards_in_half_precision_give_pictures_the_same_codes(tmp_path, parts):
    """Whether the tokenizer learns, or stands beside what does."""
    (tmp_path / "program.py").write_text(CODES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "program.py")]
    done = subprocess.run([*command, str(tmp_path / "run"), parts], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
