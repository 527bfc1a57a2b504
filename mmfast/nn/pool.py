"""Attention pooling: a fixed number of learned queries read a picture's states once."""

import torch
from torch import Tensor, nn

from mmfast.ops import cross_attention


class Heads(nn.Module):
    """Attention of rows on a picture's states and on themselves, all maps with biases. Keys: ``k_proj, v_proj, q_proj, out_proj``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, 0.0  # of attention weights, in training
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, rows: Tensor, states: Tensor) -> Tensor:
        """rows [L, D], the same for all, on states [B, N, D] and on themselves -> [B, L, D]."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).expand(len(states), -1, -1, -1)

        # The rows are mapped once and shown to every picture with stride 0; states and rows are two segments of keys, neither is copied.
        q, k2, v2 = (split(f(rows)[None]) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = split(self.k_proj(states)), split(self.v_proj(states))
        out = cross_attention(q, k, v, k2, v2, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.flatten(-2))


class AttentionPool(nn.Module):
    """``[M, N, width_in] -> [M, tokens, width_out]``: ``x = W f + b``, and learned queries q attend once to x and to themselves.

    No residual, no norm, no feed-forward behind it. Source: Kosmos-2 (arXiv:2306.14824) as released; keys are those of transformers'
    ``Kosmos2ImageToTextProjection``: ``dense``, ``latent_query``, ``x_attn.{k,v,q,out}_proj``.

    It reads states of length 1. The queries start from N(0, 1), and so does W, which gives such states the queries' size: with less, keys are
    next to nothing, all weights alike, and what is read is the states' mean for long. Attention starts as Magneto's queries do (Xavier).
    """

    def __init__(self, width_in: int, width_out: int, tokens: int = 64, heads: int = 32):
        super().__init__()
        if width_out % heads:
            raise ValueError(f"AttentionPool: expected a width that {heads} heads divide, got {width_out}")
        self.dense = nn.Linear(width_in, width_out)
        nn.init.normal_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        self.latent_query = nn.Parameter(torch.randn(tokens, width_out))
        self.x_attn = Heads(width_out, heads)

    def forward(self, states: Tensor) -> Tensor:
        return self.x_attn(self.latent_query, self.dense(states))
