"""Plots and tables of what was measured: docs/performance.md and docs/img/performance-*.svg, from bench/results/<device>/*.csv alone.

    python bench/plots.py                   # both; plots need matplotlib (mmfast[bench])
    python bench/plots.py --tables          # docs/performance.md alone; the standard library is enough
    python bench/plots.py --goals FOLDER    # prints the goals against what FOLDER holds

A ratio is the peer's median over ours, so more than 1 is faster than the peer; over several shapes the geometric mean, and the worst shape beside it.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "img"
BEGIN, END = "<!-- below: written by bench/plots.py -->", "<!-- end of what bench/plots.py wrote -->"


# ----------------------------------------------------------------------------------------------------------------------- results


@dataclass
class Device:
    """One folder of results: ``nvidia-h200``, ``cpu-2-threads``."""

    name: str
    rows: dict[str, list[dict]]  # by file
    env: dict[str, dict]  # by file

    @property
    def cpu(self) -> bool:
        return self.name.startswith("cpu")


def load(results: Path) -> list[Device]:
    devices = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()) if results.is_dir() else []:
        rows = {}
        for file in sorted(folder.glob("*.csv")):
            with open(file, newline="") as f:
                rows[file.stem] = list(csv.DictReader(f))
        env = folder / "env.json"
        if rows:
            devices.append(Device(folder.name, rows, json.loads(env.read_text()) if env.exists() else {}))
    return sorted(devices, key=lambda d: d.cpu)


@dataclass
class Ratio:
    mean: float
    shapes: int
    worst: float
    worst_shape: str


def ratio(rows: Iterable[dict], peer: str, ours: str = "mmfast", value: str = "median_ms") -> Ratio | None:
    """peer over ours, paired by everything that names a case; None if no case has both. A peer ``name*`` is the quickest that begins so."""
    cases: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if r.get(value):
            case = (r["op"], r["mode"], r["dtype"], r["shape"], r.get("valid_fraction", ""))
            cases.setdefault(case, {})[r["provider"]] = float(r[value])
    found = {}
    for case, by in cases.items():
        theirs = [v for name, v in by.items() if name == peer or (peer.endswith("*") and name.startswith(peer[:-1]))]
        if by.get(ours) and theirs:
            found[case] = min(theirs) / by[ours]
    if not found:
        return None
    worst = min(found, key=found.get)
    place = worst[3] + (f", {float(worst[4]):.0%} scored" if worst[4] and len({c[4] for c in found}) > 1 else "")
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    return Ratio(mean, len(found), found[worst], place)


# ------------------------------------------------------------------------------------------------------------------------- goals


@dataclass
class Goal:
    """What we set out to reach against one or several peers, and which rows tell."""

    what: str
    gpu: bool
    file: str
    peers: dict[str, tuple[str, float]]  # what the reader calls it: (provider, ratio to reach); "graph: .." against our own graph
    limits: str  # what bounds the op, and what would be tried next
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column: accepted values, ``begins so*``
    ours: str = "mmfast"
    memory: float = 0.0  # the peer's peak over ours, against the first peer

    def select(self, rows: list[dict]) -> list[dict]:
        def fits(value: str, accepted: tuple[str, ...]) -> bool:
            return any(value.startswith(a[:-1]) if a.endswith("*") else value == a for a in accepted)

        return [r for r in rows if all(fits(r.get(c, ""), v) for c, v in self.where.items())]


IN_GRAPHS = "SDPA, best backend, both in CUDA graphs"
SHORT = "memory: every key and value once. The projections around it cost several times the core"
GOALS = [
    Goal("resampler attention, forward, bf16, batch 64 and 256", True, "attention",
         {"the module's own core": ("eager", 5), "concatenation + SDPA": ("concat+sdpa", 2.2), "SDPA, best backend": ("sdpa*", 1.3),
          "concatenation + SDPA, both in CUDA graphs": ("graph: concat+sdpa", 2.2), IN_GRAPHS: ("graph: sdpa*", 1.3)},
         f"{SHORT}. At least 75 % of a copy's bandwidth is the second half of this goal: columns gbps and floor_ms",
         {"op": ("perceiver",), "mode": ("forward",), "dtype": ("bfloat16",), "shape": ("Flamingo 64 x (256+64), 8 x 64, batch 64", "Flamingo 64 x (256+64), 8 x 64, batch 256")}),
    Goal("the same, backward", True, "attention", {"SDPA, best backend": ("sdpa*", 1.5)},
         "latency: barriers between five small products a tile of 32 keys, three CTAs a multiprocessor; memory would allow three times the speed",
         {"op": ("perceiver",), "mode": ("backward",), "dtype": ("bfloat16",), "shape": ("Flamingo 64 x (256+64), 8 x 64, batch 64", "Flamingo 64 x (256+64), 8 x 64, batch 256")}),
    Goal("the same, 2,112 keys, batch 1 and 8, forward", True, "attention",
         {"SDPA, best backend": ("sdpa*", 1.5), IN_GRAPHS: ("graph: sdpa*", 1.5)},
         "launches and idle multiprocessors: 8 to 64 heads for over a hundred of them, so the keys are cut into runs and joined by a second kernel",
         {"op": ("perceiver",), "mode": ("forward",), "dtype": ("bfloat16",), "shape": ("Flamingo 64 x (2048+64)*",)}),
    *(Goal(f"Q-Former attention with masks and dropout, forward, {short}", True, "attention",
           {"transformers' eager code": ("eager", 4), "SDPA with the mask, best backend": ("sdpa*", 1.5), IN_GRAPHS: ("graph: sdpa*", 1.5)},
           "launches at these sizes; dropout's random numbers", {"op": ("qformer",), "mode": ("forward",), "dtype": (dtype,)})
      for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))),
    Goal("nearest code, 32 images on 8192 x 256", True, "vq",
         {"cdist + argmin, fp32": ("cdist+argmin", 12), "compiled, tf32": ("addmm+argmin, compiled, tf32", 3), "cuVS": ("cuvs", 4)},
         "the rate of mma.sync in fp16; the next step is wgmma behind the same interface",
         {"mode": ("search",), "shape": ("(32768, 8192, 256)",)}),
    Goal("codebook training step, 32 images", True, "vq", {"vector-quantize-pytorch": ("vector-quantize-pytorch", 20)},
         "the screen of the search, two thirds of the kernels' time; Python between the kernels", {"mode": ("training step",), "shape": ("(32768,*",)}, memory=20),
    Goal("cross-entropy from hidden states, every row counts, 4,096 rows and more", True, "linear_logp",
         {"whole logits": ("eager", 1.2), "Liger's per-token op": ("liger per token", 1.15), "QuACK": ("quack", 0.95), "Liger's FLCE": ("liger", 5)},
         "three products of the matrix library; nothing can be much more than a third ahead of whole logits", {"op": ("cross-entropy",)}),
    Goal("DPO at LLaVA's head, 15 % scored", True, "linear_logp",
         {"whole logits, as TRL": ("eager", 5), "Liger's DPO": ("liger", 6), "Cut Cross-Entropy": ("cut-cross-entropy", 1.3)},
         "three products over the rows that count", {"op": ("dpo",), "valid_fraction": ("0.15",)}, memory=8),
    Goal("advantages, 1,024 steps", True, "ppo", {"the loop over columns": ("eager loop", 500)},
         "what a call costs on the host", {"mode": ("gae",), "shape": ("(64, 1024)",)}),
    Goal("PPO losses with gradients", True, "ppo", {"plain PyTorch": ("eager", 8)}, "what a call and its backward cost on the host, and the autograd engine", {"mode": ("policy*", "value*")}),
    Goal("nearest code, 1024 x 8192 x 256, fp32 products", False, "vq", {"cdist + argmin": ("cdist+argmin", 2), "faiss": ("faiss", 1)},
         "the multiply-add units: about 200 of 218 GFLOP/s", {"mode": ("search",), "shape": ("(1024, 8192, 256)",)}, ours="mmfast avx512"),
    Goal("the same, bf16 screen", False, "vq", {"cdist + argmin": ("cdist+argmin", 3.3), "faiss": ("faiss", 1.7)},
         "the bf16 dot products; needs AVX512-BF16", {"mode": ("search",), "shape": ("(1024, 8192, 256)",)}, ours="mmfast avx512_bf16"),
    Goal("codebook training step", False, "vq", {"vector-quantize-pytorch": ("vector-quantize-pytorch", 6)},
         "the search", {"mode": ("training step",)}),
    *(Goal(f"attention, forward, {short}", False, "attention",
           {"the modules' own cores": ("eager", 2.5), "concatenation + SDPA": ("concat+sdpa", 1.6), "SDPA": ("sdpa", 1.2)},
           limits, {"mode": ("forward",), "dtype": (dtype,)})
      for short, dtype, limits in (
          ("fp32", "float32", "the products, at about 100 of 115 GFLOP/s a core; at batch 1 the Python side of a call"),
          ("bf16", "bfloat16", "packing and softmax beside bf16 dot products"))),
    Goal("log-probabilities from hidden states, fp32, every row counts", False, "linear_logp", {"whole logits": ("eager", 1.1)},
         "the products. `linear_cross_entropy` makes three, `linear_logp` four where its logits do not fit the workspace (128 MB)",
         {"op": ("dpo", "cross-entropy"), "dtype": ("float32",), "valid_fraction": ("1.0",)}, memory=5),
    Goal("the same, against torch's chunked op", False, "linear_logp", {"F.linear_cross_entropy": ("torch chunked", 3.5)},
         "the products; the peer gets better with more rows", {"op": ("cross-entropy",), "dtype": ("float32",)}),
    Goal("advantages", False, "ppo", {"the loop over columns": ("eager loop", 50)},
         "a chain of multiply-adds in float64; the peer's start of kernels", {"mode": ("gae",)}),
]  # fmt: skip


def measured(goal: Goal, devices: list[Device]) -> Iterable[tuple[str, str, float, Ratio | None, str]]:
    """(peer, metric, goal, ratio, device) of the first device that can tell."""
    fitting = [d for d in devices if d.cpu != goal.gpu]
    wanted = [(peer, "time", provider, target) for peer, (provider, target) in goal.peers.items()]
    if goal.memory:
        first, (provider, _) = next(iter(goal.peers.items()))
        wanted.append((first, "memory", provider, goal.memory))
    for peer, metric, provider, target in wanted:
        ours = f"graph: {goal.ours}" if provider.startswith("graph: ") else goal.ours
        found = [
            (ratio(goal.select(d.rows.get(goal.file, [])), provider, ours, "median_ms" if metric == "time" else "peak_mb"), d.name)
            for d in fitting
        ]
        found = [(r, name) for r, name in found if r is not None]
        yield (peer, metric, target, *(found[0] if found else (None, "")))


def verdict(goal: float, r: Ratio | None, run: bool) -> str:
    if r is None:
        return "not measured" if run else "not run"
    return f"{r.mean:.3g}x, {'met' if r.mean >= goal else 'missed'}"


def goal_rows(devices: list[Device]) -> list[tuple[str, ...]]:
    """what, against, goal, measured, worst shape, limits."""
    rows = []
    for goal in GOALS:
        any_rows = any(d.rows.get(goal.file) for d in devices if d.cpu != goal.gpu)
        for n, (peer, metric, target, r, _) in enumerate(measured(goal, devices)):
            worst = f"{r.worst:.3g}x, {r.worst_shape}" if r and r.shapes > 1 else ""
            against = peer if metric == "time" else f"{peer}: memory"
            rows.append((("GPU: " if goal.gpu else "CPU: ") + goal.what if n == 0 else "..", against, f"{target:g}x",
                         verdict(target, r, any_rows), worst, goal.limits if n == 0 else ""))  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------------------------ tables


def table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def number(text: str) -> str:
    """Three digits of a CSV's number."""
    return f"{float(text):.3g}" if text and float(text) < 1000 else f"{float(text):.0f}" if text else ""


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def env_table(device: Device) -> str:
    rows = []
    for name, e in sorted(device.env.items()):
        if name in device.rows:
            card = ", ".join(f"{k} {v:g}" for k, v in e.get("limits", {}).items())
            where = e["device"] + (f", driver {e['driver']}" if e.get("driver") else f", {e['threads']} threads")
            where += f", load {e['load']}" if device.cpu and "load" in e else ""
            rows.append((f"`{name}.csv`", where, e["torch"], e["mmfast"], e["commit"], e["date"], *([card] if not device.cpu else [])))
    return table(("file", "machine", "torch", "mmfast", "commit", "date", *([] if device.cpu else ["limits measured"])), rows)


