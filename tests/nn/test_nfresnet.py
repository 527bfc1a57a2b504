"""NF-ResNet: its published size, its signal, and that pictures of a batch do not know of each other."""

import math

import pytest
import torch
from torch import nn

from mmfast.nn import NFResNet
from mmfast.nn.nfresnet import GAMMA, StandardisedConv, activation

SMALL = dict(stem=8, blocks=(1, 2, 1), width=64)


def test_resnet_50_without_its_norms():
    """Every convolution has a gain and a bias as batch norm had; each of 16 blocks has a gain besides."""
    from transformers import ResNetConfig, ResNetModel

    with torch.device("meta"):
        ours, theirs = NFResNet(), ResNetModel(ResNetConfig())
    assert sum(p.numel() for p in theirs.parameters()) == 23_508_032
    assert sum(p.numel() for p in ours.parameters()) == 23_508_032 + 16
    assert not list(ours.buffers())
    assert [type(m).__name__ for m in ours.modules() if "Norm" in type(m).__name__] == []
    with torch.device("meta"):
        assert ours(torch.empty(2, 3, 224, 224)).shape == (2, 49, 2048)


def test_filters_are_standardised():
    """Against a plain convolution with weights made by the paper's formula."""
    torch.manual_seed(0)
    conv = StandardisedConv(5, 7, 3, 2).double()
    nn.init.normal_(conv.weight, mean=0.3, std=2.0)
    nn.init.normal_(conv.gain)
    nn.init.normal_(conv.bias)
    w = conv.weight.detach().flatten(1)
    want = conv.gain[:, None] * (w - w.mean(1, keepdim=True)) / (w.std(1, correction=0, keepdim=True) * math.sqrt(5 * 3 * 3))
    x = torch.randn(2, 5, 9, 9, dtype=torch.double)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, want.view_as(conv.weight), conv.bias, 2, 1))
    nn.init.constant_(conv.weight, 0.5)  # no variance at all: eps, not a division by 0
    assert conv(x).isfinite().all()


def test_the_activation_keeps_variance():
    assert pytest.approx(1.7129, abs=1e-4) == GAMMA
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert activation(x).var().item() == pytest.approx(1, abs=0.01)


def test_variance_grows_by_alpha_squared_a_block_and_starts_anew_where_the_grid_halves():
    torch.manual_seed(0)
    net = NFResNet(stem=64, blocks=(3, 3), width=512)
    for block in net.blocks:
        nn.init.ones_(block.skip_gain)
    assert [block.beta**2 for block in net.blocks] == pytest.approx([1, 1.04, 1.08, 1.12, 1.04, 1.08])
    x, seen = torch.randn(8, 64, 32, 32), []
    for block in net.blocks:
        x = block(x)
        seen.append(x.var((0, 2, 3)).mean().item())
    # Padding takes a little away, on top of what is left to chance.
    assert seen == pytest.approx([1.04, 1.08, 1.12, 1.04, 1.08, 1.12], rel=0.06)
    plain = NFResNet(stem=64, blocks=(3, 3), width=512)  # skip_gain 0: shortcuts alone
    x = torch.randn(2, 64, 16, 16)
    assert torch.equal(plain.blocks[1](x.repeat(1, 4, 1, 1)), x.repeat(1, 4, 1, 1))


def test_a_picture_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    net = NFResNet(**SMALL).double().train()
    for block in net.blocks:
        nn.init.ones_(block.skip_gain)
    x = torch.randn(5, 3, 32, 32, dtype=torch.double)
    together, alone = net(x), torch.cat([net(p[None]) for p in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert together.shape == (5, 4, 64)


def test_recomputed_activations_change_nothing():
    torch.manual_seed(0)
    net = NFResNet(**SMALL).train()
    for block in net.blocks:
        nn.init.ones_(block.skip_gain)
    x, grads = torch.randn(2, 3, 32, 32), []
    for again in (False, True):
        net.gradient_checkpointing = again
        net.zero_grad()
        net(x).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_widths_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"a width that is a multiple of 16, got blocks \(1, 1, 1\) and width 40"):
        NFResNet(blocks=(1, 1, 1), width=40)
