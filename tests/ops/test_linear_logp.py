"""Log-probabilities against plain PyTorch in float64: types, blocks, dropped rows, every output's gradient, and the numerical contract."""

import math
import subprocess
import sys

import pytest
import torch
from check_op import check_close, check_gradients, check_registration
from torch import Tensor

import mmfast
from mmfast.ops import (
    label_logp,
    label_logp_ref,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_logp,
    linear_logp_pair,
    linear_logp_pair_ref,
    linear_logp_ref,
)
from mmfast.ops.linear_logp import linear_objective

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# N, H, V: one of everything, a vocabulary of 2, odd sizes, one past a vector and past a block.
SIZES = [(1, 1, 1), (3, 4, 2), (7, 5, 33), (40, 16, 1000), (17, 24, 4099)]
# The walk over the vocabulary, whole or in blocks of 1024 columns.
WALKS = {"kept": dict(keep_logits=True), "whole": dict(keep_logits=False), "blocks": dict(keep_logits=False, workspace_mb=1e-3)}
ABSOLUTE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float64: 1e-12}  # of logp, with logits in float32
# Beside twice plain PyTorch's own error: the exponential of the CPU kernels is good to 8e-8 before sums and roundings.
VALUE_FLOOR = {torch.float64: 1e-13, torch.float32: 4e-7, torch.float16: 4e-7, torch.bfloat16: 4e-7}
GRADIENT_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}
GRADIENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def make(size, dtype, device="cpu", scale=1.0, ignored=True):
    n, h, v = size
    hidden, weight, bias = torch.randn(n, h) * scale, torch.randn(v, h) / math.sqrt(h), torch.randn(v) * 0.1
    labels = torch.randint(0, v, (n,))
    if ignored:
        labels[1::3] = -100
    return *(t.to(device, dtype) for t in (hidden, weight, bias)), labels.to(device)


def parts(result) -> tuple[Tensor, ...]:
    """logp, entropy, lse, squares of a call with everything asked for."""
    logp, entropy, stats = result
    return logp, entropy, stats.lse, stats.squares


# --------------------------------------------------------------------------------------------------------------- values, gradients


@pytest.mark.reduced
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_everything_against_float64(device, dtype, size, walk):
    hidden, weight, bias, labels = make(size, dtype, device)

    def op(h, w, b):
        return parts(linear_logp(h, w, labels, b, return_entropy=True, return_stats=True, **WALKS[walk]))

    def ref(h, w, b):
        return parts(linear_logp_ref(h, w, labels, b, return_entropy=True, return_stats=True))

    truth = ref(*(t.double() for t in (hidden, weight, bias)))
    for name, got, want, plain in zip(
        ("logp", "entropy", "lse", "squares"), op(hidden, weight, bias), truth, ref(hidden, weight, bias), strict=True
    ):
        check_close(got, want, plain, VALUE_FLOOR[dtype], what=name)
    check_gradients(op, ref, [hidden, weight, bias], GRADIENT_FLOOR.get(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerances_of_the_contract(device, dtype):
    """docs/numerics.md: absolute for logp from float32 logits, relative to the largest logit otherwise; gradients in L2."""
    hidden, weight, bias, labels = make((60, 64, 3001), dtype, device, scale=3.0)
    truth = linear_logp_ref(*(t.double() for t in (hidden, weight)), labels, bias.double())
    wide = linear_logp(hidden, weight, labels, bias, logits_dtype="float32")
    assert (wide.double() - truth).abs().max() <= ABSOLUTE[dtype]
    largest = (hidden.double() @ weight.double().T + bias.double()).abs().max()
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype, 0.0)
    near = linear_logp(hidden, weight, labels, bias)
    assert (near.double() - truth).abs().max() <= unit * largest + ABSOLUTE[dtype]

    def grads(f, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad((f(*leaves).double() * torch.linspace(-1, 1, len(labels), device=device)).sum(), leaves)

    for walk in WALKS.values():
        got = grads(lambda h, w: linear_logp(h, w, labels, logits_dtype="float32", **walk), hidden, weight)
        want = grads(lambda h, w: linear_logp_ref(h, w, labels), hidden.double(), weight.double())
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w).norm() <= GRADIENT[dtype] * w.norm()


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("options", [dict(temperature=0.6), dict(softcap=3.0), dict(temperature=1.7, softcap=20.0)], ids=str)
def test_temperature_and_softcap(device, options, walk):
    hidden, weight, bias, labels = make((21, 12, 2050), torch.float32, device, scale=4.0)
    everything = dict(return_entropy=True, return_stats=True)
    check_gradients(
        lambda h, w, b: parts(linear_logp(h, w, labels, b, **options, **everything, **WALKS[walk])),
        lambda h, w, b: parts(linear_logp_ref(h, w, labels, b, **options, **everything)),
        [hidden, weight, bias],
    )


@pytest.mark.reduced
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("walk", WALKS)
def test_policy_and_reference_in_one_walk(device, dtype, shared, walk):
    hidden, weight, bias, labels = make((19, 16, 2500), dtype, device)
    ref_hidden, other, ref_bias, _ = make((19, 16, 2500), dtype, device)
    weight.requires_grad_(not shared)

    def run(f, dtype, **walk):
        h, w, b, h0, w0, b0 = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias, ref_hidden, other, ref_bias))
        tail = (w, b) if shared else (w0, b0)
        out = f(h, w, h0, tail[0], labels, b, tail[1], return_kl=True, **walk)
        loss = (out[0].double() * 0.7 + out[2].double() * torch.linspace(0, 2, 19, device=device)).sum()
        return [*out, *torch.autograd.grad(loss, (h, w, b))]

    got, want, plain = (
        run(linear_logp_pair, dtype, **WALKS[walk]),
        run(linear_logp_pair_ref, torch.float64),
        run(linear_logp_pair_ref, dtype),
    )
    if shared:  # through the reference nothing flows, although the head is the same
        assert not got[1].requires_grad
    for name, g, w, p in zip(("logp", "ref_logp", "kl", "hidden", "weight", "bias"), got, want, plain, strict=True):
        check_close(g, w, p, VALUE_FLOOR[dtype], what=name)


