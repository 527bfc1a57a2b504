"""How well boxes are placed: intersection over union, accuracy at one half, and what a model that looks at nothing would get."""

from collections.abc import Sequence

from mmfast.eval.chair import NAN

Box = Sequence[float]  # x1, y1, x2, y2


def iou(a: Box, b: Box, *, pixels: bool = False) -> float:
    """Intersection over union of two boxes; 0 where neither has an area.

    ``pixels``: corners are the first and the last pixel inside, so that a side is ``x2 - x1 + 1``: the convention of MiniGPT-v2's
    released evaluation, where a missing prediction of (0, 0, 0, 0) has an area of 1. Otherwise a side is ``x2 - x1``.
    """
    more = 1 if pixels else 0
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + more, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + more, 0)
    both = width * height
    either = sum(max(c[2] - c[0] + more, 0) * max(c[3] - c[1] + more, 0) for c in (a, b)) - both
    return both / either if either > 0 else 0.0


def score(
    predicted: Sequence[Box | None],
    targets: Sequence[Box | Sequence[Box]],
    *,
    threshold: float = 0.5,
    strict: bool = True,
    pixels: bool = False,
) -> dict[str, float]:
    """``grounding_accuracy`` (the share of hits), ``grounding_mean_iou`` and ``grounding_unread`` (the share without a prediction).

    A prediction of None, an answer in which no box could be read, is a miss with an IoU of 0. A target of several boxes counts by the best
    one: Flickr30k Entities' any-box protocol. NaN without a single target.

    Args:
        strict: a hit has more than ``threshold`` (Kosmos-2, Shikra, MiniGPT-v2); otherwise at least that (Qwen-VL's and Ferret's code).
        pixels: as in ``iou``.
    """
    if len(predicted) != len(targets):
        raise ValueError(f"grounding.score: {len(predicted)} predictions but {len(targets)} targets")
    found = []
    for box, target in zip(predicted, targets, strict=True):
        wanted = target if len(target) and isinstance(target[0], Sequence) else [target]
        found.append(0.0 if box is None else max((iou(box, t, pixels=pixels) for t in wanted), default=0.0))
    n = len(found)
    return {
        "grounding_accuracy": sum(v > threshold if strict else v >= threshold for v in found) / n if n else NAN,
        "grounding_mean_iou": sum(found) / n if n else NAN,
        "grounding_unread": sum(box is None for box in predicted) / n if n else NAN,
    }


def centre_box(boxes: Sequence[Box], sizes: Sequence[tuple[float, float]], size: tuple[float, float]) -> tuple[float, float, float, float]:
    """A box in the middle of a picture of ``size``, as wide and high as those of the training set are on average: what a model must beat.

    Weak where nothing lies in the middle, as in the shapes world, whose even grid has a corner there; ``constant_box`` is never weaker
    on the boxes it was chosen by.

    Args:
        boxes: of the training set. sizes: (width, height) of their pictures.
    """
    _check("centre_box", boxes, sizes)
    shares = _shares(boxes, sizes)
    width, height = (sum(b[i + 2] - b[i] for b in shares) / len(shares) * size[i] for i in (0, 1))
    return ((size[0] - width) / 2, (size[1] - height) / 2, (size[0] + width) / 2, (size[1] + height) / 2)


def constant_box(
    boxes: Sequence[Box], sizes: Sequence[tuple[float, float]], size: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The best answer without looking: of the training boxes, the centre box and the whole picture the one with the highest mean IoU on the
    training boxes, in a picture of ``size``. Time grows with the square of their number; some hundreds are enough.

    Arguments as in ``centre_box``.
    """
    _check("constant_box", boxes, sizes)
    shares = _shares(boxes, sizes)
    candidates = [*shares, centre_box(boxes, sizes, (1, 1)), (0.0, 0.0, 1.0, 1.0)]
    best = max(candidates, key=lambda c: sum(iou(c, b) for b in shares))
    return (best[0] * size[0], best[1] * size[1], best[2] * size[0], best[3] * size[1])


def _check(name: str, boxes: Sequence[Box], sizes: Sequence[tuple[float, float]]) -> None:
    if not boxes or len(boxes) != len(sizes):
        raise ValueError(f"grounding.{name}: expected boxes and as many sizes, got {len(boxes)} and {len(sizes)}")


def _shares(boxes: Sequence[Box], sizes: Sequence[tuple[float, float]]) -> list[tuple[float, ...]]:
    return [tuple(v / size[i % 2] for i, v in enumerate(box)) for box, size in zip(boxes, sizes, strict=True)]
