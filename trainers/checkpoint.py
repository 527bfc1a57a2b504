"""A run's folder and its checkpoints: whole or absent, hashed, the last few kept.

``checkpoints/step-N/`` holds ``model.safetensors`` and ``state.pt`` (optimiser, place in the stage), or under FSDP2 ``sharded/``, which
torch.distributed.checkpoint reads back on any number of processes; ``hashes.json`` covers every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class RunError(Exception):
    """What a user can do something about, in one sentence."""


class Run:
    """A run's folder: ``metrics.jsonl`` (one object a step), ``checkpoints/step-N/`` and whatever its trainer adds.

    Args:
        main: whether this process writes; of several only one does.
    """

    def __init__(self, folder: Path, *, resume: bool = False, keep: int = 2, main: bool = True):
        self.folder, self.keep, self.main = Path(folder), keep, main
        self.metrics = self.folder / "metrics.jsonl"
        if not main:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"output folder {self.folder} is a file; choose another --out")
        if self.folder.exists() and any(self.folder.iterdir()) and not resume:
            raise RunError(f"output folder {self.folder} exists and is not empty; continue it with --resume or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        if self.main:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def write_json(self, name: str, value: Any) -> None:
        if self.main:
            write_atomically(self.folder / name, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())

    # -- checkpoints

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, sharded: dict[str, Any] | None = None, place=None
    ) -> None:
        """A checkpoint appears whole or not at all: written under another name, hashed, then renamed. Older ones go after that.

        Args:
            tensors: the model's weights, written by the main process.
            sharded: instead of them a state dict of DTensors, written by all processes, which must all call.
        """
        root = self.folder / "checkpoints"
        final, partial = root / f"step-{step}", root / f".step-{step}.partial"
        if self.main:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        try:
            if self.main:
                partial.mkdir()
            if sharded is not None:
                import torch.distributed.checkpoint as dcp

                place.barrier()
                dcp.save(sharded, checkpoint_id=partial / "sharded")
            if self.main:
                if tensors:
                    # Tied weights share memory, which safetensors refuses: keep the first name of each.
                    save_file(_untied(tensors), partial / "model.safetensors")
                torch.save(state, partial / "state.pt")
                files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
                (partial / "hashes.json").write_text(json.dumps({name: _sha256(partial / name) for name in files}))
                for name in [*files, "hashes.json"]:  # on the disk before it counts: a power cut must not leave a name without its bytes
                    _to_disk(partial / name)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as Python, safetensors and torch report it
            shutil.rmtree(partial, ignore_errors=True)
            kept, why = self.last_checkpoint(), getattr(error, "strerror", None) or error
            raise RunError(
                f"checkpoint of step {step} could not be written to {root}: {why}; "
                + (f"the one of step {kept[0]} is intact, free space and --resume" if kept else "no earlier one exists")
            ) from error
        if self.main:
            for old, path in self._checkpoints()[: -self.keep]:
                if old < step:
                    shutil.rmtree(path, ignore_errors=True)
            with open(self.metrics, "a") as file:  # what was logged reaches the disk no later than the checkpoint that counts on it
                file.flush()
                os.fsync(file.fileno())
        if place is not None:
            place.barrier()

    def _checkpoints(self) -> list[tuple[int, Path]]:
        root = self.folder / "checkpoints"
        found = [(int(p.name.removeprefix("step-")), p) for p in root.glob("step-*")] if root.exists() else []
        return sorted(found)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """The newest checkpoint whose files match their hashes; a torn or altered one is passed over, saying so."""
        for step, path in reversed(self._checkpoints()):
            try:
                hashes = json.loads((path / "hashes.json").read_text())
                if hashes and all(_sha256(path / name) == value for name, value in hashes.items()):
                    return step, path
            except (OSError, ValueError):
                pass
            if self.main:
                print(f"checkpoint {path} is damaged; trying the one before it")
        return None

    def forget_after(self, step: int) -> None:
        """Drops logged steps beyond a checkpoint, so that a resumed curve has every step once."""
        if self.main and self.metrics.exists():
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


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.pt``; nothing but tensors and plain values is ever unpickled."""
    try:
        return torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RunError(f"{path}/state.pt holds something other than tensors and plain values, or is torn; it was not read") from error


def load_model(model: nn.Module, path: Path) -> None:
    """A checkpoint's weights into an unsharded module. Only what it says it left out (weights that no stage has touched) and names tied to
    another may be missing.

    Args:
        path: the folder ``step-N``.

    Raises:
        RunError: the weights belong to another model.
    """
    if (path / "sharded").exists():
        import torch.distributed.checkpoint as dcp

        tensors = {k: torch.empty_like(v) for k, v in model.state_dict().items()}
        stored = set(dcp.FileSystemReader(path / "sharded").read_metadata().state_dict_metadata)
        tensors = {k: v for k, v in tensors.items() if f"model.{k}" in stored}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that no process group is there
            dcp.load({"model": tensors}, checkpoint_id=path / "sharded", no_dist=True)
    else:
        tensors = load_file(path / "model.safetensors")
    left_out = set(load_state(path).get("left_out", ()))
    own = dict(model.named_parameters(remove_duplicate=False))
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # a shape that does not fit
        raise RunError(f"{path} does not fit this model: {' '.join(str(error).split()[:40])}") from error
    present = {own[name].data_ptr() for name in own if name not in missing}
    lost = [n for n in missing if n not in left_out and (n not in own or own[n].data_ptr() not in present)]
    if lost or unexpected:
        raise RunError(f"{path} does not fit this model: missing {lost[:3]}, unexpected {list(unexpected)[:3]}")
