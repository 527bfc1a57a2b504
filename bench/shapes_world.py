"""Does alignment on the shapes world do what it promises? Three seeds, each a world, a base model and an exam of its own, with controls.

    python bench/shapes_world.py            # about 12 minutes on two cores; bases are cached in runs/.cache

Per seed: the base must pass its gate, then DPO on the base's own hallucinated captions is compared with two controls of the same cost, DPO
with the rejected texts shuffled among pairs and supervised training on the chosen texts. Writes ``bench/results/shapes_world.json``.
The thresholds, and why DPO is not asked to beat the supervised control, are in docs/shapes_world.md.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import timing
from mmfast.trainers.evaluate import Exam
from mmfast.trainers.loop import Run
from mmfast.trainers.preference import train_alignment
from mmfast.trainers.recipes.align.dpo import RECIPE as DPO
from mmfast.trainers.recipes.architectures.llava import RECIPE as LLAVA
from mmfast.trainers.supervised import base_model

from mmfast.eval.stats import paired_bootstrap, ratio_of_sums
from mmfast.models import tiny
from mmfast.spec import Contrast, Likelihood

SCENES = 1000
KEYS = ("chair_i", "chair_s", "recall", "len", "pope_adversarial_f1", "yes_ratio_adversarial")


def methods() -> dict:
    dpo = tiny(DPO)
    return {
        "dpo": dpo,
        "shuffled": replace(dpo, name="dpo_shuffled", data=replace(dpo.data, shuffled=True)),
        "sft": replace(dpo, name="sft_on_chosen", terms=(Likelihood("chosen"),)),
    }


def one_seed(seed: int, cache: Path) -> dict:
    import numpy as np

    base, _ = base_model(tiny(LLAVA), seed=seed, cache=cache)
    exam = Exam(base, scenes=SCENES)
    before, details = exam(base)
    blind, _ = exam(base, permuted=True)
    result = {
        "seed": seed,
        "base": before,
        "permuted": {k: blind[k] for k in ("recall", "pope_random_accuracy", "pope_adversarial_accuracy")},
    }
    weights = copy.deepcopy(base.model.state_dict())
    rows = np.stack([details["false"], details["mentions"]], 1)
    for name, recipe in methods().items():
        base.model.load_state_dict(weights)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), resume=True)
            train_alignment(recipe, base, run, quiet=True)
            last = json.loads(run.metrics.read_text().splitlines()[-1])
        after, d = exam(base)
        change = paired_bootstrap(rows, np.stack([d["false"], d["mentions"]], 1), ratio_of_sums)
        result[name] = {
            **{k: after[k] for k in KEYS},
            "chair_s_relative": after["chair_s"] / before["chair_s"] - 1,
            "recall_change": after["recall"] - before["recall"],
            "len_relative": after["len"] / before["len"] - 1,
            "pope_adversarial_f1_change": after["pope_adversarial_f1"] - before["pope_adversarial_f1"],
            "chair_i_change_95": change,
            "margin": last.get("rewards/margins", 0.0) / recipe.beta if any(isinstance(t, Contrast) for t in recipe.terms) else None,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(seed, name, {k: round(v, 4) for k, v in result[name].items() if isinstance(v, float)}, change, flush=True)
    return result


def judge(seeds: list[dict]) -> dict[str, bool]:
    """Every rule by name, and whether it held."""

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    rules = {}
    for s in seeds:
        b, p = s["base"], s["permuted"]
        rules[f"seed {s['seed']}: base recall >= .93, chair_s .20-.32, every caption ends"] = (
            b["recall"] >= 0.93 and 0.20 <= b["chair_s"] <= 0.32 and b["ended"] == 1.0
        )
        rules[f"seed {s['seed']}: POPE accuracy >= .97 / .95 / .91"] = all(
            b[f"pope_{m}_accuracy"] >= least for m, least in (("random", 0.97), ("popular", 0.95), ("adversarial", 0.91))
        )
        rules[f"seed {s['seed']}: blind recall <= .20, blind POPE accuracy .50 +- .03"] = p["recall"] <= 0.20 and all(
            abs(p[k] - 0.5) <= 0.03 for k in ("pope_random_accuracy", "pope_adversarial_accuracy")
        )
        rules[f"seed {s['seed']}: chair_i falls, 95 % interval below 0"] = s["dpo"]["chair_i_change_95"][2] < 0
    dpo = [s["dpo"] for s in seeds]
    rules["chair_s -30 % in the mean"] = mean(d["chair_s_relative"] for d in dpo) <= -0.30
    rules["recall loss <= 2.5 points in the mean, none > 3.5"] = (
        mean(-d["recall_change"] for d in dpo) <= 0.025 and max(-d["recall_change"] for d in dpo) <= 0.035
    )
    rules["length within 8 % in the mean, none over 10 %"] = (
        mean(abs(d["len_relative"]) for d in dpo) <= 0.08 and max(abs(d["len_relative"]) for d in dpo) <= 0.10
    )
    rules["POPE adversarial F1 not below -0.5 points"] = min(d["pope_adversarial_f1_change"] for d in dpo) >= -0.005
    rules["at least 1.4 x the shuffled control"] = mean(d["chair_s_relative"] for d in dpo) <= 1.4 * mean(
        s["shuffled"]["chair_s_relative"] for s in seeds
    )
    return rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=timing.ROOT / "runs" / ".cache")
    args = parser.parse_args()
    seeds = [one_seed(seed, args.cache) for seed in args.seeds]
    rules = judge(seeds)
    for rule, held in rules.items():
        print("held  " if held else "FAILED", rule)
    out = timing.RESULTS / "shapes_world.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": timing.environment(), "rules": rules, "seeds": seeds}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
