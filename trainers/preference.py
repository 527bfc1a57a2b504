"""Preference alignment: views scored by the policy and its frozen start, terms over them, the shared loop.

What does not change is computed once: the tower is frozen, so its states serve policy and reference alike, and the reference's
log-probabilities are tensors before the first step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.data import chat, images
from mmfast.data.supervised import read_records, report_faults
from mmfast.losses import preference_loss, segment_logp
from mmfast.ops import linear_logp
from mmfast.ops.preference import LOSSES
from mmfast.spec import Alignment, Contrast

from .evaluate import caption_all
from .loop import Run, RunError, train
from .supervised import Session

PAIR_SPLIT = "pairs"


class PairSource:
    """Pictures and, for each text of the pairs, its encoded conversation."""

    def __init__(self, pictures: Tensor, rows: dict[str, chat.Rows], picture_of: Tensor):
        self.pictures, self.rows, self.picture_of = pictures, rows, picture_of

    def __len__(self) -> int:
        return len(self.picture_of)


def own_pairs(session: Session, alignment: Alignment) -> tuple[Tensor, list[tuple[int, str, str, str]]]:
    """The policy's greedy captions of fresh scenes, those with a false claim, against clean captions: (picture, prompt, chosen, rejected)."""
    scenes = session.world.scenes(PAIR_SPLIT, alignment.data.scenes)
    pictures = torch.from_numpy(session.world.render(scenes))
    captions, _ = caption_all(session, session.states(pictures), alignment.template, batch=500)
    pairs = session.world.pairs_from_captions(scenes, captions)
    kept = [p.scene.id for p in pairs]
    return pictures[kept], [(i, f"<image> {p.prompt}", p.chosen, p.rejected) for i, p in enumerate(pairs)]


def record_pairs(session: Session, alignment: Alignment) -> tuple[Tensor, list[tuple[int, str, str, str]]]:
    """Records with image, prompt, chosen and rejected."""
    from pathlib import Path

    import numpy as np

    data = alignment.data
    records, root = read_records(data.path), Path(data.images) if data.images else Path(data.path).parent
    pictures, pairs, faults = [], [], []
    for i, record in enumerate(records):
        try:
            missing = [k for k in ("image", "prompt", "chosen", "rejected") if not isinstance(record, dict) or not record.get(k)]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
            if record["chosen"] == record["rejected"]:
                raise ValueError("chosen and rejected are the same text")
            pictures.append(images.load(root / record["image"], session.system.image.size))
        except ValueError as error:
            faults.append(f"record {i}: {error}")
            continue
        pairs.append(
            (len(pictures) - 1, "<image>\n" + record["prompt"].replace("<image>", "").strip(), record["chosen"], record["rejected"])
        )
    report_faults(data.path, faults, len(records), data.on_bad_record)
    return torch.from_numpy(np.stack(pictures)), pairs


