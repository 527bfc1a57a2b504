"""VQA accuracy against values that the released evaluation's rules give by hand, and against leaving each human out in turn."""

import random

import pytest

from mmfast.eval import vqa

# What is written and what is compared.
NORMALISED = {
    "Yes": "yes",
    " two\tdogs\n": "2 dogs",
    "none": "0",
    "eleven": "eleven",
    "a dog and the cat": "dog and cat",
    "The": "",
    "anthem": "anthem",
    "dont": "don't",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",  # lacks two, as in the released table
    "somebody'd": "somebodyd",
    "its": "its",  # a word of its own
    "yes.": "yes",
    "2.50": "2.50",
    "st. louis": "st louis",
    "a.m.": "am",
    ".5": ".5",
    "red/white": "red white",
    "red / white": "red white",
    "black-and-white": "black and white",
    "well-known, red-brown": "well known red brown",  # the comma has a blank beside it, the hyphens have none
    "red-brown -": "redbrown",  # one that has makes all of its kind go
    "1,000": "1000",
    "1,000 yes/no": "1000 yesno",  # a comma between digits: all punctuation goes
    "yes!": "yes",
    "what's this?": "what's this",
    "10:30": "10:30",
    "50%": "50%",
    "": "",
}


@pytest.mark.parametrize(("written", "compared"), NORMALISED.items())
def test_normalisation_by_hand(written, compared):
    assert vqa.normalised(written) == compared


def test_every_contraction_is_a_word_without_one_apostrophe():
    odd = {wrong: right for wrong, right in vqa.CONTRACTIONS.items() if right.replace("'", "") != wrong.replace("'", "")}
    assert not odd
    assert vqa.CONTRACTIONS["twas"] == "'twas"
    assert {w for w, right in vqa.CONTRACTIONS.items() if right == "y'all'd've"} == {"yall'd've", "y'alld've", "y'all'dve"}
    assert len(vqa.CONTRACTIONS) == 114, "as many lower-case spellings as the released table corrects"


def test_accuracy_by_hand():
    """Ten humans: n of them agree. Three of the ten choices of nine lose one of three, so that they count 2 / 3."""
    for n, want in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa.accuracy("Yes.", ["yes"] * n + ["no"] * (10 - n)) == pytest.approx(want)
    assert vqa.accuracy("2", ["two", "Two.", "2", "the two"] + ["three"] * 6) == 1
    assert vqa.accuracy("the cat", ["Cat!"]) == 1
    assert vqa.accuracy("cats", ["cat"]) == 0
    assert vqa.accuracy("a", ["a", "a"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one answer"):
        vqa.accuracy("a", [])


def test_accuracy_is_the_mean_over_all_but_one():
    draw = random.Random(0)
    for _ in range(300):
        answers = [draw.choice("xyz") for _ in range(draw.randint(2, 12))]
        left = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
        want = sum(min(1, others.count("x") / 3) for others in left) / len(left)
        assert vqa.accuracy("X", answers) == pytest.approx(want)


def test_the_letter_of_a_choice():
    for said, letter in (
        ("Heat flows. Ice melts. The answer is B.", "B"),
        ("The answer is (C)", "C"),
        ("The answer is A. The answer is A.", "A"),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is Alaska.", None),
        ("B", None),
        ("", None),
    ):
        assert vqa.letter(said) == letter
