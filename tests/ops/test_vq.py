"""Vector quantisation against its float64 reference: every type, layout and metric, the awkward sizes, and the gradients."""

import pytest
import torch
from check_op import check_close, check_gradients, check_registration, relative_error

import mmfast
from mmfast.ops import vq

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METRICS = ["l2", "cosine", "ip"]
# N, K, D: one of everything, odd sizes, sizes just past a tile or a panel, widths with and without a ragged end.
SIZES = [
    (1, 1, 1),
    (7, 5, 3),
    (13, 33, 8),
    (97, 129, 257),
    (50, 1000, 64),
    (25, 31, 16),
    (200, 3, 2),
    (12, 64, 1),
    (33, 8, 31),
]


def assert_nearest(x, codebook, indices, metric="l2", channel_dim=-1, expected=None):
    """Equal to the float64 argmin; where they differ the two must be equally near to 1e-12."""
    expected = vq.vq_nearest_ref(x, codebook, metric=metric, channel_dim=channel_dim) if expected is None else expected
    assert indices.dtype == torch.long
    assert indices.shape == expected.shape
    if torch.equal(indices, expected):
        return
    rows, codes = x.movedim(channel_dim, -1).double(), codebook.double()
    wrong = (indices != expected).nonzero(as_tuple=True)
    for row, i, j in zip(rows[wrong], indices[wrong].tolist(), expected[wrong].tolist(), strict=True):
        cost = (row - codes).square().sum(-1) if metric == "l2" else -(row @ codes.T)
        if metric == "cosine":
            cost = cost / codes.norm(dim=-1).clamp_min(1e-300)
        gap, scale = (cost[i] - cost[j]).item(), max(abs(cost[j].item()), 1e-300)
        assert abs(gap) <= 1e-12 * scale, f"code {i} chosen over {j}, {gap / scale:.1e} worse"


# ----------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nearest_is_the_argmin(device, dtype, metric, size):
    n, k, d = size
    x, codebook = torch.randn(n, d).to(device, dtype), torch.randn(k, d).to(device, dtype)
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook, metric=metric), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [(97, 129, 257), (25, 1000, 33), (5, 1, 2)], ids=str)
def test_every_instruction_set(isa, metric, size):
    n, k, d = size
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook, metric=metric), metric)
    near = codebook[torch.arange(n) % k] + 1e-4 * torch.randn(n, d)
    assert_nearest(near, codebook, mmfast.vq_nearest(near, codebook, metric=metric), metric)


@pytest.mark.reduced
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("code_dtype", DTYPES)
def test_mixed_types(device, x_dtype, code_dtype):
    x, codebook = torch.randn(40, 24).to(device, x_dtype), torch.randn(70, 24).to(device, code_dtype)
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook))


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device, dtype):
    codebook = torch.randn(37, 12).to(device, dtype)
    image = torch.randn(2, 12, 5, 7).to(device, dtype)
    for x, channel_dim in [
        (image, 1),
        (image.to(memory_format=torch.channels_last), 1),
        (image.permute(0, 2, 3, 1), -1),
        (image.permute(0, 2, 3, 1)[:, ::2, 1:], -1),
        (image.permute(2, 1, 3, 0), 1),
        (image[..., 0].permute(2, 0, 1), -1),
        (image[:1].expand(3, -1, -1, -1), 1),
        (torch.randn(40, 30).to(device, dtype)[::2, 3:27:2], -1),
        (image[0, :, 0, 0], 0),
    ]:
        assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook, channel_dim=channel_dim), channel_dim=channel_dim)
    strided = torch.randn(74, 30).to(device, dtype)[::2, :24:2]
    assert_nearest(image.movedim(1, -1), strided, mmfast.vq_nearest(image.movedim(1, -1), strided))


