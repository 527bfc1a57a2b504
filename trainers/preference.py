"""Preference alignment: views scored by the policy and its frozen start, terms over them, the shared loop.

What does not change is computed once: the tower is frozen, so its states serve policy and reference alike, and the reference's
log-probabilities are tensors before the first step.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mmfast.data import chat
from mmfast.data.records import Records
from mmfast.data.sources import PreferencePairs
from mmfast.data.supervised import Source
from mmfast.losses import preference_loss, segment_logp
from mmfast.models.lora import adapters_off
from mmfast.ops import linear_logp_pair
from mmfast.ops.preference import LOSSES
from mmfast.spec import Alignment, Contrast, View

from .checkpoint import Run, RunError, write_atomically
from .evaluate import caption_all, make_probe
from .loop import Objective, Options, train
from .place import autocast
from .session import Session, absent
from .supervised import cached_states, hidden_states, restore, token_logps

PAIR_SPLIT, OWN_PAIRS = "pairs", "shapes_own"


class PairSource(Source):
    """Pictures and, for each text of the pairs, its encoded conversation. A batch holds every view of its pairs, view after view."""

    def __init__(self, pictures: Tensor, texts: dict[str, chat.Rows], picture_of: Tensor, pad_token: int):
        super().__init__(pictures, list(texts.values()), pad_token, picture_of.unsqueeze(1).tolist())
        self.texts = texts
        self.views: dict[str, View] = {name: View(name) for name in texts}

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """As of ``mmfast.data.supervised.Source.batch``; ``counts`` are the pairs, then the scored tokens of each view."""
        batch, scored = self.lay_out(index, [self.texts[view.text] for view in self.views.values()])
        counts = torch.cat([torch.tensor([len(index)]), scored.view(len(self.views), -1).sum(1)]).double()
        return {**batch, "index": index, "scored": scored, "counts": counts}


def own_pairs(session: Session, alignment: Alignment) -> tuple[Tensor, list[tuple[int, str, str, str]]]:
    """The policy's greedy captions of fresh scenes, those with a false claim, against clean captions: (picture, prompt, chosen, rejected)."""
    scenes = session.world.scenes(PAIR_SPLIT, alignment.data.scenes)
    pictures = torch.from_numpy(session.world.render(scenes))
    captions, _ = caption_all(session, session.states(pictures), alignment.template, batch=500)
    pairs = session.world.pairs_from_captions(scenes, captions)
    kept = [p.scene.id for p in pairs]
    return pictures[kept], [(i, f"<image> {p.prompt}", p.chosen, p.rejected) for i, p in enumerate(pairs)]


def make_source(session: Session, alignment: Alignment) -> PairSource | PreferencePairs:
    data, encode = alignment.data, session.encoder(alignment.template, alignment.max_length)
    if data.path is not None:
        source = PreferencePairs(Records(data, clips=session.system.clips), encode, plan=session.system.image, shuffled=data.shuffled)
    elif data.name == OWN_PAIRS:
        source = _own_source(session, alignment, encode)
    else:
        raise RunError(absent(data.name, "pairs"))
    source.asked = session.questions
    if len(source) < 2:
        raise RunError(f"only {len(source)} preference pairs" + (": the policy made too few false claims" if data.path is None else ""))
    return source


