"""The resampler and the gated block against the formulas written out: concatenation, masks, softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from check_op import check_gradients
from torch import Tensor

from mmfast.nn import GatedCrossAttention, PerceiverResampler


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Softmax attention, one head and one row after the other; seen ``[B, rows, keys]``. Rows that see nothing give 0."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = qh @ kh.transpose(-1, -2) / math.sqrt(qh.shape[-1])
        if seen is None:
            out.append(scores.softmax(-1) @ vh)
        else:
            weights = torch.where(seen, scores.exp(), 0.0)
            total = weights.sum(-1, keepdim=True)
            out.append(weights / torch.where(total > 0, total, 1.0) @ vh)
    return torch.cat(out, -1)


def norm(x: Tensor, weights: dict, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def feed_forward(x: Tensor, weights: dict, name: str) -> Tensor:
    inner = norm(x, weights, f"{name}.0") @ weights[f"{name}.1.weight"].T
    return (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ weights[f"{name}.3.weight"].T


def resample(x: Tensor, weights: dict, depth: int, heads: int) -> Tensor:
    batch, media, frames, tokens, dim = x.shape
    out = []
    for b in range(batch):
        for t in range(media):
            keys = x[b, t]
            if "frame_embs" in weights:
                keys = keys + weights["frame_embs"][:frames].reshape(frames, 1, dim)
            keys = keys.reshape(frames * tokens, dim)
            if "media_time_embs" in weights:
                keys = keys + weights["media_time_embs"][t]
            z = weights["latents"]
            for i in range(depth):
                name = f"layers.{i}.0"
                zn = norm(z, weights, f"{name}.norm_latents")
                both = torch.cat([norm(keys, weights, f"{name}.norm_media"), zn])
                k, v = (both @ weights[f"{name}.to_kv.weight"].T).chunk(2, -1)
                z = z + attend(zn @ weights[f"{name}.to_q.weight"].T, k, v, heads) @ weights[f"{name}.to_out.weight"].T
                z = z + feed_forward(z, weights, f"layers.{i}.1")
            out.append(norm(z, weights, "norm"))
    return torch.stack(out).reshape(batch, media, -1, dim)


def gated(x: Tensor, media: Tensor, seen: Tensor | None, weights: dict, heads: int) -> Tensor:
    q = norm(x, weights, "attn.norm") @ weights["attn.to_q.weight"].T
    k, v = (media.reshape(len(media), -1, media.shape[-1]) @ weights["attn.to_kv.weight"].T).chunk(2, -1)
    y = x + weights["attn_gate"].tanh() * (attend(q, k, v, heads, seen) @ weights["attn.to_out.weight"].T)
    return y + weights["ff_gate"].tanh() * feed_forward(y, weights, "ff")


def redraw(module):
    """Norms and gates too, so that none of them hides behind 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.7 if p.dim() == 1 else p.shape[-1] ** -0.5 * 1.5))
    return module


def compare(module, reference, inputs: list[Tensor]):
    """Values and all gradients, of inputs and of weights, against the reference in float64."""
    names = [name for name, _ in module.named_parameters()]
    weights = [p.detach() for _, p in module.named_parameters()]

    def run(*tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors[len(inputs) :], strict=True)), tensors[: len(inputs)])

    def ref(*tensors):
        return reference(*tensors[: len(inputs)], dict(zip(names, tensors[len(inputs) :], strict=True)))

    got, want = run(*inputs, *weights), ref(*(t.double() for t in (*inputs, *weights)))
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    check_gradients(run, ref, [*inputs, *weights], floor=3e-5)


