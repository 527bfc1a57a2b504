"""Token losses against autograd's own cross-entropy in float64, and the properties that training relies on."""

import pytest
import torch
import torch.nn.functional as F

from mmfast.losses import label_logp, token_cross_entropy, z_loss


def case(dtype=torch.float64):
    logits = (3 * torch.randn(3, 7, 11, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4], labels[1], labels[2, -1] = -100, -100, -100
    return logits, labels


def test_label_logp_is_log_softmax_at_the_label():
    logits, labels = case()
    got, want = label_logp(logits, labels, temperature=0.7), torch.zeros(3, 7, dtype=torch.float64)
    for b in range(3):
        for t in range(7):
            if labels[b, t] != -100:
                want[b, t] = torch.log_softmax(logits[b, t] / 0.7, -1)[labels[b, t]]
    assert torch.allclose(got, want, atol=1e-13)


def test_label_logp_of_half_precision_is_never_positive():
    logits = torch.zeros(400, 64, dtype=torch.bfloat16)
    logits[:, 3] = torch.linspace(0, 60, 400).bfloat16()  # nearly all mass on the label
    got = label_logp(logits, torch.full((400,), 3))
    assert got.dtype == torch.float32
    assert got.max() <= 0
    assert torch.allclose(got.double(), torch.log_softmax(logits.double(), -1)[:, 3], atol=1e-5)


def test_loss_is_the_shifted_mean_over_scored_tokens():
    logits, labels = case()
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert torch.allclose(token_cross_entropy(logits, labels), want, atol=1e-14)


def test_pieces_of_a_batch_add_up_to_the_batch():
    """A mean of the pieces' means would weigh tokens of short pieces more."""
    logits, labels = case()
    weights = torch.rand(3, 7, dtype=torch.float64)
    total = weights[:, 1:][labels[:, 1:] != -100].sum()
    whole = token_cross_entropy(logits, labels, token_weights=weights)
    rows = [(logits[i : i + 1], labels[i : i + 1], weights[i : i + 1]) for i in range(3)]
    assert torch.allclose(sum(token_cross_entropy(x, y, token_weights=w, total=total) for x, y, w in rows), whole, atol=1e-14)
    means = [token_cross_entropy(x, y, token_weights=w) for x, y, w in (rows[0], rows[2])]
    assert not torch.allclose(sum(means) / 2, whole, atol=1e-3)


def test_nothing_scored_is_zero_with_zero_gradient():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((2, 5), -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"labels \[2, 3\] like logits \[\.\., V\], got \[3, 2\]"):
        label_logp(torch.zeros(2, 3, 4), torch.zeros(3, 2, dtype=torch.long))


def test_z_loss_of_one_token():
    """log Z of (1, 2, 3) is 3.407606, and 1e-5 of its square 1.161e-4; the label does not matter, only that there is one."""
    logits = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]], dtype=torch.float64)
    for label in (0, 2):
        assert z_loss(logits, torch.tensor([[0, label]])).item() == pytest.approx(1e-5 * 3.4076059644443804**2, rel=1e-12)
    assert z_loss(logits, torch.tensor([[0, 1]])).item() == pytest.approx(1.161e-4, rel=1e-3)


def test_z_loss_is_over_the_scored_positions():
    logits, labels = case()
    logits.requires_grad_()
    scored = labels[:, 1:] != -100
    log_z = torch.log(torch.exp(logits[:, :-1]).sum(-1))
    assert torch.allclose(z_loss(logits, labels), 1e-5 * (log_z[scored] ** 2).mean(), atol=1e-16)
    grad = torch.autograd.grad(z_loss(logits, labels, weight=1.0), logits)[0]
    assert torch.equal(grad[:, :-1].abs().sum(-1) > 0, scored)
    assert not grad[:, -1].any()
    pieces = sum(z_loss(logits[i : i + 1], labels[i : i + 1], total=scored.sum()) for i in range(3))
    assert torch.allclose(pieces, z_loss(logits, labels), atol=1e-16)


def test_z_loss_of_nothing_is_zero_also_beside_nan():
    logits = torch.full((1, 3, 4), float("nan"), requires_grad=True)
    loss = z_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
