"""Supervised training: the stages of a ``System``, one after another, over the shared loop.

Where a stage leaves the tower frozen and its pictures fit in memory, the tower's states are computed once and batches read them.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.data import chat, images, supervised
from mmfast.data.synthetic import World, WorldConfig
from mmfast.models import build
from mmfast.models.tokenizer import word_tokenizer
from mmfast.ops import linear_logp
from mmfast.spec import Data, Stage, System, to_dict

from .loop import Run, RunError, load_model, train

# Part of a cached base model's name: raise it when training changes what the same recipe and seed give.
BASE_VERSION = 3
_STATE_BYTES = 2 << 30


class Session:
    """A system made concrete: its model, tokenizer and, for built-in data, its world."""

    def __init__(self, system: System, *, seed: int, vocabulary: tuple[str, ...] | None = None):
        if system.language.weights or system.encoder.weights:
            raise RunError(
                f"{system.name}: training from {system.language.weights} and {system.encoder.weights} is not in this version yet; use --tiny"
            )
        torch.manual_seed(seed)
        self.system, self.seed = system, seed
        self._sources: dict[str, supervised.Source] = {}
        self.world = World(WorldConfig(seed=seed))
        self.tokenizer = word_tokenizer(vocabulary or self.world.vocabulary)
        t = self.tokenizer
        self.image_token = t.convert_tokens_to_ids("<image>")
        self.model = build(system, tokenizer=t)

    def encoder(self, template: str, max_length: int = 2048) -> supervised.Encode:
        """``encode(turns)`` for this tokenizer and picture size."""
        return partial(
            lambda turns, **k: chat.encode(self.tokenizer, template, turns, **k),
            image_tokens=self.system.encoder.tokens, image_token=self.image_token, max_length=max_length,
        )  # fmt: skip

    def source(self, data: Data, template: str, max_length: int = 2048) -> supervised.Source:
        """The stages of a system mostly read the same data: it is made once."""
        key = repr((data, template, max_length))
        if key not in self._sources:
            self._sources[key] = self._make_source(data, template, max_length)
        return self._sources[key]

    def _make_source(self, data: Data, template: str, max_length: int) -> supervised.Source:
        encode, pad = self.encoder(template, max_length), self.tokenizer.pad_token_id
        if data.path is not None:
            return supervised.Records(data.path, data.images, encode, pad, size=self.system.image.size, on_bad_record=data.on_bad_record)
        if data.name == "shapes":
            return supervised.Shapes(self.world, encode, pad)
        if data.name == "easy_vqa":
            return supervised.EasyVQA(encode, pad)
        raise RunError(f"data {data.name!r} is not built in; give its records with --data FILE (JSON or JSONL) and --images FOLDER")

    def pixels(self, pictures: Tensor) -> Tensor:
        return images.normalise(pictures, self.system.image)

    @torch.no_grad()
    def states(self, pictures: Tensor, batch: int = 250) -> Tensor:
        """Tower states of uint8 pictures, ``[M, N, D]``."""
        self.model.eval()
        return torch.cat([self.model.encoder(self.pixels(part)) for part in pictures.split(batch)])


class WordHead(nn.Module):
    """Readers of the bag-of-words warm-up: per patch, classes from the tower and words from the projected state through the language model's
    own embeddings; log-sum-exp over patches says whether any patch shows it."""

    def __init__(self, width: int, classes: int, words: int):
        super().__init__()
        self.classes = nn.Linear(width, classes)
        nn.init.constant_(self.classes.bias, -4.0)
        self.bias = nn.Parameter(torch.full((words,), -3.0))

    def forward(self, states: Tensor, projected: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """states [M, N, D], projected [M, N, W], table [words, W] -> logits [M, classes], [M, words]."""
        classes = self.classes(F.layer_norm(states, states.shape[-1:]))
        return torch.logsumexp(classes, 1), torch.logsumexp(4 * projected @ table.T + self.bias, 1)


def run_stage(session: Session, run: Run, stage: Stage, *, first_step: int, resume: bool, save_every: int | None, quiet: bool) -> int:
    model, source = session.model, session.source(stage.data, stage.template, stage.max_length)
    model.train_only(stage.train)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = dict(
        optim=stage.optim, items=len(source), seed=session.seed, stage=stage.name, first_step=first_step, resume=resume,
        save_every=save_every, quiet=quiet,
    )  # fmt: skip
    if stage.objective == "words":
        return _words_stage(session, run, source, parameters, options)
    states = None
    tokens = session.system.encoder.tokens * session.system.encoder.width * 4
    if "encoder" not in stage.train and len(source.pictures) * tokens <= _STATE_BYTES:
        states = session.states(source.pictures)

    def step(index: Tensor) -> tuple[Tensor, dict[str, float]]:
        batch = source.batch(index)
        rows, pictures = batch.pop("image_rows"), source.picture_of[index]
        # A picture passes tower and connector once, however many rows show it.
        seen = model.connector(states[pictures]) if states is not None else model.embed_images(session.pixels(source.pictures[pictures]))
        hidden = model.hidden(batch["input_ids"], image_embeds=seen[rows])
        return answer_loss(model, hidden, batch["labels"], batch["token_weights"]), {"tokens": batch["input_ids"].numel()}

    return train(run, model, parameters, step, **options)


def answer_loss(model: nn.Module, hidden: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Weighted sum of the answers' cross-entropies; the head sees the rows before an answer token, and no other."""
    head = model.language.get_output_embeddings()
    return -(linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias) * token_weights[:, 1:]).sum()