def test_kl_is_zero_for_equal_models_and_worked_values():
    """The five tokens of docs/numerics.md's HALVA example: KL(reference || policy) per token."""
    reference = [[1, 0, -1], [0.5, 0.5, 0], [2, -1, 0.3], [0, 0.2, 0.1], [1.5, 1.4, -2]]
    policy = [[0.8, 0.1, -0.9], [0.7, 0.2, 0.1], [1.5, -0.8, 0.6], [0.1, 0.1, 0.1], [1, 1.7, -1.5]]
    want = [0.010324799446, 0.025024980314, 0.054128670537, 0.003325020014, 0.080241358703]
    eye, labels = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    policy, reference = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    _, _, kl = linear_logp_pair(policy, eye, reference, eye, labels, return_kl=True)
    assert torch.allclose(kl, torch.tensor(want, dtype=torch.float64), atol=1e-12)
    assert linear_logp_pair(policy, eye, policy, eye, labels, return_kl=True)[2].abs().max() < 1e-15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(device, dtype, reduction, smoothing, weighted):
    hidden, weight, bias, labels = make((23, 16, 700), dtype, device)
    options = dict(reduction=reduction, label_smoothing=smoothing, token_weights=torch.rand(23, device=device) * 2 if weighted else None)
    check_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b, **options),
        lambda h, w, b: linear_cross_entropy_ref(h, w, labels, b, **options),
        [hidden, weight, bias],
    )
    options["token_weights"] = None if options["token_weights"] is None else options["token_weights"].double()
    want = linear_cross_entropy_ref(*(t.double() for t in (hidden, weight)), labels, bias.double(), **options)
    plain = linear_cross_entropy_ref(hidden, weight, labels, bias, **options)
    check_close(linear_cross_entropy(hidden, weight, labels, bias, **options), want, plain, VALUE_FLOOR[dtype])