GROUPS = {
    "perceiver": "Flamingo's resampler", "cross": "BLIP-2 and Qwen-VL: queries on an image", "padded": "Idefics2, images of different sizes",
    "qformer": "Q-Former, masks and dropout 0.1", "media": "OpenFlamingo, text on 5 images",
}  # fmt: skip


def attention_table(device: Device) -> str:
    graph = "graph: "
    rows = [
        {**r, "provider": r["provider"].removeprefix(graph), "mode": f"{r['mode']} in a CUDA graph"}
        if r["provider"].startswith(graph)
        else r
        for r in device.rows["attention"]
    ]
    peers = list(dict.fromkeys(r["provider"] for r in rows if not r["provider"].startswith("mmfast")))
    out = []
    for group, title in GROUPS.items():
        for dtype in dict.fromkeys(r["dtype"] for r in rows):
            for mode in dict.fromkeys(r["mode"] for r in rows):
                part = [r for r in rows if (r["op"], r["dtype"], r["mode"]) == (group, dtype, mode)]
                cells = [(f"{r.mean:.2f}", f"{r.worst:.2f}") if (r := ratio(part, peer)) else ("", "") for peer in peers]
                if any(mean for mean, _ in cells):
                    out.append((f"{title}: {mode}, {short(dtype)}", *(f"{m} ({w})" if m else "" for m, w in cells)))
    return table(("peer's time over ours, mean (worst shape)", *peers), out)


