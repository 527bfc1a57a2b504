"""Pictures and texts compared by a Q-Former, without a language model: scores, ranking, and its own captions (BLIP-2, arXiv:2301.12597).

Letters: M images, B texts, S text tokens, n queries, P the shared space's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.nn.query_connector import QueryConnector, similarity


@dataclass
class Matched:
    """What ``Blip2ForImageTextRetrieval`` returns.

    Contrast: logits_per_image [M, B] cosines, image_embeds [M, n, P], text_embeds [B, P]. Matching of pairs: logits_per_image [B, 2] ("no",
    "yes"), image_embeds the normed states, text_embeds the last states of queries and text. logits_per_text is the transpose.
    """

    logits_per_image: Tensor
    logits_per_text: Tensor
    text_embeds: Tensor
    image_embeds: Tensor


class Matcher(nn.Module):
    """A tower and a Q-Former with text. ``places``: how many ids of a batch's rows stand for a picture, in front of the text."""

    def __init__(self, encoder: nn.Module, connector: QueryConnector, system: spec.System, *, places: int = 0):
        super().__init__()
        self.encoder, self.connector, self.system, self.places = encoder, connector, system, places

    @classmethod
    def of(cls, model: MultimodalModel) -> Matcher:
        """That of a model whose connector is a ``QFormer`` with text; the weights are the model's own."""
        if not (isinstance(model.connector, QueryConnector) and model.connector.compares):
            raise ValueError(f"{model.system.name}: comparing pictures with texts needs a connector QFormer with text")
        return cls(model.encoder, model.connector, model.system)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, use_image_text_matching_head: bool = False
    ) -> Matched:
        """pixel_values [M, 3, H, W], input_ids and attention_mask [B, places + S]; the arguments of ``Blip2ForImageTextRetrieval``."""
        connector, ids = self.connector, input_ids[:, self.places :]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask[:, self.places :]
        image = connector.normed(self.encoder(pixel_values))
        if use_image_text_matching_head:
            queries, text, _ = connector.qformer(connector.query_tokens, image, text=ids, text_mask=mask)
            logits = connector.itm_head(queries).mean(1)
            return Matched(logits, logits.T, torch.cat([queries, text], 1), image)
        images, texts = connector.images(connector.read(image)), connector.texts(ids, mask)
        scores = similarity(images, texts)
        return Matched(scores, scores.T, texts, images)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that ``Blip2ForImageTextRetrieval`` loads, with the same scores."""
        from mmfast.models.published import SHARD, blip2_retrieval

        with blip2_retrieval.as_stock(self) as stock:
            stock.save_pretrained(path, max_shard_size=SHARD)


@torch.no_grad()
def rank(
    connector: QueryConnector, states: Tensor | Callable[[], Iterable[Tensor]], ids: Tensor, mask: Tensor, *, top: int = 128, batch: int = 256
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores of all texts for each picture ``[M, B]`` and of all pictures for each text ``[B, M]``, higher is better.

    By the contrast's cosine; with ``top`` the best so many of each row are ranked anew, before all others, by the cosine plus the matching
    logit for "yes" (LAVIS's evaluation; 128 there), which is their score. The others' is their cosine where that is below it, else all of a row's
    are lowered by one number until they are. In float64: nothing that differs becomes equal. ``top`` 0: by the cosine alone.

    Args:
        states: tower states [M, N, W]; or what gives them some pictures at a time, [m, N, W], and with ``top`` is called twice.
            ids, mask: [B, S].
    """

    def image() -> Iterator[Tensor]:
        return map(connector.normed, (states,) if isinstance(states, Tensor) else states())

    images = torch.cat([connector.images(connector.read(part)) for some in image() for part in some.split(batch)])
    texts = torch.cat([connector.texts(*part) for part in zip(ids.split(batch), mask.split(batch), strict=True)])
    cosine = torch.cat([similarity(part, texts) for part in images.split(batch)])
    scores = cosine.clone(), cosine.T.clone()
    if not top:
        return scores
    scores = scores[0].double(), scores[1].double()
    best = [ranked.topk(min(top, ranked.shape[1])).indices for ranked in scores]
    pairs = []  # of a picture and a text, for each of both
    for turned, columns in enumerate(best):
        found = torch.arange(len(columns)).repeat_interleave(columns.shape[1]), columns.flatten().cpu()
        pairs.append(found[::-1] if turned else found)
    first = 0
    for some in image():
        for ranked, (shown, told) in zip((scores[0], scores[1].T), pairs, strict=True):
            here = (first <= shown) & (shown < first + len(some))
            for picture, text in zip(shown[here].split(batch), told[here].split(batch), strict=True):
                ranked[picture, text] += connector.match(some[picture - first], ids[text], mask[text])[:, 1]
        first += len(some)
    for ranked, columns in zip(scores, best, strict=True):
        if columns.shape[1] < ranked.shape[1]:
            others = torch.ones_like(ranked, dtype=torch.bool).scatter(1, columns, False)
            gap = ranked.gather(1, columns).amin(1) - ranked.masked_fill(~others, -torch.inf).amax(1)
            ranked += others * torch.where(gap > 0, 0, gap - 1)[:, None]
    return scores


@torch.no_grad()
def captions(connector: QueryConnector, states: Tensor, *, first: int, last: int, max_new_tokens: int = 30) -> Tensor:
    """The Q-Former's own greedy captions ``[M, up to max_new_tokens]`` from ``first`` ([DEC]) to ``last``, no language model involved."""
    cache = connector.read(connector.normed(states)).cache
    token = torch.full((len(states), 1), first, device=states.device)
    done, said = torch.zeros(len(states), dtype=torch.bool, device=states.device), []
    for _ in range(max_new_tokens):
        logits, cache = connector.continued(cache, token)
        token = torch.where(done, last, logits[:, -1].argmax(-1))
        done |= token == last
        said.append(token)
        if done.all():
            break
        token = token[:, None]
    return torch.stack(said, 1)
