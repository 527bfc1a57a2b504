"""Measuring a model on the shapes world: captions by CHAIR, questions by POPE, and whether the picture matters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmfast.data.synthetic import PROMPT, Scene, parse
from mmfast.eval import chair, pope
from mmfast.models.generate import until
from mmfast.models.tokenizer import plain_text

from .checkpoint import Run

if TYPE_CHECKING:
    from .loop import Options
    from .session import Session


class Exam:
    """Held-out scenes, their pictures and questions; the same for every model of a seed."""

    def __init__(self, session: Session, *, scenes: int = 500, statistics_scenes: int = 10_000, split: str = "eval"):
        world = session.world
        self.scenes = world.scenes(split, scenes)
        self.pictures = session.exam_pictures(self.scenes)
        self.statistics = chair.Cooccurrence(world, world.scenes("train", statistics_scenes))
        self.questions = pope.build(world, self.scenes, self.statistics)

    def __call__(self, session: Session, *, template: str = "bare", permuted: bool = False) -> tuple[dict[str, float], dict]:
        """All metrics, flat, and per-image details: captions, false mentions and mentions.

        ``permuted`` shows every question and caption another scene's picture: what is left is what the words alone give away.
        """
        session.model.eval()
        states = session.states(self.pictures)
        if permuted:
            states = states.roll(len(states) // 2, 0)
        captions, ended = caption_all(session, states, template)
        metrics = chair.caption_metrics(session.world, self.scenes, captions, self.statistics)
        metrics["ended"] = ended
        metrics |= pope.score(self.questions, self.answers(session, states, template))
        false, total = claims(session, self.scenes, captions)
        return metrics, {"captions": captions, "false": false, "mentions": total}

    @torch.no_grad()
    def answers(self, session: Session, states: Tensor, template: str, batch: int = 1000) -> list[bool]:
        """Whether "yes" is likelier than "no" as the first word of the answer."""
        encode = session.encoder(template)
        yes, no = session.tokenizer.convert_tokens_to_ids(["yes", "no"])
        said = [False] * len(self.questions)
        for numbers, ids in alike([encode([(f"<image> {q.text}", None)])[0] for q in self.questions], batch):
            pictures = torch.tensor([self.questions[i].image for i in numbers], device=states.device)
            ids = ids.to(session.place.device)
            hidden = session.model.hidden(ids, image_states=states[pictures], **session.beside(ids))
            logits = session.model.language.get_output_embeddings()(hidden[:, -1])
            for i, value in zip(numbers, (logits[:, yes] > logits[:, no]).tolist(), strict=True):
                said[i] = value
        return said


def alike(prompts: Sequence[Sequence[int]], batch: int = 250) -> Iterator[tuple[list[int], Tensor]]:
    """Prompts of one length together, which need no padding, at most ``batch`` at a time: their numbers, and their ids ``[B, T]``."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    for numbers in by_length.values():
        for first in range(0, len(numbers), batch):
            part = numbers[first : first + batch]
            yield part, torch.tensor([prompts[i] for i in part])


def caption_all(session: Session, states: Tensor, template: str = "bare", batch: int = 250) -> tuple[list[str], float]:
    """Greedy captions of pictures given by their states, and the share that came to an end."""
    encode = session.encoder(template)
    (ids, _), end, texts, ended = encode([(f"<image> {PROMPT}", None)]), encode.end_token, [], 0
    for part in states.split(batch):
        prompts = torch.tensor([ids] * len(part), device=session.place.device)
        out = session.model.generate(
            prompts, image_states=part, end=end, stops=session.model.stops, max_new_tokens=64, **session.beside(prompts)
        )
        said, over = [plain_text(session.tokenizer, row) for row in out.tolist()], (out == end).any(1).tolist()
        ended += sum(over) if not encode.stop else sum(encode.stop in text for text in said)
        texts += [until(text, encode.stop) for text in said]
    return texts, ended / max(len(texts), 1)