def times_table(device: Device, file: str) -> str:
    out = []
    rows = device.rows[file]
    for r in rows:
        case = f"{r['op']}: " if file == "linear_logp" or file.startswith("steps") else f"{r['mode']}: "
        scored = f", {float(r['valid_fraction']):.0%} scored" if r.get("valid_fraction") and "scored" not in r["shape"] else ""
        eager = number(r["ratio_vs_eager"]) + "x" if r.get("ratio_vs_eager") and not r["mode"].startswith("growth") else ""
        more = (f"{number(r['per_s'])} {r['unit']}/s",) if file.startswith("steps") else ()
        out.append(
            (case + r["shape"] + scored, short(r["dtype"]), r["provider"], number(r["median_ms"]), eager, number(r["peak_mb"]), *more)
        )
    same = lambda n: n and out[n][:2] == out[n - 1][:2]  # noqa: E731
    out = [(".." if same(n) else row[0], "" if same(n) else row[1], *row[2:]) for n, row in enumerate(out)]
    return table(("case", "type", "", "ms", "of the first one's speed", "peak MB", *(("rate",) if file.startswith("steps") else ())), out)


def floor_table(device: Device) -> str:
    """Ours beside the least time that the card's own limits allow; graph replays where they were taken."""
    out = []
    for rows in device.rows.values():
        for r in rows:
            if r.get("floor_ms") and r["provider"].removeprefix("graph: ").startswith("mmfast"):
                share = float(r["floor_ms"]) / float(r["median_ms"])
                scored = f", {float(r['valid_fraction']):.0%} scored" if r.get("valid_fraction") else ""
                case = f"{r['op']}: {r['mode']}, {r['shape']}{scored}"
                out.append(
                    (
                        case,
                        short(r["dtype"]),
                        r["provider"],
                        number(r["median_ms"]),
                        number(r["floor_ms"]),
                        f"{share:.0%}",
                        number(r["tflops"]),
                        number(r["gbps"]),
                    )
                )
    return table(("case", "type", "", "ms", "floor, ms", "floor / ms", "TFLOP/s", "GB/s"), out)


