"""From judgements to preference pairs: which of several answers is better, which pairs to keep, and which tokens a correction changed.

Pure functions over texts, token ids and numbers, one for each rule of the alignment methods, in the order of their use: score answers, pair
them, filter pairs, weigh what is left. What is not judged is left out, never guessed: the longest answer is no substitute for a rating.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np

# ------------------------------------------------------------------------------------------------------- scores of answers


def mean_rating(ratings: Sequence[str | float]) -> float | None:
    """The arithmetic mean of an answer's ratings, one for each aspect (Silkie, arXiv:2312.10665: helpfulness, ethics, faithfulness, 1 to 5).

    None where one of them is no number ("N/A") or there is none: such an answer takes part in no pair, as in the released code.
    """
    try:
        values = [float(r) for r in ratings]
    except (TypeError, ValueError):
        return None
    return sum(values) / len(values) if values and all(map(math.isfinite, values)) else None


def claim_score(claims: Sequence[tuple[float, float]]) -> int | None:
    """Minus the number of an answer's claims that a labeler rejects: RLAIF-V's divide and conquer (arXiv:2405.17220, section 3.2).

    Args:
        claims: for each claim, put as a polar question, the labeler's first-token probabilities ``(p_yes, p_no)``, upper and lower case
            added up. It is accepted where p_yes > p_no (a tie is not); how sure the labeler is does not count.

    Returns:
        0 or less; None for an answer without a claim, which leaves the pool. An answer with few claims is favoured: ``balance_lengths``.
    """
    return -sum(not p_yes > p_no for p_yes, p_no in claims) if claims else None


def mean_severity(scores: Sequence[float] | None, sentences: int | None = None) -> float:
    """How bad a rejected answer is: the mean of the severities (1 minor, 2 moderate, 3 major) of its hallucinated items, HSA-DPO's S
    (arXiv:2404.14233), for ``contrast(severity=...)``.

    Args:
        scores: one for each hallucinated item; None (a record without a score) gives 1, plain DPO, as in the released code.
        sentences: divide by this number, clean sentences counting 0, instead of by the items. The paper does not say which; a mean over
            items stays within 1 to 3 and is the default.

    Returns:
        0 for an answer without a hallucination, whose rejected side would then weigh nothing: leave such pairs out.
    """
    if scores is None:
        return 1.0
    count = len(scores) if sentences is None else sentences
    return sum(scores) / count if count else 0.0


def read_severities(report: str) -> list[tuple[str, int]]:
    """``(type, severity)`` of every item that a hallucination detector reports, HSA-DPO's format (arXiv:2404.14233).

    A report is ``NO HALLUCINATION``, or tags and then scores: below ``Scores:`` and a type in brackets (``<object>``, ``<attribute>``,
    ``<relationship>``) lines such as ``1 . a red car: Major (3 points): there is none``; the number may be missing.

    Raises:
        ValueError: a report that is neither.
    """
    if report.strip().upper().rstrip(".") == "NO HALLUCINATION":
        return []
    kind, found = "", []
    for line in report.partition("Scores:")[2].splitlines():
        if tag := re.fullmatch(r"\s*<(\w+)>\s*", line):
            kind = tag[1]
        elif score := re.search(r"\b(?:Minor|Moderate|Major)\s*\(([123]) points?\)", line):
            found.append((kind, int(score[1])))
    if not found:
        raise ValueError(f"hallucination report holds neither scores nor NO HALLUCINATION: {report[:80]!r}")
    return found


# -------------------------------------------------------------------------------------------------------- pairs of answers


def ranked_pairs(scores: Sequence[float | None], min_gap: float = 0.0) -> list[tuple[int, int]]:
    """``(chosen, rejected)`` of all pairs of answers to one prompt whose scores differ, the higher one chosen.

    Silkie (arXiv:2312.10665) on ``mean_rating``; RLAIF-V (arXiv:2405.17220) on ``claim_score`` with a gap of 1, of which it then draws two
    a question; BPO (arXiv:2403.08730) on 1 for the ground truth and 0 for its negatives, which so never meet each other.

    Args:
        scores: one for each answer; None takes part in no pair. Equal scores make none.
        min_gap: the smallest difference that counts.
    """
    judged = [i for i, s in enumerate(scores) if s is not None]
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(judged, 2) if scores[i] != scores[j]]
    return [(i, j) for i, j in pairs if scores[i] - scores[j] >= min_gap]


def split_by_score(scores: Sequence[float | None], threshold: float = 3) -> tuple[list[int], list[int]]:
    """Answers at or above a threshold, and those below it: LLaVA-Hound (arXiv:2404.01258) draws one of each, and no pair where a side is
    empty. Its judge gives 1 to 5; None stands for a reply that is missing."""
    judged = [(i, s) for i, s in enumerate(scores) if s is not None]
    return [i for i, s in judged if s >= threshold], [i for i, s in judged if s < threshold]


# ------------------------------------------------------------------------------------------------------- filters over pairs


def within_words(answers: Sequence[str], limit: int = 350) -> bool:
    """Whether no answer of a record has more than ``limit`` words between blanks: BPO's filter (arXiv:2403.08730), all or nothing."""
    return all(len(answer.split()) <= limit for answer in answers)


