"""Properties of the terms that worked values do not show: gradients against closed forms, and what a term is indifferent to."""

import pytest
import torch

from mmfast.losses import anchor, contrast, forward_kl, kto_margin, likelihood, phrase_contrast, preference_loss, segment_logp, wpo_weights
from mmfast.ops.preference import LOSSES


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_forward_kl_gradient_is_the_difference_of_distributions(chunk):
    logits, reference, keep = double(2, 5, 7).requires_grad_(), double(2, 5, 7), torch.rand(2, 5) > 0.4
    (grad,) = torch.autograd.grad(forward_kl(logits, reference, keep, total=3.0, chunk=chunk), logits)
    want = (logits.softmax(-1) - reference.softmax(-1)) * keep.unsqueeze(-1) / 3
    torch.testing.assert_close(grad, want)
    assert forward_kl(logits, logits).item() == pytest.approx(0, abs=1e-15)


def test_forward_kl_of_a_word_that_the_reference_excludes():
    """0 log 0 is 0: a masked word of the reference adds nothing, and no NaN."""
    logits, reference = double(3, 4).requires_grad_(), double(3, 4)
    reference[:, 1] = -torch.inf
    loss = forward_kl(logits, reference)
    p = reference.softmax(-1)
    want = (p.clamp_min(1e-300).log() - logits.log_softmax(-1)).mul(p).sum() / 3
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], (logits.softmax(-1) - p) / 3)


def test_forward_kl_of_half_precision_and_of_nothing():
    logits, reference = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    torch.testing.assert_close(forward_kl(logits, reference).double(), forward_kl(logits.double(), reference.double()), rtol=1e-5, atol=0)
    leaf = torch.randn(4, 50, requires_grad=True)
    loss = forward_kl(leaf, leaf.detach(), torch.zeros(4, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert not leaf.grad.any()


def test_weights_of_one_change_nothing():
    """Dense, length-desensitised, severity and pair weights of 1 are plain DPO."""
    logp, ids = double(40), torch.arange(40) // 10
    (chosen, rejected), (ref_chosen, ref_rejected) = segment_logp(logp, ids).chunk(2), double(2, 2)
    plain = contrast(chosen, rejected, ref_chosen, ref_rejected)[0]
    weighted = segment_logp(logp, ids, token_weights=torch.ones(40)).chunk(2)
    assert torch.equal(contrast(*weighted, ref_chosen, ref_rejected)[0], plain)
    ones = torch.ones(2)
    assert torch.equal(contrast(chosen, rejected, ref_chosen, ref_rejected, severity=ones)[0], plain)
    assert torch.equal(preference_loss(chosen, rejected, ref_chosen, ref_rejected, pair_weights=ones)[0], plain)


# A loss over answers has no pairs, the sft term weighs by length, and what sorts the batch is below.
ADDITIVE = [n for n in LOSSES if n not in ("aot", "aot_unpaired", "kto", "anchor", "sft")]


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_batch_is_the_mean_of_its_pairs(name):
    """So micro-batches may be averaged."""
    answers, lens = (-10 * torch.rand(4, 5).double())[: 4 if LOSSES[name].reference else 2], torch.randint(1, 20, (5,))

    def loss(rows):
        return preference_loss(*answers[:, rows], loss_type=name, chosen_lens=lens[rows], rejected_lens=lens[rows] + 1)[0]

    torch.testing.assert_close(loss(slice(None)), torch.stack([loss(slice(i, i + 1)) for i in range(5)]).mean())


@pytest.mark.parametrize(
    ("name", "references", "want"),
    [("aot", ((-31, -22), (-30, -23)), 0.6237512125142362), ("aot_unpaired", ((-22, -31), (-23, -30)), 0.6212677647275813)],
)
def test_what_sorts_a_batch_is_not_the_mean_of_its_pairs(name, references, want):
    """aot: differences (4, -1) and (-1, 1), sorted 0 and 3, pair by pair 5 and -2. unpaired: (2, 1) and (-1, 1), so 2 and 1, not 3 and 0."""
    answers = torch.tensor(((-20, -30), (-24, -29), *references), dtype=torch.float64)
    assert preference_loss(*answers, loss_type=name)[0].item() == pytest.approx(want, rel=1e-9)
    each = [preference_loss(*answers[:, i : i + 1], loss_type=name)[0].item() for i in range(2)]
    assert sum(each) / 2 != pytest.approx(want, rel=1e-3)


def test_prompts_and_padding_do_not_matter():
    logp, ids = double(30), torch.arange(30) // 10
    padded = torch.cat([double(7), logp, double(5)])
    padded_ids = torch.cat([torch.full((7,), -1), ids, torch.full((5,), -1)])
    for norm in ("none", "count"):
        assert torch.equal(segment_logp(padded, padded_ids, norm=norm), segment_logp(logp, ids, norm=norm))


def test_likelihoods():
    logp, lens = double(3).requires_grad_(), torch.tensor([4, 5, 1])
    torch.testing.assert_close(likelihood(logp), -logp.mean())
    torch.testing.assert_close(likelihood(logp, lens), -logp.sum() / 10)
    torch.testing.assert_close(likelihood(logp, lens), preference_loss(logp, logp, loss_type="sft", chosen_lens=lens)[0])


def test_constants_stay_constant():
    """References, margins and weights receive no gradient."""
    policy, constant = double(3).requires_grad_(), double(3).requires_grad_()
    assert not kto_margin(constant, policy).requires_grad
    assert not wpo_weights(constant, policy, torch.tensor([0, 0, 1])).requires_grad
    loss = contrast(policy, 2 * policy, constant, constant, severity=constant)[0] + anchor(policy, constant)
    loss = loss + preference_loss(policy, 2 * policy, margin=constant, pair_weights=constant)[0]
    assert torch.autograd.grad(loss, constant, allow_unused=True) == (None,)


def test_phrases_in_a_list_or_a_matrix():
    correct, wrong = -torch.rand(6, dtype=torch.float64), -torch.rand(6, dtype=torch.float64)
    whole = phrase_contrast(correct, wrong)
    torch.testing.assert_close(whole, (wrong.exp() + correct.exp()).log().sub(correct).mean())
    torch.testing.assert_close(phrase_contrast(correct.view(2, 3), wrong.view(2, 3)), whole)
    present = torch.tensor([True, False, True, True, True, False])
    torch.testing.assert_close(phrase_contrast(correct, wrong, present), phrase_contrast(correct[present], wrong[present]))
    nothing = torch.zeros(2, 3, requires_grad=True)
    loss = phrase_contrast(nothing, nothing)
    assert loss.item() == 0
    loss.backward()
    assert not nothing.grad.any()
