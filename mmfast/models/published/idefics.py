"""Idefics: ``IdeficsForVisionText2Text``, a CLIP tower, a LLaMA and gated blocks between its layers, with or without a resampler."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import IdeficsForVisionText2Text

STOCK = IdeficsForVisionText2Text

# A resampler's names here and there; keys and values are one map here.
_RESAMPLER = (
    ("layers.{i}.0.norm_media", "blocks.{i}.0.context_layer_norm"),
    ("layers.{i}.0.norm_latents", "blocks.{i}.0.latents_layer_norm"),
    ("layers.{i}.0.norm_q", "blocks.{i}.0.q_layer_norm"),
    ("layers.{i}.0.norm_k", "blocks.{i}.0.k_layer_norm"),
    ("layers.{i}.0.to_q", "blocks.{i}.0.q_proj"),
    ("layers.{i}.0.to_out", "blocks.{i}.0.output_proj"),
    ("layers.{i}.1.0", "blocks.{i}.1.ln"),
    ("layers.{i}.1.1", "blocks.{i}.1.fc"),
    ("layers.{i}.1.3", "blocks.{i}.1.c_proj"),
    ("norm", "layer_norm"),
)


def resampler_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock resampler's tensors under the names of ``mmfast.nn.PerceiverResampler``."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith(".v_proj.weight"):
            continue
        if name.endswith(".k_proj.weight"):
            values = theirs[name.replace(".k_proj.", ".v_proj.")]
            ours[re.sub(r"blocks\.(\d+)\.0\.k_proj", r"layers.\1.0.to_kv", name)] = torch.cat([tensor, values])
        else:
            ours[_renamed(name, back=False)] = tensor
    return ours


def stock_resampler_names(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith(".to_kv.weight"):
            for kind, half in zip("kv", tensor.chunk(2), strict=True):
                theirs[re.sub(r"layers\.(\d+)\.0\.to_kv", rf"blocks.\1.0.{kind}_proj", name)] = half
        else:
            theirs[_renamed(name, back=True)] = tensor
    return theirs


def _renamed(name: str, *, back: bool) -> str:
    number = next((word for word in name.split(".") if word.isdigit()), "")
    for pair in _RESAMPLER:
        old, new = (form.format(i=number) for form in (pair if back else pair[::-1]))
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name