def test_cross_entropy_is_torchs():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, bias, labels = make((23, 16, 700), torch.float64)
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction=reduction, ignore_index=-100, label_smoothing=0.1
        )
        assert torch.allclose(linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, label_smoothing=0.1), want)


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (7, 33), (4, 2049), (3, 30011)], ids=str)
def test_label_logp(device, dtype, size):
    logits, labels = (torch.randn(*size) * 3).to(device, dtype), torch.randint(0, size[1], size[:1]).to(device)
    labels[1:2] = -100
    everything = dict(return_entropy=True, return_stats=True, temperature=0.9)
    for name, got, want, plain in zip(
        ("logp", "entropy", "lse", "squares"),
        parts(label_logp(logits, labels, **everything)),
        parts(label_logp_ref(logits.double(), labels, **everything)),
        parts(label_logp_ref(logits, labels, **everything)),
        strict=True,
    ):
        check_close(got, want, plain, VALUE_FLOOR[dtype], what=name)
    check_gradients(
        lambda z: parts(label_logp(z, labels, **everything)),
        lambda z: parts(label_logp_ref(z, labels, **everything)),
        [logits],
        GRADIENT_FLOOR.get(dtype),
    )
    assert torch.equal(label_logp(logits, labels, return_stats=True)[1].hit, label_logp_ref(logits, labels, return_stats=True)[1].hit)


def test_label_logp_layouts(device):
    """The slice of a shift, other strides and expanded rows, with and without a copy."""
    logits = torch.randn(3, 9, 40, device=device)
    wide = torch.randn(5, 80, device=device)
    for z in (
        logits[:, :-1],
        logits.transpose(0, 1),
        logits[..., ::2],
        logits[:, 2],
        wide[::2, 3:47],
        wide[0],
        logits[:1].expand(4, -1, -1),
    ):
        labels = torch.randint(0, z.shape[-1], z.shape[:-1], device=device)
        check_close(label_logp(z, labels), label_logp_ref(z.double(), labels), label_logp_ref(z, labels))
        check_gradients(lambda z, y=labels: label_logp(z, y), lambda z, y=labels: label_logp_ref(z, y), [z])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    logits, labels = torch.randn(9, 5003).mul(4).to(dtype), torch.randint(0, 5003, (9,))
    for options in ({}, dict(softcap=5.0, temperature=0.7)):
        everything = dict(return_entropy=True, return_stats=True, **options)
        for got, want in zip(
            parts(label_logp(logits, labels, **everything)), parts(label_logp_ref(logits.double(), labels, **everything)), strict=True
        ):
            check_close(got, want, floor=2e-6)
        check_gradients(
            lambda z, e=everything: parts(label_logp(z, labels, **e)),
            lambda z, e=everything: parts(label_logp_ref(z, labels, **e)),
            [logits],
        )


def test_gradcheck():
    hidden, weight, bias, labels = make((5, 3, 1030), torch.float64)
    for t in (hidden, weight, bias):
        t.requires_grad_()
    few = weight.detach()[:7].clone().requires_grad_()
    everything = dict(return_entropy=True, return_stats=True)

    def all_of(h, w, b, **options):
        return parts(linear_logp(h, w, labels.clamp(max=6), b, **everything, **options))

    assert torch.autograd.gradcheck(lambda h, w, b: all_of(h, w, b), (hidden, few, bias.detach()[:7].clone().requires_grad_()))
    assert torch.autograd.gradcheck(lambda h: parts(linear_logp(h, weight, labels, softcap=2.0, workspace_mb=1e-3, **everything)), hidden)
    pair = (hidden.detach() + 0.3, few.detach() * 1.1)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logp_pair(h, w, *pair, labels.clamp(max=6), return_kl=True, temperature=0.8), (hidden, few)
    )
    logits = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    at = torch.randint(0, 9, (2, 3))
    assert torch.autograd.gradcheck(lambda z: parts(label_logp(z[:, :-1], at, softcap=4.0, **everything)), logits)


@pytest.mark.parametrize("device", ["cpu"])
def test_registration(device):
    hidden, weight, bias, labels = make((6, 8, 40), torch.float32, device)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    tail = (-100, 0.9, 0.0, False, 1 << 20, None, True)
    check_registration(torch.ops.mmfast.linear_logp, (*leaves, labels, None, None, None, True, *tail[:-1], False))
    check_registration(torch.ops.mmfast.linear_logp, (*leaves[:2], None, labels, hidden.detach(), weight.detach(), None, False, *tail))
    check_registration(torch.ops.mmfast.label_logp, (torch.randn(2, 6, 40, requires_grad=True)[:, :-1], labels.view(2, 3)[:, :1].expand(2, 5), True, 1.0, 0.0, -100))  # fmt: skip


