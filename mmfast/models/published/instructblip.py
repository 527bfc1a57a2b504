"""InstructBLIP: ``InstructBlipForConditionalGeneration``, a BLIP-2 whose Q-Former reads the question too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.models.pretrained import VISION, share
from mmfast.models.published import blip2

STOCK = InstructBlipForConditionalGeneration


def system_of(config: InstructBlipConfig, name: str) -> spec.System:
    """The choices that a stock InstructBLIP's configuration stands for."""
    if not config.vision_config.qkv_bias:
        raise ValueError(f"{name}: vision_config.qkv_bias is false, expected true, as in BLIP-2's tower")
    return blip2.whole(config, name, "arXiv:2305.06500", text=False, instructed=True)


def from_stock(stock: InstructBlipForConditionalGeneration, name: str = "instructblip") -> MultimodalModel:
    """Take the parts out of a stock InstructBLIP; its tower is BLIP-2's under another name."""
    system, theirs = system_of(stock.config, name), stock.vision_model
    with torch.device("meta"):
        vision = Blip2VisionModel(Blip2VisionConfig(**_sizes(theirs.config)))
    share(theirs, vision)
    stock.vision_model = vision
    return blip2.joined(stock, system)


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[InstructBlipForConditionalGeneration]:
    """The model's parts in a stock InstructBLIP that gives the same logits; adapters are folded in meanwhile, heads that compare are left out."""
    config = blip2.stock_config(model.encoder, model.connector, model.system, text=True)
    q = config.qformer_config.to_dict()
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**_sizes(config.vision_config)).to_dict(),
        qformer_config={name: q[name] for name in InstructBlipQFormerConfig().to_dict() if name in q and name != "model_type"},
        num_query_tokens=config.num_query_tokens,
    )
    with blip2.filled(model, STOCK, config) as stock:
        yield stock


def _sizes(vision: Blip2VisionConfig | InstructBlipVisionConfig) -> dict:
    return {name: getattr(vision, name) for name in (*VISION, "initializer_range") if hasattr(vision, name)}
