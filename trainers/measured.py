"""What was measured of the architectures: the rows that bench/trainers/architectures.py writes, as tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Where the rows lie in a checkout.
FILE = Path("bench", "results", "architectures.csv")

# The measures that a recipe's table shows, the most telling first; of one that is not named here all with a "/" in their name, else those of "".
SHOWN: dict[str, tuple[str, ...]] = {
    "fromage": ("retrieval/recall@1", "retrieval/recall@5", "retrieval/recall@10", "caption/gain", "caption/recall"),
    "": ("recall", "chair_s", "pope_random_accuracy", "pope_adversarial_accuracy"),
    "blip2": (
        "caption/recall", "caption/gain", "retrieval/recall@1", "retrieval_text/recall@1", "reranked/recall@1", "reranked_text/recall@1",
        "retrieval/chance@1", "matching/accuracy",
    ),
    "blip2_flan_t5": ("caption/recall", "caption/gain", "caption/chair_s"),
    "chameleon": ("codebook/usage", "drawn/asked", "drawn/chance", "drawn/ceiling", "caption/class", "caption/chance"),
    "flamingo": (
        "few_shot/0", "few_shot/4", "few_shot/0_told", "few_shot/1", "few_shot/chance", "ranked/4", "ranked/4_swapped", "naming/inner_1",
    ),
    "frozen": ("few_shot/0", "few_shot/4", "few_shot/1", "few_shot/2", "few_shot/chance", "naming/inner_1"),
    "kosmos_1": (
        "caption/recall", "few_shot/1", "few_shot/0", "few_shot/0_told", "few_shot/4", "few_shot/chance", "caption/chair_s", "caption/gain",
        "instructions/right", "instructions/constant", "ranked/4", "ranked/4_swapped",
    ),
    "kosmos_2": (
        "grounding/mean_iou", "grounding/accuracy", "grounding/unread", "grounding/permuted_mean_iou", "grounding/centre_mean_iou",
        "grounding/constant_mean_iou", "grounding/ceiling_mean_iou", "caption/boxes_right", "caption/recall",
    ),
}  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """All rows, none where nothing was measured yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def shown(recipe: str, measures: Iterable[str]) -> list[str]:
    """Which of these measures the table of a recipe shows."""
    measures = list(dict.fromkeys(measures))
    named = SHOWN.get(recipe) or [name for name in measures if "/" in name] or SHOWN[""]
    return [name for name in named if name in measures] or measures


def table(recipe: str, rows: Sequence[dict], measures: Sequence[str] = ()) -> str:
    """A Markdown table: a line a variant, a column a measure, mean over seeds and the range of the seeds behind it."""
    own = [row for row in rows if row["recipe"] == recipe]
    if not own:
        return f"{recipe}: nothing measured yet"
    names = list(measures) or shown(recipe, (row["measure"] for row in own))
    lines = ["| " + " | ".join(["variant", "seeds", *names, "seconds"]) + " |", "|" + " --- |" * (len(names) + 3)]
    for variant in dict.fromkeys(row["variant"] for row in own):
        of = [row for row in own if row["variant"] == variant]
        seeds = {row["seed"]: float(row["seconds"]) for row in of}
        cells = [_spread(_values(of, name)) for name in names]
        lines.append("| " + " | ".join([variant or "as it is", str(len(seeds)), *cells, f"{max(seeds.values()):.0f}"]) + " |")
    return "\n".join(lines)


def filled(page: str, rows: Sequence[dict]) -> str:
    """A page of the documents with the table of NAME behind every line ``<!-- measured: NAME -->``, in place of what stood there."""
    return re.sub(
        r"(<!-- measured: (\w+) -->\n)(?:\|.*\n|\w+: nothing measured yet\n)*", lambda found: f"{found[1]}{table(found[2], rows)}\n", page
    )


def effect(recipe: str, rows: Sequence[dict]) -> str:
    """Three measures in a few words, means over seeds, the controls' in brackets: "recall 0.95 (blind 0.13), .. 3 seeds"."""
    own = [row for row in rows if row["recipe"] == recipe]
    mine = [row for row in own if not row["variant"]]
    if not mine:
        return "-"
    controls, told = [v for v in dict.fromkeys(row["variant"] for row in own) if v], []
    for name in shown(recipe, (row["measure"] for row in mine))[:3]:
        beside = [(v, _values([row for row in own if row["variant"] == v], name)) for v in controls]
        against = ", ".join(f"{v} {_mean(values)}" for v, values in beside if values)
        told.append(f"{name} {_mean(_values(mine, name))}" + (f" ({against})" if against else ""))
    seeds = len({row["seed"] for row in mine})
    return f"{', '.join(told)}; {seeds} seed{'s' * (seeds > 1)}"


def _values(rows: Iterable[dict], measure: str) -> list[float]:
    return [float(row["value"]) for row in rows if row["measure"] == measure]


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3g}"


def _spread(values: Sequence[float]) -> str:
    """``0.51 (0.48 .. 0.55)``: mean, smallest and largest."""
    if not values:
        return "-"
    return _mean(values) if len(values) == 1 else f"{_mean(values)} ({min(values):.3g} .. {max(values):.3g})"
