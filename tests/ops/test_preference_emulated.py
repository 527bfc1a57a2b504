"""csrc/preference/preference_cuda.cu, unchanged, under the CUDA emulator against numpy.

Pair losses are written out here once more in 80-bit floats, and derivatives are their difference quotients. As in test_vq_emulated,
``python -m ops.test_preference_emulated SANITIZER`` runs the reduced set with a sanitizer preloaded.
"""

import ctypes
import sys

import numpy as np
import pytest
from emulator import emulator
from emulator.emulator import DTYPES, UNIT, build, has_sanitizer, load, pointer, run_sanitized, store, wide

SOURCE = "csrc/preference/preference_cuda.cu"
NORMS = ["none", "count", "weight"]
LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo",
    "nca",
    "robust",
    "bco",
    "sppo",
    "apo_zero",
    "apo_down",
    "discopop",
    "odds_ratio",
    "anchor",
    "prospect",
]
DIVERGENCES = ["reverse_kl", "forward_kl", "js", "alpha"]
STORED = {"f32": 2.0**-23, "f64": 1e-13}  # everything is computed in fp64: one rounding

i64, ptr, f64 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class SegmentArgs(ctypes.Structure):
    _fields_ = [("logp", ptr), ("logp_dtype", ctypes.c_int), ("seq_ids", ptr), ("segment_ids", ptr), ("weights", ptr),
                ("weights_dtype", ctypes.c_int), ("N", i64), ("S", i64), ("K", i64), ("norm", ctypes.c_int), ("dtype", ctypes.c_int),
                ("values", ptr), ("norms", ptr)]  # fmt: skip


class SegmentBackwardArgs(ctypes.Structure):
    _fields_ = [("forward", SegmentArgs), ("grad", ptr), ("grad_logp", ptr), ("grad_weights", ptr)]


class Column(ctypes.Structure):
    _fields_ = [("data", ptr), ("dtype", ctypes.c_int), ("stride", i64)]


COLUMNS = ["chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lens", "rejected_lens", "rejected_scale", "margin"]
SETTINGS = dict(alpha=0.6, beta=0.3, label_smoothing=0.15, tau=0.05)


class PreferenceArgs(ctypes.Structure):
    _fields_ = [*((name, Column) for name in COLUMNS), ("P", i64), ("loss", ctypes.c_int), ("divergence", ctypes.c_int),
                *((name, f64) for name in SETTINGS), ("dtype", ctypes.c_int), ("losses", ptr), ("rewards", ptr), ("slopes", ptr)]  # fmt: skip


def call(op: str, args: ctypes.Structure, sanitizer: str = "") -> None:
    emulator.call(build(SOURCE, sanitizer=sanitizer), op, args, sanitizer)


# -------------------------------------------------------------------------------------------------------- sums over segments


