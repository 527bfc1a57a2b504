"""One row of a user's data, in whatever published form it has, to one ``Record``.

A form is recognised by the names it has; docs/data.md shows an example of each. What a row says is never guessed at: a question has an answer,
a place has a picture, or a ValueError says in one sentence what is wrong.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from mmfast.data import images
from mmfast.data.chat import INPUT, LeftOut
from mmfast.data.episodes import of_record
from mmfast.data.images import Picture
from mmfast.data.regions import REGION
from mmfast.spec import Fixed, Pages, Shots, nearest

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# The names that rows may have: what ``columns`` may map to.
TURN_NAMES = ("from", "value", "role", "content")
NAMES = (
    "id", "image_id", "image", "images", "video", "videos", "system", "conversations", "messages", "prompt", "completion", "question", "answer", "answers",
    "caption", "captions", "instruction", "input", "output", "instances", "reformulations", "instruction_with_input", "inputs", "targets", "choices", "hint", "lecture", "solution", "text", "boxes", "box_shares", "noun_chunks", "ref_exps", "chosen", "rejected", "texts", "text_list", "image_info", "items", "example", "image_map", *TURN_NAMES,
)  # fmt: skip
# Longer records are a mistake in the data (a book in one field), and would stall a tokenizer before being cut to a few thousand tokens.
MAX_CHARACTERS = 1_000_000
# What interleaved documents have; their pictures are in it.
DOCUMENTS = ("texts", "text_list", "items", "image_map")
_MARK = re.compile("<image>|<video>")
_PLACE = re.compile(r"(_!_IMAGE\d+_!_)")  # in OpenFlamingo's generated sequences
_EXAMPLE = re.compile(r"(?:image|caption|question|answer)_(\d+)")
_TAGS = re.compile("</?phrase>|<region>|^<grounding> ")
# GRIT's boxes below this score are left out (Kosmos-2, arXiv:2306.14824, section 2).
GRIT_SCORE = 0.65
# Its grounded instructions (appendix): what is asked of a place, or begun, and the answer. The tag in front is that of the released prompts.
INSTRUCTIONS = (
    (f"<image><grounding> What is <phrase>it</phrase>{REGION}?", "It is {expression}."),
    (f"<image><grounding> What is <phrase>this</phrase>{REGION}?", "This is {expression}."),
    (f"<image><grounding> Describe <phrase>this object</phrase>{REGION}.", "This object is {expression}."),
    (f"<image><grounding><phrase>It</phrase>{REGION} is", "{expression}."),
    (f"<image><grounding><phrase>This</phrase>{REGION} is", "{expression}."),
    (f"<image><grounding><phrase>The object</phrase>{REGION} is", "{expression}."),
)

# Where a line of Unnatural Instructions has its pairs.
INSTANCES = ("instances", "reformulations")
# How a question with choices is put, and answered: as LLaVA's converter for ScienceQA writes it (arXiv:2304.08485, its mode LEA), and as
# LLaMA-Adapter's figure shows it (arXiv:2303.16199).
CHOICES = {
    "llava": ("{question}\nContext: {context}\nOptions: {options}\n", "{reason} The answer is {letter}."),
    "llama_adapter": ("Question: {question} Context: {context} Choices: {options} Answer:", "The answer is ({letter})"),
}


@dataclass(frozen=True)
class Record:
    """What one row says. Every ``<image>`` in turns or document is the place of one of the pictures, in reading order; one in an answer is to be
    drawn."""

    number: int
    id: str
    turns: tuple[tuple[str, str | None], ...] = ()  # (question, answer); a preference pair's last answer is None, and an open question's
    system: str | None = None
    pictures: tuple[Picture | images.Clip, ...] = ()
    document: str | None = None  # an interleaved document, all of it supervised
    boxes: tuple[tuple[tuple[float, ...], ...], ...] = ()  # of each <region> in turns or document, in reading order
    shares: bool = False  # whether boxes are shares of the picture's sides, and not pixels of it
    answers: tuple[str, ...] = ()  # what humans said to the one question, where there are several; the turn has the one that is learnt
    letter: str = ""  # of the right one of the choices that the one question has
    spaced: bool = False  # whether the answer goes on with the question's last sentence: a space would be between them in one text
    chosen: str | None = None
    rejected: str | None = None
    captions: tuple[str, ...] = ()  # several answers, or documents, told one at a time; turns or document hold the first
    image_id: str = ""  # the same for two records of one picture; "": its file tells

    @property
    def keys(self) -> tuple[str, ...]:
        """For each picture what is the same where another record shows it."""
        return (f"id {self.image_id}",) if self.image_id and len(self.pictures) == 1 else tuple(p.key for p in self.pictures)

    @property
    def open(self) -> bool:
        """Whether it ends with a question that has no answer."""
        return bool(self.turns) and self.turns[-1][1] is None and self.chosen is None

    @property
    def tellings(self) -> int:
        return max(len(self.captions), 1)

    def telling(self, which: int) -> Record:
        """The record with one of its captions."""
        if not self.captions:
            return self
        told = self.captions[which]
        return replace(self, turns=((self.turns[0][0], told),)) if self.document is None else replace(self, document=told)

    def boxes_in_pixels(self) -> list[list[tuple[float, ...]]]:
        """``boxes`` in pixels of the upright picture."""
        size = self.pictures[0].size() if self.shares else (1, 1)
        return [[tuple(v * size[i % 2] for i, v in enumerate(box)) for box in group] for group in self.boxes]

    def plans(self, plan: Fixed) -> list[Fixed]:
        """What becomes of each picture: those in questions may be made squares otherwise than others."""
        if self.document is not None:
            return [plan] * len(self.pictures)
        told = [
            [kind] * (text or "").count("<image>")
            for turn in self.turns
            for kind, text in zip((images.asked(plan), plan), turn, strict=True)
        ]
        return [kind for kinds in told for kind in kinds]


def paired(record: Record, captions_first: float | None) -> Record:
    """A record that is pictures and a caption as a document, the caption first in this share of records; any other as it is."""
    places = "<image>" * len(record.pictures)
    if captions_first is None or not places or len(record.turns) != 1 or record.turns[0][0].strip() != places or record.system:
        return record
    before, behind = ("", places) if _draw(record.number, "captions_first") < captions_first else (places, "")
    told = [before + caption + behind for caption in record.captions or (record.turns[0][1],)]
    return replace(record, turns=(), document=told[0], captions=tuple(told) if record.captions else ())


def cleaned(record: Record) -> Record:
    """The record with its answers as BLIP and BLIP-2 read captions (LAVIS's caption processor)."""

    def clean(text: str) -> str:
        if "<image>" in text:
            raise ValueError("has a picture in an answer, and clean is for captions; leave it off")
        words = re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:50]
        if not words:
            raise ValueError("has an answer without words; leave clean off, or the record out")
        return " ".join(words)

    turns = tuple((question, answer and clean(answer)) for question, answer in record.turns)
    return replace(record, turns=turns, captions=tuple(map(clean, record.captions)))


