"""From judgements to pairs: values worked by hand, each with what a common slip gives."""

import difflib
import random

import pytest

from mmfast.data import pairs

# ---------------------------------------------------------------------------------------------------------------- scores


def test_ratings_of_silkie():
    ratings = [("5", "5", "4"), ("5", "4", "3"), ("4", "5", "5"), ("3", "5", "2")]
    scores = [pairs.mean_rating(r) for r in ratings]
    assert scores == pytest.approx([14 / 3, 4.0, 14 / 3, 10 / 3], rel=1e-9)
    assert pairs.ranked_pairs(scores) == [(0, 1), (0, 3), (2, 1), (1, 3), (2, 3)]  # 0 and 2 are equal
    scores[3] = pairs.mean_rating(("3", "N/A", "2"))
    assert scores[3] is None
    assert pairs.ranked_pairs(scores) == [(0, 1), (2, 1)]
    assert [pairs.mean_rating(r) for r in ((), ("5", None, "4"), ("nan", "5", "5"), (1, 2, 4.5))] == [None, None, None, 2.5]


def test_claims_of_rlaif_v():
    answers = [[(0.7, 0.2), (0.9, 0.05), (0.4, 0.5)], [(0.6, 0.3), (0.45, 0.5), (0.2, 0.7)], [(0.8, 0.1), (0.85, 0.1)]]
    scores = [pairs.claim_score(a) for a in answers]
    assert scores == [-1, -2, 0]
    assert pairs.ranked_pairs(scores, min_gap=1) == [(0, 1), (2, 0), (2, 1)]
    assert pairs.claim_score([(0.5, 0.5)]) == -1, "a tie is not accepted"
    assert pairs.claim_score([]) is None, "an answer that claims nothing must not win"
    assert pairs.ranked_pairs([0, -1, None, -3], min_gap=2) == [(0, 3), (1, 3)]


def test_positives_and_negatives_of_llava_hound():
    assert pairs.split_by_score([5, 3, 2, 4, 1, 2]) == ([0, 1, 3], [2, 4, 5])
    assert pairs.split_by_score([5, None, 4]) == ([0, 2], [])


def test_severity_of_hsa_dpo():
    assert pairs.mean_severity([3, 2, 1]) == 2.0
    assert pairs.mean_severity([3, 2, 1], sentences=5) == pytest.approx(1.2, rel=1e-9)
    assert pairs.mean_severity(None) == 1.0
    assert pairs.mean_severity([]) == pairs.mean_severity([], sentences=4) == 0.0


def test_reports_of_hsa_dpo():
    report = (
        "Tags:\n<object>\n1 . There is no car (Major (3 points)).\n<attribute>\nThe description suggests a red sky\n"
        "Scores:\n<object>\n1 .  a car: Major (3 points): nothing of the kind\n2. two dogs: Moderate (2 points): there is one\n"
        "<attribute>\nThe description suggests a red sky: Minor (1 point): it is pink, not Major (3 points)\n"
    )
    assert pairs.read_severities(report) == [("object", 3), ("object", 2), ("attribute", 1)]
    assert pairs.read_severities(" NO HALLUCINATION\n") == []
    with pytest.raises(ValueError, match="neither scores nor NO HALLUCINATION: 'I see"):
        pairs.read_severities("I see nothing wrong")


# --------------------------------------------------------------------------------------------------------------- filters

WORDS = [(50, 60), (80, 70), (40, 80), (90, 92), (30, 100), (55, 60)]
TEXTS = [("a " * chosen, "b " * rejected) for chosen, rejected in WORDS]


def test_length_filter_of_rlaif_v():
    kept, limit, gap = pairs.balance_lengths(TEXTS)
    assert [WORDS[i] for i in kept] == [(80, 70), (90, 92), (55, 60)]
    assert limit == 0.10
    assert gap == pytest.approx(1 / 74, rel=1e-9)
    assert [sum(WORDS[i][side] for i in kept) / 3 for side in (0, 1)] == [75, 74]
    for limit, count, want in ((0.02, 1, 0.142857), (0.04, 2, 0.049383), (0.18, 4, 0.024823), (0.52, 5, 0.129834)):
        kept, _, gap = pairs.balance_lengths(TEXTS, [limit])
        assert len(kept) == count
        assert gap == pytest.approx(want, abs=5e-7)


