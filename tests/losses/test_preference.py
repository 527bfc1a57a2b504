"""DPO and its sums against values worked out by hand, and against the wrong values that common slips give."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmfast.losses import label_logp, preference_loss, segment_logp


def pair(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, dtype=torch.float64, **kwargs):
    a, c = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in (chosen, rejected))
    loss, won, lost = preference_loss(a, c, torch.tensor([ref_chosen], dtype=dtype), torch.tensor([ref_rejected], dtype=dtype), **kwargs)
    loss.backward()
    return loss.item(), a.grad.item(), c.grad.item(), won.item(), lost.item()


def test_worked_pairs():
    # Log-ratios .4 and -.3.
    assert pair(0.4, -0.3)[0] == pytest.approx(0.658759555548697, abs=1e-14)
    loss, to_chosen, to_rejected, won, lost = pair(0.4, -0.3, beta=0.5)
    assert loss == pytest.approx(0.533382155418777, abs=1e-14)
    assert (to_chosen, to_rejected) == pytest.approx((-0.206691210541335, 0.206691210541335), abs=1e-14)
    assert (won, lost) == pytest.approx((0.2, -0.15))
    # Sums -20 and -24 against -22 and -23, then the order reversed.
    assert pair(-20, -24, -22, -23)[:3] == pytest.approx((0.5543552444685271, -0.0425557483188341, 0.0425557483188341), abs=1e-13)
    assert pair(-24, -20, -22, -23)[:2] == pytest.approx((0.9740769841801067, -0.06224593312018546), abs=1e-13)


def test_at_the_start_the_loss_is_ln_2():
    assert pair(-31.5, -47.25, -31.5, -47.25, beta=0.37)[0] == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_edges_neither_overflow_nor_vanish(dtype):
    """beta 1 and everything in the chosen side, so that u is the log-ratio itself."""
    for u, loss, slope in [(-800, 800, 1), (-40, 40, 1), (0, math.log(2), 0.5), (40, 4.248354255e-18, 4.248354255e-18), (800, 0, 0)]:
        got, to_chosen, *_ = pair(float(u), 0.0, dtype=dtype, beta=1.0)
        assert got == pytest.approx(loss, rel=1e-6, abs=1e-30)
        assert to_chosen == pytest.approx(-slope, rel=8e-3 if dtype == torch.bfloat16 else 1e-6, abs=1e-30)


def test_long_answers_stay_linear():
    loss, to_chosen, *_ = pair(-2000, 0)
    assert (loss, to_chosen) == (200.0, -0.1)
    assert pair(2000, 0)[0] == pytest.approx(1.3838965267367376e-87, rel=1e-12)


def test_label_smoothing_is_the_mixture_of_both_orders():
    a, c = torch.tensor([1.3, -0.2], dtype=torch.float64), torch.tensor([-0.4, 0.9], dtype=torch.float64)
    smooth = preference_loss(a, c, label_smoothing=0.2, beta=0.7, reduction="none")[0]
    d = 0.7 * (a - c)
    assert torch.allclose(smooth, -0.8 * F.logsigmoid(d) - 0.2 * F.logsigmoid(-d), atol=1e-14)


def test_sum_is_not_the_mean_over_tokens():
    """Three and four tokens with log-ratio sums .4 and -.3: the sum gives .6588, a mean by length .6828."""
    logp = torch.tensor([0.1, 0.2, 0.1, -0.1, -0.05, -0.05, -0.1], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    chosen, rejected = segment_logp(logp, ids)
    assert preference_loss(chosen[None], rejected[None])[0].item() == pytest.approx(0.658759555548697, abs=1e-14)
    chosen, rejected = segment_logp(logp, ids, norm="count")
    assert preference_loss(chosen[None], rejected[None])[0].item() == pytest.approx(0.682784766384383, abs=1e-14)


def test_rejected_text_is_scored_on_its_own_labels():
    """From logits to loss. Scoring another text's ids under these logits gives .6811, which has been published as DPO."""
    policy = torch.tensor([[2, 0.5, -1, 0], [0.2, 1.5, 1, -0.5], [-0.3, 0.1, 0.4, 2.2]], dtype=torch.float64)
    reference = torch.tensor([[1.8, 0.7, -0.9, 0.1], [0.4, 1.1, 1.3, -0.4], [-0.2, 0.3, 0.2, 2]], dtype=torch.float64)
    one = torch.zeros(3, dtype=torch.long)

    def loss(labels):
        lost, ref = (segment_logp(label_logp(logits, torch.tensor(labels)), one) for logits in (policy, reference))
        return (
            lost.item(),
            ref.item(),
            preference_loss(torch.tensor([0.4], dtype=torch.float64), lost, torch.zeros(1).double(), ref)[0].item(),
        )

    assert loss([0, 2, 1]) == pytest.approx((-3.957364017505260, -3.415564380004120, 0.647165522360424), abs=1e-13)
    assert loss([1, 1, 3])[2] == pytest.approx(0.681130280735412, abs=1e-13)


def test_segments_weights_and_padding():
    logp = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    ids = torch.tensor([[-1, 0, 0], [1, 1, -1]])
    weights = torch.tensor([[9.0, 5.0, 1.0], [1.0, 0.5, 9.0]])
    assert segment_logp(logp, ids).tolist() == [-6, -24]
    assert segment_logp(logp, ids, token_weights=weights).tolist() == [-14, -16]
    assert segment_logp(logp, ids, token_weights=weights, norm="weight").tolist() == pytest.approx([-14 / 6, -16 / 1.5])
    assert segment_logp(logp, ids, num_segments=4).tolist() == [-6, -24, 0, 0]
    assert segment_logp(logp[:0], ids[:0]).tolist() == []


def test_half_precision_sums_are_accumulated_in_fp32():
    logp = torch.full((600,), -1.0, dtype=torch.bfloat16)  # a bf16 running sum sticks at -256
    assert segment_logp(logp, torch.zeros(600, dtype=torch.long)).item() == -600


def test_gradients_against_finite_differences():
    values = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    references = [torch.randn(5, dtype=torch.float64) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, c: preference_loss(a, c, *references, beta=0.3, label_smoothing=0.1)[0], values)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"loss_type": "sigmoit"}, "did you mean 'sigmoid'"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"reduction": "sum"}, "reduction"),
        ({"ref_chosen": torch.zeros(2)}, "both ref_chosen and ref_rejected"),
    ],
)
def test_what_cannot_be_says_so(kwargs, words):
    with pytest.raises(ValueError, match=words):
        preference_loss(torch.zeros(2), torch.zeros(2), **kwargs)
    with pytest.raises(ValueError, match=r"one shape, got logp \[2\], seq_ids \[3\]"):
        segment_logp(torch.zeros(2), torch.zeros(3, dtype=torch.long))