# m, n, k: single elements, tiles and one more, several blocks of depth and of columns, both ways of sharing work.
PRODUCTS = [
    (1, 1, 1),
    (5, 7, 3),
    (12, 32, 192),
    (13, 33, 193),
    (40, 1100, 400),
    (1100, 40, 400),
    (70, 90, 4000),
    (3, 2000, 17),
    (200, 3, 1),
]


@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_the_cpus_own_product(isa, size):
    m, n, k = size
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    want = a.double() @ b.double()
    allowed = (a.double().abs() @ b.double().abs() + c.double().abs()) * 2.0**-23 * (4 + k**0.5)
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            for plus in (False, True):
                room = torch.full((m, n + 5), 7.0)
                out = room[:, 2 : 2 + n]
                out.copy_(c)
                torch.ops.mmfast.logp_product_(left, right, out, plus)
                assert ((out.double() - want - (c if plus else 0)).abs() <= allowed).all()
                assert (room[:, :2] == 7).all()
                assert (room[:, 2 + n :] == 7).all()


def test_the_product_does_not_depend_on_threads_or_neighbours():
    a, b = torch.randn(301, 500), torch.randn(500, 700)
    outs = [torch.empty(301, 700) for _ in range(2)]
    threads = torch.get_num_threads()
    for count, out in zip((1, threads), outs, strict=True):
        torch.set_num_threads(count)
        torch.ops.mmfast.logp_product_(a, b, out, False)
    torch.set_num_threads(threads)
    part = torch.empty(17, 700)
    torch.ops.mmfast.logp_product_(a[:17], b, part, False)
    assert torch.equal(*outs)
    assert torch.equal(part, outs[0][:17])


def test_a_product_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"expected a \[m, k\], b \[k, n\], c \[m, n\], got \[2, 3\], \[4, 5\], \[2, 5\]"):
        torch.ops.mmfast.logp_product_(torch.ones(2, 3), torch.ones(4, 5), torch.ones(2, 5), False)
    with pytest.raises(RuntimeError, match="expected a contiguous along one side"):
        torch.ops.mmfast.logp_product_(torch.ones(8, 12)[::2, ::2], torch.ones(6, 5), torch.ones(4, 5), False)


# ---------------------------------------------------------------------------------------------------------- what is promised


@pytest.mark.parametrize("biases", ["both", "policy", "reference", "neither"])
def test_a_shared_head_with_biases_of_their_own(biases):
    hidden, weight, bias, labels = make((11, 8, 70), torch.float64)
    ref_hidden, ref_bias = torch.randn(11, 8, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    bias, ref_bias = bias if biases in ("both", "policy") else None, ref_bias if biases in ("both", "reference") else None
    args = (hidden, weight, ref_hidden, weight, labels, bias, ref_bias)
    for got, want in zip(linear_logp_pair(*args, return_kl=True), linear_logp_pair_ref(*args, return_kl=True), strict=True):
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_lies_across(dtype):
    hidden, weight, _, labels = make((40, 32, 300), dtype)
    across = weight.t().contiguous().t().requires_grad_()
    straight = weight.clone().requires_grad_()
    for keep in (True, False):
        got, want = (torch.autograd.grad(linear_logp(hidden, w, labels, keep_logits=keep).sum(), w)[0] for w in (across, straight))
        assert (got.double() - want.double()).norm() <= 1e-6 * want.double().norm()


def test_fp16_gradients_survive_until_the_loss_scale_comes():
    """A mean over 4,096 rows of 32,000 tokens: without care p / 4096 is 0 in fp16 before backward multiplies by 65536."""
    hidden, weight, _, labels = make((4096, 16, 32000), torch.float16, ignored=False)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    got = torch.autograd.grad(linear_cross_entropy(*leaves, labels) * 65536, leaves)
    want = torch.autograd.grad(linear_cross_entropy(*wide, labels) * 65536, wide)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float16
        assert (g.float() - w).norm() <= 2e-3 * w.norm()


def test_results_may_be_written_to():
    hidden, weight, _, labels = make((9, 8, 50), torch.float32, ignored=False)
    hidden.requires_grad_()
    for call in (lambda: linear_logp(hidden, weight, labels), lambda: label_logp(hidden @ weight.T, labels)):
        logp = call()
        logp[:3] = 0
        (grad,) = torch.autograd.grad(logp.sum(), hidden)
        assert not grad[:3].any()
        assert grad[3:].abs().sum(-1).min() > 0


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, _, labels = make((9, 8, 50), torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, torch.nn.Parameter(weight), labels)
    assert loss.grad_fn is None
    assert linear_cross_entropy(hidden, weight, labels).grad_fn is None


def test_what_ignored_rows_hold_does_not_reach_a_smoothed_loss():
    hidden, weight, _, labels = make((9, 8, 50), torch.float32)
    hidden[labels == -100] = math.nan
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, labels, label_smoothing=0.1)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite()
    assert grads[1].isfinite().all()
    assert not grads[0][labels == -100].any()