def test_length_filter_at_its_edges():
    kept, limit, _ = pairs.balance_lengths([*TEXTS, ("the same", " the same ")])
    assert (kept, limit) == ([1, 3, 5], 0.10), "equal texts teach nothing"
    kept, limit, gap = pairs.balance_lengths([("one", "one two three four")], [0.0, 0.5])
    assert kept == []
    assert limit != limit
    assert gap != gap
    assert pairs.balance_lengths([])[0] == []
    assert pairs.balance_lengths([("something", ""), ("a b", "c d")]) == ([0, 1], 0.0, 0.5), "a rejected text of no words"


def test_long_answers_of_bpo():
    assert pairs.within_words(["w " * 350, "w"])
    assert not pairs.within_words(["w", "w " * 351])
    assert pairs.within_words(["w" * 1000])


# ------------------------------------------------------------------------------------------------------------ corrections


def changed(rejected, chosen, **options):
    """Places of both sides."""
    segments = pairs.changed_segments(rejected, chosen, **options)
    return [[t for segment in segments for t in range(*segment[side])] for side in (0, 1)]


def test_segments_of_rlhf_v():
    assert changed(range(1, 11), [1, 2, 3, 4, 50, 60, 7, 8, 9, 10]) == [[4, 5], [4, 5]]
    assert changed(range(1, 9), [1, 2, 3, 4, 99, 5, 6, 7, 8]) == [[], []], "an insertion changes nothing"
    # 5, 6 stand on both sides, but two tokens are no match; nor are the ends
    got = changed([1, 2, 3, 4, 9, 5, 6, 9, 7, 8, 10], [1, 2, 3, 4, 20, 5, 6, 21, 7, 8, 10])
    assert got == [[4, 5, 6, 7], [4, 5, 6, 7]]
    assert changed([1, 2, 3, 4, 9, 5, 6, 9, 7, 8, 10], [1, 2, 3, 4, 20, 5, 6, 21, 7, 8, 10], min_match=1) == [[4, 7], [4, 7]]
    assert changed([1, 2], [3]) == [[0, 1], [0]]
    assert changed([], []) == changed([1, 2, 3], [1, 2, 3]) == [[], []]


def test_frequent_tokens_start_no_match_under_autojunk():
    x, tokens = 1, []
    for _ in range(250):
        x = (1103515245 * x + 12345) % 2**31
        tokens.append((x >> 16) % 30)
    assert tokens[:5] == [8, 28, 3, 25, 1]
    corrected = [5555 if i == 60 else 5556 if i == 120 else t for i, t in enumerate(tokens)]
    assert changed(tokens, corrected) == [[60, 120], [60, 120]]
    assert [len(side) for side in changed(tokens, corrected, autojunk=True)] == [61, 61]


def test_weights_of_corrected_tokens():
    weights = pairs.correction_weights([1, 2, 3, 7, 8, 4, 5, 6], [1, 2, 3, 9, 4, 5, 6], 5.0)
    assert weights == ([1, 1, 1, 5, 5, 1, 1, 1], [1, 1, 1, 5, 1, 1, 1])
    assert pairs.correction_weights("same text", "same text", 1.1) == ([1.0] * 9, [1.0] * 9)


def test_with_single_tokens_segments_are_what_difflib_replaces():
    dice = random.Random(0)
    for _ in range(50):
        a, b = ([dice.randrange(6) for _ in range(dice.randrange(30))] for _ in range(2))
        want = [
            ((i0, i1), (j0, j1)) for tag, i0, i1, j0, j1 in difflib.SequenceMatcher(None, a, b, False).get_opcodes() if tag == "replace"
        ]
        assert pairs.changed_segments(a, b, min_match=1) == want
