"""From conversations to token ids and labels. Labels follow from where a token's text ends, so neither can drift."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from mmfast.data.regions import REGION, Placement, placed, write
from mmfast.spec import Fixed, nearest

IGNORE = -100
# Between an instruction and its input, in one question (Alpaca).
INPUT = "\n\n### Input:\n"


class LeftOut(ValueError):
    """A record that a setting leaves out, which is no fault of it."""


@dataclass(frozen=True)
class Template:
    """The words around turns. Only answers, and the end token where it follows one, are supervised (but for ``mark`` and ``role``)."""

    system: str = ""
    system_with_input: str = ""  # in its place where the first question has an input
    before_system: str = ""  # the system's words or a record's own system message, where there are any
    after_system: str = ""
    system_asked: bool = False  # all that stands in the first question, behind ``before``
    before: str = ""  # a question
    picture: str = "<image>"  # how a picture is written in a question
    between: str = ""  # question and answer
    after: str = ""  # an answer
    mark: str = ""  # stands before every question and behind the last answer, learnt: an answer that is generated ends with it
    role: str = ""  # stands before an answer, learnt
    begin: bool | None = True  # the beginning token first; None: where the tokenizer itself puts it before a text
    begin_each: bool = False  # ... and before every question
    end_each: bool = True  # the end token after every answer, or after the last alone
    keep_question: bool = True
    end: str = ""  # in place of the tokenizer's end token
    end_cut: bool = True  # what is learnt and cut ends with it all the same
    picture_first: bool = False  # the first question's pictures stand before the beginning token
    chunk: str = ""  # in a document, before every picture but the first and at the end: what was said of the one before is over
    only_seen: bool = False  # of a document only what follows a picture is supervised, up to the end of its chunk
    learn_begin: bool = False  # ... which is learnt
    end_asked: bool = False  # the end token behind the last question, as an encoder reads its texts
    prefix: bool = False  # of what is learnt a beginning is read instead: so many tokens, none to all but the last, drawn once a text
    tight: bool = False  # no spaces beside a picture in a question
    whole: bool = False  # all between two pictures or ends is tokenised as one text, else questions and answers each by themselves

    def words(self, question: str, system: str | None = None) -> str:
        """The system's words before a first question, or those of ``system`` in their place."""
        own = self.system_with_input if self.system_with_input and INPUT in question else self.system
        told = own if system is None else system
        return self.before_system + told + self.after_system if told else ""

    def begins(self, tokenizer: Any) -> bool:
        """Whether the beginning token comes first."""
        if self.begin is None:
            return tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
        return self.begin

    @property
    def stop(self) -> str:
        """A text that ends an answer that is generated, for templates without a token that does."""
        return self.after + self.mark.strip() if self.mark else ""


# LLaVA's words. Its first release calls who asks a human, and in its demo's form with tags a sentence is joined without a space.
_USER = "A chat between a curious user and an artificial intelligence assistant. "
_HUMAN = _USER.replace("user", "human")
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_SEES = "able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."
_TAGS = {
    "system": f"{_USER}The assistant is {_SEES}The visual content will be provided with the following format: <Image>visual content</Image>.",
    "picture": "<Image><image></Image>",
}
# Turns between ###, which is learnt as an answer's end; so are the words that announce an answer.
_V0 = Template(
    system=_HUMAN + _POLITE.format("human"),
    after_system="\n\n",
    mark="### ",
    before="Human: ",
    between="\n",
    role="### Assistant: ",
    after="\n",
    end_each=False,
    whole=True,
)
_V1 = Template(system=_USER + _POLITE.format("user"), after_system=" ", before="USER: ", between=" ASSISTANT: ", whole=True)
_T5 = Template(end_each=False, picture_first=True, end_asked=True)

