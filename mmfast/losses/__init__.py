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
    strongest_alternative,
    wpo_weights,
)
from mmfast.losses.reward import penalised_score, reward_model_loss, rloo_advantages
from mmfast.ops.linear_logp import label_logp

__all__ = [
    "anchor",
    "contrast",
    "forward_kl",
    "kto_margin",
    "label_logp",
    "likelihood",
    "penalised_score",
    "phrase_contrast",
    "preference_loss",
    "reward_model_loss",
    "rloo_advantages",
    "segment_logp",
    "strongest_alternative",
    "token_cross_entropy",
    "wpo_weights",
]