@pytest.mark.parametrize("tables", [{}, {"max_num_frames": 5}, {"max_num_media": 4}, {"max_num_frames": 5, "max_num_media": 2}], ids=str)
def test_resampler_against_the_formula(tables):
    module = redraw(PerceiverResampler(dim=24, depth=2, dim_head=8, heads=2, num_latents=5, **tables))
    expected = {"latents", "norm.weight", "norm.bias"}
    for i in range(2):
        expected |= {f"layers.{i}.0.{n}.{w}" for n in ("norm_media", "norm_latents") for w in ("weight", "bias")}
        expected |= {f"layers.{i}.0.{n}.weight" for n in ("to_q", "to_kv", "to_out")}
        expected |= {f"layers.{i}.1.0.weight", f"layers.{i}.1.0.bias", f"layers.{i}.1.1.weight", f"layers.{i}.1.3.weight"}
    expected |= {{"max_num_frames": "frame_embs", "max_num_media": "media_time_embs"}[t] for t in tables}
    assert set(module.state_dict()) == expected
    compare(module, lambda x, w: resample(x, w, depth=2, heads=2), [torch.randn(2, 2, 3, 7, 24)])


def test_resampler_of_open_flamingo_has_its_size():
    with torch.device("meta"):
        module = PerceiverResampler(dim=1024)
        flamingo = PerceiverResampler(dim=1536, depth=6, dim_head=96, heads=16)
    assert sum(p.numel() for p in module.parameters()) == 63_019_008
    assert sum(p.numel() for p in flamingo.parameters()) == 170_025_984  # its paper says 194 M, with which its own sizes do not agree
    tables = PerceiverResampler(dim=16, depth=1, num_latents=2, max_num_media=3, max_num_frames=4)
    assert tables.frame_embs.shape == (4, 16)
    assert tables.media_time_embs.shape == (3, 1, 16)


def test_resampler_gives_the_latents_of_any_length_and_reads_media_apart():
    module = redraw(PerceiverResampler(dim=16, depth=1, dim_head=8, heads=2, num_latents=3))
    assert all(module(torch.randn(1, 2, frames, 5, 16)).shape == (1, 2, 3, 16) for frames in (1, 2, 9))
    x = torch.randn(2, 3, 1, 5, 16)
    changed = x.clone()
    changed[0, 1] = torch.randn(1, 5, 16)
    moved = (module(x) - module(changed)).abs().amax((-1, -2))
    assert (moved > 1e-3).tolist() == [[False, True, False], [False, False, False]]
    # Without frame embeddings a frame's place does not matter, with them it does.
    video = torch.randn(1, 1, 2, 5, 16)
    torch.testing.assert_close(module(video), module(video.flip(2)), atol=1e-5, rtol=0)
    placed = redraw(PerceiverResampler(dim=16, depth=1, dim_head=8, heads=2, num_latents=3, max_num_frames=2))
    assert (placed(video) - placed(video.flip(2))).abs().max() > 1e-3


def test_resampler_refuses_what_does_not_fit():
    module = PerceiverResampler(dim=16, depth=1, num_latents=2, max_num_media=2, max_num_frames=3)
    with pytest.raises(ValueError, match=r"expected x \[B, T, F, N, D=16\], got \[2, 5, 16\]"):
        module(torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match="holds 4 frames, there are embeddings for 3"):
        module(torch.randn(1, 1, 4, 5, 16))
    with pytest.raises(ValueError, match="holds 3 media, there are embeddings for 2"):
        module(torch.randn(1, 3, 1, 5, 16))


