"""What a stage trains on when the user brings the records: batches of conversations, or of preference pairs, each decoded when it is asked for.

A source is ``__len__`` and ``batch(index)``, as ``mmfast.data.supervised.Source`` describes a batch; pictures are opened by whoever asks, which
with ``compute.workers`` is a loader's process. Letters: B rows, T tokens, M pictures.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.data import chat, images
from mmfast.data.formats import Record
from mmfast.data.mixtures import Mixed
from mmfast.data.records import Records, Stream, check
from mmfast.data.regions import REGION
from mmfast.spec import Fixed, View

# Token ids that are kept after the check, over all records; beyond that a record is encoded each time it is drawn.
KEEP_TOKENS = 50_000_000


@dataclass(frozen=True)
class Question:
    """A question of an item's record, and what was answered there."""

    item: int
    record: Record
    ids: list[int]  # all before the answer, earlier answers as the record has them
    shown: list[tuple[int, ...]]  # the pictures before the answer, each by the source's numbers of its frames
    text: str  # without its places of pictures; empty where a caption is asked for
    answer: str  # a <region> for each place, an <image> for each picture to be drawn
    boxes: list[list[tuple[float, ...]]]  # of these, in pixels of the upright picture
    asked: str  # with its places of pictures

    @property
    def answers(self) -> tuple[str, ...]:
        """What humans said, where there are several; else the one answer, if there is any."""
        return () if self.record.open else self.record.answers or (self.answer,)


