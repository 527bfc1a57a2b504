"""Published checkpoints in and out.

The stock class of transformers is the map between names: parts are taken out of it when reading and put back into it when writing, so that
whatever layouts it understands (old key names, shards, half precision) we understand too, and what we write it loads. A module here is one
class: ``STOCK``, ``system_of(config, name)``, ``from_stock(stock, name)`` and ``as_stock(model)``, a context that gives the stock model; and
``READER`` where it is read by another class.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from transformers import PretrainedConfig

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.models.matching import Matcher
from mmfast.models.pretrained import config_of, load_weights
from mmfast.models.published import blip2, blip2_retrieval, chameleon, idefics, instructblip, kosmos2, llava

SHARD = "5GB"  # files of larger models are cut to this
# By model_type.
KNOWN = {
    "llava": llava, "kosmos-2": kosmos2, "blip-2": blip2, "instructblip": instructblip, "chameleon": chameleon, "idefics": idefics,
}  # fmt: skip
BY_CLASS = {"Blip2ForImageTextRetrieval": blip2_retrieval}  # where a model_type has several


def from_pretrained(path: str | Path, *, dtype: torch.dtype | None = None) -> MultimodalModel | Matcher:
    """Read a Hugging Face folder (or hub name) of a known ``model_type``; frozen and in evaluation mode.

    Known: ``llava`` with a CLIP, SigLIP or DINOv2 tower and any causal language model; ``blip-2`` and ``instructblip`` with a causal language
    model or T5, and ``blip-2`` as Blip2ForImageTextRetrieval, which is a ``mmfast.models.Matcher``; ``kosmos-2``, ``chameleon``, ``idefics``. Anything
    else raises ``ValueError`` with what was found.
    """
    config, name = config_of(str(path)), Path(path).name
    kind = _known(config, str(path))
    kind.system_of(config, str(path))  # what cannot be read is told before gigabytes are
    return kind.from_stock(load_weights(getattr(kind, "READER", kind.STOCK), str(path), "weights", dtype or torch.float32), name)


def system_of(config: PretrainedConfig, name: str) -> spec.System:
    """The choices that a stock configuration stands for."""
    return _known(config, name).system_of(config, name)


def _known(config: PretrainedConfig, name: str) -> ModuleType:
    if config.model_type not in KNOWN:
        raise ValueError(f"{name}: model_type is {config.model_type!r}; from_pretrained knows {', '.join(map(repr, KNOWN))}")
    return BY_CLASS.get((config.architectures or [""])[0], KNOWN[config.model_type])


def save_pretrained(model: MultimodalModel, path: str | Path) -> None:
    """Write a folder that the stock class of the model's choices loads, with the same logits; adapters are folded in."""
    with class_of(model.system).as_stock(model) as stock:
        stock.save_pretrained(path, max_shard_size=SHARD)


def class_of(system: spec.System) -> ModuleType:
    """The module of the stock class that has a form for a system's choices."""
    match system.connector, system.fusion, system.language.encodes:
        case (spec.QFormer(instructed=True), spec.Prefix(), _):
            return instructblip
        case (spec.QFormer(), spec.Prefix(), _):
            return blip2
        case (spec.Linear() | spec.Mlp(), spec.Prefix(), False):
            return llava
        case (spec.AttentionPool(), spec.Prefix(), False):
            return kosmos2
        case (spec.NoConnector(), spec.SharedTokens(), _):
            return chameleon
        case (spec.Resampler() | spec.NoConnector(), spec.GatedCrossAttention(block="idefics"), _):
            return idefics
    parts = (
        f"{type(system.connector).__name__} and {type(system.fusion).__name__}"
        + f" over {system.language.family}" * system.language.encodes
    )
    raise ValueError(f"{system.name}: no class of transformers has a model of {parts}")
