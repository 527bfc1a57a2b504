"""The image tokenizer against transformers' ChameleonVQVAE, published counts of parameters, and its own promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmfast.nn import VQGAN, PatchCritic, VectorQuantize, VectorQuantizer2
from mmfast.nn.vqgan import AttnBlock, Decoder, published_state

CASES = [
    dict(),
    dict(channel_multiplier=[1, 2, 2], num_res_blocks=2),
    dict(attn_resolutions=[16], channel_multiplier=[1, 1], num_res_blocks=2, latent_channels=12, embed_dim=6),
]


def stock(seed, **options):
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    sizes = dict(
        embed_dim=8, num_embeddings=24, latent_channels=8, resolution=32, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1
    )
    torch.manual_seed(seed)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**{**sizes, **options})).eval()
    for parameter in model.parameters():  # norms and biases start as 1 and 0, which hides them
        nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():  # codes among what is encoded, or one of them would take all
        z = model.quant_conv(model.encoder(torch.rand(8, 3, 32, 32) * 2 - 1)).movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(z.mean(0) + z.std(0) * torch.randn_like(model.quantize.embedding.weight))
    return model


def like(theirs, **options):
    c = theirs.config
    return VQGAN(
        size=c.resolution, channels=c.base_channels, multipliers=c.channel_multiplier, blocks=c.num_res_blocks,
        attention=c.attn_resolutions or (), latent=c.latent_channels, quantize=VectorQuantizer2(c.num_embeddings, c.embed_dim), **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_same_codes_and_states_as_transformers(options, seed):
    theirs = stock(seed, **options)
    ours = like(theirs, decoder=False)
    ours.load_state_dict(theirs.state_dict())  # every key of theirs, and none beside them
    for size in (32, 64):  # also pictures of another size than the declared
        pixels = torch.rand(3, 3, size, size) * 2 - 1
        with torch.no_grad():
            want = theirs.encode(pixels)
            assert (ours.encoder(pixels) - want.last_hidden_state).abs().max() < 1e-5
            codes, ids, loss = ours.nearest(ours.encode(pixels))
        assert torch.equal(ids.flatten(), want.image_tokens)
        assert len(ids.unique()) > 3  # or equality says little
        assert torch.equal(ours.tokenise(pixels), want.image_tokens.view(3, -1))
        torch.testing.assert_close(codes, want.quantized_last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(loss, want.embedding_loss, atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_transformers():
    """The codebook's loss and the way straight through; their beta stands on the codebook's side, our legacy default."""
    theirs = stock(2).double()  # the gradient of a bias before a norm is 0, and float32 leaves noise there
    ours = like(theirs, decoder=False).double()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    want = theirs.encode(pixels)
    codes, _, loss = ours.nearest(ours.encode(pixels))
    weight = torch.randn_like(codes)
    (2 * loss + (codes * weight).sum()).backward()
    (2 * want.embedding_loss + (want.quantized_last_hidden_state * weight).sum()).backward()
    got = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name].grad, p.grad, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_whole_chameleon_of_transformers_and_published_file():
    theirs = stock(0)
    ours = like(theirs)
    inside = {f"model.vqmodel.{k}": v for k, v in theirs.state_dict().items()} | {"lm_head.weight": torch.zeros(2)}
    missing, unexpected = ours.load_state_dict(published_state(inside), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"decoder"}
    file = {
        "state_dict": {**ours.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(1), "loss.perceptual_loss.lin0": torch.zeros(1)}
    }
    like(theirs).load_state_dict(published_state(file))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_counts():
    with torch.device("meta"):
        chameleon = VQGAN()
        f16 = {k: VQGAN(size=256, attention=(16,), quantize=VectorQuantizer2(k, 256)) for k in (1024, 16384)}
        assert count(VQGAN(decoder=False)) == 29_423_616
    assert count(chameleon.encoder) == 27_194_880
    assert count(chameleon.decoder) == 39_294_851
    assert count(chameleon.quantize) == 2_097_152
    assert count(chameleon.quant_conv) + count(chameleon.post_quant_conv) == 131_584
    assert count(chameleon) == 68_718_467
    assert {k: count(m) for k, m in f16.items()} == {1024: 72_141_699, 16384: 76_073_859}
    assert chameleon.patch == 16


def test_published_keys():
    with torch.device("meta"):
        keys = set(VQGAN(size=256, attention=(16,)).state_dict())
    for key in (
        "encoder.conv_in.weight", "encoder.down.2.block.0.nin_shortcut.weight", "encoder.down.4.attn.1.proj_out.bias",
        "encoder.down.3.downsample.conv.weight", "encoder.mid.attn_1.norm.weight", "encoder.norm_out.bias", "encoder.conv_out.weight",
        "quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias", "decoder.conv_in.weight", "decoder.mid.block_2.conv2.bias",
        "decoder.up.4.block.2.norm1.weight", "decoder.up.4.attn.2.q.weight", "decoder.up.1.upsample.conv.weight",
        "decoder.up.3.block.0.nin_shortcut.weight", "decoder.up.1.block.0.nin_shortcut.weight", "decoder.norm_out.weight", "decoder.conv_out.bias",
    ):  # fmt: skip
        assert key in keys, key
    # Level 0 is the full resolution: it has no upsampling, and the level that does not change its channels no shortcut.
    assert not [
        k for k in keys if k.startswith(("decoder.up.0.upsample", "encoder.down.4.downsample", "decoder.up.4.block.0.nin_shortcut"))
    ]


def small(**options):
    quantize = options.pop("quantize", None) or VectorQuantizer2(10, 6)
    return VQGAN(size=16, channels=8, multipliers=(1, 2), blocks=1, latent=4, groups=4, quantize=quantize, **options).eval()


def plain_decoder(decoder: Decoder, z, levels, blocks, groups):
    """The decoder from its weights by name, in the plainest functions: the independent reading of the published layout."""
    w = dict(decoder.named_parameters())

    def conv(name, x):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def act(name, x):
        y = F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
        return y * torch.sigmoid(y)

    def res(name, x):
        y = conv(f"{name}.conv2", act(f"{name}.norm2", conv(f"{name}.conv1", act(f"{name}.norm1", x))))
        return y + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attn(name, x):
        y = F.group_norm(x, groups, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], 1e-6)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        p = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, -1)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", p, v).view(x.shape))

    x = res("mid.block_2", attn("mid.attn_1", res("mid.block_1", conv("conv_in", z))))
    for level in range(levels - 1, -1, -1):
        for block in range(blocks + 1):
            x = res(f"up.{level}.block.{block}", x)
        if level:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(f"up.{level}.upsample.conv", x)
    return conv("conv_out", act("norm_out", x))


def test_decoder_is_the_published_layout():
    model = small()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model.decoder(z), plain_decoder(model.decoder, z, levels=2, blocks=1, groups=4), atol=1e-4, rtol=1e-4)


def test_attention_passes_gradcheck():
    block = AttnBlock(4, groups=2).double()
    assert torch.autograd.gradcheck(block, torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True))


def test_tokenise_then_draw_is_the_way_through():
    model = small()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = model.tokenise(pixels)
    assert ids.shape == (2, 64)
    drawn, indices, _ = model(pixels)
    assert torch.equal(ids, indices.flatten(1))
    torch.testing.assert_close(model.draw(ids), drawn.clamp(-1, 1), atol=1e-6, rtol=0)
    model.decoder.conv_out.bias.data += 3  # what lies outside is cut
    assert model.draw(ids).max() == 1


@pytest.mark.parametrize("train", [False, True])
def test_tokenise_leaves_a_moving_codebook_alone(train):
    model = small(quantize=VectorQuantize(6, 10, accept_image_fmap=True, threshold_ema_dead_code=2)).train(train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = model.tokenise(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.isfinite(model.draw(ids)).all()
    model(torch.rand(2, 3, 16, 16))
    assert torch.equal(model.quantize.codebook, before["quantize._codebook.embed"][0]) != train


@pytest.mark.parametrize("ema", [False, True])
def test_codes_are_the_same_under_autocast(ema):
    """A picture has one row of codes, wherever it is read; also while the tokenizer learns. What is drawn of them follows autocast."""
    torch.manual_seed(0)
    vq = small(quantize=VectorQuantize(8, 64, accept_image_fmap=True) if ema else VectorQuantizer2(64, 8)).eval()
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        vq.codebook.copy_(vq.encode(pixels).flatten(2).transpose(1, 2).flatten(0, 1)[torch.randperm(4 * 16 * 16)[:64]])
    want = vq.tokenise(pixels)
    assert len(want.unique()) > 32
    with torch.autocast("cpu", torch.bfloat16):
        drawn, ids, loss = vq(pixels)
        torch.testing.assert_close(vq.tokenise(pixels), want, rtol=0, atol=0)
    torch.testing.assert_close(ids.flatten(1), want, rtol=0, atol=0)
    assert (drawn.dtype, loss.dtype) == (torch.bfloat16, torch.float32)


def test_a_picture_cut_short_is_filled_with_its_first_code():
    model = small()
    ids = torch.tensor([[7, 1, 2]])
    assert torch.equal(model.draw(ids, grid=(2, 3)), model.draw(torch.tensor([[7, 1, 2, 7, 7, 7]]), grid=(2, 3)))
    assert model.draw(ids, grid=(2, 3)).shape == (1, 3, 4, 6)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_gradient_goes_past_the_codes(gradient):
    """Straight through it is the output's own; by rotation it keeps the code's length over the row's."""
    z, e = torch.randn(1, 6, 2, 2, requires_grad=True), VectorQuantizer2(10, 6, gradient=gradient)
    e.embedding.weight.data.normal_()
    codes, _, (_, _, indices) = e(z)
    weight = torch.randn_like(codes)
    grad = torch.autograd.grad((codes * weight).sum(), z)[0]
    rows, code = z.movedim(1, -1).reshape(-1, 6), e.embedding.weight[indices]
    got, given = grad.movedim(1, -1).reshape(-1, 6), weight.movedim(1, -1).reshape(-1, 6)
    if gradient == "ste":
        assert torch.equal(grad, weight)
    else:
        torch.testing.assert_close(got.norm(dim=1), given.norm(dim=1) * (code.norm(dim=1) / rows.norm(dim=1)))
        assert not torch.allclose(got, given)