def test_num_valid_is_checked_where_looking_is_free():
    hidden, weight, _, labels = make((9, 8, 50), torch.float32)
    with pytest.raises(ValueError, match="num_valid is 2, but 6 labels are not ignored"):
        linear_logp(hidden, weight, labels, num_valid=2)


def test_blocks_compaction_and_kept_logits_give_the_same(device):
    hidden, weight, bias, labels = make((50, 32, 5000), torch.float32, device)
    upstream = torch.randn(50, device=device)

    def run(**options):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        logp = linear_logp(*leaves[:2], labels, leaves[2], **options)
        return [logp, *torch.autograd.grad((logp * upstream).sum(), leaves)]

    want = run(keep_logits=True)
    valid = int((labels != -100).sum())
    for options in (dict(keep_logits=False), dict(workspace_mb=1e-3), dict(workspace_mb=0.3, keep_logits=False), dict(num_valid=-1),
                    dict(num_valid=valid)):  # fmt: skip
        for g, w in zip(run(**options), want, strict=True):
            assert (g - w).norm() <= 1e-6 * w.norm(), options
    for again in (run(keep_logits=True), run(keep_logits=True)):
        assert all(torch.equal(g, w) for g, w in zip(again, want, strict=True))


def test_gradients_made_in_forward_are_the_same(device):
    hidden, weight, bias, labels = make((48, 32, 3000), torch.float32, device)
    upstream = torch.randn(48, device=device)
    rows = (labels != -100).nonzero()[:, 0]

    def run(loss):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        value = loss(*leaves)
        return [value, *torch.autograd.grad(3 * value, leaves)]

    want = run(lambda h, w, b: (linear_logp(h, w, labels, b) * upstream).sum())
    for size in (1, 7, 48):
        chunks = rows.split(size)
        got = run(lambda h, w, b, c=chunks: linear_objective(h, w, labels, b, c, lambda logp, i: (logp * upstream[c[i]]).sum()))
        for g, w in zip(got, want, strict=True):
            assert (g - w).norm() <= 2e-6 * w.norm()


