"""csrc/ppo/ppo_cuda.cu, unchanged, under the CUDA emulator against float64 numpy.

The reference is numpy alone, so that ``python -m ops.test_ppo_emulated SANITIZER`` can run a few cases with a sanitizer preloaded. Workspaces
are exactly as large as asked for and lie between guard bytes.
"""

import ctypes
import sys

import numpy as np
import pytest
from emulator import emulator
from emulator.emulator import DTYPES, build, has_sanitizer, load, pointer, run_sanitized, store, wide

SOURCE = "csrc/ppo/ppo_cuda.cu"
KL_KINDS = [None, "k1", "k1_clamped", "k2", "k3"]  # numbered as PpoKl

i64, ptr, f64 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class Input(ctypes.Structure):
    _fields_ = [("data", ptr), ("dtype", ctypes.c_int)]


class GaeArgs(ctypes.Structure):
    _fields_ = [("rewards", Input), ("values", Input), ("bootstrap", Input), ("mask", ptr), ("dones", ptr), ("B", i64), ("T", i64),
                ("gamma", f64), ("lam", f64), ("advantages", ptr), ("returns", ptr), ("out", ctypes.c_int)]  # fmt: skip


class WhitenArgs(ctypes.Structure):
    _fields_ = [("x", Input), ("mask", ptr), ("n", i64), ("shift_mean", ctypes.c_bool), ("unbiased", ctypes.c_bool),
                ("eps_on_std", ctypes.c_bool), ("eps", f64), ("out", ptr), ("out_type", ctypes.c_int)]  # fmt: skip


class LossArgs(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("inputs", Input * 5), ("mask", ptr), ("n", i64), ("clip_low", f64), ("clip_high", f64),
                ("dual_clip", f64), ("kl_coef", f64), ("kl", ctypes.c_int), ("out", ctypes.c_int), ("loss", ptr), ("stats", ptr),
                ("scale", ptr), ("grad", ptr)]  # fmt: skip


def given(stored: np.ndarray | None, dtype: str) -> Input:
    return Input(None if stored is None else stored.ctypes.data, DTYPES.index(dtype))


def call(op: str, args: ctypes.Structure, sanitizer: str = "") -> None:
    emulator.call(build(SOURCE, sanitizer=sanitizer), op, args, sanitizer)


def number(dtype: str) -> int:
    return DTYPES.index("f64" if dtype == "f64" else "f32")


def close(got: np.ndarray, expected, dtype: str) -> None:
    assert not np.isnan(got).any()
    tolerance = 1e-12 if dtype == "f64" else 1e-6
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-30))


def check_gae(b, t, dtype="f32", mask=False, dones=False, bootstrap=False, sanitizer=""):
    rng = np.random.default_rng(b + t)
    rewards, values = store(rng.standard_normal((b, t)), dtype), store(rng.standard_normal((b, t)), dtype)
    inside = (rng.random((b, t)) < 0.6).astype(np.uint8) if mask else None
    ends = (rng.random((b, t)) < 0.1).astype(np.uint8) if dones else None
    ahead = store(rng.standard_normal(b), dtype) if bootstrap else None
    r, v = load(rewards, dtype), load(values, dtype)
    if mask:  # what stands outside must not be read into anything
        rewards[inside == 0] = store(np.array(np.nan), dtype)
        r, v = r * inside, v * inside
    out = np.full((2, b, t), 55, wide(dtype))
    gamma, lam = 0.97, 0.9
    call("gae", GaeArgs(
        given(rewards, dtype), given(values, dtype), given(ahead, dtype), pointer(inside), pointer(ends), b, t, gamma, lam,
        out[0].ctypes.data, out[1].ctypes.data, number(dtype),
    ), sanitizer)  # fmt: skip
    expected, advantage = np.zeros((b, t)), np.zeros(b)
    following = load(ahead, dtype) if bootstrap else np.zeros(b)
    for i in reversed(range(t)):
        on = 1.0 - ends[:, i] if dones else 1.0
        advantage = r[:, i] + gamma * on * following - v[:, i] + gamma * lam * on * advantage
        expected[:, i], following = advantage, v[:, i]
    close(out[0], expected, dtype)
    close(out[1], expected + v, dtype)


GAE = [
    (1, 1), (1, 31), (3, 32), (9, 33), (2, 64), (17, 65), (1, 1025), (0, 5), (4, 0),
    (5, 100, "bf16", True), (8, 70, "f16", False, True), (3, 97, "f64", True, True, True), (3, 96, "f32", True, True, True), (2, 1, "f32", False, True, True),
]  # fmt: skip


@pytest.mark.parametrize("case", GAE, ids=str)
def test_gae(case):
    check_gae(*case)


def check_whiten(n, dtype="f32", mask=None, shift_mean=True, unbiased=True, eps_on_std=False, eps=1e-8, mean=2.0, sanitizer=""):
    rng = np.random.default_rng(n)
    x = store(rng.standard_normal(n) + mean, dtype)
    values = load(x, dtype)
    keep = np.ones(n, bool) if mask is None else rng.random(n) < mask
    inside = None if mask is None else keep.astype(np.uint8)
    if mask is not None:
        x[~keep] = store(np.array(np.nan), dtype)
    out = np.full(n, 55, wide(dtype))
    args = WhitenArgs(given(x, dtype), pointer(inside), n, shift_mean, unbiased, eps_on_std, eps, out.ctypes.data, number(dtype))
    call("masked_whiten", args, sanitizer)
    kept = values[keep]
    center = kept.mean() if len(kept) else 0.0
    variance = ((kept - center) ** 2).sum() / max(len(kept) - unbiased, 1)
    factor = 1 / (np.sqrt(variance) + eps) if eps_on_std else 1 / np.sqrt(variance + eps)
    close(out, np.where(keep, (values - center) * factor + (0 if shift_mean else center), 0), dtype)


