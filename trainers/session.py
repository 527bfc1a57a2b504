"""A system made concrete: its model, its tokenizer, and the data its stages read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.data import chat, images, supervised
from mmfast.data.records import Records, Stream
from mmfast.data.regions import format_of
from mmfast.data.sources import Conversations, Streamed
from mmfast.data.synthetic import Scene, World, WorldConfig
from mmfast.models import build
from mmfast.models.build import refit
from mmfast.models.lora import add_lora, lora_parameters, merge_lora
from mmfast.models.pretrained import add_tokens, adopted, placeholder, questions, resolved, text_side, tokenizer_for
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import BUILT_IN, Data, Lora, Mixture, SharedTokens, Stage, System

from .checkpoint import RunError
from .place import Place
from .runs import is_run


def is_blind(system: System) -> bool:
    """Whether a system's last stage shows black pictures alone."""
    return bool(system.stages) and all(part.blind for part in parts_of(system.stages[-1].data))


def parts_of(data: Data | Mixture) -> tuple[Data, ...]:
    return data.parts if isinstance(data, Mixture) else (data,)


def absent(name: str, what: str = "data") -> str:
    """The sentence about data, or ``pairs``, that are neither built in nor given."""
    if what == "pairs":
        return f"pairs {name!r} are not built in; give records with --data FILE (images, prompt, chosen, rejected)"
    return f"data {name!r} is not built in; give its records with --data FILE and --images FOLDER (docs/data.md)"


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
        self._text_side: chat.TextSide | None = None
        self._kept: tuple[Any, list[Tensor], list[int], Tensor] | None = None
        self.world = World(WorldConfig(seed=seed))
        self.origin = Path(system.weights) if system.weights and is_run(system.weights) else None
        origin = self._open_origin()
        self.system = adopted(system, origin.system) if origin else system
        self._first = (origin._first or origin.system) if origin else None  # whose weights came with a tokenizer of the Q-Former
        self.tokenizer = origin.tokenizer if origin else self._tokenizer()
        if origin:
            add_tokens(self.tokenizer, self.system.added_tokens)
        self.image_token = placeholder(self.system, self.tokenizer)
        if with_model:
            self.rebuild(origin)
        elif not self.origin:  # a run has told its sizes
            self.system = resolved(self.system)

    def _open_origin(self) -> Session | None:
        """The run that the system's weights are those of, if they are a run's."""
        from .runs import open_run

        return open_run(self.origin, place=self.place)[0] if self.origin else None

    def _tokenizer(self):
        if self.system.weights or self.system.language.weights or self.system.language.words:
            return tokenizer_for(self.system)
        names = {part.name for stage in self.system.stages for part in parts_of(stage.data)}
        return word_tokenizer(supervised.vocabulary(names, self.world), self.system.added_tokens)

    @property
    def is_untrained(self) -> bool:
        """Whether nothing of the language model comes from anywhere but this session's random numbers."""
        return not (self.origin or self.system.weights or self.system.language.weights)

    @property
    def knows_the_world(self) -> bool:
        """Whether the model speaks the shapes world's words, so that its claims can be judged."""
        return self.tokenizer.get_vocab().keys() >= {*self.world.vocabulary}

    @property
    def blind(self) -> bool:
        """Whether the model is examined in the dark as well: its last stage showed black pictures alone."""
        return is_blind(self.system)

    def rebuild(self, origin: Session | None = None) -> None:
        """The model as it was before any training of this session."""
        self._kept = None
        torch.manual_seed(self.seed)
        if self.origin:
            self.model = refit(merge_lora((origin or self._open_origin()).model), self.system, self.tokenizer)
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
        if self.model.encoder_learns:
            self._kept = None
        modules = [self.model.part(name) for name in parts] + ([] if lora is None else [self.model.part(lora.part)])
        asked, names = {id(p) for module in modules for p in module.parameters()}, self.model.trained
        strange = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in asked]
        if strange or not names:
            raise RunError(f"{self.system.name}: {', '.join(parts)} should train, and {strange[:3] or 'nothing'} would")
        self.touched |= {_plain(n) for n in names}
        return names

    @torch.no_grad()
    def check_packing(self) -> None:
        """Whether the language model keeps rows apart that lie end to end, tried on two of a few tokens: the second must read as it does alone.
        Some families take no ``position_ids``, or have a state that runs on (Bloom, Qwen3-Next). Draws no random numbers.

        Raises:
            RunError: it does not.
        """
        model, family = self.model, self.model.system.language.family
        training, table = model.training, model.language.get_input_embeddings()
        at, cut = torch.arange(12, device=self.place.device), 7
        ids, places = at[None] * table.num_embeddings // 12, at.where(at < cut, at - cut)[None]
        model.eval()
        alone = model.hidden(ids[:, cut:], position_ids=places[:, cut:]).float()
        packed = model.hidden(ids, position_ids=places)[:, cut:].float()
        model.train(training)
        # Rounding differs with the length: far below what a row before it does, in half precision, too.
        near = 5e-3 if all(p.dtype == torch.float32 for p in model.language.parameters()) else 0.1
        if not (packed - alone).norm() <= near * alone.norm():
            raise RunError(f"compute.packing: the decoder of {family} cannot keep packed rows apart; leave packing off")

    def left_out(self) -> set[str]:
        """Weights that checkpoints need not hold: read from where the recipe says, and never trained."""
        system = self.system
        given = [
            name
            for name, choice in (("encoder", system.encoder), ("language", system.language))
            if choice.weights or (system.weights and not self.origin)
        ]
        given += ["connector", "fusion"] if system.weights and not self.origin else []
        own = dict(self.model.named_parameters(remove_duplicate=False))
        touched = {id(p) for n, p in own.items() if _plain(n) in self.touched}
        return {
            n for n, p in own.items() if n.startswith(tuple(f"{part}." for part in given)) and id(p) not in touched and ".lora_" not in n
        }

    def encoder(self, template: str, max_length: int = 2048) -> chat.Encoder:
        """``encode(turns)`` for this tokenizer and picture size."""
        t, system = self.tokenizer, self.system
        borders = tuple(t.convert_tokens_to_ids(list(system.borders)))
        learn = isinstance(system.fusion, SharedTokens)
        return chat.Encoder(
            t, template, system.image_places, self.image_token, t.pad_token_id, max_length, borders, learn, format_of(system.regions),
            system.image, system.language.family if system.language.encodes else "",
        )  # fmt: skip

    def text_side(self, max_length: int = 32) -> chat.TextSide:
        """How texts come to a Q-Former; for one that compares pictures with texts, its ``encode(turns)``."""
        if self._text_side is None:
            self._text_side = text_side(self._first or self.system, self.tokenizer)
        return replace(self._text_side, max_length=max_length)

    @property
    def questions(self) -> chat.Questions | None:
        """What the Q-Former reads of a row beside its pictures; None where it does not."""
        instructed = getattr(self.system.connector, "instructed", False)
        return questions(self.system, self.tokenizer, self.text_side()) if instructed else None

    def beside(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The columns that these give rows ``[B, T]``, or none."""
        return {} if (questions := self.questions) is None else questions(ids, labels)

    def source_of(self, stage: Stage):
        """What a stage draws from."""
        return self.source(stage.data, stage.template, stage.max_length, compared=stage.objective == "queries")

    def source(self, data: Data | Mixture, template: str, max_length: int = 2048, *, compared: bool = False, open_questions: bool = False):
        """The stages of a system mostly read the same data: it is made once. ``compared``: as a Q-Former's text side reads it. ``open_questions``: those
        without an answer, too."""
        key = repr((data, None if compared else template, max_length, open_questions))
        if key not in self._sources:
            self._sources[key] = self._make_source(data, template, max_length, compared, open_questions)
            self._sources[key].asked = None if compared else self.questions
        return self._sources[key]

    def _make_source(self, data: Data | Mixture, template: str, max_length: int, compared: bool, open_questions: bool):
        plan, encode = self.system.image, self.text_side(max_length) if compared else self.encoder(template, max_length)
        parts, by_tokens = parts_of(data), isinstance(data, Mixture) and data.by == "tokens"
        if all(part.path is not None for part in parts):
            if any(part.streaming for part in parts):
                if len(parts) > 1:
                    raise RunError(f"{data.name}: a mixture cannot be streamed; leave streaming off, or train on one part")
                opened = data.on_bad_record == "skip"
                return Streamed(Stream(data, seed=self.seed, open_pictures=opened, clips=self.system.clips), encode, plan=plan)
            records = [Records(part, open_questions=open_questions, clips=self.system.clips) for part in parts]
            return Conversations(records, encode, plan=plan, seed=self.seed, by_tokens=by_tokens)
        if all(part.path is None and part.name in BUILT_IN for part in parts):
            if isinstance(data, Data):
                return supervised.make(data, self.world, encode)
            made = [self.source(part, template, max_length, compared=compared) for part in parts]  # which other mixtures may have, too
            return made[0] if len(made) == 1 else supervised.mixture(made, [p.weight for p in parts], self.seed, by_tokens=by_tokens)
        name = next(part.name for part in parts if part.path is None)
        raise RunError(absent(name))

    def exam_pictures(self, scenes: Sequence[Scene]) -> Tensor:
        """Pictures of scenes, uint8 ``[M, H, W, 3]``, as this model is examined on them: black where its last stage was blind."""
        pictures = torch.from_numpy(self.world.render(scenes))
        return torch.zeros_like(pictures) if self.blind else pictures

    def pixels(self, pictures: Tensor) -> Tensor:
        """uint8 [M, H, W, 3] as the tower reads them; augmented while the model trains."""
        made = images.normalise(pictures.to(self.place.device), self.system.image)
        return images.augmented(made) if self.system.image.augment and self.model.training else made

    @torch.no_grad()
    def states(self, pictures: Tensor, batch: int = 250) -> Tensor:
        """Tower states of uint8 pictures, ``[M, N, D]``."""
        self.model.eval()
        return torch.cat([self.model.encoder(self.pixels(part)) for part in pictures.split(batch)])

    def states_in(self, batch: dict[str, Tensor], states: Tensor | None) -> Tensor:
        """Tower states of a batch's pictures: from those of all pictures, where there are any, else of their pixels."""
        if states is not None:
            return states[batch["picture_ids"].to(states.device)].to(self.place.device)
        return self.model.encode(self.pixels(batch["pictures"]))

    def states_of(self, source, batch: int = 250) -> Tensor:
        """Tower states of all pictures of a source, ``[M, N, D]``, read a batch at a time. The last ones are kept: stages in turn often
        show the same pictures to the same tower."""
        tower = [*self.model.encoder.parameters(), *self.model.encoder.buffers()]
        versions = [t._version for t in tower]  # count what is written into them, except by fused optimisers: let_train sees to that
        if self._kept is not None:
            shown, then, counted, states = self._kept
            if shown is source and counted == versions and all(a is b for a, b in zip(then, tower, strict=True)):
                return states
        self._kept = None  # never two at a time
        states = torch.cat([self.states(source.load_pictures(ids)) for ids in torch.arange(source.picture_count).split(batch)])
        if not self.model.encoder_learns:
            self._kept = (source, tower, versions, states)
        return states


def _plain(name: str) -> str:
    """A parameter's name without the adapters that may have been put around it since."""
    return name.replace(".base_layer.", ".")