def parse(
    row: Any, number: int, *, root: str, frames: int = 8, columns: dict[str, str] | None = None, boxes: float = 1.0, instruct: float = 0.0,
    choices: str = "llava", pages: Pages | None = None, shots: Shots | None = None, clips: bool = False,
) -> Record:  # fmt: skip
    """The record of a row (a JSON object).

    Args:
        root: the folder that file names are relative to.
        frames: pictures that a video is read as. clips: these stand in one place, as an ``images.Clip``.
        columns: their names to ours, of the row and of its turns.
        boxes: the share of captions with places (GRIT) whose places are told; 0: none of any record's.
        instruct: the share of captions with places that become a question, or the beginning of a sentence, about one of them.
        choices: how a question with choices is put, one of ``CHOICES``.
        pages: how an interleaved document is read.
        shots: how a few-shot episode is asked, and a question without examples.

    Raises:
        ValueError: in one sentence, without the record's number.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {_kind(row)}")
    reader = _Reader(
        row, number, root, frames, columns or {}, pages or Pages(), shots or Shots(), instruct if boxes else 0.0, choices
    )  # fmt: skip
    reader.clips = clips
    record = reader.grounded(reader.read(), boxes)
    return replace(record, image_id=_name(reader.row["image_id"], "image_id")) if "image_id" in reader.row else record


def split(row: Any, columns: dict[str, str] | None = None) -> list[Any]:
    """A line of Unnatural Instructions as rows of one pair each; any other row, and one that is not as it should be, as it is.

    As the README of orhonovich/unnatural-instructions has it (arXiv:2212.09689), a line of core_data.jsonl is an ``instruction`` and a list
    ``instances`` of objects with ``instruction_with_input``, ``input``, ``constraints`` and ``output``; in full_data.jsonl a list of
    ``reformulations``, objects alike, is beside it. Hub copies hold such a list as an object of lists, too. What else is called so, as the
    things that a picture shows, is none."""
    if not isinstance(row, dict):
        return [row]
    theirs = {ours: name for name, ours in (columns or {}).items()}
    names = [theirs.get(name, name) for name in INSTANCES]
    told = [[] if _null(row.get(name)) else _rows(row[name]) for name in names]
    if None in told or not any(told) or not _are_pairs([pair for pairs in told for pair in pairs], columns or {}):
        return [row]
    rest = {name: value for name, value in row.items() if name not in names}
    return [{**rest, names[0]: [pair]} for pairs in told for pair in pairs]


def _are_pairs(told: list[Any], columns: dict[str, str]) -> bool:
    """Whether one of them has a name that a pair of instruction and output has."""
    names = {columns.get(name, name) for pair in told if isinstance(pair, dict) for name in pair}
    return not names.isdisjoint(("instruction_with_input", "output"))


def _rows(value: Any) -> list[Any] | None:
    """A list, or an object of lists of one length as a list of objects; None for what is neither."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()) and len({*map(len, value.values())}) == 1:
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    return list(value) if isinstance(value, list | tuple) else None


def name_of(row: Any, number: int, columns: dict[str, str] | None = None) -> str:
    """A row's id, ``#number`` where it has none."""
    value = _rename(row, columns or {}).get("id") if isinstance(row, dict) else None
    return f"#{number}" if value is None else _name(value, "id")


def _name(value: Any, what: str) -> str:
    if isinstance(value, float) and value.is_integer():  # as a column of numbers is read in which some are missing
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"{what}" is {_kind(value)}, expected text or a whole number')
    return str(value)


def _rename(row: dict, columns: dict[str, str]) -> dict:
    """Our names, and nothing that is null (NaN is pandas' null)."""
    told = {k: v for k, v in row.items() if not _null(v)}
    for theirs, ours in columns.items():
        if theirs in told:
            told[ours] = told.pop(theirs)
    return told


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw(number: int, what: str) -> float:
    """0 .. 1, the same for a record in every epoch."""
    return int.from_bytes(hashlib.sha256(f"{what} {number}".encode()).digest()[:7], "big") / 2**56


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _kind(value: Any) -> str:
    if _null(value):
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a surrogate pair, which is no character") from None
    return value


@dataclass
class _Said:
    """A message: its role, its text, and for each <image> or <video> in it what it shows, or None where the row's own pictures fill it."""

    role: str
    text: str
    shows: list[tuple[str, Any]]


