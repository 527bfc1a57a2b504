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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.data import chat, images, supervised
from mmfast.data.records import Records, Stream
from mmfast.data.sources import Conversations, Streamed
from mmfast.data.synthetic import World, WorldConfig
from mmfast.models import build
from mmfast.models.lora import add_lora, lora_parameters, merge_lora
from mmfast.models.pretrained import resolved, tokenizer_for
from mmfast.models.tokenizer import word_tokenizer
from mmfast.ops import linear_logp
from mmfast.spec import Alignment, Compute, Data, Lora, Mixture, Stage, System, to_dict

from .checkpoint import Run, RunError, load_model, load_state
from .evaluate import make_probe
from .loop import Objective, Options, train
from .place import Place
from .runs import is_run

# Part of a cached base model's name: raise it when training changes what the same recipe and seed give.
BASE_VERSION = 4
_STATE_BYTES = 2 << 30


class Session:
    """A system made concrete: its model, tokenizer and, for built-in data, its world."""

    def __init__(self, system: System, *, seed: int, place: Place | None = None, precision: str = "fp32", with_model: bool = True):
        self.seed, self.place = seed, place or Place(torch.device("cpu"))
        # What is read from published weights and does not train may be held in half precision; not in FSDP2's shards, each of which has one
        # type for frozen and trained weights alike (and is gathered in half precision all the same).
        self.dtype = torch.bfloat16 if precision == "bf16" and not self.place.sharded else torch.float32
        self._sources: dict[str, Any] = {}
        self.perceptual: nn.Module | None = None  # (drawn, pixels) -> [B], for a tokenizer's stage; set it before training
        self.touched: set[str] = set()  # names of all parameters that some stage has trained, as they are without adapters
        self.adapters: Lora | None = None
        self.world = World(WorldConfig(seed=seed))
        self.origin = Path(system.weights) if system.weights and is_run(system.weights) else None
        origin = self._open_origin()
        self.system = origin.adopted(system) if origin else system
        self.tokenizer = origin.tokenizer if origin else self._tokenizer()
        self.image_token = self.tokenizer.convert_tokens_to_ids("<image>")
        if with_model:
            self.rebuild(origin)
        elif not self.origin:  # a run has told its sizes
            self.system = resolved(self.system)

    def _open_origin(self) -> Session | None:
        """The run that the system's weights are those of, if they are a run's."""
        from .runs import open_run

        return open_run(self.origin, place=self.place)[0] if self.origin else None

    def adopted(self, system: System) -> System:
        """``system`` with this session's model in place of its own choices."""
        own = self.system
        return replace(
            system, encoder=own.encoder, connector=own.connector, fusion=own.fusion, language=own.language, image=own.image
        )  # fmt: skip

    def _tokenizer(self):
        if self.system.weights or self.system.language.weights:
            return tokenizer_for(self.system)
        names = {part.name for stage in self.system.stages for part in parts_of(stage.data)}
        return word_tokenizer(supervised.EasyVQA.vocabulary() if "easy_vqa" in names else self.world.vocabulary)

    @property
    def is_untrained(self) -> bool:
        """Whether nothing of the language model comes from anywhere but this session's random numbers."""
        return not (self.origin or self.system.weights or self.system.language.weights)

    @property
    def knows_the_world(self) -> bool:
        """Whether the model speaks the shapes world's words, so that its claims can be judged."""
        return self.tokenizer.get_vocab().keys() == set(self.world.vocabulary)

    def rebuild(self, origin: Session | None = None) -> None:
        """The model as it was before any training of this session."""
        torch.manual_seed(self.seed)
        if self.origin:
            self.model = merge_lora((origin or self._open_origin()).model)
            self.model.train_only(())
        else:
            self.model = build(self.system, tokenizer=self.tokenizer, dtype=self.dtype).to(self.place.device)
            self.system = self.model.system

    def add_adapters(self, choice: Lora | None) -> None:
        """A stage's adapters, unless an earlier stage has added them."""
        if choice is None or (lora_parameters(self.model) and choice == self.adapters):
            return
        if lora_parameters(self.model):
            raise RunError(
                f"{self.system.name}: an earlier stage added {self.adapters}, another asks for {choice}; give all stages the same lora"
            )
        torch.manual_seed(self.seed)  # the same on every process
        add_lora(self.model, choice)
        self.adapters = choice
        self.model.to(self.place.device)

    def merge_adapters(self) -> None:
        """Folds the adapters into the weights, which count as trained from then on."""
        self.touched |= {_plain(n) for n, _ in self.model.named_parameters() if ".base_layer." in n}
        merge_lora(self.model)

    def let_train(self, parts: Sequence[str], lora: Lora | None) -> list[str]:
        """Lets exactly these parts and adapters learn; returns the parameters' names and makes sure that they are what was asked for."""
        self.add_adapters(lora)
        self.model.train_only(parts, lora=lora is not None)
        modules = [self.model.part(name) for name in parts] + ([] if lora is None else [self.model.part(lora.part)])
        asked, names = {id(p) for module in modules for p in module.parameters()}, self.model.trained
        strange = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in asked]
        if strange or not names:
            raise RunError(f"{self.system.name}: {', '.join(parts)} should train, and {strange[:3] or 'nothing'} would")
        self.touched |= {_plain(n) for n in names}
        return names

    def left_out(self) -> set[str]:
        """Weights that checkpoints need not hold: read from where the recipe says, and never trained."""
        system = self.system
        given = [
            name
            for name, choice in (("encoder", system.encoder), ("language", system.language))
            if choice.weights or (system.weights and not self.origin)
        ]
        given += ["connector"] if system.weights and not self.origin else []
        own = dict(self.model.named_parameters(remove_duplicate=False))
        touched = {id(p) for n, p in own.items() if _plain(n) in self.touched}
        return {
            n for n, p in own.items() if n.startswith(tuple(f"{part}." for part in given)) and id(p) not in touched and ".lora_" not in n
        }

    def encoder(self, template: str, max_length: int = 2048) -> chat.Encoder:
        """``encode(turns)`` for this tokenizer and picture size."""
        t = self.tokenizer
        return chat.Encoder(t, template, self.system.image_places, self.image_token, t.pad_token_id, max_length)

    def source(self, data: Data | Mixture, template: str, max_length: int = 2048):
        """The stages of a system mostly read the same data: it is made once."""
        key = repr((data, template, max_length))
        if key not in self._sources:
            self._sources[key] = self._make_source(data, template, max_length)
        return self._sources[key]

    def _make_source(self, data: Data | Mixture, template: str, max_length: int):
        encode, size = self.encoder(template, max_length), self.system.image.size
        parts = parts_of(data)
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
        seen = model.embed_images(image_states=states[batch["picture_ids"].to(states.device)].to(session.place.device))
    else:
        seen = model.embed_images(session.pixels(batch["pictures"]))
    return {"image_embeds": seen, "image_rows": batch["image_rows"]}


