"""Zero-initialised gated prompts: learned keys and values that a frozen attention layer reads beside its own.

Source: LLaMA-Adapter (arXiv:2303.16199, section 3.2, equations 3 to 9). Letters: B rows, T tokens, S sequences, K prompts, D width, H query
heads, G key/value heads, d head width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mmfast.ops import cross_attention, cross_attention_varlen

GATES = {"tanh": torch.tanh, "identity": lambda gate: gate}


class AdapterPrompt(nn.Module):
    """What a layer's queries read from K prompts, ``gate softmax(q (P wk)^T / sqrt(d)) (P wv)``, to be added to its heads before ``wo``.

    The layer's own attention and this one are two softmaxes apart, so that at gate 0, where it starts, the layer is exactly what it was; the
    first gradients reach the gates alone. Every query sees all prompts. The query is the layer's own, so rotated where the layer rotates
    it; prompts have no place in the sequence and are neither rotated nor normalised. Keys: ``prompt`` [K, D], ``gate`` [H].

    Differences: the paper's gate is g itself, the released training code takes tanh(g) (``gate_activation``); a gate there is one a head, and
    one a layer in the first release and in peft.

    Args:
        length: K.
        dim: D, the width of the language model.
        heads: H.
        gate_activation: "tanh" or "identity".

    forward:
        q: ``[B, T, H, d]``.
        wk, wv: the layer's own maps, ``[.., D] -> [.., G d]``.
        condition: added to the prompts, ``[B or S, 1 or K, D]``: an image's features (LLaMA-Adapter, section 3.3; V2 has one a prompt).
        cu_seqlens: int32 ``[S + 1]``, where sequences start among all ``B T`` rows of q: sequences laid end to end, each with its own
            condition. It says nothing without one.
        scale: of the scores, ``d ** -0.5`` if not given.

        Returns ``[B, T, H, d]`` in q's type.

    Raises:
        ValueError: an unknown gate_activation, or a condition that does not fit.
    """

    def __init__(self, length: int, dim: int, heads: int, *, gate_activation: Literal["tanh", "identity"] = "tanh"):
        super().__init__()
        if gate_activation not in GATES:
            raise ValueError(f"AdapterPrompt: unknown gate_activation {gate_activation!r}, expected one of {', '.join(map(repr, GATES))}")
        self.gate_activation = gate_activation
        self.prompt = nn.Parameter(torch.randn(length, dim))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        q: Tensor,
        wk: Callable[[Tensor], Tensor],
        wv: Callable[[Tensor], Tensor],
        *,
        condition: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        batch, width = q.shape[0], q.shape[-1]
        prompts = self.prompt[None]
        if condition is not None:
            rows, (length, dim) = batch if cu_seqlens is None else len(cu_seqlens) - 1, self.prompt.shape
            if condition.dim() != 3 or condition.shape[0] != rows or condition.shape[1] not in (1, length) or condition.shape[2] != dim:
                raise ValueError(f"AdapterPrompt: expected condition [{rows}, 1 or K={length}, D={dim}], got {list(condition.shape)}")
            prompts = prompts + condition
        prompts = prompts.to(q.dtype)  # what learns is held in fp32, and read by maps of the layer's own type
        k, v = (w(prompts).unflatten(-1, (-1, width)) for w in (wk, wv))
        if condition is None or cu_seqlens is None:
            read = cross_attention(q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), scale=scale)
        else:
            each = torch.arange(len(cu_seqlens), device=q.device, dtype=torch.int32) * k.shape[1]
            longest = int(cu_seqlens.diff().max())
            read = cross_attention_varlen(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, each, longest, k.shape[1], softmax_scale=scale
            ).view(q.shape)
        return (GATES[self.gate_activation](self.gate)[:, None] * read).to(q.dtype)
