"""The attention ops against float64: types, layouts, awkward sizes, what each rule lets a row see, dropout bit by bit, gradients."""

import subprocess
import sys

import pytest
import torch
from check_op import check_close, check_gradients, check_registration

import mmfast
from mmfast.ops import attention as ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Relative L2 error against float64 on the same inputs: of the output, of gradients; lse absolutely. Twice eager's error is allowed too.
OUT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GRAD = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
LSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
# B, Nq, N, N2, H, G, D: one of everything, one past a tile, shared key heads, every fast head width and odd ones.
SIZES = [
    (1, 1, 1, 0, 1, 1, 1),
    (2, 7, 33, 5, 2, 1, 5),
    (2, 64, 65, 64, 3, 3, 64),
    (1, 13, 300, 0, 4, 2, 32),
    (1, 130, 129, 3, 2, 2, 80),
    (1, 33, 70, 0, 6, 3, 96),
    (1, 66, 257, 0, 2, 2, 128),
    (1, 5, 40, 8, 1, 1, 257),
    (3, 2, 1, 1, 8, 8, 33),
    (1, 2, 2049, 0, 1, 1, 16),
]


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape).to(device, dtype)


def inputs(size, dtype=torch.float32, device="cpu"):
    b, nq, n, n2, h, g, d = size
    shapes = [(b, nq, h, d), (b, n, g, d), (b, n, g, d)] + [(b, n2, g, d)] * (2 if n2 else 0)
    return [random(*s, dtype=dtype, device=device) for s in shapes]


def eager(q, k, v, k2=None, v2=None):
    """What modules do today, in the type of the inputs."""
    if k2 is not None:
        k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.repeat_interleave(r, 2).transpose(1, 2) for t, r in ((q, 1), (k, group), (v, group)))
    return ((q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


def gradients(function, tensors, weight):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad((function(*leaves).double() * weight).sum(), leaves)


# ----------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(device, dtype, size):
    check_values_and_gradients(inputs(size, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 7, 33, 5, 2, 1, 5), (1, 66, 257, 64, 2, 1, 64), (1, 50, 90, 0, 1, 1, 128)], ids=str)
def test_every_instruction_set(isa, dtype, size):
    check_values_and_gradients(inputs(size, dtype))


def check_values_and_gradients(tensors):
    dtype = tensors[0].dtype
    out, lse = mmfast.cross_attention(*tensors, return_lse=True)
    truth, truth_lse = ops.cross_attention_ref(*(t.double() for t in tensors), return_lse=True)
    assert out.dtype == dtype
    check_close(out, truth, eager(*tensors), OUT[dtype] / 4, "out")
    assert (lse - truth_lse).abs().max() <= LSE[dtype]
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.device)
    got = gradients(mmfast.cross_attention, tensors, weight)
    expected = gradients(ops.cross_attention_ref, [t.double() for t in tensors], weight)
    plain = gradients(eager, tensors, weight)
    for name, g, e, p in zip(["q", "k", "v", "k2", "v2"], got, expected, plain, strict=False):
        # Differences that cancel (one key: softmax is 1 and dq is 0) have no relative error; the scale is that of the values' gradient.
        if e.norm() > 1e-6 * expected[2].norm():
            check_close(g, e, p, GRAD[dtype] / 4, f"grad_{name}")
        else:
            assert g.double().norm() <= GRAD[dtype] * expected[2].norm(), f"grad_{name}"


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(device, dtype):
    """Heads first, one tensor for keys and values, slices, an expanded batch, a transposed width: as .contiguous() would give."""
    b, n, h, d = 3, 37, 2, 24
    packed = random(b, n, 2, h, d, dtype=dtype, device=device)
    k, v = packed.unbind(2)
    for q in (
        random(b, h, 9, d, dtype=dtype, device=device).transpose(1, 2),
        random(1, 9, h, d, dtype=dtype, device=device).expand(b, -1, -1, -1),
        random(b, 18, h, d + 5, dtype=dtype, device=device)[:, ::2, :, 3:-2],
        random(b, 9, d, h, dtype=dtype, device=device).transpose(2, 3),
    ):
        dense = [t.contiguous() for t in (q, k, v)]
        assert torch.equal(mmfast.cross_attention(q, k, v), mmfast.cross_attention(*dense))
        weight = torch.randn(b, h, 9, d, dtype=torch.float64).to(device).transpose(1, 2)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        got = torch.autograd.grad((mmfast.cross_attention(*leaves).double() * weight).sum(), leaves)
        for g, e in zip(got, gradients(mmfast.cross_attention, dense, weight), strict=True):
            assert torch.equal(g, e)


