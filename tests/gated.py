"""A small Flamingo with open gates, and batches for it, spelt."""

from dataclasses import replace

import torch
from torch import Tensor

from mmfast import spec
from mmfast.models import build

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=2, heads=2, ffn=48, patch=8, size=16, layer=-1),
    connector=spec.Resampler(tokens=3, depth=2, heads=2, head_width=8),
    fusion=spec.GatedCrossAttention(every=2, offset=1, heads=2, head_width=8),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=4, heads=4, kv_heads=2, ffn=40, init=0.3),
    image=spec.Fixed(size=16),
)
IMAGE, END = 48, 49


def made(family="llama", *, gates=True, seed=0, tied=False, **fusion):
    torch.manual_seed(seed)
    kv_heads = 4 if family in ("gpt_neox", "gpt2", "mpt", "opt") else 2
    language = replace(SYSTEM.language, family=family, kv_heads=kv_heads, tied=tied)
    model = build(replace(SYSTEM, language=language, fusion=replace(SYSTEM.fusion, **fusion))).eval()
    model.language.eval()
    if gates:
        open_gates(model, seed)
    return model


def open_gates(model, seed=0):
    """Random gates: at 0 they would hide what lies behind them."""
    torch.manual_seed(seed)
    for name, parameter in model.fusion.named_parameters():
        if name.rpartition(".")[2] in ("attn_gate", "ff_gate", "alpha_cross_attn", "alpha_dense"):
            torch.nn.init.normal_(parameter)


def rows(*marks: str, seed=0) -> Tensor:
    """A row a string: I an image, E the end of a chunk, anything else a word."""
    words = torch.randint(1, 48, (len(marks), len(marks[0])), generator=torch.Generator().manual_seed(seed))
    for b, row in enumerate(marks):
        for i, mark in enumerate(row):
            words[b, i] = {"I": IMAGE, "E": END}.get(mark, int(words[b, i]))
    return words


def pictures(count, seed=0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
