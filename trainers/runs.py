"""A run folder opened again: its recipe, and its model as the newest checkpoint has it."""

from __future__ import annotations

import json
from pathlib import Path

from mmfast.spec import Alignment, System

from . import config
from .checkpoint import Run, RunError
from .place import Place


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "recipe.json").is_file()


def read_recipe(folder: Path) -> tuple[System | Alignment, int]:
    """A run's recipe and seed.

    Raises:
        RunError: no run folder, or one whose recipe cannot be read.
    """
    try:
        saved = json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is no run folder: recipe.json is missing or unreadable") from error
    recipe = config.from_dict({k: v for k, v in saved.items() if k != "seed"}, str(folder / "recipe.json"))
    return recipe, saved.get("seed", 0)


def open_run(folder: Path, *, place: Place | None = None):
    """The session of a run, its model trained as far as the run got, and the recipe.

    Raises:
        RunError: no run folder, or none of its checkpoints is intact.
    """
    from .supervised import Session, restore

    recipe, seed = read_recipe(folder)
    last = Run(folder, resume=True).last_checkpoint()
    if last is None:
        raise RunError(f"{folder} holds no intact checkpoint")
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    session = Session(system, seed=seed, place=place)
    if isinstance(recipe, Alignment):
        restore(session, (), last[1], lora=recipe.lora)
    else:
        restore(session, recipe.stages, last[1])
    session.model.train_only(())
    session.model.eval()
    return session, recipe