class _Reader:
    clips = False

    def __init__(
        self, row: dict, number: int, root: str, frames: int, columns: dict[str, str], pages: Pages, shots: Shots, instruct: float, choices: str
    ):  # fmt: skip
        self.pages, self.shots, self.instruct, self.choices = pages, shots, instruct, choices
        self.row, self.number, self.root, self.frames, self.columns = _rename(row, columns), number, root, frames, columns
        self.characters = 0

    def read(self) -> Record:
        self.id = name_of(self.row, self.number)
        if "noun_chunks" in self.row or "ref_exps" in self.row:
            self.row = self.grit()
        row, has = self.row, self.row.__contains__
        if has("chosen") or has("rejected"):
            return self.preference()
        for name in ("conversations", "messages"):
            if has(name):
                return self.conversation(self.said(row[name], name), llava=name == "conversations")
        shown = has("image") or has("images")  # beside a picture instances are things that it shows
        if not shown and (has("instances") or has("reformulations")):
            return self.instance()
        if any(map(has, DOCUMENTS)):
            return self.document(*self.interleaved())
        if has("question_image") or has("image_1"):
            return self.episode()
        if has("question") and self.has_several():
            return self.answered()
        if has("choices") and not isinstance(row.get("answer"), str):  # whose answer is a text is a question like others
            return self.chosen_from()
        for question, answer in (("prompt", "completion"), ("question", "answer"), ("inputs", "targets")):  # the last are FLAN's
            if has(question) or has(answer):
                if not (has(question) and has(answer)):
                    missing, there = (answer, question) if has(question) else (question, answer)
                    raise ValueError(f'has "{there}" but no "{missing}"')
                if question == "question":
                    return self.answered()
                return self.conversation(
                    [*self.said(row[question], question, "user"), *self.said(row[answer], answer, "assistant")], llava=False
                )
        if has("instruction") or has("output"):  # Alpaca
            if not (has("instruction") and has("output")):
                missing, there = ("output", "instruction") if has("instruction") else ("instruction", "output")
                raise ValueError(f'has "{there}" but no "{missing}"')
            asked, given = (self.plain(row.get(name, ""), f'"{name}"') for name in ("instruction", "input"))
            asked += INPUT + given if given.strip() else ""  # an empty input is none
            return self.conversation(
                [*self.said(asked, "instruction", "user"), *self.said(row["output"], "output", "assistant")], llava=False
            )
        if has("captions"):
            return self.several()
        if has("caption"):
            if not (self.listed("image") or self.listed("video")):
                raise ValueError('has a "caption" but no "image"')
            return self.conversation([_Said("user", "", []), *self.said(row["caption"], "caption", "assistant")], llava=False)
        if has("text") and has("question_id"):
            return self.unanswered()
        if has("text"):
            text = self.plain(row["text"], '"text"')
            return self.document(text, [(mark, None) for mark in _MARK.findall(text)])
        known = ("conversations", "messages", "question", "prompt", "chosen", "caption", "text", "texts")
        found = ", ".join(json.dumps(str(k)[:40]) for k in list(row)[:8]) or "nothing"
        close = next((hint for k in row if k not in NAMES and (hint := nearest(str(k), NAMES))), "")
        raise ValueError(f"has none of {', '.join(known)}; it has {found}{close}, and data.columns maps other names to ours")

    # -- the forms

    def conversation(self, said: list[_Said], *, llava: bool) -> Record:
        if said and said[0].role == "assistant":  # LLaVA drops an opening that nobody asked for
            said = said[1:]
        system, turns, shows = self.turns(said, drawn=True)
        if turns[-1][1] is None:
            raise ValueError("ends with a question that has no answer")
        return Record(self.number, self.id, *self.asked(turns, shows, system, llava))

    def answered(self) -> Record:
        """A question and its answer, or several humans'. With ``shots`` it is asked as the last question of an episode is, of which
        there are no examples; one with places in its picture, and a conversation, stay as they are."""
        row, answers = self.row, self.humans()
        asked, answer, spaced = self.said(row["question"], "question", "user"), self.learnt(answers), False
        if self.shots != Shots() and [said.role for said in asked] == ["user"] and not row.keys() & {"boxes", "box_shares"}:
            text, shows = asked[0].text, asked[0].shows
            if not shows:
                shows = [(mark, None) for mark in ("<image>", "<video>") for _ in self.listed(mark[1:-1])]
                front = "".join(mark for mark, _ in shows)
            elif len(shows) == 1:
                front, text = shows[0][0], _MARK.sub("", text).strip()
            else:  # the question says which is which
                front = ""
            episode, say = of_record({"question": text}, answer[0].text.strip() if answer else "", self.shots)
            asked = [_Said("user", say.prompt(episode, lambda _: front), shows)]
            spaced = bool(say.gap(episode.question))
        return replace(self.conversation([*asked, *answer], llava=False), answers=answers, spaced=spaced)

    def has_several(self) -> bool:
        """Whether there are several humans' answers; an empty list beside an ``answer`` is none, and the answer is what there is."""
        return "answers" in self.row and not ("answer" in self.row and self.row["answers"] == [])

    def humans(self) -> tuple[str, ...]:
        """Several humans' answers, texts or objects with ``answer`` (VQAv2), or none."""
        answers = []
        for i, given in enumerate(self.sequence(self.row["answers"], "answers") if self.has_several() else ()):
            text = self.plain(given.get("answer") if isinstance(given, dict) else given, f"answers[{i}]")
            answers.append(self.unmarked(text, f"answers[{i}]"))
        if self.has_several() and not answers:
            raise ValueError('"answers" is an empty list')
        return tuple(answers)

    def learnt(self, answers: Sequence[str]) -> list[_Said]:
        """``answer``, else the most frequent of ``answers``, the first among equals."""
        told = self.row["answer"] if "answer" in self.row else Counter(answers).most_common(1)[0][0]
        return self.said(told, "answer", "assistant")

    def unanswered(self) -> Record:
        """A question of LLaVA's evaluation files: ``question_id``, ``image``, ``text`` and ``category``."""
        said = self.said(self.row["text"], "text", "user")
        if not said or not said[0].text.strip():
            raise ValueError('"text" is empty')
        system, turns, shows = self.turns(said)
        return Record(self.number, _name(self.row["question_id"], "question_id"), *self.asked(turns, shows, system, llava=True))

    def instance(self) -> Record:
        """One pair of a line of Unnatural Instructions (``split``): its ``instruction_with_input`` is the question, its ``output`` the answer. The
        ``constraints`` beside them were told to what wrote the outputs, and are not told here."""
        pairs = [pair for name in INSTANCES for pair in self.sequence(self.row.get(name, []), name)]
        if others := [pair for pair in pairs if not isinstance(pair, dict)]:
            raise ValueError(f"its instance is {_kind(others[0])}, expected an object with instruction_with_input and output")
        pairs = [_rename(pair, self.columns) for pair in pairs]
        for name in ("instruction_with_input", "output"):
            if any(name not in pair for pair in pairs):
                raise ValueError(f'its instance has no "{name}"')
        if len(pairs) != 1:
            why = "several at once are not read from a tar; use JSONL or parquet" if pairs else 'there is nothing in its "instances"'
            raise ValueError(f"has {len(pairs)} pairs of instruction and output: {why}")
        (pair,) = pairs
        asked = self.said(pair["instruction_with_input"], "instruction_with_input", "user")
        return self.conversation([*asked, *self.said(pair["output"], "output", "assistant")], llava=False)

    def chosen_from(self) -> Record:
        """ScienceQA: a question, its choices and the number of the right one, with a hint, a lecture and a solution that may be empty."""
        choices, answer = self.sequence(self.row["choices"], "choices"), self.row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices) <= 26:
            raise ValueError(
                f'"answer" is {json.dumps(answer, default=repr)[:40]}, expected the number of one of {len(choices)} choices, from 0 on, 26 at most'
            )
        options = [f"({chr(65 + i)}) {self.unmarked(self.plain(text, what := f'choices[{i}]'), what)}" for i, text in enumerate(choices)]
        said = {
            name: self.unmarked(self.plain(self.row.get(name, ""), f'"{name}"'), f'"{name}"').strip()
            for name in ("hint", "lecture", "solution")
        }
        question = self.unmarked(self.plain(self.row.get("question"), '"question"'), '"question"')
        words = {
            "question": question, "context": said["hint"] or "N/A", "options": " ".join(options), "letter": chr(65 + answer),
            "reason": " ".join(filter(None, (said["lecture"], said["solution"]))),
        }  # fmt: skip
        asked, told = (form.format(**words).lstrip() for form in CHOICES[self.choices])
        record = self.conversation([_Said("user", asked, []), _Said("assistant", told, [])], llava=False)
        return replace(record, letter=words["letter"], spaced=not asked.endswith("\n"))

    def several(self) -> Record:
        """A picture with several captions (COCO's five, the best of BLIP's CapFilt)."""
        if "caption" in self.row or not (self.listed("image") or self.listed("video")):
            raise ValueError('has both "caption" and "captions"' if "caption" in self.row else 'has "captions" but no "image"')
        captions = []
        for i, text in enumerate(self.sequence(self.row["captions"], "captions")):
            what = f"captions[{i}]"
            captions.append(self.answer(_Said("assistant", self.unmarked(self.plain(text, what), what), []), what))
        if not captions:
            raise ValueError('"captions" is an empty list')
        said = [_Said("user", "", []), _Said("assistant", captions[0], [])]
        return replace(self.conversation(said, llava=False), captions=tuple(captions))

    def episode(self) -> Record:
        """A few-shot episode: ``image_1`` with ``caption_1`` (Frozen's evaluation files) or ``answer_1`` and perhaps ``question_1``, ..,
        ``question_image``, ``question`` and ``answer`` or ``answers``. All but the answer is one question."""
        row, shots, answers = self.row, self.shots, self.humans()
        numbered = {found[1] for name in row if (found := _EXAMPLE.fullmatch(str(name)))}
        examples = range(1, 1 + len(numbered))
        told = [f"{'answer' if f'answer_{i}' in row or f'question_{i}' in row else 'caption'}_{i}" for i in examples]
        # Words that ask without a question are there where words are: those that were named, or the examples'.
        asked = ["question"] if "question" in row or not (shots.prompt or any(name.startswith("answer") for name in told)) else []
        for name in (*(name for i in examples for name in (f"image_{i}", told[i - 1])), "question_image", *asked, "answer"):
            if name not in row and not (name == "answer" and answers):
                raise ValueError(f'has {len(examples)} examples and a question, but no "{name}"')
        if both := next((i for i in examples if f"caption_{i}" in row and told[i - 1] != f"caption_{i}"), None):
            raise ValueError(f'has both "caption_{both}" and "{told[both - 1]}"')
        names = [*told, *(f"question_{i}" for i in examples if f"question_{i}" in row), *asked]
        texts = {name: self.unmarked(self.plain(row[name], f'"{name}"'), f'"{name}"') for name in names}
        answer = self.learnt(answers)
        episode, say = of_record(texts, answer[0].text.strip() if answer else "", shots)
        pictures = [*(row[f"image_{i}"] for i in examples), row["question_image"]]
        shows = [("<image>", pictures[i]) for i in ([episode.query] if shots.unseen else episode.pictures)]
        record = self.conversation([_Said("user", say.prompt(episode, unseen=shots.unseen), shows), *answer], llava=False)
        return replace(record, answers=answers, spaced=bool(say.gap(episode.question)))

    def preference(self) -> Record:
        row = self.row
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if side not in row:
                raise ValueError(f'has "{other}" but no "{side}"')
        sides = [self.said(row[side], side, "assistant") for side in ("chosen", "rejected")]
        name = next((n for n in ("prompt", "question", "conversations", "messages") if n in row), None)
        whole = [s and s[0].role != "assistant" for s in sides]  # conversations from their start, not answers alone
        if all(whole):
            # The prompt is what both conversations begin with; TRL ignores a prompt that is given beside it, too.
            shared = 0
            while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
                shared += 1
            if shared == len(sides[0]) == len(sides[1]):
                raise ValueError("chosen and rejected are the same")
            prompt, sides = sides[0][:shared], [s[shared:] for s in sides]
            if not prompt:
                raise ValueError("chosen and rejected share no beginning, so there is no prompt")
        elif any(whole):
            raise ValueError("one of chosen and rejected is a conversation and the other an answer")
        elif name is None:
            raise ValueError('has no "prompt", and chosen and rejected are not conversations that share one')
        else:
            prompt = self.said(row[name], name, "user")
        answers = []
        for side, messages in zip(("chosen", "rejected"), sides, strict=True):
            if len(messages) != 1 or messages[0].role != "assistant":
                raise ValueError(f"{side} has {len(messages)} messages after the prompt, expected one answer")
            answers.append(self.answer(messages[0], f"the {side} answer"))
        if answers[0].strip() == answers[1].strip():
            raise ValueError("chosen and rejected are the same")
        system, turns, shows = self.turns(prompt)
        if turns[-1][1] is not None:
            raise ValueError("the prompt ends with an answer, expected a question")
        return Record(self.number, self.id, *self.asked(turns, shows, system), chosen=answers[0], rejected=answers[1])

    def document(self, text: str, shows: list[tuple[str, Any]]) -> Record:
        own = any(name in self.row for name in DOCUMENTS)  # its pictures are in ``shows``, and its pieces as ``pages`` wants them
        if own and "image" in self.row:
            raise ValueError('an interleaved document has an "image" of no place')
        (text,), pictures = self.place([text], shows, own=own)
        if not own and not self.row.keys() & {"boxes", "box_shares"}:
            shown = iter(pictures)
            pieces = [(piece, next(shown) if piece == "<image>" else None) for piece in re.split("(<image>)", text) if piece.strip()]
            if (paged := self.paged(pieces)) != pieces:
                text, pictures = "".join(piece for piece, _ in paged), tuple(picture for _, picture in paged if picture is not None)
        if not _MARK.sub("", text).strip():
            raise ValueError("the document holds no text")
        return Record(self.number, self.id, document=text, pictures=pictures)

    def interleaved(self) -> tuple[str, list[tuple[str, Any]]]:
        """OBELICS: parallel ``texts`` and ``images``; MMC4: ``text_list`` and ``image_info``, or ``example`` and ``image_map``; or ``items``, each with
        text or image."""
        row = self.row
        if "text_list" in row:
            return self.matched()
        if "image_map" in row:
            return self.generated()
        if "items" in row:
            steps = [(f"items[{i}]", item) for i, item in enumerate(self.sequence(row["items"], "items"))]
            for what, item in steps:
                if not isinstance(item, dict):
                    raise ValueError(f"{what} is {_kind(item)}, expected an object with text or image")
            pairs = [(what, item.get("text"), item.get("image")) for what, item in steps]
        else:
            texts, shown = self.sequence(row["texts"], "texts"), self.sequence(row.get("images"), "images")
            if len(texts) != len(shown):
                raise ValueError(
                    f"{len(texts)} texts but {len(shown)} images; an interleaved document has one of both, or null, at each place"
                )
            pairs = [(f"texts[{i}]", text, image) for i, (text, image) in enumerate(zip(texts, shown, strict=True))]
        pieces = []
        for what, text, image in pairs:
            if not _null(text) and not _null(image):
                raise ValueError(f"{what} has a text and an image at one place, so their order is unknown")
            if not _null(text):
                pieces.append((self.unmarked(self.plain(text, what), what), None))
            elif not _null(image):
                pieces.append(("<image>", image))
        pieces = self.paged(pieces)
        return "\n".join(text for text, _ in pieces), [("<image>", image) for _, image in pieces if image is not None]

    def paged(self, pieces: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Pieces of a document, texts with None and places of pictures, as ``spec.Pages`` wants them."""
        drawn, pages = Random(self.number), self.pages
        follows, begins = drawn.random() < pages.following, max((i for i, (_, shown) in enumerate(pieces) if shown is None), default=0)
        pieces = pieces[drawn.randrange(begins + 1) if pages.window else 0 :]  # some text is left
        if follows:  # pictures go before the text that ends where they stand
            ordered: list[tuple[str, Any]] = []
            before: list[tuple[str, Any]] = []
            for text, run in itertools.groupby(pieces, key=lambda piece: piece[1] is None):
                if text:
                    before = list(run)
                else:
                    ordered, before = [*ordered, *run, *before], []
            pieces = [*ordered, *before]
        count = itertools.count(1)
        return [piece for piece in pieces if piece[1] is None or not pages.pictures or next(count) <= pages.pictures]

    def matched(self) -> tuple[str, list[tuple[str, Any]]]:
        """MMC4: every picture stands before the sentence that it was matched to; with ``pages.similarity`` they are matched anew, one to one,
        so that similarities add up to the most (OpenFlamingo, arXiv:2308.01390, section 3.2). Where some pictures are in the record, those that are not
        were not to be had."""
        row, least = self.row, self.pages.similarity
        texts = [
            self.unmarked(self.plain(t, f"text_list[{i}]"), f"text_list[{i}]")
            for i, t in enumerate(self.sequence(row["text_list"], "text_list"))
        ]
        found: list[tuple[int, Any]] = []  # place and picture
        infos = self.sequence(row.get("image_info", []), "image_info")
        there = [i for i, info in enumerate(infos) if isinstance(info, dict) and not _null(info.get("image_base64"))]
        there = there or list(range(len(infos)))
        similar = self.similarities(len(infos), len(texts))[there] if least and there else None
        anew = (
            {there[i]: place for i, place in zip(*assign(-similar), strict=True) if similar[i, place] >= least}
            if similar is not None
            else {}
        )
        for i in there:
            info = infos[i]
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(texts):
                raise ValueError(f"image_info[{i}] has matched_text_index {place!r}, expected the place of one of {len(texts)} texts")
            if least and i not in anew:
                continue
            carried = info.get("image_base64")
            shown = (info.get("image_name") or info.get("raw_url") or "") if _null(carried) else f"data:image;base64,{carried}"
            found.append((anew.get(i, place), shown))
        if least and not found:
            raise LeftOut(f"a document without a picture that is as similar to a sentence as data.pages.similarity, {least:g}")
        if self.pages.pictures and not self.pages.window:  # of a window its first are kept
            found = found[: self.pages.pictures]
        # In the order of the sentences, which need not be that of the pictures.
        pieces: list[tuple[str, Any]] = []
        for i, text in enumerate(texts):
            pieces += [*(("<image>", shown) for place, shown in found if place == i), (text, None)]
        pieces = self.paged(pieces)
        text = "".join(piece if shown is not None else f"{piece} " for piece, shown in pieces)
        return text.removesuffix(" "), [piece for piece in pieces if piece[1] is not None]

    def generated(self) -> tuple[str, list[tuple[str, Any]]]:
        """OpenFlamingo's sequences that ChatGPT wrote: each marker in ``example`` is the place of its picture in ``image_map``."""
        row, pieces = self.row, []
        if not isinstance(row["image_map"], dict):
            raise ValueError(f'"image_map" is {_kind(row["image_map"])}, expected an object of pictures by their markers')
        for piece in _PLACE.split(self.unmarked(self.plain(row.get("example"), '"example"'), '"example"')):
            if _PLACE.fullmatch(piece):
                shown = row["image_map"].get(piece)
                if not isinstance(shown, dict) or not isinstance(shown.get("base64_image"), str):
                    raise ValueError(f'"example" has the place {piece}, of which "image_map" has no base64_image')
                pieces.append(("<image>", f"data:image;base64,{shown['base64_image']}"))
            elif piece.strip():
                pieces.append((piece, None))
        if (places := sum(shown is not None for _, shown in pieces)) != len(row["image_map"]):
            raise ValueError(f'"example" has {places} places of pictures but "image_map" {len(row["image_map"])} pictures')
        pieces = self.paged(pieces)
        return "".join(piece for piece, _ in pieces), [piece for piece in pieces if piece[1] is not None]

    def similarities(self, pictures: int, texts: int) -> np.ndarray:
        """``similarity_matrix`` as numbers [pictures, texts]."""
        try:
            matrix = np.asarray(self.sequence(self.row.get("similarity_matrix"), "similarity_matrix"), dtype=float)
        except (TypeError, ValueError) as error:
            if "similarity_matrix" in str(error):
                raise
            matrix = np.empty(0)
        if matrix.size != pictures * texts or (matrix.ndim != 2 and matrix.size) or not np.isfinite(matrix).all():
            raise ValueError(
                f'"similarity_matrix" has the shape {list(matrix.shape)}, expected numbers of {pictures} images by {texts} texts'
            )
        return matrix.reshape(pictures, texts)

    # -- places

    def grounded(self, record: Record, share: float) -> Record:
        """The record with its boxes: a list for each <region>, of one box or several."""
        texts = [record.document or "", *(text or "" for turn in record.turns for text in turn), record.chosen or "", record.rejected or ""]
        names = [name for name in ("boxes", "box_shares") if name in self.row]
        places = sum(text.count(REGION) for text in texts)
        if not names:
            if places:
                raise ValueError(f'has {places} {REGION} places but no "boxes" (pixels) and no "box_shares"')
            return record
        if len(names) > 1:
            raise ValueError('has both "boxes" and "box_shares"')
        if record.chosen is not None or record.open:
            kind = "question without an answer" if record.open else "preference pair"
            raise ValueError(f'is a {kind} with "{names[0]}"; places are told in questions with answers, and documents')
        if len(record.pictures) != 1:
            raise ValueError(f'"{names[0]}" are places in one picture, and the record has {len(record.pictures)}')
        groups = tuple(self.boxes(group, f"{names[0]}[{i}]") for i, group in enumerate(self.sequence(self.row[names[0]], names[0])))
        if places != len(groups):
            raise ValueError(f"{places} {REGION} places but {len(groups)} {names[0]}")
        told = _draw(self.number, "boxes") < share if "caption" in self.row else share > 0
        if not told or not groups:

            def bare(text: str | None) -> str | None:
                return None if text is None else _TAGS.sub("", text)

            plain = tuple((bare(question), bare(answer)) for question, answer in record.turns)
            return replace(record, turns=plain, document=bare(record.document))
        return replace(record, boxes=groups, shares=names[0] == "box_shares")

    def boxes(self, value: Any, what: str) -> tuple[tuple[float, ...], ...]:
        group = self.sequence(value, what)
        group = [group] if group and not isinstance(group[0], list | tuple) else group
        if not group:
            raise ValueError(f"{what} is an empty list, expected [x1, y1, x2, y2] or several")
        for box in group:
            if not isinstance(box, list | tuple) or len(box) not in (2, 4, 8) or not all(_finite(v) for v in box):
                raise ValueError(f"{what} is {str(value)[:60]}, expected [x1, y1, x2, y2] or several (or points, or quadrilaterals)")
            if len(box) == 4 and (box[2] < box[0] or box[3] < box[1]):
                raise ValueError(f"{what} is {list(box)}: its second corner is left of or above its first")
        return tuple(tuple(float(v) for v in box) for box in group)

    def grit(self) -> dict[str, Any]:
        """GRIT as a caption with marks, or as a question with an answer: a caption, and spans of it with shares of the picture and a score,
        ``[start, end, x1, y1, x2, y2, score]``. Those of ``ref_exps`` that no other one holds count (the released code's mode "expression"), or
        else of ``noun_chunks``."""
        caption = self.plain(self.row.get("caption"), '"caption"')
        name = "ref_exps" if self.row.get("ref_exps") else "noun_chunks"
        spans: dict[tuple[int, int], list[list[float]]] = {}
        for i, span in enumerate(self.sequence(self.row.get(name, []), name)):
            if not isinstance(span, list | tuple) or len(span) != 7 or not all(_finite(v) for v in span):
                raise ValueError(f"{name}[{i}] is {str(span)[:60]}, expected [start, end, x1, y1, x2, y2, score]")
            start, end = (int(v) for v in span[:2])
            if not 0 <= start < end <= len(caption):
                raise ValueError(f"{name}[{i}] is the span {start} .. {end} of a caption of {len(caption)} characters")
            if span[6] >= GRIT_SCORE:
                spans.setdefault((start, end), []).append([float(v) for v in span[2:6]])
        kept: list[tuple[int, int]] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            if not kept or start >= kept[-1][1]:  # else inside one that counts, or across its end
                kept.append((start, end))
        row = {name: value for name, value in self.row.items() if name not in ("caption", "noun_chunks", "ref_exps")}
        if not kept:
            return {**row, "caption": caption}
        if _draw(self.number, "instruct") < self.instruct:
            start, end = kept[int(_draw(self.number, "expression") * len(kept))]
            asked, answer = INSTRUCTIONS[int(_draw(self.number, "template") * len(INSTRUCTIONS))]
            answer = answer.format(expression=caption[start:end])
            return {**row, "question": asked, "answer": answer, "box_shares": [spans[start, end]]}
        marked, last = "", 0
        for start, end in kept:
            marked += f"{caption[last:start]}<phrase>{caption[start:end]}</phrase>{REGION}"
            last = end
        return {**row, "caption": f"<grounding> {marked}{caption[last:]}", "box_shares": [spans[span] for span in kept]}

    # -- messages

    def said(self, messages: Any, name: str, role: str | None = None) -> list[_Said]:
        """Messages of a field; with ``role``, the field may also be plain text in that role, or one message."""
        if role and isinstance(messages, str):
            text = self.plain(messages, f'"{name}"')
            return [_Said(role, text, [(mark, None) for mark in _MARK.findall(text)])]
        messages = self.sequence([messages] if role and isinstance(messages, dict) else messages, name)
        said = []
        for i, message in enumerate(messages):
            what = f"{name}[{i}]"
            if not isinstance(message, dict):
                raise ValueError(f"{what} is {_kind(message)}, expected an object with from and value, or role and content")
            message = _rename(message, self.columns)
            who = message.get("from", message.get("role"))
            if not isinstance(who, str):
                raise ValueError(f"{what} has no role: expected from or role, one of {', '.join(ROLES)}")
            if who not in ROLES:
                raise ValueError(f"{what} has the unknown role {who[:40]!r}{nearest(who, ROLES)}, expected one of {', '.join(ROLES)}")
            said.append(_Said(ROLES[who], *self.content(message.get("value", message.get("content")), f"the text of {what}")))
        return said

    def content(self, content: Any, what: str) -> tuple[str, list[tuple[str, Any]]]:
        """Text, or a list of parts joined by newlines."""
        if not isinstance(content, list | tuple):
            text = self.plain(content, what)
            return text, [(mark, None) for mark in _MARK.findall(text)]
        pieces, shows = [], []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                piece = self.plain(part.get("text"), f"{what}, part {i},")
                shows += [(mark, None) for mark in _MARK.findall(piece)]
            elif kind in ("image", "image_url", "video"):
                piece = "<video>" if kind == "video" else "<image>"
                given = [part[k] for k in ("image", "video", "image_url", "url", "path", "bytes") if not _null(part.get(k))]
                shows.append((piece, given[0] if given else None))
            else:
                raise ValueError(f"{what}, part {i}, is not of a type that is read here: text, image, image_url or video")
            pieces.append(piece)
        return "\n".join(pieces), shows

    def turns(self, said: list[_Said], *, drawn: bool = False) -> tuple[str | None, list[tuple[str, str | None]], list[tuple[str, Any]]]:
        """System message, (question, answer) turns, the last answer None if there is none, and what they show. ``drawn``: answers may hold pictures."""
        system = self.row.get("system")
        system = self.unmarked(self.plain(system, '"system"'), '"system"') if system is not None else None
        if said and said[0].role == "system":
            if system:
                raise ValueError("has a system message twice: as a field and among the messages")
            system, said = self.unmarked(said[0].text, "the system message"), said[1:]
        if not said:
            raise ValueError("has a system message and nothing else" if system else "has no messages")
        for i, message in enumerate(said):
            if message.role != ("user", "assistant")[i % 2]:
                raise ValueError(
                    f"turns must alternate question, answer (and a system message only come first), but turn {i} is from the {message.role}"
                )
        turns: list[tuple[str, str | None]] = []
        for i, question in enumerate(said[::2]):
            turns.append((question.text, self.answer(said[2 * i + 1], f"answer {i}", drawn) if 2 * i + 1 < len(said) else None))
        return system or None, turns, [shown for message in said for shown in message.shows]

    def asked(
        self, turns: list[tuple[str, str | None]], shows: list[tuple[str, Any]], system: str | None, llava: bool = False
    ) -> tuple[tuple[tuple[str, str | None], ...], str | None, tuple[Picture, ...]]:
        """Turns with every picture in its place, the system message, and the pictures."""
        texts, pictures = self.place([text for turn in turns for text in turn if text is not None], shows, llava=llava)
        questions, answers = texts[::2], [*texts[1::2], *[None] * (len(texts) % 2)]
        for i, question in enumerate(questions):
            if not question.strip():
                raise ValueError(f"question {i} is empty")
        return tuple(zip(questions, answers, strict=True)), system, pictures

    def answer(self, message: _Said, what: str, drawn: bool = False) -> str:
        marks = [mark for mark, _ in message.shows if mark != "<image>" or not drawn]
        if marks:
            raise ValueError(f"{what} holds {marks[0]}; only questions may")
        if not message.text.strip():
            raise ValueError(f"{what} is empty")
        return message.text

    def plain(self, value: Any, what: str) -> str:
        self.characters += len(text := _text(value, what))
        if self.characters > MAX_CHARACTERS:
            raise ValueError(f"has {self.characters:,} characters or more, above {MAX_CHARACTERS:,}; cut it into several records")
        return text

    def unmarked(self, text: str, what: str) -> str:
        if mark := _MARK.search(text):
            raise ValueError(f"{what} holds {mark.group()}, which only questions and plain documents may")
        return text

    def sequence(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise ValueError(f'"{name}" is {_kind(value)}, expected a list')
        return list(value)

    # -- pictures

    def place(
        self, texts: Sequence[str], shows: list[tuple[str, Any]], *, llava: bool = False, own: bool = False
    ) -> tuple[list[str], tuple[Picture, ...]]:
        """Texts with one <image> for each picture, and the pictures.

        Without any place the row's one picture goes in front of the first text, as in LLaVA, and several do where TRL does so (not
        ``llava``). A single place inside a LLaVA question moves to its front, of texts that are question, answer, question, ..
        ``own``: the row's pictures are already among ``shows``.
        """
        texts, shows = list(texts), list(shows)
        given = {"<image>": [] if own else self.listed("image"), "<video>": self.listed("video")}
        if given["<video>"] and not given["<image>"] and [m for m, v in shows if v is None] == ["<image>"] * len(given["<video>"]):
            # LLaVA's video data marks a video's place by <image>.
            texts = [text.replace("<image>", "<video>") for text in texts]
            shows = [("<video>", None) if v is None else (m, v) for m, v in shows]
        for mark in ("<video>", "<image>"):
            values, what = given[mark], "pictures" if mark == "<image>" else "videos"
            places = sum(m == mark and v is None for m, v in shows)
            if values and not any(m == mark for m, _ in shows) and (len(values) == 1 or not llava):
                texts[0] = mark * len(values) + ("\n" + texts[0] if texts[0] else "")
                shows = [(mark, v) for v in values] + shows
            elif places != len(values):
                raise ValueError(f"{places} {mark} places but {len(values)} {what}")
            else:
                values = iter(values)
                shows = [(m, next(values)) if m == mark and v is None else (m, v) for m, v in shows]
        if llava and len(shows) == 1:
            mark = shows[0][0]
            texts[::2] = [f"{mark}\n{text.replace(mark, '').strip()}".strip() if mark in text else text for text in texts[::2]]
        groups = [self.picture(v, i) if m == "<image>" else self.video(v, i) for i, (m, v) in enumerate(shows)]
        if self.clips:
            groups = [group if m == "<image>" else (images.Clip(group),) for group, (m, _) in zip(groups, shows, strict=True)]
        marks: Iterator[str] = iter(["<image>" * len(group) for group in groups])
        texts = [_MARK.sub(lambda _: next(marks), text) for text in texts]
        return texts, tuple(picture for group in groups for picture in group)

    def listed(self, name: str) -> list[Any]:
        """``image`` or ``images``, ``video`` or ``videos``, as a list; a list under ``video`` is one video's frames."""
        if name in self.row and name + "s" in self.row:
            raise ValueError(f'has both "{name}" and "{name}s"')
        if name + "s" in self.row:
            return self.sequence(self.row[name + "s"], name + "s")
        value = self.row.get(name)
        if value is None:
            return []
        return list(value) if isinstance(value, list | tuple) and name == "image" else [value]

    def picture(self, value: Any, at: int) -> tuple[Picture, ...]:
        return (Picture(*self.source(value, f"image {at}")),)

    def video(self, value: Any, at: int) -> tuple[Picture, ...]:
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError(f"video {at} is an empty list of frames")
            frames = [Picture(*self.source(value[i], f"frame {i} of video {at}")) for i in range(len(value))]
            return tuple(frames[i] for i in images.frame_indices(len(frames), self.frames))
        source, _, name = self.source(value, f"video {at}")
        return images.video(source, self.frames, name)

    def source(self, value: Any, what: str) -> tuple[str | bytes, None, str]:
        """(source, no frame, name) of a file name, a data: URL, bytes, or an object with one of them."""
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if not _null(v)}
            path = value.get("path") if isinstance(value.get("path"), str) else None
            if isinstance(value.get("bytes"), bytes):
                return value["bytes"], None, f"{path or what} of record {self.number}"
            value = next((value[k] for k in ("path", "url", "bytes") if k in value), None)
        if isinstance(value, bytes):
            return value, None, f"{what} of record {self.number}"
        if not isinstance(value, str):
            raise ValueError(f"{what} is {_kind(value)}, expected a file name, a data: URL, or an object with bytes or path")
        if not value.strip():
            raise ValueError(f"{what} is an empty name; use null for a record without pictures")
        if value.startswith("data:"):
            head, comma, body = value.partition(",")
            try:
                if not comma or not head.endswith(";base64"):
                    raise ValueError("expected data:image/...;base64,...")
                return base64.b64decode(body, validate=True), None, f"{what} of record {self.number}"
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"{what} is a data: URL that cannot be read: {error}") from None
        value = _text(value, what).removeprefix("file://")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
            raise ValueError(
                f"{what} is the web address {value[:80]!r}; nothing is downloaded in training, so save it and give a file name"
            )
        return os.path.join(self.root, value), None, ""


