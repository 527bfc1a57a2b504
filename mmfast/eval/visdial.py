"""Visual Dialog v1.0 (VisDial, arXiv:1611.08669): pictures found by their dialogues, and answers ranked among a hundred (FROMAGe,
arXiv:2301.13823, section 4).

``visdial_1.0_val.json`` is ``{"data": {"dialogs": [..], "questions": [..], "answers": [..]}, ..}``; a dialogue has ``image_id``, ``caption`` and
``dialog``, rounds of ``question``, ``answer``, ``answer_options`` (numbers into the two lists) and ``gt_index``. Its dense annotations are a list
of ``image_id``, ``round_id`` (from 1) and ``gt_relevance`` (one for each option). So the challenge's published starter code reads both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mmfast.eval.chair import NAN
from mmfast.eval.ranking import ndcg, rank, ranked


@dataclass(frozen=True)
class Round:
    question: str
    answer: str
    options: tuple[str, ...]
    right: int  # among the options


@dataclass(frozen=True)
class Dialog:
    picture: int  # COCO's id
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Rated:
    """How well humans think that each option answers one round."""

    dialog: int
    round: int  # from 0
    relevance: tuple[float, ...]


def is_visdial(raw: Any) -> bool:
    """Whether a JSON file's content is Visual Dialog's."""
    return isinstance(raw, dict) and isinstance(raw.get("data"), dict) and "dialogs" in raw["data"]


def dialogs(raw: dict[str, Any], name: str = "dialogs") -> list[Dialog]:
    """All dialogues.

    Raises:
        ValueError: a round that lacks something (a test split has no answers to score), numbers that point nowhere, unlike counts of options.
    """
    data, made = raw["data"], []
    for part in ("dialogs", "questions", "answers"):
        if not isinstance(data.get(part), list):
            raise ValueError(
                f'{name}: its data has no list of {part}, expected "dialogs", "questions" and "answers" as in visdial_1.0_val.json'
            )
    for number, dialog in enumerate(data["dialogs"]):
        rounds, at = [], f"dialogue {number}"
        try:
            for i, said in enumerate(dialog["dialog"], 1):
                at = f"dialogue {number}, round {i}"
                question, answer = _line(data["questions"], said["question"]), _line(data["answers"], said["answer"])
                options = tuple(_line(data["answers"], option) for option in said["answer_options"])
                if not 0 <= said["gt_index"] < len(options):
                    raise IndexError(said["gt_index"])
                rounds.append(Round(question, answer, options, said["gt_index"]))
            if not rounds:
                raise KeyError("dialog")
            made.append(Dialog(int(dialog["image_id"]), tuple(rounds)))
        except KeyError as error:
            hint = "; a test split has no answers to score" if error.args[0] in ("answer", "answer_options", "gt_index") else ""
            raise ValueError(f"{name}: {at} lacks {error}{hint}") from None
        except IndexError as error:
            raise ValueError(f"{name}: {at} has the number {error}, which is none of what it counts") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {at} is not in Visual Dialog's form: {error}") from None
    if not made:
        raise ValueError(f"{name}: holds no dialogue")
    counts = {len(r.options) for dialog in made for r in dialog.rounds}
    if len(counts) > 1:
        raise ValueError(
            f"{name}: rounds have {min(counts)} to {max(counts)} answer options, expected as many in each (100 in the data set)"
        )
    return made


def _line(lines: Sequence[str], number: int) -> str:
    if not 0 <= number < len(lines):
        raise IndexError(number)
    if not isinstance(lines[number], str):
        raise TypeError(f"the question or answer of number {number} is {lines[number]!r}, expected text")
    return lines[number]


def dense(raw: Any, dialogs: Sequence[Dialog], name: str = "dense annotations") -> list[Rated]:
    """Ratings of the dialogues of these pictures.

    Raises:
        ValueError: no list of ratings, or one of another picture, round or number of options, or of no relevance.
    """
    of, made = {dialog.picture: number for number, dialog in enumerate(dialogs)}, []
    if not isinstance(raw, list):
        raise ValueError(f"{name}: expected a list of dense annotations")
    for number, note in enumerate(raw):
        try:
            picture, turn, relevance = int(note["image_id"]), int(note["round_id"]) - 1, tuple(map(float, note["gt_relevance"]))
        except KeyError as error:
            raise ValueError(f"{name}: annotation {number} lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: annotation {number} is not in Visual Dialog's form: {error}") from None
        if picture not in of:
            raise ValueError(f"{name}: annotation {number} is of picture {picture}, which no dialogue shows")
        at = of[picture]
        rounds = dialogs[at].rounds
        if not 0 <= turn < len(rounds):
            raise ValueError(f"{name}: annotation {number} is of round {turn + 1}, and its dialogue has {len(rounds)}, counted from 1")
        if len(relevance) != len(rounds[turn].options):
            raise ValueError(f"{name}: annotation {number} rates {len(relevance)} options of {len(rounds[turn].options)}")
        if not any(relevance):
            raise ValueError(f"{name}: annotation {number} finds no option relevant")
        made.append(Rated(at, turn, relevance))
    return made


def searched(dialog: Dialog, token: str) -> str:
    """A whole dialogue as a text that its picture is found by; the picture's caption is not told."""
    return " ".join(f"Q: {r.question}? A: {r.answer}." for r in dialog.rounds) + token


def asked(dialog: Dialog, number: int) -> str:
    """What stands between the picture and an answer of round ``number``: the rounds before it, and its question."""
    lines = []
    for before in dialog.rounds[:number]:
        lines += [f"Q: {before.question}?", f"A: {before.answer}"]
    return "\n".join([*lines, f"Q: {dialog.rounds[number].question}?", "A: "])


def score(
    dialogs: Sequence[Dialog], losses: Sequence[Sequence[Sequence[float]]], rated: Sequence[Rated] = (), *, later: int = 0
) -> dict[str, float]:
    """``recall@k`` (1, 5, 10, 20), ``mrr`` and ``mean_rank`` of the right answers among all options, and with ratings ``ndcg``.

    Args:
        losses: of each dialogue's rounds' options; the lowest is the best.
        later: how many rounds later than the rated one, over the dialogues' ends, its ratings are compared with. FROMAGe's released script counts
            ``round_id`` from 0, where the data set counts from 1, which is 1; ratings for which nothing is left do not count.
    """
    if [len(d.rounds) for d in dialogs] != [len(rounds) for rounds in losses]:
        raise ValueError("visdial.score: expected losses of every round of every dialogue")
    scores = [[-loss for loss in options] for rounds in losses for options in rounds]
    rounds = [r for d in dialogs for r in d.rounds]
    measured = ranked([rank(row, r.right) for row, r in zip(scores, rounds, strict=True)])
    if not rated:
        return measured
    starts = [0, *accumulate(len(d.rounds) for d in dialogs)]
    places = [starts[r.dialog] + r.round + later for r in rated]
    gains = [ndcg(scores[place], r.relevance) for place, r in zip(places, rated, strict=True) if place < len(scores)]
    return measured | {"ndcg": sum(gains) / len(gains) if gains else NAN}