def card_table(device: Device) -> str:
    out = [
        (r["question"], r["case"], r["answer"], number(r["median_ms"]), number(r["tflops"]), number(r["gbps"]), r["of_limit"])
        for r in device.rows["card"]
    ]
    return table(("question", "case", "answer", "ms", "TFLOP/s", "GB/s", "of the limit"), out)


TITLES = {
    "steps_blip2": "Whole steps: BLIP-2's Q-Former", "steps_flamingo": "Whole steps: Flamingo", "steps_chameleon": "Chameleon's tokeniser",
    "steps_dpo": "Whole steps: DPO at LLaVA's head", "attention": "Attention", "vq": "Vector quantisation",
    "linear_logp": "From hidden states to a loss and its gradients", "ppo": "PPO",
}  # fmt: skip


def page(devices: list[Device]) -> str:
    """The generated part of docs/performance.md."""
    parts = [
        "## Goals",
        table(("", "against", "goal", "measured", "worst shape", "what limits it, what would be next"), goal_rows(devices)),
    ]
    if all(d.cpu for d in devices):
        parts.append("No GPU has run the kernels yet: every GPU row says so, and no other GPU figure stands anywhere.")
    for device in devices:
        parts += [f"## {device.name}", env_table(device), f"![ratios to each peer, {device.name}](img/performance-{device.name}.svg)"]
        for file, title in TITLES.items():
            if file in device.rows:
                parts += [f"### {title}", attention_table(device) if file == "attention" else times_table(device, file)]
        if any(r.get("floor_ms") for rows in device.rows.values() for r in rows):
            parts += ["### Beside the card's limits", floor_table(device)]
        if "card" in device.rows:
            parts += ["### The card and its libraries", card_table(device)]
    return "\n\n".join(parts)


