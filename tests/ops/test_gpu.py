"""What only a GPU can answer about every op: the stream it runs on, capture in a CUDA graph, the screen's error bound, repeatable sums.

Each family is one function of fresh tensors that returns values and gradients; the same function serves all questions. On the CPU the functions
themselves are checked, so that a GPU's first run does not stumble over the test.
"""

import itertools

import pytest
import torch

import mmfast
from mmfast.ops import vq


def attention(draw):
    q, k, v, k2, v2 = draw(2, 40, 4, 64), draw(2, 300, 4, 64), draw(2, 300, 4, 64), draw(2, 40, 4, 64), draw(2, 40, 4, 64)
    out, lse = mmfast.cross_attention(q, k, v, k2, v2, return_lse=True)
    return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, k2, v2))


def qformer(draw):
    q, k, v = (draw(2, 48, 4, 64) for _ in range(3))
    out = mmfast.qformer_attention(q, k, v, num_queries=32, mask_mode="multimodal_causal")
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v))


def media(draw):
    q, k, v = draw(2, 60, 4, 64), draw(2, 128, 4, 64), draw(2, 128, 4, 64)
    time = (torch.arange(60, device=q.device) // 25).expand(2, -1)
    out = mmfast.media_cross_attention(q, k, v, text_time=time, latents_per_media=64)
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v))


def quantise(draw):
    x, codes = draw(3, 32, 9, 9), draw(200, 32)
    quantized, indices, loss = mmfast.vq_quantize(x, codes, channel_dim=1, gradient="rotation")
    counts, sums = mmfast.vq_code_stats(x.detach().movedim(1, -1).reshape(-1, 32), indices.flatten(), 200)
    return quantized, indices, loss, counts, sums, *torch.autograd.grad(quantized.square().sum() + loss, (x, codes))


def log_probabilities(draw):
    hidden, weight = draw(70, 64), draw(5000, 64)
    labels = torch.arange(70, device=hidden.device) * 71
    logp, entropy = mmfast.linear_logp(hidden, weight, labels, return_entropy=True, num_valid=-1)
    return logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))


def preference(draw):
    logp = draw(8, 50)
    ids = torch.arange(8, device=logp.device)[:, None].expand(-1, 50)
    sums = mmfast.segment_logp(logp, ids, num_segments=8)
    loss, chosen, rejected = mmfast.preference_loss(*sums.chunk(2), *sums.detach().roll(1).chunk(2))
    return sums, loss, chosen, rejected, *torch.autograd.grad(loss, (logp,))


def ppo(draw):
    logp, old, rewards, values = draw(5, 200), draw(5, 200), draw(5, 200), draw(5, 200)
    mask = torch.arange(200, device=logp.device).expand(5, -1) < 150
    advantages, returns = mmfast.gae(rewards.detach(), values.detach(), gamma=0.99, lam=0.95)
    white = mmfast.masked_whiten(advantages, mask)
    policy, _ = mmfast.ppo_policy_loss(logp, old.detach(), white, mask=mask)
    value, _ = mmfast.ppo_value_loss(values, old.detach(), returns, mask=mask)
    return advantages, returns, white, policy, value, *torch.autograd.grad(policy + value, (logp, values))


FAMILIES = {f.__name__: f for f in (attention, qformer, media, quantise, log_probabilities, preference, ppo)}


class Draw:
    """Hands out the same tensors call after call, in the order they are asked for: a graph needs fixed addresses."""

    def __init__(self, device: str, seed: int = 0):
        self.device, self.generator = device, torch.Generator().manual_seed(seed)
        self.tensors: list[torch.Tensor] = []
        self.next = itertools.count()

    def __call__(self, *shape: int) -> torch.Tensor:
        n = next(self.next)
        if n == len(self.tensors):
            self.tensors.append(torch.randn(shape, generator=self.generator).to(self.device).requires_grad_())
        return self.tensors[n]

    def run(self, family):
        self.next = itertools.count()
        return [t.detach() for t in family(self)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_repeats_bit_by_bit(device, family):
    draw = Draw(device)
    first, second = draw.run(FAMILIES[family]), draw.run(FAMILIES[family])
    assert same(first, second)
    assert all(t.isfinite().all() for t in first)
    assert not same(first, Draw(device, seed=1).run(FAMILIES[family])), "the function does not depend on its tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_on_the_current_stream(family):
    """A side stream sleeps, then writes the tensors, then computes: a kernel on any other stream would read the zeros from before."""
    draw = Draw("cuda")
    expected = draw.run(FAMILIES[family])
    fresh = [t.detach().clone() for t in draw.tensors]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad():
        for t in draw.tensors:
            t.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second: whatever runs elsewhere sees zeros
        with torch.no_grad():
            for t, value in zip(draw.tensors, fresh, strict=True):
                t.copy_(value)
        found = draw.run(FAMILIES[family])
    side.synchronize()
    assert same(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_in_a_graph(family):
    """Forward and backward captured once, replayed on other values: the same bits as a plain call on those."""
    draw = Draw("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a capture wants done before
        draw.run(FAMILIES[family])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw.run(FAMILIES[family])
    with torch.no_grad():
        for t in draw.tensors:
            t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, draw.run(FAMILIES[family]))


@pytest.mark.parametrize("width", [16, 256, 1024])
@pytest.mark.parametrize("kind", ["spread", "one sign", "wide range"])
def test_screen_never_loses_the_nearest(device, width, kind):
    """Codes that differ from the nearest by a few roundings of the screen, with sums built to meet an adder that truncates: all of one sign, so that every
    partial sum is cut in the same direction, or of a wide range, so that small terms are cut off. The index must still be the float64 argmin."""
    rows, codes = (2048, 4096) if device == "cuda" else (64, 256)
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if kind == "one sign":
        x = x.abs() + 1
    if kind == "wide range":
        x = x * torch.logspace(-3, 3, width, dtype=torch.float64)
    x = x.float()
    base = x[torch.arange(codes) % rows]
    for size in (2.0**-11, 2.0**-13, 2.0**-16, 2.0**-20):
        noise = torch.randn(codes, width, generator=generator) * base.abs().mean(-1, keepdim=True)
        codebook = (base + size * noise).to(device)
        found = mmfast.vq_nearest(x.to(device), codebook)
        truth = vq.vq_nearest_ref(x.to(device).double(), codebook.double())
        apart = found != truth
        if apart.any():  # only where two distances agree to 1e-12
            near = lambda index: (x.to(device).double()[apart] - codebook.double()[index[apart]]).square().sum(-1)  # noqa: E731
            torch.testing.assert_close(near(found), near(truth), rtol=1e-12, atol=0)


@pytest.mark.gpu
def test_wide_accumulation_repeats():
    """The float32 sum of half-precision products that linear_logp relies on: the same bits every time, and accurate."""
    x, y = torch.randn(1024, 4096, device="cuda").bfloat16(), torch.randn(4096, 2048, device="cuda").bfloat16()
    start = torch.randn(1024, 2048, device="cuda")
    results = [torch.addmm(start.clone(), x, y, out_dtype=torch.float32) for _ in range(10)]
    assert all(torch.equal(results[0], r) for r in results)
    truth = start.double() + x.double() @ y.double()
    assert (results[0] - truth).norm() < 1e-5 * truth.norm()
