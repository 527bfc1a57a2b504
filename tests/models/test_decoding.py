"""Decoding rules as functions of logits."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from mmfast.models.decoding import contrastive_logits, penalised, unrepeating


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weakened_and_contrasted_pictures(dtype):
    """BPO: the released rule suppresses what a weakened picture suggests, the paper's samples it. Token 1 is the language prior's."""
    tolerance = dict(rel=1e-9 if dtype == torch.float64 else 1e-5, abs=1e-12)
    clean, noisy = torch.tensor([[2, 1, 0, -1], [1, 1.5, 0.2, -0.5]], dtype=dtype)
    contrast = contrastive_logits(clean, noisy)
    assert contrast.tolist() == pytest.approx([3, 0.5, -torch.inf, -torch.inf], **tolerance)
    # No cut: the last two stand too. And a cut at .390562087565900, between 0 and 1.
    assert contrastive_logits(clean, noisy, plausible=1e-9).tolist() == pytest.approx([3, 0.5, -0.2, -1.5], **tolerance)
    for beside, stays in ((0.390562, False), (0.390563, True)):
        edge = torch.tensor([2, beside], dtype=dtype)
        assert contrastive_logits(edge, edge).isfinite().tolist() == [True, stays]
    unlikely = contrastive_logits(torch.tensor([0, 5], dtype=dtype), torch.tensor([5, 0], dtype=dtype))
    assert unlikely.tolist() == [-torch.inf, 10], "what the clean picture makes implausible goes, however likely it is under noise"
    released = contrast.softmax(-1).tolist()
    assert released == pytest.approx([0.924141819979, 0.075858180021, 0, 0], **(tolerance | {"abs": 1e-12}))
    weakened = noisy.softmax(-1).tolist()
    assert weakened == pytest.approx([0.301097766781, 0.496426292652, 0.135291947646, 0.067183992922], **tolerance)
    cold = (noisy / 0.2).softmax(-1).tolist()
    assert cold == pytest.approx([0.075749755835, 0.922820942985, 0.001387405174, 0.000041896006], rel=tolerance["rel"], abs=1e-12)
    # What a negative is drawn from must prefer the prior's token.
    assert weakened[1] == max(weakened)
    assert cold[1] == max(cold)
    assert released[1] != max(released)
    assert contrastive_logits(clean, noisy, weight=0.0, plausible=1e-9).tolist() == clean.tolist()


def test_the_penalty_by_hand():
    """Positive logits are divided and negative ones multiplied, once however often a token was said; a placeholder beyond the vocabulary is none."""
    logits, told = torch.tensor([[4.0, -1.0, 0.0, 2.0]]), torch.tensor([[1, 0, 0, 4]])
    assert penalised(logits, told, 2.0).tolist() == [[2.0, -2.0, 0.0, 2.0]]
    assert penalised(logits, told, 0.5).tolist() == [[8.0, -0.5, 0.0, 2.0]]


@pytest.mark.parametrize(("no_repeat", "penalty"), [(0, 1.3), (2, 1.0), (3, 0.7), (1, 1.5)])
def test_rules_against_repetition_are_those_of_transformers(no_repeat, penalty):
    told, logits = torch.randint(0, 6, (4, 30)), torch.randn(4, 9)
    stock = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    stock += [NoRepeatNGramLogitsProcessor(no_repeat)] if no_repeat else []
    got = unrepeating(logits, told, no_repeat=no_repeat, repetition_penalty=penalty)
    assert torch.equal(got, stock(told, logits.clone()))
    assert not torch.equal(got, logits)
