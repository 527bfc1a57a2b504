"""How far in front of the others what is right stands: recall@k, mean reciprocal rank, mean rank, and NDCG where others are right too."""

from collections.abc import Sequence

import numpy as np

from mmfast.eval.chair import NAN


def order(scores: Sequence[float]) -> np.ndarray:
    """Numbers of the candidates, the highest score first; equal ones in their order. NaN comes last."""
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


def rank(scores: Sequence[float], right: int) -> int:
    """The place, from 1, of the right candidate.

    >>> rank([0.1, 0.5, 0.3], 2)
    2
    """
    return int(np.flatnonzero(order(scores) == right)[0]) + 1


def ranked(ranks: Sequence[int], at: Sequence[int] = (1, 5, 10, 20)) -> dict[str, float]:
    """``recall@k``, ``mrr`` (the mean of 1 / rank) and ``mean_rank`` of places from 1; NaN without any."""
    n = len(ranks)
    measured = {f"recall@{k}": sum(r <= k for r in ranks) / n if n else NAN for k in at}
    return measured | {"mrr": sum(1 / r for r in ranks) / n if n else NAN, "mean_rank": sum(ranks) / n if n else NAN}


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of one ranking as the Visual Dialog challenge has it (arXiv:1611.08669, its evaluation of 2018).

    ``sum_i relevance(i) / log2(1 + i)`` over the first K places, over the same of the best order; K counts the candidates of any relevance.
    NaN where nothing is relevant.
    """
    relevance = np.asarray(relevance, dtype=np.float64)
    if len(scores) != len(relevance):
        raise ValueError(f"ranking.ndcg: {len(scores)} scores but {len(relevance)} relevances")
    k = int((relevance != 0).sum())
    discount = np.log2(np.arange(2, k + 2))
    gain, best = ((relevance[by[:k]] / discount).sum() for by in (order(scores), order(relevance)))
    return float(gain / best) if k else NAN