def _own_source(session: Session, alignment: Alignment, encode: chat.Encoder) -> PairSource:
    pictures, pairs = own_pairs(session, alignment)
    rejected = [p[3] for p in pairs]
    if alignment.data.shuffled:
        rejected = rejected[len(pairs) // 2 :] + rejected[: len(pairs) // 2]
    rows = {
        "chosen": chat.Rows([encode([(prompt, chosen)]) for _, prompt, chosen, _ in pairs], encode.pad_token),
        "rejected": chat.Rows([encode([(p[1], text)]) for p, text in zip(pairs, rejected, strict=True)], encode.pad_token),
    }
    return PairSource(pictures, rows, torch.tensor([p[0] for p in pairs]), encode.pad_token)


def per_row(logp: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Token log-probabilities ``[B, T - 1]``, added up by row: ``[views x B]``."""
    rows = batch["rows"][:, 1:].where(batch["labels"][:, 1:] != chat.IGNORE, -1)
    return segment_logp(logp, rows, num_segments=len(batch["scored"]))


def view_logps(session: Session, batch: dict[str, Tensor], states: Tensor | None) -> Tensor:
    """Summed log-probability of each row's answer, ``[views x B]``: all views in one forward pass, each picture encoded once for all of them."""
    return per_row(token_logps(session, batch, states)[0], batch)


def reference_key(alignment: Alignment, session: Session, source: PairSource) -> str:
    """What the reference's log-probabilities depend on, hashed: the model's weights, the pairs' tokens and pictures, the views, the dtype of
    the computation. Two runs with equal keys may share a cache; a cache with another key is stale."""
    digest = hashlib.sha256()

    def take(*values: object) -> None:
        for value in values:
            if isinstance(value, Tensor):
                digest.update(repr((value.dtype, tuple(value.shape))).encode())
                value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                digest.update(value.data)
            else:
                digest.update(repr(value).encode())

    for name, tensor in session.model.state_dict().items():
        take(name, tensor)
    take(alignment.views, alignment.compute.precision)
    with_pictures, source.with_pictures = source.with_pictures, False
    for index in torch.arange(len(source)).split(250):
        take(*(value for _, value in sorted(source.batch(index).items())))
    source.with_pictures = with_pictures
    for ids in torch.arange(source.picture_count).split(250):
        take(source.load_pictures(ids))
    return digest.hexdigest()


@torch.no_grad()
def cached_reference(alignment: Alignment, session: Session, source: PairSource, states: Tensor | None, folder: Path) -> Tensor:
    """The reference's log-probabilities ``[views, pairs]``: read from ``reference.safetensors`` of the run, or computed and written there. A
    file that belongs to other data, weights or settings is refused by its key and made anew, saying so."""
    path, key = folder / "reference.safetensors", reference_key(alignment, session, source)
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("logps").to(session.place.device)
        if session.place.main:
            print(f"{path} belongs to other data, weights or settings; the reference is computed anew")
    session.model.eval()
    with autocast(session.place, alignment.compute.precision):
        logps = torch.zeros(len(source.views), len(source), dtype=torch.float64, device=session.place.device)
        for index in session.place.part(torch.arange(len(source))).split(max(1, alignment.optim.batch // session.place.processes)):
            batch = session.place.to(source.batch(index))
            logps[:, batch["index"]] = view_logps(session, batch, states).view(len(source.views), -1).double()
    logps = session.place.sum(logps).float()  # each process did its share
    if session.place.main:
        write_atomically(path, save({"logps": logps.cpu()}, {"key": key}))
    return logps


class Scorer:
    """Policy and reference on the same rows: ``scorer(batch)`` gives both models' log-probabilities, ``[views x B]`` each.

    The reference is the policy's start: its log-probabilities computed once and cached, a frozen copy, or the policy without its adapters.
    In the last two the hidden states of both meet in one walk over the head (``mmfast.linear_logp_pair``).
    """

    def __init__(self, alignment: Alignment, session: Session, source: PairSource | PreferencePairs, states: Tensor | None, folder: Path):
        # SimPO and the like ask for no reference: none is computed, and zeros stand for it.
        asked = any(isinstance(term, Contrast) and LOSSES[term.loss_type].reference for term in alignment.terms)
        self.kind, self.session, self.states = alignment.reference if asked else "none", session, states
        if self.kind == "cached":
            self.logps = cached_reference(alignment, session, source, states, folder)
        elif self.kind == "frozen":
            # What the policy does not train either is shared, not copied.
            shared = {id(p): p for p in session.model.parameters() if not p.requires_grad}
            self.start = copy.copy(session)
            self.start.model = copy.deepcopy(session.model, shared)
            self.start.model.train_only(())
            self.start.model.eval()

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.kind == "none":
            logps = view_logps(self.session, batch, self.states)
            return logps, torch.zeros_like(logps)
        if self.kind == "cached":
            index = batch["index"]
            return view_logps(self.session, batch, self.states), self.logps[:, index.to(self.logps.device)].flatten().to(index.device)
        with torch.no_grad():
            start = self._start_states(batch)
        hidden, head = hidden_states(self.session, batch, self.states), self.session.model.language.get_output_embeddings()
        other = self.start.model.language.get_output_embeddings() if self.kind == "frozen" else head
        policy, reference = linear_logp_pair(
            hidden[:, :-1], head.weight, start[:, :-1], other.weight, batch["labels"][:, 1:], head.bias, other.bias
        )  # fmt: skip
        return per_row(policy, batch), per_row(reference, batch)

    def _start_states(self, batch: dict[str, Tensor]) -> Tensor:
        if self.kind == "frozen":
            return hidden_states(self.start, batch, self.states)
        model = self.session.model
        with adapters_off(model):
            training = model.training
            model.eval()  # dropout in a part that trains would blur the reference
            hidden = hidden_states(self.session, batch, self.states)
            model.train(training)
            return hidden


def train_alignment(alignment: Alignment, session: Session, run: Run, *, options: Options | None = None, quiet: bool = False) -> Session:
    """Aligns the session's model in place, starting from what it is now. Pictures are not augmented: the reference, which is not in training, would
    see others than the policy."""
    options = options or Options(seed=session.seed, quiet=quiet, compute=alignment.compute, place=session.place)
    names = list(alignment.views)
    unknown = [v for term in alignment.terms for v in _views_of(term) if v not in names]
    if unknown:
        raise RunError(f"{alignment.name}: a term speaks of the view {unknown[0]!r}, the recipe has {', '.join(names)}")
    session.system = replace(session.system, image=replace(session.system.image, augment=False))
    model, source = session.model, make_source(session, alignment)
    source.views = alignment.views
    source.packing, source.pad_to = options.compute.packing, options.compute.pad_to
    session.merge_adapters()  # of the policy's own stages
    session.add_adapters(alignment.lora)  # they begin as nothing: the model is still the reference
    model.train_only(alignment.train, lora=alignment.lora is not None)
    if source.packing:
        session.check_packing()
    states = cached_states(session, source)
    source.with_pictures = states is None
    scorer = Scorer(alignment, session, source, states, run.folder)
    session.let_train(alignment.train, alignment.lora)
    if options.compute.checkpointing:
        model.checkpoint_activations()

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        policy, reference = scorer(batch)
        logps, start, tokens = (dict(zip(names, v.chunk(len(names)), strict=True)) for v in (policy, reference, batch["scored"]))
        pairs, scored = totals[0].to(logps[names[0]].dtype), dict(zip(names, totals[1:], strict=True))
        loss, measures = 0.0, {}
        for term in alignment.terms:
            if isinstance(term, Contrast):
                views, facts = (term.better, term.worse), LOSSES[term.loss_type]
                lens = dict(zip(("chosen_lens", "rejected_lens"), (tokens[v] for v in views), strict=True)) if facts.lens else {}
                value, won, lost = preference_loss(
                    *(logps[v] for v in views), *(start[v] for v in views if facts.reference), **lens,
                    loss_type=term.loss_type, beta=alignment.beta, label_smoothing=term.label_smoothing,
                )  # fmt: skip
                value = value * (len(won) / pairs)  # this batch's mean, as its share of the step's
                measures |= {
                    f"rewards/{term.better}": won.sum() / pairs,
                    f"rewards/{term.worse}": lost.sum() / pairs,
                    "rewards/margins": (won - lost).sum() / pairs,
                    "rewards/accuracies": (won > lost).sum() / pairs,
                }
            else:
                value = -logps[term.view].sum() / scored[term.view].to(pairs.dtype)
            loss = loss + term.weight * value
        measures |= {f"logps/{name}": value.detach().sum() / pairs for name, value in logps.items()}
        return loss, {**measures, "tokens": batch["input_ids"].numel()}

    probe = make_probe(session, source, alignment.template, run, options, light=True)
    objective = Objective(step, model, blocks=model.blocks)
    train(
        run, objective, source, optim=alignment.optim, stage=alignment.name, options=options, probe=probe, left_out=session.left_out
    )  # fmt: skip
    if options.place.sharded:
        session.rebuild()
        restore(session, (alignment,), run.last_checkpoint()[1])
    return session


def _views_of(term) -> tuple[str, ...]:
    return (term.better, term.worse) if isinstance(term, Contrast) else (term.view,)