def test_duplicates_and_ties_go_to_the_lowest_index(device, isa_or_default):
    codebook = torch.randn(9, 16).repeat(40, 1).to(device)
    x = torch.randn(50, 16).to(device)
    indices = mmfast.vq_nearest(x, codebook)
    assert indices.max() < 9
    assert_nearest(x, codebook, indices)
    assert (mmfast.vq_nearest(x, codebook[:1].expand(300, -1)) == 0).all()
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=device)
    points = torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.1, 0.2], [0.5, 0.5]], device=device)
    assert mmfast.vq_nearest(points, triangle).tolist() == [1, 1, 0, 0]
    grid = torch.randint(-3, 4, (200, 4)).float().to(device)  # small integers: exact ties abound
    x = torch.randint(-3, 4, (100, 4)).float().to(device) + 0.5
    assert torch.equal(mmfast.vq_nearest(x, grid), vq.vq_nearest_ref(x, grid))


@pytest.fixture(params=["default", "baseline", "avx2", "avx512"])
def isa_or_default(request):
    if request.param != "default":
        if request.param not in mmfast.build_info()["cpu_isas"]:
            pytest.skip(f"this machine or build has no {request.param} kernels")
        mmfast.ops.library.force_cpu_isa(request.param)
    yield
    mmfast.ops.library.force_cpu_isa("auto")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_magnitudes(device, scale, metric):
    x, codebook = torch.randn(30, 20).to(device) * scale, torch.randn(50, 20).to(device)
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook, metric=metric), metric)
    assert_nearest(x, codebook * scale, mmfast.vq_nearest(x, codebook * scale, metric=metric), metric)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_large_common_mean(device, isa_or_default, offset):
    x, codebook = torch.randn(60, 32).to(device) + offset, torch.randn(500, 32).to(device) + offset
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook))


def test_outlier_codes_and_small_initialisation(device, isa_or_default):
    codebook = torch.empty(2000, 32).uniform_(-1 / 2000, 1 / 2000)
    codebook[77], codebook[1999] = 1e25, -3e4
    x = torch.randn(64, 32)
    x[5] = 9e24
    assert_nearest(x.to(device), codebook.to(device), mmfast.vq_nearest(x.to(device), codebook.to(device)))


def test_near_ties_are_settled_exactly(device, isa_or_default):
    """Pairs of codes whose distances to the row differ in the last bits of fp32: low precision must not decide."""
    base = torch.randn(40, 64)
    codes = base.repeat_interleave(8, 0)
    codes += 2.0**-22 * codes.abs() * torch.randint(-2, 3, codes.shape)
    x = (base + 0.25 * torch.randn(40, 64)).to(device)
    assert_nearest(x, codes.to(device), mmfast.vq_nearest(x, codes.to(device)))


def test_permuted_codes_give_the_same_code(device):
    x, codebook = torch.randn(80, 24).to(device), torch.randn(300, 24).to(device)
    order = torch.randperm(300).to(device)
    assert torch.equal(order[mmfast.vq_nearest(x, codebook[order])], mmfast.vq_nearest(x, codebook))


def test_more_rows_and_codes_than_a_block(device):
    x, codebook = torch.randn(20000, 4).to(device), torch.randn(5000, 4).to(device)
    expected = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook), expected=expected)
    x, codebook = (
        torch.randn(30, 700).to(device),
        torch.randn(4000, 700).to(device),
    )  # several packed runs of the codebook
    assert_nearest(x, codebook, mmfast.vq_nearest(x, codebook))


@pytest.mark.parametrize("metric", METRICS)
def test_distance(device, metric):
    for dtype in DTYPES:
        x, codebook = torch.randn(31, 19).to(device, dtype), torch.randn(45, 19).to(device, dtype)
        indices, distance = mmfast.vq_nearest(x, codebook, metric=metric, return_distance=True)
        expected_indices, expected = vq.vq_nearest_ref(x, codebook, metric=metric, return_distance=True)
        assert torch.equal(indices, expected_indices)
        assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_close(distance, expected, floor=1e-12 if dtype == torch.float64 else 1e-6)
    zero = torch.zeros(1, 19, device=device)
    assert mmfast.vq_nearest(zero, codebook.float(), metric="cosine").item() == 0


