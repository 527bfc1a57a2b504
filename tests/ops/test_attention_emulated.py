"""csrc/attention/*.cu, unchanged, under the CUDA emulator against float64 numpy.

What a row sees is written out here once more, as a mask, from the definition of each rule; dropout's bits come from a Philox in numpy. As
in test_vq_emulated, ``python -m ops.test_attention_emulated SANITIZER`` runs the reduced set with a sanitizer preloaded.
"""

import ctypes
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from emulator import emulator
from emulator.emulator import DTYPES, build, has_sanitizer, load, pointer, run_sanitized, store, wide

SOURCES = tuple(f"csrc/attention/attention_{part}.cu" for part in ("cuda", "f32", "f16", "bf16"))
RULES = ["lengths", "unimodal", "multimodal_causal", "media", "media_all"]
# Relative L2 error of the output and of gradients, absolute error of lse.
OUT = {"f64": 1e-13, "f32": 1e-6, "f16": 1e-3, "bf16": 4e-3}
GRAD = {"f64": 1e-12, "f32": 3e-6, "f16": 3e-3, "bf16": 1e-2}
LSE = {"f64": 1e-12, "f32": 1e-5, "f16": 1e-3, "bf16": 1e-3}

i64, ptr = ctypes.c_int64, ctypes.c_void_p


class View(ctypes.Structure):
    _fields_ = [("data", ptr), ("stride_b", i64), ("stride_n", i64), ("stride_h", i64)]


class Args(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), *[(n, i64) for n in ("B", "H", "G", "D", "Nq", "N1", "N2")],
                *[(n, View) for n in ("q", "k1", "v1", "k2", "v2", "out")], ("lse", ptr), ("lse_stride_b", i64), ("lse_stride_h", i64),
                ("scale", ctypes.c_double), ("rule", ctypes.c_int), *[(n, ptr) for n in ("len1", "len2", "key2_valid", "text_time")],
                ("latents", i64), ("cu_q", ptr), ("cu_k", ptr), ("dropout_threshold", ctypes.c_uint32), ("seed", ptr)]  # fmt: skip


class BackwardArgs(ctypes.Structure):
    _fields_ = [("forward", Args), ("grad_out", View), ("grad_lse", ptr),
                *[(n, View) for n in ("grad_q", "grad_k1", "grad_v1", "grad_k2", "grad_v2")]]  # fmt: skip


class MergeArgs(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), *[(n, i64) for n in ("B", "H", "D", "Nq")], *[(n, View) for n in ("out_a", "out_b", "out")],
                *[(n, ptr) for n in ("lse_a", "lse_b", "lse")], ("grad_out", View), ("grad_lse", ptr),
                *[(n, View) for n in ("grad_out_a", "grad_out_b")], ("grad_lse_a", ptr), ("grad_lse_b", ptr)]  # fmt: skip