TEMPLATES = {
    # Nothing but the words: the tiny models.
    "bare": Template(end_each=False),
    # Nothing but the words, and each answer ends: Kosmos-2's instructions.
    "kosmos": Template(),
    # Few-shot episodes, whose words mmfast.data.episodes has; a picture and its caption as examples of one are, without more words.
    "frozen": Template(end_each=False),
    "flamingo": Template(after="<|endofchunk|>", chunk="<|endofchunk|>"),
    # OpenFlamingo calls its tokenizer: LLaMA's begins a text, GPT-NeoX's and MPT's do not.
    "open_flamingo": Template(after="<|endofchunk|>", chunk="<|endofchunk|>", only_seen=True, begin=None),
    # LLaVA's alignment stage: the picture, then its caption; the question is dropped.
    "plain": Template(after="\n", end_each=False, keep_question=False),
    # FROMAGe: the picture, then a text from its beginning token to the token that is compared with pictures.
    "fromage": Template(end_each=False, keep_question=False, end="[RET]", picture_first=True),
    # BLIP-2 with OPT: the picture, then a text from its beginning token, which is learnt, to the line's end.
    "blip2": Template(end_each=False, keep_question=False, end="\n", picture_first=True, learn_begin=True),
    # ... and its fine-tuning with a prompt, which is not learnt (nor is the token before it): the record's, that of captions, that of questions.
    "blip2_prompt": Template(end_each=False, end="\n", picture_first=True),
    "blip2_caption": Template(before="a photo of", end_each=False, keep_question=False, end="\n", picture_first=True),
    "blip2_vqa": Template(before="Question: ", between=" Answer:", end_each=False, end="\n", picture_first=True),
    # BLIP-2 with FlanT5, as its paper has it: the picture, then a text of which the encoder reads a beginning and the decoder learns the rest. With
    # a prompt, and in the released code's pre-training without (a record's question is empty there), the encoder reads up to an end token.
    "blip2_t5": Template(end_each=False, keep_question=False, picture_first=True, prefix=True),
    "blip2_t5_prompt": _T5,
    "blip2_t5_caption": replace(_T5, before="a photo of", keep_question=False),
    "blip2_t5_vqa": replace(_T5, before="Question: ", between=" Answer:"),
    # Vicuna v1, LLaVA's instruction stage; the same with the first release's sentence, and with a picture between tags.
    "vicuna_v1": _V1,
    "llava_v1": replace(_V1, system=_HUMAN + _POLITE.format("human")),
    "llava_v1_mmtag": replace(_V1, **_TAGS),
    # LLaVA's first release, as its training writes it.
    "llava_v0": _V0,
    "llava_v0_mmtag": replace(_V0, **_TAGS),
    # LLaVA over LLaMA-2's chat models: the system's words are part of the first question.
    "llava_llama_2": Template(
        system=f"You are a helpful language and vision assistant. You are {_SEES}",
        before_system="<<SYS>>\n",
        after_system="\n<</SYS>>\n\n",
        system_asked=True,
        before="[INST] ",
        between=" [/INST] ",
        after=" ",
        begin_each=True,
        whole=True,
    ),
    # LLaVA over MPT's chat model.
    "mpt": Template(
        system="A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>",
        before="<|im_start|>user\n",
        between="<|im_end|><|im_start|>assistant\n",
        after="<|im_end|>",
        begin=False,
        end_each=False,
        end="<|im_end|>",
        end_cut=False,
        whole=True,
    ),
    # Stanford Alpaca, and LLaMA-Adapter after it: the answer follows the colon at once.
    "alpaca": Template(
        system="Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        system_with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n",
        before="### Instruction:\n",
        between="\n\n### Response:",
        whole=True,
    ),
    # Idefics' instructed models, as their cards show it; the tokens around pictures are the fusion's (``System.borders``).
    "idefics": Template(
        before="User: ",
        between="<end_of_utterance>\nAssistant:",
        after="<end_of_utterance>\n",
        end_each=False,
        end="<end_of_utterance>",
        tight=True,
    ),
    # Chameleon's fine-tuning: one reserved token between question and answer, and the end token behind an answer.
    "chameleon": Template(between="<reserved08706>"),
}


def check_template(name: str) -> None:
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}{nearest(name, TEMPLATES)}, expected one of {', '.join(map(repr, TEMPLATES))}")