def balance_lengths(pairs: Sequence[tuple[str, str]], limits: Sequence[float] | None = None) -> tuple[list[int], float, float]:
    """Leaves out pairs whose chosen text is much the shorter one, until both sides are about equally long (RLAIF-V, arXiv:2405.17220).

    For each limit, pairs with ``(rejected - chosen) / rejected`` words above it go, and pairs of equal text; kept is what the first limit
    with the smallest ``|mean chosen - mean rejected| / mean rejected`` leaves. A score that counts rejected claims likes short answers, and
    a policy trained on such pairs learns to say little.

    Args:
        pairs: ``(chosen, rejected)`` texts. limits: default 0, .02, ... .98.

    Returns:
        the places of the pairs kept, the limit, and the difference there; no place, and NaN twice, where no limit leaves a pair.
    """
    words = np.array([[len(text.split()) for text in pair] for pair in pairs], dtype=np.float64).reshape(-1, 2)
    differ = np.array([chosen.strip() != rejected.strip() for chosen, rejected in pairs], dtype=bool)
    shorter = (words[:, 1] - words[:, 0]) / np.maximum(words[:, 1], 1)
    best: tuple[list[int], float, float] = ([], math.nan, math.nan)
    for limit in [i / 50 for i in range(50)] if limits is None else limits:
        kept = np.flatnonzero(differ & (shorter <= limit))
        chosen, rejected = words[kept].sum(0)
        if rejected and not abs(chosen - rejected) / rejected >= best[2]:
            best = kept.tolist(), limit, abs(chosen - rejected) / rejected
    return best


# --------------------------------------------------------------------------------------------------- what a correction changed


def changed_segments(
    rejected: Sequence[Hashable], chosen: Sequence[Hashable], *, min_match: int = 3, autojunk: bool = False
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The corrected segments of an answer, as half-open ranges in both: RLHF-V's dense weights rest on them (arXiv:2312.00849).

    Stretches of at least ``min_match`` tokens that both sides share are unchanged; what lies between two of them, on both sides, is a
    segment. A shorter stretch is swallowed. Where one side is empty (a pure insertion or deletion) nothing counts as changed.

    Args:
        rejected, chosen: token ids without padding, which would match itself; prompt and answer, or the answer alone. The released code
            compares padded rows less their first token, so that places are those of shifted labels.
        autojunk: as in ``difflib``: in texts of 200 ids and more the frequent ones start no match, and repetitive text seems changed all
            over. The released code has it on.
    """
    from difflib import SequenceMatcher

    blocks = SequenceMatcher(None, rejected, chosen, autojunk=autojunk).get_matching_blocks()
    segments, i, j = [], 0, 0
    for block in blocks:
        if block.size < min_match and block is not blocks[-1]:  # the last one is empty and stands behind both ends
            continue
        if block.a > i and block.b > j:
            segments.append(((i, block.a), (j, block.b)))
        i, j = block.a + block.size, block.b + block.size
    return segments


def correction_weights(
    rejected: Sequence[Hashable], chosen: Sequence[Hashable], gamma: float, *, min_match: int = 3, autojunk: bool = False
) -> tuple[list[float], list[float]]:
    """Token weights of both answers, gamma on corrected segments and 1 elsewhere, for ``segment_logp(token_weights=...)``: RLHF-V.

    With ``norm="weight"`` and gamma 5 the paper's score (arXiv:2312.00849, section 3.2); its code sums (``norm="none"``) with gamma 1.1. The same
    weights belong to policy and reference. Arguments as for ``changed_segments``; returns the rejected answer's, then the chosen one's.
    """
    weights = [1.0] * len(rejected), [1.0] * len(chosen)
    for segment in changed_segments(rejected, chosen, min_match=min_match, autojunk=autojunk):
        for side, (first, last) in zip(weights, segment, strict=True):
            side[first:last] = [gamma] * (last - first)
    return weights
