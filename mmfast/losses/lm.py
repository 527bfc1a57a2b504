"""The language-model loss, made of ``mmfast.label_logp``, and what keeps its logits in bounds.

Letters: B batch, T text tokens, V vocabulary.
"""

import torch
from torch import Tensor

from mmfast.ops.linear_logp import label_logp


def token_cross_entropy(
    logits: Tensor, labels: Tensor, *, token_weights: Tensor | None = None, total: Tensor | float | None = None
) -> Tensor:
    """Weighted mean of the cross-entropy of the next token: logits at t are scored against the label at t + 1.

    Args:
        logits: ``[B, T, V]``. labels: ``[B, T]``, -100 where nothing is scored.
        token_weights: ``[B, T]``, aligned with the labels; default one each.
        total: what to divide by instead of the weights' sum here. Pass the sum over all pieces of a step (gradient accumulation,
            ranks), add the pieces' losses, and the step's loss does not depend on how the batch was cut.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits); 0 with zero gradient when nothing is scored.
    """
    logp = label_logp(logits[:, :-1], labels[:, 1:])
    weights = (labels[:, 1:] != -100).to(logp.dtype)
    if token_weights is not None:
        weights = weights * token_weights[:, 1:].to(logp.dtype)
    if total is None:
        total = weights.sum().clamp_min(torch.finfo(logp.dtype).tiny)
    return -(logp * weights).sum() / total


def z_loss(logits: Tensor, labels: Tensor, *, weight: float = 1e-5, total: Tensor | float | None = None) -> Tensor:
    """``weight mean(log^2 Z)``, ``Z = sum_v exp(logit_v)``, over the positions that ``token_cross_entropy`` scores (PaLM, arXiv:2204.02311;
    Chameleon, arXiv:2405.09818, with weight 1e-5).

    The softmax does not see a constant added to all logits; this does, and holds their norms where half precision can tell them apart.

    Args:
        logits: ``[B, T, V]``. labels: ``[B, T]``, -100 where nothing is scored; shifted inside.
        total: what to divide by instead of the number of scored positions here, as for ``token_cross_entropy``.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits); 0 with zero gradient when nothing is scored.
    """
    # Scored rows alone: half of a batch may be prompt or padding, and what is there must not matter, NaN included.
    rows = logits[:, :-1][labels[:, 1:] != -100]
    square = rows.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).logsumexp(-1).square().sum()
    return weight * square / (max(len(rows), 1) if total is None else total)
