"""Log-probabilities of labels, and the language-model loss made of them.

Shape letters: B batch, T text tokens, V vocabulary. Half-precision logits are widened before the log-sum-exp, and the label's own logit is
read from the widened row too: taking the two from different precisions can give a log-probability above zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def label_logp(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` at the labels; 0 where ignored. Nothing is shifted.

    Args:
        logits: ``[..., V]``, any float type.
        labels: ``[...]`` int64, each ``ignore_index`` or in ``0 .. V - 1``.

    Returns:
        ``[...]`` in fp32 (fp64 for fp64 logits), never positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"label_logp: expected labels {list(logits.shape[:-1])} like logits [..., V], got {list(labels.shape)}")
    keep = labels != ignore_index
    rows = _wide(logits[keep]) / temperature
    scored = -F.cross_entropy(rows, labels[keep], reduction="none")
    return torch.zeros(labels.shape, dtype=scored.dtype, device=logits.device).masked_scatter(keep, scored)


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
        A scalar in fp32; 0 with zero gradient when nothing is scored.
    """
    labels = labels[:, 1:]
    keep = labels != -100
    losses = F.cross_entropy(_wide(logits[:, :-1][keep]), labels[keep], reduction="none")
    weights = torch.ones_like(losses) if token_weights is None else token_weights[:, 1:][keep].to(losses.dtype)
    if total is None:
        total = weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)
    return (losses * weights).sum() / total
