"""Gated prompts against the worked value and the formula written out, head by head."""

import math

import pytest
import torch
from check_op import check_gradients

from mmfast.nn import AdapterPrompt


def read(q, prompts, gate, wk, wv, heads_a_key=1):
    """``gate softmax(q k^T / sqrt(d)) v``, one sequence and one head at a time; q [B, T, H, d], prompts [B, K, D], gate [H]."""
    width, rows = q.shape[-1], []
    for b in range(len(q)):
        k, v, heads = prompts[b] @ wk.T, prompts[b] @ wv.T, []
        for h in range(q.shape[2]):
            own = slice(h // heads_a_key * width, (h // heads_a_key + 1) * width)
            weights = (q[b, :, h] @ k[:, own].T / math.sqrt(width)).softmax(-1)
            heads.append(gate[h] * (weights @ v[:, own]))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def module(length=3, dim=10, heads=4, **options):
    made = AdapterPrompt(length, dim, heads, **options)
    torch.nn.init.normal_(made.gate)
    return made


@pytest.mark.parametrize(("gate", "second"), [(0.5, 2.458904), (0.0, 0.0)])
def test_worked_value(gate, second):
    """One head of width 2: text value (2, 0), prompt keys (1, 0) and (0, 1), prompt values (0, 4) and (0, 8), gate tanh(g)."""
    made = AdapterPrompt(2, 2, 1)
    with torch.no_grad():
        made.gate.fill_(gate)
        made.prompt.copy_(torch.eye(2))
    values = torch.tensor([[0.0, 0.0], [4.0, 8.0]])  # weight [out, in]
    out = torch.tensor([2.0, 0.0]) + made(torch.tensor([[[[1.0, 0.0]]]]), lambda x: x, lambda x: x @ values.T)[0, 0, 0]
    assert out.tolist() == pytest.approx([2.0, second], abs=2e-6)


@pytest.mark.parametrize(("activation", "gate"), [("tanh", 0.462117), ("identity", 0.5)])
def test_worked_weights(activation, gate):
    """What the query gives each prompt, .669762 and .330238, where prompts are their own values; times what is made of the gate."""
    made = AdapterPrompt(2, 2, 1, gate_activation=activation)
    with torch.no_grad():
        made.gate.fill_(0.5)
        made.prompt.copy_(torch.eye(2))
    out = made(torch.tensor([[[[1.0, 0.0]]]]), lambda x: x, lambda x: x)[0, 0, 0]
    assert out.tolist() == pytest.approx([gate * 0.669762, gate * 0.330238], abs=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("shape", [None, (2, 1, 10), (2, 3, 10)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(activation, shape):
    made = module(gate_activation=activation)
    q, wk, wv = torch.randn(2, 5, 4, 6), torch.randn(12, 10), torch.randn(12, 10)  # two key heads for four query heads
    inputs = [q, wk, wv, made.prompt.detach(), made.gate.detach(), *([] if shape is None else [torch.randn(shape)])]

    def run(q, wk, wv, prompt, gate, condition=None):
        maps = (lambda x: x @ wk.T, lambda x: x @ wv.T)
        return torch.func.functional_call(made, {"prompt": prompt, "gate": gate}, (q, *maps), {"condition": condition})

    def ref(q, wk, wv, prompt, gate, condition=None):
        prompts = prompt.expand(2, -1, -1) if condition is None else prompt + condition
        return read(q, prompts, gate.tanh() if activation == "tanh" else gate, wk, wv, heads_a_key=2)

    torch.testing.assert_close(run(*inputs), ref(*inputs), atol=2e-6, rtol=1e-5)
    check_gradients(run, ref, inputs, floor=1e-5)


def test_gradcheck():
    made = module(2, 4, 2).double()
    w = torch.randn(2, 4, 4, dtype=torch.double)

    def run(q, prompt, gate, condition, cu=None):
        maps = (lambda x: x @ w[0].T, lambda x: x @ w[1].T)
        options = {"condition": condition, "cu_seqlens": cu}
        return torch.func.functional_call(made, {"prompt": prompt, "gate": gate}, (q, *maps), options)

    shapes = ((2, 3, 2, 2), (2, 4), (2,), (2, 1, 4))
    inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(run, inputs)
    ends = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    laid = [*inputs[:3], torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda *x: run(*x, ends), laid)


def test_sequences_end_to_end_read_their_own_condition():
    made, q, condition = module(), torch.randn(1, 9, 4, 6), torch.randn(3, 1, 10)
    wk, wv = torch.nn.Linear(10, 12), torch.nn.Linear(10, 24)
    wk = torch.nn.Linear(10, 24)
    ends = [0, 2, 3, 9]
    with torch.no_grad():
        packed = made(q, wk, wv, condition=condition, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
        for i in range(3):
            alone = made(q[:, ends[i] : ends[i + 1]], wk, wv, condition=condition[i : i + 1])
            torch.testing.assert_close(packed[:, ends[i] : ends[i + 1]], alone, atol=1e-6, rtol=0)


def test_zero_gates_read_nothing_and_learn_first():
    made = AdapterPrompt(3, 12, 2)
    q, w = torch.randn(2, 4, 2, 6), torch.nn.Linear(12, 12)
    out = made(q, w, w)
    assert not out.any()
    (out * torch.randn_like(out)).sum().backward()
    assert made.gate.grad.abs().min() > 0
    assert not made.prompt.grad.any()
    assert made.prompt.detach().std() == pytest.approx(1, abs=0.5)  # N(0, 1), no small start


def test_narrow_types():
    made = module(3, 12, 2)
    w = torch.nn.Linear(12, 12).bfloat16()
    q = torch.randn(2, 4, 2, 6).bfloat16()
    out = made(q, w, w)
    assert (out.dtype, made.prompt.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), made(q.float(), w.float(), w), atol=0.05, rtol=0.05)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"unknown gate_activation 'sigmoid', expected one of 'tanh', 'identity'"):
        AdapterPrompt(3, 10, 2, gate_activation="sigmoid")
    w = torch.nn.Linear(10, 10)
    with pytest.raises(ValueError, match=r"expected condition \[2, 1 or K=3, D=10\], got \[1, 1, 10\]"):
        module(heads=2)(torch.randn(2, 4, 2, 5), w, w, condition=torch.randn(1, 1, 10))
