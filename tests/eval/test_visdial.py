"""Visual Dialog: its files, its prompts, and how answers rank, against values worked by hand."""

import pytest

from mmfast.eval import visdial

ANSWERS = ["yes", "no", "2", "red"]


def turn(question, answer, options=(0, 1, 2, 3), right=None):
    right = options.index(answer) if right is None else right
    return {"question": question, "answer": answer, "answer_options": list(options), "gt_index": right}


def file(*dialogs):
    rows = [{"image_id": picture, "caption": "two dogs", "dialog": list(rounds)} for picture, rounds in dialogs]
    return {"data": {"dialogs": rows, "questions": ["is it big", "how many"], "answers": ANSWERS}, "split": "val", "version": "1.0"}


RAW = file((185565, [turn(0, 0), turn(1, 2, (2, 3, 0, 1))]), (42, [turn(1, 3), turn(0, 1)]))


def test_dialogues_and_prompts():
    assert visdial.is_visdial(RAW)
    assert not any(map(visdial.is_visdial, ({"data": []}, [], {"data": {}}, None)))
    first, second = visdial.dialogs(RAW)
    assert first.picture == 185565
    assert first.rounds[1] == visdial.Round("how many", "2", ("2", "red", "yes", "no"), 0)
    assert visdial.searched(first, "[RET]") == "Q: is it big? A: yes. Q: how many? A: 2.[RET]"
    assert visdial.asked(first, 0) == "Q: is it big?\nA: "
    assert visdial.asked(first, 1) == "Q: is it big?\nA: yes\nQ: how many?\nA: "
    assert second.rounds[0].right == 3


def test_ratings():
    dialogs = visdial.dialogs(RAW)
    note = {"image_id": 42, "round_id": 2, "gt_relevance": [0, 1, 0.5, 0]}
    assert visdial.dense([note], dialogs) == [visdial.Rated(1, 1, (0, 1, 0.5, 0))]
    for change, sentence in (
        ({"round_id": 3}, "annotation 0 is of round 3, and its dialogue has 2, counted from 1"),
        ({"round_id": 0}, "annotation 0 is of round 0"),
        ({"image_id": 7}, "annotation 0 is of picture 7, which no dialogue shows"),
        ({"gt_relevance": [1, 0]}, "annotation 0 rates 2 options of 4"),
        ({"gt_relevance": [0, 0, 0, 0]}, "annotation 0 finds no option relevant"),
        ({"gt_relevance": 3}, "annotation 0 is not in Visual Dialog's form"),
    ):
        with pytest.raises(ValueError, match=sentence):
            visdial.dense([note | change], dialogs)
    with pytest.raises(ValueError, match="annotation 0 lacks 'round_id'"):
        visdial.dense([{"image_id": 42, "gt_relevance": []}], dialogs)
    with pytest.raises(ValueError, match="expected a list of dense annotations"):
        visdial.dense({}, dialogs)


LOSSES = [[[1, 2, 3, 4], [5, 2, 3, 9]], [[4, 3, 2, 1], [1, 1, 0, 7]]]  # the right ones, 0 0 3 1, are at 1, 3, 1, 3 (equals in order)


def test_ranks_of_answers():
    dialogs = visdial.dialogs(RAW)
    told = visdial.score(dialogs, LOSSES)
    assert told == pytest.approx({"recall@1": 0.5, "recall@5": 1, "recall@10": 1, "recall@20": 1, "mrr": 2 / 3, "mean_rank": 2})
    # Round 1 of the first, ranked 0 1 2 3, its relevance 0 1 .5 0: .479625; round 2 of the second, ranked 2 0 1 3, relevance 0 0 1 0: 1.
    rated = [visdial.Rated(0, 0, (0, 1, 0.5, 0)), visdial.Rated(1, 1, (0, 0, 1, 0))]
    assert visdial.score(dialogs, LOSSES, rated)["ndcg"] == pytest.approx((0.479625 + 1) / 2, abs=1e-5)
    # A round later: the first by the order 1 2 0 3, which is the best one; the second has none left.
    assert visdial.score(dialogs, LOSSES, rated, later=1)["ndcg"] == pytest.approx(1)
    # ... and over the end of its dialogue: 0 relevance 1 by the order 3 2 1 0, two places counted of relevance 0 .5.
    over = [visdial.Rated(0, 1, (0, 1, 0.5, 0))]
    assert visdial.score(dialogs, LOSSES, over, later=1)["ndcg"] == pytest.approx(0.5 / 1.5849625 / 1.3154649, abs=1e-6)
    with pytest.raises(ValueError, match="expected losses of every round of every dialogue"):
        visdial.score(dialogs, LOSSES[:1])


@pytest.mark.parametrize(
    ("dialog", "sentence"),
    [
        ([turn(0, 0) | {"gt_index": 4}], "dialogue 0, round 1 has the number 4, which is none of what it counts"),
        ([turn(0, 0), turn(2, 0)], "dialogue 0, round 2 has the number 2"),
        ([turn(0, 0), {"question": 0}], "dialogue 0, round 2 lacks 'answer'; a test split has no answers to score"),
        ([{"question": 0, "answer": 0}], "dialogue 0, round 1 lacks 'answer_options'; a test split has no answers to score"),
        ([turn(0, 0, (0, 9))], "dialogue 0, round 1 has the number 9"),
        ([turn(0, 0) | {"question": None}], "dialogue 0, round 1 is not in Visual Dialog's form"),
        ([], "dialogue 0 lacks 'dialog'"),
        ([turn(0, 0), turn(0, 0, (0, 1))], "rounds have 2 to 4 answer options"),
    ],
)
def test_what_is_refused(dialog, sentence):
    with pytest.raises(ValueError, match=f"val.json: {sentence}"):
        visdial.dialogs(file((1, dialog)), "val.json")
    with pytest.raises(ValueError, match="holds no dialogue"):
        visdial.dialogs(file())
    with pytest.raises(ValueError, match=r"dialogue 0, round 1 is not in .* the question or answer of number 0 is None, expected text"):
        visdial.dialogs({"data": file((1, [turn(0, 0)]))["data"] | {"questions": [None]}})
    for part in ("dialogs", "questions", "answers"):
        for wrong in (None, {"a": 1}):
            with pytest.raises(ValueError, match=f"val.json: its data has no list of {part}, expected"):
                visdial.dialogs({"data": file((1, dialog))["data"] | {part: wrong}}, "val.json")
