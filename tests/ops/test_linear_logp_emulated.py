"""csrc/linear_logp/linear_logp_cuda.cu, unchanged, under the CUDA emulator against numpy in 80-bit floats.

The reference is numpy alone, so that ``python -m ops.test_linear_logp_emulated SANITIZER`` can run the reduced set with a sanitizer
preloaded. Blocks of logits end where their last row does; what lies between rows is NaN on the way in and looked at again on the way out.
"""

import ctypes
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from emulator.emulator import DTYPES, UNIT, build, has_sanitizer, load, pointer, run_sanitized, store, wide

SOURCE = "csrc/linear_logp/linear_logp_cuda.cu"
STATES = 10
OUTPUTS = ["logp", "lse", "entropy", "squares", "hit", "logp0", "lse0", "kl", "shift", "log_sum", "shift0", "log_sum0"]
UPSTREAM = {"g": "logp", "r": "lse", "e": "entropy", "q": "squares", "k": "kl"}
SUM = {"f32": 2.0**-23, "f64": 2.0**-52}  # one rounding of what the kernels sum in

i64, ptr, f64 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class Rows(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("n", i64), ("columns", i64), ("first", i64), ("V", i64), ("temperature", f64), ("softcap", f64),
                ("labels", ptr), ("ignore_index", i64)]  # fmt: skip


class Block(ctypes.Structure):
    _fields_ = [("data", ptr), ("stride", i64)]


class UpdateArgs(ctypes.Structure):
    _fields_ = [("rows", Rows), ("z", Block), ("z0", Block), ("wants_more", ctypes.c_bool), ("begins", ctypes.c_bool),
                ("ends", ctypes.c_bool), ("state", ptr), ("out", ptr)]  # fmt: skip


class GradArgs(ctypes.Structure):
    _fields_ = [("rows", Rows), ("z", Block), ("z0", Block), ("grad", Block), ("out", ptr), *((name, ptr) for name in UPSTREAM)]


class ScaleArgs(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("count", i64), ("values", ptr), ("factor", ptr)]


class Matrix:
    """[n, C] values whose first lies ``start`` elements past a 16-byte boundary and whose rows are ``gap`` elements apart."""

    def __init__(self, values: np.ndarray, dtype: str, start: int = 0, gap: int = 0):
        n, c = values.shape
        self.dtype, self.start, self.stride, self.shape = dtype, start, c + gap, values.shape
        flat = np.full(start + max(n - 1, 0) * self.stride + c, np.nan)
        for r in range(n):
            flat[start + r * self.stride : start + r * self.stride + c] = values[r]
        self.stored = store(flat, dtype)
        assert self.stored.ctypes.data % 16 == 0

    def block(self) -> Block:
        return Block(self.stored.ctypes.data + self.start * self.stored.itemsize, self.stride)

    def values(self) -> np.ndarray:
        flat, (n, c) = load(self.stored, self.dtype), self.shape
        at = self.start + np.arange(n)[:, None] * self.stride + np.arange(c)
        assert np.isnan(np.delete(flat, at.ravel())).all(), "written outside the block"
        return flat[at]


def call(op: str, args: ctypes.Structure, sanitizer: str = "") -> None:
    assert build(SOURCE, sanitizer=sanitizer).function(f"mmfast::{op}_cuda")(ctypes.byref(args), ptr(None)) == 0


