"""csrc/vq/vq_cuda.cu, unchanged, under the CUDA emulator against float64 numpy.

The reference is numpy alone, so that ``python -m ops.test_vq_emulated SANITIZER`` can run the cases marked for it with a sanitizer preloaded.
Workspaces are exactly as large as asked for and lie between guard bytes.
"""

import ctypes
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from emulator import emulator
from emulator.emulator import DTYPES, UNIT, build, has_sanitizer, load, pointer, run_sanitized, store, wide

SOURCE = "csrc/vq/vq_cuda.cu"
METRICS = ["l2", "cosine", "ip"]

i64, ptr = ctypes.c_int64, ctypes.c_void_p


class Rows(ctypes.Structure):
    _fields_ = [("data", ptr), ("dtype", ctypes.c_int)] + [
        (n, i64) for n in ("n_outer", "n_inner", "D", "stride_outer", "stride_inner", "stride_d")
    ]


class NearestArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("codebook", ptr), ("codebook_dtype", ctypes.c_int), ("K", i64), ("stride_k", i64), ("metric", ctypes.c_int),
                ("mask", ptr), ("indices", ptr), ("distance", ptr), ("quantized", Rows), ("mse", ptr)]  # fmt: skip


class BackwardArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("codebook", ptr), ("codebook_dtype", ctypes.c_int), ("K", i64), ("stride_k", i64), ("indices", ptr),
                ("grad_q", Rows), ("grad_loss", ptr), ("w_commit", ctypes.c_double), ("w_code", ctypes.c_double),
                ("gradient", ctypes.c_int), ("grad_x", Rows), ("grad_codebook", ptr)]  # fmt: skip


class StatsArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("indices", ptr), ("weight", ptr), ("K", i64), ("counts", ptr), ("sums", ptr)]


class EmaArgs(ctypes.Structure):
    _fields_ = [("cluster_size", ptr), ("embed_avg", ptr), ("codebook", ptr), ("counts", ptr), ("sums", ptr), ("dtype", ctypes.c_int),
                ("K", i64), ("D", i64), ("decay", ctypes.c_double), ("eps", ctypes.c_double), ("normalize", ctypes.c_bool)]  # fmt: skip


