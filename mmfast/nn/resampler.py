"""The perceiver resampler: any number of image or video tokens to a fixed number of latents.

Source: Flamingo (arXiv:2204.14198, section 2.2 and appendix A.1.1); modules, arguments and state-dict keys of open_flamingo. Letters: B batch,
T media per sample, F frames per medium, N tokens per frame, L latents, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops import cross_attention


class SquaredReLU(nn.Module):
    """``max(x, 0)^2`` (Primer, arXiv:2109.08668), the activation of Flamingo's own layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "squared_relu": SquaredReLU}


def feed_forward(dim: int, mult: int = 4, activation: str = "gelu") -> nn.Sequential:
    """LayerNorm and a two-layer network of ``mult`` times the width, no biases; ``gelu`` is exact. Keys: ``0``, ``1``, ``3``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: unknown activation {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    wide = dim * mult
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, wide, bias=False), ACTIVATIONS[activation](), nn.Linear(wide, dim, bias=False))


class PerceiverAttention(nn.Module):
    """Latents read media and themselves: ``[B, N, D], [B, L, D] -> [B, L, D]``. Keys: ``norm_media, norm_latents, to_q, to_kv, to_out``,
    and ``norm_q, norm_k`` with ``qk_norm``."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, heads * dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.norm_q, self.norm_k = (nn.LayerNorm(dim_head) if qk_norm else None for _ in range(2))

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1))
        # Media and latents are two segments of keys: neither the inputs nor the keys and values are concatenated.
        k, v = self.to_kv(self.norm_media(media)).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        k2, v2 = self.to_kv(latents).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        if self.norm_q is not None:
            q, k, k2 = self.norm_q(q), self.norm_k(k), self.norm_k(k2)
        return self.to_out(cross_attention(q, k, v, k2, v2).flatten(-2))


class PerceiverResampler(nn.Module):
    """``[B, T, F, N, D] -> [B, T, L, D]``: every medium (an image, or a video of F frames) becomes L latents.

    A block: ``z = z + attention(z on [media; z])``, ``z = z + feed_forward(z)``, both pre-norm; the media are normalised anew in every block
    and never updated; a last LayerNorm. No masks, no dropout, no biases, scale ``dim_head ** -0.5``.

    Differences: the paper's feed-forward has squared ReLU, open_flamingo's exact GELU, Idefics' ReLU (and other names).

    Args:
        dim: D.
        depth: blocks.
        dim_head, heads: of the attention; their product need not be D.
        num_latents: L.
        max_num_media: learned embeddings of the place among the media, added to all their tokens; None (the released weights): none.
        max_num_frames: learned embeddings of the frame within its medium; None: none.
        ff_mult: width of the feed-forward over D.
        activation: of the feed-forward, "gelu", "relu" or "squared_relu".
        interpolate_frames: a medium of more frames than there are embeddings gets them stretched over it, linearly and with the first and the
            last kept (the paper trains with 8 frames and answers with 30); otherwise it is an error.
        qk_norm: LayerNorm of every head's queries and keys (Idefics).

    Raises:
        ValueError: x is not ``[B, T, F, N, D]``, or holds more media or frames than there are embeddings; an unknown activation.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
        activation: str = "gelu",
        interpolate_frames: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.interpolate_frames = interpolate_frames
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads, qk_norm=qk_norm), feed_forward(dim, ff_mult, activation)]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[-1] != self.latents.shape[-1]:
            raise ValueError(f"PerceiverResampler: expected x [B, T, F, N, D={self.latents.shape[-1]}], got {list(x.shape)}")
        batch, media, frames = x.shape[:3]
        frame_embs = self.frame_embs
        if frame_embs is not None and self.interpolate_frames and frames > len(frame_embs):
            frame_embs = F.interpolate(frame_embs.T[None], frames, mode="linear", align_corners=True)[0].T
        for count, name, table in ((frames, "frames", frame_embs), (media, "media", self.media_time_embs)):
            if table is not None and count > len(table):
                raise ValueError(f"PerceiverResampler: x {list(x.shape)} holds {count} {name}, there are embeddings for {len(table)}")
        if frame_embs is not None:
            x = x + frame_embs[:frames, None]
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:media, None]
        x = x.flatten(2, 3).flatten(0, 1)
        latents = self.latents.expand(batch * media, -1, -1)
        for attention, ff in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + ff(latents)
        return self.norm(latents).unflatten(0, (batch, media))
