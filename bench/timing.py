"""Timing for benchmarks: providers interleaved in one process, medians, a check before the clock starts, and peak memory.

``scripts/gpu.sh`` sets ``MMFAST_BENCH_SECONDS`` (what is not begun by then is left out, with a line that says so), ``MMFAST_RESULTS`` (where
result files go) and, for its dry run, ``MMFAST_GPU_DRY=1``: small shapes, one repeat.
"""

import csv
import datetime
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import mmfast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("MMFAST_RESULTS", ROOT / "bench" / "results"))
DEVICE = "cuda" if torch.cuda.is_available() and mmfast.build_info()["cuda"] else "cpu"
DRY = os.environ.get("MMFAST_GPU_DRY") == "1"
DEADLINE = time.monotonic() + float(os.environ.get("MMFAST_BENCH_SECONDS", "inf"))


def sizes(cpu, cuda, dry):
    """The shapes of this run: a GPU's, a CPU's, or the dry run's."""
    return dry if DRY else cuda if DEVICE == "cuda" else cpu


def out_of_time(what: str) -> bool:
    """True, and said aloud, once the run has spent its seconds."""
    if time.monotonic() < DEADLINE:
        return False
    print(f"\n{what} left out: the {os.environ['MMFAST_BENCH_SECONDS']} s of this run are spent")
    return True


def interleaved(
    providers: dict[str, Callable[[], object]], *, repeats: int = 15, warmup: int = 3, device: str = "cpu", seconds: float = 1.0
) -> dict:
    """Milliseconds ``{name: (median, p20, p80)}``; one round runs every provider once, so drift of the machine hits all alike.

    On CUDA each sample is timed by events around the call, with the L2 cache flushed before it, and after ten rounds it is enough once a provider
    has had its ``seconds``.
    """
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def sample(call: Callable[[], object]) -> float:
        if flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    repeats, warmup = (1, 0) if DRY else (repeats, warmup)
    start = time.perf_counter()
    for n in range(warmup):
        for call in providers.values():
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            if n >= 2 and time.perf_counter() - start > 0.3 * len(providers):
                break
    samples = {name: [] for name in providers}
    start = time.perf_counter()
    for n in range(repeats):
        if device == "cuda" and n >= 10 and time.perf_counter() - start > seconds * len(providers):
            break
        for name, call in providers.items():
            samples[name].append(sample(call))
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return {n: tuple(torch.quantile(torch.tensor(s, dtype=torch.float64), quantiles).tolist()) for n, s in samples.items()}


def peak_memory_mb(call: Callable[[], object], device: str = "cpu") -> float:
    """Peak memory during the call beyond what was allocated before it, outputs included.

    CUDA: the allocator's counter. CPU: the resident set, sampled every 0.2 ms, after a first call has warmed caches up; it sees every
    allocation of every library, ours included, but misses shorter spikes.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    _trim()
    page = 4096 / 2**20
    statm = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115

    def resident() -> float:
        statm.seek(0)
        return int(statm.read().split()[1]) * page

    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.0002)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()
    done.set()
    watcher.join()
    peak = max(peak, resident())
    statm.close()
    del kept
    return max(peak - before, 0.0)


def _trim() -> None:
    """Returns freed heap pages to the system, so that reuse of them counts again."""
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


@cache
def limits() -> dict[str, float]:
    """What this card does at best: ``copy_gbps`` of a device-to-device copy, reads and writes counted; TFLOP/s of a product of 8192^2
    matrices by type (float32: with tf32). Random data, medians of 10. Empty on a CPU."""
    if DEVICE == "cpu":
        return {}
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    median = interleaved({"copy": lambda: a.copy_(b)}, repeats=10, device="cuda")["copy"][0]
    found = {"copy_gbps": round(2 * a.numel() / median / 1e6, 1)}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        median = interleaved({"product": lambda x=x, y=y: x @ y}, repeats=10, device="cuda")["product"][0]
        found[str(dtype).removeprefix("torch.") + "_tflops"] = round(2 * 8192**3 / median / 1e9, 1)
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


@cache
def environment() -> dict:
    """What a reader needs to judge a figure: machine, versions, commit (``MMFAST_COMMIT`` where git does not know it), date."""

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))  # noqa: SIM115
    except (OSError, StopIteration):
        pass
    commit = run("git", "rev-parse", "--short", "HEAD") or "unknown"
    commit += "+changes" if run("git", "status", "--porcelain", "csrc", "mmfast") else ""
    facts = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: about the threads, if nothing else ran
        "torch": torch.__version__,
        "mmfast": mmfast.__version__,
        "build": mmfast.build_info(),
        "python": platform.python_version(),
        "commit": os.environ.get("MMFAST_COMMIT") or commit,
        "date": datetime.date.today().isoformat(),
    }
    if DEVICE == "cuda":
        facts["driver"] = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["limits"] = limits()
    return facts


def device_folder() -> Path:
    """``<results>/<device>``, e.g. ``nvidia-h200`` or ``cpu-2-threads``."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu {torch.get_num_threads()} threads"
    folder = RESULTS / name.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


COLUMNS = [
    "op",
    "provider",
    "mode",
    "shape",
    "dtype",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_mb",
    "tflops",
    "gbps",
    "floor_ms",
    "ratio_vs_eager",
    "max_err",
    "version",
]


def work(flops: float, bytes_: float, rate: str, median_ms: float) -> dict[str, str]:
    """The columns ``tflops, gbps, floor_ms`` of a row that has to do so many operations and move so many bytes at least.

    ``rate`` names the unit that does them, a key of :func:`limits` without its ending (or ``split``: three tf32 products a product). The floor
    is the longer of the two times at the card's own limits; a CPU has none here.
    """
    found = {"tflops": f"{flops / median_ms / 1e9:.4g}", "gbps": f"{bytes_ / median_ms / 1e6:.4g}"}
    if card := limits():
        best = card["float32_tflops"] / 3 if rate == "split" else card[f"{rate}_tflops"]
        found["floor_ms"] = f"{max(flops / best / 1e9, bytes_ / card['copy_gbps'] / 1e6):.5f}"
    return found


def write_rows(op: str, rows: list[dict], columns: list[str] = COLUMNS) -> Path:
    """Writes ``<results>/<device>/<op>.csv`` (this run, so far) and, beside it, what it ran on: entry ``op`` of ``env.json``.

    Called after every shape; each file is replaced whole, so that a run that is cut off leaves what it has measured.
    """
    folder = device_folder()
    with open(folder / f".{op}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / f".{op}.csv").replace(folder / f"{op}.csv")
    env = folder / "env.json"
    known = json.loads(env.read_text()) if env.exists() else {}
    (folder / ".env.json").write_text(json.dumps(known | {op: environment()}, indent=2, sort_keys=True) + "\n")
    (folder / ".env.json").replace(env)
    return folder / f"{op}.csv"