@pytest.mark.reduced
def test_lengths_and_empty_rows(device):
    q, k, v, k2, v2 = inputs((4, 6, 20, 9, 2, 2, 16), device=device)
    lens, lens2 = torch.tensor([0, 20, 3, 0], device=device), torch.tensor([0, 9, 0, 4], device=device)
    k[0], v[0], k2[2], v2[2] = torch.nan, torch.nan, torch.nan, torch.nan  # what is not visible is not read into anything
    k[2, 3:], v[2, 3:] = torch.inf, torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v, k2, v2)]
    out, lse = mmfast.cross_attention(*leaves, key_lens=lens, key2_lens=lens2, return_lse=True)
    clean = [t.detach().nan_to_num(0, 0, 0) for t in leaves]
    truth, truth_lse = ops.cross_attention_ref(*clean, key_lens=lens, key2_lens=lens2, return_lse=True)
    check_close(out, truth, floor=OUT[torch.float32])
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert (lse[1:] - truth_lse[1:]).abs().max() < 1e-5
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0].count_nonzero() + grads[1][0].count_nonzero() + grads[2][2, 3:].count_nonzero() == 0
    # Gradients of lse of an empty row are zero as well.
    out, lse = mmfast.cross_attention(*leaves, key_lens=lens, key2_lens=lens2, return_lse=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(lse.exp().sum() + out.sum(), leaves))


def test_lse_gradient(device):
    tensors = inputs((2, 5, 21, 4, 2, 1, 8), device=device)
    check_gradients(
        lambda *t: mmfast.cross_attention(*t, return_lse=True), lambda *t: ops.cross_attention_ref(*t, return_lse=True), tensors, 3e-6
    )
    check_gradients(
        lambda *t: mmfast.cross_attention(*t, return_lse=True)[1], lambda *t: ops.cross_attention_ref(*t, return_lse=True)[1], tensors, 3e-6
    )


@pytest.mark.parametrize("size", [(0, 4, 5, 0, 2, 2, 8), (2, 0, 5, 3, 2, 2, 8), (2, 4, 0, 0, 2, 2, 8), (2, 4, 0, 3, 2, 1, 8)], ids=str)
def test_empty(device, size):
    tensors = [t.requires_grad_() for t in inputs(size, device=device)]
    out, lse = mmfast.cross_attention(*tensors, return_lse=True)
    check_close(out, ops.cross_attention_ref(*tensors), floor=OUT[torch.float32])
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    if size[2] + size[3] == 0:
        assert (lse == -torch.inf).all()
        assert not grads[0].any()


def test_only_wanted_gradients(device):
    q, k, v = inputs((1, 4, 9, 0, 1, 1, 8), device=device)
    for wanted in ([q], [k], [v], [q, v]):
        for t in (q, k, v):
            t.requires_grad_(any(t is w for w in wanted))
        got = torch.autograd.grad(mmfast.cross_attention(q, k, v).sum(), wanted)
        expected = torch.autograd.grad(ops.cross_attention_ref(q, k, v).sum(), wanted)
        for g, e in zip(got, expected, strict=True):
            assert torch.allclose(g, e, atol=1e-5)


def test_extreme_scores(device):
    q, k, v = inputs((1, 8, 100, 0, 1, 1, 32), device=device)
    for factor in (1e-20, 30.0, 1e4):
        check_close(mmfast.cross_attention(q * factor, k, v), ops.cross_attention_ref(q * factor, k, v), floor=1e-5 * max(1, factor))
    ones = torch.ones_like(v)
    assert torch.allclose(mmfast.cross_attention(q * 1e3, k, ones), torch.ones_like(q), atol=1e-6)


@pytest.mark.reduced
def test_repeatable(device):
    tensors = inputs((2, 70, 300, 20, 4, 2, 64), device=device)
    weight = torch.randn(2, 70, 4, 64, dtype=torch.float64).to(device)
    first, second = (gradients(mmfast.cross_attention, tensors, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if device == "cpu":  # and whatever the number of threads
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        single = gradients(mmfast.cross_attention, tensors, weight)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, single, strict=True))