def test_errors_name_what_is_wrong():
    model = small()
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 3, 15, 16\]"):
        model.encode(torch.zeros(1, 3, 15, 16))
    for ids in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(9, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="square grid"):
            model.draw(ids)
    with pytest.raises(ValueError, match=r"code numbers 0 \.\. 9, got 0 \.\. 10"):
        model.draw(torch.tensor([[0, 10, 1, 2]]))
    with pytest.raises(ValueError, match="no decoder"):
        small(decoder=False).draw(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of 3"):
        VQGAN(channels=8, groups=3)
    with pytest.raises(ValueError, match="accept_image_fmap=True"):
        small(quantize=VectorQuantize(6, 10))


def test_critic_is_the_published_one():
    """Keys, counts and sizes: 256 pixels are judged in 30 x 30 patches, each seeing 70."""
    critic = PatchCritic()
    assert sorted({int(k.split(".")[1]) for k in critic.state_dict()}) == [0, 2, 3, 5, 6, 8, 9, 11]
    convolutions = 3 * 64 * 16 + 64 + 16 * (64 * 128 + 128 * 256 + 256 * 512) + 512 * 16 + 1
    assert count(critic) == convolutions + 2 * (128 + 256 + 512) == 2_765_633
    assert critic(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    seen = torch.autograd.grad(critic.eval()(pixels)[0, 0, 15, 15], pixels)[0][0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]
    assert critic.main[2].bias is None
    assert critic.main[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_plain_start_leaves_in_the_grid_what_its_places_hold():
    """How much of each 16 x 16 place of the shapes world's pictures the best affine map can tell from what the codebook is asked for, before any
    training: next to nothing with PyTorch's start, much with ours, which changes no shape and no name."""
    from mmfast.data.synthetic import World
    from mmfast.nn.vqgan import start_plain

    world = World()
    pixels = torch.from_numpy(world.render(world.scenes("train", 200))).permute(0, 3, 1, 2).float() / 127.5 - 1
    places = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(200 * 16, -1)

    def told(vq):
        with torch.no_grad():
            z = vq.eval().encode(pixels).movedim(1, -1).reshape(len(places), -1)
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        missed = (z @ torch.linalg.lstsq(z, places).solution - places).square().mean()
        return 1 - float(missed / (places - places.mean(0)).square().mean())

    before, after = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        vq = VQGAN(size=64, channels=8, multipliers=(1, 1, 2, 4, 4), blocks=1, latent=32, groups=4, quantize=VectorQuantizer2(8, 16))
        names = {name: p.shape for name, p in vq.named_parameters()}
        before.append(told(vq))
        after.append(told(start_plain(vq)))
        assert names == {name: p.shape for name, p in vq.named_parameters()}
    assert max(before) < 0.1
    assert sum(after) / 5 > 0.35
    assert min(after) > 2 * max(before)
