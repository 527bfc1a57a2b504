"""Connectors between an encoder's width and a language model's."""

from torch import Tensor, nn

from mmfast.nn.resampler import PerceiverResampler


class Projector(nn.Sequential):
    """``depth`` affine maps with exact GELU between them: ``[..., width_in] -> [..., width_out]``.

    Depth 1 is LLaVA v1's connector, depth 2 that of LLaVA-1.5. Keys are those of LLaVA's ``mlp{depth}x_gelu`` (``0.weight``, ``2.weight``, ..);
    torch's default initialisation, like there.
    """

    def __init__(self, width_in: int, width_out: int, depth: int = 1):
        if depth < 1:
            raise ValueError(f"Projector: expected depth >= 1, got {depth}")
        layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(width_out, width_out)]
        super().__init__(*layers)


class PooledProjector(nn.Sequential):
    """One vector a picture: ``[M, N, width_in] -> [M, 1, width_out]`` through ``hidden`` units with exact GELU.

    LLaMA-Adapter's visual global feature (arXiv:2303.16199, section 3.3: a projection of CLIP's global features, whose layout is not published).

    Args:
        pool: "class" takes the first position, "mean" the mean over all.
    """

    def __init__(self, width_in: int, width_out: int, hidden: int, pool: str = "class"):
        super().__init__(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))
        if pool not in ("class", "mean"):
            raise ValueError(f"PooledProjector: unknown pool {pool!r}, expected 'class' or 'mean'")
        self.pool = pool

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states[:, :1] if self.pool == "class" else states.mean(1, keepdim=True))


class TokenProjector(nn.Module):
    """``tokens`` vectors a picture from its pooled state by one affine map: ``[M, N, width_in] -> [M, tokens, width_out]``.

    Source: Frozen (arXiv:2106.13884, section 3.1) and FROMAGe (arXiv:2301.13823, section 3.1). Keys: ``linear``.

    Args:
        init: deviation of the first weights, with a bias of 0; 0 leaves torch's own.
    """

    def __init__(self, width_in: int, width_out: int, tokens: int, pool: str = "mean", init: float = 0.0):
        super().__init__()
        if pool not in ("class", "mean"):
            raise ValueError(f"TokenProjector: unknown pool {pool!r}, expected 'class' or 'mean'")
        self.tokens, self.pool = tokens, pool
        self.linear = nn.Linear(width_in, tokens * width_out)
        if init:
            nn.init.normal_(self.linear.weight, std=init)
            nn.init.zeros_(self.linear.bias)

    def pooled(self, states: Tensor) -> Tensor:
        """``[M, N, width_in] -> [M, width_in]``."""
        return states[:, 0] if self.pool == "class" else states.mean(1)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(self.pooled(states)).unflatten(-1, (self.tokens, -1))


class ResampledProjector(nn.Module):
    """A picture's states as the resampler's latents, ``[M, N, D] -> [M, L, D]``, or a video's, ``[M, F, N, D]``; with ``width_out`` one affine
    map behind it takes them to that width, where they are to enter a language model's sequence.

    Keys: ``resampler`` (see ``mmfast.nn.PerceiverResampler``, whose options these are), ``project``.
    """

    def __init__(self, width_in: int, width_out: int | None = None, **options):
        super().__init__()
        self.resampler = PerceiverResampler(dim=width_in, **options)
        self.project = None if width_out is None else nn.Linear(width_in, width_out)

    def forward(self, states: Tensor) -> Tensor:
        frames = states[:, None] if states.dim() == 3 else states
        latents = self.resampler(frames[:, None])[:, 0]
        return latents if self.project is None else self.project(latents)
