"""Builds .cu files for the host and calls them: the Python side of the CUDA emulator.

``build([...]).function("mmfast::vq_nearest_cuda")`` compiles the unchanged sources with g++ against ``emulator.h`` and returns a ctypes
function. Libraries are cached under ``.build/`` by a hash of everything that went in, and may be requested by several processes at once.

Sanitizers cannot be loaded into a running Python, so ``run_sanitized`` starts a module in a fresh one with the runtime preloaded; numpy's
buffers then come from the sanitizer's allocator and are guarded at both ends.
"""

import ctypes
import fcntl
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = HERE / ".build"
CXX = os.environ.get("CXX", "g++")
BASE = ["-std=c++20", "-g", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
FLAGS = {
    "": ["-O2"],
    "address": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python's own allocations outlive it, and ctypes needs no stack-use-after-return.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:report_signal_unsafe=0",
}


class Library:
    """A built library; C++ functions are looked up by their qualified name."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        symbols = subprocess.run(["nm", "-D", "--defined-only", str(path)], check=True, capture_output=True, text=True).stdout
        mangled = [line.split()[-1] for line in symbols.splitlines()]
        plain = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
        self._names = {p.split("(")[0]: m for m, p in zip(mangled, plain.splitlines(), strict=True)}

    def function(self, name: str, restype=ctypes.c_int):
        """The function ``name``, e.g. ``mmfast::vq_nearest_cuda``; pass structs by ``ctypes.byref`` and buffers by ``pointer``."""
        if name not in self._names:
            raise KeyError(f"{self.path.name} has no function {name}")
        function = getattr(self._library, self._names[name])
        function.restype = restype
        return function


@lru_cache
def build(*sources: str, sanitizer: str = "") -> Library:
    """Compiles ``sources`` (paths relative to the repository) and the emulator; ``sanitizer`` is "", "address" or "thread"."""
    paths = [ROOT / s for s in sources]
    inputs = sorted({*paths, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h"), HERE / "emulator.cpp"})
    digest = hashlib.sha256(repr((CXX, BASE, FLAGS[sanitizer], [(str(p.relative_to(ROOT)), p.read_bytes()) for p in inputs])).encode())
    name = f"{paths[0].stem}-{sanitizer or 'plain'}-{digest.hexdigest()[:16]}"
    target = BUILD / f"{name}.so"
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in BUILD.glob(f"{paths[0].stem}-{sanitizer or 'plain'}-*.so"):
                old.unlink(missing_ok=True)
            _compile(paths, target, sanitizer)
    return Library(target)


def _compile(paths: list[Path], target: Path, sanitizer: str) -> None:
    def compile_one(path: Path) -> Path:
        ours = path.name == "emulator.cpp"  # the scheduler itself is not instrumented
        flags = ["-O3", *([f"-DEMULATOR_{sanitizer.upper()}"] if sanitizer else [])] if ours else FLAGS[sanitizer]
        out = target.with_suffix(f".{path.stem}.o")
        _run([CXX, *BASE, *flags, "-DMMFAST_EMULATE", f"-I{HERE}", "-x", "c++", "-c", str(path), "-o", str(out)])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*paths, HERE / "emulator.cpp"]))
    part = target.with_suffix(".part")
    _run([CXX, "-shared", "-pthread", *FLAGS[sanitizer], *map(str, objects), "-o", str(part)])
    os.replace(part, target)
    for o in objects:
        o.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def run_sanitized(
    module: str, sanitizer: str, *args: str, env: dict[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess:
    """Runs ``python -m module sanitizer args...`` under tests/ with the sanitizer's runtime preloaded; the module builds with it.

    An empty ``sanitizer`` gives a fresh process and nothing more.
    """
    full = {**os.environ, **OPTIONS, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONMALLOC": "malloc", **(env or {})}
    command = [sys.executable, "-m", module, sanitizer, *args]
    if sanitizer:
        full["LD_PRELOAD"] = _runtime(sanitizer)
        command = ["setarch", "-R", *command]  # the race detector's shadow wants addresses that are not randomised
    return subprocess.run(command, cwd=HERE.parent, env=full, capture_output=True, text=True, timeout=timeout)


def _runtime(sanitizer: str) -> str:
    return subprocess.run([CXX, f"-print-file-name={RUNTIME[sanitizer]}"], check=True, capture_output=True, text=True).stdout.strip()


def has_sanitizer(sanitizer: str) -> bool:
    """Whether this compiler brings the runtime library."""
    return Path(_runtime(sanitizer)).is_absolute()


DTYPES = ["f32", "f16", "bf16", "f64"]  # numbered as DType
STORED = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f64": np.float64}
UNIT = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "f64": 2.0**-50}  # one rounding


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in one of DTYPES; bf16 as its 16 bits."""
    with np.errstate(over="ignore"):
        return to_bf16(values) if dtype == "bf16" else np.ascontiguousarray(values).astype(STORED[dtype])


def load(stored: np.ndarray, dtype: str) -> np.ndarray:
    return (from_bf16(stored) if dtype == "bf16" else stored).astype(np.float64)


def wide(dtype: str) -> type:
    return np.float64 if dtype == "f64" else np.float32


def call(library: Library, op: str, args: ctypes.Structure, sanitizer: str = "") -> None:
    """``mmfast::{op}_cuda`` with a workspace exactly as large as ``{op}_cuda_workspace`` asks for, guarded at both ends."""
    size = library.function(f"mmfast::{op}_cuda_workspace", ctypes.c_size_t)(ctypes.byref(args))
    # Sanitizers watch the exact end of an allocation; otherwise 256 guard bytes do.
    guard = 0 if sanitizer else 256
    buffer = np.full(size + guard + 512, 0xA5, np.uint8)
    begin = -buffer.ctypes.data % 256 + guard % 256
    if sanitizer:
        buffer = np.full(size, 0xA5, np.uint8)
        begin = 0
    workspace = buffer[begin : begin + size]
    assert library.function(f"mmfast::{op}_cuda")(ctypes.byref(args), pointer(workspace), ctypes.c_void_p(None)) == 0
    assert (buffer[:begin] == 0xA5).all()
    assert (buffer[begin + size :] == 0xA5).all(), "written past the workspace"


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def to_bf16(v: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as its 16 bits; numpy has no such type."""
    bits = np.ascontiguousarray(v, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(v), np.uint16(0x7FC0), rounded).reshape(v.shape)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)
