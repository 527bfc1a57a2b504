"""Idefics' block and resampler against transformers' modules: values and all gradients, with gates and norms that are neither 0 nor 1."""

import pytest
import torch
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig, IdeficsVisionConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmfast.models.published.idefics import resampler_names
from mmfast.nn import IdeficsGatedBlock, PerceiverResampler
from mmfast.nn.idefics import media_attention, media_times


def redraw(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.7 if p.dim() == 1 else p.shape[-1] ** -0.5 * 1.5))
    return module


def config(**kwargs) -> IdeficsConfig:
    return IdeficsConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, rms_norm_eps=1e-6, alpha_initializer="ones",
        vision_config=IdeficsVisionConfig(embed_dim=24, num_attention_heads=2),
        perceiver_config=IdeficsPerceiverConfig(qk_layer_norms_perceiver=kwargs.pop("perceiver_norms", False)), **kwargs,
    )  # fmt: skip


def additive(mask: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """The two forms in which the stock layer takes ``[B, S, T]``."""
    wide = mask.repeat_interleave(latents, -1)[:, None].bool()
    return torch.where(wide, 0.0, torch.finfo(torch.float32).min), mask.bool().any(-1).float()


MASKS = {
    "latest": torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 2]])[..., None] == torch.arange(1, 4),
    "all so far": torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 2]])[..., None] >= torch.arange(1, 4),
    "any": torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 1]], [[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]]),
    "everything": torch.ones(2, 5, 3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gates", ["scalar", "vector"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_is_the_stock_layer(mask, gates, qk_norm):
    stock = redraw(IdeficsGatedCrossAttentionLayer(config(alpha_type={"scalar": "float"}.get(gates, gates), qk_layer_norms=qk_norm)))
    block = IdeficsGatedBlock(dim=32, dim_visual=24, heads=4, inner=48, qk_norm=qk_norm, gates=gates)
    block.load_state_dict(stock.state_dict(), strict=True, assign=True)
    block.requires_grad_(True)
    x, media = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 3, 6, 24, requires_grad=True)
    wide, gate = additive(mask, 6)
    weights = dict(stock.named_parameters())
    ours = dict(block.named_parameters())
    assert weights.keys() == ours.keys()
    a = block(x, media, media_times(mask))
    b = stock(x, None, media.flatten(1, 2), image_attention_mask=wide, cross_attention_gate=gate)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    cotangent = torch.randn_like(b) * 0.1
    got, want = (torch.autograd.grad((out * cotangent).sum(), [x, media, *(w[n] for n in weights)]) for out, w in ((a, ours), (b, weights)))
    for name, g, w in zip(["x", "media", *weights], got, want, strict=True):
        assert w.abs().max() > 1e-4, f"{name}: a gradient of nothing proves nothing"
        torch.testing.assert_close(g, w, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler_is_the_stock_one(qk_norm):
    stock = redraw(IdeficsPerceiverResampler(config(perceiver_norms=qk_norm), embed_dim=24, depth=2, n_heads=2, head_dim=8, n_latents=5))
    ours = PerceiverResampler(dim=24, depth=2, dim_head=8, heads=2, num_latents=5, activation="relu", qk_norm=qk_norm)
    ours.load_state_dict(resampler_names(stock.state_dict()), strict=True)
    x = torch.randn(3, 7, 24, requires_grad=True)
    a, b = ours(x[:, None, None])[:, 0], stock(x)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    cotangent = torch.randn_like(b) * 0.1
    (a * cotangent).sum().backward()
    grad, x.grad = x.grad, None
    (b * cotangent).sum().backward()
    torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=0)
    want = resampler_names({name: p.grad for name, p in stock.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_row_without_an_image_passes_the_gated_network_alone():
    block = redraw(IdeficsGatedBlock(dim=32, dim_visual=24, heads=4, inner=48))
    x, media = torch.randn(1, 4, 32), torch.randn(1, 2, 6, 24, requires_grad=True)
    for times in ([], [torch.zeros(1, 4, dtype=torch.long)]):
        out = block(x, media, times)
        want = x + block.mlp(block.post_attention_layernorm(x)) * block.alpha_dense.tanh()
        torch.testing.assert_close(out, want)
        assert not torch.autograd.grad(out.sum(), media)[0].any()


def test_it_starts_as_the_identity():
    block = IdeficsGatedBlock(dim=32, dim_visual=24, heads=4, inner=48)
    x = torch.randn(1, 4, 32)
    assert torch.equal(block(x, torch.randn(1, 2, 6, 24), [torch.ones(1, 4, dtype=torch.long)]), x)


def test_times_of_a_mask():
    """Worked by hand: three rows that see media 1 and 3, none, and 2."""
    times = media_times(torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 1, 0]]]))
    assert [t.tolist() for t in times] == [[[1, 0, 2]], [[3, 0, 0]]]
    assert media_times(torch.zeros(1, 4, 2)) == []
    latest = torch.tensor([[0, 1, 1, 2]])
    assert [t.tolist() for t in media_times(latest[..., None] == torch.arange(1, 3))] == [latest.tolist()]


def test_merged_passes_are_one_softmax():
    mask = torch.rand(2, 9, 4) < 0.5
    mask[0, 0] = False
    q, k, v = torch.randn(2, 9, 2, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    out = media_attention(q, k, v, media_times(mask), 3)
    bias = torch.where(mask.repeat_interleave(3, -1)[:, None], 0.0, -torch.inf)
    want = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias).transpose(1, 2)
    seen = mask.any(-1)
    torch.testing.assert_close(out[seen], want[seen], atol=1e-6, rtol=0)
    assert not out[~seen].any()