class _Checked:
    """Good records of several sets as one list: their items, their distinct pictures, their encodings while these are few."""

    def __init__(
        self,
        parts: Sequence[Records],
        texts: dict[str, Callable[[Record], tuple[list[int], list[int]]]],
        encoder: chat.Encoder,
        plan: Fixed | int,
    ):
        self.parts, self.texts, self.encoder, self.plan = parts, texts, encoder, images.fixed(plan)
        self.items: list[tuple[int, int]] = []  # part and number; item i with its caption k is asked for as i + k len(items)
        self.sizes: list[int] = []
        self.packing, self.pad_to, self.with_pictures = False, 1, True
        self.asked: chat.Questions | None = None
        # Encodings end to end, and where each lies: a tensor apiece would cost a loader's processes a file handle apiece.
        self._kept: dict[tuple[int, int, str, int], tuple[int, int]] = {}
        self._ids, self._labels = array("i"), array("i")
        self._seen = self._unknown = 0  # tokens of the checked texts, and those that the tokenizer has no word for
        for at, records in enumerate(parts):
            good = check(records, lambda record, at=at: self._encode_all(at, record), on_bad_record=records.data.on_bad_record)
            self.items += [(at, number) for number in good]
            self.sizes.append(len(good))
        if self._unknown:
            print(
                f"{parts[0].name}: warning: {self._unknown:,} of {self._seen:,} tokens ({self._unknown / self._seen:.1%}) are of words that the "
                f"tokenizer does not have and become {encoder.tokenizer.unk_token} (tiny models know the words of their built-in data alone)"
            )
        places: dict[tuple[str, Fixed], int] = {}  # by key and what becomes of it
        named: dict[tuple[int, str], int] = {}  # by set and key, the first picture that has it
        self.tellings: list[int] = []  # how many captions an item has
        same: list[int] = []  # for each distinct picture the first that shows the same
        self._pictures: list[tuple[int, int, int, int]] = []  # where a picture is first seen: part, number, place in the record, frame
        self._pictures_of: list[list[tuple[int, ...]]] = []  # of each item, each by its frames: of most one, itself
        for at, number in self.items:
            record, ids = parts[at].parse(number), []
            for place, (picture, plan) in enumerate(zip(record.pictures, record.plans(self.plan), strict=True)):
                for i, frame in enumerate(picture.frames):
                    if (frame.key, plan) not in places:
                        places[frame.key, plan] = len(self._pictures)
                        self._pictures.append((at, number, place, i))
                        same.append(places[frame.key, plan])
                ids.append(tuple(places[frame.key, plan] for frame in picture.frames))
            for (i, *_), key in zip(ids, record.keys, strict=True):
                same[i] = named.setdefault((at, key), same[i])
            self.tellings.append(record.tellings)
            self._pictures_of.append(ids)
        self._same = torch.tensor(same, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def picture_count(self) -> int:
        return len(self._pictures)

    def load_pictures(self, ids: Tensor) -> Tensor:
        """uint8 ``[M, size, size, 3]`` of the distinct pictures with these numbers."""
        found, loaded, last = [self._pictures[i] for i in ids.tolist()], [], None
        for at, number, place, i in found:
            if last != (at, number):  # a document's pictures mostly come one after another: it is parsed once for all of them
                last, record = (at, number), self.parts[at].parse(number)
                plans = record.plans(self.plan)
            loaded.append(record.pictures[place].frames[i].load(plans[place]))
        return torch.from_numpy(np.stack(loaded)) if loaded else torch.empty(0, self.plan.size, self.plan.size, 3, dtype=torch.uint8)

    def questions(self, items: Iterable[int]) -> Iterator[Question]:
        """All questions of some items' records, in order, up to where the encoder's ``max_length`` cuts them off; documents have none."""
        for item in items:
            at, number = self.items[item]
            if number < 0:  # a row of texts
                continue
            record = self.parts[at].parse(number)
            told, boxes, pictures = self.encoder.placed(record).turns, iter(record.boxes_in_pixels()), 0
            for i, (question, answer) in enumerate((asked, said or "") for asked, said in record.turns):
                pictures += question.count("<image>")
                _, answered = ([next(boxes) for _ in range(text.count(REGION))] for text in (question, answer))
                try:
                    ids, _ = self.encoder([*told[:i], (told[i][0], None)], record.system)
                except ValueError:  # all before the answer is too long: training does not see it either
                    break
                text = question.replace("<image>", "").strip()
                yield Question(item, record, ids, self._pictures_of[item][:pictures], text, answer, answered, question)
                pictures += answer.count("<image>")

    def captions(self) -> list[int]:
        """The items that are one picture and one answer to whatever is asked, without places."""
        found = []
        for item, (at, number) in enumerate(self.items):
            record = self.parts[at].parse(number) if number >= 0 else None
            if record is not None and len(record.turns) == len(record.pictures) == 1 and not record.boxes and not record.open:
                found.append(item)
        return found

    def prompts(self, count: int) -> list[tuple[str, list[int], list[int], Tensor]]:
        """The first items' last questions that are not cut off, with the token ids up to their answers, how many frames each of their pictures has, and
        these: what samples are made of."""
        last = {question.item: question for question in self.questions(range(min(count, len(self))))}
        frames = [torch.tensor([i for shown in q.shown for i in shown], dtype=torch.long) for q in last.values()]
        return [(q.asked, q.ids, list(map(len, q.shown)), self.load_pictures(f)) for q, f in zip(last.values(), frames, strict=True)]

    def _encode_all(self, at: int, record: Record) -> tuple[list[int], list[int]]:
        """Every text of a record, kept; the one with fewest labels stands for all before the check."""
        return min(self._each(at, record), key=lambda pair: sum(label != chat.IGNORE for label in pair[1]))

    def _each(self, at: int, record: Record) -> list[tuple[list[int], list[int]]]:
        made = [self._encode(at, record, name, which) for name in self.texts for which in range(record.tellings)]
        unknown = _unknown_token(self.encoder.tokenizer)
        for ids, _ in made:
            self._seen += len(ids) - ids.count(self.encoder.image_token)
            self._unknown += 0 if unknown is None else ids.count(unknown)
        return made

    def _text(self, at: int, record: Record, name: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of a text of a part's record."""
        return self.texts[name](record)

    def _encode(self, at: int, record: Record, name: str, which: int) -> tuple[list[int], list[int]]:
        ids, labels = self._text(at, record.telling(which), name)
        if len(self._ids) < KEEP_TOKENS:
            self._keep((at, record.number, name, which), ids, labels)
        return ids, labels

    def _keep(self, key: tuple[int, int, str, int], ids: list[int], labels: list[int]) -> None:
        self._kept[key] = len(self._ids), len(self._ids) + len(ids)
        self._ids.extend(ids)
        self._labels.extend(labels)

    def __getstate__(self) -> dict[str, Any]:
        # From here on tensors, whose memory a loader's processes share; kept, as they must be there until the process has started.
        self._ids, self._labels = (torch.from_numpy(np.asarray(kept)) for kept in (self._ids, self._labels))
        return self.__dict__

    def encoded(self, item: int, name: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of an item's text."""
        which, item = divmod(item, len(self))
        at, number = self.items[item]
        if kept := self._kept.get((at, number, name, which)):
            return self._ids[slice(*kept)].tolist(), self._labels[slice(*kept)].tolist()
        return self._text(at, self.parts[at].parse(number).telling(which), name)

    def lay_out(self, index: Tensor, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The batch of these items' texts, text after text, and the scored tokens of each row."""
        encoded = [(i % len(self), *self.encoded(i, name)) for name in names for i in index.tolist()]
        ids, labels = chat.pad([ids for _, ids, _ in encoded], self.encoder.pad_token), chat.pad([ls for _, _, ls in encoded], chat.IGNORE)
        # A text that was cut shows the pictures that are left of it.
        shown = [
            p for i, ids, _ in encoded for p in self._pictures_of[i][: ids.count(self.encoder.image_token) // self.encoder.image_tokens]
        ]
        lengths, scored = torch.tensor([len(ids) for _, ids, _ in encoded]), (labels[:, 1:] != chat.IGNORE).sum(1)
        laid = chat.lay_out(
            ids, labels, lengths, packing=self.packing, pad_to=self.pad_to, pad_token=self.encoder.pad_token, questions=self.asked
        )
        return {**laid, **self.show(shown)}, scored

    def show(self, shown: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """What a batch holds of the pictures that its rows show, given by their frames' numbers and in order: each once, and which of them stands
        where. Where some have several frames, ``pictures`` and their ids are all frames end to end, and ``frames`` says how many each has."""
        pictures = list(dict.fromkeys(shown))
        place = {p: at for at, p in enumerate(pictures)}
        picture_ids = torch.tensor([frame for picture in pictures for frame in picture], dtype=torch.long)
        return {
            "picture_ids": picture_ids,
            "image_rows": torch.tensor([place[p] for p in shown], dtype=torch.long),
            **_frames(pictures),
            **({"pictures": self.load_pictures(picture_ids)} if self.with_pictures and pictures else {}),
        }


def _frames(pictures: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    counts = torch.tensor([len(frames) for frames in pictures], dtype=torch.long)
    return {"frames": counts} if (counts > 1).any() else {}


def _unknown_token(tokenizer: Any) -> int | None:
    """The id of words that a tokenizer does not have; None where it has all, or where the id also begins or ends texts (GPT-2)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) else unknown


class Conversations(_Checked):
    """Conversations and documents of one data set or a mixture. All were checked when this was made; see ``mmfast.data.records.check``. Where
    records have several captions, one is drawn each time that the order comes to the record.

    Args:
        encoder: from turns to token ids.
        plan: what pictures become; a number: squares of so many pixels, cropped.
        seed: of the order in which a mixture is drawn.
        by_tokens: the parts' weights are shares of tokens, not of records.
    """

    def __init__(self, parts: Sequence[Records], encoder: chat.Encoder, *, plan: Fixed | int, seed: int = 0, by_tokens: bool = False):
        super().__init__(parts, {"answer": encoder.record}, encoder, plan)
        for at, records in enumerate(parts):
            if records.data.full:
                self._fill(at)
        weights = [records.data.weight for records in parts]
        if by_tokens:
            tokens = [0] * len(parts)
            for item, (at, _) in enumerate(self.items):
                told = [len(self.encoded(item + which * len(self), "answer")[0]) for which in range(self.tellings[item])]
                tokens[at] += sum(told) / len(told)
            weights = [None if w is None else w * n / t for w, n, t in zip(weights, self.sizes, tokens, strict=True)]
        several = max(self.tellings) > 1
        mixed = Mixed(self.sizes, None if all(w is None for w in weights) else weights, seed) if len(parts) > 1 or several else None
        self.mixed, self.seed = mixed, seed
        self.permutation = self._told if several else mixed.order if mixed is not None else None
        losses = [records.data.loss for records in parts]
        self.loss_weights = None if all(w is None for w in losses) else torch.tensor(losses)  # of the sets, each then a group

    def _told(self, epoch: int) -> Tensor:
        """An epoch's order, with one of its captions for each draw of an item: a function of (seed, epoch, place)."""
        order, tellings = self.mixed.order(epoch), torch.tensor(self.tellings)
        generator = torch.Generator().manual_seed(_number(f"{self.seed} captions {epoch}"))
        drawn = torch.randint(1 << 62, order.shape, generator=generator)
        return order + drawn % tellings[order] * len(self)

    def _text(self, at: int, record: Record, name: str) -> tuple[list[int], list[int]]:
        """As ever; of a part whose texts fill rows uncut."""
        full = self.parts[at].data.full
        return replace(self.encoder, max_length=sys.maxsize).record(record) if full else super()._text(at, record, name)

    def _fill(self, part: int) -> None:
        """A part's texts end to end in rows of ``max_length`` ("full sentences", as Kosmos-1's text is packed): what an item is, from here on."""
        length, row, rows = self.encoder.max_length, ([], []), 0

        def keep(ids: list[int], labels: list[int]) -> None:
            nonlocal rows
            rows += 1
            self._keep((part, -rows, "answer", 0), ids, labels)

        for item in [i for i, (at, _) in enumerate(self.items) if at == part]:
            if self._pictures_of[item]:
                name = self.parts[part].id(self.items[item][1])
                raise ValueError(
                    f"{self.parts[part].name}: record {name} has a picture, and data.full lays texts alone end to end; set it to false"
                )
            for kept, new in zip(row, self.encoded(item, "answer"), strict=True):
                kept.extend(new)
            self._kept.pop((*self.items[item], "answer", 0), None)
            whole = len(row[0]) - len(row[0]) % length
            for at in range(0, whole, length):
                keep(*(kept[at : at + length] for kept in row))
            row = tuple(kept[whole:] for kept in row)
        if row[0]:
            keep(*row)
        first = next(i for i, (at, _) in enumerate(self.items) if at == part)
        kept = slice(first, first + self.sizes[part])
        self.items[kept], self._pictures_of[kept] = [(part, -1 - i) for i in range(rows)], [[] for _ in range(rows)]
        self.sizes[part], self.tellings[kept] = rows, [1] * rows

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        batch, scored = self.lay_out(index, ["answer"])
        if self.loss_weights is None:
            groups, count = torch.zeros(len(index), dtype=torch.long), 1
        else:
            groups, count = torch.tensor([self.items[i % len(self)][0] for i in index.tolist()], dtype=torch.long), len(self.parts)
        first = batch["frames"].cumsum(0) - batch["frames"] if "frames" in batch else slice(None)
        keys = self._same[batch["picture_ids"][first]][batch["image_rows"]]
        return {
            **batch,
            "keys": keys,
            "groups": groups,
            "counts": torch.zeros(count, dtype=torch.double).index_add(0, groups, scored.double()),
        }


class PreferencePairs(_Checked):
    """Preference pairs: each item has a chosen and a rejected answer under the same pictures. A batch holds every view, view after view."""

    def __init__(self, records: Records, encoder: chat.Encoder, *, plan: Fixed | int, shuffled: bool = False):
        texts = {name: _Answer(encoder, name) for name in ("chosen", "rejected")}
        super().__init__([records], texts, encoder, plan)
        self.views: dict[str, View] = {name: View(name) for name in texts}
        self._from = list(range(len(self)))
        if shuffled:
            self._from = self._from[len(self) // 2 :] + self._from[: len(self) // 2]
            self._encode_shuffled()

    def _each(self, at: int, record: Record) -> list[tuple[list[int], list[int]]]:
        chosen, rejected = made = super()._each(at, record)
        if chosen[0] == rejected[0]:  # by the cut, or in words that a tiny model does not know
            uncut = replace(self.encoder, max_length=sys.maxsize)
            if uncut.answer(record, record.chosen)[0] != uncut.answer(record, record.rejected)[0]:
                raise ValueError(f"chosen and rejected are the same after the cut at max_length={self.encoder.max_length}")
        return made

    def _encode_shuffled(self) -> None:
        """Every pair's rejected answer becomes another pair's, under its own question and pictures."""
        records = [self.parts[0].parse(number) for _, number in self.items]
        for i, other in enumerate(self._from):
            ids, labels = self.encoder.answer(records[i], records[other].rejected)
            self._keep((0, records[i].number, "rejected", 0), ids, labels)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        batch, scored = self.lay_out(index, [view.text for view in self.views.values()])
        counts = torch.cat([torch.tensor([len(index)]), scored.view(len(self.views), -1).sum(1)]).double()
        return {**batch, "index": index, "scored": scored, "counts": counts}


class _Answer:
    """``encode(record)`` of one of a pair's answers; a class, so that a loader's processes can be handed it."""

    def __init__(self, encoder: chat.Encoder, name: str):
        self.encoder, self.name = encoder, name

    def __call__(self, record: Record) -> tuple[list[int], list[int]]:
        return self.encoder.answer(record, getattr(record, self.name))


def _number(text: str) -> int:
    """The same for equal texts, on every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Streamed:
    """Conversations read through without an index (``Data.streaming``). Every process reads the whole stream and keeps its share of each
    micro-batch, so that all are always at the same place and one state serves any number of them."""

    def __init__(self, stream: Stream, encoder: chat.Encoder, *, plan: Fixed | int):
        self.stream, self.encoder, self.plan, self.packing, self.pad_to = stream, encoder, images.fixed(plan), False, 1
        self.asked: chat.Questions | None = None
        self._encoded: tuple[list[int], list[int]] = ([], [])
        stream.check = self._encode
        self._records = iter(stream)

    def _encode(self, record: Record) -> None:
        """Called by the stream for each record just before it is given out: one that cannot be encoded is told, or left out, like any other."""
        self._encoded = self.encoder.record(record)
        if all(label == chat.IGNORE for label in self._encoded[1]):
            raise ValueError("has nothing to learn: every label is masked")

    def take(self, rows: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """The next ``rows`` records' batch, of which this process gets every ``processes``-th."""
        mine = []
        for at in range(rows):
            record = self._next()
            if at % processes == rank:
                mine.append((*self._encoded, record))
        ids, labels = chat.pad([i for i, _, _ in mine], self.encoder.pad_token), chat.pad([ls for _, ls, _ in mine], chat.IGNORE)
        left = [(record, i.count(self.encoder.image_token) // self.encoder.image_tokens) for i, _, record in mine]
        shown = [seen for record, n in left for seen in list(zip(record.pictures, record.plans(self.plan), strict=True))[:n]]
        keys = [key for record, n in left for key in record.keys[:n]]
        lengths, scored = torch.tensor([len(i) for i, _, _ in mine]), (labels[:, 1:] != chat.IGNORE).sum()
        loaded = [frame.load(plan) for picture, plan in shown for frame in picture.frames]
        pictures = {"pictures": torch.from_numpy(np.stack(loaded)), **_frames([picture.frames for picture, _ in shown])} if shown else {}
        return {
            **chat.lay_out(
                ids, labels, lengths, packing=self.packing, pad_to=self.pad_to, pad_token=self.encoder.pad_token, questions=self.asked
            ),
            **pictures,
            "image_rows": torch.arange(len(shown)),
            "keys": torch.tensor(list(map(_number, keys)), dtype=torch.long),
            "groups": torch.zeros(len(mine), dtype=torch.long),
            "counts": scored.double().view(1),
        }

    def _next(self) -> Record:
        for _ in range(2):
            for record in self._records:
                return record
            self._records = iter(self.stream)  # the next epoch
        raise ValueError(f"{self.stream.name}: holds no record that can be used")

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._records = iter(self.stream)
