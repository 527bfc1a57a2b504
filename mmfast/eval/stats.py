"""How sure a difference is: standard errors and the paired bootstrap over images."""

from collections.abc import Callable

import numpy as np


def standard_error(rate: float, n: int) -> float:
    """Of a rate over n independent trials."""
    return (rate * (1 - rate) / n) ** 0.5


def paired_bootstrap(
    before: np.ndarray,
    after: np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda rows: rows.mean(axis=0)[0],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Change of a corpus statistic and its interval when whole images are resampled, the same ones for both models.

    Args:
        before, after: per-image rows, ``[N]`` or ``[N, C]`` (say false mentions and mentions).
        statistic: from rows to a number; default the mean of the first column.

    Returns:
        ``(change, low, high)``.
    """
    before, after = (np.asarray(v, dtype=np.float64).reshape(len(v), -1) for v in (before, after))
    if before.shape != after.shape:
        raise ValueError(f"paired_bootstrap: expected rows of the same images, got {before.shape} and {after.shape}")
    draw = np.random.Generator(np.random.PCG64(seed))
    changes = []
    for _ in range(resamples):
        rows = draw.integers(0, len(before), len(before))
        changes.append(statistic(after[rows]) - statistic(before[rows]))
    tail = (1 - level) / 2
    low, high = np.quantile(changes, [tail, 1 - tail])
    return float(statistic(after) - statistic(before)), float(low), float(high)


def ratio_of_sums(rows: np.ndarray) -> float:
    """First column's sum over the second's: micro averages such as chair_i."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())