def idle(model: nn.Module) -> Tensor | float:
    """0, as far as arithmetic goes, but attached to tower and connector: a rank whose batch has no picture has gradients for them like all
    others, and nobody waits for it."""
    trained = [p for part in (model.encoder, model.connector) for p in part.parameters() if p.requires_grad]
    return sum(p.flatten()[:1].sum() * 0 for p in trained) if trained else 0.0


def hidden_states(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> Tensor:
    """Last hidden states ``[B, T, D]`` of a batch."""
    images = see(session, batch, states)
    hidden = session.model.hidden(batch["input_ids"], position_ids=batch.get("position_ids"), **images)
    return hidden if images else hidden + idle(session.model)


def token_logps(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of every next token ``[B, T - 1]`` (0 where nothing is scored) and the row each belongs to. The head sees the positions
    before a scored token, and no other."""
    hidden, head = hidden_states(session, batch, states), session.model.language.get_output_embeddings()
    return linear_logp(hidden[:, :-1], head.weight, batch["labels"][:, 1:], head.bias), batch["rows"][:, 1:]


def run_stage(session: Session, run: Run, stage: Stage, *, first_step: int, options: Options) -> int:
    """One stage of a system over the shared loop."""
    model, source = session.model, session.source(stage.data, stage.template, stage.max_length)
    source.packing, source.pad_to = options.compute.packing, options.compute.pad_to
    trained = session.let_train(stage.train, stage.lora)
    if options.place.main and not options.quiet:
        print(
            f"{stage.name} trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters: {', '.join(summarise(trained))}"
        )
    if options.compute.checkpointing:
        model.checkpoint_activations()
    common = dict(optim=stage.optim, stage=stage.name, options=options, first_step=first_step, left_out=session.left_out)
    if stage.objective == "tokenizer":
        from .tokenizer import make_probe as tokenizer_probe
        from .tokenizer import tokenizer_stage

        pictures = _ItemsArePictures(source)
        return train(run, tokenizer_stage(session, stage, options), pictures, probe=tokenizer_probe(session, pictures), **common)
    if stage.objective == "words":
        objective, source = words_stage(session, source)
        return train(run, objective, source, **common)
    states = cached_states(session, source)
    source.with_pictures = states is None

    objective = answer_objective(session, states)
    return train(run, objective, source, probe=make_probe(session, source, stage.template, run, options), **common)


def answer_objective(session: Session, states: Tensor | None) -> Objective:
    """Cross-entropy of the answers' tokens: of each column of a source its mean over the step's tokens, added up."""
    model = session.model

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, float]]:
        logp, rows = token_logps(session, batch, states)
        weights = (1 / totals.clamp_min(1)).to(logp.dtype)[batch["groups"]][rows]
        return -(logp * weights).sum(), {"tokens": batch["input_ids"].numel()}

    return Objective(step, model, blocks=model.blocks)


def cached_states(session: Session, source) -> Tensor | None:
    """The tower's states of all pictures, where the tower stays frozen and they fit in memory."""
    size = session.system.encoder.tokens * session.system.encoder.width * 4
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

    return Objective(step, model, head=head), _ItemsArePictures(source, words=words, classes=classes)


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


def _plain(name: str) -> str:
    """A parameter's name without the adapters that may have been put around it since."""
    return name.replace(".base_layer.", ".")


def parts_of(data: Data | Mixture) -> tuple[Data, ...]:
    return data.parts if isinstance(data, Mixture) else (data,)


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
        restore(session, system.stages, last[1])
        return session, folder
    session = train_system(system, run, options=replace(options, resume=True, save_every=None, trackers=()))
    if options.place.main:
        (folder / "done").touch()
    return session, folder
