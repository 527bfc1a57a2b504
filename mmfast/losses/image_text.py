"""Pictures beside texts: the three terms of BLIP-2's first stage (arXiv:2301.12597, section 3.2; after BLIP, arXiv:2201.12086, section 3.2).

Letters: B rows of this process, A rows of all processes, S text tokens, V words. A key is whatever is the same for two rows that show one
picture; distinct numbers where that is not known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def image_text_contrast(
    image_to_text: Tensor, text_to_image: Tensor, keys: Tensor, all_keys: Tensor, *, smoothing: float = 0.1, total: Tensor | float | None = None
) -> Tensor:  # fmt: skip
    """Half the sum of two cross-entropies: of a picture's text among all, and of a text's picture among all.

    Rows of one picture share the target: ``(1 - smoothing) [same key] / their number + smoothing / A``. With distinct keys this is the
    cross-entropy with label smoothing towards the row's own place.

    Args:
        image_to_text, text_to_image: ``[B, A]``, similarities over the temperature.
        keys: ``[B]``. all_keys: ``[A]``.
        total: what to divide by instead of B: the rows of the whole step.
    """
    same = (keys[:, None] == all_keys).to(image_to_text.dtype)
    targets = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(all_keys)
    both = image_to_text.log_softmax(1) + text_to_image.log_softmax(1)
    return -(targets * both).sum() / (2 * (len(keys) if total is None else total))


@torch.no_grad()
def hard_negatives(similarity: Tensor, keys: Tensor, all_keys: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row one of another picture, the likelier the more similar: drawn from the softmax over ``[B, A]`` -> indices ``[B]``, -1 for a row
    whose picture all of them show.

    Rows of the same picture have -10000 there, which no draw survives unless all have it.
    """
    same = keys[:, None] == all_keys
    drawn = torch.multinomial(similarity.masked_fill(same, -1e4).float().softmax(1), 1, generator=generator)[:, 0]
    return drawn.masked_fill(same.all(1), -1)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1, total: Tensor | float | None = None) -> Tensor:
    """Mean cross-entropy with label smoothing of logits ``[B, S, V]`` against labels ``[B, S]`` that stand at the same places, -100 where
    nothing is scored; ``total`` as for ``token_cross_entropy``."""
    summed = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    return summed / ((labels != -100).sum().clamp_min(1) if total is None else total)
