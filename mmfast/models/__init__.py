"""Multimodal language models, built from a ``System`` or read from a published checkpoint."""

from mmfast.models.adapter import load_adapter, save_adapter
from mmfast.models.build import MultimodalModel, Output, build
from mmfast.models.flamingo import load_flamingo, save_flamingo
from mmfast.models.fromage import load_fromage, save_fromage
from mmfast.models.lavis import load_lavis, save_lavis
from mmfast.models.llava import load_llava, save_llava
from mmfast.models.lora import adapters_off, add_lora, load_lora, lora_parameters, merge_lora, save_lora
from mmfast.models.matching import Matcher, captions, rank
from mmfast.models.pretrained import resolved, tokenizer_for
from mmfast.models.published import from_pretrained
from mmfast.models.tiny import tiny

__all__ = [
    "Matcher", "MultimodalModel", "Output", "adapters_off", "add_lora", "build", "captions", "from_pretrained", "load_adapter", "load_flamingo", "load_fromage", "load_lavis", "load_llava", "load_lora", "lora_parameters", "merge_lora",
    "rank", "resolved", "save_adapter", "save_flamingo", "save_fromage", "save_lavis", "save_llava", "save_lora", "tiny", "tokenizer_for",
]  # fmt: skip
