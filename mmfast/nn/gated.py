"""Gated cross-attention: what lets a frozen language model read images between its layers.

Source: Flamingo (arXiv:2204.14198, section 2.3 and figure 4); modules, arguments and state-dict keys of open_flamingo's
``GatedCrossAttentionBlock``. Letters: B batch, S text tokens, T media per sample, L latents of a medium, D width of the text, E of the media.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfast.nn.resampler import feed_forward
from mmfast.ops import cross_attention, media_cross_attention


class MaskedCrossAttention(nn.Module):
    """Text reads the latents of the media before it: ``[B, S, D], [B, T, L, E] -> [B, S, D]``. Keys: ``norm, to_q, to_kv, to_out``."""

    def __init__(self, *, dim: int, dim_visual: int, dim_head: int = 64, heads: int = 8, only_attend_immediate_media: bool = True):
        super().__init__()
        self.heads = heads
        self.only_attend_immediate_media = only_attend_immediate_media
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, heads * dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, media: Tensor, text_time: Tensor | None) -> Tensor:
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(media.flatten(1, 2)).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        if text_time is None:
            out = cross_attention(q, k, v)
        else:
            out = media_cross_attention(
                q, k, v, text_time=text_time, latents_per_media=media.shape[2], only_immediate=self.only_attend_immediate_media
            )
        return self.to_out(out.flatten(-2))


class GatedCrossAttention(nn.Module):
    """``y = x + tanh(attn_gate) attention(x on media)``, ``y + tanh(ff_gate) feed_forward(y)``: ``[B, S, D] -> [B, S, D]``.

    Both gates are scalars that start at 0, so the block starts as the identity, and the first gradients reach the gates alone.
    Keys: ``attn.{norm,to_q,to_kv,to_out}``, ``attn_gate``, ``ff.{0,1,3}``, ``ff_gate``.

    Differences: the paper's feed-forward has squared ReLU, open_flamingo's exact GELU. With
    ``only_attend_immediate_media=False`` open_flamingo lets text before the first medium see the mean of all media, those after it included;
    here such text sees nothing in either mode.

    Args:
        dim: D.
        dim_visual: E.
        dim_head, heads: of the attention, whatever D is.
        ff_mult: width of the feed-forward over D.
        only_attend_immediate_media: a token sees the latest medium before it, or all media before it.
        activation: of the feed-forward, "gelu", "relu" or "squared_relu".

    Attributes:
        checkpointing: recompute the activations in backward instead of keeping them.

    forward:
        x: ``[B, S, D]``.
        media: ``[B, T, L, E]``, the resampler's output (not normalised again here).
        media_locations: ``[B, S]``, true where the token is ``<image>``; that token sees its image already. None: every token sees all media.
        use_cached_media: x is what follows a cached prompt, and media_locations (then ``[B, any]``) the prompt's: every row of x sees what
            the prompt's end saw.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: on the CPU, more ``<image>`` tokens than media (see ``media_cross_attention``).
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        activation: str = "gelu",
    ):
        super().__init__()
        self.checkpointing = False
        self.attn = MaskedCrossAttention(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads, only_attend_immediate_media=only_attend_immediate_media
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, ff_mult, activation)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        text_time: Tensor | None = None,
    ) -> Tensor:
        if media.dim() != 4 or media.shape[0] != x.shape[0]:
            raise ValueError(f"GatedCrossAttention: expected media [B={x.shape[0]}, T, L, E], got {list(media.shape)}")
        if text_time is None:
            text_time = self._text_time(x, media_locations, use_cached_media)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._read, x, media, text_time, use_reentrant=False)
        return self._read(x, media, text_time)

    def _read(self, x: Tensor, media: Tensor, text_time: Tensor | None) -> Tensor:
        x = x + self.attn(x, media, text_time) * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()

    @staticmethod
    def _text_time(x: Tensor, media_locations: Tensor | None, use_cached_media: bool) -> Tensor | None:
        if media_locations is None:
            return None
        if use_cached_media:
            return media_locations.count_nonzero(-1)[:, None].expand(-1, x.shape[1])
        if media_locations.shape != x.shape[:2]:
            raise ValueError(f"GatedCrossAttention: expected media_locations {list(x.shape[:2])}, got {list(media_locations.shape)}")
        return (media_locations != 0).cumsum(-1)