@pytest.mark.reduced
def test_empty(device):
    codebook = torch.randn(5, 3, device=device)
    assert mmfast.vq_nearest(torch.empty(0, 3, device=device), codebook).shape == (0,)
    assert mmfast.vq_nearest(torch.empty(2, 3, 0, 4, device=device), codebook, channel_dim=1).shape == (2, 0, 4)
    x = torch.empty(0, 3, device=device, requires_grad=True)
    quantized, indices, loss = mmfast.vq_quantize(x, codebook.requires_grad_())
    assert quantized.shape == (0, 3)
    assert indices.shape == (0,)
    (quantized.sum() + loss).backward()
    assert loss == 0
    assert (codebook.grad == 0).all()
    counts, sums = mmfast.vq_code_stats(x.detach(), indices, 5)
    assert (counts == 0).all()
    assert sums.shape == (5, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(device, bad, dtype):
    x, codebook = torch.randn(60, 12).to(dtype), torch.randn(40, 12).to(dtype)
    x[33, 7] = bad
    x, codebook = x.to(device), codebook.to(device)
    if device == "cuda":
        indices = mmfast.vq_nearest(x, codebook)
        assert indices[33] == -1
        good = torch.arange(60, device=device) != 33
        assert_nearest(x[good], codebook, indices[good])
        return
    with pytest.raises(RuntimeError, match=r"vq_nearest: row 33 of x holds NaN or Inf"):
        mmfast.vq_nearest(x, codebook)
    codebook[5, 3] = bad
    with pytest.raises(RuntimeError, match=r"vq_quantize: code 5 of the codebook holds NaN or Inf"):
        mmfast.vq_quantize(torch.randn(60, 12).to(dtype), codebook)


def test_threads_do_not_change_results():
    x, codebook = torch.randn(500, 40), torch.randn(300, 40)

    def run():
        quantized, indices, loss = mmfast.vq_quantize(x, codebook)
        return quantized, indices, loss, *mmfast.vq_code_stats(x, indices, 300)

    many, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


# --------------------------------------------------------------------------------------------------------------- quantise


@pytest.mark.parametrize("gradient", ["ste", "rotation", "none"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_quantize_values_and_gradients(device, dtype, legacy, gradient, channel_dim):
    x = torch.randn(3, 6, 5, 6).to(device, dtype)
    codebook = torch.randn(11, 6).to(device, dtype)
    mask = torch.rand(x.shape[:-1] if channel_dim == -1 else (3, 5, 6)).to(device) > 0.3
    for m in (None, mask):
        options = dict(beta=0.3, legacy=legacy, gradient=gradient, channel_dim=channel_dim, mask=m)
        quantized, indices, loss = mmfast.vq_quantize(x, codebook, **options)
        expected, expected_indices, expected_loss = vq.vq_quantize_ref(x.double(), codebook.double(), **options)
        assert torch.equal(indices, expected_indices)
        assert quantized.dtype == dtype
        check_close(quantized, expected, floor=1e-15)  # the code itself, no arithmetic
        check_close(loss, expected_loss, floor=1e-6)
        check_gradients(
            lambda a, b: mmfast.vq_quantize(a, b, **options),
            lambda a, b: vq.vq_quantize_ref(a, b, **options),
            [x, codebook],
        )


def test_beta_placement_changes_gradients_alone():
    """taming's placement against the paper's: 1.25 x 0.07625 either way, but other gradients."""
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    x = torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.1, 0.2], [0.5, 0.5]], requires_grad=True)
    grads = {}
    for legacy in (True, False):
        _, indices, loss = mmfast.vq_quantize(x, codebook, legacy=legacy)
        assert indices.tolist() == [1, 1, 0, 0]
        assert loss.item() == pytest.approx(1.25 * 0.07625, abs=1e-7)
        grads[legacy] = torch.autograd.grad(loss, (x, codebook))
    residual = (x - codebook[torch.tensor([1, 1, 0, 0])]).detach()
    torch.testing.assert_close(grads[True][0], 2 * residual / 8)
    torch.testing.assert_close(grads[False][0], 0.25 * grads[True][0])
    torch.testing.assert_close(grads[True][1], 0.25 * grads[False][1])


