"""FROMAGe's two exams on published files (arXiv:2301.13823, section 4): Visual Storytelling and Visual Dialog.

    mmfast eval RUN --data val.story-in-sequence.json --images val/
    mmfast eval RUN --data visdial_1.0_val.json --images VisualDialog_val2018/

Prompts, the squares that pictures are made and the scores are those of the released scripts; what those scripts get wrong is measured both ways.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.data import chat, images
from mmfast.eval import visdial, vist
from mmfast.models.retrieval import answer_losses
from mmfast.spec import Retrieval

from .captions import recall, scores
from .checkpoint import RunError

SEEN = 10_000  # what a picture that the story has shown loses of its score


@dataclass(frozen=True)
class Benchmark:
    """An exam whose files are read and whose pictures are found; ``take()`` measures."""

    name: str
    take: Callable[[], dict[str, float]]


def opened(session: Any, path: str, folder: str | None) -> Benchmark | None:
    """The exam that a file is of, or None: then it holds records. Pictures are searched for in ``folder``, or beside the file.

    Raises:
        RunError: a model that does not find pictures, or pictures that are not there.
        ValueError: what the readers refuse.
    """
    raw = _object(path)
    kinds = (("Visual Storytelling", vist.is_vist, _stories), ("Visual Dialog", visdial.is_visdial, _dialogs))
    found = next(((name, make) for name, mine, make in kinds if mine(raw)), None)
    if found is None:
        return None
    name, make = found
    if not isinstance(session.system.fusion, Retrieval):
        kind = type(session.system.fusion).__name__
        raise RunError(
            f"{path}: {name} is measured with a model that finds pictures (fusion Retrieval, FROMAGe); this one's fusion is {kind}"
        )
    file = Path(path).expanduser()
    return Benchmark(name, make(session, raw, file, Path(folder).expanduser() if folder else file.parent))


def _object(path: str) -> Any:
    """The object that a JSON file holds; None of any other file, and of what is broken: the reader of records tells why."""
    file = Path(path).expanduser()
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text) if text.lstrip().startswith("{") else None
    except ValueError:
        return None


def _pictures(folder: Path) -> dict[int, Path]:
    """Pictures by the number that their files' names end with: Flickr's and COCO's ids."""
    if not folder.is_dir():
        raise RunError(f"folder of pictures {folder} does not exist")
    files = (file for file in sorted(folder.iterdir(), reverse=True) if file.suffix.lower() in images.SUFFIXES)
    return {int(number[0]): file for file in files if (number := re.search(r"\d+$", file.stem))}


@torch.no_grad()
def _pooled(session: Any, files: Sequence[Path], *, skip: bool = False, batch: int = 250) -> tuple[Tensor, list[int]]:
    """Pooled tower states ``[M, 1, D]`` of pictures made squares without a border or a cut, and which of ``files`` they are: all, but with
    ``skip`` for those that cannot be read."""
    plan, pooled, read = replace(session.system.image, fit="squash"), [], []
    for first in range(0, len(files), batch):
        loaded = []
        for number, file in enumerate(files[first : first + batch], first):
            try:
                loaded.append(images.load(file, plan))
            except ValueError as error:
                if not skip:
                    raise RunError(str(error)) from None
                continue
            read.append(number)
        if loaded:
            pixels = torch.from_numpy(np.stack(loaded))
            states = session.states(torch.zeros_like(pixels) if session.blind else pixels)
            pooled.append(session.model.connector.pooled(states)[:, None])
    return torch.cat(pooled) if pooled else torch.empty(0), read


def _encode(session: Any, parts: Sequence[str | None], what: str, before: int = 0) -> list[int]:
    """Token ids of a prompt, or of what follows one of so many tokens; every text has its own beginning token."""
    system, context = session.system, session.model.system.language.context
    try:
        ids = chat.encode_parts(
            session.tokenizer, parts, image_tokens=system.image_places, image_token=session.image_token, begin="each"
        )  # fmt: skip
    except ValueError as error:
        raise RunError(f"{what}: {error}") from None
    if before + len(ids) > context:
        raise RunError(f"{what} takes {before + len(ids)} places, and the model has {context}")
    return ids


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- stories


def _stories(session: Any, raw: dict[str, Any], path: Path, folder: Path) -> Callable[[], dict[str, float]]:
    stories, files = vist.stories(raw, path.name), _pictures(folder)
    used = sorted({picture for story in stories for picture in story.pictures})
    there = [picture for picture in used if picture in files]
    if not any(set(story.pictures) <= files.keys() for story in stories):
        raise RunError(f"{path}: no story has all its pictures in {folder}, whose names end with Flickr's ids ({used[0]}.jpg)")
    return lambda: stories_exam(session, stories, {picture: files[picture] for picture in there})