def claims(session: Session, scenes: list[Scene], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """False mentions and mentions of every caption."""
    found = [parse(text) for text in texts]
    false = [sum(session.world.claim_error(s, m) in ("object", "colour") for m in f) for s, f in zip(scenes, found, strict=True)]
    return np.array(false), np.array([len(f) for f in found])


# --------------------------------------------------------------------------------------------------------- any records


@contextmanager
def looking(session: Session, source: Any) -> Iterator[Tensor | None]:
    """While a source is measured it lays out rows one by one, and opens no picture where the tower's states of all are at hand, which are given."""
    from .supervised import cached_states

    states, before = cached_states(session, source), (source.packing, source.with_pictures)
    source.packing, source.with_pictures = False, states is None
    try:
        yield states
    finally:
        source.packing, source.with_pictures = before


@torch.no_grad()
def measure_answers(session: Session, source: Any, *, batch: int = 64, limit: int | None = None) -> dict[str, float]:
    """``loss`` a token, and ``answer_accuracy``: the share of answers all of whose tokens are the likeliest given those before them, which is
    to say the answers that greedy decoding gives word for word. Over the first ``limit`` items of a source."""
    from .supervised import see

    model = session.model.eval()
    head = model.language.get_output_embeddings()
    loss, tokens, right, answers = 0.0, 0, 0, 0
    with looking(session, source) as states:
        for index in torch.arange(min(len(source), limit or len(source))).split(batch):
            rows = session.place.to(source.batch(index))
            images = see(session, rows, states)
            hidden = model.hidden(rows["input_ids"], labels=rows["labels"], **images)[:, :-1]
            labels = model.targets(rows["labels"], rows["input_ids"], **images)[:, 1:]
            scored = labels != -100
            logits = head(hidden[scored].to(head.weight.dtype)).float()
            loss += torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum").item()
            tokens += int(scored.sum())
            # An answer is a run of scored tokens in a row of the batch.
            begins = scored & ~torch.nn.functional.pad(scored, (1, 0))[:, :-1]
            number = (begins.flatten().cumsum(0) - 1)[scored.flatten()]
            missed = torch.zeros(int(begins.sum()), dtype=torch.long, device=number.device)
            missed.index_add_(0, number, (logits.argmax(-1) != labels[scored]).long())
            right, answers = right + int((missed == 0).sum()), answers + len(missed)
    return {"loss": loss / max(tokens, 1), "answer_accuracy": right / max(answers, 1), "answers": answers}


# ------------------------------------------------------------------------------------------------------- during training

PROBE_SCENES = 100
PROBE_SAMPLES = 4


def make_probe(
    session: Session, source: Any, template: str, run: Run, options: Options, *, light: bool = False
) -> Callable[[int], dict[str, float]] | None:
    """``probe(step)`` for the loop, or None where nothing is to be measured.

    With ``options.eval_every``: CHAIR and POPE on scenes that nothing else uses, for a model that speaks the shapes world's words, and for
    every model a few answers, into ``samples/steps.jsonl``. Without, ``light`` gives the words a caption: captions that grow short are the
    first sign of a preference method that pushes too hard.
    """
    if not options.eval_every and not (light and session.knows_the_world):
        return None
    if session.knows_the_world:
        scenes = session.world.scenes("valid", PROBE_SCENES)
        states = session.states(torch.from_numpy(session.world.render(scenes)))
        exam = Exam(session, scenes=PROBE_SCENES, statistics_scenes=2000, split="valid") if options.eval_every else None
        names = _keep_pictures(run, [exam.pictures[i : i + 1] for i in range(PROBE_SAMPLES)]) if exam is not None else []

        def measure(step: int) -> dict[str, float]:
            if exam is not None:
                measured, details = exam(session, template=template)
                _note(run, step, [{"said": text, "images": n} for text, n in zip(details["captions"], names, strict=False)])
                return {k: float(v) for k, v in measured.items() if v is not None}
            texts, _ = caption_all(session, states, template)
            return {"len": sum(len(text.split()) for text in texts) / len(texts)}

        return measure
    if not hasattr(source, "prompts"):
        return None
    asked = source.prompts(PROBE_SAMPLES)
    names = _keep_pictures(run, [pictures for *_, pictures in asked])

    def samples(step: int) -> dict[str, float]:
        encode = session.encoder(template)
        said = zip(asked, answer(session, asked, end=encode.end_token, stop=encode.stop), names, strict=True)
        _note(run, step, [{"asked": question, "said": words, "images": n} for (question, *_), words, n in said])
        return {}

    return samples


def answer(
    session: Session,
    asked: list[tuple[str, list[int], list[int], Tensor]],
    *,
    end: int | None = None,
    stop: str = "",
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy answers, up to the token ``end`` (default: the tokenizer's end token) or the text ``stop``, to (question, token ids, frames of each
    picture, all these uint8 [M, H, W, 3])."""
    said = []
    session.model.eval()
    for _, ids, frames, pictures in asked:
        prompt = torch.tensor([ids], device=session.place.device)
        seen = {"pixel_values": session.pixels(pictures), **session.beside(prompt)} if len(pictures) else {}
        if max(frames, default=1) > 1:
            seen["image_frames"] = torch.tensor(frames)
        last = session.tokenizer.eos_token_id if end is None else end
        out = session.model.generate(prompt, end=last, stops=session.model.stops, max_new_tokens=max_new_tokens, **seen)
        said.append(until(plain_text(session.tokenizer, out[0].tolist()), stop))
    return said


def _keep_pictures(run: Run, groups: list[Tensor]) -> list[list[str]]:
    """Pictures uint8 [M, H, W, 3] of each sample into ``samples/``, named after what they show: stages ask about different ones."""
    from PIL import Image

    names = [[f"{hashlib.sha256(p.numpy().tobytes()).hexdigest()[:12]}.png" for p in pictures] for pictures in groups]
    if run.main:
        (run.folder / "samples").mkdir(exist_ok=True)
        for pictures, files in zip(groups, names, strict=True):
            for picture, name in zip(pictures, files, strict=True):
                Image.fromarray(picture.numpy()).save(run.folder / "samples" / name)
    return names


def _note(run: Run, step: int, rows: list[dict[str, Any]]) -> None:
    if run.main:
        (run.folder / "samples").mkdir(exist_ok=True)
        with open(run.folder / "samples" / "steps.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
