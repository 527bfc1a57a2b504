"""Supervised training: the stages of a ``System``, one after another, over the shared loop.

Where a stage leaves the tower frozen and its pictures fit in memory, the tower's states are computed once and batches read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops import linear_logp
from mmfast.spec import Alignment, Compute, SharedTokens, Stage, System, to_dict

from . import queries, retrieval
from .checkpoint import Run, RunError, load_model, load_state
from .evaluate import make_probe
from .loop import Objective, Options, train
from .session import Session

# Part of a cached base model's name: raise it when training changes what the same recipe and seed give.
BASE_VERSION = 4
_STATE_BYTES = 2 << 30


class WordHead(nn.Module):
    """Readers of the bag-of-words warm-up: per patch, classes from the tower and words from the projected state through the language model's
    own embeddings; log-sum-exp over patches says whether any patch shows it. ``embedding``: the language model's width, where the connector
    does not project state by state and the head does it in its place. ``mixed``: the language model's width, where the connector mixes states:
    classes are then read from what it makes, too, or it would tell that something is red and something a circle, and not what."""

    def __init__(self, width: int, classes: int, words: int, embedding: int | None = None, mixed: int | None = None):
        super().__init__()
        self.again = None if mixed is None else nn.Linear(mixed, classes)
        if mixed is not None:
            nn.init.constant_(self.again.bias, -4.0)
        self.classes = nn.Linear(width, classes)
        self.project = None if embedding is None else nn.Linear(width, embedding)
        nn.init.constant_(self.classes.bias, -4.0)
        self.bias = nn.Parameter(torch.full((words,), -3.0))

    def forward(self, states: Tensor, projected: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
        """states [M, N, D], projected [M, N, W] or None, table [words, W] -> logits [M, classes] (twice side by side with ``mixed``),
        [M, words]."""
        projected = states if projected is None else projected
        projected = projected if self.project is None else self.project(projected)
        read = [(self.classes, states)] + ([] if self.again is None else [(self.again, projected)])
        classes = [torch.logsumexp(reader(F.layer_norm(x, x.shape[-1:])), 1) for reader, x in read]
        return torch.cat(classes, 1), torch.logsumexp(4 * projected @ table.T + self.bias, 1)


def see(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> dict[str, Tensor]:
    """What the language model gets of a batch's pictures. A picture passes tower and connector once, however many rows show it."""
    if not len(batch["image_rows"]):
        return {}
    shown, asked = session.states_in(batch, states), {name: batch[name] for name in batch if name.startswith("qformer_")}
    if asked:  # the connector reads it as often as it is shown, each time beside another question
        return {"image_embeds": session.model.embed_images(image_states=shown, image_rows=batch["image_rows"], **asked)}
    seen = session.model.embed_images(image_states=shown, image_frames=batch.get("frames"))
    return {"image_embeds": seen, "image_rows": batch["image_rows"]}


def idle(model: nn.Module) -> Tensor | float:
    """0, as far as arithmetic goes, but attached to tower and connector: a rank whose batch has no picture has gradients for them like all
    others, and nobody waits for it."""
    trained = [p for part in (model.encoder, model.connector) for p in part.parameters() if p.requires_grad]
    return sum(p.flatten()[:1].sum() * 0 for p in trained) if trained else 0.0