def check_segments(n, s, k, norm, dtype, w_dtype, order, sanitizer=""):
    """k 0: no phrases. Tokens of no segment hold NaN; some ids are out of range. Two sequences stay empty."""
    rng = np.random.default_rng(n + s)
    ids = {"rows": np.arange(n) * s // max(n, 1), "waves": np.arange(n) % s, "shuffled": rng.integers(0, s, n)}[order].astype(np.int64)
    ids[rng.random(n) < 0.2] = -1
    ids[rng.random(n) < 0.05] = s + 2
    phrases = rng.integers(-1, k + 1, n) if k else np.zeros(n, np.int64)
    S, K = s + 2, max(k, 1)
    inside = (ids >= 0) & (ids < S) & (phrases >= 0) & (phrases < K)
    stored = [store(np.where(inside, v, np.nan), t) for v, t in ((-3 * rng.random(n), dtype), (0.5 + rng.random(n), w_dtype or "f32"))]
    logp, weights = load(stored[0], dtype), load(stored[1], w_dtype) if w_dtype else np.ones(n)
    out = "f64" if dtype == "f64" else "f32"
    values, norms = np.full((S, K), 55, wide(dtype)), np.full((S, K), 55, wide(dtype))
    args = SegmentArgs(
        logp=pointer(stored[0]), logp_dtype=DTYPES.index(dtype), seq_ids=pointer(ids), segment_ids=pointer(phrases) if k else None,
        weights=pointer(stored[1]) if w_dtype else None, weights_dtype=DTYPES.index(w_dtype or "f32"), N=n, S=S, K=K,
        norm=NORMS.index(norm), dtype=DTYPES.index(out), values=pointer(values), norms=pointer(norms),
    )  # fmt: skip
    call("segment_logp", args, sanitizer)
    hot = np.zeros((S * K, n))
    hot[(ids * K + phrases)[inside], np.flatnonzero(inside)] = 1
    clean, clean_weights = np.where(inside, logp, 0), np.where(inside, weights, 0)
    want_norms = {"none": np.ones(S * K), "count": hot.sum(1), "weight": hot @ clean_weights}[norm]
    inverse = np.where(want_norms > 0, 1 / np.maximum(want_norms, 1e-9), 0)
    want = (hot @ (clean * clean_weights)) * inverse
    np.testing.assert_allclose(values.ravel(), want, rtol=STORED[out])
    np.testing.assert_allclose(norms.ravel(), want_norms, rtol=STORED[out])

    grad = rng.standard_normal((S, K)).astype(wide(dtype))
    grad_logp, grad_weights = store(np.full(n, 55.0), dtype), store(np.full(n, 55.0), w_dtype or "f32")
    backward = SegmentBackwardArgs(args, pointer(grad), pointer(grad_logp), pointer(grad_weights) if w_dtype else None)
    call("segment_logp_backward", backward, sanitizer)
    share = hot.T @ (grad.ravel() * inverse)
    np.testing.assert_allclose(load(grad_logp, dtype), share * clean_weights, rtol=2 * UNIT[dtype], atol=1e-7 * (dtype == "f16"))
    if w_dtype:
        centre = hot.T @ want if norm == "weight" else 0
        scale = np.abs(share).max(initial=0) * 6
        np.testing.assert_allclose(load(grad_weights, w_dtype), share * (clean - centre), rtol=2 * UNIT[w_dtype], atol=scale * UNIT[out])


SEGMENTS = [
    *[(300, 4, 0, norm, "f32", "f32", "rows") for norm in NORMS], (700, 3, 0, "count", "f32", None, "rows"),
    (290, 7, 0, "weight", "bf16", "f32", "shuffled"), (257, 2, 0, "none", "f64", "f64", "waves"), (64, 60, 0, "count", "f16", "f16", "shuffled"),
    (500, 3, 4, "none", "f32", None, "shuffled"), (200, 5, 2, "weight", "f32", "bf16", "rows"), (1, 1, 0, "none", "f32", "f32", "rows"),
    (0, 2, 0, "count", "f32", "f32", "rows"), (0, 2, 3, "weight", "f32", "f32", "rows"),
]  # fmt: skip


@pytest.mark.parametrize(("n", "s", "k", "norm", "dtype", "w_dtype", "order"), SEGMENTS)
def test_segments(n, s, k, norm, dtype, w_dtype, order):
    check_segments(n, s, k, norm, dtype, w_dtype, order)


# -------------------------------------------------------------------------------------------------------------- pair losses


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return np.exp(-softplus(-x))


def pair_losses(loss, divergence, v):
    """The table at the head of csrc/preference/preference_pair.h."""
    b, e, tau, alpha, m = SETTINGS["beta"], SETTINGS["label_smoothing"], SETTINGS["tau"], SETTINGS["alpha"], v["margin"]
    a, c = v["chosen"] - v["ref_chosen"], v["rejected_scale"] * (v["rejected"] - v["ref_rejected"])

    def score(r, lens):
        power = np.exp(np.minimum({"forward_kl": -r, "alpha": (alpha - 1) * r}.get(divergence, r), 80))
        f = {"reverse_kl": r, "forward_kl": -power, "js": -softplus(-r), "alpha": power / np.longdouble(alpha - 1)}[divergence]
        return f / np.maximum(lens, 1)

    u, w = score(a, v["chosen_lens"]), score(c, v["rejected_lens"])
    x, half = b * (u - w), 1 / (2 * np.longdouble(b))
    with np.errstate(all="ignore"):
        odds = [y - np.log(-np.expm1(y)) for y in (np.minimum(u, -1e-12), np.minimum(w, -1e-12))]
        return {
            "sigmoid": (1 - e) * softplus(m - x) + e * softplus(x - m),
            "hinge": np.maximum(0, 1 - x),
            "ipo": (u - w - half) ** 2,
            "exo": sigmoid(x) * (-softplus(-x) - np.log1p(-e)) + sigmoid(-x) * (-softplus(x) - np.log(e)),
            "nca": softplus(-b * u) + softplus(b * u) / 2 + softplus(b * w) / 2,
            "robust": ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e),
            "bco": softplus(m - b * u) + softplus(b * w - m),
            "sppo": (u - half) ** 2 + (w + half) ** 2,
            "apo_zero": sigmoid(-b * a) + sigmoid(b * c),
            "apo_down": sigmoid(b * a) + sigmoid(-x),
            "discopop": sigmoid(-x / tau) * softplus(-x) + np.exp(-x - softplus(-x / tau)),
            "odds_ratio": b * softplus(odds[1] - odds[0]),
            "anchor": softplus(m - b * u),
            "prospect": sigmoid(b * (m - u)),
        }[loss]


