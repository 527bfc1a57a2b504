"""Timing for benchmarks: providers interleaved in one process, medians, a check before the clock starts, and peak memory."""

import csv
import datetime
import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def interleaved(providers: dict[str, Callable[[], object]], *, repeats: int = 15, warmup: int = 3, device: str = "cpu") -> dict:
    """Milliseconds ``{name: (median, p20, p80)}``; one round runs every provider once, so drift of the machine hits all alike.

    On CUDA each sample is timed by events around the call, with the L2 cache flushed before it.
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

    for _ in range(warmup):
        for call in providers.values():
            call()
    samples = {name: [] for name in providers}
    for _ in range(repeats):
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


def environment(device: str = "cpu") -> dict:
    """What a reader needs to judge a figure: machine, versions, commit, date."""
    import mmfast

    def git(*args: str) -> str:
        out = subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT, check=False)
        return out.stdout.strip()

    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))  # noqa: SIM115
    except (OSError, StopIteration):
        pass
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mmfast": mmfast.__version__,
        "build": mmfast.build_info(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "csrc", "mmfast") else ""),
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    return facts


def device_folder(device: str = "cpu") -> Path:
    """``bench/results/<device>``, e.g. ``nvidia-h200`` or ``cpu-2-threads``."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {torch.get_num_threads()} threads"
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
    "ratio_vs_eager",
    "max_err",
    "version",
]


def write_rows(op: str, rows: list[dict], device: str = "cpu", columns: list[str] = COLUMNS) -> Path:
    """Writes ``bench/results/<device>/<op>.csv`` (the newest run) and, beside it, what it ran on: entry ``op`` of ``env.json``."""
    folder = device_folder(device)
    with open(folder / f"{op}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    env = folder / "env.json"
    known = json.loads(env.read_text()) if env.exists() else {}
    env.write_text(json.dumps(known | {op: environment(device)}, indent=2, sort_keys=True) + "\n")
    return folder / f"{op}.csv"
