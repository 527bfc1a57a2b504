"""The terms that an image tokenizer is trained by (VQGAN, arXiv:2012.09841, eq. 4 to 7), and how well its codebook is used.

The codebook's own loss is the quantiser's, ``mmfast.vq_quantize`` (with ``beta``, on either side) or ``mmfast.nn.VectorQuantize`` (moving
averages: commitment alone); it is not repeated here.

Letters: B pictures, K codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction(
    drawn: Tensor,
    pixels: Tensor,
    *,
    error: str = "l1",
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
) -> Tensor:
    """``mean |x - y| + w perceptual(y, x)`` of every picture, ``[B]``: VQGAN's; ``error="l2"`` has ``mean (x - y)^2``, VQ-VAE's
    (arXiv:1711.00937).

    Args:
        drawn, pixels: ``[B, 3, H, W]`` of values -1 .. 1.
        perceptual: a frozen module that gives one number a picture (``[B]``, or ``[B, 1, 1, 1]`` as LPIPS, arXiv:1801.03924, does).

    Raises:
        ValueError: another ``error``, or a perceptual term that is not one number a picture.
    """
    if error not in ("l1", "l2"):
        raise ValueError(f"reconstruction: unknown error {error!r}, expected 'l1' or 'l2'")
    apart = drawn.float() - pixels.float()
    each = (apart.abs() if error == "l1" else apart.square()).flatten(1).mean(1)
    if perceptual is None:
        return each
    seen = perceptual(drawn, pixels)
    if seen.numel() != len(each):
        raise ValueError(f"reconstruction: expected one perceptual number a picture, [B={len(each)}], got {list(seen.shape)}")
    return each + perceptual_weight * seen.reshape(-1)


def generator_loss(judged: Tensor) -> Tensor:
    """``-mean D(y)``: what is drawn shall pass for real. ``judged``: the critic's output for it."""
    return -judged.float().mean()


def critic_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """``(mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2``: the hinge form (arXiv:1705.02894) that VQGAN uses."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + drawn.float()).mean())


def adaptive_weight(rec: Tensor, gan: Tensor, last: Tensor, *, scale: float = 0.8, eps: float = 1e-4, limit: float = 1e4) -> Tensor:
    """``scale clamp(|d rec / d W| / (|d gan / d W| + eps), 0, limit)``, a constant (VQGAN, eq. 7; its code has ``scale`` 0.8).

    It keeps the critic's pull on the decoder's ``last`` layer W as strong as the reconstruction's, whatever their sizes. The graphs of both
    losses stay alive.
    """
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (rec, gan)]
    return scale * (pulls[0] / (pulls[1] + eps)).clamp(0, limit).detach()


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """How often each code was chosen, int64 ``[K]``; -1 (masked) counts for none. Counts of pieces and of ranks add up, usage and
    perplexity do not: add first."""
    chosen = indices[indices >= 0]
    return torch.bincount(chosen, minlength=codes)


def code_usage(counts: Tensor) -> Tensor:
    """The share of codes that were chosen at all. Of few rows it says little: N rows cannot use more than N codes."""
    return (counts > 0).double().mean()


def code_perplexity(counts: Tensor) -> Tensor:
    """``exp(-sum p log p)``, p the codes' shares: how many codes, equally used, would carry as much. K if all are, 1 if one is."""
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.special.entr(p).sum().exp()
