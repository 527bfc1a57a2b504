"""Does the tiny form of every architecture do what its paper says? Each over several seeds, and against its controls.

    python bench/trainers/architectures.py                        # all of them; one to three and a half minutes each, seed and variant
    python bench/trainers/architectures.py --only llava --seeds 0 --variants "" blind
    python bench/trainers/architectures.py --tables               # trains nothing, prints what the file holds and writes it into docs/

Every run is the command ``mmfast train NAME --tiny --device cpu --seed S`` and the variant's options, in a process and a folder of its own, so
that nothing of an earlier run is there to make it quick; its seconds are those that processors spent on all of it, from the start of Python to
the end of the exam (on one thread the time it takes on an idle machine, whatever else runs beside it). What its ``eval.json`` says becomes the
rows of that recipe, variant and seed in ``bench/results/architectures.csv``, in place of those from before.
Limits and controls: the page of each architecture in docs/.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mmfast.trainers.measured import filled, read, shown, table

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(os.environ.get("MMFAST_RESULTS", ROOT / "bench" / "results")) / "architectures.csv"
COLUMNS = ["recipe", "variant", "seed", "commit", "cpu", "threads", "seconds", "measure", "value"]

# So short that what was there before still tells.
_SHORT = ["--stages.speak.optim.steps", "100", "--stages.speak.optim.lr", "1e-3"]

# A recipe's variants and the options that make them; "" is the tiny form as it is. Blind: what the words alone give away.
RUNS: dict[str, dict[str, list[str]]] = {
    "blip2": {
        "": [],
        "blind": ["--stages.speak.data.blind", "true"],
        "no stage 1": ["--stages.see", "null"],
        "short stage 2": _SHORT,
        "short stage 2, no stage 1": [*_SHORT, "--stages.see", "null"],
        "stage 1": ["--stages.speak", "null"],
    },
    "blip2_flan_t5": {
        "": [],
        "blind": ["--stages.speak.data.blind", "true"],
        "captions whole": ["--stages.speak.template", "blip2_t5_prompt"],
    },
    "chameleon": {
        "": [],
        "blind": ["--stages.pretrain.data.blind", "true", "--stages.anneal.data.blind", "true", "--stages.sft.data.blind", "true"],
    },
    "flamingo": {"": [], "blind": ["--stages.interleaved.data.blind", "true"]},
    "fromage": {
        "": [],
        "blind": ["--stages.pairs.data.blind", "true"],
        "no contrast": ["--stages.pairs.contrast", "0"],
    },
    "frozen": {"": [], "blind": ["--stages.captions.data.blind", "true"]},
    "kosmos_1": {
        "": [],
        "blind": [
            word
            for stage, kinds in (("pretrain", ()), ("instruct", ("instructions",)))
            for kind in (*kinds, "text", "captions", "episodes")
            for word in (f"--stages.{stage}.data.parts.shapes_{kind}.blind", "true")
        ],
    },
    "kosmos_2": {"": [], "blind": ["--stages.pretrain.data.blind", "true", "--stages.instruct.data.blind", "true"]},
    "llama_adapter": {"": [], "no adapter": ["--stages.answers", "null"], "blind": ["--stages.answers.data.blind", "true"]},
    "llava": {"": [], "blind": ["--stages.align.data.blind", "true", "--stages.instruct.data.blind", "true"]},
}


def run(recipe: str, variant: str, seed: int, folder: Path) -> list[dict]:
    """Trains one of them into ``folder``, an empty one; its rows."""
    command = [sys.executable, "-m", "mmfast.trainers", "train", recipe, "--tiny", "--device", "cpu", "--seed", str(seed), "--quiet"]
    before = _processor_seconds()
    subprocess.run([*command, "--out", str(folder / "run"), *RUNS[recipe][variant]], check=True, cwd=folder, env=_environment())
    seconds = _processor_seconds() - before
    measured = json.loads((folder / "run" / "eval.json").read_text())
    common = {"recipe": recipe, "variant": variant, "seed": seed, **where(), "seconds": f"{seconds:.1f}"}
    return [{**common, "measure": name, "value": f"{value:.6g}"} for name, value in measured.items() if isinstance(value, int | float)]


def _processor_seconds() -> float:
    """Of all processes that were begun here and have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _environment() -> dict[str, str]:
    """Ours, without a place where trained models are kept, and with this checkout to be imported."""
    kept = {name: value for name, value in os.environ.items() if name != "MMFAST_CACHE"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))}


def where() -> dict[str, str]:
    """Commit ("+" where the code has changed since), processor and threads."""
    sys.path.insert(0, str(ROOT / "bench"))
    import timing

    facts, git = timing.environment(), ["git", "status", "--porcelain", "mmfast", "trainers"]
    changed = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    commit = facts["commit"].removesuffix("+changes")
    return {"commit": commit + ("+" if changed else ""), "cpu": facts["device"], "threads": str(facts["threads"])}


# ------------------------------------------------------------------------------------------------------------------ results


def write(rows: Iterable[dict], path: Path = FILE) -> None:
    """The file with these rows over those of the same recipe, variant and seed; in order, and replaced whole."""

    def key(row: dict) -> tuple[str, str, int]:
        return row["recipe"], row["variant"], int(row["seed"])

    rows = list(rows)
    new = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".part"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*(row for row in read(path) if key(row) not in new), *rows], key=lambda row: (*key(row), row["measure"])))
    path.with_suffix(".part").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(RUNS), metavar="NAME", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", metavar="NAME", help='some variants; "" is the tiny form as it is')
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the run folders there")
    parser.add_argument("--tables", action="store_true", help="train nothing, print the tables and write them into docs/")
    args = parser.parse_args()
    names = args.only or list(RUNS)
    for name in () if args.tables else names:
        for variant in (v for v in RUNS[name] if args.variants is None or v in args.variants):
            for seed in args.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    kept = args.keep and args.keep / "-".join(filter(None, (name, variant, str(seed))))
                    if kept:
                        kept.mkdir(parents=True)
                    rows = run(name, variant, seed, kept or Path(folder))
                write(rows)
                values = {row["measure"]: row["value"] for row in rows}
                told = ", ".join(f"{m} {values[m]}" for m in shown(name, values))
                print(f"{name} {variant or 'as it is'}, seed {seed}: {told}; {rows[0]['seconds']} s", flush=True)
    for name in names:
        print(f"\n{name}\n\n{table(name, read(FILE))}")
    for page in sorted((ROOT / "docs").glob("*.md")) if args.tables else ():
        if (text := filled(page.read_text(), read(FILE))) != page.read_text():
            page.write_text(text)


if __name__ == "__main__":
    main()
