"""Objectives as pure functions of log-probabilities and logits."""

from mmfast.losses.image_text import hard_negatives, image_text_contrast, smoothed_cross_entropy
from mmfast.losses.lm import token_cross_entropy, z_loss
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
from mmfast.losses.vq import adaptive_weight, code_counts, code_perplexity, code_usage, critic_loss, generator_loss, reconstruction
from mmfast.ops.linear_logp import label_logp

__all__ = [
    "adaptive_weight",
    "anchor",
    "code_counts",
    "code_perplexity",
    "code_usage",
    "contrast",
    "critic_loss",
    "forward_kl",
    "generator_loss",
    "hard_negatives",
    "image_text_contrast",
    "kto_margin",
    "label_logp",
    "likelihood",
    "penalised_score",
    "phrase_contrast",
    "preference_loss",
    "reconstruction",
    "reward_model_loss",
    "rloo_advantages",
    "segment_logp",
    "smoothed_cross_entropy",
    "strongest_alternative",
    "token_cross_entropy",
    "wpo_weights",
    "z_loss",
]
