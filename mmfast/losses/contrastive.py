"""Pictures and texts that belong together, found among those of a batch. Letters: B pairs, S dimensions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(pictures: Tensor, texts: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """``(CE(L, diagonal) + CE(L^T, diagonal)) / 2`` with ``L = scale u t^T``: every picture finds its text, every text its picture (CLIP,
    arXiv:2103.00020, figure 3; FROMAGe, arXiv:2301.13823, equations 2 to 4).

    Args:
        pictures, texts: ``[B, S]`` of length 1; the i-th belong together.
        scale: the inverse temperature, where it is in neither of them.
    """
    logits = scale * pictures @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
