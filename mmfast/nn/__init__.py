"""Modules on top of the ops, with the state-dict keys of their upstream implementations."""

from mmfast.nn.quantizer import VectorQuantize, VectorQuantizer2

__all__ = ["VectorQuantize", "VectorQuantizer2"]
