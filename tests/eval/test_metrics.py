"""The metrics against values worked by hand, and against readers whose behaviour is known."""

import math
import random

import numpy as np
import pytest

from mmfast.data.synthetic import World, WorldConfig
from mmfast.eval import chair, judged, pope, stats

# ------------------------------------------------------------------------------------------------------------------ CHAIR


def test_chair_by_hand():
    truths = [{"circle", "square"}, {"star"}, {"ring", "bar", "cross"}, {"circle"}]
    mentions = [["circle", "square", "star"], ["star", "star", "diamond"], ["ring", "bar"], []]
    got = chair.chair(mentions, truths)
    assert got == pytest.approx({"chair_i": 0.25, "chair_s": 0.5, "chair_s_refine": 2 / 3, "recall": 5 / 7})
    unique = chair.chair([list(dict.fromkeys(m)) for m in mentions], truths)
    assert unique["chair_i"] == pytest.approx(2 / 7)
    macro = (1 / 3 + 1 / 3 + 0) / 3
    assert got["chair_i"] != pytest.approx(macro), "micro over the corpus, not the mean over captions"


def test_silence_does_not_win():
    got = chair.chair([[], []], [{"a"}, {"b"}])
    assert math.isnan(got["chair_i"])
    assert math.isnan(got["chair_s_refine"])
    assert got["recall"] == 0
    with pytest.raises(ValueError, match="1 captions but 2 images"):
        chair.chair([[]], [{"a"}, {"b"}])


def test_caption_errors_are_disjoint():
    world = World()
    scene = next(
        s
        for s in world.scenes("eval", 200)
        if len(s.classes) == 3 and all(c.count == 1 for c in s.classes) and len({c.shape for c in s.classes}) == 3
    )
    clean = world.caption(scene).text
    got = chair.caption_metrics(world, [scene], [clean])
    assert got["chair_i"] == got["attr_err"] == got["count_err"] == got["pos_err"] == got["severity"] == 0
    assert got["recall"] == 1
    assert got["mentions"] == 3
    k = world.class_ids(scene)[0]
    absent_shape = next(s for s in range(6) if s not in {c.shape for c in scene.classes})
    other_colour = next(c for c in range(6) if c * 6 + k % 6 not in world.class_ids(scene))
    texts = {
        "chair_i": f"a red {['circle', 'square', 'triangle', 'diamond', 'cross', 'ring'][absent_shape]}.",
        "attr_err": f"a {world.class_name(other_colour * 6 + k % 6)}.",
        "count_err": f"two {world.class_name(k, 2)}.",
    }
    for key, text in texts.items():
        got = chair.caption_metrics(world, [scene], [text])
        assert got[key] == 1, (key, text)
    assert chair.caption_metrics(world, [scene], [texts["attr_err"]])["chair_i"] == 1, "a wrong colour is a false object too"
    assert chair.caption_metrics(world, [scene], [texts["count_err"]])["chair_i"] == 0
    shape = world.class_name(k).split()[1]
    assert chair.caption_metrics(world, [scene], [f"a {shape}."])["chair_i"] == 0, "without a colour the shape decides"
    assert chair.caption_metrics(world, [scene], [f"a {shape}."])["recall"] == 0, "and no class is named"


# ------------------------------------------------------------------------------------------------------------------- POPE


def test_binary_by_hand():
    got = pope.binary(tp=40, fp=15, tn=35, fn=10)
    assert got == pytest.approx({"accuracy": 0.75, "precision": 40 / 55, "recall": 0.8, "f1": 80 / 105, "yes_ratio": 0.55})
    got = pope.binary_no(tp=40, fp=15, tn=35, fn=10)
    assert (got["precision"], got["recall"], got["f1"]) == pytest.approx((35 / 45, 0.7, 70 / 95))


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is.", True),
        ("No.", False),
        ("There is not. Yes.", False),
        ("I cannot tell", True),
        ("Nothing", True),
        ("no, none", False),
    ],
)
def test_answer_reader(text, yes):
    assert pope.read_answer(text) is yes


def test_questions_are_balanced_and_true():
    world = World()
    scenes = world.scenes("eval", 100)
    questions = pope.build(world, scenes, chair.Cooccurrence(world, world.scenes("train", 1000)))
    for mode in ("positive", *pope.MODES):
        assert sum(q.mode == mode for q in questions) == 3 * sum(len(s.classes) >= 3 for s in scenes)
    for q in questions:
        assert q.answer == (q.class_id in world.class_ids(scenes[q.image]))
        assert q.text == f"is there {'an' if world.class_name(q.class_id)[0] == 'o' else 'a'} {world.class_name(q.class_id)}?"
    assert len({(q.image, q.mode, q.class_id) for q in questions}) == len(questions)