def test_gradcheck():
    """Where the loss is a true function of an input (the other side's share 0) its gradient is the derivative."""
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def commit(a):
        return torch.ops.mmfast.vq_quantize(a, codebook.detach(), None, -1, 0, 1.0, 0.0)[2]

    def code(b):
        return torch.ops.mmfast.vq_quantize(x.detach(), b, None, -1, 0, 0.0, 1.0)[2]

    assert torch.autograd.gradcheck(commit, (x,))
    assert torch.autograd.gradcheck(code, (codebook,))

    # The straight-through and rotated outputs are linear in x once their stop-gradients are fixed: check against that linear map.
    indices = mmfast.vq_nearest(x.detach(), codebook.detach())
    e = codebook.detach()[indices]
    u, q = (v / v.norm(dim=-1, keepdim=True) for v in (x.detach(), e))
    w = torch.nn.functional.normalize(u + q, dim=-1)
    ratio = e.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    eye = torch.eye(4, dtype=torch.float64)
    turn = ratio[..., None] * (eye - 2 * w[:, :, None] * w[:, None, :] + 2 * q[:, :, None] * u[:, None, :])
    grad = torch.randn(9, 4, dtype=torch.float64)
    for gradient, expected in (("ste", grad), ("rotation", torch.einsum("nij,ni->nj", turn, grad)), ("none", None)):
        quantized = mmfast.vq_quantize(x, codebook, gradient=gradient)[0]
        torch.testing.assert_close(quantized, e)
        (got,) = torch.autograd.grad(quantized, x, grad, allow_unused=True)
        if expected is None:
            assert got is None or (got == 0).all()
        else:
            torch.testing.assert_close(got, expected)


def test_rotation_edge_cases():
    """The worked value of the rotation (3, 4) -> (0, 2), and rows or codes of length 0."""
    x, e = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[0.0, 2.0]])
    quantized = mmfast.vq_quantize(x, e, gradient="rotation")[0]
    assert quantized.tolist() == [[0.0, 2.0]]
    (grad,) = torch.autograd.grad(quantized.sum(), x)
    assert torch.isfinite(grad).all()
    assert grad.norm().item() == pytest.approx((2**0.5) * 2 / 5, rel=1e-6)  # a rotation keeps the length, the ratio scales it
    for a, b in (([[0.0, 0.0]], [[1.0, 1.0]]), ([[1.0, 1.0]], [[0.0, 0.0]]), ([[1.0, 2.0]], [[-1.0, -2.0]])):
        x = torch.tensor(a, requires_grad=True)
        (grad,) = torch.autograd.grad(mmfast.vq_quantize(x, torch.tensor(b), gradient="rotation")[0].sum(), x)
        assert torch.isfinite(grad).all()