def _words_stage(session: Session, run: Run, source, parameters: list, options: dict) -> int:
    model = session.model
    names, words, classes = source.words()
    ids = torch.tensor(session.tokenizer.convert_tokens_to_ids(names))
    torch.manual_seed(session.seed)
    head = WordHead(session.system.encoder.width, classes.shape[1], len(names))

    def step(index: Tensor) -> tuple[Tensor, dict[str, float]]:
        states = model.encode(session.pixels(source.pictures[index]))
        class_logits, word_logits = head(states, model.connector(states), model.language.get_input_embeddings().weight[ids])
        by_class = F.binary_cross_entropy_with_logits(class_logits, classes[index]) * classes.shape[1]
        by_word = F.binary_cross_entropy_with_logits(word_logits, words[index]) * len(names)
        return by_class + by_word, {"loss/words": by_word.item()}

    return train(run, model, [*parameters, *head.parameters()], step, extra=head, **{**options, "items": len(source.pictures)})


def train_system(
    system: System, run: Run, *, seed: int = 0, resume: bool = False, save_every: int | None = None, quiet: bool = False,
    vocabulary: tuple[str, ...] | None = None,
) -> Session:  # fmt: skip
    """All stages of a system."""
    session, step = Session(system, seed=seed, vocabulary=vocabulary), 0
    if resume and (last := run.last_checkpoint()) is not None:
        load_model(session.model, last[1] / "model.safetensors")
    for stage in system.stages:
        step = run_stage(session, run, stage, first_step=step, resume=resume, save_every=save_every, quiet=quiet)
    return session


# ------------------------------------------------------------------------------------------------------------- base models


def base_name(system: System, seed: int) -> str:
    """A name that changes with anything that changes the trained base: world, recipe, seed."""
    key = {"system": to_dict(replace(system, name="", paper="")), "seed": seed, "version": BASE_VERSION}
    return "base-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(out: Path) -> Path:
    """Where trained bases are kept: ``MMFAST_CACHE``, or ``.cache`` beside the run."""
    return Path(os.environ.get("MMFAST_CACHE") or out.parent / ".cache")


def base_model(system: System, *, seed: int, cache: Path, quiet: bool = False) -> tuple[Session, Path]:
    """The trained system of a seed, from the cache or trained into it. Returns it with its run folder."""
    folder = cache / base_name(system, seed)
    last = Run(folder, resume=True).last_checkpoint() if (folder / "done").exists() else None
    if last is not None:
        session = Session(system, seed=seed)
        load_model(session.model, last[1] / "model.safetensors")
        return session, folder
    session = train_system(system, Run(folder, resume=True, keep=1), seed=seed, resume=True, quiet=quiet)
    (folder / "done").touch()
    return session, folder
