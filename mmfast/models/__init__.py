"""Multimodal language models, built from a ``System`` or read from a published checkpoint."""

from mmfast.models.build import MultimodalModel, Output, build
from mmfast.models.tiny import tiny
from mmfast.models.weights import from_pretrained

__all__ = ["MultimodalModel", "Output", "build", "from_pretrained", "tiny"]