class Tensor:
    """[N, D] values in one of three layouts: dense rows, rows inside longer ones, or [B, D, N / B] as convolutions leave it."""

    def __init__(self, values: np.ndarray, dtype: str, layout: str = "dense"):
        n, d = values.shape
        self.dtype, self.layout, self.shape = dtype, layout, (n, d)
        self.batch = next(b for b in (3, 2, 1) if n % b == 0)
        if layout == "channel_first":
            values = values.reshape(self.batch, n // self.batch, d).transpose(0, 2, 1)
        elif layout == "sliced":
            values = np.concatenate([np.full((n, 1), 77.0), values, np.full((n, 2), 77.0)], axis=1)
        self.stored = np.ascontiguousarray(store(values, dtype))

    def rows(self) -> Rows:
        n, d = self.shape
        data, inner = self.stored.ctypes.data, n // self.batch
        if self.layout == "channel_first":
            return Rows(data, DTYPES.index(self.dtype), self.batch, inner, d, d * inner, 1, inner)
        if self.layout == "sliced":
            return Rows(data + self.stored.itemsize, DTYPES.index(self.dtype), 1, n, d, 0, d + 3, 1)
        return Rows(data, DTYPES.index(self.dtype), 1, n, d, 0, d, 1)

    def values(self) -> np.ndarray:
        v = load(self.stored, self.dtype)
        if self.layout == "channel_first":
            return v.transpose(0, 2, 1).reshape(self.shape)
        if self.layout == "sliced":
            assert (v[:, [0, -2, -1]] == 77).all(), "written outside the rows"
            return v[:, 1:-2]
        return v


def call(op: str, args: ctypes.Structure, sanitizer: str = "") -> None:
    emulator.call(build(SOURCE, sanitizer=sanitizer), f"vq_{op}", args, sanitizer)


def costs(x: np.ndarray, e: np.ndarray, metric: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        if metric == "l2":
            return ((x[:, None] - e[None]) ** 2).sum(-1)
        if metric == "cosine":
            norm = np.sqrt((e**2).sum(-1, keepdims=True))
            e = np.where(norm > 0, e / np.where(norm > 0, norm, 1), 0)
        return -(x[:, None] * e[None]).sum(-1)


@dataclass
class Case:
    n: int
    k: int
    d: int
    metric: str = "l2"
    x_dtype: str = "f32"
    e_dtype: str = "f32"
    layout: str = "dense"
    out_layout: str = "dense"
    quantize: bool = True
    mask: bool = False
    data: str = "normal"
    exact: bool = False  # ties are exact: the lowest index, nothing else
    seed: int = field(default=0, compare=False)

    def __str__(self):
        extra = [self.layout] * (self.layout != "dense") + ["mask"] * self.mask + [self.data] * (self.data != "normal")
        return "-".join([f"{self.n}x{self.k}x{self.d}", self.metric, self.x_dtype, self.e_dtype, *extra])

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        x, e = rng.standard_normal((self.n, self.d)), rng.standard_normal((self.k, self.d))
        match self.data:
            case "duplicates":
                e = e[rng.integers(0, max(self.k // 4, 1), self.k)]
            case "equal":
                e[:] = e[0]
            case "ties":  # small integers: many exact ties
                x, e = rng.integers(-1, 2, x.shape).astype(float), rng.integers(-1, 2, e.shape).astype(float)
            case "common_mean":
                x, e = x + 1000, e + 1000
            case "taming":
                e = rng.uniform(-1 / self.k, 1 / self.k, e.shape)
            case "outlier":
                e[self.k // 3] *= 1e6
            case "huge":
                x, e = x * 1e30, e * 1e30
            case "tiny":
                x, e = x * 1e-30, e * 1e-30
            case "mixed":  # rows far larger and far smaller than the codes
                x *= 10.0 ** rng.integers(-20, 18, (self.n, 1))
            case "near":  # rows halfway between two codes, shifted by less than fp16 can see
                a, b = e[rng.integers(0, self.k, self.n)], e[rng.integers(0, self.k, self.n)]
                x = (a + b) / 2 + (a - b) * 10.0 ** -rng.uniform(3, 9, (self.n, 1)) * rng.choice([-1, 1], (self.n, 1))
            case "collinear":  # codes along a line, rows beside it: every score is close to its neighbour's
                e = np.outer(np.linspace(-1, 1, self.k), e[0]) + 1e-6 * e
                x = np.outer(rng.uniform(-1, 1, self.n), e[0]) + 3 * x
            case "zeros":
                x[::2] = 0
                e[1::3] = 0
            case "same_magnitude":  # sums whose terms all have one sign and length: accumulation errors add up
                x, e = np.ones_like(x) * (1 + 1e-3 * x), np.ones_like(e) * (1 + 1e-3 * e)
            case "twins":  # each code again one panel on, moved by less than fp16 can see: both meet the same lane
                for pair in range(0, self.k - 255, 256):
                    e[pair + 128 : pair + 256] = e[pair : pair + 128] + 1e-5 * e[pair + 128 : pair + 256]
                x = e[rng.integers(0, self.k, self.n)] + 0.3 * x
            case "copies":  # the same codes in every panel, some of them moved so little that only fp64 tells: the first nearest one wins
                near = rng.choice([0, 1, 2, 3, -3], (self.k, 1)) * 2.0**-12
                e = e[np.arange(self.k) % 128] * (1 + near)
                x = e[rng.integers(0, self.k, self.n)] + 0.1 * x
            case "far":
                x, e = x * 1e60, e * 1e-5
            case "vast":  # beyond what a float holds
                x, e = x * 1e60 + 3e60, e * 1e60 + 3e60
            case "code_rounding":  # fp16 rounds half the codes' columns up: the wrong one of two looks better
                u = 2.0**-11
                good, bad = np.full(self.d, 1.5 + 0.98 * u), np.full(self.d, 1.5 + 0.6 * u)
                bad[::2] = 1.5 + 1.02 * u
                x, e = np.ones_like(x), np.stack([bad, good, -bad, -good])
            case "row_rounding":  # what fp16 cuts off the row decides
                u, half = 2.0**-11, self.d // 2
                x = np.full(x.shape, 1.5 - 0.98 * u)
                x[:, :half] = 1.5 + 0.98 * u
                good, bad = np.ones(self.d), np.ones(self.d)
                good[half:] = bad[:half] = 0.5
                bad[0] += 2.0**-9
                e = np.stack([bad, good, -bad, -good])
            case "accumulation":  # exact in fp16; large partial sums cancel, and what fp32 drops of them decides
                half = self.d // 2
                x[:, :half] = rng.integers(1024, 2048, (self.n, half))
                x[:, half:] = -x[:, :half]
                e[:, :half] = rng.integers(1024, 2048, (self.k, half))
                e[:, half:] = e[:, :half]
                rows = np.arange(self.k)
                e[rows, rng.integers(half, self.d, self.k)] += 1
                e[rows, rng.integers(half, self.d, self.k)] -= 1
                e[self.k // 2 :] = -e[: self.k - self.k // 2]  # no mean to subtract
            case "not_finite":
                x[1 % self.n, self.d // 2], x[-1, 0] = np.nan, np.inf
                e[2 % self.k, self.d - 1] = np.nan
                e[self.k // 2, 0] = -np.inf
        return x, e


def check_nearest(case: Case, sanitizer: str = "") -> None:
    x_values, e_values = case.values()
    rng = np.random.default_rng(7)
    x = Tensor(x_values, case.x_dtype, case.layout)
    e = Tensor(e_values, case.e_dtype, "sliced" if case.layout == "sliced" else "dense")
    out = Tensor(np.full(x.shape, 55.0), case.x_dtype, case.out_layout)
    mask = rng.integers(0, 2, case.n).astype(np.uint8) if case.mask else None
    indices = np.full(case.n, -7, np.int64)
    distance, mse = np.full(case.n, 55, wide(case.x_dtype)), np.full(1, 55, wide(case.x_dtype))
    args = NearestArgs(
        x=x.rows(), codebook=e.rows().data, codebook_dtype=DTYPES.index(case.e_dtype), K=case.k, stride_k=e.rows().stride_inner,
        metric=METRICS.index(case.metric), mask=pointer(mask), indices=pointer(indices),
    )  # fmt: skip
    if case.quantize:
        args.quantized, args.mse, args.distance = out.rows(), pointer(mse).value, pointer(distance).value
    call("nearest", args, sanitizer)

    xv, ev = x.values(), e.values()
    bad_rows, bad_codes = ~np.isfinite(xv).all(1), ~np.isfinite(ev).all(1)
    masked = mask == 0 if case.mask else np.zeros(case.n, bool)
    skipped = masked | bad_rows
    assert (indices[skipped] == -1).all()
    if bad_codes.all():
        assert (indices == -1).all()
        return
    cost = costs(xv, ev, case.metric)
    cost[:, bad_codes] = np.inf
    rows = np.flatnonzero(~skipped)
    expected = np.where(np.isnan(cost), np.inf, cost).argmin(1)
    assert (indices[rows] >= 0).all()
    assert (indices[rows] < case.k).all()
    if case.exact:
        assert (indices[rows] == expected[rows]).all()
    got, best = cost[rows, indices[rows]], cost[rows, expected[rows]]
    scale = np.abs(best) if case.metric == "l2" else np.abs(xv[rows]).max(1, initial=0) * np.abs(ev[~bad_codes]).max() * 10
    worse = ~(got - best <= 1e-12 * scale) & (indices[rows] != expected[rows])
    assert not worse.any(), f"row {rows[worse][0]}: code {indices[rows][worse][0]}, expected {expected[rows][worse][0]}"
    if not case.quantize:
        assert (out.values() == 55).all()
        return

    q = np.zeros_like(xv)
    q[rows] = ev[indices[rows]]
    q[masked] = xv[masked]
    assert np.array_equal(out.values(), load(store(q, case.x_dtype), case.x_dtype), equal_nan=True)
    with np.errstate(all="ignore"):
        square = ((xv[rows] - ev[indices[rows]]) ** 2).sum(1)
        want = square if case.metric == "l2" else got
        if case.metric == "cosine":
            norm = np.sqrt((xv[rows] ** 2).sum(1))
            want = 1 + np.where(norm > 0, got / np.where(norm > 0, norm, 1), 0)
        np.testing.assert_allclose(distance[rows], want.astype(distance.dtype), rtol=1e-6, atol=1e-6 * np.abs(want).max(initial=0))
        assert np.isnan(distance[skipped]).all()
        if (bad_rows & ~masked).any():
            assert np.isnan(mse[0])
        else:
            expected_mse = square.sum() / max(len(rows) * case.d, 1)
            np.testing.assert_allclose(mse[0], np.array(expected_mse, mse.dtype), rtol=1e-6)


SIZES = [(1, 1, 1), (5, 7, 3), (33, 130, 8), (40, 300, 33), (130, 257, 64), (20, 129, 257), (12, 64, 300)]
NEAREST = [
    *[Case(*size, metric=m, layout=lay, out_layout=out) for size in SIZES for m, lay, out in
      [("l2", "dense", "dense"), ("cosine", "channel_first", "dense"), ("ip", "sliced", "channel_first")]],
    *[Case(36, 140, 24, x_dtype=a, e_dtype=b, layout="channel_first", out_layout="channel_first", mask=True) for a in DTYPES for b in DTYPES],
    # Contiguous rows of every type and of all widths of a warp's share, in pieces and, where the width or the offset forbids it, one by one.
    *[Case(70, 40, d, x_dtype=a, e_dtype=b, mask=True) for a, b in zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True) for d in (28, 44, 132, 300)],
    *[Case(34, 40, 70, metric="cosine", x_dtype=t, layout="sliced", out_layout="channel_first") for t in DTYPES],
    *[Case(37, 260, 40, metric=m, data=data, exact=data in ("duplicates", "equal", "ties", "zeros") and m != "cosine")
      for m in METRICS for data in ("duplicates", "equal", "ties", "common_mean", "outlier", "near", "zeros", "not_finite")],
    *[Case(48, 384, 16, data=data) for data in ("taming", "huge", "tiny", "mixed", "collinear", "same_magnitude")],
    *[Case(48, 384, 16, metric=m, data=data) for m in ("cosine", "ip") for data in ("huge", "tiny", "mixed", "same_magnitude")],
    Case(24, 130, 300, data="same_magnitude"), Case(24, 130, 300, data="near"),
    Case(24, 70, 16, x_dtype="f64", e_dtype="f64", data="near"), Case(24, 70, 16, x_dtype="f64", e_dtype="f64", metric="ip", data="tiny"),
    Case(700, 384, 8, data="twins"), Case(60, 384, 300, data="twins"), Case(40, 1024, 24, data="twins"), Case(140, 384, 40, data="twins", mask=True),
    *[Case(133, 400, 40, metric=m, x_dtype=t, e_dtype=t, layout="channel_first", data="copies", exact=m != "cosine") for m in METRICS for t in DTYPES],
    *[Case(20, 1100, 33, metric=m, data="copies", exact=m != "cosine") for m in METRICS], Case(9, 40, 12, x_dtype="f64", e_dtype="f64", data="far", exact=True),
    *[Case(9, 140, 36, metric=m, x_dtype="f64", e_dtype="f64", data="vast") for m in METRICS],
    Case(3, 4, 64, metric="ip", data="code_rounding"), Case(3, 4, 16, metric="ip", data="row_rounding"),
    Case(64, 256, 256, metric="ip", data="accumulation"), Case(64, 256, 320, metric="ip", data="accumulation"),
    Case(770, 300, 70, layout="channel_first"), Case(3100, 5, 2, mask=True),  # several panels a CTA; several chunks of rows
    Case(260, 33, 8, quantize=False), Case(0, 9, 8), Case(700, 40, 4, mask=True),
]  # fmt: skip
# Every kernel, both forms of the screen, and the search for hidden codes.
REDUCED = [
    Case(20, 140, 130, layout="channel_first", out_layout="channel_first", mask=True), Case(20, 70, 260, metric="ip", x_dtype="f16", e_dtype="f64"),
    Case(12, 70, 24, data="ties"), Case(9, 384, 40, data="copies"),
]  # fmt: skip
MORE = [
    Case(5, 7, 3, metric="cosine", layout="sliced"),
    Case(12, 130, 9, data="not_finite"),
    Case(700, 300, 40),
    Case(20, 129, 257),
    Case(6, 9, 28),
]


@pytest.mark.parametrize("case", NEAREST, ids=str)
def test_nearest(case):
    check_nearest(case)


def test_nearest_is_sound_when_accumulation_truncates():
    """Tensor cores need not round to nearest: the same answers when every product sum is cut towards zero."""
    done = run_sanitized("ops.test_vq_emulated", "", "truncate", env={"MMFAST_EMULATE_TRUNCATE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def check_stats(n, k, d, dtype, layout, weighted, skew, sanitizer=""):
    rng = np.random.default_rng(n + k + d)
    x = Tensor(rng.standard_normal((n, d)), dtype, layout)
    # -1 and whatever lies outside is left out; `skew` sends most rows to one code, across several spans.
    indices = rng.integers(-2, k + 1, n)
    if skew:
        indices[rng.random(n) < 0.8] = k // 2
    weight = rng.uniform(0, 2, n).astype(np.float32) if weighted else None
    counts, sums = np.full(k, 55, wide(dtype)), np.full((k, d), 55, wide(dtype))
    args = StatsArgs(x.rows(), pointer(indices), pointer(weight), k, pointer(counts), pointer(sums))
    call("code_stats", args, sanitizer)
    hot = (indices[None] == np.arange(k)[:, None]) * (1.0 if weight is None else weight.astype(np.float64))
    np.testing.assert_allclose(counts, hot.sum(1), rtol=1e-6)
    want = hot @ x.values()
    np.testing.assert_allclose(sums, want, rtol=1e-6, atol=1e-6)
    again_counts, again = counts.copy(), sums.copy()
    call("code_stats", args, sanitizer)
    assert (again == sums).all()
    assert (again_counts == counts).all()


STATS = [
    (1, 1, 1, "f32", "dense", False, False), (600, 7, 5, "f32", "channel_first", True, True), (600, 70, 33, "bf16", "dense", False, True),
    (300, 1100, 3, "f16", "sliced", False, False), (1000, 3, 2, "f64", "dense", True, True), (40, 5, 300, "f32", "dense", False, False),
    (0, 4, 3, "f32", "dense", False, False), (90, 4, 700, "f32", "channel_first", True, True), (200, 40, 31, "f32", "dense", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "d", "dtype", "layout", "weighted", "skew"), STATS)
def test_code_stats(n, k, d, dtype, layout, weighted, skew):
    check_stats(n, k, d, dtype, layout, weighted, skew)


def check_ema(k, d, dtype, normalize, empty=False, sanitizer=""):
    rng = np.random.default_rng(k)
    make = lambda *shape: store(rng.uniform(0.5, 2, shape) * (0 if empty else 1), dtype)  # noqa: E731
    size, avg, code, counts, sums = make(k), make(k, d), store(rng.standard_normal((k, d)), dtype), make(k), make(k, d)
    old = [v.astype(np.float64) for v in (size, avg, code, counts, sums)]
    args = EmaArgs(*map(pointer, (size, avg, code, counts, sums)), DTYPES.index(dtype), k, d, 0.9, 1e-5, normalize)
    call("ema", args, sanitizer)
    want_size, want_avg = 0.9 * old[0] + 0.1 * old[3], 0.9 * old[1] + 0.1 * old[4]
    n = want_size.sum()
    if empty:
        want = old[2]
    else:
        want = want_avg / ((want_size + 1e-5) / (n + k * 1e-5) * n)[:, None]
        if normalize:
            want /= np.linalg.norm(want, axis=1, keepdims=True)
    tolerance = 1e-6 if dtype == "f32" else 1e-14
    np.testing.assert_allclose(size, want_size, rtol=tolerance)
    np.testing.assert_allclose(avg, want_avg, rtol=tolerance)
    np.testing.assert_allclose(code, want, rtol=tolerance)


@pytest.mark.parametrize(("k", "d", "dtype", "normalize", "empty"), [
    (5, 3, "f32", False, False), (300, 40, "f32", True, False), (9, 33, "f64", False, False), (4, 4, "f32", False, True),
])  # fmt: skip
def test_ema(k, d, dtype, normalize, empty):
    check_ema(k, d, dtype, normalize, empty)


def rotation(g, x, q):
    """Rows of |q| / |x| (g - 2 w (w.g) + 2 u (p.g)), written out as matrices."""
    out = g.copy()
    for r in range(len(x)):
        nx, nq = np.linalg.norm(x[r]), np.linalg.norm(q[r])
        if nx > 0 and nq > 0:
            u, p = x[r] / nx, q[r] / nq
            w = u + p
            length = np.linalg.norm(w)
            w = w / length if length > 1e-6 else 0 * w
            eye = np.eye(len(u))
            out[r] = nq / nx * (eye - 2 * np.outer(w, w) + 2 * np.outer(u, p)) @ g[r]
    return out


def check_backward(n, k, d, gradient, dtype, e_dtype, layout, parts, sanitizer=""):
    """``parts``: which of grad_q, grad_loss, grad_x and grad_codebook are there (letters q, l, x, e)."""
    rng = np.random.default_rng(n + d)
    x = Tensor(rng.standard_normal((n, d)), dtype, layout)
    codes = store(rng.standard_normal((k, d)), e_dtype)
    if k > 2:
        codes[1] = 0  # nothing to rotate into
    indices = rng.integers(-1, k + 1, n)  # K itself is out of range: treated as no code
    grad_q = Tensor(rng.standard_normal((n, d)), dtype, "dense")
    grad_loss = np.array([0.7], wide(dtype))
    grad_x = Tensor(np.full((n, d), 55.0), dtype, layout)
    grad_codebook = store(np.full((k, d), 55.0), e_dtype)
    args = BackwardArgs(
        x=x.rows(), codebook=pointer(codes), codebook_dtype=DTYPES.index(e_dtype), K=k, stride_k=d, indices=pointer(indices), w_commit=0.25,
        w_code=1.5, gradient=["none", "ste", "rotation"].index(gradient), grad_loss=pointer(grad_loss) if "l" in parts else None,
        grad_codebook=pointer(grad_codebook) if "e" in parts else None,
    )  # fmt: skip
    if "q" in parts:
        args.grad_q = grad_q.rows()
    if "x" in parts:
        args.grad_x = grad_x.rows()
    call("backward", args, sanitizer)
    valid = (indices >= 0) & (indices < k)
    xv, ev = x.values(), load(codes, e_dtype)
    q = np.where(valid[:, None], ev[np.where(valid, indices, 0)], 0)
    g = grad_q.values() if "q" in parts else np.zeros((n, d))
    factor = 2 * float(grad_loss[0]) / max(valid.sum() * d, 1) if "l" in parts else 0.0
    if "x" in parts:
        turned = {"none": 0 * g, "ste": g, "rotation": rotation(g, xv, q)}[gradient]
        want = np.where(valid[:, None], turned + 0.25 * factor * (xv - q), g)
        np.testing.assert_allclose(grad_x.values(), want, rtol=UNIT[dtype], atol=UNIT[dtype] * np.abs(want).max(initial=0))
    if "e" in parts:
        hot = ((indices[None] == np.arange(k)[:, None]) & valid[None]).astype(float)
        want = 1.5 * factor * (hot @ (q - xv))
        np.testing.assert_allclose(load(grad_codebook, e_dtype), want, rtol=UNIT[e_dtype], atol=UNIT[e_dtype] * np.abs(want).max(initial=0))


BACKWARD = [
    *[(70, 9, 40, g, "f32", "f32", "dense", "qlxe") for g in ("none", "ste", "rotation")],
    (60, 5, 33, "rotation", "bf16", "f32", "channel_first", "qlx"), (33, 4, 3, "ste", "f16", "bf16", "sliced", "lxe"),
    (300, 2, 8, "rotation", "f64", "f64", "dense", "qlxe"), (20, 6, 70, "ste", "f32", "f16", "dense", "qx"),
    (33, 5, 140, "rotation", "bf16", "f16", "dense", "qlxe"), (20, 4, 300, "rotation", "f16", "bf16", "channel_first", "qlx"),
    (70, 5, 36, "ste", "bf16", "bf16", "dense", "qlx"), (20, 6, 7, "none", "f32", "f32", "dense", "le"), (99, 4, 530, "ste", "f32", "f32", "dense", "qle"), (0, 3, 4, "ste", "f32", "f32", "dense", "qlxe"), (1, 1, 1, "rotation", "f32", "f32", "dense", "qlxe"),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "d", "gradient", "dtype", "e_dtype", "layout", "parts"), BACKWARD)
def test_backward(n, k, d, gradient, dtype, e_dtype, layout, parts):
    check_backward(n, k, d, gradient, dtype, e_dtype, layout, parts)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = run_sanitized("ops.test_vq_emulated", sanitizer, "reduced")
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sanitizer, what = sys.argv[1:]
    if what == "truncate":
        for case in NEAREST:
            check_nearest(case)
    else:
        for case in REDUCED + MORE * (sanitizer == "address"):
            check_nearest(case, sanitizer)
        check_stats(300, 7, 5, "f32", "channel_first", True, True, sanitizer)
        check_ema(9, 33, "f32", True, sanitizer=sanitizer)
        check_backward(70, 9, 40, "rotation", "f32", "bf16", "channel_first", "qlxe", sanitizer)
