"""The language-model loss, made of ``mmfast.label_logp``.

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
