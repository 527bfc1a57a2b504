"""Places of what is right, against values worked by hand."""

import math

import pytest

from mmfast.eval import ranking


def test_places():
    assert [ranking.rank([0.1, 0.5, 0.3], right) for right in range(3)] == [3, 1, 2]
    assert [ranking.rank([2.0, 7, 7, 7], right) for right in range(4)] == [4, 1, 2, 3], "equals in their order"
    assert ranking.rank([math.nan, -5.0], 0) == 2


def test_measures_of_places():
    told = ranking.ranked([1, 2, 6, 30])
    # (1 + 1/2 + 1/6 + 1/30) / 4 = 1.7 / 4
    assert told == pytest.approx({"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "recall@20": 0.75, "mrr": 0.425, "mean_rank": 9.75})
    assert all(map(math.isnan, ranking.ranked([]).values()))


def test_gain():
    # Two are relevant, so two places count: 0 and 1 / log2(3) of the ranking, 1 and .5 / log2(3) of the best one.
    assert ranking.ndcg([3, 2, 1, 0], [0, 1, 0.5, 0]) == pytest.approx(0.6309298 / 1.3154649, abs=1e-6)
    assert ranking.ndcg([0, 3, 2, 1], [0, 1, 0.5, 0]) == pytest.approx(1)
    assert ranking.ndcg([3, 2, 1, 0], [0, 0, 0.4, 0.2]) == 0
    # .2 / log2(2) + .6 / log2(3) + .2 / log2(4) over .6 + .2 / log2(3) + .2 / log2(4)
    assert ranking.ndcg([9, 8, 7, 1], [0.2, 0.6, 0.2, 0]) == pytest.approx(0.6785579 / 0.8261860, abs=1e-6)
    assert math.isnan(ranking.ndcg([1, 2], [0, 0]))
    with pytest.raises(ValueError, match="2 scores but 3 relevances"):
        ranking.ndcg([1, 2], [1, 0, 0])
