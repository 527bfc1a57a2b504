"""Objectives as pure functions of log-probabilities and logits."""

from mmfast.losses.lm import token_cross_entropy
from mmfast.losses.preference import (
    anchor,
    contrast,
    forward_kl,
    kto_margin,
    likelihood,
    phrase_contrast,
    preference_loss,
    segment_logp,
    wpo_weights,
)
from mmfast.ops.linear_logp import label_logp

__all__ = [
    "anchor",
    "contrast",
    "forward_kl",
    "kto_margin",
    "label_logp",
    "likelihood",
    "phrase_contrast",
    "preference_loss",
    "segment_logp",
    "token_cross_entropy",
    "wpo_weights",
]
