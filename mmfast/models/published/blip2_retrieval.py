"""BLIP-2's first stage by itself: ``Blip2ForImageTextRetrieval``, a tower and a Q-Former without a language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from mmfast import spec
from mmfast.models.matching import Matcher
from mmfast.models.published import blip2

STOCK = Blip2ForImageTextRetrieval


def system_of(config: Blip2Config, name: str) -> spec.System:
    """The choices that a stock configuration stands for; there is no language model, so its field says nothing."""
    if not config.qformer_config.use_qformer_text_input:
        raise ValueError(f"{name}: qformer_config.use_qformer_text_input is false; what compares pictures with texts reads texts")
    return spec.System(name=Path(name).name, paper="arXiv:2301.12597", **blip2.choices(config, name, text=True))


def from_stock(stock: Blip2ForImageTextRetrieval, name: str = "blip2") -> Matcher:
    """Take the parts out of a stock model; what is not in it (temperature, captioning head) is as pre-training begins."""
    system = system_of(stock.config, name)
    tower, connector = blip2.parts(stock, system, 1)
    connector.vision_proj, connector.text_proj, connector.itm_head = stock.vision_projection, stock.text_projection, stock.itm_head
    for part in (connector.cls, connector.projection):
        part.to_empty(device="cpu")
        part.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    connector.temp = torch.nn.Parameter(torch.tensor([0.07]))
    connector.cls_bias = torch.nn.Parameter(torch.zeros(system.connector.vocab))
    places = system.connector.tokens if stock.config.image_token_index is not None else 0
    return Matcher(tower, connector, replace(system, language=spec.LanguageModel(weights=None)), places=places).eval()


@contextmanager
def as_stock(matcher: Matcher) -> Iterator[Blip2ForImageTextRetrieval]:
    """Its parts in a stock model that gives the same scores."""
    connector = matcher.connector
    config = blip2.stock_config(matcher.encoder, connector, matcher.system, text=True)
    config.image_token_index = connector.qformer.embeddings["word_embeddings"].num_embeddings if matcher.places else None
    with torch.device("meta"):
        stock = Blip2ForImageTextRetrieval(config)
    blip2.fill(stock, matcher.encoder, connector)
    stock.embeddings.load_state_dict(blip2.tensors(connector), assign=True)
    stock.vision_projection, stock.text_projection, stock.itm_head = connector.vision_proj, connector.text_proj, connector.itm_head
    yield stock