def check_pairs(loss, divergence, p, dtype, missing=(), one_margin=False, far=False, sanitizer=""):
    rng = np.random.default_rng(p)
    lens = rng.integers(0, 9, (2, p)).astype(float) if loss != "odds_ratio" else rng.integers(2, 9, (2, p)).astype(float)
    plain = -(0.5 + rng.random((2, p))) * np.maximum(lens, 1)
    v = dict(
        zip(
            COLUMNS,
            [*plain, *(plain + 2 * rng.standard_normal((2, p))), *lens, 1 + rng.random(p), rng.random(1 if one_margin else p)],
            strict=True,
        )
    )
    if loss == "odds_ratio":
        missing = (*missing, "ref_chosen", "ref_rejected", "rejected_scale")
    if far:
        v["chosen"] = v["chosen"] + np.resize([2000.0, -2000.0, 90.0, -90.0], p)
    stored = {name: None if name in missing else store(x, dtype) for name, x in v.items()}
    otherwise = dict(chosen_lens=1.0, rejected_lens=1.0, rejected_scale=1.0)
    v = {name: np.longdouble(np.full(p, otherwise.get(name, 0.0)) if s is None else load(s, dtype)) for name, s in stored.items()}
    out = "f64" if dtype == "f64" else "f32"
    losses, rewards, slopes = np.full(p, 55, wide(dtype)), np.full((2, p), 55, wide(dtype)), np.full((2, p), 55, wide(dtype))
    columns = {n: Column(pointer(s), DTYPES.index(dtype), 0 if s is not None and s.size == 1 else 1) for n, s in stored.items()}
    args = PreferenceArgs(
        **columns, P=p, loss=LOSSES.index(loss), divergence=DIVERGENCES.index(divergence), **SETTINGS, dtype=DTYPES.index(out),
        losses=pointer(losses), rewards=pointer(rewards), slopes=pointer(slopes),
    )  # fmt: skip
    call("preference_pairs", args, sanitizer)
    with np.errstate(over="ignore"):  # squares of held scores are past fp32
        close = dict(rtol=4 * STORED[out], atol=1e-30)
        np.testing.assert_allclose(losses, pair_losses(loss, divergence, v).astype(np.float64).astype(losses.dtype), **close)
        np.testing.assert_allclose(rewards[0], 0.3 * (v["chosen"] - v["ref_chosen"]).astype(float), rtol=4 * STORED[out], atol=1e-7)
        np.testing.assert_allclose(rewards[1], 0.3 * (v["rejected"] - v["ref_rejected"]).astype(float), rtol=4 * STORED[out], atol=1e-7)
        for side, name in enumerate(COLUMNS[:2]):
            h = np.longdouble(1e-5)
            up, down = (pair_losses(loss, divergence, {**v, name: v[name] + step}) for step in (h, -h))
            want = ((up - down) / (2 * h)).astype(np.float64)
            # A difference quotient: h^2 off, and what 64 bits of a large loss leave of a difference.
            slack = 1e-8 + 1e-12 * np.abs(up).astype(float)
            np.testing.assert_allclose(slopes[side], want.astype(slopes.dtype), rtol=2e-6, atol=slack.max(initial=0) if p else 0)


PAIRS = [
    *[(loss, "reverse_kl", 37, "f64") for loss in LOSSES], *[(loss, "alpha", 20, "f64") for loss in LOSSES if loss != "odds_ratio"],
    *[("sigmoid", d, 9, "f32") for d in DIVERGENCES], *[("nca", d, 9, "f64") for d in DIVERGENCES], *[("sigmoid", "js", 5, t) for t in ("f16", "bf16")],
    ("bco", "reverse_kl", 300, "bf16"), ("ipo", "reverse_kl", 1, "f32"), ("discopop", "reverse_kl", 0, "f32"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "divergence", "p", "dtype"), PAIRS)
def test_pairs(loss, divergence, p, dtype):
    check_pairs(loss, divergence, p, dtype)


@pytest.mark.parametrize("missing", [COLUMNS[2:], ["rejected", "ref_rejected", "rejected_lens"], ["margin", "rejected_scale"]], ids=str)
def test_missing_columns(missing):
    for loss in ("anchor", "prospect") if "rejected" in missing else ("sigmoid", "nca", "apo_zero"):
        check_pairs(loss, "reverse_kl", 11, "f64", missing)


def test_one_margin_for_all():
    check_pairs("bco", "reverse_kl", 11, "f64", one_margin=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "odds_ratio"])
def test_far_log_ratios(loss, divergence):
    """Thousands away nothing is NaN, and values are right where they can be."""
    check_pairs(loss, divergence, 12, "f64", missing=("chosen_lens", "rejected_lens"), far=True)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = run_sanitized("ops.test_preference_emulated", sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sanitizer = sys.argv[1]
    for case in SEGMENTS if sanitizer == "address" else SEGMENTS[2:6]:
        check_segments(*case, sanitizer)
    for case in PAIRS if sanitizer == "address" else PAIRS[:3]:
        check_pairs(*case, sanitizer=sanitizer)
    check_pairs("prospect", "js", 130, "f32", ["rejected", "ref_rejected", "rejected_lens", "margin"], sanitizer=sanitizer)
