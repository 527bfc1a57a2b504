"""Attention of few rows on many keys: perceiver resampling, the Q-Former, and text on the images before it.

Letters: B batch, H query heads, G key/value heads (H a multiple of G), D head width, Nq rows, N keys. Layout as in flash-attn:
``[B, N, H, D]``, last dim contiguous (a copy is made otherwise), every other stride free. Types: float32, float16, bfloat16, float64 on
CPU and CUDA; sums in float32 (float64 for float64). Under autocast, q, k and v are cast as for torch's own attention.

Everywhere: ``s_ij = scale q_i.k_j``, ``p = softmax`` over the visible keys, ``o_i = sum_j p_ij v_j``, ``lse_i = log sum_j exp(s_ij)``.
What is visible is computed from lengths and positions; no mask is read and none is made. A row that sees no key gives exactly 0, lse -inf
and zero gradients, never NaN. Nothing of size Nq x N is stored: memory beyond inputs and outputs is one lse a row.

Dropout is a function of (seed, batch, head, row, key), so backward repeats it; the seed comes from torch's generator. Its probability is
rounded to a multiple of 2^-16.

Sources: online softmax (arXiv:1805.02867), FlashAttention-2 (arXiv:2307.08691), Philox (Salmon et al., SC 2011); what is visible:
Flamingo (arXiv:2204.14198, section 2.3), BLIP-2 (arXiv:2301.12597, figure 2), InstructBLIP (arXiv:2305.06500).
"""

import torch
from torch import Tensor

from mmfast.ops.library import differentiable, without_graph