@dataclass
class Case:
    n: int
    v: int
    dtype: str = "f32"
    widths: tuple[int, ...] = ()  # of the blocks; what they leave of V is the last one
    start: int = 0
    gap: int = 0
    more: bool = True
    reference: bool = False
    temperature: float = 1.0
    softcap: float = 0.0
    data: str = "normal"
    labels: str = "valid"
    in_place: bool = True

    def __str__(self):
        default = Case(0, 0)
        extra = {k: v for k, v in vars(self).items() if k not in ("n", "v", "dtype") and v != getattr(default, k)}
        return "-".join([f"{self.n}x{self.v}", self.dtype, *(f"{k}={v}".replace(" ", "") for k, v in extra.items())])

    def logits(self, seed: int) -> np.ndarray:
        n, v = self.n, self.v
        rng = np.random.default_rng(seed + 7 * n + v)
        z, last = 3 * rng.standard_normal((n, v)), np.arange(n) == n - 1
        match self.data:
            case "steep":
                z = rng.uniform(-2000, 2000, (n, v))
            case "far":  # all logits of a row far from 0, in either direction
                z += rng.choice([-2000, 2000], (n, 1))
            case "rising":  # a new maximum in every piece
                z = np.linspace(-30, 30, v) + 0.1 * z
            case "falling":
                z = np.linspace(30, -30, v) + 0.1 * z
            case "ties":
                z = 1.0 * (rng.random((n, v)) < 5 / v)
            case "equal":
                z[:] = 2.5
            case "peaked":  # nearly all of the mass on one token
                z[np.arange(n), rng.integers(0, v, n)] = 30
            case "masked":  # single logits, whole pieces, all but one, and a whole row
                hidden = rng.random((n, v)) < 0.3
                hidden[: n // 2, : 2 * v // 3] = True
                hidden[n // 2] = np.arange(v) != v // 2
                z = np.where(hidden, -np.inf, z)
                if n > 2:
                    z[1] = -np.inf
            case "not_finite":
                z[0, v // 2], z[n // 2, 0], z[last, v - 1] = np.nan, np.inf, np.nan
        return z

    def targets(self) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(self.n)
        y = rng.integers(0, self.v, self.n)
        match self.labels:
            case "ignored":
                y[::2] = -100
            case "ignored_class":  # an index of the vocabulary may stand for "ignored"
                y[1::3] = 0
                return y, 0
            case "first":  # of the largest logits
                y = self.logits(0).argmax(-1)
            case "outside":
                y[::2] = np.resize([self.v, -1, -(2**63), 2**63 - 1, 2**40, -100], len(y[::2]))
        return y, -100


def capped(case: Case, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and dz/dlogit, in 80 bits."""
    logits = np.longdouble(logits)
    if not case.softcap:
        return logits / case.temperature, np.full(logits.shape, 1 / case.temperature)
    t = np.tanh(logits / case.softcap)
    return case.softcap * t / case.temperature, (1 - t * t) / case.temperature


def log_softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(np.where(top == -np.inf, z, z - top)).sum(-1, keepdims=True))
    return z - lse, lse[:, 0]


def times(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(p == 0, 0, p * x)


def expected(case: Case, logits: np.ndarray, logits0: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs, from their definitions; ignored rows as any other."""
    inside = (labels >= 0) & (labels < case.v)
    at = np.arange(case.n), np.where(inside, labels, 0)
    with np.errstate(all="ignore"):
        z, z0 = capped(case, logits)[0], capped(case, logits0)[0]
        (every, lse), (every0, lse0) = log_softmax(z), log_softmax(z0)
        p, p0 = np.exp(every), np.exp(every0)
        out = dict(logp=every[at], lse=lse, entropy=-times(p, every).sum(-1), squares=(p * p).sum(-1), hit=z.argmax(-1) == labels,
                   logp0=every0[at], lse0=lse0, kl=times(p0, every0 - every).sum(-1))  # fmt: skip
        out |= dict(shift=z.max(-1), log_sum=lse - z.max(-1), shift0=z0.max(-1), log_sum0=lse0 - z0.max(-1))
    return {name: np.where(inside, v, np.nan) for name, v in out.items()}


def expected_grad(case: Case, logits, logits0, labels, up: dict[str, np.ndarray]) -> np.ndarray:
    """Each output's derivative, written down one by one."""
    with np.errstate(all="ignore"):
        z, slope = capped(case, logits)
        every, p0 = log_softmax(z)[0], np.exp(log_softmax(capped(case, logits0)[0])[0])
        p, row = np.exp(every), lambda name: up[name][:, None] if name in up else 0.0
        entropy, squares = -times(p, every).sum(-1, keepdims=True), (p * p).sum(-1, keepdims=True)
        d = row("g") * ((labels[:, None] == np.arange(case.v)) - p) + row("r") * p
        if "e" in up:
            d = d - row("e") * times(p, every + entropy)
        if "q" in up:
            d = d + row("q") * 2 * p * (p - squares)
        if "k" in up:
            d = d + row("k") * (p - p0)
    return d * slope


def blocks(case: Case) -> list[tuple[int, int]]:
    edges = [0, *np.cumsum(case.widths, dtype=int).tolist(), case.v]
    return list(pairwise(edges))


def scale_of(z: np.ndarray) -> np.ndarray:
    """The largest finite magnitude of each row: roundings of lse are relative to it."""
    return np.where(np.isfinite(z), np.abs(z), 0).max(-1, initial=1)


def check(case: Case, sanitizer: str = "", upstream: str = "greqk") -> None:
    """The walk over the blocks, then the gradients of those in ``upstream`` that there are."""
    labels, ignore = case.targets()
    ignored, kind = labels == ignore, wide(case.dtype)
    unit, own = SUM["f64" if case.dtype == "f64" else "f32"], UNIT[case.dtype]
    stored = [store(case.logits(seed), case.dtype) for seed in (0, 1)]
    logits, logits0 = (load(s, case.dtype) for s in stored)
    given = [np.where(ignored[:, None], np.nan, z) for z in (logits, logits0)]  # ignored rows are not looked at

    def rows(a: int, b: int) -> Rows:
        return Rows(DTYPES.index(case.dtype), case.n, b - a, a, case.v, case.temperature, case.softcap, pointer(labels), ignore)

    def walk() -> np.ndarray:
        state, out = np.full((STATES, case.n), 55, kind), np.full((len(OUTPUTS), case.n), 55, kind)
        for a, b in blocks(case):
            z, z0 = (Matrix(v[:, a:b], case.dtype, case.start, case.gap) for v in given)
            args = UpdateArgs(rows(a, b), z.block(), z0.block() if case.reference else Block(), case.more, a == 0, b == case.v,
                              pointer(state), pointer(out))  # fmt: skip
            call("logp_update", args, sanitizer)
        return out

    out = walk()
    assert out.tobytes() == walk().tobytes(), "another run, other bits"
    want = expected(case, logits, logits0, labels)
    z, z0 = capped(case, logits)[0], capped(case, logits0)[0]
    scale = np.maximum(scale_of(z), scale_of(z0) if case.reference else 1)
    written = {"logp", "lse", "shift", "log_sum"}
    written |= {"entropy", "squares", "hit"} if case.more else set()
    written |= {"logp0", "lse0", "kl", "shift0", "log_sum0"} if case.reference else set()
    inside = (labels >= 0) & (labels < case.v)
    # Sums of exponentials of differences, which the size of the logits does not touch; z itself is rounded under temperature and softcap.
    with np.errstate(invalid="ignore"):
        apart, rounded = scale_of(z0 - z), scale * (case.temperature != 1 or case.softcap != 0)
        slack = {name: 2 * unit * (2 + np.abs(v) + rounded) for name, v in want.items()}
    slack |= dict(squares=16 * unit * want["squares"], hit=np.zeros(case.n), kl=slack["kl"] + 4 * unit * apart)
    for name, got in zip(OUTPUTS, out.astype(np.float64), strict=True):
        assert (got[ignored] == 0).all(), f"{name} of an ignored row"
        got, right, close = got[~ignored], want[name][~ignored], slack[name][~ignored]
        if name not in written:
            assert (got == 55).all(), f"{name} was written"
            continue
        if name == "hit" or name not in OUTPUTS[:8]:  # of no meaning in a row of NaN or -inf; hit alone says that a label is outside
            free = ~np.isfinite(want["lse0" if name.endswith("0") else "lse"]) & (inside | (name != "hit"))
            right = np.where(free[~ignored], got, right)
        with np.errstate(invalid="ignore"):
            wrong = ~((np.abs(got - right) <= close) | (got == right) | (np.isnan(got) & np.isnan(right)))
        assert not wrong.any(), f"{name} of rows {np.flatnonzero(~ignored)[wrong]}: {got[wrong]}, expected {right[wrong]}"
        if name in ("logp", "logp0"):
            assert not (got > 0).any()

    names = [name for name in upstream if UPSTREAM[name] in written]
    rng = np.random.default_rng(case.v)
    up = {name: rng.standard_normal(case.n).astype(kind) for name in names}
    known = np.stack([np.where(ignored, 0, want[name]) for name in OUTPUTS]).astype(kind)
    right = np.where(ignored[:, None], 0, expected_grad(case, logits, logits0, labels, {k: v.astype(np.float64) for k, v in up.items()}))
    if up:
        right[~ignored & ~inside] = np.nan
    for a, b in blocks(case):
        z, z0 = (Matrix(v[:, a:b], case.dtype, case.start, case.gap) for v in given)
        grad = z if case.in_place else Matrix(np.full((case.n, b - a), 55.0), case.dtype, case.start, case.gap + 3)
        call("logp_grad", GradArgs(rows(a, b), z.block(), z0.block() if case.reference else Block(), grad.block(), pointer(known),
                                   **{name: pointer(v) for name, v in up.items()}), sanitizer)  # fmt: skip
        got, part = grad.values(), right[:, a:b]
        # Terms of order |upstream| times the slope, then one rounding to the logits' type.
        most = sum(np.abs(v.astype(np.float64)) for v in up.values()) if up else np.zeros(case.n)
        near = unit * (16 + 4 * rounded) * most / case.temperature
        close = near[:, None] + own * np.abs(part) + 2.0**-24 * (case.dtype == "f16")
        with np.errstate(invalid="ignore"):
            wrong = ~((np.abs(got - part) <= close) | (np.isnan(got) & np.isnan(part)))
        assert not wrong.any(), f"gradient at {np.argwhere(wrong)[:4] + np.array([0, a])}: {got[wrong][:4]}, expected {part[wrong][:4]}"


BIG = 8192 + 813  # three CTAs of columns in the gradient
FORWARD = [
    *[Case(5, 700, t, w, start, gap, reference=t in ("f32", "bf16"), in_place=start == 0) for t in DTYPES for w, start, gap in
      [((), 0, 0), ((), 0, 4), ((), 1, 3), ((256, 256), 0, 0), ((1, 33, 8, 257), 3, 5), ((699,), 0, 2)]],
    *[Case(3, v, t, reference=True) for t in DTYPES for v in (1, 2, 7, 9)], Case(2, 2, "bf16", (1,)), Case(1, 4099, "bf16", gap=5),
    *[Case(2, BIG, t, reference=t == "bf16") for t in DTYPES], Case(2, 10007, "bf16", (5056,), more=False, in_place=False),
    *[Case(4, 300, t, more=False, reference=r) for t in ("f32", "f16") for r in (False, True)],
    *[Case(4, 301, t, (100,), reference=True, temperature=0.7, softcap=c) for t in DTYPES for c in (0.0, 5.0)],
    *[Case(9, 270, t, (90, 90), reference=True, labels=y) for t in ("f32", "bf16") for y in ("ignored", "ignored_class", "outside")],
    *[Case(6, 2600, t, w, reference=True, data=d) for t in ("f32", "f64") for w in ((), (1, 1300)) for d in
      ("steep", "far", "rising", "falling", "equal", "peaked", "masked", "not_finite")],
    *[Case(16, v, t, w, data="ties", labels=y) for y in ("first", "valid") for v, t, w in [(2600, "f32", ()), (9000, "bf16", (4096,))]],
    Case(2, 4096, start=3), Case(2, 4096, "bf16", start=7, data="equal", labels="first"),
    *[Case(6, 2600, "bf16", (512,), data=d, more=d != "far") for d in ("steep", "far", "peaked", "masked", "not_finite")],
    Case(0, 40), Case(7, 33, labels="outside", data="not_finite"), Case(4, 64, data="masked", softcap=3.0, temperature=2.0),
]  # fmt: skip


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_walk_and_gradient(case):
    check(case)


@pytest.mark.parametrize("subset", range(2 ** len(UPSTREAM)))
def test_any_gradients_may_be_missing(subset):
    names = "".join(name for i, name in enumerate(UPSTREAM) if subset >> i & 1)
    check(Case(3, 37, "f32", (20,), reference=True), upstream=names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 8, 4099, 3 * 16 * 256 * 8 + 5])
@pytest.mark.parametrize("factor", [1.0, -0.75, np.nan])
def test_scale(dtype, count, factor):
    check_scale(dtype, count, factor)


def check_scale(dtype: str, count: int, factor: float, sanitizer: str = "") -> None:
    values = store(np.linspace(-3, 3, count), dtype)
    before = load(values, dtype)
    call("logp_scale", ScaleArgs(DTYPES.index(dtype), count, pointer(values), pointer(np.array([factor], wide(dtype)))), sanitizer)
    np.testing.assert_array_equal(load(values, dtype), load(store(before * factor, dtype), dtype))


def gradient(case: Case, up: dict[str, np.ndarray], logits, logits0, labels) -> np.ndarray:
    want, z = expected(case, logits, logits0, labels), Matrix(logits, case.dtype)
    rows = Rows(DTYPES.index(case.dtype), case.n, case.v, 0, case.v, case.temperature, case.softcap, pointer(labels), -100)
    known = np.stack([want[name] for name in OUTPUTS]).astype(wide(case.dtype))
    z0 = Matrix(logits0, case.dtype)
    call("logp_grad", GradArgs(rows, z.block(), z0.block(), z.block(), pointer(known), **{k: pointer(v) for k, v in up.items()}))
    return z.values()


@pytest.mark.parametrize("name", UPSTREAM)
def test_gradient_is_the_derivative(name):
    """Against difference quotients of the definitions, under temperature and softcap."""
    case = Case(2, 19, "f64", temperature=0.8, softcap=4.0)
    logits, logits0, labels = case.logits(0), case.logits(1), case.targets()[0]
    got, h = gradient(case, {name: np.ones(case.n)}, logits, logits0, labels), 1e-5
    for j in range(case.v):
        step = h * (np.arange(case.v) == j)
        up, down = (expected(case, logits + s, logits0, labels)[UPSTREAM[name]] for s in (step, -step))
        np.testing.assert_allclose(got[:, j], (up - down) / (2 * h), atol=1e-8)


@pytest.mark.parametrize("data", ["normal", "peaked", "steep"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_gradient_of_a_row_sums_to_that_of_lse(name, data):
    """Softmax does not see a shift of all logits; only lse does."""
    case = Case(4, 5000, data=data)
    logits, logits0 = (load(store(case.logits(s), "f32"), "f32") for s in (0, 1))
    up = np.linspace(-2, 2, case.n).astype(np.float32)
    got = gradient(case, {name: up}, logits, logits0, case.targets()[0])
    np.testing.assert_allclose(got.sum(-1), up if name == "r" else 0, atol=4e-6)


def test_a_certain_label_gives_the_gradient_of_lse_alone():
    """With one word in the vocabulary all else cancels, and no rounding of the larger terms is left: the first failure seen on a GPU."""
    case = Case(40, 1)
    logits, logits0 = (load(store(case.logits(s), "f32"), "f32") for s in (0, 1))
    up = {name: np.random.default_rng(ord(name)).standard_normal(case.n).astype(np.float32) for name in "greq"}
    got = gradient(case, up | {"r": up["r"] / 100}, logits, logits0, np.zeros(case.n, np.int64))
    np.testing.assert_array_equal(got[:, 0], up["r"] / 100)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = run_sanitized("ops.test_linear_logp_emulated", sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


REDUCED = [
    Case(3, 700, "bf16", (257,), 1, 3, reference=True), Case(2, 300, "f32", in_place=False), Case(2, 4099, "f16", more=False),
    Case(12, 33, "f64", (9,), reference=True, labels="outside"),
]  # fmt: skip
MORE = [
    *[Case(2, v, t, start=1, gap=1, reference=True) for t in DTYPES for v in (1, 9, 4100)], Case(4, 300, "f32", (100,), labels="ignored"),
    Case(5, 300, "bf16", (90,), data="masked"), Case(3, 70, "f32", data="not_finite", softcap=5.0), Case(3, 70, "f32", data="steep"),
]  # fmt: skip

if __name__ == "__main__":
    for case in REDUCED + MORE * (sys.argv[1] == "address"):
        check(case, sys.argv[1])
    check_scale("bf16", 4099, 2.0, sys.argv[1])