def stories_exam(session: Any, stories: Sequence[vist.Story], files: dict[int, Path]) -> dict[str, float]:
    """``vist/CONTEXT/recall@k``: whether a story's last picture is among the first k of all pictures of all stories, told as ``vist.CONTEXTS`` say.

    Pictures that the prompt shows are none to be found. As in the released script, a picture that is not there or cannot be read is no
    candidate, and its stories are left out: the data set's pictures vanish from Flickr.
    """
    used = sorted({picture for story in stories for picture in story.pictures} & files.keys())
    states, read = _pooled(session, [files[picture] for picture in used], skip=True)
    places = {used[number]: place for place, number in enumerate(read)}
    whole = [story for story in stories if places.keys() >= set(story.pictures)]
    if not whole:
        raise RunError("Visual Storytelling: no story has all its pictures")
    _say(
        f"Visual Storytelling: {len(whole)} stories, {len(places)} pictures; {len(stories) - len(whole)} stories lack a picture and are left out"
    )
    targets = torch.tensor([places[story.pictures[-1]] for story in whole])
    own = torch.nn.functional.one_hot(targets, len(places)).bool().to(states.device)
    measured: dict[str, float] = {}
    for context in vist.CONTEXTS:
        told = [vist.prompt(story, context, Retrieval.token) for story in whole]
        ids = [_encode(session, parts, f"story {story.id}") for story, (parts, _) in zip(whole, told, strict=True)]
        shown = [[places[picture] for picture in pictures] for _, pictures in told]
        found = scores(session, ids, states, shown)
        for row, seen in zip(found, shown, strict=True):
            row[sorted(set(seen))] -= SEEN
        measured |= recall(found, f"vist/{context}", own=own)
    return measured | {"vist/stories": len(whole), "vist/pictures": len(places)}


# ----------------------------------------------------------------------------------------------------------- dialogues


def _dialogs(session: Any, raw: dict[str, Any], path: Path, folder: Path) -> Callable[[], dict[str, float]]:
    dialogs, files = visdial.dialogs(raw, path.name), _pictures(folder)
    missing = [dialog.picture for dialog in dialogs if dialog.picture not in files]
    if missing:
        raise RunError(
            f"{path}: {len(missing)} of {len(dialogs)} pictures are not in {folder}, the first is that of id {missing[0]} "
            f"(VisualDialog_val2018_{missing[0]:012d}.jpg)"
        )
    beside = path.with_name(f"{path.stem}_dense_annotations.json")
    rated = []
    if beside.exists():
        try:
            notes = json.loads(beside.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise RunError(f"{beside} is no JSON: {error}") from None
        rated = visdial.dense(notes, dialogs, beside.name)
    _say(
        f"Visual Dialog: {len(dialogs)} dialogues; "
        + (f"{len(rated)} rated rounds" if rated else f"no {beside.name} beside them, so no ndcg")
    )
    return lambda: dialogs_exam(session, dialogs, files, rated)


def dialogs_exam(
    session: Any, dialogs: Sequence[visdial.Dialog], files: dict[int, Path], rated: Sequence[visdial.Rated] = ()
) -> dict[str, float]:
    """Pictures by dialogues and dialogues by pictures, ``visdial/{image, text}_retrieval/recall@k``; and ``visdial/answers/..``, how each round's
    right answer ranks among its options by their cross-entropy.

    ``visdial/answers_released/..`` is what the released script's arithmetic gives: labels are not shifted (``answer_losses``), and ratings
    are compared with the round behind the rated one (``visdial.score``). Its recall of pictures, which it calls text to image, is that of
    dialogues by their pictures, ``text_retrieval`` here.
    """
    shown = sorted({dialog.picture for dialog in dialogs})
    states, _ = _pooled(session, [files[picture] for picture in shown])
    places = torch.tensor([shown.index(dialog.picture) for dialog in dialogs], device=states.device)
    measured: dict[str, float] = {"visdial/dialogues": len(dialogs)}
    if len(dialogs) > 1:
        texts = [_encode(session, [visdial.searched(d, Retrieval.token)], f"the dialogue of picture {d.picture}") for d in dialogs]
        cosines = scores(session, texts, states)
        own = torch.nn.functional.one_hot(places, len(shown)).bool()
        measured |= recall(cosines, "visdial/image_retrieval", own=own) | recall(cosines.T, "visdial/text_retrieval", own=own.T)
    model = session.model.eval()
    losses = [list(_ranked(session, model, dialog, states[place][None])) for dialog, place in zip(dialogs, places.tolist(), strict=True)]
    for name, which, later in (("answers", 0, 0), ("answers_released", 1, 1)):
        told = visdial.score(dialogs, [[options[which] for options in rounds] for rounds in losses], rated, later=later)
        measured |= {f"visdial/{name}/{key}": value for key, value in told.items()}
    return measured


def _ranked(session: Any, model: Any, dialog: visdial.Dialog, states: Tensor) -> Iterable[tuple[list[float], list[float]]]:
    """Of every round of a dialogue the losses of its options, shifted and not."""
    for number, turn in enumerate(dialog.rounds):
        asked, what = visdial.asked(dialog, number), f"round {number + 1} of the dialogue of picture {dialog.picture}"
        prompt = _encode(session, [None, asked], what)
        answers = [_encode(session, [option], what, before=len(prompt)) for option in turn.options]
        ids = torch.tensor([prompt], device=session.place.device)
        yield tuple(loss.tolist() for loss in answer_losses(model, ids, answers, image_states=states))