@pytest.mark.reduced
def test_all_masked(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    mask = torch.zeros(4, dtype=torch.bool, device=device)
    quantized, indices, loss = mmfast.vq_quantize(x, torch.randn(5, 3, device=device), mask=mask)
    assert (indices == -1).all()
    assert loss == 0
    assert torch.equal(quantized, x)
    (grad,) = torch.autograd.grad(quantized.sum() + loss, x)
    assert (grad == 1).all()


# ------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (200, 7, 5), (1000, 300, 33), (64, 512, 48)], ids=str)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_code_stats(device, dtype, size, channel_dim):
    n, k, d = size
    x = torch.randn(n, d) if channel_dim == -1 else torch.randn(2, d, n)
    x, rows = x.to(device, dtype), n * (1 if channel_dim == -1 else 2)
    indices = torch.randint(-1, k, (rows,)).view(x.movedim(channel_dim, -1).shape[:-1]).to(device)
    for weight in (None, torch.rand(indices.shape).to(device)):
        counts, sums = mmfast.vq_code_stats(x, indices, k, weight=weight, channel_dim=channel_dim)
        expected = vq.vq_code_stats_ref(x.double(), indices, k, weight=weight, channel_dim=channel_dim)
        check_close(counts, expected[0], floor=1e-6)
        check_close(sums, expected[1], floor=1e-6)
        again = mmfast.vq_code_stats(x, indices, k, weight=weight, channel_dim=channel_dim)
        assert torch.equal(sums, again[1])


def test_ema_worked_example(device):
    """Four rows, three codes, decay 0.9: the numbers of a calculation by hand."""
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=device)
    x = torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.1, 0.2], [0.5, 0.5]], device=device)
    size, avg, codebook = torch.ones(3, device=device), codes.clone(), codes.clone()
    mmfast.vq_ema_update_(size, avg, codebook, x, mmfast.vq_nearest(x, codebook), decay=0.9)
    torch.testing.assert_close(size.cpu(), torch.tensor([1.1, 1.1, 0.9]))
    torch.testing.assert_close(avg.cpu(), torch.tensor([[0.06, 0.07], [1.07, 0.01], [0.0, 0.9]]))
    expected = torch.tensor([[0.054545, 0.063636], [0.972728, 0.009091], [0.0, 0.999999]])
    torch.testing.assert_close(codebook.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_ema_step(device, dtype, normalize):
    k, d = 37, 19
    state = [
        torch.rand(k),
        torch.randn(k, d),
        torch.randn(k, d),
        torch.randint(0, 4, (k,)).to(torch.float32),
        torch.randn(k, d),
    ]
    state = [t.to(device, dtype) for t in state]
    truth = [t.double() for t in state]
    options = dict(decay=0.8, eps=1e-3, normalize=normalize)
    mmfast.vq_ema_step_(*state, **options)
    vq.vq_ema_step_ref_(*truth, **options)
    for got, expected in zip(state[:3], truth[:3], strict=True):
        check_close(got, expected, floor=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_ema_update(device, dtype, normalize):
    k, d = 40, 21
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = [t.to(device, state_dtype) for t in (torch.rand(k), torch.randn(k, d), torch.randn(k, d))]
    truth = [t.double() for t in state]
    x, indices = torch.randn(3, d, 50).to(device, dtype), torch.randint(-1, k, (3, 50)).to(device)
    options = dict(decay=0.9, channel_dim=1, normalize=normalize, weight=torch.rand(3, 50).to(device))
    mmfast.vq_ema_update_(*state, x, indices, **options)
    vq.vq_ema_update_ref_(*truth, x.double(), indices, **options)
    for got, expected in zip(state, truth, strict=True):
        check_close(got, expected, floor=1e-6)


@pytest.mark.reduced
def test_codebook_may_move_before_the_backward_pass(device):
    """The moving average changes the codes in place between forward and backward; gradients belong to the codes that were used."""
    x, codebook = torch.randn(30, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    expected = torch.autograd.grad(mmfast.vq_quantize(x, codebook, gradient="rotation")[0].square().sum(), x)[0]
    loss = mmfast.vq_quantize(x, codebook, gradient="rotation")[0].square().sum()
    codebook.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_ema_without_any_row_keeps_the_codes(device):
    codebook = torch.randn(4, 3, device=device)
    before = codebook.clone()
    zero = torch.zeros(4, device=device)
    mmfast.vq_ema_step_(zero.clone(), torch.zeros(4, 3, device=device), codebook, zero, torch.zeros(4, 3, device=device), decay=0.9)
    assert torch.equal(codebook, before)


# ----------------------------------------------------------------------------------------------------------- registration


def test_registration(device):
    x = torch.randn(2, 6, 4, 5, device=device, requires_grad=True)
    codebook = torch.randn(9, 6, device=device, requires_grad=True)
    mask = torch.rand(2, 4, 5, device=device) > 0.5
    ops = torch.ops.mmfast
    check_registration(ops.vq_nearest.default, (x.detach(), codebook.detach(), 0, 1, True))
    check_registration(ops.vq_quantize.default, (x, codebook, mask, 1, 1, 0.8, 0.2))
    check_registration(ops.vq_quantize.default, (x, codebook, None, 1, 2, 0.8, 0.2))
    indices = ops.vq_nearest(x, codebook, 0, 1, False)[0]
    grad_q, grad_mse = torch.randn_like(x), torch.ones([], device=device)
    for need in ((True, True), (True, False), (False, True)):
        check_registration(
            ops.vq_quantize_backward.default,
            (grad_q, grad_mse, x.detach(), codebook.detach(), indices, 0.8, 0.2, 1, 1, *need),
        )
    check_registration(ops.vq_code_stats.default, (x.detach(), indices, 9, torch.rand(2, 4, 5, device=device), 1))
    state = [torch.rand(9), torch.randn(9, 6), torch.randn(9, 6), torch.rand(9), torch.randn(9, 6)]
    check_registration(ops.vq_ema_step_.default, (*(t.to(device) for t in state), 0.9, 1e-5, False))
    state = [t.to(device) for t in (torch.rand(9), torch.randn(9, 6), torch.randn(9, 6))]
    check_registration(ops.vq_ema_update_.default, (*state, x.detach(), indices, None, 1, 0.9, 1e-5, True))


def test_compile_full_graph_with_dynamic_shapes(device):
    codebook = torch.randn(17, 6, device=device, requires_grad=True)

    def step(x):
        quantized, indices, loss = mmfast.vq_quantize(x, codebook, gradient="rotation")
        return quantized.square().sum() + loss, indices

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 12, 31):
        x = torch.randn(n, 6, device=device, requires_grad=True)
        plain, indices = step(x)
        (grad,) = torch.autograd.grad(plain, x)
        fused, fused_indices = compiled(x)
        (fused_grad,) = torch.autograd.grad(fused, x)
        assert torch.equal(indices, fused_indices)
        torch.testing.assert_close(fused, plain)
        torch.testing.assert_close(fused_grad, grad)


def test_autocast():
    linear, codebook = torch.nn.Linear(8, 6), torch.randn(20, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(torch.randn(11, 8))
        assert hidden.dtype == torch.bfloat16
        quantized, indices, loss = mmfast.vq_quantize(hidden, codebook)
    assert quantized.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(indices, vq.vq_nearest_ref(hidden.detach(), codebook.detach()))
    (quantized.float().sum() + loss).backward()
    assert linear.weight.grad is not None
    assert codebook.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mmfast.vq_nearest(torch.randn(4, 8), torch.randn(3, 4)),
            r"expected codebook \[K, D=8\] like x \[4, 8\].* got \[3, 4\]",
        ),
        (lambda: mmfast.vq_nearest(torch.randn(4, 8), torch.randn(8)), r"expected codebook \[K, D=8\]"),
        (lambda: mmfast.vq_nearest(torch.randn(4, 8), torch.randn(0, 8)), r"at least one code"),
        (
            lambda: mmfast.vq_nearest(torch.randn(4, 8), torch.randn(3, 8), channel_dim=2),
            r"channel_dim 2 does not exist",
        ),
        (
            lambda: mmfast.vq_nearest(torch.ones(4, 8, dtype=torch.int32), torch.randn(3, 8)),
            r"expected x of type float32.* got Int",
        ),
        (
            lambda: mmfast.vq_quantize(torch.randn(4, 8), torch.randn(3, 8), mask=torch.ones(5, dtype=torch.bool)),
            r"bool mask \[4\]",
        ),
        (
            lambda: mmfast.vq_quantize(torch.randn(2, 3, 8), torch.randn(3, 8), mask=torch.ones(3, 2, dtype=torch.bool)),
            r"bool mask \[2, 3\].* got Bool \[3, 2\]",
        ),
        (lambda: mmfast.vq_nearest(torch.randn(4, 8), torch.randn(3, 8, device="meta")), r"x is on cpu, codebook on meta"),
        (lambda: mmfast.vq_quantize(torch.randn(4, 8), torch.randn(3, 8, device="meta")), r"x is on cpu, codebook on meta"),
        (
            lambda: mmfast.vq_code_stats(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]), 3),
            r"index 3 of row 3 is outside \[-1, K=3\)",
        ),
        (lambda: mmfast.vq_code_stats(torch.randn(4, 8), torch.zeros(4), 3), r"indices of type int64"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_unknown_choices():
    x, codebook = torch.randn(4, 8), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"vq_nearest: unknown metric 'dot', expected one of 'l2', 'cosine', 'ip'"):
        mmfast.vq_nearest(x, codebook, metric="dot")
    with pytest.raises(ValueError, match=r"vq_quantize: unknown gradient"):
        mmfast.vq_quantize(x, codebook, gradient="straight")


def test_reference_is_not_the_kernel():
    """The oracle itself, by brute force on a case small enough to see."""
    x, codebook = torch.tensor([[0.0], [0.4], [0.6]]), torch.tensor([[1.0], [0.0]])
    assert vq.vq_nearest_ref(x, codebook).tolist() == [1, 1, 0]
    assert relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == 1.0