def write_page(devices: list[Device]) -> None:
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(devices)}\n\n{END}{after}")


# ------------------------------------------------------------------------------------------------------------------------- plots


def bars(device: Device) -> list[tuple[str, list[tuple[str, Ratio]]]]:
    """Panels of (label, ratio): what the plot shows."""
    panels = []
    attention = device.rows.get("attention", [])
    for mode in ("forward", "forward+backward"):
        shown = []
        for group, title in GROUPS.items():
            for dtype in ("float32", "bfloat16"):
                part = [r for r in attention if (r["op"], r["dtype"], r["mode"]) == (group, dtype, mode)]
                for peer in ("eager", "sdpa*"):
                    if found := ratio(part, peer):
                        shown.append((f"{title.split(':')[0].split(', ', 1)[0]}, {short(dtype)}, {peer.rstrip('*')}", found))
        panels.append((f"Attention, {mode}", shown))
    shown = []
    vq, ours = device.rows.get("vq", []), "mmfast avx512_bf16" if device.cpu else "mmfast"
    search = [r for r in vq if r["mode"] == "search"]
    for peer in dict.fromkeys(r["provider"] for r in search if not r["provider"].startswith("mmfast")):
        shown.append((f"nearest code{', bf16 screen' if device.cpu else ''}, {peer}", ratio(search, peer, ours)))
    shown += [("training step, vector-quantize-pytorch", ratio([r for r in vq if r["mode"] == "training step"], "vector-quantize-pytorch"))]
    panels.append(("Vector quantisation", [s for s in shown if s[1]]))
    shown = []
    for op, fraction in (("dpo", "0.15"), ("dpo", "0.5"), ("dpo", "1.0"), ("cross-entropy", "1.0")):
        for dtype in ("float32", "bfloat16"):
            part = [r for r in device.rows.get("linear_logp", []) if (r["op"], r["valid_fraction"], r["dtype"]) == (op, fraction, dtype)]
            for peer in ("eager", "liger", "torch chunked"):
                shown.append((f"{op}{f', {float(fraction):.0%} scored' if op == 'dpo' else ''}, {short(dtype)}, {peer}", ratio(part, peer)))
    panels.append(("From hidden states to gradients", [s for s in shown if s[1]]))
    shown = []
    for file in TITLES:
        for op in dict.fromkeys(r["op"] for r in device.rows.get(file, []) if file.startswith("steps")):
            part = [r for r in device.rows[file] if r["op"] == op]
            fastest = list(dict.fromkeys(r["provider"] for r in part if "mmfast" in r["provider"]))
            shown += [(f"{op}: {name.replace('mmfast.', '')}", ratio(part, part[0]["provider"], name)) for name in fastest]
    panels.append(("Whole steps, against stock code", [s for s in shown if s[1]]))
    ppo = device.rows.get("ppo", [])
    shown = [(mode.split(",")[0], ratio([r for r in ppo if r["mode"] == mode], "eager*")) for mode in dict.fromkeys(r["mode"] for r in ppo)]
    panels.append(("PPO, against plain PyTorch", [s for s in shown if s[1]]))
    return [p for p in panels if p[1]]


