"""CHAIR and its relatives (arXiv:1809.02156): which share of the objects that captions mention does not exist."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from mmfast.data.synthetic import Scene, World, parse

NAN = float("nan")


def chair(mentions: Sequence[Sequence[Hashable]], truths: Sequence[Iterable[Hashable]]) -> dict[str, float]:
    """Corpus values from each caption's mentions (repetitions kept) and each image's true objects.

    chair_i: false mentions / mentions. chair_s: captions with a false mention / all captions. chair_s_refine: the same over captions with a
    mention (Object HalBench). recall: distinct true objects mentioned / true objects. All micro over the corpus. Without a single mention
    in the whole corpus the first three are NaN: silence must not win.
    """
    if len(mentions) != len(truths):
        raise ValueError(f"chair: {len(mentions)} captions but {len(truths)} images")
    truths = [set(t) for t in truths]
    false = [sum(m not in t for m in found) for found, t in zip(mentions, truths, strict=True)]
    total, spoken, real = sum(map(len, mentions)), sum(map(bool, mentions)), sum(map(len, truths))
    wrong = sum(n > 0 for n in false)
    return {
        "chair_i": sum(false) / total if total else NAN,
        "chair_s": wrong / len(truths) if total else NAN,
        "chair_s_refine": wrong / spoken if spoken else NAN,
        "recall": sum(len(set(m) & t) for m, t in zip(mentions, truths, strict=True)) / real if real else NAN,
    }


def caption_metrics(
    world: World, scenes: Sequence[Scene], texts: Sequence[str], statistics: "Cooccurrence | None" = None
) -> dict[str, float]:
    """All caption metrics of the shapes world.

    A mention with a colour is checked as a class, without one as a shape (which recalls no class). Beside ``chair``: ``len`` in words and
    ``mentions``; per mention ``attr_err``, ``count_err``, ``pos_err``, disjoint (an absent shape is an object error, else an absent colour
    of it an attribute error, else the count, else the position; chair_i is object plus attribute errors); ``severity``, the mean over
    captions of the mean grade of their false claims; with training statistics ``cog``, the share of each scene's five likeliest absent
    classes that is mentioned.
    """
    spoken, truths, errors, severities = [], [], Counter(), []
    for scene, text in zip(scenes, texts, strict=True):
        found = parse(text)
        spoken.append([(m.colour, m.shape) for m in found])
        truths.append({(n.colour, n.shape) for n in scene.classes})
        errors.update(world.claim_error(scene, m) for m in found)
        grades = [g for g in (world.severity(scene, m) for m in found) if g]
        severities.append(sum(grades) / len(grades) if grades else 0.0)
    result = chair(spoken, [t | {(None, shape) for _, shape in t} for t in truths])
    total, real = sum(map(len, spoken)), sum(map(len, truths))
    result["recall"] = sum(len(set(m) & t) for m, t in zip(spoken, truths, strict=True)) / real if real else NAN
    for name, error in (("attr_err", "colour"), ("count_err", "count"), ("pos_err", "position")):
        result[name] = errors[error] / total if total else NAN
    result["severity"] = sum(severities) / len(texts) if total else NAN
    result["len"] = sum(len(t.split()) for t in texts) / len(texts) if texts else NAN
    result["mentions"] = total / len(texts) if texts else NAN
    if statistics is not None:
        hit = likely = 0
        for scene, found in zip(scenes, spoken, strict=True):
            expected = {divmod(k, world.config.shapes) for k in statistics.distractors(world.class_ids(scene), 5)}
            hit, likely = hit + len(expected.intersection(found)), likely + len(expected)
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
