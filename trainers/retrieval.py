"""FROMAGe's stage: captions, and texts whose [RET] stands beside their pictures (arXiv:2301.13823)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data import chat
from mmfast.losses import image_text_contrast
from mmfast.ops import linear_logp

from .checkpoint import RunError
from .loop import Objective

if TYPE_CHECKING:
    from .session import Session


def retrieval_objective(session: Session, states: Tensor | None, contrast: float = 1.0) -> Objective:
    """FROMAGe's two modes on the same rows (arXiv:2301.13823, section 3; what the paper leaves open as in the released code).

    Captioning: the picture, and cross-entropy of the caption and of the beginning token that stands between them; for half of the steps,
    drawn by each process, two neighbouring rows are one. Retrieval: the text alone, cross-entropy of its words and of [RET] behind them, and
    the contrast of [RET] with pictures. Both cross-entropies are means over the step's tokens, so they do not depend on how it is cut. A
    contrast cannot obey that: it sees one micro-batch of all processes, and those of a step are weighed by their tokens. Each process makes
    the whole of it, and its own rows have gradients, which are added: together they are the gradient.
    """
    model, place, k = session.model, session.place, session.system.image_places
    head, fusion = model.language.get_output_embeddings(), model.fusion

    def likelihood(hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias).sum()

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        ids, labels, images = batch["input_ids"], batch["labels"], batch["image_rows"]
        if len(images) != len(ids) or not (ids[:, :k] == model.image_token).all():
            raise RunError("objective retrieval reads pictures with one caption each, in template fromage; another record is among them")
        seen = session.states_in(batch, states)
        places = torch.arange(ids.shape[1], device=ids.device)
        scored = labels != chat.IGNORE
        last = torch.arange(len(ids), device=ids.device), (scored * places).argmax(1)  # [RET]

        told = labels.clone()
        told[last] = chat.IGNORE
        told[:, k] = ids[:, k]
        rows = ids
        if len(ids) > 1 and torch.rand(()) < 0.5:
            rows, told = joined(ids, told, model.image_token)
        captions = likelihood(model.hidden(rows, image_embeds=model.embed_images(image_states=seen), image_rows=images), told)
        hidden, rets = fusion.read(model, ids[:, k:], (last[0], last[1] - k))
        texts = likelihood(hidden, labels[:, k:])

        # Scaled before they are gathered: each process adds its own rows' gradient of the scale, as of all else.
        u = place.gather(fusion.logit_scale.exp() * fusion.pictures(model.connector.pooled(seen))[images])
        t = place.gather(fusion.texts(rets))
        with torch.autocast(place.device.type, enabled=False):  # a product in half precision would round what the scale magnifies
            logits, own = u @ t.T, torch.arange(len(u), device=u.device)
        nce = image_text_contrast(logits, logits.T, own, own, smoothing=0.0)
        share = (place.sum(scored.sum().double().view(1)) / totals[:1]).to(nce.dtype)[0]
        whole = share * nce
        once = whole - whole.detach() * (1 - 1 / place.processes)  # every process has the same value, and measures are added
        total = totals[0].to(captions.dtype)
        loss = -(captions + texts) / total + contrast * once
        return loss, {
            "tokens": rows.numel() + ids.numel(),
            "loss/caption": -captions.detach() / total,
            "loss/text": -texts.detach() / total,
            "loss/contrast": once.detach(),
            "recall@1": share * (logits.argmax(0) == own).float().mean() / place.processes,
        }

    return Objective(step, model, blocks=model.blocks)


def joined(ids: Tensor, labels: Tensor, image_token: int) -> tuple[Tensor, Tensor]:
    """Neighbouring rows ``[B, T]`` end to end, ``[B // 2, 2 T]``: pictures and scored tokens of the first, of the second, then what no label
    needs. An odd last row stands alone, behind its own ``T`` columns of nothing."""
    if len(ids) % 2:
        ids, labels = F.pad(ids, (0, 0, 0, 1)), F.pad(labels, (0, 0, 0, 1), value=chat.IGNORE)
    ids, labels = (t.reshape(len(t) // 2, -1) for t in (ids, labels))
    order = ((ids != image_token) & (labels == chat.IGNORE)).long().argsort(dim=1, stable=True)
    return ids.gather(1, order), labels.gather(1, order)