def hidden_states(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> Tensor:
    """Last hidden states ``[B, T, D]`` of a batch."""
    return _hidden(session, batch, see(session, batch, states))


def _hidden(session: Session, batch: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
    hidden = session.model.hidden(batch["input_ids"], position_ids=batch.get("position_ids"), labels=batch["labels"], **images)
    return hidden if images else hidden + idle(session.model)


def token_logps(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of every next token ``[B, T - 1]`` (0 where nothing is scored) and the row each belongs to. The head sees the positions
    before a scored token, and no other."""
    return _next_tokens(session, batch, states), batch["rows"][:, 1:]


def _next_tokens(session: Session, batch: dict[str, Tensor], states: Tensor | None, **options: bool):
    """What ``linear_logp`` with these options says of every next token."""
    model, images = session.model, see(session, batch, states)
    hidden, head = _hidden(session, batch, images), model.language.get_output_embeddings()
    labels = model.targets(batch["labels"], batch["input_ids"], **images)
    return linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias, **options)


def run_stage(session: Session, run: Run, stage: Stage, *, first_step: int, options: Options) -> int:
    """One stage of a system over the shared loop."""
    model, source = session.model, session.source_of(stage)
    source.packing, source.pad_to = options.compute.packing, options.compute.pad_to
    trained = session.let_train(stage.train, stage.lora)
    if options.place.main and not options.quiet:
        print(
            f"{stage.name} trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters: {', '.join(summarise(trained))}"
        )
    if options.compute.checkpointing:
        model.checkpoint_activations()
    model.drop(stage.dropout)
    objective, items, probe = OBJECTIVES[stage.objective](session, stage, source, run, options)
    return train(
        run, objective, items, probe=probe, optim=stage.optim, stage=stage.name, options=options, first_step=first_step,
        left_out=session.left_out,
    )  # fmt: skip


def lm_stage(session: Session, stage: Stage, source, run: Run, options: Options):
    if source.packing:
        session.check_packing()
    states = cached_states(session, source)
    source.with_pictures = states is None
    objective = answer_objective(session, states, stage.z_loss, getattr(source, "loss_weights", None))
    return objective, source, make_probe(session, source, stage.template, run, options)


def answer_objective(session: Session, states: Tensor | None, z_loss: float = 0.0, shares: Tensor | None = None) -> Objective:
    """Cross-entropy of the answers' tokens: of each column of a source its mean over the step's tokens, added up (times ``shares``, where the
    columns are a mixture's sets whose losses have weights); and beside it ``z_loss mean(log^2 Z)`` of the same tokens (``mmfast.losses.lm.z_loss``)."""
    model = session.model

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        said, rows = _next_tokens(session, batch, states, return_stats=bool(z_loss)), batch["rows"][:, 1:]
        logp, stats = said if z_loss else (said, None)
        weights = (1 if shares is None else shares.to(totals)) / totals.clamp_min(1)
        weights = weights.to(logp.dtype)[batch["groups"]][rows]
        loss, measures = -(logp * weights).sum(), {"tokens": batch["input_ids"].numel()}
        if stats is not None:
            z = z_loss * (stats.lse.square() * weights).sum()
            loss, measures = loss + z, {"loss/z": z.detach(), **measures}
        return loss, measures

    return Objective(step, model, blocks=model.blocks)


def retrieval_stage(session: Session, stage: Stage, source, run: Run, options: Options):
    states = cached_states(session, source)
    source.with_pictures = states is None
    return retrieval.retrieval_objective(session, states, stage.contrast), source, make_probe(session, source, stage.template, run, options)


def cached_states(session: Session, source) -> Tensor | None:
    """The tower's states of all pictures, where the tower stays frozen, sees them as they are, and they fit in memory."""
    if session.system.image.augment:
        return None
    states = 8 if isinstance(session.system.fusion, SharedTokens) else session.model.encoder.width * 4  # bytes of one
    size = session.system.encoder.tokens * states
    pictures = getattr(source, "picture_count", None)  # a stream does not know
    if session.model.encoder_learns or not pictures or pictures * size > _STATE_BYTES:
        return None
    return session.states_of(source)


class _ItemsArePictures:
    """A source whose items are its pictures, with what is true of each."""

    def __init__(self, source, **truths: Tensor):
        if not hasattr(source, "picture_count"):
            raise RunError("this stage draws single pictures, and a stream has none that can be counted; leave streaming off")
        self.source, self.truths = source, truths

    def __len__(self) -> int:
        return self.source.picture_count

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        counts = torch.tensor([len(index)], dtype=torch.float64)
        return {"pictures": self.source.load_pictures(index), **{k: v[index] for k, v in self.truths.items()}, "counts": counts}


def words_stage(session: Session, stage: Stage, source, run: Run, options: Options):
    names, words, classes = source.words()
    ids = torch.tensor(session.tokenizer.convert_tokens_to_ids(names), device=session.place.device)
    torch.manual_seed(session.seed)
    model, system = session.model, session.system
    projects = system.projects
    embedding = model.language.get_input_embeddings().embedding_dim
    own, mixed = None if projects else embedding, embedding if system.mixes else None
    head = WordHead(model.encoder.width, classes.shape[1], len(names), own, mixed).to(session.place.device)

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        states = model.encode(session.pixels(batch["pictures"]))
        if getattr(system.connector, "pool", "") == "class":  # what is passed on must hold it all
            states = states[:, :1]
        seen = model.connector(states) if projects else None
        class_logits, word_logits = head(states, seen, model.language.get_input_embeddings().weight[ids])
        true = batch["classes"].repeat(1, class_logits.shape[1] // batch["classes"].shape[1])
        by_class = F.binary_cross_entropy_with_logits(class_logits, true, reduction="sum")
        by_word = F.binary_cross_entropy_with_logits(word_logits, batch["words"], reduction="sum")
        share = totals[0].to(by_word.dtype)  # means over pictures, sums over words and classes
        return (by_class + by_word) / share, {"loss/words": by_word.detach() / share}

    return Objective(step, model, head=head), _ItemsArePictures(source, words=words, classes=classes), None


def tokenizer_stage(session: Session, stage: Stage, source, run: Run, options: Options):
    from . import tokenizer

    pictures = _ItemsArePictures(source)
    return tokenizer.tokenizer_stage(session, stage, options), pictures, tokenizer.make_probe(session, pictures)


def queries_stage(session: Session, stage: Stage, source, run: Run, options: Options):
    states = cached_states(session, source)
    source.with_pictures, source.packing = states is None, False  # texts are compared row by row
    return queries.queries_objective(session, stage, states), queries.Texts(source), None


# An objective's name, to what minimises it: (session, stage, source, run, options) -> objective, what it draws from, what it measures meanwhile.
OBJECTIVES = {
    "lm": lm_stage, "words": words_stage, "tokenizer": tokenizer_stage, "retrieval": retrieval_stage, "queries": queries_stage,
}  # fmt: skip


def train_system(
    system: System, run: Run, *, options: Options | None = None, seed: int = 0, quiet: bool = False, session: Session | None = None
) -> Session:
    """All stages of a system; ``session``: one that was made for it before."""
    options = options or Options(seed=seed, quiet=quiet, compute=system.compute)
    session, step = session or Session(system, seed=options.seed, place=options.place, precision=options.compute.precision), 0
    if run.main:
        session.tokenizer.save_pretrained(run.folder / "tokenizer")
    if options.resume and (last := run.last_checkpoint()) is not None:
        restore(session, system.stages, last[1])
    for stage in system.stages:
        step = run_stage(session, run, stage, first_step=step, options=options)
        if options.place.sharded:  # shards cannot be undone in place: the stage's checkpoint is read into a whole model
            session.rebuild()
            restore(session, system.stages, run.last_checkpoint()[1])
    return session


def restore(session: Session, stages: Sequence[Stage | Alignment], path: Path) -> None:
    """A checkpoint into a session's model, with the adapters and the precision that the stages up to it had. (An alignment is such a stage.)"""
    names = [stage.name for stage in stages]
    at = load_state(path)["stage"]
    for stage in stages[: names.index(at) + 1] if at in names else ():
        session.let_train(stage.train, stage.lora)
    load_model(session.model, path)


def summarise(names: Sequence[str]) -> list[str]:
    """Parameter names with the layers' numbers put together: ``language.model.layers.{0-2}.mlp.up_proj.weight``."""
    groups: dict[str, set[int]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        key = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
        groups.setdefault(key, set()).update([] if found is None else [int(found.group(1))])
    return [key.replace("{}", f"{{{_span(sorted(numbers))}}}") if numbers else key for key, numbers in groups.items()]


def _span(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ",".join(map(str, numbers))


# ------------------------------------------------------------------------------------------------------------- base models


def base_name(system: System, seed: int, precision: str = "fp32") -> str:
    """A name that changes with anything that changes the trained base: world, recipe, seed, the precision it is trained in."""
    key = {
        "system": to_dict(replace(system, name="", paper="", compute=Compute(precision=precision))),
        "seed": seed,
        "version": BASE_VERSION,
    }
    return "base-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(out: Path) -> Path:
    """Where trained bases are kept: ``MMFAST_CACHE``, or ``.cache`` beside the run."""
    return Path(os.environ.get("MMFAST_CACHE") or out.parent / ".cache")


def base_model(system: System, *, options: Options, cache: Path) -> tuple[Session, Path]:
    """The trained system of a seed, from the cache or trained into it. Returns it with its run folder."""
    precision = options.compute.precision  # whose an alignment's policy trains in, too; the policy's own is not asked
    folder = cache / base_name(system, options.seed, precision)
    run = Run(folder, resume=True, keep=1, main=options.place.main)
    last = run.last_checkpoint() if (folder / "done").exists() else None
    if last is not None:
        session = Session(system, seed=options.seed, place=options.place, precision=precision)
        restore(session, system.stages, last[1])
        return session, folder
    session = train_system(system, run, options=replace(options, resume=True, save_every=None, trackers=()))
    if options.place.main:
        (folder / "done").touch()
    return session, folder