LOCATIONS = torch.tensor([[0, 1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()


def block(**options):
    return redraw(GatedCrossAttention(dim=20, dim_visual=12, dim_head=8, heads=2, **options))


@pytest.mark.parametrize("immediate", [True, False])
def test_gated_against_the_formula(immediate):
    module = block(only_attend_immediate_media=immediate)
    assert set(module.state_dict()) == {
        "attn.norm.weight", "attn.norm.bias", "attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight", "attn_gate",
        "ff.0.weight", "ff.0.bias", "ff.1.weight", "ff.3.weight", "ff_gate",
    }  # fmt: skip
    assert module.attn_gate.shape == module.ff_gate.shape == (1,)
    x, media = torch.randn(3, 7, 20), torch.randn(3, 3, 4, 12)
    time = LOCATIONS.long().cumsum(-1)[..., None]
    image = torch.arange(12) // 4 + 1
    seen = time == image if immediate else time >= image
    compare(_With(module, LOCATIONS), lambda x, m, w: gated(x, m, seen, _inner(w), 2), [x, media])
    compare(_With(module, None), lambda x, m, w: gated(x, m, None, _inner(w), 2), [x, media])


class _With(torch.nn.Module):
    def __init__(self, module, locations):
        super().__init__()
        self.module, self.locations = module, locations

    def forward(self, x, media):
        return self.module(x, media, self.locations)


def _inner(weights: dict) -> dict:
    return {name.removeprefix("module."): w for name, w in weights.items()}


def test_gated_starts_as_the_identity_and_learns_the_gates_first():
    module = GatedCrossAttention(dim=20, dim_visual=12)
    x, media = torch.randn(3, 7, 20), torch.randn(3, 3, 4, 12)
    out = module(x, media, LOCATIONS)
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    moved = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"attn_gate", "ff_gate"}


@pytest.mark.parametrize("immediate", [True, False])
def test_text_before_the_first_image_reads_nothing(immediate):
    module = block(only_attend_immediate_media=immediate)
    x, media = torch.randn(3, 7, 20), torch.randn(3, 3, 4, 12, requires_grad=True)
    out = module.attn(x, media, LOCATIONS.long().cumsum(-1))
    assert (out[0, 0] == 0).all()
    assert (out[2] == 0).all()
    assert (out[0, 1:] != 0).any(-1).all(), "the image's own token reads it already"
    (grad,) = torch.autograd.grad(out[2].sum() + out[0, 0].sum(), media)
    assert (grad == 0).all()
    # It still passes the gated feed-forward.
    assert (module(x, media, LOCATIONS)[2] != x[2]).any()


def test_only_the_images_so_far_matter():
    for immediate, rows in ((True, [2, 3]), (False, [2, 3, 4, 5, 6])):
        module = block(only_attend_immediate_media=immediate)
        x, media = torch.randn(1, 7, 20), torch.randn(1, 3, 4, 12)
        where = LOCATIONS[1:2]  # images at 0, 2, 4
        changed = media.clone()
        changed[:, 1] += 1
        moved = ((module(x, media, where) - module(x, changed, where)).abs().amax(-1) > 1e-4)[0].nonzero().flatten().tolist()
        assert moved == rows


def test_cached_media():
    """What follows a cached prompt sees what the prompt's last token saw."""
    module = block()
    prompt, rest, media = torch.randn(3, 7, 20), torch.randn(3, 2, 20), torch.randn(3, 3, 4, 12)
    whole = module(torch.cat([prompt, rest], 1), media, torch.cat([LOCATIONS, torch.zeros(3, 2, dtype=torch.bool)], 1))
    torch.testing.assert_close(module(rest, media, LOCATIONS, use_cached_media=True), whole[:, 7:], atol=1e-6, rtol=0)
    assert (module(rest, media, LOCATIONS, use_cached_media=True) - module(rest, media)).abs().max() > 1e-3


def test_gated_block_of_open_flamingo_has_its_size():
    for dim, size in ((2048, 36_708_354), (2560, 56_109_058), (4096, 139_476_994)):
        with torch.device("meta"):
            module = GatedCrossAttention(dim=dim, dim_visual=1024)
        assert sum(p.numel() for p in module.parameters()) == size


def test_gated_refuses_what_does_not_fit():
    module = block()
    x = torch.randn(3, 7, 20)
    with pytest.raises(ValueError, match=r"expected media \[B=3, T, L, E\], got \[3, 4, 12\]"):
        module(x, torch.randn(3, 4, 12))
    with pytest.raises(ValueError, match=r"expected media_locations \[3, 7\], got \[3, 5\]"):
        module(x, torch.randn(3, 3, 4, 12), LOCATIONS[:, :5])
    with pytest.raises(RuntimeError, match="text_time holds 3 at position"):
        module(x, torch.randn(3, 2, 4, 12), LOCATIONS)