def encode(
    tokenizer: Any, template: str, turns: Sequence[tuple[str, str | None]], *, image_tokens: int, image_token: int, max_length: int = 2048,
    system: str | None = None, borders: Sequence[int] = (), learn_pictures: bool = False, last_alone: bool = False, spaced: bool = False,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids and labels of a conversation; an answer of None leaves the prompt open for generation. Answers are supervised, with ``last_alone``
    none but the last.

    Each ``<image>`` becomes ``image_tokens`` places between ``borders`` (the ids before and behind a picture, if any). With ``learn_pictures``
    those in a supervised text are supervised: the label of a place is the placeholder, for which the model puts the picture's own token. What is longer than ``max_length`` (places counted) loses its end, and a
    picture that would lose its own end goes whole. ``system`` takes the place of the template's. ``spaced``: answers go on with the sentences of
    their questions, where the template has no words between them.

    Raises:
        ValueError: unknown template, a prompt that is longer than ``max_length``, answers all beyond it, or a picture in an answer without
            ``learn_pictures``.
    """
    check_template(template)
    form = TEMPLATES[template]
    line = _Line(
        tokenizer,
        image_tokens,
        image_token,
        borders,
        learn_pictures,
        end=form.end if form.end_cut else "",
        begin=form.begins(tokenizer) and not form.picture_first,
        whole=form.whole,
    )
    words = form.words(turns[0][0] if turns else "", system)
    if not form.system_asked:
        line.add(words)
    for i, (question, answer) in enumerate(turns):
        first, learnt = i == 0, i == len(turns) - 1 or not last_alone
        if not form.keep_question:
            question = "<image>" * question.count("<image>")
        if form.picture_first and first:
            line.add("<image>" * question.count("<image>"))
            question = question.replace("<image>", "").strip()
            line.begin(learnt=form.learn_begin)
        if form.begin_each and not first:
            line.begin()
        between, role = form.between, form.role
        if form.whole and answer is None:  # what a whole text goes on with brings the space before it
            between, role = between.rstrip(" "), role.rstrip(" ")
        asked = form.before + (words if form.system_asked and first else "") + question.replace("<image>", form.picture) + between
        line.add(form.mark, supervised=not last_alone)
        line.add(re.sub(" *<image> *", "<image>", asked) if form.tight else asked)
        if form.end_asked and i == len(turns) - 1:
            line.end(supervised=False)
        line.add(role, supervised=not last_alone and answer is not None)
        if answer is None:
            if len(line) > max_length:
                raise ValueError(f"the prompt has {len(line)} tokens with its pictures, more than max_length={max_length}")
            break
        if "<image>" in answer and not learn_pictures:
            raise ValueError(f"answer {i} holds <image>, and this system does not draw; only questions may")
        if form.chunk:
            answer = answer.strip()
        if spaced and form.keep_question and not form.between and not asked[-1:].isspace():
            answer = _going_on(tokenizer, answer)
        if form.picture_first and asked:
            answer = " " + answer.lstrip()  # the prompt and what follows are one sentence, whose words begin with their spaces
        line.add(answer + form.after, supervised=learnt)
        if i == len(turns) - 1:
            line.add(form.mark, supervised=True)
        if form.end_each or (i == len(turns) - 1 and not form.after):
            line.end(supervised=learnt)
    return line.cut(max_length, form.prefix)


def _going_on(tokenizer: Any, text: str) -> str:
    """A text that is tokenised by itself so that it gives the tokens which it would have behind another word: with a space in front, unless the
    tokenizer begins every text as it begins a word (SentencePiece's; those of words)."""
    return text if behind_a_word(tokenizer, " a") == tokenizer("a", add_special_tokens=False)["input_ids"] else " " + text


def behind_a_word(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that stands right behind a word: a tokenizer of LLaMA's first kind puts a space before what stands alone."""
    word, both = (tokenizer(told, add_special_tokens=False)["input_ids"] for told in ("a", f"a{text}"))
    return both[len(word) :]


def encode_document(
    tokenizer: Any, text: str, *, image_tokens: int, image_token: int, max_length: int = 2048, borders: Sequence[int] = (),
    learn_pictures: bool = False, template: str = "bare",
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids and labels of an interleaved document: all its text is supervised (but for ``Template.only_seen``), and with
    ``learn_pictures`` its pictures are. Without, the first of ``borders`` is where something comes before it: that a picture follows is said
    by the text (Kosmos-1). As in ``encode`` otherwise.

    Raises:
        LeftOut: with ``Template.only_seen``, no text follows a picture within ``max_length``.
    """
    form = TEMPLATES[template]
    line = _Line(tokenizer, image_tokens, image_token, borders, learn_pictures, begin=form.begins(tokenizer))
    if form.chunk:
        line.add_chunks(text, form.chunk, form.only_seen)
    else:
        line.add(text, supervised=True)
    line.end(supervised=not form.only_seen)
    if form.only_seen and all(label == IGNORE for label in line.labels[:max_length]):
        raise LeftOut(f"no picture in the first {max_length} tokens, and the template {template} learns what is said of pictures alone")
    return line.cut(max_length, form.prefix)


def encode_parts(
    tokenizer: Any, parts: Sequence[str | None], *, image_tokens: int, image_token: int, borders: Sequence[int] = (), begin: str = "row",
) -> list[int]:  # fmt: skip
    """Token ids of texts and pictures (None) in any order, each text tokenised by itself, for a model to go on with. ``begin``: where the
    beginning token stands: before the whole "row", before the first "text", before "each" text, or "never".

    Raises:
        ValueError: a text with ``<image>`` in it.
    """
    line = _Line(tokenizer, image_tokens, image_token, borders, begin=begin == "row")
    waiting = begin in ("text", "each")
    for part in parts:
        if part is not None and "<image>" in part:
            raise ValueError(f"the text {part[:60]!r} holds <image>; give the picture itself as a part, where it stands")
        if part is not None and waiting:
            line.begin()
            waiting = begin == "each"
        line.add("<image>" if part is None else part)
    return line.ids


def last_token(tokenizer: Any, template: str) -> int:
    """What an answer that is generated ends with: the template's end, or what closes a picture's chunk in its documents."""
    form = TEMPLATES[template]
    return end_token(tokenizer, form.end or form.chunk)


def end_token(tokenizer: Any, end: str = "") -> int:
    """The token of a template's ``end``; the tokenizer's own end token without one, or where that is no single token of it (a line end in a
    tokenizer of words)."""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return ids[0] if len(ids) == 1 else tokenizer.eos_token_id


class _Line:
    """Token ids and labels that grow piece by piece. ``end``: a token in place of the tokenizer's own, which survives a cut in what is learnt."""

    def __init__(
        self, tokenizer: Any, image_tokens: int, image_token: int, borders: Sequence[int] = (), learn_pictures: bool = False, *, end: str = "",
        begin: bool = True, whole: bool = False,
    ):  # fmt: skip
        self.tokenizer, self.learn_pictures = tokenizer, learn_pictures
        self.whole = whole and getattr(tokenizer, "is_fast", False)  # others do not tell where in the text a token stands
        self.waiting: list[tuple[str, bool]] = []  # text that is not tokenised yet, and whether it is supervised
        self.picture = [*borders[:1], *[image_token] * image_tokens, *borders[1:]]
        self.shared, self.announced = len(borders) == 2 and borders[0] == borders[1], len(borders[:1])
        self.pictures: list[tuple[int, int]] = []  # where each begins and ends
        self.kept = end_token(tokenizer, end) if end else None
        self.ids, self.labels = [], []
        if begin:
            self.begin()

    def __len__(self) -> int:
        self._tokenise()
        return len(self.ids)

    def begin(self, learnt: bool = False) -> None:
        self._tokenise()
        first = self.tokenizer.bos_token_id
        if first is not None:
            self.ids.append(first)
            self.labels.append(first if learnt else IGNORE)

    def add(self, text: str, supervised: bool = False) -> None:
        for i, piece in enumerate(text.split("<image>")):
            if i:
                self._tokenise()
                joins = self.shared and self.ids[-1:] == self.picture[:1]  # adjacent pictures have one border between them
                picture = self.picture[joins:]
                self.pictures.append((len(self.ids), len(self.ids) + len(picture)))
                told = self.announced if len(self.ids) > 1 and not joins else 0  # behind more than the beginning token
                told = len(picture) if self.learn_pictures else told
                self.ids.extend(picture)
                self.labels.extend(picture[:told] + [IGNORE] * (len(picture) - told) if supervised else [IGNORE] * len(picture))
            self.waiting.append((piece, supervised))
        if not self.whole:
            self._tokenise()

    def _tokenise(self) -> None:
        """What waits, as one text. A token is supervised if its last character is: the space before an answer is part of its first word."""
        pieces, self.waiting = [piece for piece in self.waiting if piece[0]], []
        if not pieces:
            return
        text, known = "".join(text for text, _ in pieces), len({supervised for _, supervised in pieces}) == 1
        new = self.tokenizer(text, add_special_tokens=False, **({} if known else {"return_offsets_mapping": True}))
        learnt = [supervised for text, supervised in pieces for _ in text]  # of every character
        ends = [1] * len(new["input_ids"]) if known else [end for _, end in new["offset_mapping"]]
        self.ids.extend(new["input_ids"])
        self.labels.extend(token if learnt[max(end, 1) - 1] else IGNORE for token, end in zip(new["input_ids"], ends, strict=True))

    def add_chunks(self, text: str, end: str, only_seen: bool) -> None:
        """A document as chunks, each of a picture and what is said of it, closed by ``end``; neither token has a space beside it."""
        before, *chunks = text.split("<image>")
        self.add(before.strip() if chunks else before.strip().removesuffix(end).rstrip() + end, supervised=not only_seen)
        for chunk in chunks:
            self.add("<image>")
            seen, closed, after = (
                chunk.strip().removesuffix(end).partition(end)
            )  # closed: within the text, and what follows is of no picture
            self.add(seen.strip() + end, supervised=True)
            if closed:
                self.add(after.strip() + end, supervised=not only_seen)

    def end(self, supervised: bool = True) -> None:
        self._tokenise()
        token = self.tokenizer.eos_token_id if self.kept is None else self.kept
        self.ids.append(token)
        self.labels.append(token if supervised else IGNORE)

    def cut(self, max_length: int, prefix: bool = False) -> tuple[list[int], list[int]]:
        """ids and labels, at most so many; with ``prefix`` the first labels are not learnt, as many as their tokens draw."""
        whole = len(self)
        end = next((first for first, last in self.pictures if first < max_length < last), max_length)
        ids, labels = self.ids[:end], self.labels[:end]
        if self.kept is not None and whole > max_length and labels and labels[-1] != IGNORE:  # an answer is cut, and ends all the same
            ids, labels = [*ids[:-1], self.kept], [*labels[:-1], self.kept]
        if whole > max_length and any(x != IGNORE for x in self.labels) and all(x == IGNORE for x in labels):
            raise ValueError(
                f"nothing to learn is left after the cut at max_length={max_length}; the whole has {whole} tokens with its pictures"
            )
        if prefix and (learnt := [i for i, label in enumerate(labels) if label != IGNORE]):
            for i in learnt[: Random(repr(labels)).randrange(len(learnt))]:
                labels[i] = IGNORE
        return ids, labels


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, a template and a picture's number of tokens, from conversations to ids. A class, so that a loader's processes can be handed it."""

    tokenizer: Any
    template: str
    image_tokens: int
    image_token: int
    pad_token: int
    max_length: int = 2048
    borders: tuple[int, ...] = ()
    learn_pictures: bool = False
    regions: Any = None  # how places are written, a mmfast.data.regions.Format
    plan: Fixed | None = None  # what becomes of a picture, and so of places in it
    one_run: str = ""  # the family of a language model that learns one run of tokens a row, as an encoder-decoder does

    def __call__(
        self, turns: Sequence[tuple[str, str | None]], system: str | None = None, *, spaced: bool = False
    ) -> tuple[list[int], list[int]]:
        """ids and labels of turns."""
        ids, labels = encode(self.tokenizer, self.template, turns, system=system, spaced=spaced, **self._sizes())
        return (ids, labels) if turns and turns[-1][1] is None else self._whole(ids, labels)  # labels of a prompt are not looked at

    @property
    def end_token(self) -> int:
        """What an answer ends with."""
        return last_token(self.tokenizer, self.template)

    @property
    def stop(self) -> str:
        """What it ends with where that is no token (``Template.stop``)."""
        return TEMPLATES[self.template].stop

    def record(self, record: Any) -> tuple[list[int], list[int]]:
        """ids and labels of a ``mmfast.data.records.Record``: a conversation or a document."""
        record = self.placed(record)
        return self.document(record.document) if record.document is not None else self(record.turns, record.system, spaced=record.spaced)

    def document(self, text: str) -> tuple[list[int], list[int]]:
        """ids and labels of an interleaved document, all of it supervised."""
        return self._whole(*encode_document(self.tokenizer, text, template=self.template, **self._sizes()))

    def placed(self, record: Any) -> Any:
        """The record's text with its boxes in this system's words, moved as its picture is; one of which too little is left is left out. One
        without boxes is as it was."""
        if not record.boxes:
            return record
        if self.regions is None:
            raise ValueError("speaks of places in its picture, and this system does not; set regions, or data.boxes to 0")
        placement = self.placement(record)
        moved = [[kept for box in group if (kept := placement.keep(box)) is not None] for group in record.boxes_in_pixels()]
        texts = [record.document] if record.document is not None else [text for turn in record.turns for text in turn]
        told = []
        for text in texts:
            count = text.count(REGION)
            told.append(write(text, moved[:count], self.regions, placement.size))
            moved = moved[count:]
        if record.document is not None:
            return replace(record, document=told[0], boxes=())
        return replace(record, turns=tuple(zip(told[::2], told[1::2], strict=True)), boxes=())

    def placement(self, record: Any) -> Placement:
        """Where the record's one picture comes to lie as the system sees it."""
        return placed(record.pictures[0].size(), record.plans(self.plan)[0])

    def answer(self, record: Any, text: str) -> tuple[list[int], list[int]]:
        """ids and labels of a preference record's conversation with this answer at its end; earlier answers are part of the prompt."""
        turns = [*record.turns[:-1], (record.turns[-1][0], text)]
        return encode(self.tokenizer, self.template, turns, system=record.system, last_alone=True, **self._sizes())

    def _whole(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        learnt = [i for i, label in enumerate(labels) if label != IGNORE] if self.one_run else []
        if learnt and learnt[-1] - learnt[0] >= len(learnt):
            raise ValueError(
                f"something stands between the texts that are learnt (a second question, a picture), which the decoder of {self.one_run} would read "
                "in training, and its encoder when it answers; give each answer a record of its own"
            )
        return ids, labels

    def _sizes(self) -> dict[str, int]:
        return {
            "image_tokens": self.image_tokens, "image_token": self.image_token, "max_length": self.max_length, "borders": self.borders,
            "learn_pictures": self.learn_pictures,
        }  # fmt: skip


@dataclass(frozen=True)
class TextSide:
    """From conversations to what a model reads that compares pictures with texts: a picture's place (``image_token``, no word), then the first
    token, the answers, the last token. What is longer than ``max_length`` tokens loses its end but not the last token.

    ``decode``: the token that the first one becomes where text is to be written.
    """

    tokenizer: Any
    first: int
    last: int
    decode: int
    pad_token: int
    max_length: int = 32
    image_tokens: int = 1
    image_token: int = -1

    def __call__(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> tuple[list[int], list[int]]:
        if any("<image>" in (answer or "") for _, answer in turns):
            raise ValueError("holds a picture in an answer, and captions that are compared with pictures are texts; only questions may")
        pictures = sum(question.count("<image>") for question, _ in turns)
        text = self.text(" ".join(answer for _, answer in turns if answer))
        return [self.image_token] * pictures + text, [IGNORE] * pictures + text

    def record(self, record: Any) -> tuple[list[int], list[int]]:
        """ids and labels of a ``mmfast.data.records.Record``."""
        if record.document is not None:
            raise ValueError("is a document; pictures are compared with captions, a conversation each")
        if record.boxes:
            raise ValueError("speaks of places, and captions that are compared with pictures have none; set data.boxes to 0")
        return self(record.turns)

    def text(self, text: str) -> list[int]:
        words = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.first, *words[: self.max_length - 2], self.last]

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask ``[B, S]`` of texts alone."""
        rows = [self.text(text) for text in texts]
        return pad(rows, self.pad_token), pad([[1] * len(row) for row in rows], 0)


@dataclass(frozen=True)
class Questions:
    """What a Q-Former reads beside the pictures of rows that are laid out for a language model: of each row all words before the first that is
    supervised (of a prompt all), told anew in its own words. Special tokens are left out, and so is what is more than ``side.max_length``
    tokens, from the front.

    Called with rows [B, T] and their labels (None: prompts), it gives ``qformer_input_ids`` and ``qformer_attention_mask`` [R, S], a question for
    every picture as it is shown.
    """

    side: TextSide
    tokenizer: Any  # of the rows
    image_tokens: int
    image_token: int

    def __call__(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        left_out, asked = {*self.tokenizer.all_special_ids, self.image_token}, []
        for i, row in enumerate(ids.tolist()):
            learnt = [] if labels is None else (labels[i] != IGNORE).nonzero()[:1, 0].tolist()
            words = [token for token in row[: learnt[0] if learnt else None] if token not in left_out]
            asked += [self._told(words)] * (row.count(self.image_token) // self.image_tokens)
        mask = [[1] * len(question) for question in asked]
        rows = {"qformer_input_ids": pad(asked, self.side.pad_token), "qformer_attention_mask": pad(mask, 0)}
        return {name: value.to(ids.device) for name, value in rows.items()}

    def _told(self, words: list[int]) -> list[int]:
        if self.side.tokenizer is not self.tokenizer:
            words = self.side.tokenizer(self.tokenizer.decode(words), add_special_tokens=False)["input_ids"]
        return [self.side.first, *words[max(len(words) - self.side.max_length + 2, 0) :], self.side.last]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as ``[B, T]``, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out


class Rows:
    """Encoded conversations, padded once; ``batch`` cuts the columns that a selection does not need."""

    def __init__(self, encoded: Sequence[tuple[list[int], list[int]]], pad_token: int):
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self.ids = pad([ids for ids, _ in encoded], pad_token)
        self.labels = pad([labels for _, labels in encoded], IGNORE)

    @classmethod
    def of(cls, ids: Tensor, labels: Tensor, lengths: Tensor) -> Rows:
        """Rows that are padded already."""
        rows = cls.__new__(cls)
        rows.ids, rows.labels, rows.lengths = ids, labels, lengths
        return rows

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids and labels ``[B, T]`` and lengths ``[B]`` of some rows."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(index) else 0
        return self.ids[index, :width], self.labels[index, :width], lengths


def stack(parts: Sequence[tuple[Tensor, Tensor, Tensor]], pad_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batches of different widths on top of each other."""
    if len(parts) == 1:
        return parts[0]
    width = max(ids.shape[1] for ids, _, _ in parts)

    def widen(t: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)

    ids, labels = (torch.cat([widen(part[i], fill) for part in parts]) for i, fill in ((0, pad_token), (1, IGNORE)))
    return ids, labels, torch.cat([lengths for _, _, lengths in parts])


def lay_out(
    ids: Tensor, labels: Tensor, lengths: Tensor, *, packing: bool = False, pad_to: int = 1, pad_token: int = 0,
    questions: Questions | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """``input_ids``, ``labels`` and ``rows`` (which row a token belongs to) of a batch: padded ``[B, T]``, or with ``packing`` end to end
    ``[1, sum of lengths]`` with ``position_ids`` that start anew at each row, from which transformers' attention keeps rows apart.

    ``pad_to``: widths are made multiples of it with ``pad_token``. ``questions``: their columns stand beside."""
    beside = {} if questions is None else questions(ids, labels)
    if not packing and (more := -ids.shape[1] % pad_to):
        ids, labels = torch.nn.functional.pad(ids, (0, more), value=pad_token), torch.nn.functional.pad(labels, (0, more), value=IGNORE)
    rows = torch.arange(len(ids)).unsqueeze(1).expand(ids.shape)
    if not packing:
        return {"input_ids": ids, "labels": labels, "rows": rows, **beside}
    places = torch.arange(ids.shape[1])
    keep = places < lengths.unsqueeze(1)
    labels = labels.where(places > 0, IGNORE)  # a row's first token follows nothing, least of all the row before it
    laid = {"input_ids": ids, "labels": labels, "rows": rows, "position_ids": places.expand(ids.shape)}
    return {name: value[keep].unsqueeze(0) for name, value in laid.items()} | beside
