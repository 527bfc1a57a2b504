"""Worked values that the other tests do not hold: scores of the divergences, differences behind the losses, group-relative policies, counts.

As in tests/losses/test_worked_values.py everything of torch runs in float64, held to 1e-9, and in float32, held to 1e-5 relative.
"""

import math

import pytest
import torch
from worked import near, row

import mmfast
from mmfast.eval import amber, chair, pope, stats
from mmfast.losses import contrast, likelihood, phrase_contrast, preference_loss, segment_logp

A = (-20, -24, -22, -23)  # chosen, rejected, ref_chosen, ref_rejected


def margin_of(loss):
    """x from log(1 + exp(-x))."""
    return -math.log(math.expm1(loss))


# ------------------------------------------------------------------------------------------------------- divergences

# name, options, f(2), f(-1), their difference, the logistic loss with beta .1
SCORES = [
    ("reverse_kl", {}, 2.0, -1.0, 3.0, 0.5543552444685271),
    ("forward_kl", {}, -0.1353352832366127, -2.718281828459045, 2.5829465452224323, 0.5723162894492977),
    ("js_divergence", {}, -0.1269280110429725, -1.3132616875182228, 1.1863336764752503, 0.6355887005576846),
    ("alpha_divergence", {"f_alpha_divergence_coef": 0.5}, -0.7357588823428847, -3.2974425414002564, 2.5616836590573717, 0.5732434456754528),
    # alpha 0 is forward KL, and what TRL 0.x calls alpha 1: (exp(-r') - exp(-r)) / 1
    ("alpha_divergence", {"f_alpha_divergence_coef": 0.0}, -0.1353352832366127, -2.718281828459045, 2.5829465452224323, 0.5723162894492977),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "won", "lost", "difference", "loss"), SCORES, ids=lambda v: v if isinstance(v, str) else "")
def test_scores_of_the_divergences(name, options, won, lost, difference, loss, dtype):
    """A score alone stands in the anchor's logistic function, their difference in the hinge."""
    options = dict(f_divergence_type=name, **options)
    for ratio, want in ((2.0, won), (-1.0, lost)):
        alone = preference_loss(row(ratio), None, row(0.0), loss_type="anchor", beta=1.0, **options)[0]
        assert margin_of(alone.item()) == pytest.approx(want, rel=1e-9)
    batch = [row(v, dtype=dtype) for v in A]
    assert (1 - preference_loss(*batch, loss_type="hinge", beta=0.1, **options)[0].item()) / 0.1 == pytest.approx(
        difference, rel=1e-9 if dtype == torch.float64 else 1e-5
    )
    assert preference_loss(*batch, beta=0.1, **options)[0].item() == near(loss, dtype)


# ------------------------------------------------------------------------------- the differences that losses are made of


def test_differences_of_dense_weights(dtype):
    """RLHF-V's four forms; the rewards' difference is beta times the difference that the loss sees."""
    tokens = (
        row(-0.5, -1, -2, -0.25, -0.5, -1, -3, -1.5, -0.25, dtype=dtype),
        row(-0.6, -1.1, -2.5, -0.25, -0.6, -1.1, -2.4, -1.3, -0.25, dtype=dtype),
    )
    ids, changed = torch.tensor([0] * 4 + [1] * 5), row(0, 0, 1, 0, 0, 0, 1, 1, 0, dtype=dtype)
    for gamma, norm, beta, want in (
        (5, "weight", 0.5, 0.6298076923076923),
        (1, "weight", 0.5, 0.295),
        (1.1, "none", 0.1, 1.43),
        (1.1, "weight", 0.1, 0.3136960600375237),
    ):
        now, before = (segment_logp(t, ids, token_weights=1 + (gamma - 1) * changed, norm=norm).split(1) for t in tokens)
        _, won, lost = preference_loss(*now, *before, beta=beta)
        assert ((won - lost) / beta).item() == pytest.approx(want, rel=1e-9 if dtype == torch.float64 else 1e-5)


def test_differences_of_length_desensitised(dtype):
    """LD-DPO: .9, .8 and .7 for a tail that counts fully, half, not at all."""
    tokens = row(-1, -2, -3, -4, -1.5, -2.5, dtype=dtype), row(-1.2, -2.1, -2.8, -4.4, -1.4, -2.2, dtype=dtype)
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    for alpha, want in ((1.0, 0.9), (0.5, 0.8), (0.0, 0.7)):
        now, before = (segment_logp(t, ids, token_weights=row(1, 1, alpha, alpha, 1, 1, dtype=dtype)).split(1) for t in tokens)
        _, won, lost = preference_loss(*now, *before)
        assert ((won - lost) / 0.1).item() == pytest.approx(want, rel=1e-9 if dtype == torch.float64 else 2e-5)


