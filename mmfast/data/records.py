"""A user's data as records: where rows come from, one at a time or as a stream, and what is checked before a run begins.

Rows stay as they are read (JSON objects, or a memory-mapped ``datasets.Dataset``) and are parsed when asked for; pixels are never held.
"""

from __future__ import annotations

import ast
import bisect
import functools
import glob
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmfast.data.chat import LeftOut
from mmfast.data.formats import INSTANCES, NAMES, TURN_NAMES, Record, cleaned, name_of, paired, parse, split
from mmfast.data.images import SUFFIXES, Picture
from mmfast.spec import Data, Pairs, nearest

__all__ = ["Picture", "Record", "Records", "Stream", "check"]

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".tsv": "tsv", ".parquet": "parquet", ".tar": "webdataset"}
IGNORE = -100
_LISTED = 20


@dataclass(frozen=True)
class _Broken:
    """A row that could not be read at all, and why; it keeps its number, so the others keep theirs."""

    why: str


class Records:
    """The records of a data set, by number; a list to its users. What a row lacks is told when the row is asked for. With ``open_questions``, for
    whoever answers them, questions without an answer (LLaVA's evaluation files) are records, too. ``clips``: a video is one picture of several
    frames (``formats.parse``).

    Raises:
        ValueError: no such file, nothing in it, not in a form that is read, or ``columns`` of names that no record has.
    """

    def __init__(self, data: Data | Pairs, *, open_questions: bool = False, clips: bool = False):
        self.data, self.name, self.open_questions, self.clips = data, data.path or data.name, open_questions, clips
        _check_columns(data)
        self.rows: Any
        if str(data.path).startswith("hub:"):
            self.rows, self._starts, self._roots = _load_hub(data, self.name), [0], [data.images or os.curdir]
            identity = [
                self.name,
                data.split,
                *((os.path.basename(f["filename"]), os.path.getsize(f["filename"])) for f in self.rows.cache_files),
            ]
        else:
            kind, files = _files(data)
            if kind in ("json", "tsv"):
                read = [_read_text(file, data.split) for file in files]
                lists = [[one for row in rows for one in split(row, data.columns)] for rows, _ in read]
                self.rows = [row for rows in lists for row in rows]
                self._starts = [sum(map(len, lists[:i])) for i in range(len(lists))]
                identity = [digest for _, digest in read]
            else:
                _one_folder(data, files)
                self.rows, self._starts = _load(kind, files, streaming=False), [0]
                identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            self._roots = [data.images or str(file.parent) for file in files]
        if not len(self.rows):
            raise ValueError(f"{self.name}: holds no record")
        self._json = _json_columns(self.rows)
        self._check_names()
        self._begins: list[int] = []  # the first record of each row, and how many there are, where rows are several
        columns = [] if isinstance(self.rows, list) else [n for n in self.rows.column_names if data.columns.get(n, n) in INSTANCES]
        if columns:
            lists = self.rows.select_columns(columns)
            counts = (len(split(_plain(lists[i].to_pylist()[0], self._json), data.columns)) for i in range(len(lists)))
            self._begins = list(itertools.accumulate(counts, initial=0))
        settings = [self._roots, sorted(data.columns.items()), data.frames, *["clips"] * clips]
        self.fingerprint = hashlib.sha256(json.dumps([identity, settings]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._begins[-1] if self._begins else len(self.rows)

    def __getitem__(self, number: int) -> Record:
        number = range(len(self))[number]
        try:
            return self.parse(number)
        except ValueError as error:
            raise ValueError(f"{self.name}: record {number} ({self.id(number)}): {error}") from None

    def parse(self, number: int) -> Record:
        """The record; ValueError without saying whose."""
        root = self._roots[bisect.bisect_right(self._starts, number) - 1]
        return _parse(self._row(number), number, self.data, root, open_questions=self.open_questions, clips=self.clips)

    def id(self, number: int) -> str:
        """A row's id for an error sentence, whatever the row is."""
        try:
            name = name_of(self._row(number), number, self.data.columns)
            return name if name.isprintable() and len(name) <= 80 else repr(name[:80])
        except ValueError:
            return f"#{number}"

    def _row(self, number: int) -> Any:
        at = bisect.bisect_right(self._begins, number) - 1 if self._begins else number
        row = self.rows[at]
        if isinstance(self.rows, list):
            return row
        row = _plain(row.to_pylist()[0], self._json)
        return split(row, self.data.columns)[number - self._begins[at]] if self._begins else row

    def _check_names(self) -> None:
        for theirs, ours in self.data.columns.items():
            if isinstance(self.rows, list):
                seen = any(_mentions(row, theirs) for row in self.rows)
                names = sorted({key for row in self.rows[:100] if isinstance(row, dict) for key in row})
            else:
                names = self.rows.column_names
                seen = theirs in names or ours in TURN_NAMES or "json" in names  # webdataset's json holds names of its own
            if not seen:
                raise ValueError(
                    f"{self.name}: columns maps {theirs!r}, which no record has{nearest(theirs, names)}; they have {', '.join(names)}"
                )


class Stream:
    """Records read through without an index, by ``datasets``, for data that is larger than one wants to index.

    Order is that of the files; with ``seed``, every ``block`` of rows is shuffled, by (seed, epoch, block). Iterating goes on from the
    present place, to the end of the epoch; ``state_dict`` is that place, and continues exactly. ``part=(i, n)`` yields every n-th record.
    A faulty record raises, or under ``on_bad_record="skip"`` is told, counted in ``left_out`` and passed over.
    """

    def __init__(
        self, data: Data, *, seed: int | None = None, block: int = 256, part: tuple[int, int] = (0, 1), open_pictures: bool = True,
        say: Callable[[str], Any] = print, clips: bool = False,
    ):  # fmt: skip
        self.data, self.name, self.clips = data, data.path or data.name, clips
        self.seed, self.block, self.part, self.open_pictures, self.say = seed, block, part, open_pictures, say
        self.check: Callable[[Record], Any] | None = None  # may find a fault (ValueError) in a record before it is given out
        _check_columns(data)
        if str(data.path).startswith("hub:"):
            self._kind, self._files, self._root = "hub", [], data.images or os.curdir
        else:
            self._kind, self._files = _files(data)
            _one_folder(data, self._files)
            self._root = data.images or str(self._files[0].parent)
            for file in self._files if self._kind == "tsv" else ():
                with open(file, "rb") as opened:
                    if not _is_grit(opened.readline()):
                        raise ValueError(f"{file}: tables with names in their first line are read whole; leave streaming off")
            for file in self._files if self._kind == "json" else ():
                with open(file, "rb") as opened:
                    if opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                        raise ValueError(
                            f"{file}: streaming reads JSONL, one object a line, and this is a JSON array; convert it or leave streaming off"
                        )
        self.load_state_dict({"epoch": 0, "block": 0, "number": 0, "at": 0, "rows": None, "left_out": 0})

    def state_dict(self) -> dict[str, Any]:
        """Epoch, the block and the number of its first row, rows of it that are done, and ``datasets``' own state before the block."""
        return self._state | {"left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self.left_out = dict(state), state["left_out"]

    def __iter__(self) -> Iterator[Record]:
        state, rows = self._state, self._open()
        if state["rows"] is not None:
            rows.load_state_dict(state["rows"])
        reading, as_json = self._reading(rows), _json_columns(rows)
        while True:
            block = [one for row in itertools.islice(reading, self.block) for one in split(_plain(row, as_json), self.data.columns)]
            if not block:
                break
            order = range(len(block))
            if self.seed is not None:
                key = hashlib.sha256(f"{self.seed} {state['epoch']} {state['block']}".encode()).digest()
                order = torch.randperm(len(block), generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))).tolist()
            for at in range(state["at"], len(block)):
                # "rows" stays what it was before the block: who resumes reads the block again.
                state = self._state = {**state, "at": at + 1}
                number = state["number"] + order[at]
                if (state["number"] + at) % self.part[1] == self.part[0] and (record := self._record(block[order[at]], number)):
                    yield record
            number = state["number"] + len(block)
            state = self._state = {**state, "block": state["block"] + 1, "number": number, "at": 0, "rows": rows.state_dict()}
        if not state["number"]:
            raise ValueError(f"{self.name}: holds no record")
        if self.left_out:
            self.say(f"{self.name}: left out {self.left_out} records so far")
        self.load_state_dict({"epoch": state["epoch"] + 1, "block": 0, "number": 0, "at": 0, "rows": None, "left_out": self.left_out})

    def _open(self) -> Any:
        if self._kind == "hub":
            return _load_hub(self.data, self.name, streaming=True)
        # Lines are parsed here and not by datasets, whose columns must have one type each and whose reader stops at a torn line.
        return _load("text" if self._kind in LINES else self._kind, self._files, streaming=True)

    def _reading(self, rows: Any) -> Iterator[Any]:
        try:
            for row in rows:
                if self._kind not in LINES:
                    yield row
                elif line := row["text"].encode("latin-1").removeprefix(b"\xef\xbb\xbf").strip():
                    yield LINES[self._kind](line, "its line")
        except ValueError:
            raise
        except Exception as error:  # whatever a reader of files raises
            raise ValueError(f"{self.name}: cannot be read on: {_cause(error)}") from None

    def _record(self, row: Any, number: int) -> Record | None:
        try:
            record = _parse(row, number, self.data, self._root, clips=self.clips)
            drawn = hashlib.sha256(f"{self.seed} {self._state['epoch']} {number}".encode()).digest()
            record = record.telling(int.from_bytes(drawn[:7], "big") % record.tellings)
            if self.open_pictures:
                for picture in record.pictures:
                    picture.check()
            for picture in record.pictures if self.data.min_side else ():
                _check_side(picture, self.data.min_side)
            if self.check is not None:
                self.check(record)
            return record
        except ValueError as error:
            sentence = f"{self.name}: record {number}: {error}"
            if self.data.on_bad_record != "skip" and not isinstance(error, LeftOut):
                raise ValueError(sentence) from None
            self.left_out += 1
            if self.left_out <= _LISTED:
                self.say(f"left out: {sentence}")
            return None


# --------------------------------------------------------------------------------------------------------------- checking


def check(
    records: Records, encode: Callable[[Record], tuple[Sequence[int], Sequence[int]]] | None, *, on_bad_record: str,
    open_pictures: bool = True, say: Callable[[str], Any] = print,
) -> list[int]:  # fmt: skip
    """The numbers of the good records. Every record is parsed, its pictures decoded once, its text encoded and found to have labels.

    All faults are told at once: under "fail" in the ValueError, under "skip" by ``say``, which also hears of what settings leave out (``LeftOut``) under
    either, and of ids that come twice (such records are kept). ``encode(record)`` gives ids and labels.

    Raises:
        ValueError: faulty records under "fail"; no good record under either.
    """
    good, faults, small, ids = [], [], [], Counter()
    known: dict[str, ValueError | None] = {}  # what is wrong with a picture, by key
    fault_of = functools.partial(_fault, least=getattr(records.data, "min_side", 0))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # decoders let go of the interpreter
        for start in range(0, len(records), _CHUNK):
            told: list[tuple[int, ValueError | None, list[str]]] = []
            asked: dict[str, Picture] = {}
            for number in range(start, min(start + _CHUNK, len(records))):
                fault, keys = None, []
                try:
                    record = records.parse(number)
                    ids[record.id] += 1
                    if open_pictures:
                        keys = [picture.key for picture in record.pictures]
                        asked |= {k: p for k, p in zip(keys, record.pictures, strict=True) if k not in known}
                    if encode is not None and all(label == IGNORE for label in encode(record)[1]) and not record.open:
                        raise ValueError("has nothing to learn: every label is masked")
                except ValueError as error:
                    fault = error
                told.append((number, fault, keys))
            known |= zip(asked, pool.map(fault_of, asked.values()), strict=True)
            for number, fault, keys in told:
                fault = fault or next((known[k] for k in keys if known[k]), None)
                if fault is None:
                    good.append(number)
                else:
                    (small if isinstance(fault, LeftOut) else faults).append(f"record {number} ({records.id(number)}): {fault}")
    if twice := [name for name, count in ids.items() if count > 1]:
        say(
            f"{records.name}: warning: {len(twice)} ids occur more than once ({', '.join(twice[:3])}{', ..' if len(twice) > 3 else ''}); all their records are kept"
        )
    if faults and (on_bad_record != "skip" or not good):
        raise ValueError(
            f"{records.name}: {len(faults)} of {len(records)} records are faulty (on_bad_record=skip leaves them out):{_listed(faults)}"
        )
    if left := [*faults, *small]:
        sentence = f"{records.name}: left out {len(left)} of {len(records)} records:{_listed(left)}"
        if not good:
            raise ValueError(sentence)
        say(sentence)
    return good


def _listed(sentences: Sequence[str]) -> str:
    more = [f"and {len(sentences) - _LISTED} more"] if len(sentences) > _LISTED else []
    return "".join(f"\n  {sentence}" for sentence in [*sentences[:_LISTED], *more])


_CHUNK = 256


def _fault(picture: Picture, least: int) -> ValueError | None:
    try:
        picture.check()
        _check_side(picture, least)
    except ValueError as error:
        return error.with_traceback(None)  # which would hold on to the picture
    return None


def _check_side(picture: Picture, least: int) -> None:
    if least and min(size := picture.size()) < least:
        raise LeftOut(f"a picture has {size[0]} x {size[1]} pixels, and data.min_side is {least}")


# ------------------------------------------------------------------------------------------------------------------- rows


def _parse(row: Any, number: int, data: Data | Pairs, root: str, *, open_questions: bool = False, clips: bool = False) -> Record:
    if isinstance(row, _Broken):
        raise ValueError(row.why)
    extra: dict[str, Any] = {"clips": clips}
    if isinstance(data, Data):
        extra |= {name: getattr(data, name) for name in ("boxes", "instruct", "choices", "pages", "shots")}
    record = parse(row, number, root=root, frames=data.frames, columns=data.columns, **extra)
    if isinstance(data, Pairs) and record.chosen is None:
        raise ValueError('is no preference pair: it has no "chosen" and "rejected"')
    if isinstance(data, Data) and record.chosen is not None:
        raise ValueError("is a preference pair; supervised training reads questions with answers, or documents")
    if record.open and not open_questions:
        raise ValueError(
            'is a question ("question_id", "text") without an answer to learn or compare with; mmfast eval --generate answers it'
        )
    if isinstance(data, Pairs):
        return record
    if data.blind:
        record = replace(record, pictures=tuple(picture.dark() for picture in record.pictures))
    alone = record.document is not None and len(record.pictures) == 1
    if alone and random.Random(f"single {number}").random() >= data.pages.single:
        raise LeftOut(f"a document of one picture, of which data.pages.single keeps {data.pages.single:g}")
    return paired(cleaned(record) if data.clean else record, data.captions_first)


def _check_columns(data: Data | Pairs) -> None:
    if data.path is None:
        raise ValueError(f"data {data.name!r} is not built in; its records need a path")
    for theirs, ours in data.columns.items():
        if ours not in NAMES:
            raise ValueError(
                f"columns maps {theirs!r} to {ours!r}, which is no name of ours{nearest(ours, NAMES)}; names are {', '.join(NAMES)}"
            )


def _mentions(row: Any, name: str) -> bool:
    """Whether a row, or a turn in it, has a field."""
    if not isinstance(row, dict):
        return False
    return name in row or any(isinstance(v, list) and any(isinstance(turn, dict) and name in turn for turn in v) for v in row.values())


def _files(data: Data | Pairs) -> tuple[str, list[Path]]:
    """The kind of a path's files and the files, in order."""
    path = os.path.expanduser(data.path)
    if os.path.isdir(path):
        files = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in KINDS)
        if not files:
            raise ValueError(f"data folder {path} holds no data file; looked for {', '.join(KINDS)}")
    elif os.path.exists(path):
        files = [Path(path)]
    elif glob.has_magic(path):
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        if not files:
            raise ValueError(f"data pattern {path} matches no file")
    else:
        raise ValueError(f"data file {path} does not exist")
    kinds = {KINDS.get(file.suffix.lower()) for file in files}
    if None in kinds:
        odd = next(file for file in files if file.suffix.lower() not in KINDS)
        raise ValueError(f"data file {odd} is of no kind that is read here; expected one of {', '.join(KINDS)}")
    if len(kinds) > 1:
        raise ValueError(
            f"data {path} mixes {' and '.join(sorted(kinds))} files; give a pattern such as {path}/*{files[0].suffix}, or a mixture"
        )
    return kinds.pop(), files