WHITEN = [
    (1,), (2,), (255,), (1024,), (1025,), (5000, "f32", 0.6), (3000, "bf16", 0.5, False), (700, "f16", None, True, False, True, 0.1),
    (2500, "f64", 0.7, True, True, False, 1e-8, 1e3), (600, "f32", 0.0), (0,), (270000, "f32", 0.9),
]  # fmt: skip


@pytest.mark.parametrize("case", WHITEN, ids=str)
def test_whiten(case):
    check_whiten(*case)


def policy(logp, old, advantage, weight, ref, kl, clip, dual, coef):
    """Loss, derivative and statistics of each token, written from the formulas."""
    change = logp - old
    ratio = np.exp(change)
    plain, clipped = ratio * advantage, np.clip(ratio, 1 - clip[0], 1 + clip[1]) * advantage
    surrogate = np.minimum(plain, clipped)
    floor = np.where(advantage < 0, dual * advantage, -np.inf)
    bound = (plain > clipped) | (surrogate < floor)
    surrogate = np.maximum(surrogate, floor)
    d = logp - ref
    penalty, slope = {
        None: (0 * d, 0 * d), "k1": (d, 1 + 0 * d), "k1_clamped": (np.maximum(d, 0), (d > 0) + 0.0), "k2": (d * d / 2, d),
        "k3": (np.exp(-d) - 1 + d, 1 - np.exp(-d)),
    }[kl]  # fmt: skip
    loss, grad = weight * (coef * penalty - surrogate), weight * (coef * slope - np.where(bound, 0, plain))
    return loss, grad, (bound + 0.0, ratio - 1 - change, ratio, penalty)


def value(values, old, target, clip):
    held = old + np.clip(values - old, -clip, clip)
    plain, clipped = (values - target) ** 2, (held - target) ** 2
    bound = (np.abs(values - old) > clip) & (clipped > plain)
    return np.maximum(plain, clipped) / 2, np.where(bound, 0, values - target), (bound + 0.0, plain, 0 * plain, 0 * plain)


def check_loss(kind, n, dtype="f32", mask=None, kl=None, weights=False, other=None, dual=np.inf, sanitizer=""):
    """``other``: the type of all inputs but the first."""
    rng = np.random.default_rng(n)
    other = other or dtype
    types = [dtype, *[other] * 4]
    old = -3 * rng.random(n)
    drafts = [old + 0.4 * rng.standard_normal(n), old, rng.standard_normal(n), rng.random(n), old + 0.4 * rng.standard_normal(n)]
    used = [True, True, True, weights, kl is not None] if kind == "policy" else [True, True, True, False, False]
    stored = [store(x, t) if u else None for x, t, u in zip(drafts, types, used, strict=True)]
    x = [load(s, t) if s is not None else np.ones(n) for s, t in zip(stored, types, strict=True)]
    keep = np.ones(n, bool) if mask is None else rng.random(n) < mask
    inside = None if mask is None else keep.astype(np.uint8)
    for s, t in zip(stored, types, strict=True):
        if s is not None:
            s[~keep] = store(np.array(np.nan), t)
    loss, stats, scale, grad = (np.full(k, 55, wide(dtype)) for k in (1, 4, 1, n))
    call("ppo_loss", LossArgs(
        kind=["policy", "value"].index(kind), inputs=(Input * 5)(*[given(s, t) for s, t in zip(stored, types, strict=True)]),
        mask=pointer(inside), n=n, clip_low=0.2, clip_high=0.3 if kind == "policy" else 0.2, dual_clip=dual, kl_coef=0.5,
        kl=KL_KINDS.index(kl), out=number(dtype), loss=pointer(loss), stats=pointer(stats), scale=pointer(scale), grad=pointer(grad),
    ), sanitizer)  # fmt: skip
    each, slope, rest = policy(*x, kl, (0.2, 0.3), dual, 0.5) if kind == "policy" else value(*x[:3], 0.2)
    count = max(keep.sum(), 1)
    close(grad, np.where(keep, slope, 0), dtype)
    close(loss, [each[keep].sum() / count], dtype)
    for s in range(4):
        close(stats[s : s + 1], [rest[s][keep].sum() / count], dtype)
    close(scale, [1 / count if keep.any() else 0], dtype)


LOSSES = [
    *[("policy", 300, "f32", 0.7, kl, True) for kl in KL_KINDS], ("policy", 1), ("policy", 1025), ("policy", 3000, "f64", 0.5, "k3", True, "f32", 1.5),
    ("policy", 500, "bf16", None, "k2", False, "f32"), ("policy", 400, "f16", 0.6, "k3"), ("policy", 200, "f32", 0.0, "k3", True),
    ("policy", 270000, "f32", 0.9), ("value", 1), ("value", 1300, "f32", 0.7), ("value", 300, "f64", None), ("value", 300, "bf16", 0.4, None, False, "f16"),
    ("value", 60, "f32", 0.0),
]  # fmt: skip


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_loss(case):
    check_loss(*case)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = run_sanitized("ops.test_ppo_emulated", sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    chosen = sys.argv[1]
    check_gae(3, 97, "f64", True, True, True, sanitizer=chosen)
    check_gae(9, 33, sanitizer=chosen)
    check_whiten(1100, "bf16", 0.5, False, sanitizer=chosen)
    check_loss("policy", 1100, "f32", 0.7, "k3", True, "bf16", 1.5, sanitizer=chosen)
    check_loss("value", 70, "f16", None, sanitizer=chosen)
    if chosen == "address":
        check_whiten(3000, "f32", None, sanitizer=chosen)
        check_loss("policy", 3000, "f64", 0.5, sanitizer=chosen)
