"""BLIP-2 with FlanT5-XL (arXiv:2301.12597): stage 1 as ``blip2``, then the encoder reads pictures and the decoder speaks.

Stage 2 as the paper has it: batches of 1520, the language model held in bf16 (T5 overflows in fp16), and each caption cut in two at a place
that is drawn: its beginning is read behind the picture, its rest is learnt. LAVIS's released pre-training does not cut; its decoder learns all of
a caption, which template ``blip2_t5_prompt`` does with records whose question is a picture alone. XXL is ``--language.weights google/flan-t5-xxl``.
"""

from dataclasses import replace

from mmfast.spec import LanguageModel

from .blip2 import RECIPE as BLIP2

_SEE, _SPEAK = BLIP2.stages

RECIPE = replace(
    BLIP2,
    name="blip2_flan_t5",
    language=LanguageModel(family="t5", weights="google/flan-t5-xl", vocab=32128, width=2048, depth=24, ffn=5120, context=512),
    stages=(_SEE, replace(_SPEAK, template="blip2_t5", optim=replace(_SPEAK.optim, batch=1520))),
)
