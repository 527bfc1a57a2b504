"""The ops: one module per kernel family, each with its plain-PyTorch twin (``NAME_ref``) beside it."""

from mmfast.ops.attention import (
    cross_attention,
    cross_attention_ref,
    cross_attention_varlen,
    cross_attention_varlen_ref,
    media_cross_attention,
    media_cross_attention_ref,
    merge_attention,
    merge_attention_ref,
    qformer_attention,
    qformer_attention_ref,
)
from mmfast.ops.preference import preference_loss, preference_loss_ref, segment_logp, segment_logp_ref
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
    "cross_attention",
    "cross_attention_ref",
    "cross_attention_varlen",
    "cross_attention_varlen_ref",
    "media_cross_attention",
    "media_cross_attention_ref",
    "merge_attention",
    "merge_attention_ref",
    "qformer_attention",
    "qformer_attention_ref",
    "preference_loss",
    "preference_loss_ref",
    "segment_logp",
    "segment_logp_ref",
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
