"""POPE (arXiv:2305.10355) on the shapes world: balanced yes/no questions whose negatives follow the training prior ever more closely."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmfast.data.synthetic import SPLITS, Draws, Scene, World
from mmfast.eval.chair import NAN, Cooccurrence

MODES = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    image: int  # index into the scenes given
    class_id: int
    mode: str  # "positive", or one of MODES
    text: str
    answer: bool


def build(world: World, scenes: Sequence[Scene], statistics: Cooccurrence) -> list[Question]:
    """Three positives of every scene with at least three classes, and three negatives a mode; ``image`` indexes ``scenes``.

    Positives are drawn at random without replacement. Negatives are never present and never repeated within an image and mode: random;
    the most frequent class of the training scenes; the class that most often stands beside the paired positive there. Ties to the lower id.
    """
    questions = []
    for i, scene in enumerate(scenes):
        present = world.class_ids(scene)
        if len(present) < 3:
            continue
        draws = Draws(scene.seed, 9, SPLITS[scene.split], scene.id)
        positives = draws.shuffled(present)[:3]
        questions += [Question(i, k, "positive", world.ask_exists(k), True) for k in positives]
        for mode in MODES:
            used = set(present)
            for positive in positives:
                absent = [k for k in range(world.config.classes) if k not in used]
                if mode == "random":
                    k = absent[draws.below(len(absent))]
                elif mode == "popular":
                    k = max(absent, key=lambda k: (statistics.single[k], -k))
                else:
                    k = max(absent, key=lambda k, p=positive: (statistics.joint[p][k], -k))
                used.add(k)
                questions.append(Question(i, k, mode, world.ask_exists(k), False))
    return questions


def binary(tp: int, fp: int, tn: int, fn: int) -> dict[str, float]:
    """accuracy, precision, recall, f1 with yes as the positive class, and the share of yes answers. 0 / 0 is NaN."""

    def ratio(a: float, b: float) -> float:
        return a / b if b else NAN

    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "accuracy": ratio(tp + tn, tp + fp + tn + fn),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": ratio(tp + fp, tp + fp + tn + fn),
    }


def binary_no(tp: int, fp: int, tn: int, fn: int) -> dict[str, float]:
    """The same counts (of yes as positive) with "no" as the positive class, as AMBER (arXiv:2311.07397) reports them."""
    return binary(tp=tn, fp=fn, tn=tp, fn=fp)


def score(questions: Sequence[Question], said_yes: Sequence[bool]) -> dict[str, float]:
    """``pope_{mode}_{accuracy, precision, recall, f1}`` and ``yes_ratio_{mode}``, each mode with the positives, so that .5 is balanced;
    ``yes_ratio`` is the modes' mean."""
    result = {}
    for mode in MODES:
        rows = [(q.answer, yes) for q, yes in zip(questions, said_yes, strict=True) if q.mode in ("positive", mode)]
        counts = [sum(r == want for r in rows) for want in ((True, True), (False, True), (False, False), (True, False))]
        values = binary(*counts)
        result |= {f"pope_{mode}_{name}": values[name] for name in ("accuracy", "precision", "recall", "f1")}
        result[f"yes_ratio_{mode}"] = values["yes_ratio"]
    result["yes_ratio"] = sum(result[f"yes_ratio_{mode}"] for mode in MODES) / len(MODES)
    return result


def read_answer(text: str) -> bool:
    """Whether a free answer says yes, by POPE's published rule: the first sentence, commas dropped, is a no if one of its words is "No",
    "no" or "not", and a yes in every other case (an evasion too)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "no", "not") for word in words)
