"""Scores from a judge's replies: MMHal-Bench's ratings (arXiv:2309.14525; 3 to 6 without hallucination, informativeness 0 to 3; 0 to 2 with,
0 to 2), and LLaVA-Hound's of answers about videos (arXiv:2404.01258; 1 to 5)."""

import re
from collections import Counter
from collections.abc import Sequence

from mmfast.eval.chair import NAN


def mmhal(ratings: Sequence[int]) -> dict[str, float]:
    """Mean rating, share of hallucinated answers (rating < 3), and informativeness over its maximum of 3."""
    if not ratings:
        return {"mmhal_score": NAN, "mmhal_hallucination": NAN, "mmhal_informativeness": NAN}
    n = len(ratings)
    return {
        "mmhal_score": sum(ratings) / n,
        "mmhal_hallucination": sum(r < 3 for r in ratings) / n,
        "mmhal_informativeness": sum(r - 3 if r >= 3 else r for r in ratings) / n / 3,
    }


def read_rating(reply: str) -> int:
    """The rating in a judge's reply, as the benchmark's script reads it: exactly one of "rating: 0" .. "rating: 6", else 0."""
    found = {int(d) for d in re.findall(r"rating: ([0-6])", reply.lower())}
    return found.pop() if len(found) == 1 else 0


def oracle_rating(false_claims: int, facts: int, facts_told: int) -> int:
    """What a perfect judge of the shapes world gives: 3 + level without a false claim, else min(level, 2); level = round(3 recall)."""
    level = int(3 * facts_told / facts + 0.5) if facts else 0
    return 3 + level if false_claims == 0 else min(level, 2)


def read_score(reply: str) -> float:
    """The score in a judge's reply, as LLaVA-Hound's script reads it (arXiv:2404.01258): what stands after "Score:", else the number that the
    reply names most often (the mean of those, if several), else 1. Only a reply that is missing has none: None for ``data.pairs``."""
    if stated := re.search(r"score:\s*([1-5])\b", reply.lower()):
        return float(stated[1])
    counts = Counter(float(n) for n in re.findall(r"\d+(?:\.\d+)?", reply))
    most = [n for n, count in counts.items() if count == max(counts.values())]
    return sum(most) / len(most) if most else 1.0


def judged_answers(scores: Sequence[float]) -> dict[str, float]:
    """LLaVA-Hound's accuracy, the share of scores of at least 3, and the mean score. Comparable under one version of one judge alone."""
    n = len(scores)
    return {"judge_accuracy": sum(s >= 3 for s in scores) / n if n else NAN, "judge_score": sum(scores) / n if n else NAN}