def make_source(session: Session, alignment: Alignment) -> PairSource:
    if alignment.data.path is not None:
        pictures, pairs = record_pairs(session, alignment)
    elif alignment.data.name == "shapes_own":
        pictures, pairs = own_pairs(session, alignment)
    else:
        raise RunError(f"pairs {alignment.data.name!r} are not built in; give records with --data FILE (image, prompt, chosen, rejected)")
    if len(pairs) < 2:
        raise RunError(f"only {len(pairs)} preference pairs: the policy made too few false claims to learn from")
    rejected = [p[3] for p in pairs]
    if alignment.data.shuffled:
        rejected = rejected[len(pairs) // 2 :] + rejected[: len(pairs) // 2]
    encode, pad = session.encoder(alignment.template, alignment.max_length), session.tokenizer.pad_token_id
    rows = {
        "chosen": chat.Rows([encode([(prompt, chosen)]) for _, prompt, chosen, _ in pairs], pad),
        "rejected": chat.Rows([encode([(p[1], text)]) for p, text in zip(pairs, rejected, strict=True)], pad),
    }
    return PairSource(pictures, rows, torch.tensor([p[0] for p in pairs]))


def view_logps(session: Session, source: PairSource, states: Tensor, texts: list[str], index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Summed log-probability and token count of each text's answer, ``[B]`` each: all texts in one forward pass, pictures encoded once."""
    ids, labels = chat.stack([source.rows[text].batch(index) for text in texts], session.tokenizer.pad_token_id)
    model, rows = session.model, torch.arange(len(index)).repeat(len(texts))
    hidden = model.hidden(ids, image_embeds=model.connector(states[source.picture_of[index]])[rows])
    keep, head = labels[:, 1:] != chat.IGNORE, model.language.get_output_embeddings()
    logp = linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias)
    sequence = torch.arange(len(ids)).unsqueeze(1).where(keep, -1)
    total = segment_logp(logp, sequence, num_segments=len(ids))
    return list(total.chunk(len(texts))), list(keep.sum(-1).chunk(len(texts)))


def train_alignment(
    alignment: Alignment, session: Session, run: Run, *, resume: bool = False, save_every: int | None = None, quiet: bool = False
) -> Session:
    """Aligns the session's model in place, starting from what it is now."""
    model, source = session.model, make_source(session, alignment)
    states = session.states(source.pictures)
    names = list(alignment.views)
    texts = [alignment.views[name].text for name in names]
    unknown = [v for term in alignment.terms for v in _views_of(term) if v not in names]
    if unknown:
        raise RunError(f"{alignment.name}: a term speaks of the view {unknown[0]!r}, the recipe has {', '.join(names)}")
    with torch.no_grad():
        parts = [view_logps(session, source, states, texts, part)[0] for part in torch.arange(len(source)).split(250)]
        reference = dict(zip(names, (torch.cat(column) for column in zip(*parts, strict=True)), strict=True))
    model.train_only(alignment.train)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(index: Tensor) -> tuple[Tensor, dict[str, float]]:
        totals, counts = view_logps(session, source, states, texts, index)
        logps, tokens = dict(zip(names, totals, strict=True)), dict(zip(names, counts, strict=True))
        loss, logged = torch.zeros(()), {}
        for term in alignment.terms:
            if isinstance(term, Contrast):
                pair, facts = (term.better, term.worse), LOSSES[term.loss_type]
                lens = dict(zip(("chosen_lens", "rejected_lens"), (tokens[v] for v in pair), strict=True)) if facts.lens else {}
                value, won, lost = preference_loss(
                    *(logps[v] for v in pair), *(reference[v][index] for v in pair if facts.reference), **lens,
                    loss_type=term.loss_type, beta=alignment.beta, label_smoothing=term.label_smoothing,
                )  # fmt: skip
                logged |= {
                    f"rewards/{term.better}": won.mean().item(),
                    f"rewards/{term.worse}": lost.mean().item(),
                    "rewards/margins": (won - lost).mean().item(),
                    "rewards/accuracies": (won > lost).float().mean().item(),
                }
            else:
                value = -logps[term.view].sum() / tokens[term.view].sum()
            loss = loss + term.weight * value
        logged |= {f"logps/{name}": value.mean().item() for name, value in logps.items()}
        return loss, {**logged, "tokens": int(sum(t.sum() for t in tokens.values()))}

    probe = caption_length(session, alignment.template) if alignment.data.path is None else None
    options = dict(optim=alignment.optim, items=len(source), seed=session.seed, stage=alignment.name, probe=probe)
    train(run, model, parameters, step, resume=resume, save_every=save_every, quiet=quiet, **options)
    return session


def caption_length(session: Session, template: str) -> Callable[[], dict[str, float]]:
    """Words a caption of 100 scenes that nothing else uses: captions that grow short are the first sign of pushing too hard."""
    states = session.states(torch.from_numpy(session.world.render(session.world.scenes("valid", 100))))

    def measure() -> dict[str, float]:
        texts, _ = caption_all(session, states, template)
        return {"len": sum(len(text.split()) for text in texts) / len(texts)}

    return measure


def _views_of(term) -> tuple[str, ...]:
    return (term.better, term.worse) if isinstance(term, Contrast) else (term.view,)
