"""The ops: one module per kernel family, each with its plain-PyTorch twin (``NAME_ref``) beside it."""

from mmfast.ops.vq import (
    vq_code_stats,
    vq_code_stats_ref,
    vq_ema_step_,
    vq_ema_step_ref_,
    vq_ema_update_,
    vq_ema_update_ref_,
    vq_nearest,
    vq_nearest_ref,
    vq_quantize,
    vq_quantize_ref,
)

__all__ = [
    "vq_code_stats",
    "vq_code_stats_ref",
    "vq_ema_step_",
    "vq_ema_step_ref_",
    "vq_ema_update_",
    "vq_ema_update_ref_",
    "vq_nearest",
    "vq_nearest_ref",
    "vq_quantize",
    "vq_quantize_ref",
]
