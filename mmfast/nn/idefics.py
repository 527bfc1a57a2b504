"""Idefics' gated cross-attention block, and images that text rows see by any mask.

Source: Idefics (arXiv:2306.16527, section 4.1, appendix A.2), which follows Flamingo (arXiv:2204.14198) in a LLaMA; modules and state-dict keys
of transformers' ``IdeficsGatedCrossAttentionLayer``. Its resampler is ``mmfast.nn.PerceiverResampler`` with ReLU. Letters: B batch, S text
tokens, T media per sample, L latents of a medium, D width of the text, E of the media, H heads, d their width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfast.ops import media_cross_attention, merge_attention


def media_times(mask: Tensor) -> list[Tensor]:
    """Which media a row of text sees, ``mask [B, S, T]`` (not 0: sees), as text times ``[B, S]`` of ``media_cross_attention``.

    As many as the row that sees most media sees: the i-th holds every row's i-th visible medium, counted from 1, and 0 where there is none.
    The usual mask, in which a row sees the latest medium alone, is one of them. Media that no row sees have none, and the list may be empty.
    """
    seen = mask != 0
    number = torch.arange(1, seen.shape[-1] + 1, device=seen.device)
    count = seen.sum(-1)
    # Visible media first, in their order.
    order = (seen * (seen.shape[-1] + 1 - number)).sort(-1, descending=True).values
    return [torch.where(i < count, seen.shape[-1] + 1 - order[..., i], 0) for i in range(int(count.max()) if count.numel() else 0)]


def media_attention(q: Tensor, k: Tensor, v: Tensor, times: Sequence[Tensor], latents_per_media: int) -> Tensor:
    """Text rows read all media that ``times`` (of ``media_times``) name for them: ``q [B, S, H, d]``, ``k, v [B, T L, G, d]`` -> ``[B, S, H, d]``.

    One pass of ``media_cross_attention`` for each of ``times``, which costs what is visible, and the merged softmax of all; where rows see one
    medium each that is the op itself. A row that sees none gives 0 and no gradient.
    """
    if len(times) <= 1:
        seen = times[0] if times else q.new_zeros(q.shape[:2], dtype=torch.int32)
        return media_cross_attention(q, k, v, text_time=seen, latents_per_media=latents_per_media)
    parts = [media_cross_attention(q, k, v, text_time=t, latents_per_media=latents_per_media, return_lse=True) for t in times]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_attention(*merged, *part)
    return merged[0]


class IdeficsCrossAttention(nn.Module):
    """Text reads media: ``[B, S, D], [B, T, L, E] -> [B, S, D]``. Keys: ``q_proj, k_proj, v_proj, o_proj``, and ``q_layer_norm, k_layer_norm``
    with ``qk_norm``. No biases, no rotation: a medium's place is not a place of the text."""

    def __init__(self, *, dim: int, dim_visual: int, heads: int, qk_norm: bool, eps: float):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim_visual, dim, bias=False)
        self.v_proj = nn.Linear(dim_visual, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.q_layer_norm = nn.RMSNorm(dim // heads, eps) if qk_norm else None
        self.k_layer_norm = nn.RMSNorm(dim // heads, eps) if qk_norm else None

    def forward(self, x: Tensor, media: Tensor, times: Sequence[Tensor]) -> Tensor:
        flat = media.flatten(1, 2)
        q, k, v = (m(t).unflatten(-1, (self.heads, -1)) for m, t in ((self.q_proj, x), (self.k_proj, flat), (self.v_proj, flat)))
        if self.q_layer_norm is not None:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        return self.o_proj(media_attention(q, k, v, times, media.shape[2]).flatten(-2))


class IdeficsMlp(nn.Module):
    """``down_proj(silu(gate_proj x) * up_proj x)``, without biases."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class IdeficsGatedBlock(nn.Module):
    """``y = x + tanh(alpha_cross_attn) attention(norm(x) on media)``, ``y + tanh(alpha_dense) mlp(norm(y))``: ``[B, S, D] -> [B, S, D]``.

    The gates start at 0, so the block starts as the identity. A row that sees no medium gets 0 from the attention and passes the gated
    network all the same. Keys: ``cross_attn.{q,k,v,o}_proj``, ``mlp.{gate,up,down}_proj``, ``input_layernorm``, ``post_attention_layernorm``,
    ``alpha_cross_attn``, ``alpha_dense``.

    Args:
        dim, heads, inner, eps: the language model's width, heads, width of its feed-forward network, and eps of its norms.
        dim_visual: E; media are not normalised here.
        qk_norm: RMSNorm of every head's queries and keys.
        gates: "scalar" ``[1]`` or "vector" ``[1, 1, D]``.

    forward:
        x: ``[B, S, D]``.
        media: ``[B, T, L, E]``.
        text_time: ``[B, S]``, the medium that a row sees, counted from 1, 0: none; or several of them (``media_times``), for rows that see more.

    Attributes:
        checkpointing: recompute the activations in backward instead of keeping them.
    """

    def __init__(
        self, *, dim: int, dim_visual: int, heads: int, inner: int, eps: float = 1e-6, qk_norm: bool = False, gates: str = "scalar",
    ):  # fmt: skip
        super().__init__()
        self.cross_attn = IdeficsCrossAttention(dim=dim, dim_visual=dim_visual, heads=heads, qk_norm=qk_norm, eps=eps)
        self.mlp = IdeficsMlp(dim, inner)
        self.input_layernorm = nn.RMSNorm(dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps)
        shape = (1, 1, dim) if gates == "vector" else (1,)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(shape))
        self.alpha_dense = nn.Parameter(torch.zeros(shape))
        self.checkpointing = False

    def forward(self, x: Tensor, media: Tensor, text_time: Tensor | Sequence[Tensor]) -> Tensor:
        if media.dim() != 4 or media.shape[0] != x.shape[0]:
            raise ValueError(f"IdeficsGatedBlock: expected media [B={x.shape[0]}, T, L, E], got {list(media.shape)}")
        times = [text_time] if isinstance(text_time, Tensor) else text_time
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._read, x, media, times, use_reentrant=False)
        return self._read(x, media, times)

    def _read(self, x: Tensor, media: Tensor, times: Sequence[Tensor]) -> Tensor:
        x = x + self.cross_attn(self.input_layernorm(x), media, times) * self.alpha_cross_attn.tanh()
        return x + self.mlp(self.post_attention_layernorm(x)) * self.alpha_dense.tanh()
