"""The loop, written once: accumulate, clip, step, log, save, resume. A trainer brings an objective and a source of batches.

An objective's losses and measures are sums: each micro-batch on each process contributes its tokens' (or pairs') share of a total that the loop
adds up beforehand over the whole step. So a step's result does not depend on how its items were cut into micro-batches and ranks.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmfast.spec import Compute, Optim

from . import place as places
from .checkpoint import Run, RunError, load_model, load_state
from .place import Place

# Steps without gradient, or without any margin between chosen and rejected, after which a warning is due.
IDLE_STEPS = 10
PROBE_EVERY = 20


class Stopped(RunError):
    """The user or the system asked the run to stop; it saved first. ``code``: what the command ends with."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class Objective(nn.Module):
    """What a stage minimises: ``step(batch, totals) -> (loss, measures)`` over the modules it trains.

    A module, so that DDP and FSDP2 can wrap it. ``totals``: float64 ``[C]``, the step's sums of the batches' ``counts``. Loss and
    measures must be this batch's contributions to the step's, already divided by the totals; measures have the same names in every batch.

    Args:
        blocks: modules that every batch runs and that FSDP2 may gather one at a time (a language model's layers).
        extra: modules that train beside the model and are saved with it (a head of the stage).
    """

    def __init__(
        self, step: Callable[[dict, Tensor], tuple[Tensor, dict[str, Tensor | float]]], model: nn.Module, *, blocks: Sequence[nn.Module] = (),
        **extra: nn.Module,
    ):  # fmt: skip
        super().__init__()
        self.step, self.model, self.blocks = step, model, tuple(blocks)
        self.extra = nn.ModuleDict(extra)

    def forward(self, batch: dict[str, Any], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        return self.step(batch, totals)


# ----------------------------------------------------------------------------------------------------------------- order


class Order:
    """Which items a step sees: a new permutation every epoch, a function of (seed, step) alone; an epoch's short rest is left out.

    Args:
        permutation: ``permutation(epoch)`` of a source that has an order of its own (a weighted mixture).
    """

    def __init__(self, items: int, rows: int, seed: int, permutation: Callable[[int], Tensor] | None = None):
        self.items, self.rows, self.seed = items, min(rows, items), seed
        self.per_epoch = max(items // self.rows, 1)
        self._permute, self._epoch, self._permutation = permutation or self._shuffle, -1, torch.empty(0, dtype=torch.long)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(self.items, generator=generator)

    def __call__(self, step: int) -> Tensor:
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._permute(epoch)
        return self._permutation[at * self.rows : (at + 1) * self.rows]


class Batches:
    """From a source to each step's micro-batches on this process, decoded ahead by ``workers`` processes where there are any.

    A source has ``__len__`` and ``batch(index) -> dict`` with ``counts`` (float64 ``[C]``) among its values; a stream has ``take(rows)``
    instead of both, and ``state_dict`` / ``load_state_dict``.
    """

    def __init__(self, source: Any, optim: Optim, seed: int, place: Place, *, workers: int = 0):
        self.source, self.optim, self.place, self.workers = source, optim, place, workers
        self.stream = hasattr(source, "take")
        if optim.batch % place.processes:
            raise RunError(f"optim.batch {optim.batch} cannot be shared equally by {place.processes} processes")
        self.items = None if self.stream else len(source)
        if self.items is not None and self.items < place.processes * optim.accumulate:
            raise RunError(
                f"{self.items} items are too few for {optim.accumulate} micro-batches on each of {place.processes} processes; lower optim.accumulate"
            )
        self.order = None if self.stream else Order(self.items, optim.batch * optim.accumulate, seed, getattr(source, "permutation", None))

    def total_steps(self) -> int:
        return total_steps(self.optim, self.items)

    def _indices(self, first: int, last: int) -> Iterator[list[int]]:
        for step in range(first, last):
            for micro in self.order(step).tensor_split(self.optim.accumulate):
                yield self.place.part(micro).tolist()

    def __call__(self, first: int, last: int) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of the steps from ``first`` up to ``last``."""
        if self.stream:
            each = self.optim.batch
            for _ in range(first, last):
                yield [self.source.take(each, self.place.rank, self.place.processes) for _ in range(self.optim.accumulate)]
            return
        if self.workers:
            # Spawned, not forked: a fork would copy locks that tokenizers' and torch's threads may hold.
            loader = torch.utils.data.DataLoader(
                _Fetch(self.source), batch_sampler=self._indices(first, last), collate_fn=_first, num_workers=self.workers,
                prefetch_factor=4, worker_init_fn=_undisturbed, multiprocessing_context="spawn", pin_memory=self.place.device.type == "cuda",
            )  # fmt: skip
            micros = map(_sound, loader)
        else:
            micros = (self.source.batch(torch.tensor(index)) for index in self._indices(first, last))
        for _ in range(first, last):
            yield [next(micros) for _ in range(self.optim.accumulate)]


class _Fetch(torch.utils.data.Dataset):
    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, index: list[int]) -> list[dict]:
        try:
            return [self.source.batch(torch.tensor(index))]
        except ValueError as error:  # a picture that is gone: raised here, it would reach the user within a worker's traceback
            return [{"error": str(error)}]

    def __getitem__(self, at: int) -> dict:
        return self.source.batch(torch.tensor([at]))


def _undisturbed(worker: int) -> None:
    """A signal to the whole job is for the run to act on: it saves first and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _sound(batch: dict) -> dict:
    if "error" in batch:
        raise ValueError(batch["error"])
    return batch


def _first(items: list[dict]) -> dict:
    return items[0]


# -------------------------------------------------------------------------------------------------------------- schedule


def total_steps(optim: Optim, items: int | None) -> int:
    """Optimiser steps of a stage: given, or from epochs over the items, of which a step sees no more than there are (``Order``)."""
    if optim.steps is not None:
        return optim.steps
    if optim.epochs is None:
        raise RunError("a stage's optim needs steps or epochs")
    if items is None:
        raise RunError("a streamed data set has no length: give optim.steps instead of optim.epochs")
    return max(1, round(optim.epochs * items / min(optim.batch * optim.accumulate, items)))


def rate(optim: Optim, step: int, total: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, plateau, then a fall to the floor or constant."""
    warm = optim.warmup * total if optim.warmup < 1 else optim.warmup
    if step < warm:
        return optim.lr * min(1.0, (step + 1) / warm)
    if optim.schedule == "constant":
        return optim.lr
    start = max(warm, optim.hold * total)
    at = min(1.0, max(0.0, (step - start) / max(total - start, 1)))
    if optim.schedule == "exponential":
        return optim.lr * optim.floor**at
    fall = 0.5 * (1 + math.cos(math.pi * at)) if optim.schedule == "cosine" else 1 - at
    return optim.lr * (fall * (1 - optim.floor) + optim.floor)


# ------------------------------------------------------------------------------------------------------------------ loop


class Signals:
    """SIGTERM and Ctrl-C wait for the step to end, so that the run can save. A second Ctrl-C does not wait; a second SIGTERM does, as
    launchers pass on what every process of a job was sent already."""

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __exit__(self, kind: Any, *unused: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.received is not None:  # it came when the last step had been taken and nobody asked any more
            signal.raise_signal(self.received)


@dataclass
class Options:
    """How a run is looked after; the same for all its stages."""

    seed: int = 0
    resume: bool = False
    save_every: int | None = None  # steps between checkpoints; one is always written at the end of a stage
    eval_every: int = 0  # steps between measures and samples during training; 0: light ones now and then
    quiet: bool = False
    compute: Compute = field(default_factory=Compute)
    place: Place = field(default_factory=lambda: Place(torch.device("cpu")))
    trackers: tuple[Callable[[dict], None], ...] = ()
    out_of_memory: Callable[[str], str] | None = None  # from a stage's name to a sentence


def train(
    run: Run,
    objective: Objective,
    source: Any,
    *,
    optim: Optim,
    stage: str,
    options: Options,
    first_step: int = 0,
    probe: Callable[[int], dict[str, float]] | None = None,
    left_out: Callable[[], set[str]] = set,
) -> int:
    """Trains what requires gradients in the objective for one stage and returns the run's step count after it.

    Args:
        first_step: steps that earlier stages of the run took; steps are numbered through.
        probe: ``probe(step)``: what else to log after the first and every ``eval_every``-th step. It may draw random numbers:
            each step starts its generator anew from (seed, step, rank).
        left_out: names of weights that checkpoints need not hold, because no stage of the run has touched them and their origin is named.
    """
    place, compute, model = options.place, options.compute, objective.model
    batches = Batches(source, optim, options.seed, place, workers=compute.workers)
    total, done, skipped, bad, idle = batches.total_steps(), 0, 0, 0, {"grad_norm": 0, "rewards/margins": 0}
    saved = None
    if options.resume:
        reached, path = run.last_checkpoint() or (0, None)
        saved = load_state(path) if path else {"stage": None}
        if saved["stage"] == stage and first_step <= reached <= first_step + total:
            if not (path / "sharded").exists():
                load_model(model, path)
                objective.extra.load_state_dict(saved["extra"])
            done, skipped = saved["done"], saved["skipped"]
            if batches.stream:
                source.load_state_dict(saved["stream"])
        elif reached >= first_step + total:
            return first_step + total  # this stage is behind us; a later one loads the weights
        else:
            saved = None
        run.forget_after(first_step + done)
    shared = places.share(objective, objective.blocks, place, compute.precision)
    groups = _groups(objective, optim)
    parameters = [p for group in groups for p in group["params"]]
    if not parameters:
        raise RunError(f"stage {stage} trains nothing: no parameter of it requires a gradient")
    # The fused step is one kernel for all parameters; it exists for every device we run on.
    optimizer = torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=not place.sharded or None
    )
    ema = [p.detach().clone() for p in parameters] if optim.ema else []
    if saved is not None:
        _restore(objective, optimizer, ema, saved, path, place)
    scaler = torch.amp.GradScaler(place.device.type, enabled=compute.precision == "fp16")
    if saved is not None and scaler.is_enabled() and saved["scaler"]:  # empty: the run was begun in another precision
        scaler.load_state_dict(saved["scaler"])

    def save() -> None:
        if ema and done == total:  # what the stage hands on is the average
            _average_into(parameters, ema)
        state = {
            "stage": stage, "done": done, "skipped": skipped, "extra": objective.extra.state_dict(), "left_out": sorted(left_out()),
            "scaler": scaler.state_dict(), "stream": source.state_dict() if batches.stream else {},
        }  # fmt: skip
        if place.sharded:
            run.save(
                first_step + done, {}, {**state, "extra": {}}, sharded=_sharded_state(objective, optimizer, ema, parameters), place=place
            )
            return
        names = {id(p): n for n, p in model.named_parameters()}
        averages = {names[id(p)]: e for p, e in zip(parameters, ema, strict=False) if id(p) in names}
        skip = left_out()
        tensors = {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in skip}
        run.save(first_step + done, tensors, {**state, "optimizer": optimizer.state_dict(), "ema": averages}, place=place)

    bar = tqdm(
        total=total, initial=done, desc=stage, unit="step", disable=True if options.quiet or not place.main else None, dynamic_ncols=True,
        mininterval=0.5,
    )  # fmt: skip
    model.train()
    try:
        with Signals() as signals:
            steps = batches(done, total)
            while done < total:
                began = time.perf_counter()
                micros = next(steps)
                place.seed(_step_seed(options.seed, first_step + done, place.rank))
                scale = rate(optim, done, total) / optim.lr
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * scale
                totals = place.sum(torch.stack([m["counts"] for m in micros]).sum(0)).to(place.device)
                measured: dict[str, list] = {}
                for i, micro in enumerate(micros):
                    with places.last_only(shared, i == len(micros) - 1):
                        with places.autocast(place, compute.precision):
                            loss, values = shared(place.to(micro), totals)
                        # DDP and FSDP2 average over processes; the contributions are to be added.
                        scaler.scale(loss * place.processes if place.processes > 1 else loss).backward()
                    for key, value in {"loss": loss.detach(), **values}.items():
                        measured.setdefault(key, []).append(value)
                scaler.unscale_(optimizer)
                norm = _clip(parameters, optim.clip)
                record = _added(measured, place, [float(signals.received is not None), float(_finite_everywhere(norm))])
                stop, finite = record.pop("_0") > 0, record.pop("_1") == place.processes and math.isfinite(record["loss"])
                if finite:
                    scaler.step(optimizer)
                    if optim.level_new:
                        model.level_new_rows()
                    bad = 0
                else:
                    skipped, bad = skipped + 1, bad + 1
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if not finite and bad > compute.bad_steps + (20 if scaler.is_enabled() else 0):  # fp16 looks for its scale at first
                    raise RunError(
                        f"step {first_step + done + 1} ({stage}) has loss {record['loss']} and gradient norm {norm}, the {bad}th in a row that is "
                        "no number; lower the learning rate or look at the data (none of these steps was taken)"
                    )
                if finite and ema:
                    torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - optim.ema)
                done += 1
                seconds = time.perf_counter() - began
                record = {
                    "step": first_step + done,
                    "stage": stage,
                    "loss": record.pop("loss"),
                    "lr": optim.lr * scale,
                    "grad_norm": norm,
                } | record
                if "tokens" in record:
                    record["tokens_per_s"] = round(record.pop("tokens") / seconds, 1)
                record["peak_memory_mb"] = peak_memory_mb()
                if skipped:
                    record["skipped"] = skipped
                if probe is not None and (done == 1 or done % (options.eval_every or PROBE_EVERY) == 0 or done == total):
                    with places.gathered(objective):
                        record |= probe(first_step + done)
                    model.train()
                run.log(record)
                if place.main:
                    for tracker in options.trackers:
                        tracker(record)
                    _warn_when_idle(idle, record, bar, stage)
                bar.set_postfix(
                    {
                        "loss": f"{record['loss']:.3f}",
                        "tok/s": f"{record.get('tokens_per_s', 0):.0f}",
                        "MB": f"{record['peak_memory_mb']:.0f}",
                    },
                    refresh=False,
                )
                bar.update()
                if done == total or stop or (options.save_every and done % options.save_every == 0):
                    save()
                if stop:
                    raise Stopped(
                        f"stopped after step {first_step + done} as asked; the checkpoint of this step is written, --resume continues",
                        signals.received or signal.SIGTERM,
                    )
    except torch.OutOfMemoryError as error:
        hint = options.out_of_memory(stage) if options.out_of_memory else "lower optim.batch and raise optim.accumulate"
        raise RunError(f"out of memory at step {first_step + done + 1} ({stage}): {hint} ({' '.join(str(error).split()[:25])})") from error
    finally:
        bar.close()
    return first_step + total


def _average_into(parameters: list[nn.Parameter], ema: list[Tensor]) -> None:
    for p, average in zip(parameters, ema, strict=True):
        p.detach().copy_(average)


def _groups(objective: Objective, optim: Optim) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay: a part's own where the recipe gives one, the narrowest part first; in the tower times
    ``layer_decay`` for each layer down (BEiT, arXiv:2106.08254)."""

    def by_part(values: dict[str, float]) -> dict[int, float]:
        own: dict[int, float] = {}
        for name in sorted(values, key=lambda name: name == "language"):  # embeddings lie within language
            for p in objective.model.part(name).parameters():
                own.setdefault(id(p), values[name])
        return own

    rates, decays = by_part(optim.lr_of), by_part(optim.weight_decay_of)
    partly = getattr(objective.model, "partly_trained", list)()
    decays |= {id(p): 0.0 for p in partly}  # what is frozen in them must not shrink
    down = {id(p): layers for p, layers in objective.model.encoder.below()} if optim.layer_decay != 1 else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for p in objective.parameters():
        if p.requires_grad:
            peak = rates.get(id(p), optim.lr) * optim.layer_decay ** down.get(id(p), 0)
            decay = decays.get(id(p), optim.weight_decay) if p.ndim > 1 or optim.decay_vectors else 0.0
            groups.setdefault((peak, decay), {"params": [], "peak": peak, "weight_decay": decay})["params"].append(p)
    return list(groups.values())


def _restore(objective: Objective, optimizer, ema: list[Tensor], saved: dict, path: Path, place: Place) -> None:
    if (path / "sharded").exists():
        if not place.sharded:
            raise RunError(f"{path} was saved under FSDP2; resume it under torchrun with --compute.parallel fsdp (any number of processes)")
        import torch.distributed.checkpoint as dcp

        state = _sharded_state(objective, optimizer, ema, [p for g in optimizer.param_groups for p in g["params"]])
        dcp.load(state, checkpoint_id=path / "sharded")
        _load_sharded(objective, optimizer, state)
        return
    if place.sharded:
        raise RunError(f"{path} was saved without FSDP2; resume it with --compute.parallel ddp")
    optimizer.load_state_dict(saved["optimizer"])
    if ema:
        names = {n: p for n, p in objective.model.named_parameters()}
        at = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        for name, value in saved["ema"].items():
            ema[at[id(names[name])]].copy_(value)


def _sharded_state(objective: Objective, optimizer, ema: list[Tensor], parameters: list[nn.Parameter]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, optim = get_state_dict(objective, optimizer)
    names = {id(p): n for n, p in objective.named_parameters()}
    model = {k: v for k, v in weights.items() if k.startswith("model.")}
    rest = {k: v for k, v in weights.items() if not k.startswith("model.")}
    averages = {names[id(p)]: e for p, e in zip(parameters, ema, strict=False)}
    return {"model": {k.removeprefix("model."): v for k, v in model.items()}, "rest": rest, "optimizer": optim, "ema": averages}


def _load_sharded(objective: Objective, optimizer, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import set_state_dict

    weights = {f"model.{k}": v for k, v in state["model"].items()} | state["rest"]
    set_state_dict(objective, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"])


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank * 97) % (1 << 63)


def _clip(parameters: list[nn.Parameter], limit: float) -> float:
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _finite_everywhere(norm: float) -> bool:
    return math.isfinite(norm)


def _added(measured: dict[str, list], place: Place, flags: list[float]) -> dict[str, float]:
    """Contributions of all micro-batches and processes, added; ``_i`` holds the i-th flag, added over processes."""
    flat = [torch.as_tensor(v, dtype=torch.float64, device=place.device) for values in measured.values() for v in values]
    flat = torch.stack(flat).detach().view(len(measured), -1).sum(1)
    flat = place.sum(torch.cat([flat, flat.new_tensor(flags)])).tolist()
    return dict(zip([*measured, *(f"_{i}" for i in range(len(flags)))], flat, strict=True))


def _warn_when_idle(idle: dict[str, int], record: dict, bar: tqdm, stage: str) -> None:
    for key, what in (("grad_norm", "no gradient reaches what this stage trains"), ("rewards/margins", "policy and reference do not part")):
        idle[key] = idle[key] + 1 if record.get(key) == 0 else 0
        if idle[key] == IDLE_STEPS:
            bar.write(
                f"warning: {key} has been 0 for {IDLE_STEPS} steps of {stage}: {what}; look at the learning rate, the labels and the parts"
            )


def peak_memory_mb() -> float:
    """Of this process: CUDA's allocator if it is used, else the largest resident set so far."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