def plot(device: Device) -> Path:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "mmfast", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    )
    panels = bars(device)
    columns = [panels[0::2], panels[1::2]]
    heights = [sum(len(p[1]) + 3 for p in c) for c in columns]
    figure = plt.figure(figsize=(11, 0.17 * max(heights) + 0.7))
    for n, column in enumerate(columns):
        top = 1 - 0.6 / figure.get_size_inches()[1]
        unit = (top - 0.02) / max(heights)
        for title, shown in column:
            axes = figure.add_axes((0.25 + 0.5 * n, top - unit * (len(shown) + 0.7), 0.23, unit * len(shown)))
            places = range(len(shown))
            axes.barh(places, [r.mean for _, r in shown], color=["#3b6ea5" if r.mean >= 1 else "#b5482f" for _, r in shown], height=0.66)
            axes.plot([r.worst for _, r in shown], places, "|", color="black", markersize=5)
            axes.axvline(1, color="#555555", linewidth=0.8)
            axes.set_xscale("log")
            low, high = min(0.8, *(0.9 * r.worst for _, r in shown)), max(2.2, *(1.3 * r.mean for _, r in shown))
            axes.set_xlim(low, high)
            ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
            axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
            axes.minorticks_off()
            axes.set_yticks(places, [label for label, _ in shown])
            axes.tick_params(length=2)
            axes.set_ylim(len(shown) - 0.4, -0.6)
            for place, (_, r) in enumerate(shown):
                axes.text(r.mean * 1.03, place, f"{r.mean:.2g}" if r.mean < 100 else f"{r.mean:.0f}", va="center", fontsize=7)
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=3)
            top -= unit * (len(shown) + 3)
    env = [e for name, e in device.env.items() if name in device.rows]
    dates, commits = (sorted({e[k] for e in env}) for k in ("date", "commit"))
    inch = 1 / figure.get_size_inches()[1]
    lead = "The peer's time over ours: the bar is the geometric mean over shapes, the tick the worst shape; right of 1 ours is faster."
    figure.text(0.01, 1 - 0.15 * inch, lead, fontsize=8)
    if env:
        driver = f", driver {env[0]['driver']}" if env[0].get("driver") else f", {env[0]['threads']} threads"
        facts = f"{env[0]['device']}{driver}, torch {env[0]['torch']}; commits {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        figure.text(0.01, 1 - 0.31 * inch, facts, fontsize=8)
    path = IMAGES / f"performance-{device.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="no plots")
    parser.add_argument("--goals", type=Path, metavar="FOLDER", help="print the goals against the results in FOLDER, and write nothing")
    args = parser.parse_args()
    if args.goals:
        devices = [d for d in load(args.goals) if not d.cpu] or load(args.goals)
        current = ""
        for what, against, target, found, worst, _ in goal_rows(devices):
            current = current if what == ".." else what
            if current.startswith("CPU") == all(d.cpu for d in devices):
                print(f"{what[:62]:62s} {against[:34]:34s} {target:>6s}  {found:28s} {worst}")
        return 0
    devices = load(ROOT / "bench" / "results")
    write_page(devices)
    if not args.tables:
        for device in devices:
            print(f"wrote {plot(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
