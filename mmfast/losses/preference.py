"""Preference terms: pure functions of sequence log-probabilities.

Letters: S sequences, P pairs, T tokens. A sequence's log-probability is the sum over its scored tokens; everything is accumulated in fp32
at least, because half-precision sums over a few hundred tokens are off by whole units.
"""

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("sigmoid",)


def segment_logp(
    logp: Tensor,
    seq_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    norm: str = "none",
    num_segments: int | None = None,
) -> Tensor:
    """Sum token log-probabilities by sequence.

    Args:
        logp: ``[...]`` token log-probabilities.
        seq_ids: ``[...]`` int64, which sequence a token belongs to; negative: none (prompt, image, padding).
        token_weights: ``[...]``, a factor for each token, say more for corrected words (RLHF-V, arXiv:2312.00849).
        norm: ``none`` for the sum; ``count`` divides by the number of tokens, ``weight`` by the sum of their weights.
        num_segments: S; read from ``seq_ids`` when left out, which waits for the device.

    Returns:
        ``[S]`` in fp32 (fp64 for fp64 input). A sequence without tokens gets 0.
    """
    if logp.shape != seq_ids.shape or (token_weights is not None and token_weights.shape != logp.shape):
        weights = None if token_weights is None else list(token_weights.shape)
        raise ValueError(
            f"segment_logp: expected one shape, got logp {list(logp.shape)}, seq_ids {list(seq_ids.shape)}, token_weights {weights}"
        )
    if norm not in ("none", "count", "weight"):
        raise ValueError(f"segment_logp: unknown norm {norm!r}, expected none, count or weight")
    if num_segments is None:
        num_segments = int(seq_ids.max()) + 1 if seq_ids.numel() else 0
    keep = seq_ids >= 0
    ids, values = seq_ids[keep], logp[keep]
    values = values if values.dtype == torch.float64 else values.float()
    weights = torch.ones_like(values) if token_weights is None else token_weights[keep].to(values.dtype)
    zeros = values.new_zeros(num_segments)
    sums = zeros.index_add(0, ids, values * weights)
    if norm == "none":
        return sums
    per_token = torch.ones_like(values) if norm == "count" else weights
    return sums / zeros.index_add(0, ids, per_token).clamp_min(torch.finfo(values.dtype).tiny)


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """How well the policy tells the better of two answers.

    With ``a = chosen - ref_chosen``, ``c = rejected - ref_rejected`` and ``d = beta (a - c)``:

    ``sigmoid``  ``(1 - eps) softplus(-d) + eps softplus(d)``, eps the label smoothing: DPO (arXiv:2305.18290, eq. 7), and with eps > 0
    its conservative form (the labels are wrong with probability eps). ``softplus`` stays linear where ``-log(sigmoid)`` would overflow.

    Args:
        chosen, rejected: ``[P]`` log-probabilities under the policy. ref_chosen, ref_rejected: the same under the reference; left out
            both, the reference is uniform (its ratio is 1).
        reduction: ``mean`` or ``none``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: the loss, a scalar or ``[P]``; the implicit rewards ``beta a`` and ``beta c``,
        ``[P]``, without gradient.
    """
    if loss_type not in LOSS_TYPES:
        close = difflib.get_close_matches(loss_type, LOSS_TYPES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f", expected one of {', '.join(LOSS_TYPES)}"
        raise ValueError(f"preference_loss: unknown loss_type {loss_type!r}{hint}")
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("preference_loss: give both ref_chosen and ref_rejected, or neither")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"preference_loss: expected 0 <= label_smoothing < 0.5, got {label_smoothing}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"preference_loss: unknown reduction {reduction!r}, expected mean or none")
    a, c = (x if x.dtype == torch.float64 else x.float() for x in (chosen, rejected))
    if ref_chosen is not None:
        a, c = a - ref_chosen.to(a.dtype), c - ref_rejected.to(c.dtype)
    if a.shape != c.shape:
        raise ValueError(f"preference_loss: expected chosen and rejected [P] alike, got {list(a.shape)} and {list(c.shape)}")
    d = beta * (a - c)
    loss = (1 - label_smoothing) * F.softplus(-d) + (label_smoothing * F.softplus(d) if label_smoothing else 0.0)
    return (loss.mean() if reduction == "mean" else loss), (beta * a).detach(), (beta * c).detach()
