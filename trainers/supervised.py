"""Supervised training: the stages of a ``System``, one after another, over the shared loop.

Where a stage leaves the tower frozen and its pictures fit in memory, the tower's states are computed once and batches read them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.data import chat, images, supervised
from mmfast.data.records import Records, Stream
from mmfast.data.sources import Conversations, Streamed
from mmfast.data.synthetic import World, WorldConfig
from mmfast.models import build
from mmfast.models.tokenizer import word_tokenizer
from mmfast.ops import linear_logp
from mmfast.spec import Compute, Data, Mixture, Stage, System, to_dict

from .checkpoint import Run, RunError, load_model
from .loop import Objective, Options, train
from .place import Place

# Part of a cached base model's name: raise it when training changes what the same recipe and seed give.
BASE_VERSION = 4
_STATE_BYTES = 2 << 30


class Session:
    """A system made concrete: its model, tokenizer and, for built-in data, its world."""

    def __init__(self, system: System, *, seed: int, vocabulary: tuple[str, ...] | None = None, place: Place | None = None):
        if system.language.weights or system.encoder.weights:
            raise RunError(
                f"{system.name}: training from {system.language.weights} and {system.encoder.weights} is not in this version yet; use --tiny"
            )
        self.system, self.seed, self.place = system, seed, place or Place(torch.device("cpu"))
        self._sources: dict[str, Any] = {}
        self.world = World(WorldConfig(seed=seed))
        self.tokenizer = word_tokenizer(vocabulary or self.world.vocabulary)
        t = self.tokenizer
        self.image_token = t.convert_tokens_to_ids("<image>")
        self.rebuild()

    def rebuild(self) -> None:
        """The model as it was before any training."""
        torch.manual_seed(self.seed)
        self.model = build(self.system, tokenizer=self.tokenizer).to(self.place.device)

    def encoder(self, template: str, max_length: int = 2048) -> chat.Encoder:
        """``encode(turns)`` for this tokenizer and picture size."""
        t = self.tokenizer
        return chat.Encoder(t, template, self.system.encoder.tokens, self.image_token, t.pad_token_id, max_length)

    def source(self, data: Data | Mixture, template: str, max_length: int = 2048):
        """The stages of a system mostly read the same data: it is made once."""
        key = repr((data, template, max_length))
        if key not in self._sources:
            self._sources[key] = self._make_source(data, template, max_length)
        return self._sources[key]

    def _make_source(self, data: Data | Mixture, template: str, max_length: int):
        encode, size = self.encoder(template, max_length), self.system.image.size
        parts = data.parts if isinstance(data, Mixture) else (data,)
        if all(part.path is not None for part in parts):
            if any(part.streaming for part in parts):
                if len(parts) > 1:
                    raise RunError(f"{data.name}: a mixture cannot be streamed; leave streaming off, or train on one part")
                return Streamed(Stream(data, seed=self.seed, open_pictures=data.on_bad_record == "skip"), encode, size=size)
            return Conversations([Records(part) for part in parts], encode, size=size, seed=self.seed)
        if len(parts) == 1 and data.name == "shapes":
            return supervised.Shapes(self.world, encode, encode.pad_token)
        if len(parts) == 1 and data.name == "easy_vqa":
            return supervised.EasyVQA(encode, encode.pad_token)
        name = next(part.name for part in parts if part.path is None)
        raise RunError(f"data {name!r} is not built in; give its records with --data FILE and --images FOLDER (docs/data.md)")

    def pixels(self, pictures: Tensor) -> Tensor:
        return images.normalise(pictures.to(self.place.device), self.system.image)

    @torch.no_grad()
    def states(self, pictures: Tensor, batch: int = 250) -> Tensor:
        """Tower states of uint8 pictures, ``[M, N, D]``."""
        self.model.eval()
        return torch.cat([self.model.encoder(self.pixels(part)) for part in pictures.split(batch)])

    def states_of(self, source, batch: int = 250) -> Tensor:
        """Tower states of all pictures of a source, ``[M, N, D]``, read a batch at a time."""
        return torch.cat([self.states(source.load_pictures(ids)) for ids in torch.arange(source.picture_count).split(batch)])


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


def see(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> dict[str, Tensor]:
    """What the language model gets of a batch's pictures. A picture passes tower and connector once, however many rows show it."""
    if not len(batch["image_rows"]):
        return {}
    model = session.model
    if states is not None:
        seen = model.connector(states[batch["picture_ids"].to(states.device)].to(session.place.device))
    else:
        seen = model.embed_images(session.pixels(batch["pictures"]))
    return {"image_embeds": seen, "image_rows": batch["image_rows"]}


def idle(model: nn.Module) -> Tensor | float:
    """0, as far as arithmetic goes, but attached to tower and connector: a rank whose batch has no picture has gradients for them like all
    others, and nobody waits for it."""
    trained = [p for part in (model.encoder, model.connector) for p in part.parameters() if p.requires_grad]
    return sum(p.flatten()[:1].sum() * 0 for p in trained) if trained else 0.0


