"""Experiment trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio, each when asked for and installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmfast.spec import nearest

from .checkpoint import RunError

KNOWN = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def open_trackers(names: str, folder: Path, recipe: dict[str, Any]) -> tuple[Callable[[dict], None], ...]:
    """A function per tracker of the comma-separated ``names`` that takes a step's record.

    Raises:
        RunError: an unknown tracker, or one that is not installed.
    """
    opened = []
    for name in filter(None, names.split(",")):
        if name not in KNOWN:
            raise RunError(f"--track {name}: unknown tracker{nearest(name, KNOWN)}; there are {', '.join(KNOWN)}")
        if importlib.util.find_spec(KNOWN[name]) is None:
            raise RunError(
                f"--track {name}: the package is not installed; pip install {name}, or leave it out (metrics.jsonl is always written)"
            )
        opened.append(_open(name, folder, recipe))
    return tuple(opened)


def _open(name: str, folder: Path, recipe: dict[str, Any]) -> Callable[[dict], None]:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(record: dict) -> None:
            for key, value in _numbers(record).items():
                writer.add_scalar(key, value, record["step"])
            writer.flush()

        return write
    module = importlib.import_module(name)
    run = module.init(project="mmfast", name=folder.name, config=recipe)
    return lambda record: (run or module).log(_numbers(record), step=record["step"])


def _numbers(record: dict) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
