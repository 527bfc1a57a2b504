"""Objectives as pure functions of log-probabilities and logits."""

from mmfast.losses.lm import label_logp, token_cross_entropy
from mmfast.losses.preference import preference_loss, segment_logp

__all__ = ["label_logp", "preference_loss", "segment_logp", "token_cross_entropy"]