def test_a_second_backward_forms_the_logits_again():
    hidden, weight, _, labels = make((20, 8, 300), torch.float32)
    hidden.requires_grad_()
    loss = linear_logp(hidden, weight, labels).sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert (first - second).norm() <= 1e-6 * first.norm()
    once = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(once, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by an earlier backward"):
        torch.autograd.grad(once, hidden)


def test_a_frozen_head_gets_no_gradient_and_dropped_rows_none():
    hidden, weight, bias, labels = make((12, 8, 90), torch.float32)
    hidden.requires_grad_()
    linear_logp(hidden, weight, labels, bias).sum().backward()
    assert weight.grad is None
    assert not hidden.grad[labels == -100].any()
    assert hidden.grad[labels != -100].abs().sum(-1).min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ignored_and_empty(device, dtype):
    for n in (0, 5):
        hidden, weight, bias, _ = make((n, 8, 50), dtype, device)
        labels = torch.full((n,), -100, device=device)
        for f in (
            lambda h, w, b: linear_logp(h, w, labels, b).sum(),
            lambda h, w, b: linear_logp(h, w, labels, b, num_valid=-1).sum(),
            lambda h, w, b: linear_logp_pair(h, w, h, w, labels, b, b, return_kl=True)[2].sum(),
            lambda h, w, b: linear_cross_entropy(h, w, labels, b),
            lambda h, w, b: linear_cross_entropy(h, w, labels, b, label_smoothing=0.1),
            lambda h, w, b: label_logp(h @ w.T + b, labels).sum(),
        ):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            loss = f(*leaves)
            assert loss.item() == 0
            for g in torch.autograd.grad(loss, leaves):
                assert not g.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", ["input", "float32"])
def test_a_log_probability_is_never_positive(device, dtype, wide):
    """Nearly all mass on the label: a label logit and a sum from different roundings would go above 0."""
    weight = torch.zeros(64, 2, device=device)
    weight[3, 0] = 1.0
    hidden = torch.stack([torch.linspace(0, 60, 4000), torch.zeros(4000)], 1).to(device)
    got = linear_logp(hidden.to(dtype), weight.to(dtype), torch.full((4000,), 3, device=device), logits_dtype=wide)
    assert got.max() <= 0
    want = linear_logp_ref(hidden.to(dtype).double(), weight.double(), torch.full((4000,), 3, device=device))
    assert torch.allclose(got.double(), want, atol=1e-4 if wide == "float32" else 0.01)


def test_gradient_rows_sum_to_zero(device):
    logits = (torch.randn(30, 20000, device=device) * 3).requires_grad_()
    upstream = torch.randn(30, device=device)
    (grad,) = torch.autograd.grad(label_logp(logits, torch.randint(0, 20000, (30,), device=device)), logits, upstream)
    assert (grad.double().sum(1).abs() <= 1e-3 * upstream.abs()).all()


def test_extreme_and_infinite_logits(device):
    logits = torch.zeros(7, 3000, device=device)
    logits[0] = torch.linspace(-2000, 2000, 3000)
    logits[1, 5:] = -math.inf
    logits[2, :2999] = -math.inf
    logits[3, 7] = math.nan
    logits[4, 7] = math.inf
    logits[5, 2500] = -1e30
    labels = torch.tensor([2999, 3, 2999, 0, 0, 2500, 1], device=device)
    got, entropy, stats = label_logp(logits, labels, return_entropy=True, return_stats=True)
    want = label_logp_ref(logits.double(), labels)
    for row in (0, 1, 2, 5, 6):
        assert got[row].item() == pytest.approx(want[row].item(), rel=1e-6, abs=1e-6)
    assert got[[3, 4]].isnan().all()
    assert not got[[0, 1, 2, 5, 6]].isnan().any()
    assert entropy[1].item() == pytest.approx(math.log(5), rel=1e-6)
    assert stats.squares[1].item() == pytest.approx(0.2, rel=1e-6)
    assert stats.hit.tolist()[2]


def test_hit_goes_to_the_lowest_index_on_ties(device):
    logits = torch.zeros(4, 5000, device=device)
    logits[1, [7, 4000]] = 1.0
    logits[2, [30, 31]] = 2.0
    hit = label_logp(logits, torch.tensor([0, 7, 31, 1], device=device), return_stats=True)[1].hit
    assert hit.tolist() == [True, True, False, False]


def test_labels_out_of_range():
    hidden, weight, _, labels = make((4, 8, 50), torch.float32, ignored=False)
    labels[0], labels[2] = -100, 50
    with pytest.raises(RuntimeError, match=r"linear_logp: label 50 of row 2 is outside the vocabulary of 50"):
        linear_logp(hidden, weight, labels)
    with pytest.raises(RuntimeError, match=r"label 50 of row 2"):
        label_logp(hidden @ weight.T, labels)


@pytest.mark.gpu
def test_labels_out_of_range_on_a_gpu():
    hidden, weight, _, labels = make((4, 8, 50), torch.float32, "cuda", ignored=False)
    labels[2] = 50
    got = linear_logp(hidden, weight, labels)
    assert got.isnan().tolist() == [False, False, True, False]


def test_a_vocabulary_of_300_000():
    hidden, weight = torch.randn(3, 4), torch.randn(300_000, 4)
    labels = torch.tensor([0, 299_999, 131_072])
    check_close(
        linear_logp(hidden, weight, labels, workspace_mb=1),
        linear_logp_ref(hidden.double(), weight.double(), labels),
        linear_logp_ref(hidden, weight, labels),
    )


def test_autocast_casts_all_three():
    hidden, weight, bias, labels = make((9, 8, 50), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logp(hidden.requires_grad_(), weight.requires_grad_(), labels, bias)
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    narrow = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    assert torch.equal(got, linear_logp(*narrow[:2], labels, narrow[2]))
    got.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(-got.sum().item() / int((labels != -100).sum()), rel=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    hidden, weight, bias, labels = make((10, 8, 60), torch.float32)

    def loss(h, w, b, y):
        logp, entropy = linear_logp(h, w, y, b, return_entropy=True)
        return (logp * entropy).sum() + label_logp(h @ w.T, y).sum() + linear_cross_entropy(h, w, y, b)

    torch.compiler.reset()
    quick = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for n in (10, 7):
        leaves = [t.clone().requires_grad_() for t in (hidden[:n], weight, bias)]
        others = [t.clone().requires_grad_() for t in (hidden[:n], weight, bias)]
        got, want = quick(*leaves, labels[:n]), loss(*others, labels[:n])
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, others), strict=True):
            assert (g - w).norm() <= 1e-5 * w.norm()


@pytest.mark.gpu
def test_cuda_graph():
    hidden, weight, bias, labels = make((40, 16, 1000), torch.bfloat16, "cuda")

    def run():
        return linear_logp(hidden, weight, labels, bias, num_valid=-1)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    hidden.copy_(torch.randn(40, 16))
    graph.replay()
    assert torch.equal(out, run())


def test_memory_is_the_workspace():
    """8,192 rows of 32,000 logits would take 1 GB; with a workspace of 32 MB the process grows by that, the outputs and a little."""
    program = """
import resource, torch, mmfast
torch.manual_seed(0)
hidden, weight = torch.randn(8192, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
labels = torch.randint(0, 32000, (8192,))
def step(n):
    mmfast.linear_logp(hidden[:n], weight, labels[:n], workspace_mb=32).sum().backward()
    mmfast.linear_cross_entropy(hidden[:n], weight, labels[:n], workspace_mb=32).backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert grown < 64, f"{grown} MB"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, y: linear_logp(h, w[:, :3], y), r"linear_logp: expected hidden \[.., H\], weight \[V, H\] and labels \[..\], got"),
        (lambda h, w, y: linear_logp(h, w, y[:2]), r"got \[4, 8\], \[50, 8\] and \[2\]"),
        (lambda h, w, y: linear_logp(h, w.double(), y), r"hidden is torch.float32 on cpu but weight torch.float64"),
        (lambda h, w, y: linear_logp(h, w, y.int()), r"expected labels of type int64, got torch.int32"),
        (lambda h, w, y: linear_logp(h, w, y, torch.zeros(49)), r"expected bias \[V=50\], got \[49\]"),
        (lambda h, w, y: linear_logp_pair(h, w, h, w[:40], y), r"differ in vocabulary, 50 and 40"),
        (lambda h, w, y: linear_logp(h, w, y, temperature=0.0), r"expected temperature > 0, got 0"),
        (lambda h, w, y: linear_logp(h, w, y, softcap=-1.0), r"expected softcap > 0 or None"),
        (lambda h, w, y: linear_logp(h, w, y, logits_dtype="bf16"), r"unknown logits_dtype 'bf16'"),
        (lambda h, w, y: linear_logp(h.requires_grad_(), w, y, keep_logits="yes"), r"unknown keep_logits 'yes'"),
        (lambda h, w, y: linear_cross_entropy(h, w, y, reduction="avg"), r"unknown reduction 'avg', expected mean, sum or none"),
        (
            lambda h, w, y: linear_cross_entropy(h, w, y, token_weights=torch.ones(3)),
            r"expected token_weights \[4\] like labels, got \[3\]",
        ),
        (lambda h, w, y: label_logp(h, y[:3]), r"label_logp: expected labels \[4\] like logits \[.., V\], got \[3\]"),
    ],
)
def test_wrong_input_is_named(call, message):
    hidden, weight, _, labels = make((4, 8, 50), torch.float32, ignored=False)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(hidden, weight, labels)


def test_the_ops_are_exported():
    assert mmfast.linear_logp is linear_logp