# --------------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("padding", ["none", "lens", "right", "left"])
@pytest.mark.parametrize("mode", ["bidirectional", "unimodal", "multimodal_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qformer(device, dtype, mode, padding):
    for queries, text, rows in ((32, 20, 52), (3, 70, 73), (5, 0, 5), (0, 9, 9), (32, 20, 1), (4, 6, 8)):
        q, k, v = inputs((3, rows, queries + text, 0, 2, 2, 64), dtype, device)
        lens = torch.tensor([text, min(text, 2), 0], device=device)
        real = torch.arange(text, device=device) < lens[:, None]
        kwargs = {"none": {}, "lens": {"text_lens": lens}, "right": {"text_mask": real.long()}, "left": {"text_mask": real.flip(1)}}[
            padding
        ]
        kwargs |= {"num_queries": queries, "mask_mode": mode}
        # A bfloat16 gradient may be all cancellation where a row sees one key; the float32 case holds the rule to account.
        out, truth = mmfast.qformer_attention(q, k, v, **kwargs), ops.qformer_attention_ref(q.double(), k.double(), v.double(), **kwargs)
        check_close(out, truth, floor=OUT[dtype])
        if dtype == torch.float32:
            check_gradients(
                lambda *t, kw=kwargs: mmfast.qformer_attention(*t, **kw), lambda *t, kw=kwargs: ops.qformer_attention_ref(*t, **kw), [q, k, v], 3e-6
            )  # fmt: skip


def test_caption_mask_by_hand(device):
    """Two queries and three words: what each row sees, read off the output by giving every key its own unit value."""
    q, k, v = (*torch.randn(2, 1, 5, 1, 5).to(device).unbind(), torch.eye(5, device=device).view(1, 5, 1, 5))
    seen = mmfast.qformer_attention(q, k, v, num_queries=2, mask_mode="multimodal_causal")[0, :, 0] > 0
    rows = ["11000", "11000", "11100", "11110", "11111"]
    assert seen.tolist() == [[c == "1" for c in row] for row in rows]
    seen = mmfast.qformer_attention(q, k, v, num_queries=2, mask_mode="unimodal")[0, :, 0] > 0
    assert seen.tolist() == [[c == "1" for c in row] for row in ("11000", "11000", "00111", "00111", "00111")]


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_media(device, dtype, immediate):
    for images, latents, text, h, g, d in ((3, 64, 70, 2, 2, 64), (1, 1, 5, 1, 1, 8), (5, 3, 40, 4, 2, 33), (2, 100, 1, 2, 1, 128)):
        q, k, v = inputs((2, text, images * latents, 0, h, g, d), dtype, device)
        running = (torch.rand(text) < 0.1).long().cumsum(0).clamp(max=images)
        anyhow = torch.randint(0, images + 1, (text,))  # not ascending
        kwargs = {"text_time": torch.stack([running, anyhow]).to(device), "latents_per_media": latents, "only_immediate": immediate}
        out = mmfast.media_cross_attention(q, k, v, **kwargs)
        truth = ops.media_cross_attention_ref(q.double(), k.double(), v.double(), **kwargs)
        check_close(out, truth, floor=OUT[dtype])
        assert not out[kwargs["text_time"] == 0].any()
        again, lse = mmfast.media_cross_attention(q, k, v, **kwargs, return_lse=True)
        assert torch.equal(again, out)
        wanted = ops.media_cross_attention_ref(q.double(), k.double(), v.double(), **kwargs, return_lse=True)[1]
        torch.testing.assert_close(lse.double(), wanted, atol=LSE[dtype], rtol=0)
        check_gradients(
            lambda *t, kw=kwargs: mmfast.media_cross_attention(*t, **kw),
            lambda *t, kw=kwargs: ops.media_cross_attention_ref(*t, **kw),
            [q, k, v],
            GRAD[dtype],
        )


def test_media_by_hand(device):
    """[x, I, a, b, E, I, c]: the first token sees nothing, an image token its own image, the end of a chunk the image before it."""
    time = torch.tensor([[0, 1, 0, 0, 0, 1, 0]], device=device).cumsum(1)
    q, k, _ = inputs((1, 7, 128, 0, 1, 1, 128), device=device)
    v = torch.eye(128, device=device).view(1, 128, 1, 128)
    q.requires_grad_()
    out = mmfast.media_cross_attention(q, k, v, text_time=time, latents_per_media=64)
    seen = out[0, :, 0] > 0
    assert not out[0, 0].any()
    assert not torch.autograd.grad(out.sum(), q)[0][0, 0].any()
    expected = torch.zeros(7, 128, dtype=torch.bool, device=device)
    expected[1:5, :64] = expected[5:, 64:] = True
    assert torch.equal(seen, expected)


# ----------------------------------------------------------------------------------------------------- packed, dropout, merge


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(device, dtype):
    for lens_q, lens_k in (([3, 0, 70, 1], [5, 9, 0, 33]), ([4], [4]), ([0, 0], [0, 3])):
        cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).to(device) for lens in (lens_q, lens_k))
        q = random(sum(lens_q), 4, 16, dtype=dtype, device=device)
        k, v = random(2, sum(lens_k), 2, 16, dtype=dtype, device=device)
        extra = (cu_q, cu_k, max(lens_q), max(lens_k))
        out, lse = mmfast.cross_attention_varlen(q, k, v, *extra, return_lse=True)
        truth, truth_lse = ops.cross_attention_varlen_ref(q, k, v, *extra, return_lse=True)
        check_close(out, truth, floor=OUT[dtype])
        assert lse.shape == truth_lse.shape
        assert torch.allclose(lse, truth_lse, atol=LSE[dtype])
        check_gradients(
            lambda *t, e=extra: mmfast.cross_attention_varlen(*t, *e), lambda *t, e=extra: ops.cross_attention_varlen_ref(*t, *e), [q, k, v],
            GRAD[dtype],
        )  # fmt: skip


