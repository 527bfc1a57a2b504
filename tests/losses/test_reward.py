"""Reward models, scores of sequences and leave-one-out advantages: values worked by hand, and what they are indifferent to."""

import pytest
import torch
from worked import near, row

import mmfast
from mmfast.losses import penalised_score, reward_model_loss, rloo_advantages, strongest_alternative

# Rewards of three pairs and which output is preferred.
FIRST, SECOND, CHOICE = (0.5, 2.0, 0.3), (1.5, -1.0, 0.4), (1, 0, 0)


def test_reward_model_of_llava_rlhf(dtype):
    """The pair loss, the absolute value of the batch's mean sum, and the two together."""
    first, second, choice = row(*FIRST, dtype=dtype), row(*SECOND, dtype=dtype), torch.tensor(CHOICE)
    pairs = reward_model_loss(first, second, choice, center_coef=0.0)
    assert pairs.item() == near(0.36874856638851194, dtype)
    centre = reward_model_loss(first, second, choice, center_coef=1.0) - pairs
    assert centre.item() == near(1.2333333333333334, dtype)
    assert reward_model_loss(first, second, choice).item() == near(0.36998189972184525, dtype)
    zero = torch.zeros(3, dtype=dtype)
    assert reward_model_loss(zero, zero, choice).item() == near(0.6931471805599453, dtype)


def test_centre_is_neither_a_mean_of_absolute_values_nor_a_square():
    first, second = row(1.0, -1.0), row(2.0, -2.0)
    loss = [reward_model_loss(first, second, torch.tensor([1, 1]), center_coef=c).item() for c in (0.0, 1.0)]
    assert loss[0] == loss[1]
    loss = [reward_model_loss(first + 1, second, torch.tensor([1, 1]), center_coef=c).item() for c in (0.0, 1.0)]
    assert loss[1] - loss[0] == pytest.approx(1.0)


def test_reward_model_against_cross_entropy():
    first, second, choice = (*torch.randn(2, 9).double().unbind(), torch.rand(9) > 0.5)
    first.requires_grad_()
    got = reward_model_loss(first, second, choice, center_coef=0.3)
    want = torch.nn.functional.binary_cross_entropy_with_logits(second - first, choice.double()) + 0.3 * (first + second).mean().abs()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, first)[0] for loss in (got, want)))


def test_penalised_score(dtype):
    """1.2 from the model, three tokens of four, a right letter: -4.3. Without an end token 8 less; where detail is asked for, four times the length."""
    reward, lens, yes, no = row(1.2, dtype=dtype), torch.tensor([3]), torch.tensor([True]), torch.tensor([False])
    score = dict(response_length=4, correct=1)
    assert penalised_score(reward, lens, yes, **score).item() == near(-4.3, dtype)
    assert penalised_score(reward, lens, no, **score).item() == near(-12.3, dtype)
    assert penalised_score(reward, lens, yes, **score, length_bonus=row(4.0, dtype=dtype)).item() == near(-26.8, dtype)
    assert penalised_score(0 * reward, lens, yes, response_length=896).item() == near(-30 / 896, dtype)


def test_leave_one_out(dtype):
    want = [0.8333333333333334, -0.5, -0.5, 0.16666666666666666]
    assert rloo_advantages(row(1, 0, 0, 0.5, dtype=dtype)).tolist() == near(want, dtype)
    two = torch.tensor([[1, 0, 0, 0.5], [3, 3, 3, 3]], dtype=dtype)
    assert rloo_advantages(two).tolist() == [near(want, dtype), [0, 0, 0, 0]]
    assert rloo_advantages(row(1, 0, 0, 0.5, dtype=dtype)).tolist() != near([0.625, -0.375, -0.375, 0.125], dtype), "less the mean of all"
    with pytest.raises(ValueError, match=r"at least 2 answers to a prompt, got \[3, 1\]"):
        rloo_advantages(torch.zeros(3, 1))


def test_leave_one_out_of_scores_less_their_kl():
    """The penalty is the sum of k1 over tokens; a group's advantages sum to 0 and are each the difference from the others' mean."""
    logp, ref, mask = -torch.rand(4, 7).double(), -torch.rand(4, 7).double(), torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    scores = row(1, 0, 0, 0.5)
    penalised = mmfast.token_rewards(scores, logp, ref, kl_coef=0.05, mask=mask).sum(-1)
    torch.testing.assert_close(penalised, scores - 0.05 * ((logp - ref) * mask).sum(-1))
    got = rloo_advantages(penalised)
    want = [penalised[i] - sum(penalised[j] for j in range(4) if j != i) / 3 for i in range(4)]
    torch.testing.assert_close(got, torch.stack(want))
    assert got.sum().item() == pytest.approx(0, abs=1e-12)


def test_strongest_alternative_is_never_the_label():
    logits, labels = torch.randn(50, 6), torch.randint(6, (50,))
    got = strongest_alternative(logits, labels)
    for z, label, other in zip(logits.tolist(), labels.tolist(), got.tolist(), strict=True):
        assert other == max((k for k in range(6) if k != label), key=lambda k: z[k])