def token_logps(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of every next token ``[B, T - 1]`` (0 where nothing is scored) and the row each belongs to. The head sees the positions
    before a scored token, and no other."""
    model, images = session.model, see(session, batch, states)
    hidden = model.hidden(batch["input_ids"], position_ids=batch.get("position_ids"), **images)
    head = model.language.get_output_embeddings()
    logp = linear_logp(hidden[:, :-1], head.weight, batch["labels"][:, 1:], head.bias)
    if not images:
        logp = logp + idle(model)
    return logp, batch["rows"][:, 1:]


def run_stage(session: Session, run: Run, stage: Stage, *, first_step: int, options: Options) -> int:
    """One stage of a system over the shared loop."""
    model, source = session.model, session.source(stage.data, stage.template, stage.max_length)
    source.packing = options.compute.packing
    model.train_only(stage.train)
    if stage.objective == "words":
        objective, source = words_stage(session, source)
        return train(run, objective, source, optim=stage.optim, stage=stage.name, options=options, first_step=first_step)
    states = cached_states(session, source, stage.train)
    source.with_pictures = states is None

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, float]]:
        logp, rows = token_logps(session, batch, states)
        weights = (1 / totals.clamp_min(1)).to(logp.dtype)[batch["groups"]][rows]
        return -(logp * weights).sum(), {"tokens": batch["input_ids"].numel()}

    objective = Objective(step, model, blocks=model.language.get_decoder().layers)
    return train(run, objective, source, optim=stage.optim, stage=stage.name, options=options, first_step=first_step)


def cached_states(session: Session, source, train: Sequence[str]) -> Tensor | None:
    """The tower's states of all pictures, where the tower stays frozen and they fit in memory."""
    size = session.system.encoder.tokens * session.system.encoder.width * 4
    pictures = getattr(source, "picture_count", None)  # a stream does not know
    if "encoder" in train or not pictures or pictures * size > _STATE_BYTES:
        return None
    return session.states_of(source)


class _ItemsArePictures:
    """A source whose items are its pictures, with what is true of them."""

    def __init__(self, source, words: Tensor, classes: Tensor):
        self.source, self.words, self.classes = source, words, classes

    def __len__(self) -> int:
        return len(self.source.pictures)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {
            "pictures": self.source.pictures[index], "words": self.words[index], "classes": self.classes[index],
            "counts": torch.tensor([len(index)], dtype=torch.float64),
        }  # fmt: skip


def words_stage(session: Session, source) -> tuple[Objective, _ItemsArePictures]:
    names, words, classes = source.words()
    ids = torch.tensor(session.tokenizer.convert_tokens_to_ids(names), device=session.place.device)
    torch.manual_seed(session.seed)
    model, head = session.model, WordHead(session.system.encoder.width, classes.shape[1], len(names)).to(session.place.device)

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        states = model.encode(session.pixels(batch["pictures"]))
        class_logits, word_logits = head(states, model.connector(states), model.language.get_input_embeddings().weight[ids])
        by_class = F.binary_cross_entropy_with_logits(class_logits, batch["classes"], reduction="sum")
        by_word = F.binary_cross_entropy_with_logits(word_logits, batch["words"], reduction="sum")
        share = totals[0].to(by_word.dtype)  # means over pictures, sums over words and classes
        return (by_class + by_word) / share, {"loss/words": by_word.detach() / share}

    return Objective(step, model, head=head), _ItemsArePictures(source, words, classes)


def train_system(
    system: System,
    run: Run,
    *,
    options: Options | None = None,
    seed: int = 0,
    quiet: bool = False,
    vocabulary: tuple[str, ...] | None = None,
) -> Session:
    """All stages of a system."""
    options = options or Options(seed=seed, quiet=quiet, compute=system.compute)
    session, step = Session(system, seed=options.seed, vocabulary=vocabulary, place=options.place), 0
    if options.resume and (last := run.last_checkpoint()) is not None:
        load_model(session.model, last[1])
    for stage in system.stages:
        step = run_stage(session, run, stage, first_step=step, options=options)
        if options.place.sharded:  # shards cannot be undone in place: the stage's checkpoint is read into a whole model
            session.rebuild()
            load_model(session.model, run.last_checkpoint()[1])
    return session


# ------------------------------------------------------------------------------------------------------------- base models


def base_name(system: System, seed: int) -> str:
    """A name that changes with anything that changes the trained base: world, recipe, seed."""
    key = {
        "system": to_dict(replace(system, name="", paper="", compute=Compute(precision=system.compute.precision))),
        "seed": seed,
        "version": BASE_VERSION,
    }
    return "base-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(out: Path) -> Path:
    """Where trained bases are kept: ``MMFAST_CACHE``, or ``.cache`` beside the run."""
    return Path(os.environ.get("MMFAST_CACHE") or out.parent / ".cache")


def base_model(system: System, *, options: Options, cache: Path) -> tuple[Session, Path]:
    """The trained system of a seed, from the cache or trained into it. Returns it with its run folder."""
    folder = cache / base_name(system, options.seed)
    run = Run(folder, resume=True, keep=1, main=options.place.main)
    last = run.last_checkpoint() if (folder / "done").exists() else None
    if last is not None:
        session = Session(system, seed=options.seed, place=options.place)
        load_model(session.model, last[1])
        return session, folder
    session = train_system(system, run, options=replace(options, resume=True, save_every=None))
    if options.place.main:
        (folder / "done").touch()
    return session, folder
