"""AMBER's measures on counts worked by hand."""

import math

import pytest

from mmfast.eval import amber


def test_descriptions_by_hand():
    """dog twice, a cat that is not there and is a likely invention; then a safe word, a true object and an unlikely invention; then silence."""
    mentions = [["dog", "dog", "cat"], ["picture", "car", "moon"], []]
    truths, distractors = [{"dog", "tree"}, {"car"}, {"cup"}], [{"cat", "ball"}, {"bus"}, {"plate"}]
    got = amber.generative(mentions, truths, distractors, safe={"picture"})
    assert got == pytest.approx({"amber_chair": 2 / 6, "amber_cover": 2 / 4, "amber_hal": 2 / 3, "amber_cog": 1 / 4})
    assert amber.generative(mentions, truths, distractors)["amber_chair"] == pytest.approx(3 / 6)


def test_no_inventions_are_listed():
    got = amber.generative([["dog"]], [{"dog"}], [()])
    assert math.isnan(got["amber_cog"])
    assert got["amber_chair"] == 0
    assert math.isnan(amber.generative([[]], [{"dog"}], [{"cat"}])["amber_chair"])
    with pytest.raises(ValueError, match="argument 2"):
        amber.generative([["dog"]], [], [()])


def test_printed_values_are_rounded_first():
    """Precision .8, recall 2 / 3: the script rounds to .667 and prints 72.7, from .72742; unrounded it would be .7272231439, and 8 / 11 without slack."""
    assert amber.discriminative(tp=3, fp=2, tn=4, fn=1)["f1"] == 0.727
    assert amber.f1(0.8, 0.667) == pytest.approx(0.727421443664, rel=1e-9)
    assert amber.f1(0.8, 2 / 3) == pytest.approx(0.7272231439, abs=1e-10)
    assert amber.f1(0.8, 2 / 3, 0.0) == pytest.approx(8 / 11, rel=1e-9)
    assert amber.f1(0.0, 0.0) == 0


def test_questions_about_existence():
    """All true answers are no: precision 1, recall is the accuracy, slack 1e-3."""
    got = amber.discriminative(tp=0, fp=6, tn=6, fn=0, existence=True)
    assert got == {"accuracy": 0.5, "precision": 1.0, "recall": 0.5, "f1": 0.666}  # .66622; with 1e-4 it would be .66662
    assert amber.f1(1.0, 0.5, 1e-3) == pytest.approx(1 / 1.501, rel=1e-9)


def test_one_score():
    """CHAIR 6.6 and F1 83.4 give 88.4."""
    assert amber.score(0.066, 0.834) == pytest.approx(0.884, rel=1e-9)
    assert amber.score(0.0, 1.0) == 1.0
