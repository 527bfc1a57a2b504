"""PPO against plain PyTorch as trainers write it, interleaved in one run.

``pytest bench/ops/bench_ppo.py -s`` (or ``mmfast bench ppo``) prints the tables and writes ``bench/results/<device>/ppo.csv``; the clock starts
only after a provider's answer was compared with the float64 reference. Shapes: 8 x 256 and 64 x 1024 tokens (a rank's share of a rollout), 256 x 2048.
"""

import pytest
import timing
import torch

import mmfast
from mmfast.ops import ppo

DEVICE = timing.DEVICE
SHAPES = timing.sizes([(8, 256), (64, 1024), (256, 2048)], [(64, 1024), (8, 256), (256, 2048)], [(3, 20)])
BYTES = {"gae": 16, "whiten": 14, "policy": 17, "value": 17}  # a token: float32 read and written, a mask of one byte
ROWS: list[dict] = []


def record(mode, shape, calls, truth):
    """Checks, times and notes ``calls``; each returns tensors to be compared with ``truth``. The first is the baseline."""
    errors = {}
    for name, call in calls.items():
        for got, want in zip(call(), truth, strict=True):
            off = (got - want).abs() / want.abs().max()
            # A token within a rounding of its clip has the one gradient or the other.
            right = off < 1e-5
            assert right.double().mean() > 0.9999, f"{name}: {1 - right.double().mean():.2%} of the elements are wrong"
            errors[name] = max(errors.get(name, 0.0), off[right].max().item())
    times = timing.interleaved(calls, repeats=31, device=DEVICE)
    eager = times[next(iter(times))][0]
    print(f"\n{mode}, {shape[0]} x {shape[1]}, float32")
    for name, (median, p20, p80) in times.items():
        print(f"  {name:26s} {median:9.3f} ms  [{p20:.3f}, {p80:.3f}]  {eager / median:6.1f}x")
        ROWS.append(
            dict(op="ppo", provider=name, mode=mode, shape=str(shape), dtype="float32", median_ms=f"{median:.4f}", p20_ms=f"{p20:.4f}",
                 p80_ms=f"{p80:.4f}", ratio_vs_eager=f"{eager / median:.2f}", max_err=f"{errors[name]:.1e}", version=torch.__version__,
                 **timing.work(0, BYTES[mode.split()[0]] * shape[0] * shape[1], "float32", median))
        )  # fmt: skip
    timing.write_rows("ppo", ROWS)


def rollout(shape):
    torch.manual_seed(0)
    old = -3 * torch.rand(shape, device=DEVICE)
    new = old + 0.2 * torch.randn(shape, device=DEVICE)
    return new.requires_grad_(), old, torch.randn(shape, device=DEVICE), torch.rand(shape, device=DEVICE) > 0.3


# Trainers' own lines: no option that this call does not use, statistics under no_grad.


def eager_whiten(x, mask):
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def eager_policy(logp, old, advantages, mask):
    count, change = mask.sum(), logp - old
    ratio = change.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = (torch.max(plain, clipped) * mask).sum() / count
    with torch.no_grad():
        stats = [((clipped > plain) * mask).sum() / count, ((ratio - 1 - change) * mask).sum() / count]
    return loss, stats


def eager_value(values, old, returns, mask):
    count = mask.sum()
    plain = (values - returns).square()
    clipped = (old + (values - old).clamp(-0.2, 0.2) - returns).square()
    loss = (torch.max(plain, clipped) * mask).sum() / count / 2
    with torch.no_grad():
        stats = [((clipped > plain) * mask).sum() / count]
    return loss, stats


def step(loss, leaf, *args):
    """Forward and backward."""
    value, _ = loss(leaf, *args)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_advantages(shape, benchmark):
    _, values, rewards, _ = rollout(shape)
    options = dict(gamma=0.99, lam=0.95)
    calls = {"eager loop": lambda: ppo.gae_ref(rewards, values, **options), "mmfast": lambda: mmfast.gae(rewards, values, **options)}
    record("gae", shape, calls, ppo.gae_ref(rewards.double(), values.double(), **options))
    benchmark(calls["mmfast"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whitening(shape, benchmark):
    _, _, x, mask = rollout(shape)
    calls = {"eager": lambda: [eager_whiten(x, mask)], "mmfast": lambda: [mmfast.masked_whiten(x, mask)]}
    record("whiten", shape, calls, [ppo.masked_whiten_ref(x.double(), mask)])
    benchmark(calls["mmfast"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["policy", "value"])
def test_loss_forward_and_backward(shape, which, benchmark):
    leaf, *rest, mask = rollout(shape)
    op, ref, eager = {
        "policy": (mmfast.ppo_policy_loss, ppo.ppo_policy_loss_ref, eager_policy),
        "value": (mmfast.ppo_value_loss, ppo.ppo_value_loss_ref, eager_value),
    }[which]
    truth = step(lambda *t: ref(*t, mask=mask), leaf.detach().double().requires_grad_(), *[t.double() for t in rest])
    calls = {"eager": lambda: step(eager, leaf, *rest, mask), "mmfast": lambda: step(lambda *t: op(*t, mask=mask), leaf, *rest)}
    record(f"{which} loss, forward and backward", shape, calls, truth)
    benchmark(calls["mmfast"])
