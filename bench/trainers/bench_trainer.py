"""The trainers' own speed: our loop against a bare one, and whole runs against TRL's SFTTrainer and DPOTrainer.

``mmfast bench trainer`` prints the table and writes ``bench/results/<device>/trainer.csv``. Both sides get the same weights (ours are exported, and
the stock class reads them), records, pictures, order of rows, optimiser, rate and trained parts, in float32 without recomputation of activations;
both log every step. Their losses must agree step by step before a clock counts.

``loop``: batches made beforehand, through a loop of ten lines and through ours with its logging, its checks and its signals.
``sft``, ``dpo``: from a file of records to the last step. ``setup`` is everything before the first step has ended, less a step: ours checks all
records, makes the tower's states and the reference's values once; TRL opens the data set and builds its trainer. ``step`` is the time from one step's
end to the next, decoding of pictures included. ``run`` is all of it, our checkpoint at the end included; TRL saves none.
Importing, and building and reading the models, is on neither clock.
"""

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timing
import torch
from mmfast.trainers import loop
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.export import export
from mmfast.trainers.preference import train_alignment
from mmfast.trainers.recipes.architectures.llava import RECIPE as LLAVA
from mmfast.trainers.supervised import Session, answer_objective, run_stage
from torch import nn

import mmfast
from mmfast.data.synthetic import PROMPT, World, WorldConfig
from mmfast.models.tiny import tiny
from mmfast.ops import linear_logp
from mmfast.spec import Alignment, Clip, Contrast, Data, Mlp, Optim, Pairs, Stage, System

trl = pytest.importorskip("trl", reason="needs trl and datasets")
datasets = pytest.importorskip("datasets")

AGREE = 1e-3  # of losses, absolute
COLUMNS = [
    "case", "provider", "shape", "steps", "step_ms", "p20_ms", "p80_ms", "setup_s", "run_s", "step_ratio", "run_ratio", "loss_apart", "version",
]  # fmt: skip
ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def _write():
    yield
    if ROWS:
        print(f"\nwrote {timing.write_rows('trainer', ROWS, columns=COLUMNS)}")


@dataclass
class Taken:
    """Seconds: of each step, of what came before them, of the whole."""

    steps: list[float]
    setup: float = math.nan
    run: float = math.nan


class Clock:
    """When a run began and when its steps ended."""

    def __init__(self):
        self.began, self.ticks = time.perf_counter(), []

    def tick(self, *_: object) -> None:
        self.ticks.append(time.perf_counter())

    def read(self) -> Taken:
        """To be called when the run has ended."""
        steps, run = [b - a for a, b in itertools.pairwise(self.ticks)], time.perf_counter() - self.began
        return Taken(steps, self.ticks[0] - self.began - statistics.median(steps), run)


# ------------------------------------------------------------------------------------------------------------------- the loop


