"""CHAIR and its relatives (arXiv:1809.02156): which share of the objects that captions mention does not exist."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from mmfast.data.synthetic import Scene, World, parse

NAN = float("nan")


def chair(mentions: Sequence[Sequence[Hashable]], truths: Sequence[Iterable[Hashable]]) -> dict[str, float]:
    """Corpus values from each caption's mentions (repetitions kept) and each image's true objects.

    chair_i: false mentions / mentions. chair_s: captions with a false mention / all captions. chair_s_refine: the same over captions with a
    mention (Object HalBench). recall: distinct true objects mentioned / true objects. All micro over the corpus. Without a single mention
    chair_i and chair_s_refine are NaN: an empty caption must not win.
    """
    if len(mentions) != len(truths):
        raise ValueError(f"chair: {len(mentions)} captions but {len(truths)} images")
    truths = [set(t) for t in truths]
    false = [sum(m not in t for m in found) for found, t in zip(mentions, truths, strict=True)]
    total, spoken, real = sum(map(len, mentions)), sum(map(bool, mentions)), sum(map(len, truths))
    wrong = sum(n > 0 for n in false)
    return {
        "chair_i": sum(false) / total if total else NAN,
        "chair_s": wrong / len(truths) if truths else NAN,
        "chair_s_refine": wrong / spoken if spoken else NAN,
        "recall": sum(len(set(m) & t) for m, t in zip(mentions, truths, strict=True)) / real if real else NAN,
    }


def caption_metrics(
    world: World, scenes: Sequence[Scene], texts: Sequence[str], statistics: "Cooccurrence | None" = None
) -> dict:
    """All caption metrics of the shapes world.

    A mention with a colour is checked as a class, without one as a shape. Beside ``chair``: ``len`` (words), ``mentions``; ``attr_err``,
    ``count_err``, ``pos_err`` per mention (disjoint: an absent shape counts as object error, then colour, count, position), ``severity``
    (mean over captions of the mean grade of their false claims); with training statistics ``cog``, the share of each scene's five likeliest
    absent classes that is mentioned.
    """
    keys, truths, errors, severities = [], [], Counter(), []
    for scene, text in zip(scenes, texts, strict=True):
        found = parse(text)
        keys.append([("shape", m.shape) if m.colour is None else ("class", m.colour, m.shape) for m in found])
        truths.append([("class", n.colour, n.shape) for n in scene.classes])
        errors.update(world.claim_error(scene, m) for m in found)
        grades = [g for g in (world.severity(scene, m) for m in found) if g]
        severities.append(sum(grades) / len(grades) if grades else 0.0)
    # A shape without a colour is true if any colour of it is there: give such mentions their own truth, outside recall's count.
    judged = [
        [k if k[0] == "class" or not any(t[2] == k[1] for t in truth) else ("true shape", k[1]) for k in found]
        for found, truth in zip(keys, truths, strict=True)
    ]
    shapes = [{k for k in found if k[0] == "true shape"} for found in judged]
    result = chair(judged, [set(t) | s for t, s in zip(truths, shapes, strict=True)])
    real = sum(len(set(t)) for t in truths)
    result["recall"] = sum(len(set(k) & set(t)) for k, t in zip(keys, truths, strict=True)) / real if real else NAN
    total = sum(map(len, keys))
    for name, error in (("attr_err", "colour"), ("count_err", "count"), ("pos_err", "position")):
        result[name] = errors[error] / total if total else NAN
    result["severity"] = sum(severities) / len(severities) if severities else NAN
    result["len"] = sum(len(t.split()) for t in texts) / len(texts) if texts else NAN
    result["mentions"] = total / len(texts) if texts else NAN
    if statistics is not None:
        hit = likely = 0
        for scene, found in zip(scenes, keys, strict=True):
            expected = statistics.distractors(world.class_ids(scene), 5)
            spoken = {k[1] * world.config.shapes + k[2] for k in found if k[0] == "class"}
            hit, likely = hit + len(spoken & set(expected)), likely + len(expected)
        result["cog"] = hit / likely if likely else NAN
    return result


class Cooccurrence:
    """How often classes occur, alone and together, in training scenes: the prior that a model absorbs."""

    def __init__(self, world: World, scenes: Iterable[Scene]):
        k = world.config.classes
        self.single = [0] * k
        self.joint = [[0] * k for _ in range(k)]
        for scene in scenes:
            present = world.class_ids(scene)
            for a in present:
                self.single[a] += 1
                for b in present:
                    if a != b:
                        self.joint[a][b] += 1

    def distractors(self, present: Sequence[int], count: int) -> list[int]:
        """The absent classes that most often stand beside these; ties to the lower class id."""
        absent = [k for k in range(len(self.single)) if k not in set(present)]
        return sorted(absent, key=lambda k: (-sum(self.joint[p][k] for p in present), k))[:count]