def _one_folder(data: Data | Pairs, files: Sequence[Path]) -> None:
    """``datasets`` does not say which file a row is from, so picture names can be relative to one folder alone."""
    if data.images is None and len({file.parent for file in files}) > 1:
        raise ValueError(f"{data.path}: its files are in several folders; name the one that pictures are relative to with data.images")


def _read_text(file: Path, split: str) -> tuple[list[Any], str]:
    """Rows of a JSON array, a JSONL file, a table or ScienceQA's problems, and the hash of its bytes. A bad line is a row that says so; a bad array
    is no data."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"data file {file} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(raw).hexdigest()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"data file {file} is UTF-16; save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if KINDS[file.suffix.lower()] == "tsv":
        return _table(raw, file), digest
    if raw.lstrip().startswith(b"["):
        rows = _whole(raw)
        if isinstance(rows, _Broken):
            raise ValueError(f"data file {file} {rows.why}")
        return rows, digest
    lines = [(at, line) for at, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    rows = [_line(line, f"line {at} of {file.name}") for at, line in lines]
    if rows and isinstance(rows[0], _Broken):
        one = _whole(raw)  # an object over several lines, of which some may be whole by themselves
        if not isinstance(one, _Broken):
            rows = [one]
        elif all(isinstance(row, _Broken) for row in rows):
            raise ValueError(f"data file {file} is neither JSON nor JSONL: {rows[0].why}")
    if len(rows) == 1 and _is_problems(rows[0]):
        return _problems(rows[0], split, file), digest
    if not rows:
        raise ValueError(f"data file {file} holds no record")
    return rows, digest


def _is_problems(row: Any) -> bool:
    """Whether what seems a record is an object of records by id, as ScienceQA's problems are. Of a record's own fields it has none."""
    return isinstance(row, dict) and not row.keys() & set(NAMES) and all(isinstance(value, dict) for value in row.values())


def _problems(told: dict[str, dict], split: str, file: Path) -> list[Any]:
    """Records of one split; the picture of one is in a folder that is named by its id, as LLaVA's converter has it."""
    rows = [
        {"id": name, **row} | ({"image": f"{name}/{row['image']}"} if isinstance(row.get("image"), str) else {})
        for name, row in told.items()
        if row.get("split", split) == split
    ]
    if not rows:
        splits = sorted({str(row["split"]) for row in told.values()})
        raise ValueError(f"data file {file} has no record of split {split!r}{nearest(split, splits)}; they are of {', '.join(splits)}")
    return rows


