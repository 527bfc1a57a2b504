"""Affine connectors between an encoder's width and a language model's."""

from torch import nn


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
