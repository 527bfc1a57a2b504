"""The loop, written once: accumulate, clip, step, log, save, resume. A trainer brings a step function and its batches."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmfast.spec import Optim

PROBE_EVERY = 20


class RunError(Exception):
    """What a user can do something about, in one sentence."""


class Run:
    """A run's folder: ``metrics.jsonl`` (one object a step), ``checkpoints/step-N/`` and whatever its trainer adds."""

    def __init__(self, folder: Path, *, resume: bool = False, keep: int = 2):
        self.folder, self.keep = Path(folder), keep
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"output folder {self.folder} is a file; choose another --out")
        if self.folder.exists() and any(self.folder.iterdir()) and not resume:
            raise RunError(f"output folder {self.folder} exists and is not empty; continue it with --resume or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.folder / name, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())

    # -- checkpoints

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """A checkpoint appears whole or not at all: written under another name, hashed, then renamed. Older ones go after that."""
        root = self.folder / "checkpoints"
        root.mkdir(exist_ok=True)
        final, partial = root / f"step-{step}", root / f".step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            # Tied weights share memory, which safetensors refuses: keep the first name of each.
            save_file(_untied(tensors), partial / "model.safetensors")
            torch.save(state, partial / "state.pt")
            hashes = {name: _sha256(partial / name) for name in ("model.safetensors", "state.pt")}
            (partial / "hashes.json").write_text(json.dumps(hashes))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as Python, safetensors and torch report it
            shutil.rmtree(partial, ignore_errors=True)
            kept, why = self.last_checkpoint(), getattr(error, "strerror", None) or error
            raise RunError(
                f"checkpoint of step {step} could not be written to {root}: {why}; "
                + (f"the one of step {kept[0]} is intact, free space and --resume" if kept else "no earlier one exists")
            ) from error
        for old, path in self._checkpoints()[: -self.keep]:
            if old < step:
                shutil.rmtree(path, ignore_errors=True)
        with open(self.metrics, "a") as file:  # what was logged reaches the disk no later than the checkpoint that counts on it
            file.flush()
            os.fsync(file.fileno())

    def _checkpoints(self) -> list[tuple[int, Path]]:
        root = self.folder / "checkpoints"
        found = [(int(p.name.removeprefix("step-")), p) for p in root.glob("step-*")] if root.exists() else []
        return sorted(found)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """The newest checkpoint whose files match their hashes; a torn or altered one is passed over, saying so."""
        for step, path in reversed(self._checkpoints()):
            try:
                hashes = json.loads((path / "hashes.json").read_text())
                if all(_sha256(path / name) == value for name, value in hashes.items()):
                    return step, path
            except (OSError, ValueError):
                pass
            print(f"checkpoint {path} is damaged; trying the one before it")
        return None

    def forget_after(self, step: int) -> None:
        """Drops logged steps beyond a checkpoint, so that a resumed curve has every step once."""
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            write_atomically(self.metrics, "".join(lines).encode())


def _finite(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line torn by a crash


def write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror or error}; what was there before is intact") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[tuple[int, torch.Size]] = set()
    out = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        out[name] = tensor.detach().contiguous()
    return out


def load_model(model: nn.Module, path: Path) -> None:
    """A checkpoint's weights into a module; names missing because they are tied to another are allowed, nothing else."""
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    own = dict(model.named_parameters(remove_duplicate=False))
    present = {own[name].data_ptr() for name in own if name not in missing}
    untied = [name for name in missing if name not in own or own[name].data_ptr() not in present]
    if untied or unexpected:
        raise RunError(f"{path} does not fit this model: missing {untied[:3]}, unexpected {list(unexpected)[:3]}")


# ----------------------------------------------------------------------------------------------------------------- order


class Order:
    """Which items a step sees: a new permutation every epoch, a function of (seed, step) alone."""

    def __init__(self, items: int, batch: int, seed: int):
        self.items, self.batch, self.seed = items, min(batch, items), seed
        self.per_epoch = max(items // self.batch, 1)
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            self._epoch, self._permutation = epoch, torch.randperm(self.items, generator=generator)
        return self._permutation[at * self.batch : (at + 1) * self.batch]


def total_steps(optim: Optim, items: int) -> int:
    """Optimiser steps of a stage: given, or from epochs over the items."""
    if optim.steps is not None:
        return optim.steps
    if optim.epochs is None:
        raise RunError("a stage's optim needs steps or epochs")
    return max(1, round(optim.epochs * items / (optim.batch * optim.accumulate)))


def rate(optim: Optim, step: int, total: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, plateau, then cosine to the floor or constant."""
    warm = optim.warmup * total if optim.warmup < 1 else optim.warmup
    scale = min(1.0, (step + 1) / warm) if warm > 0 else 1.0
    if optim.schedule == "cosine":
        at = max(0.0, (step / total - optim.hold) / (1 - optim.hold)) if optim.hold < 1 else 0.0
        scale *= 0.5 * (1 + math.cos(math.pi * at)) * (1 - optim.floor) + optim.floor
    return optim.lr * scale


# ------------------------------------------------------------------------------------------------------------------ loop


def train(
    run: Run,
    model: nn.Module,
    parameters: list[nn.Parameter],
    step_function: Callable[[Tensor], tuple[Tensor, dict[str, float]]],
    *,
    optim: Optim,
    items: int,
    seed: int,
    stage: str,
    first_step: int = 0,
    resume: bool = False,
    save_every: int | None = None,
    extra: nn.Module | None = None,
    probe: Callable[[], dict[str, float]] | None = None,
    quiet: bool = False,
) -> int:
    """Trains ``parameters`` for one stage and returns the run's step count after it.

    Args:
        step_function: from the items of a micro-batch to its loss and what to log (averaged over a step's micro-batches).
        first_step: steps that earlier stages of the run took; steps are numbered through.
        extra: a module that trains beside the model and is saved with it (a head of the stage).
        probe: what else to log after the first and every ``PROBE_EVERY``-th step; it must draw no random numbers.
        save_every: steps between checkpoints; one is always written at the end of the stage.
    """
    total = total_steps(optim, items)
    # The fused step is one kernel for all parameters; it exists for every device we run on.
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    order, done = Order(items, optim.batch, seed), 0

    def state() -> dict[str, Any]:
        return {
            "optimizer": optimizer.state_dict(),
            "stage": stage,
            "done": done,
            "rng": torch.get_rng_state(),
            "extra": extra.state_dict() if extra is not None else {},
        }

    if resume:
        reached, path = run.last_checkpoint() or (0, None)
        saved = torch.load(path / "state.pt", weights_only=True) if path else {"stage": None}
        if saved["stage"] == stage and first_step <= reached <= first_step + total:
            load_model(model, path / "model.safetensors")
            optimizer.load_state_dict(saved["optimizer"])
            if extra is not None:
                extra.load_state_dict(saved["extra"])
            torch.set_rng_state(saved["rng"])
            done = saved["done"]
        elif reached >= first_step + total:
            return first_step + total  # this stage is behind us; a later one loads the weights
        run.forget_after(first_step + done)
    bar = tqdm(total=total, initial=done, desc=stage, unit="step", disable=quiet or None, dynamic_ncols=True, mininterval=0.5)
    model.train()
    while done < total:
        began, losses, logged = time.perf_counter(), [], []
        for group in optimizer.param_groups:
            group["lr"] = rate(optim, done, total)
        for micro in range(optim.accumulate):
            loss, values = step_function(order(done * optim.accumulate + micro))
            (loss / optim.accumulate).backward()
            losses.append(loss.detach())
            logged.append(values)
        norm = nn.utils.clip_grad_norm_(parameters, optim.clip or math.inf)
        value = torch.stack(losses).mean().item()
        if not math.isfinite(value + norm.item()):
            raise RunError(
                f"step {first_step + done + 1} ({stage}) has loss {value} and gradient norm {norm.item()}; lower the learning rate or look at "
                "the data (the step was not taken)"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        seconds = time.perf_counter() - began
        record = {"step": first_step + done, "stage": stage, "loss": value, "lr": optimizer.param_groups[0]["lr"]}
        record |= {"grad_norm": norm.item()} | {key: sum(v[key] for v in logged) / len(logged) for key in logged[0]}
        if "tokens" in record:
            record["tokens_per_s"] = round(record.pop("tokens") * optim.accumulate / seconds, 1)
        record["peak_memory_mb"] = peak_memory_mb()
        if probe is not None and (done == 1 or done % PROBE_EVERY == 0):
            record |= probe()
            model.train()
        run.log(record)
        bar.update()
        bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        if done == total or (save_every and done % save_every == 0):
            run.save(first_step + done, dict(model.state_dict(keep_vars=True)), state())
    bar.close()
    return first_step + total


def peak_memory_mb() -> float:
    """Of this process: CUDA's allocator if there is one, else the largest resident set so far."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