def philox(counter, key):
    """Philox4x32-10 on arrays of Python integers, from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answer():
    assert [f"{w:08x}" for w in philox([0, 0, 0, 0], [0, 0])] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def kept(seed, b, h, rows, keys, segment, threshold):
    """Which weights stay, [b, h, rows, keys]."""
    keep = torch.zeros(b, h, rows, keys, dtype=torch.bool)
    for bh in range(b * h):
        for i in range(rows):
            for j in range(keys):
                words = philox([j // 32 * 4 + j % 8 // 2, i, bh, segment], [seed & 0xFFFFFFFF, seed >> 32])
                keep[bh // h, bh % h, i, j] = (words[j % 32 // 8] >> (16 * (j % 2)) & 0xFFFF) >= threshold
    return keep


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_bit_by_bit(device, dtype):
    b, rows, n, n2, h, d, p = 2, 9, 37, 6, 2, 16, 0.3
    tensors = inputs((b, rows, n, n2, h, h, d), dtype, device)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,), device=device).item()
    threshold = round(p * 65536)
    keep = torch.cat([kept(seed, b, h, rows, n, 0, threshold), kept(seed, b, h, rows, n2, 1, threshold)], -1).to(device)
    scaled = keep.double() * 65536 / (65536 - threshold)

    def op(*t):
        torch.manual_seed(5)
        return mmfast.cross_attention(*t, dropout_p=p)

    def ref(q, k, v, k2, v2):
        scores = torch.einsum("bihd,bjhd->bhij", q.double() * d**-0.5, torch.cat([k, k2], 1).double())
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1) * scaled, torch.cat([v, v2], 1).double()).to(q.dtype)

    check_close(op(*tensors), ref(*tensors), floor=OUT[dtype])
    check_gradients(op, ref, tensors, GRAD[dtype])


def test_dropout_every_instruction_set(isa):
    test_dropout_bit_by_bit("cpu", torch.float32)
    test_dropout_bit_by_bit("cpu", torch.bfloat16)


def test_dropout_rate(device):
    q, k, v = inputs((2, 32, 512, 0, 4, 4, 8), device=device)
    ones = torch.ones_like(v)
    first, second = (mmfast.cross_attention(q, k, ones, dropout_p=0.1) for _ in range(2))
    assert (first - 1).mean().abs() < 0.01
    assert not torch.equal(first, second)
    assert mmfast.cross_attention(q, k, ones, dropout_p=0.9999999).isfinite().all()


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(device, dtype):
    q, k, v, k2, v2 = inputs((2, 5, 20, 7, 4, 2, 33), dtype, device)
    lens, lens2 = torch.tensor([20, 0], device=device), torch.tensor([7, 0], device=device)
    a = mmfast.cross_attention(q, k, v, key_lens=lens, return_lse=True)
    b = mmfast.cross_attention(q, k2, v2, key_lens=lens2, return_lse=True)
    out, lse = mmfast.merge_attention(*a, *b)
    whole, whole_lse = ops.cross_attention_ref(q, k, v, k2, v2, key_lens=lens, key2_lens=lens2, return_lse=True)
    check_close(out, whole, floor=2 * OUT[dtype])
    assert torch.allclose(lse, whole_lse, atol=LSE[dtype])
    assert not out[1].any()
    some = [t.detach()[:1] for t in (*a, *b)]
    check_gradients(mmfast.merge_attention, ops.merge_attention_ref, some, GRAD[dtype])
    leaves = [t.detach().requires_grad_() for t in (*a, *b)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(mmfast.merge_attention(*leaves)[0].sum(), leaves))


# -------------------------------------------------------------------------------------------------------------- integration


def test_gradcheck(device):
    tensors = [t.double().requires_grad_() for t in inputs((1, 3, 5, 2, 2, 1, 3), device=device)]
    assert torch.autograd.gradcheck(lambda *t: mmfast.cross_attention(*t, return_lse=True), tensors)
    q, k, v = tensors[:3]
    for mode in ("unimodal", "multimodal_causal"):
        assert torch.autograd.gradcheck(lambda *t, m=mode: mmfast.qformer_attention(*t, num_queries=2, mask_mode=m), (q, k, v))
    time = torch.tensor([[0, 1, 5]], device=device)
    assert torch.autograd.gradcheck(lambda *t: mmfast.media_cross_attention(*t, text_time=time, latents_per_media=1), (q, k, v))
    lse = torch.randn(2, 1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(mmfast.merge_attention, (q, lse[0], q.detach() * 2, lse[1]))


def test_registration(device):
    q, k, v, k2, v2 = (t.requires_grad_() for t in inputs((2, 5, 8, 3, 2, 1, 16), device=device))
    lens, valid = torch.tensor([8, 0], dtype=torch.int32, device=device), torch.ones(2, 3, dtype=torch.uint8, device=device)
    nothing = [None] * 3
    check_registration(torch.ops.mmfast.attention.default, (q, k, v, k2, v2, lens, None, valid, *nothing, None, 0, 0, 0, 0, 0.25, 0))
    out, lse = mmfast.cross_attention(q, k, v, return_lse=True)
    check_registration(torch.ops.mmfast.merge_attention.default, (out.detach(), lse.detach(), out.detach(), lse.detach()))


def test_compile(device):
    def block(q, k, v, k2, v2, time):
        out, lse = mmfast.cross_attention(q * 2, k, v, k2, v2, return_lse=True)
        media = mmfast.media_cross_attention(out, k, v, text_time=time, latents_per_media=4)
        return mmfast.merge_attention(out, lse, media, lse)[0].sum() + lse.sum()

    tensors = [t.requires_grad_() for t in inputs((2, 5, 8, 3, 2, 1, 16), device=device)]
    time = torch.tensor([[0, 1, 1, 2, 2]] * 2, device=device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(block(*tensors, time), compiled(*tensors, time))
    plain, made = (torch.autograd.grad(f(*tensors, time), tensors) for f in (block, compiled))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, made, strict=True))


def test_autocast(device):
    q, k, v = inputs((1, 4, 9, 0, 2, 2, 16), device=device)
    with torch.autocast(device, torch.bfloat16):
        out = mmfast.cross_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, mmfast.cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_errors():
    q, k, v = inputs((2, 4, 6, 0, 2, 2, 8))
    lens = torch.tensor([6, 7])
    cases = [
        (lambda: mmfast.cross_attention(q[0], k, v), "expected q \\[B, N, heads, D\\], got \\[4, 2, 8\\]"),
        (lambda: mmfast.cross_attention(q, k.half(), v), "cast one to the other's type"),
        (lambda: mmfast.cross_attention(q, k[..., :4], v), "shapes do not fit"),
        (lambda: mmfast.cross_attention(q, k, v[:, :5]), "v have as many rows as k"),
        (lambda: mmfast.cross_attention(q, k[:, :, :0], v[:, :, :0]), "no multiple of the 0 key heads"),
        (lambda: mmfast.cross_attention(torch.cat([q, q[:, :, :1]], 2), k, v), "3 query heads are no multiple of the 2 key heads"),
        (lambda: mmfast.cross_attention(q, k, v, k), "both k2 and v2 or neither"),
        (lambda: mmfast.cross_attention(q, k, v, key_lens=lens), "key_lens holds 7 at position 1, expected 0 to 6"),
        (lambda: mmfast.cross_attention(q, k, v, key_lens=lens[:1]), "expected 2 integers in key_lens"),
        (lambda: mmfast.cross_attention(q.int(), k.int(), v.int()), "float"),
        (lambda: mmfast.cross_attention(q, k, v, dropout_p=1.0), "dropout_p must be in \\[0, 1\\), got 1.0"),
        (lambda: mmfast.qformer_attention(q, k, v, num_queries=2, mask_mode="causal"), "unknown mask_mode 'causal', expected one of"),
        (lambda: mmfast.qformer_attention(q, k, v, num_queries=9, mask_mode="unimodal"), "num_queries 9 is not within the 6 keys"),
        (lambda: mmfast.qformer_attention(k, q, q, num_queries=2, mask_mode="unimodal"), "at most as many rows as keys, got 6 and 4"),
        (lambda: mmfast.media_cross_attention(q, k, v, text_time=torch.full((2, 4), 3), latents_per_media=3), "text_time holds 3"),
        (lambda: mmfast.media_cross_attention(q, k, v, text_time=torch.zeros(2, 4), latents_per_media=4), "no multiple of latents"),
        (lambda: mmfast.cross_attention_varlen(q[0], k[0], v[0], torch.tensor([0, 3]), torch.tensor([0, 6]), 4, 6), "end at the 4 packed"),
        (lambda: mmfast.cross_attention_varlen(q[0], k[0], v[0], torch.tensor([0, 4]), torch.tensor([0, 6]), 3, 6), "longest length 3"),
    ]
    for call, message in cases:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


@pytest.mark.gpu
def test_graph_and_stream():
    """Captured in a graph and replayed on new values; launched on a side stream: the same bits as a plain call."""

    def step():
        out = mmfast.cross_attention(*tensors, return_lse=True)
        return *out, *torch.autograd.grad(out[0].float().square().sum(), tensors)

    tensors = [t.requires_grad_() for t in inputs((1, 40, 700, 30, 4, 4, 64), torch.bfloat16, "cuda")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = step()  # also what a capture wants done once before
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(aside, step(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in tensors:
            t.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """64 rows on 2,112 keys in two segments: the call needs its output and partial outputs, far less than a concatenation (33 MB)."""
    tensors = inputs((8, 64, 2048, 64, 8, 8, 64), torch.bfloat16, "cuda")
    mmfast.cross_attention(*tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mmfast.cross_attention(*tensors)
    assert torch.cuda.max_memory_allocated() - before < 12 << 20


def test_more_than_2_31_elements():
    """Keys 2^31 elements apart: one untouched reservation of address space, two small pieces of it written."""
    far = 2**31 + 64
    buffer = torch.empty(far + 4096, dtype=torch.bfloat16)
    k = buffer.as_strided((2, 7, 1, 32), (far, 32, 32, 1))
    k[0], k[1] = 0, torch.randn(7, 1, 32)
    q = torch.randn(2, 3, 1, 32).bfloat16()
    assert torch.equal(mmfast.cross_attention(q, k, k), mmfast.cross_attention(q, k.contiguous(), k.contiguous()))


def test_memory_is_that_of_the_output():
    """4,096 rows on 65,536 keys in two segments: scores would take 1 GB, a concatenation 32 MB; the process grows by under 24 MB."""
    program = """
import resource, torch, mmfast
q, k, v, k2, v2 = (torch.randn(1, n, 1, 32) for n in (4096, 32768, 32768, 32768, 32768))
mmfast.cross_attention(q, k[:, :128], v[:, :128], k2[:, :128], v2[:, :128])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mmfast.cross_attention(q, k, v, k2, v2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert grown < 24, f"{grown} MB"
