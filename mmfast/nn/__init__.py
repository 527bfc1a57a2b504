"""Modules on top of the ops, with the state-dict keys of their upstream implementations."""

from mmfast.nn.adapter import AdapterPrompt
from mmfast.nn.gated import GatedCrossAttention
from mmfast.nn.idefics import IdeficsGatedBlock
from mmfast.nn.nfresnet import NFResNet
from mmfast.nn.pool import AttentionPool
from mmfast.nn.preference import FusedLinearDPOLoss
from mmfast.nn.qformer import QFormer
from mmfast.nn.quantizer import VectorQuantize, VectorQuantizer2
from mmfast.nn.query_connector import QueryConnector
from mmfast.nn.resampler import PerceiverResampler
from mmfast.nn.vqgan import VQGAN, PatchCritic

__all__ = [
    "VQGAN", "AdapterPrompt", "AttentionPool", "FusedLinearDPOLoss", "GatedCrossAttention", "IdeficsGatedBlock", "NFResNet", "PatchCritic", "PerceiverResampler", "QFormer", "QueryConnector", "VectorQuantize", "VectorQuantizer2",
]  # fmt: skip
