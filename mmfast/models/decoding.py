"""Rules over the next token's logits, applied before a token is drawn."""

import math

import torch
from torch import Tensor


def contrastive_logits(clean: Tensor, noisy: Tensor, *, weight: float = 1.0, plausible: float = 0.2) -> Tensor:
    """``(1 + weight) clean - weight noisy`` where clean is at least its maximum + log plausible, else -inf (VCD, arXiv:2311.16922).

    It takes away what a model says without looking, so it makes better answers. BPO (arXiv:2403.08730) wants worse ones, but its released
    generator samples by this rule; its paper's negatives are sampled from ``noisy`` alone, which is plain generation with a noised picture
    (``mmfast.data.degrade.diffuse``).

    Args:
        clean, noisy: ``[.., V]`` logits of the same text under the picture and under its noised form.
    """
    cut = clean.amax(-1, keepdim=True) + math.log(plausible)
    return torch.where(clean >= cut, (1 + weight) * clean - weight * noisy, -torch.inf)
