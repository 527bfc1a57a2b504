"""A residual network without normalisation layers. Letters: M images, C channels, H W pixels, N positions of the last grid, D width."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A rectified standard normal has the variance (1 - 1/pi) / 2; the activation undoes that.
GAMMA = sqrt(2 / (1 - 1 / pi))


class StandardisedConv(nn.Conv2d):
    """A convolution with scaled weight standardisation (arXiv:2101.08692, section 4.1): every filter is read as
    ``gain (W - mean) / sqrt(fan_in var)``, so that uncorrelated inputs of mean 0 and variance 1 give outputs of mean 0 and variance gain^2,
    whatever the weights. Filters of hardly any variance are not blown up (``eps``, of the released code)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, *, eps: float = 1e-4):
        super().__init__(channels_in, channels_out, kernel, stride, kernel // 2)
        self.gain, self.eps = nn.Parameter(torch.ones(channels_out)), eps
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        scale = self.gain.view(-1, 1, 1, 1) * (variance * self.weight[0].numel()).clamp_min(self.eps).rsqrt()
        return self._conv_forward(x, (self.weight - mean) * scale, self.bias)


def activation(x: Tensor) -> Tensor:
    """ReLU that keeps a standard normal's variance."""
    return F.relu(x) * GAMMA


class Block(nn.Module):
    """A bottleneck, activated first: ``x + alpha skip_gain f(x / beta)``, x [M, C, H, W].

    ``beta``: the deviation that x is expected to have. Where width or size change, a convolution of the scaled, activated input takes the
    place of x, and the expected variance starts anew at 1. ``skip_gain`` starts at 0 (SkipInit, arXiv:2002.10444), so that every block begins
    as its shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, *, beta: float, alpha: float):
        super().__init__()
        inner = channels_out // 4
        self.beta, self.alpha = beta, alpha
        self.conv0 = StandardisedConv(channels_in, inner, 1)
        self.conv1 = StandardisedConv(inner, inner, 3, stride)
        self.conv2 = StandardisedConv(inner, channels_out, 1)
        changes = stride > 1 or channels_in != channels_out
        self.shortcut = StandardisedConv(channels_in, channels_out, 1, stride) if changes else None
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = activation(x) / self.beta
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(activation(self.conv1(activation(self.conv0(out)))))
        return shortcut + self.alpha * self.skip_gain * out


class NFResNet(nn.Module):
    """NF-ResNet (Brock, De, Smith: Characterizing signal propagation to close the performance gap in unnormalized ResNets, arXiv:2101.08692):
    pixels ``[M, 3, S, S]`` -> the activated last grid, row after row, ``[M, N, width]``. No statistics of a batch: what a picture becomes
    does not depend on what it is shown with.

    Args:
        stem: channels after the first convolution.
        blocks: bottlenecks of each stage; the first of each stage but the first halves the grid. (3, 4, 6, 3) is NF-ResNet-50.
        width: channels of the last stage, half as many in each before.
        alpha: share of a residual branch.

    The released code (deepmind-research/nfnets) pads as its framework does, more on the right than on the left; here convolutions pad evenly.
    Stochastic depth, which belongs to its training on ImageNet, is left out.
    """

    def __init__(self, *, stem: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 2048, alpha: float = 0.2):
        super().__init__()
        if not blocks or min(blocks) < 1 or width % (4 << (len(blocks) - 1)):
            raise ValueError(
                f"NFResNet: expected blocks in every stage and a width that is a multiple of {4 << max(len(blocks) - 1, 0)}, got blocks "
                f"{tuple(blocks)} and width {width}"
            )
        self.width, self.gradient_checkpointing = width, False
        self.stem, self.pool = StandardisedConv(3, stem, 7, 2), nn.MaxPool2d(3, 2, 1)
        self.blocks, channels, variance = nn.ModuleList(), stem, 1.0
        for stage, count in enumerate(blocks):
            out = width >> (len(blocks) - 1 - stage)
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.blocks.append(Block(channels, out, stride, beta=variance**0.5, alpha=alpha))
                channels, variance = out, (1.0 if i == 0 else variance) + alpha**2

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pool(self.stem(pixels))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing and self.training else block(x)
        return activation(x).flatten(2).transpose(1, 2)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each block in backward; the name is that of transformers' models."""
        self.gradient_checkpointing = True