class Made:
    """Batches made beforehand; item i is batch i."""

    def __init__(self, batches: list[dict]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def permutation(self, epoch: int) -> torch.Tensor:
        return torch.arange(len(self))

    def batch(self, index: torch.Tensor) -> dict:
        return self.batches[int(index)]


def bare(model: nn.Module, states: torch.Tensor, batches: list[dict], optim: Optim) -> Iterator[torch.Tensor]:
    """What one would write by hand; yields each step's loss."""
    parameters, head = [p for p in model.parameters() if p.requires_grad], model.language.get_output_embeddings().weight
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    model.train()
    for batch in batches:
        hidden = model.hidden(batch["input_ids"], image_states=states[batch["picture_ids"]], image_rows=batch["image_rows"])
        logp = linear_logp(hidden[:, :-1], head, batch["labels"][:, 1:])
        loss = -(logp * (1 / batch["counts"]).float()[batch["groups"]][:, None]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


@pytest.mark.parametrize("scenes", [32, 1])
def test_loop(tmp_path, scenes):
    """The instruct stage of the tiny LLaVA; with one scene a step there is little to compute, and what surrounds it shows. Behind each of our steps the
    bare loop takes one over a copy of the model, so that whatever else the machine does hits both."""
    steps = 120 if scenes > 1 else 400
    system = tiny(LLAVA)
    stage = replace(system.stages[-1], optim=replace(system.stages[-1].optim, steps=steps, batch=1, warmup=0, schedule="constant", lr=1e-3))
    session = Session(replace(system, stages=(stage,)), seed=0)
    source = session.source(stage.data, stage.template, stage.max_length)
    states = session.states_of(source)
    session.let_train(stage.train, None)
    source.with_pictures = False
    picks = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: scenes * steps]
    made = Made([source.batch(index) for index in picks.split(scenes)])
    by_hand, losses = bare(copy.deepcopy(session.model), states, made.batches, stage.optim), []
    taken = {"bare loop": [Taken([])], "mmfast": [Taken([])]}
    ended: list[float] = []

    def between(record: dict) -> None:
        began = time.perf_counter()
        if ended:
            taken["mmfast"][0].steps.append(began - ended.pop())
        losses.append(next(by_hand))
        ended.append(time.perf_counter())
        taken["bare loop"][0].steps.append(ended[0] - began)

    run = Run(tmp_path / "run")
    options = loop.Options(quiet=True, trackers=(between,))
    loop.train(run, answer_objective(session, states), made, optim=stage.optim, stage="instruct", options=options)
    apart = max(abs(a - b) for a, b in zip(losses_of(run), torch.stack(losses).tolist(), strict=True))
    assert apart < AGREE, apart
    shape = made.batches[0]["input_ids"].shape
    report(f"loop, {scenes} a step", f"{shape[0]} x {shape[1]} tokens, width 64", steps, taken, apart)


def losses_of(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------- whole runs


@dataclass
class Case:
    """A task on disk: the system, its records, and the sizes of a run."""

    name: str
    system: System
    batch: int
    steps: int
    size: int  # of the picture files
    train: tuple[str, ...]

    def optim(self) -> Optim:
        return Optim(lr=1e-3 if self.name.startswith("sft") else 1e-4, steps=self.steps, batch=self.batch, warmup=0, schedule="constant")


# The stock class has no connector of one map (an exported one trains a second beside it).
SMALL = replace(tiny(LLAVA), connector=Mlp(2), stages=())
# 196 patches through twelve blocks, beside a language model of two narrow ones.
LARGE = replace(
    SMALL,
    encoder=Clip(weights=None, width=256, depth=12, heads=4, ffn=1024, patch=16, size=224, layer=-2),
    language=replace(SMALL.language, depth=2, context=512),
    image=replace(SMALL.image, size=224),
)
ANSWERS = ("connector", "language", "embeddings")
CASES = [
    Case("sft", SMALL, 16, 24, 96, ANSWERS),
    Case("sft, tower trains", SMALL, 16, 24, 96, ("encoder", *ANSWERS)),
    Case("dpo", SMALL, 8, 24, 96, ("language", "embeddings")),
    Case("dpo, large tower", LARGE, 2, 8, 320, ("language", "embeddings")),
]


def write_records(case: Case, folder: Path) -> Path:
    """Two questions a picture, or one pair a picture; as many records as a run has rows."""
    from PIL import Image

    world, rows = World(WorldConfig(seed=0)), []
    pairs = case.name.startswith("dpo")
    scenes = world.scenes("train", case.batch * case.steps // (1 if pairs else 2))
    captions = [world.caption(scene, planted=False).text for scene in scenes]
    for i, (scene, pixels) in enumerate(zip(scenes, world.render(scenes), strict=True)):
        Image.fromarray(pixels).resize((case.size, case.size), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        if pairs:
            rows.append({"id": str(i), "image": f"{i}.png", "prompt": PROMPT, "chosen": captions[i], "rejected": captions[i - 1]})
            continue
        for question, answer in ((PROMPT, captions[i]), world.turns(scene, 1, planted=False)[0]):
            says = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": str(len(rows)), "image": f"{i}.png", "conversations": says})
    (folder / "records.json").write_text(json.dumps(rows))
    return folder / "records.json"


class Stranger(Session):
    """Not taken for one of the shapes world, which alone is given captions to write while it is aligned."""

    knows_the_world = False


def ours(case: Case, session: Session, records: Path, out: Path) -> tuple[Taken, list[float]]:
    session._sources.clear()
    clock, run = Clock(), Run(out)
    options = loop.Options(quiet=True, trackers=(clock.tick,))
    if case.name.startswith("sft"):
        stage = Stage("sft", train=case.train, data=Data("records", path=str(records)), optim=case.optim(), template="bare")
        run_stage(session, run, stage, first_step=0, options=options)
    else:
        train_alignment(alignment(case, records), session, run, options=options)
    return clock.read(), losses_of(run)


def alignment(case: Case, records: Path) -> Alignment:
    return Alignment(
        "dpo", "", case.system, Pairs("records", path=str(records)), (Contrast("chosen", "rejected"),), case.optim(), train=case.train,
        template="bare",
    )  # fmt: skip


def theirs(case: Case, model: nn.Module, processor, records: Path, order: list[int], out: Path) -> tuple[Taken, list[float]]:
    """The same with TRL; ``order``: the rows as our run takes them."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    pairs, optim = case.name.startswith("dpo"), case.optim()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    tower.requires_grad_("encoder" in case.train)
    projector.requires_grad_("connector" in case.train)
    reference = copy.deepcopy(model).requires_grad_(False) if pairs else None
    common = dict(
        output_dir=str(out), max_steps=optim.steps, per_device_train_batch_size=optim.batch, learning_rate=optim.lr, lr_scheduler_type="constant",
        weight_decay=optim.weight_decay, max_grad_norm=optim.clip, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=None, dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    clock = Clock()
    rows = json.loads(records.read_text())
    made = datasets.Dataset.from_list([as_trl(rows[i], records.parent) for i in order])
    made = made.cast_column("images", datasets.List(datasets.Image()))
    if pairs:
        trainer = trl.DPOTrainer(
            model, reference, trl.DPOConfig(**common), train_dataset=made, processing_class=processor, callbacks=[Ticks()]
        )
    else:
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(**common, completion_only_loss=True), train_dataset=made, processing_class=processor, callbacks=[Ticks()]
        )
    trainer.train()
    return clock.read(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def as_trl(row: dict, folder: Path) -> dict:
    """A record as TRL's documentation has it: messages, and a list of pictures that are opened when they are read."""
    images = [str(folder / row["image"])]
    if "chosen" in row:
        said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        return {"images": images, "prompt": [{"role": "user", "content": row["prompt"]}], **said}
    question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
    return {
        "images": images, "prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}],
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_runs(case, tmp_path, capfd):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    session = Stranger(case.system, seed=0)
    records, folders = write_records(case, tmp_path), (tmp_path / f"run-{i}" for i in itertools.count())
    weights = copy.deepcopy(session.model.state_dict())
    recipe = alignment(case, records)
    export(session, recipe, tmp_path / "stock")
    stock, processor = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock"), AutoProcessor.from_pretrained(tmp_path / "stock")
    order = loop.Order(case.batch * case.steps, case.batch, 0)
    rows = [i for step in range(case.steps) for i in order(step).tolist()]

    def run_ours():
        session.model.load_state_dict(weights)
        return ours(case, session, records, next(folders))

    def run_theirs():
        return theirs(case, copy.deepcopy(stock), processor, records, rows, next(folders))

    sides = {"TRL": run_theirs, "mmfast": run_ours}
    _, want = run_theirs()
    _, got = run_ours()
    apart = max(abs(a - b) for a, b in zip(got, want, strict=True))
    assert apart < AGREE, (apart, got[:4], want[:4])
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for _ in range(3):
        for name, call in sides.items():
            taken[name].append(call()[0])
    with capfd.disabled():
        report(case.name, f"{case.batch} rows, {len(rows)} records", case.steps, taken, apart)


def report(case: str, shape: str, steps: int, taken: dict[str, list[Taken]], apart: float) -> None:
    """Quantiles over all steps of all repetitions, medians over the repetitions; ratios are the peer's time over ours."""
    middle, quantiles = {}, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    for name, runs in taken.items():
        seconds = torch.tensor([s for run in runs for s in run.steps], dtype=torch.float64)
        middle[name] = (
            [1e3 * s for s in torch.quantile(seconds, quantiles).tolist()],
            *(statistics.median(getattr(run, what) for run in runs) for what in ("setup", "run")),
        )
    peer = next(iter(taken))
    print(f"\n{case}: {shape}, {steps} steps, losses apart by {apart:.1e}")
    for name, ((step, low, high), setup, run) in middle.items():
        by_step, by_run = middle[peer][0][0] / step, middle[peer][2] / run
        whole = "" if math.isnan(run) else f"   setup {setup:5.2f} s, run {run:5.2f} s  {by_run:5.2f}x"
        print(f"  {name:10s} {step:8.2f} ms a step  [{low:.2f}, {high:.2f}]  {by_step:5.2f}x{whole}")
        ROWS.append(dict(case=case, provider=name, shape=shape, steps=steps, step_ms=f"{step:.3f}", p20_ms=f"{low:.3f}", p80_ms=f"{high:.3f}",
                         setup_s=f"{setup:.3f}" if whole else "", run_s=f"{run:.3f}" if whole else "", step_ratio=f"{by_step:.3f}",
                         run_ratio=f"{by_run:.3f}" if whole else "", loss_apart=f"{apart:.1e}",
                         version={"mmfast": mmfast.__version__, "TRL": trl.__version__}.get(name, torch.__version__)))  # fmt: skip