_LENGTHS, _UNIMODAL, _MULTIMODAL_CAUSAL, _MEDIA, _MEDIA_ALL = range(5)
_MASK_MODES = {"bidirectional": _LENGTHS, "unimodal": _UNIMODAL, "multimodal_causal": _MULTIMODAL_CAUSAL}


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    *,
    scale: float | None = None,
    key_lens: Tensor | None = None,
    key2_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on one or two segments of keys; the second (a perceiver's latents) is read where it lies, without concatenation.

    Args:
        q: ``[B, Nq, H, D]``.
        k, v: ``[B, N, G, D]``; with G < H each key head serves H / G consecutive query heads.
        k2, v2: ``[B, N2, G, D]``, seen after k and v as if concatenated along the keys.
        scale: of the scores; ``D ** -0.5`` if not given.
        key_lens, key2_lens: integers ``[B]``, how many leading keys of a segment are real.
        dropout_p: probability of dropping a weight; give 0 outside training.
        return_lse: also return ``lse [B, H, Nq]`` (float32; float64 for float64 inputs), differentiable.

    Returns:
        ``[B, Nq, H, D]`` in q's type, and lse if asked for.

    Raises:
        RuntimeError: shapes, types or devices that do not fit; on the CPU also a length outside ``[0, N]``, which CUDA clamps.
    """
    out, lse = _attention(
        "cross_attention", q, k, v, k2, v2, lens=key_lens, lens2=key2_lens, scale=scale, dropout_p=dropout_p, rule=_LENGTHS
    )
    return (out, lse) if return_lse else out


def cross_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_attention`` on packed sequences: the arguments of ``flash_attn_varlen_func``, in its order.

    Args:
        q: ``[total_q, H, D]``; k, v: ``[total_k, G, D]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, where each sequence starts, and the total last.
        max_seqlen_q, max_seqlen_k: the longest lengths.
        softmax_scale: ``D ** -0.5`` if not given.
        return_lse: also return ``lse [H, total_q]``.

    Returns:
        ``[total_q, H, D]``, and lse if asked for.

    Raises:
        RuntimeError: as ``cross_attention``; on the CPU also offsets that are not ascending or exceed the totals or the longest lengths.
    """
    out, lse = _attention(
        "cross_attention_varlen", q, k, v, None, None, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, max_q=max_seqlen_q, max_k=max_seqlen_k,
        scale=softmax_scale, dropout_p=dropout_p, rule=_LENGTHS,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def qformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_queries: int,
    mask_mode: str,
    text_lens: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Self-attention of learned queries followed by text, with the masks of BLIP-2's pre-training (figure 2).

    ``"bidirectional"`` (matching; InstructBLIP): every row sees the queries and the real text. ``"unimodal"`` (contrastive): queries see
    queries, text sees real text. ``"multimodal_causal"`` (captioning): queries see queries; text position t sees the queries and the real
    text up to and including t.

    A text row whose own position is padding still sees what the rule gives; where nothing is visible the result is 0. (An additive mask
    of -10000, as LAVIS makes, would average over all keys there; such rows are padding and unused.)

    Args:
        q: ``[B, Nq, H, D]``: all rows, or with fewer rows than keys the last Nq (the first ones' keys and values being cached).
        k, v: ``[B, num_queries + S, H, D]``, queries first; ``S >= 0``.
        mask_mode: one of the three above.
        text_lens: integers ``[B]``, how many leading text positions are real; or
        text_mask: ``[B, S]``, nonzero where real (any padding side). Not both.
        dropout_p: probability of dropping a weight; give 0 outside training.

    Returns:
        ``[B, Nq, H, D]``.

    Raises:
        ValueError: unknown ``mask_mode``, or both text_lens and text_mask. RuntimeError: as ``cross_attention``.
    """
    if mask_mode not in _MASK_MODES:
        raise ValueError(f"qformer_attention: unknown mask_mode {mask_mode!r}, expected one of {', '.join(map(repr, _MASK_MODES))}")
    if text_lens is not None and text_mask is not None:
        raise ValueError("qformer_attention: give text_lens or text_mask, not both")
    if not 0 <= num_queries <= k.shape[1]:
        raise ValueError(f"qformer_attention: num_queries {num_queries} is not within the {k.shape[1]} keys")
    rule = _MASK_MODES[mask_mode]
    return _attention(
        "qformer_attention", q, k, v, None, None, lens2=text_lens, valid2=text_mask, rule=rule, number=num_queries, scale=scale,
        dropout_p=dropout_p,
    )[0]  # fmt: skip


def media_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_time: Tensor,
    latents_per_media: int,
    only_immediate: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Text rows read the latents of the image before them (Flamingo, section 2.3); the cost is that of what is visible.

    Args:
        q: ``[B, Nq, H, D]``, one row a text token.
        k, v: ``[B, T * latents_per_media, G, D]``: the latents of T images, image after image.
        text_time: integers ``[B, Nq]``: how many images stand at or before the token, 0 before the first. Usually the running sum of
            "this token is <image>", but any order is right.
        only_immediate: the last image only (Flamingo, and OpenFlamingo's default), or all images so far.
        return_lse: also return ``lse [B, H, Nq]``, -inf before the first image, as ``cross_attention`` does: what rows saw of one image each can
            then be merged (``merge_attention``).

    Returns:
        ``[B, Nq, H, D]``, and lse if asked for; tokens before the first image get exactly 0 and give no gradient. (OpenFlamingo with
        ``only_attend_immediate_media=False`` gives them the mean over all images instead.)

    Raises:
        RuntimeError: as ``cross_attention``; on the CPU also a text_time outside ``[0, T]``. CUDA takes a negative one as 0 and one past T
            as an image that is missing (immediate: 0) or as T (all).
    """
    rule = _MEDIA if only_immediate else _MEDIA_ALL
    extra = {"text_time": text_time, "number": latents_per_media}
    out, lse = _attention("media_cross_attention", q, k, v, None, None, rule=rule, scale=scale, **extra)
    return (out, lse) if return_lse else out


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention on the union of two disjoint sets of keys, from the attention on each.

    ``lse = logaddexp(lse_a, lse_b)``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``; differentiable in all four.

    Args:
        out_a, out_b: ``[B, Nq, H, D]`` (or packed ``[total_q, H, D]``), one type.
        lse_a, lse_b: ``[B, H, Nq]`` (or ``[H, total_q]``), float32, or float64 with float64 outputs.

    Returns:
        out, lse in the same shapes and types. A row that saw no key in either stays 0 with lse -inf.
    """
    return _merge(out_a, lse_a, out_b, lse_b)


# ------------------------------------------------------------------------------------------------------------- references


def cross_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    *,
    scale: float | None = None,
    key_lens: Tensor | None = None,
    key2_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_attention`` in plain PyTorch, in float64: its meaning and its test oracle."""
    seen = _prefix(q, k, key_lens)
    if k2 is not None:
        seen = torch.cat([seen, _prefix(q, k2, key2_lens)], -1)
        k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
    out, lse = _attend_ref(q, k, v, seen, scale, dropout_p)
    return (out, lse) if return_lse else out


def cross_attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_attention_varlen`` in plain PyTorch: one sequence after the other."""
    outs, lses = [], []
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]), slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        out, lse = cross_attention_ref(
            q[None, rows], k[None, keys], v[None, keys], scale=softmax_scale, dropout_p=dropout_p, return_lse=True
        )
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, -1)
    return (out, lse) if return_lse else out


def qformer_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_queries: int,
    mask_mode: str,
    text_lens: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``qformer_attention`` in plain PyTorch: the mask is made."""
    keys = k.shape[1]
    row = torch.arange(keys - q.shape[1], keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    row_is_text, key_is_text = row >= num_queries, key >= num_queries
    seen = {
        "bidirectional": torch.ones_like(row_is_text | key_is_text),
        "unimodal": row_is_text == key_is_text,
        "multimodal_causal": ~key_is_text | (row_is_text & (key <= row)),
    }[mask_mode].expand(q.shape[0], -1, -1)
    if text_lens is not None:
        seen = seen & (key - num_queries < text_lens.view(-1, 1, 1))
    if text_mask is not None:
        real = torch.ones(q.shape[0], keys, dtype=torch.bool, device=q.device)
        real[:, num_queries:] = text_mask != 0
        seen = seen & real[:, None]
    return _attend_ref(q, k, v, seen, scale, dropout_p)[0]


def media_cross_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_time: Tensor,
    latents_per_media: int,
    only_immediate: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``media_cross_attention`` in plain PyTorch: all text times all media, masked."""
    image = torch.arange(k.shape[1], device=q.device) // latents_per_media + 1
    seen = text_time[..., None] == image if only_immediate else text_time[..., None] >= image
    out, lse = _attend_ref(q, k, v, seen, scale, 0.0)
    return (out, lse) if return_lse else out


def merge_attention_ref(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_attention`` in plain PyTorch."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    a, b = (lse_a - top).exp(), (lse_b - top).exp()
    total = a + b
    safe = torch.where(total > 0, total, 1.0)
    lse = torch.where(total > 0, top + safe.log(), -torch.inf)
    out = (a / safe).transpose(-1, -2)[..., None] * out_a + (b / safe).transpose(-1, -2)[..., None] * out_b
    return out.to(out_a.dtype), lse


def _prefix(q: Tensor, k: Tensor, lens: Tensor | None) -> Tensor:
    key = torch.arange(k.shape[1], device=q.device)
    seen = key < lens.view(-1, 1, 1) if lens is not None else torch.ones_like(key, dtype=torch.bool)
    return seen.expand(q.shape[0], q.shape[1], -1)


def _attend_ref(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64 where ``seen [B, Nq, N]``."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.double().repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    some = seen.any(-1)[:, None]  # [B, 1, Nq]
    # Rows that see nothing are computed on zeros and then set, so that no NaN reaches a gradient.
    scores = torch.where(seen[:, None], scores, -torch.inf).where(some[..., None], 0.0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
    weights = torch.dropout((scores - lse[..., None]).exp(), dropout_p, True) * some[..., None]
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out.to(q.dtype), torch.where(some, lse, -torch.inf).to(_wide(q))


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------- the op


def _attention(
    op: str, q, k, v, k2, v2, *, rule, lens=None, lens2=None, valid2=None, text_time=None, cu_q=None, cu_k=None, max_q=0, max_k=0,
    number=0, scale=None, dropout_p=0.0,
):  # fmt: skip
    threshold, seed = 0, None
    if dropout_p:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
        threshold = min(round(dropout_p * 65536), 65535)
    if threshold:  # the seed is a tensor, so that torch's generator governs it, graphs capture it and checkpointing repeats it
        seed = torch.randint(2**62, (1,), device=q.device)
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(kind)
        q, k, v, k2, v2 = (t if t is None else t.to(narrow) for t in (q, k, v, k2, v2))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _op(
        q, k, v, k2, v2, _int32(lens), _int32(lens2), _flags(valid2), _int32(text_time), _int32(cu_q), _int32(cu_k), seed, rule, number,
        max_q, max_k, scale, threshold,
    )  # fmt: skip


def _int32(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.int32 else t.to(torch.int32)


def _flags(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)


@torch.library.register_fake("mmfast::attention")
def _(q, k, v, k2, v2, lens, lens2, valid2, text_time, cu_q, cu_k, seed, rule, number, max_q, max_k, scale, threshold):
    rows = [q.shape[1], q.shape[0]] if cu_q is not None else [q.shape[0], q.shape[2], q.shape[1]]
    return q.new_empty(q.shape), q.new_empty(rows, dtype=_wide(q))


@torch.library.register_fake("mmfast::attention_backward")
def _(grad_out, grad_lse, q, k, v, k2, v2, out, lse, lens, lens2, valid2, text_time, cu_q, cu_k, seed, rule, number, max_q, max_k, scale,
      threshold, need_q, need_kv):  # fmt: skip
    def like(t, needed):
        return q.new_empty(t.shape if needed and t is not None else [0])

    return like(q, need_q), like(k, need_kv), like(v, need_kv), like(k2, need_kv), like(v2, need_kv)


def _setup(ctx, inputs, output):
    # Saved: the inputs, the output and one lse a row; weights are formed again in backward.
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.settings = inputs[12:]
    ctx.set_materialize_grads(False)


_grad = without_graph(torch.ops.mmfast.attention_backward.default)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, k2, v2, *rest, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    grads = _grad(grad_out, grad_lse, q, k, v, k2, v2, out, lse, *rest, *ctx.settings, needs[0], any(needs[1:]))
    return [g if n else None for g, n in zip(grads, needs, strict=True)]


_op = differentiable(torch.ops.mmfast.attention.default, 5, _backward, _setup)


@torch.library.register_fake("mmfast::merge_attention")
def _(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("mmfast::merge_attention_backward")
def _(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, out, lse):
    return tuple(t.new_empty(t.shape) for t in (out_a, lse_a, out_b, lse_b))


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


_merge_grad = without_graph(torch.ops.mmfast.merge_attention_backward.default)


def _merge_backward(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return (None,) * 4
    return _merge_grad(grad_out, grad_lse, *ctx.saved_tensors)


_merge = differentiable(torch.ops.mmfast.merge_attention.default, 4, _merge_backward, _merge_setup)
