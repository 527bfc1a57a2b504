"""AMBER (arXiv:2311.07397): what descriptions invent and leave out, yes/no questions whose positive answer is no, and one score of both."""

from collections.abc import Hashable, Iterable, Sequence

from mmfast.eval.chair import NAN
from mmfast.eval.pope import binary_no


def generative(
    mentions: Sequence[Sequence[Hashable]],
    truths: Sequence[Iterable[Hashable]],
    distractors: Sequence[Iterable[Hashable]],
    safe: Iterable[Hashable] = (),
) -> dict[str, float]:
    """Descriptions, from each one's mentions (repetitions kept), and each image's true objects and likely inventions.

    amber_chair: false mentions / mentions. amber_cover: true objects mentioned / true objects. amber_hal: descriptions with a false mention /
    all. amber_cog: likely inventions mentioned / all of them (the code; another definition divides by the description's objects). ``safe``
    words are never false but stay among the mentions. All micro over the corpus; 0 / 0 is NaN. How a noun is matched to an object
    (associations, word vectors) is the caller's. The released code counts its whole list for an image without listed inventions; we do not.
    """
    rows = list(zip(mentions, map(set, truths), map(set, distractors), strict=True))
    safe = set(safe)
    false = [sum(m not in truth and m not in safe for m in found) for found, truth, _ in rows]

    def ratio(a: float, b: float) -> float:
        return a / b if b else NAN

    return {
        "amber_chair": ratio(sum(false), sum(len(found) for found, _, _ in rows)),
        "amber_cover": ratio(sum(len(truth & set(found)) for found, truth, _ in rows), sum(len(truth) for _, truth, _ in rows)),
        "amber_hal": ratio(sum(n > 0 for n in false), len(rows)),
        "amber_cog": ratio(sum(len(likely & set(found)) for found, _, likely in rows), sum(len(likely) for _, _, likely in rows)),
    }


def discriminative(tp: int, fp: int, tn: int, fn: int, *, existence: bool = False) -> dict[str, float]:
    """accuracy, precision, recall, f1 as the released script prints them, from the counts of ``pope.binary`` (of yes): "no" is positive.

    Precision and recall are rounded to a tenth of a percent, then ``f1 = 2 P R / (P + R + 1e-4)`` (1e-3 for ``existence``, whose questions
    are all answered no, so that its precision is 1 and its recall the accuracy), rounded again. ``pope.binary_no`` has the plain values.
    """
    plain = binary_no(tp, fp, tn, fn)
    precision, recall = round(plain["precision"], 3), round(plain["recall"], 3)
    values = {"accuracy": round(plain["accuracy"], 3), "precision": precision, "recall": recall}
    return values | {"f1": round(f1(precision, recall, 1e-3 if existence else 1e-4), 3)}


def f1(precision: float, recall: float, slack: float = 1e-4) -> float:
    """The harmonic mean with AMBER's ``slack`` in its denominator, which lets 0 and 0 give 0."""
    return 2 * precision * recall / (precision + recall + slack)


def score(chair: float, f1: float) -> float:
    """One number of both halves, ``(1 - CHAIR + F1) / 2``, arguments and result as fractions (the paper: percent)."""
    return (1 - chair + f1) / 2