# Readers of the large world: what always-yes, a theme-guesser and an almost-seeing one score (accuracy, F1, yes ratio in percent; spread over
# five seeds of a reference run).
READERS = {
    "always": ((50, 66.7, 100), (50, 66.7, 100), (50, 66.7, 100)),
    "theme": ((88.4, 87.9, 46.0), (75.1, 77.2, 59.3), (50.0, 62.8, 84.5)),
    "seeing": ((98.9, 98.9, 49.7), (97.5, 97.5, 50.9), (95.0, 95.2, 53.4)),
}


@pytest.fixture(scope="module")
def large():
    world = World(WorldConfig.large())
    scenes = [s for s in world.scenes("eval", 700) if len(s.classes) >= 3][:500]
    return world, scenes, chair.Cooccurrence(world, world.scenes("train", 20_000))


@pytest.mark.parametrize("reader", READERS)
def test_idealised_readers(large, reader):
    world, scenes, statistics = large
    questions, dice = pope.build(world, scenes, statistics), random.Random(0)

    def answer(q):
        core = world.theme_of.get(q.class_id) == scenes[q.image].theme
        return True if reader == "always" else core if reader == "theme" else (q.answer if dice.random() < 0.9 else core)

    got = pope.score(questions, [answer(q) for q in questions])
    accuracies = []
    for mode, (accuracy, f1, yes) in zip(pope.MODES, READERS[reader], strict=True):
        values = [100 * got[k] for k in (f"pope_{mode}_accuracy", f"pope_{mode}_f1", f"yes_ratio_{mode}")]
        assert values == pytest.approx([accuracy, f1, yes], abs=3.0), (reader, mode)
        accuracies.append(values[0])
    if reader != "always":
        assert accuracies[0] > accuracies[1] > accuracies[2], "the harder the negatives, the worse a biased reader"


def test_idealised_captioners(large):
    """Truth plus one absent core class with p = .3; four random core classes; four classes drawn by their frequency."""
    world, scenes, statistics = large
    dice = random.Random(1)

    def blind() -> list[int]:
        drawn: dict[int, None] = {}
        while len(drawn) < 4:
            drawn[dice.choices(range(world.config.classes), statistics.single)[0]] = None
        return list(drawn)

    says = {
        "planted": lambda s: (
            world.class_ids(s) + ([dice.choice(world.absent_core(s))] if dice.random() < 0.3 and world.absent_core(s) else [])
        ),
        "theme": lambda s: dice.sample(world.cores[s.theme], 4),
        "blind": lambda s: blind(),
    }
    expected = {"planted": (7.2, 31.0, 100.0), "theme": (57.6, 98.8, 42.4), "blind": (90.5, 100.0, 9.5)}
    three_sd = {"planted": (1.5, 7.5, 1e-9), "theme": (1.8, 3.0, 3.0), "blind": (2.7, 3.0, 3.0)}
    for name, speak in says.items():
        got = chair.chair([speak(s) for s in scenes], [world.class_ids(s) for s in scenes])
        for key, value, within in zip(("chair_i", "chair_s", "recall"), expected[name], three_sd[name], strict=True):
            assert 100 * got[key] == pytest.approx(value, abs=within), (name, key)


# ------------------------------------------------------------------------------------------------------- judged, statistics


def test_mmhal_by_hand():
    got = judged.mmhal([6, 4, 3, 2, 0, 5])
    assert got == pytest.approx({"mmhal_score": 10 / 3, "mmhal_hallucination": 1 / 3, "mmhal_informativeness": 4 / 9}, rel=1e-9)
    assert [judged.read_rating(t) for t in ("Rating: 4", "rating: 2 or rating: 3", "great", "Rating: 10")] == [4, 0, 0, 1]
    assert judged.oracle_rating(0, 4, 4) == 6
    assert judged.oracle_rating(1, 4, 4) == 2
    assert judged.oracle_rating(2, 4, 0) == 0


def test_judge_of_video_answers_by_hand():
    replies = ["Explanation: 4 of 5 facts.\nScore: 3", "Score: 5", "I give 4. Yes, 4 of 5", "2 or 3", "none"]
    scores = [judged.read_score(r) for r in replies]
    assert scores == [3, 5, 4, 2.5, 1]
    assert judged.judged_answers([5, 3, 2, 4, 1, 2]) == pytest.approx({"judge_accuracy": 1 / 2, "judge_score": 17 / 6}, rel=1e-9)
    assert math.isnan(judged.judged_answers([])["judge_accuracy"])


def test_paired_bootstrap():
    assert stats.standard_error(0.3, 500) == pytest.approx(0.0205, abs=1e-4)
    draw = np.random.default_rng(0)
    before = (draw.random(500) < 0.3).astype(float)
    after = np.where(draw.random(500) < 0.5, 0.0, before)
    change, low, high = stats.paired_bootstrap(before, after)
    assert change == pytest.approx(after.mean() - before.mean())
    assert low < change < high < 0
    _, low, high = stats.paired_bootstrap(before, before[::-1].copy())
    assert low < 0 < high
    assert stats.ratio_of_sums(np.array([[1, 2], [0, 6]])) == 1 / 8
    with pytest.raises(ValueError, match="same images"):
        stats.paired_bootstrap(before, after[:-1])