class Tensor:
    """[B, N, heads, D] values. Layouts: dense; heads_first in memory; sliced, inside a wider and longer one (no copy of 16 bytes fits)."""

    def __init__(self, values: np.ndarray, dtype: str, layout: str = "dense"):
        self.dtype, self.layout = dtype, layout
        if layout == "sliced":
            values = np.pad(values, ((0, 0), (1, 2), (0, 1), (1, 2)), constant_values=77.0)
        if layout == "heads_first":
            self.array = np.ascontiguousarray(store(values, dtype).transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        else:
            self.array = store(values, dtype)

    def inner(self) -> np.ndarray:
        return self.array[:, 1:-2, :-1, 1:-2] if self.layout == "sliced" else self.array

    def view(self) -> View:
        a = self.inner()
        return View(a.ctypes.data, *(a.strides[d] // a.itemsize for d in (0, 1, 2)))

    def values(self) -> np.ndarray:
        if self.layout == "sliced":
            whole = load(self.array, self.dtype)
            whole[:, 1:-2, :-1, 1:-2] = 77
            assert (whole == 77).all(), "written outside the rows"
        return load(self.inner(), self.dtype)


def philox_bits(seed: int, bh: int, rows: int, keys: int, segment: int) -> np.ndarray:
    """The 16 random bits of every (row, key), by the definition in attention.h."""
    i, j = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(keys, dtype=np.uint64), indexing="ij")
    c = [j // 32 * 4 + j % 8 // 2, i, np.full_like(i, bh), np.full_like(i, segment)]
    k, low = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = np.stack(c)
    word = np.take_along_axis(words, (j % 32 // 8)[None].astype(np.int64), 0)[0]
    return (word >> (j % 2 * 16)) & np.uint64(0xFFFF)


@dataclass
class Case:
    nq: int
    n1: int
    n2: int = 0
    d: int = 64
    dtype: str = "bf16"
    b: int = 2
    h: int = 2
    g: int = 2
    rule: str = "lengths"
    latents: int = 0
    lens: bool = False  # padded keys, one sequence without any
    valid: bool = False  # holes in segment 2
    packed: bool = False
    dropout: float = 0.0
    layout: str = "dense"
    grads: str = "olqk"  # of out, of lse (given); of q, of keys and values (wanted)
    scale: float | None = None

    def __str__(self):
        changed = [
            f"{k}={v}" for k, v in vars(self).items() if v != Case.__dataclass_fields__[k].default and k not in ("nq", "n1", "dtype")
        ]
        return "-".join([self.dtype, f"{self.nq}x{self.n1}", *changed])


class Problem:
    """The inputs of a case, and what they mean."""

    def __init__(self, c: Case):
        rng = np.random.default_rng(c.nq + 1000 * c.n1 + c.d)
        self.c, self.scale = c, c.d**-0.5 if c.scale is None else c.scale
        make = lambda n, heads: Tensor(rng.standard_normal((c.b, n, heads, c.d)), c.dtype, c.layout)  # noqa: E731
        self.q, self.k1, self.v1, self.k2, self.v2 = make(c.nq, c.h), *(make(n, c.g) for n in (c.n1, c.n1, c.n2, c.n2))
        self.grad_out = make(c.nq, c.h)
        self.grad_lse = rng.standard_normal((c.b, c.h, c.nq)).astype(wide(c.dtype))
        self.len1 = self.len2 = self.key2_valid = self.text_time = self.cu_q = self.cu_k = None
        if c.lens:
            self.len1, self.len2 = (rng.integers(0, n + 1, c.b).astype(np.int32) for n in (c.n1, c.n2))
            self.len1[0] = self.len2[0] = 0
        if c.valid:
            self.key2_valid = rng.integers(0, 2, (c.b, c.n2)).astype(np.uint8)
        if c.rule.startswith("media"):
            images = c.n1 // c.latents
            self.text_time = np.minimum((rng.random((c.b, c.nq)) < 4 / c.nq).cumsum(1), images).astype(np.int32)
            self.text_time[-1] = rng.integers(0, images + 1, c.nq)  # not ascending
        self.seed = np.array([(123 << 32) + 456], np.int64)
        self.threshold = round(c.dropout * 65536)

    def seen(self) -> np.ndarray:
        """[B, Nq, N1 + N2]"""
        c = self.c
        i, j = np.arange(c.nq)[:, None], np.arange(c.n1 + c.n2)
        row, second = i + (c.n1 + c.n2 - c.nq), j >= c.n1  # the rows are the last of the sequence
        seen = np.ones((c.b, c.nq, c.n1 + c.n2), bool)
        match c.rule:
            case "unimodal":
                seen &= (row >= c.n1) == second
            case "multimodal_causal":
                seen &= ~second | ((row >= c.n1) & (j <= row))
            case "media":
                seen &= self.text_time[..., None] == j // c.latents + 1
            case "media_all":
                seen &= self.text_time[..., None] >= j // c.latents + 1
        if self.len1 is not None:
            seen &= second | (j < self.len1[:, None, None])
            seen &= ~second | (j - c.n1 < self.len2[:, None, None])
        if self.key2_valid is not None:
            seen[:, :, c.n1 :] &= self.key2_valid[:, None] != 0
        return seen

    def keep(self) -> np.ndarray:
        c = self.c
        keep = np.ones((c.b * c.h, c.nq, c.n1 + c.n2))
        if self.threshold:
            for bh in range(c.b * c.h):
                bits = np.concatenate([philox_bits(int(self.seed[0]), bh, c.nq, n, s) for s, n in enumerate((c.n1, c.n2))], 1)
                keep[bh] = (bits >= self.threshold) * 65536 / (65536 - self.threshold)
        return keep.reshape(c.b, c.h, c.nq, c.n1 + c.n2)

    def args(self, out: Tensor, lse: np.ndarray) -> Args:
        c = self.c
        tensors = {n: getattr(self, n).view() for n in ("q", "k1", "v1")}
        if c.n2:
            tensors |= {"k2": self.k2.view(), "v2": self.v2.view()}
        pointers = {n: pointer(getattr(self, n)) for n in ("len1", "len2", "key2_valid", "text_time")}
        return Args(
            dtype=DTYPES.index(c.dtype), B=c.b, H=c.h, G=c.g, D=c.d, Nq=c.nq, N1=c.n1, N2=c.n2, **tensors, out=out.view(),
            lse=pointer(lse), lse_stride_b=c.h * c.nq, lse_stride_h=c.nq, scale=self.scale, rule=RULES.index(c.rule), **pointers,
            latents=c.latents, dropout_threshold=self.threshold, seed=pointer(self.seed),
        )  # fmt: skip


def reference(p: Problem):
    """out, lse, and a function of (grad_out, grad_lse) that gives grad_q, grad_k, grad_v; in float64, [B, N, heads, D]."""
    c, group = p.c, p.c.h // p.c.g
    q = p.q.values().transpose(0, 2, 1, 3)
    k, v = (np.concatenate(pair, 1).transpose(0, 2, 1, 3).repeat(group, 1)
            for pair in ((p.k1.values(), p.k2.values()), (p.v1.values(), p.v2.values())))  # fmt: skip
    seen, keep = p.seen()[:, None], p.keep()
    scores = np.where(seen, p.scale * q @ k.transpose(0, 1, 3, 2), -np.inf)
    some = seen.any(-1, keepdims=True)
    top = np.where(some, scores.max(-1, keepdims=True, initial=-np.inf), 0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(some, total, 1)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = (weights * keep) @ v

    def gradients(grad_out, grad_lse):
        g = grad_out.transpose(0, 2, 1, 3)
        delta = (g * out).sum(-1, keepdims=True) - grad_lse[..., None]
        ds = weights * ((g @ v.transpose(0, 1, 3, 2)) * keep - delta) * p.scale
        shared = lambda t: t.reshape(c.b, c.g, group, *t.shape[2:]).sum(2).transpose(0, 2, 1, 3)  # noqa: E731
        return (ds @ k).transpose(0, 2, 1, 3), shared(ds.transpose(0, 1, 3, 2) @ q), shared((weights * keep).transpose(0, 1, 3, 2) @ g)

    return out.transpose(0, 2, 1, 3), lse, gradients


def close(got: np.ndarray, want: np.ndarray, allowed: float, what: str, scale: float | None = None) -> None:
    norm = max(np.linalg.norm(want), 1e-3 * (scale or 0))
    assert np.isfinite(got).all(), f"{what} is not finite"
    error = np.linalg.norm(got - want) / (norm or 1)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.0e}"


def check(c: Case, sanitizer: str = "") -> None:
    library = build(*SOURCES, sanitizer=sanitizer)
    p = Problem(c)
    out = Tensor(np.full((c.b, c.nq, c.h, c.d), 55.0), c.dtype, c.layout)
    lse = np.full((c.b, c.h, c.nq), 55, wide(c.dtype))
    args = p.args(out, lse)
    emulator.call(library, "attention", args, sanitizer)
    want, want_lse, gradients = reference(p)
    steep = min(max(1.0, abs(p.scale)), 10.0)  # how much an error of a score counts, up to 1e-5 in fp32
    close(out.values(), want, steep * OUT[c.dtype], "out")
    empty = np.isinf(want_lse)
    assert (np.isneginf(lse) == empty).all()
    np.testing.assert_allclose(np.where(empty, 0, lse), np.where(empty, 0, want_lse), rtol=LSE[c.dtype], atol=LSE[c.dtype])

    # Backward starts from the stored output, as it is.
    grads = {n: Tensor(np.full_like(getattr(p, n[5:]).values(), 55.0), c.dtype, c.layout)
             for n in ("grad_q", "grad_k1", "grad_v1", "grad_k2", "grad_v2")}  # fmt: skip
    wanted = [n for n in grads if (n == "grad_q" and "q" in c.grads) or (n != "grad_q" and "k" in c.grads and (c.n2 or n[-1] != "2"))]
    backward = BackwardArgs(forward=args, **{n: grads[n].view() for n in wanted})
    if "o" in c.grads:
        backward.grad_out = p.grad_out.view()
    if "l" in c.grads:
        backward.grad_lse = pointer(p.grad_lse).value
    emulator.call(library, "attention_backward", backward, sanitizer)
    given = (p.grad_out.values() if "o" in c.grads else np.zeros_like(want), p.grad_lse if "l" in c.grads else np.zeros_like(want_lse))
    grad_q, grad_k, grad_v = gradients(*given)
    expected = {"grad_q": grad_q, "grad_k1": grad_k[:, : c.n1], "grad_v1": grad_v[:, : c.n1], "grad_k2": grad_k[:, c.n1 :],
                "grad_v2": grad_v[:, c.n1 :]}  # fmt: skip
    for name in grads:
        if name in wanted:
            close(grads[name].values(), expected[name], steep * GRAD[c.dtype], name, np.linalg.norm(grad_v))
        else:
            assert (grads[name].values() == 55).all(), f"{name} was not asked for"
    first = [g.array.copy() for g in grads.values()]
    emulator.call(library, "attention_backward", backward, sanitizer)
    assert all(np.array_equal(g.array, f) for g, f in zip(grads.values(), first, strict=True)), "not the same again"


TYPES = ["f32", "f16", "bf16"]
CASES = [
    # every type and width through every kernel: few rows, many rows, shared keys
    *[Case(20, 70, 9, d, t) for t in TYPES for d in (32, 64, 96, 128)],
    *[Case(70, 40, 9, d, t, b=1) for t in TYPES for d in (32, 64, 96, 128)],
    *[Case(5, 70, 33, d, t, b=1, h=4, g=2, layout="heads_first") for t, d in zip(TYPES, (64, 80, 96), strict=True)],
    # widths that are not a tile's, layouts that do not allow wide copies
    *[Case(18, 33, 5, d, t, b=1, layout=lay) for t in TYPES for d, lay in ((1, "dense"), (5, "dense"), (33, "sliced"), (40, "sliced"), (80, "dense"))],
    *[Case(66, 33, 0, d, t, b=1, layout="sliced") for t in TYPES for d in (3, 72)],
    # the plain kernels
    Case(4, 9, 3, 5, "f64", h=4, lens=True, dropout=0.3), Case(3, 7, 2, 160, "f32", lens=True), Case(3, 7, 2, 130, "bf16", dropout=0.4, layout="sliced"),
    Case(6, 12, d=8, dtype="f64", rule="media", latents=3), Case(7, 3, 4, 140, "f16", rule="multimodal_causal", valid=True),
    # one row, one key; nothing to see; split keys with empty runs
    *[Case(1, 1, d=32, dtype=t) for t in TYPES], Case(3, 0, 2, 32), Case(3, 200, 70, 64, b=1, h=1, g=1, lens=True),
    Case(64, 700, 64, 64, "f16", b=1, h=1, g=1), Case(16, 640, 0, 64, "f32", b=1, h=1, g=1, dropout=0.2),
    Case(70, 300, 64, 64, b=1, h=1, g=1), Case(2, 90, 40, 32, b=3, lens=True), Case(66, 90, 40, 32, b=3, lens=True),
    # dropout
    *[Case(n, 90, 40, 64, t, dropout=0.25, b=1) for t in TYPES for n in (17, 65)],
    # the Q-Former's rules
    *[Case(n, q, n - q, 64, t, rule=r, valid=v, lens=not v, b=3, h=1, g=1, dropout=0.1 * v) for r in ("unimodal", "multimodal_causal")
      for t in ("bf16", "f32") for n, q, v in ((52, 32, True), (90, 20, False), (80, 20, True), (9, 0, True))],
    Case(20, 32, 20, 64, rule="multimodal_causal", b=1), Case(1, 32, 20, 64, rule="multimodal_causal", b=1), Case(8, 32, 32, 32, valid=True),
    # text on images: with and without holes between what a tile of rows sees
    *[Case(n, images * latents, d=64, dtype=t, rule=r, latents=latents, h=2, g=1) for r in ("media", "media_all") for t in ("bf16", "f32")
      for n, images, latents in ((70, 3, 64), (40, 5, 3), (20, 2, 100), (9, 4, 70))],
    # what is asked for and given
    *[Case(n, 40, 6, 32, grads=g, b=1) for n in (10, 70) for g in ("oq", "ok", "lq", "lk", "olk")],
    Case(10, 40, 6, 32, scale=0.0), Case(10, 40, 6, 32, scale=-0.5), Case(70, 40, 6, 32, scale=-0.5), Case(10, 40, 6, 32, "f32", scale=30.0),
]  # fmt: skip
REDUCED = [
    Case(20, 70, 9, 64, dropout=0.2, lens=True, b=1, h=1, g=1), Case(70, 70, 9, 32, "f16", b=1, h=2, g=1, dropout=0.2),
    Case(18, 70, 5, 36, "f32", b=1, h=1, g=1, layout="sliced"), Case(66, 40, 0, 32, "f32", b=1, h=1, g=1),
    Case(40, 150, d=32, rule="media", latents=30, b=1, h=1, g=1), Case(3, 5, 2, 5, "f64", b=1, h=1, g=1), Case(16, 320, d=32, b=1, h=1, g=1),
]  # fmt: skip
MORE = [Case(n, 70, 9, 128, t, b=1, h=1, g=1) for t in TYPES for n in (20, 66)] + [
    Case(52, 32, 20, 64, rule="multimodal_causal", valid=True, b=1, h=1, g=1)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    check(case)


@pytest.mark.parametrize("dtype", [*TYPES, "f64"])
@pytest.mark.parametrize(("lens_q", "lens_k"), [([3, 0, 20, 1], [5, 9, 0, 33]), ([70, 2], [40, 70]), ([4], [4])])
def test_packed(dtype, lens_q, lens_k):
    """Each sequence of a packed batch against the same sequence alone."""
    check_packed(dtype, lens_q, lens_k)


def check_packed(dtype, lens_q, lens_k, sanitizer=""):
    library = build(*SOURCES, sanitizer=sanitizer)
    whole = Problem(Case(sum(lens_q), sum(lens_k), d=32, dtype=dtype, b=1))
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(lens)]).astype(np.int32) for lens in (lens_q, lens_k))
    out, lse = Tensor(np.full(whole.q.values().shape, 55.0), dtype), np.full((2, sum(lens_q)), 55, wide(dtype))
    args = whole.args(out, lse)
    args.B, args.Nq, args.N1, args.cu_q, args.cu_k = len(lens_q), max(lens_q), max(lens_k), pointer(cu_q).value, pointer(cu_k).value
    args.lse_stride_b, args.lse_stride_h = 0, sum(lens_q)
    for view in (args.q, args.k1, args.v1, args.out):
        view.stride_b = 0
    emulator.call(library, "attention", args, sanitizer)
    grads = {n: Tensor(np.full_like(getattr(whole, n[5:]).values(), 55.0), dtype) for n in ("grad_q", "grad_k1", "grad_v1")}
    backward = BackwardArgs(forward=args, grad_out=whole.grad_out.view(), grad_lse=pointer(whole.grad_lse).value)
    backward.grad_out.stride_b = 0
    for name, grad in grads.items():
        view = grad.view()
        view.stride_b = 0
        setattr(backward, name, view)
    emulator.call(library, "attention_backward", backward, sanitizer)
    for b in range(len(lens_q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = Problem(Case(lens_q[b], lens_k[b], d=32, dtype=dtype, b=1))
        for name, part in (("q", rows), ("k1", keys), ("v1", keys), ("grad_out", rows)):
            setattr(alone, name, Tensor(getattr(whole, name).values()[:, part], dtype))
        want, want_lse, gradients = reference(alone)
        close(out.values()[:, rows], want, OUT[dtype], "out")
        empty = np.isinf(want_lse[0])
        assert (np.isneginf(lse[:, rows]) == empty).all()
        grad_q, grad_k, grad_v = gradients(alone.grad_out.values(), whole.grad_lse[..., rows])
        for name, expected, part in (("grad_q", grad_q, rows), ("grad_k1", grad_k, keys), ("grad_v1", grad_v, keys)):
            close(grads[name].values()[:, part], expected, GRAD[dtype], name, np.linalg.norm(grad_v))


def check_merge(dtype, backward, sanitizer=""):
    library = build(*SOURCES, sanitizer=sanitizer)
    rng = np.random.default_rng(3)
    b, n, h, d = 2, 3, 2, 37
    a, o, g = (Tensor(rng.standard_normal((b, n, h, d)), dtype, "sliced") for _ in range(3))
    lse_a, lse_o, grad_lse = (rng.standard_normal((b, h, n)).astype(wide(dtype)) for _ in range(3))
    lse_a[0, 0, 0] = lse_a[1, 1, 2] = lse_o[1, 1, 2] = -np.inf
    with np.errstate(invalid="ignore"):
        want_lse = np.logaddexp(lse_a.astype(float), lse_o.astype(float))
        none = np.isneginf(want_lse)
        wa, wo = (np.where(none, 0, np.exp(x - np.where(none, 0, want_lse))) for x in (lse_a, lse_o))
    spread = lambda w: w.transpose(0, 2, 1)[..., None]  # noqa: E731
    want = spread(wa) * a.values() + spread(wo) * o.values()
    out, lse = Tensor(np.full((b, n, h, d), 55.0), dtype), np.full((b, h, n), 55, wide(dtype))
    args = MergeArgs(dtype=DTYPES.index(dtype), B=b, H=h, D=d, Nq=n, out_a=a.view(), out_b=o.view(), out=out.view(), lse_a=pointer(lse_a),
                     lse_b=pointer(lse_o), lse=pointer(lse))  # fmt: skip
    assert library.function("mmfast::attention_merge_cuda")(ctypes.byref(args), ptr(None)) == 0
    close(out.values(), want, OUT[dtype], "out")
    np.testing.assert_allclose(lse[~none], want_lse[~none], atol=LSE[dtype])
    assert np.isneginf(lse[none]).all()
    if not backward:
        return
    grads, grad_lses = (
        [Tensor(np.full((b, n, h, d), 55.0), dtype) for _ in range(2)],
        [np.full((b, h, n), 55, wide(dtype)) for _ in range(2)],
    )
    args.grad_out, args.grad_lse = g.view(), pointer(grad_lse).value
    args.grad_out_a, args.grad_out_b = (t.view() for t in grads)
    args.grad_lse_a, args.grad_lse_b = (pointer(t).value for t in grad_lses)
    assert library.function("mmfast::attention_merge_backward_cuda")(ctypes.byref(args), ptr(None)) == 0
    for grad, got_lse, w, side in zip(grads, grad_lses, (wa, wo), (a, o), strict=True):
        close(grad.values(), spread(w) * g.values(), OUT[dtype], "grad_out")
        dot = (g.values() * (side.values() - want)).sum(-1).transpose(0, 2, 1)
        close(got_lse, w * (dot + grad_lse), GRAD[dtype], "grad_lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_merge(dtype, backward):
    check_merge(dtype, backward)


def test_small_shared_memory():
    """Where a block may have 64 KB: CTAs of fewer rows, and where that does not help, other kernels."""
    done = run_sanitized("ops.test_attention_emulated", "", env={"MMFAST_EMULATE_SHARED": "65536"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_long_sums_when_accumulation_truncates():
    """Tensor cores need not round to nearest: float32 stays float32 when every sum in them is cut towards zero."""
    done = run_sanitized("ops.test_attention_emulated", "", "truncate", env={"MMFAST_EMULATE_TRUNCATE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = run_sanitized("ops.test_attention_emulated", sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sanitizer, what = sys.argv[1], sys.argv[2:]
    if what:
        OUT["f32"] = 1.5e-6
        for rows in (40, 66):
            check(Case(rows, 257, 0, 128, "f32", b=1))
        sys.exit()
    for case in REDUCED + MORE * (sanitizer != "thread"):
        check(case, sanitizer)
    check_packed("bf16", [3, 0, 20], [5, 9, 33], sanitizer)
    check_merge("f16", True, sanitizer)