def assign(cost: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows and the columns they get, as many as the smaller side has, so that what they cost adds up to the least: the Hungarian algorithm
    (Kuhn 1955, with Munkres' potentials), by shortest augmenting paths. cost ``[n, m]``."""
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = np.argsort(rows)
        return [rows[i] for i in order], [columns[i] for i in order]
    n, m = cost.shape
    high, low = np.zeros(n + 1), np.zeros(m + 1)  # potentials of rows and columns
    of = np.zeros(m + 1, int)  # the row of each column, counted from 1; 0: free
    for row in range(1, n + 1):
        of[0], column, least = row, 0, np.full(m + 1, np.inf)
        before, done = np.zeros(m + 1, int), np.zeros(m + 1, bool)
        while of[column]:
            done[column] = True
            reduced = cost[of[column] - 1] - high[of[column]] - low[1:]
            better = ~done[1:] & (reduced < least[1:])
            least[1:][better], before[1:][better] = reduced[better], column
            following = int(np.where(done, np.inf, least)[1:].argmin()) + 1
            step = least[following]
            high[of[done]] += step
            low[done] -= step
            least[~done] -= step
            column = following
        while column:  # along the path, every column takes the row of the one before
            of[column], column = of[before[column]], before[column]
    pairs = sorted((of[j] - 1, j - 1) for j in range(1, m + 1) if of[j])
    return [int(i) for i, _ in pairs], [int(j) for _, j in pairs]