def test_differences_of_optimal_transport():
    """Sorted differences (0, 3) paired, (2, 1) unpaired, in the order of the ranks."""
    batch = [row(*v) for v in ((-20, -30), (-24, -29), (-22, -31), (-23, -30))]
    for name, want in (("aot", [0, 3]), ("aot_unpaired", [1, 2])):
        each = preference_loss(*batch, loss_type=name, reduction="none")[0].tolist()
        assert sorted(margin_of(loss) / 0.1 for loss in each) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_stic_at_the_start(dtype):
    """With log-ratios of 0 the contrast pulls by -.05, the likelihood of weight 1 / 1024 by another -.00098."""
    chosen, rejected = row(-2.6, dtype=dtype, grad=True), row(-2.8, dtype=dtype, grad=True)
    pull = contrast(chosen, rejected, row(-2.6, dtype=dtype), row(-2.8, dtype=dtype))[0]
    assert torch.autograd.grad(pull, chosen)[0].item() == near(-0.05, dtype)
    assert torch.autograd.grad(likelihood(chosen) / 1024, chosen)[0].item() == near(-0.0009765625, dtype)


def test_each_phrase_of_halva(dtype):
    correct, wrong = row(-0.7, -1.1, -0.8, dtype=dtype), row(-1.9, -2.4, -0.5, dtype=dtype)
    each = [phrase_contrast(c, w).item() for c, w in zip(correct.split(1), wrong.split(1), strict=True)]
    assert each == near([0.263282467338031, 0.241008453832992, 0.854355244468527], dtype)


# ------------------------------------------------------------------------------------------- policies of a group of answers


def test_advantages_relative_to_the_group(dtype):
    """GRPO: (r - mean) / (std + 1e-4), unbiased."""
    got = mmfast.masked_whiten(row(1, 0, 0, 1, dtype=dtype), eps=1e-4, unbiased=True, semantics="llava_rlhf")
    assert got.tolist() == near([0.8658754297607016, -0.8658754297607016, -0.8658754297607016, 0.8658754297607016], dtype)


def test_four_ways_to_average_over_tokens(dtype):
    """Answers of 2 and 4 tokens, advantages 1 and -1, ratio 1, at most 8 tokens: grpo 0, bnpo and dapo 1 / 3, dr_grpo .125."""
    lens = torch.tensor([[2], [4]])
    mask = torch.arange(8) < lens
    logp, advantages = torch.zeros(2, 8, dtype=dtype), row(1, -1, dtype=dtype)[:, None].expand(2, 8)
    of_sequences = (mask.sum() / (2.0 * lens)).expand(2, 8)
    assert mmfast.ppo_policy_loss(logp, logp, advantages, mask=mask, weights=of_sequences)[0].item() == pytest.approx(0, abs=1e-9)
    assert mmfast.ppo_policy_loss(logp, logp, advantages, mask=mask)[0].item() == near(1 / 3, dtype)
    assert mmfast.ppo_policy_loss(logp, logp, advantages * mask)[0].item() == near(0.125, dtype)


def test_ratios_of_llava_rlhf(dtype):
    new, old = row(-0.8, -2.3, -0.5, 0, dtype=dtype), row(-1, -2, -0.5, 0, dtype=dtype)
    each = [mmfast.ppo_policy_loss(n, o, torch.ones_like(n))[1]["ratio"].item() for n, o in zip(new.split(1), old.split(1), strict=True)]
    assert each == pytest.approx([1.221402758160, 0.740818220682, 1, 1], rel=1e-11 if dtype == torch.float64 else 1e-5)


# ------------------------------------------------------------------------------------------------------------- counts


def test_object_halbench_by_hand():
    """dog, puppy and cat where a dog is; a car of car and person; nothing of a cup. Surface words are mentions, classes are truth."""
    mentions, truths = [["dog", "dog", "cat"], ["car"], []], [{"dog"}, {"car", "person"}, {"cup"}]
    assert chair.chair(mentions, truths) == pytest.approx({"chair_i": 1 / 4, "chair_s": 1 / 3, "chair_s_refine": 1 / 2, "recall": 2 / 4})


def test_pope_by_hand():
    got = pope.binary(tp=40, fp=5, tn=45, fn=10)
    want = {"precision": 0.8888888889, "recall": 0.8, "f1": 0.8421052632, "accuracy": 0.85, "yes_ratio": 0.45}
    assert got == pytest.approx(want, abs=1e-10)
    always = pope.binary(tp=50, fp=50, tn=0, fn=0)
    assert always == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0})


def test_amber_by_hand():
    """Six true No, four of them said, one No said in vain. AMBER's own F1 has 1e-4 in its denominator: .7272231439, ours 8 / 11."""
    got = pope.binary_no(tp=3, fp=2, tn=4, fn=1)
    assert (got["precision"], got["recall"]) == pytest.approx((0.8, 0.6666666667), abs=1e-10)
    assert amber.f1(got["precision"], got["recall"]) == pytest.approx(0.7272231439, abs=1e-10)
    assert got["f1"] == pytest.approx(8 / 11)
    printed = amber.discriminative(tp=3, fp=2, tn=4, fn=1)
    assert printed == {"accuracy": 0.7, "precision": 0.8, "recall": 0.667, "f1": 0.727}


def test_standard_errors():
    got = [100 * stats.standard_error(p, n) for p, n in ((0.3, 500), (0.1, 500), (0.85, 3000))]
    assert got == pytest.approx([2.05, 1.34, 0.65], abs=0.005)