def _table(raw: bytes, file: Path) -> list[Any]:
    """Fields between tabs, nothing quoted: their names in the first line, as Conceptual Captions has them, or GRIT's, which have no names."""
    lines = raw.splitlines() or [b""]
    grit = _is_grit(lines[0])
    names = [] if grit else lines[0].decode(errors="replace").split("\t")
    rows: list[Any] = []
    for at, line in enumerate(lines if grit else lines[1:], 1 if grit else 2):
        what = f"line {at} of {file.name}"
        if line.strip():
            rows.append(_grit(line, what) if grit else _named(line, what, names))
    if not rows:
        raise ValueError(f"data file {file} holds no record")
    return rows


def _named(line: bytes, what: str, names: Sequence[str]) -> Any:
    fields = _fields(line, what)
    if isinstance(fields, _Broken):
        return fields
    if len(fields) != len(names):
        return _Broken(f"{what} has {len(fields)} fields, the first line names {len(names)}")
    return dict(zip(names, fields, strict=True))


def _is_grit(line: bytes) -> bool:
    """Whether the first line of a table is a record of GRIT: six fields, the last of them a dict. No name looks like one."""
    return line.count(b"\t") == 5 and line.rsplit(b"\t", 1)[1].lstrip().startswith(b"{")


def _grit(line: bytes, what: str) -> Any:
    """A line of the tables that Kosmos-2 trains on: hash, caption, picture in base64, width, height, and a Python dict of spans."""
    fields = _fields(line, what)
    if isinstance(fields, _Broken):
        return fields
    if len(fields) != 6:
        return _Broken(f"{what} has {len(fields)} fields, expected six: hash, caption, picture, width, height, spans")
    name, caption, picture, _, _, spans = fields
    try:
        told = ast.literal_eval(spans.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return _Broken(f"{what} has the spans {spans[:60]!r}, expected a dict of phrase and expression_v1")
    return {
        "id": name, "caption": caption, "image": f"data:image/jpeg;base64,{picture}", "noun_chunks": told.get("phrase", []),
        "ref_exps": told.get("expression_v1", []),
    }  # fmt: skip


def _fields(line: bytes, what: str) -> list[str] | _Broken:
    try:
        return line.rstrip(b"\r\n").decode().split("\t")
    except UnicodeDecodeError as error:
        return _Broken(f"{what} is not UTF-8: {error.reason} at byte {error.start}")


def _whole(raw: bytes) -> Any:
    try:
        rows = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return _Broken(f"is not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        return _Broken("is no data: lists in lists beyond any depth")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in raw else ""
        return _Broken(f"is not valid JSON: {error.msg} at {line}column {error.colno}")
    except ValueError as error:  # a number of thousands of digits
        return _Broken(f"is not valid JSON: {error}")
    return rows if rows else _Broken("holds no record")


def _line(line: bytes, what: str) -> Any:
    row = _whole(line)
    return _Broken(f"{what} {row.why}") if isinstance(row, _Broken) else row


# Files whose lines are parsed here where they are streamed, and how.
LINES = {"json": _line, "tsv": _grit}


def _load(kind: str, files: Sequence[Path], streaming: bool) -> Any:
    # Lines come as the bytes that they are, for us to decode: one wrong byte then costs one record.
    options = {"encoding": "latin-1"} if kind == "text" else {}
    names = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return _through_datasets(names, kind, streaming, data_files=[str(f) for f in files], split="train", **options)


def _load_hub(data: Data | Pairs, name: str, streaming: bool = False) -> Any:
    """``hub:NAME``, or ``hub:NAME:CONFIGURATION``; a folder serves as NAME."""
    repository, _, configuration = data.path.removeprefix("hub:").partition(":")
    return _through_datasets(name, repository, streaming, name=configuration or None, split=data.split)


def _through_datasets(called: str, builder: str, streaming: bool, **options: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{called} is read by the package datasets: pip install 'mmfast[data]'") from None
    try:
        rows = datasets.load_dataset(builder, streaming=streaming, **options)
    except Exception as error:  # its readers raise errors of many packages
        raise ValueError(f"{called} cannot be read: {_cause(error)}") from None
    # Pictures stay encoded: arrow rows are never decoded, and streams are told not to.
    if not streaming:
        return rows.with_format("arrow")
    return rows.decode(False) if rows.features else rows


def _json_columns(rows: Any) -> dict[str, Any]:
    """Columns, with their features, in which ``datasets`` keeps values as JSON text because they have several types."""
    features = getattr(rows, "features", None) or {}
    return {name: feature for name, feature in features.items() if "Json(" in repr(feature)}


def _told(value: Any, feature: Any) -> Any:
    """A value with the JSON text in it read."""
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: _told(inner, feature.get(name)) for name, inner in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_told(v, inner) for v in value]
    return value


def _plain(row: Any, as_json: dict[str, Any]) -> Any:
    """A row of ``datasets`` as JSON would have it; of a webdataset, the picture and the fields of its json together."""
    if not isinstance(row, dict):
        return row
    if as_json:
        row = {name: _told(value, as_json[name]) if name in as_json else value for name, value in row.items()}
    if "__key__" not in row:
        return row
    row = {name.lower(): value for name, value in row.items() if value is not None}
    inner = row.pop("json", {})
    if not isinstance(inner, dict):
        return _Broken(f"the json of {row['__key__']} is no object")
    shown = [value for name, value in row.items() if "." + name.rsplit(".", 1)[-1] in SUFFIXES]
    told = {"id": row["__key__"]}
    if "txt" in row:
        told["caption"] = row["txt"]
    # An image that the json names as well is the one of the tar.
    inner = {name: value for name, value in inner.items() if not (shown and name in ("image", "images"))}
    return told | {name: value for name, value in inner.items() if value is not None} | ({"images": shown} if shown else {})


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
