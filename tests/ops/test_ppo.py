"""PPO against its float64 reference and against values worked by hand: advantages, whitening, both losses, both semantics."""

import math

import pytest
import torch
from check_op import UNIT, check_close, check_gradients, check_registration

import mmfast
from mmfast.ops import ppo

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One of everything, one column, lengths around a warp's tile, a block (128) and a run (4096) of elements.
SIZES = [(1, 1), (5, 1), (1, 7), (3, 32), (9, 33), (6, 128), (7, 129), (4, 1024), (2, 1025), (1, 4097), (65, 130)]
EMPTY = [(0, 5), (3, 0), (0, 0)]
KL_KINDS = ["k1", "k1_clamped", "k2", "k3"]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rollout(size, device, dtype=torch.float32):
    """logp, old_logp, advantages, weights, ref_logp: ratios on both sides of either clip."""
    old = -3 * torch.rand(size)
    tensors = old + 0.3 * torch.randn(size), old, torch.randn(size), torch.rand(size), old + 0.3 * torch.randn(size)
    return [t.to(device, dtype) for t in tensors]


def some(size, device):
    """A mask that drops some, but never all."""
    mask = torch.rand(size) > 0.4
    mask.view(-1)[:1] = True
    return mask.to(device)


def close(value, truth, tolerance):
    torch.testing.assert_close(value.double().cpu(), torch.as_tensor(truth, dtype=torch.float64).view(value.shape), rtol=tolerance, atol=0)


# ---------------------------------------------------------------------------------------------------------- worked values


@pytest.fixture(params=[torch.float64, torch.float32])
def row(request, device):
    """Makes [1, T] tensors, and knows how close they have to come."""

    def make(*values, **options):
        return torch.tensor([values], dtype=request.param, device=device, **options)

    make.tolerance = 1e-9 if request.param == torch.float64 else 1e-5
    make.dtype, make.device = request.param, device
    return make


# LLaVA-RLHF on four columns: three tokens, the last of them the end token, and a column of padding.
OLD, REF, NEW = (-1.0, -2.0, -0.5, 0.0), (-1.5, -1.8, -0.5, 0.0), (-0.8, -2.3, -0.5, 0.0)
SCORE = 1.2 - 10 * 3 / 4 + 2  # the reward model's, the length penalty, one correct answer
VALUES, NEW_VALUES = (0.1, 0.2, 0.3, 0.0), (0.5, 0.2, -0.1, 0.0)
ADVANTAGES, RETURNS = (-43.6, -43.2, -43.3, -43.0), (-43.5, -43.0, -43.0, -43.0)
WHITENED = (-1.501110630560, 0.346410145514, -0.115470048505, 1.270170533550)
REAL = (True, True, True, False)


def test_llava_rlhf_rewards(row):
    score = torch.tensor([SCORE], dtype=row.dtype, device=row.device)
    assert pytest.approx(-4.3) == SCORE
    rewards = mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, semantics="llava_rlhf", scale=1.0)
    close(rewards, (-0.05, 0.0, 0.0, -4.3), row.tolerance)  # on the last column, which is padding
    scaled = mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, semantics="llava_rlhf")
    close(scaled, (-0.5, 0.0, 0.0, -43.0), row.tolerance)
    # The mask changes nothing there, the clamp is what keeps the second column at 0, and k3 is another number.
    mask = torch.tensor([REAL], device=row.device)
    assert torch.equal(scaled, mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, semantics="llava_rlhf", mask=mask))
    plain = mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, semantics="llava_rlhf", scale=1.0, kl_kind="k1")
    close(plain, (-0.05, 0.02, 0.0, -4.3), row.tolerance)
    k3 = mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=-1.0, semantics="llava_rlhf", scale=1.0, kl_kind="k3")
    close(k3[:, :2], (0.10653065971, 0.02140275816), 1e-9 if row.dtype == torch.float64 else 1e-5)


def test_masked_rewards_stand_on_the_end_token(row):
    score = torch.tensor([SCORE], dtype=row.dtype, device=row.device)
    mask = torch.tensor([REAL], device=row.device)
    nowhere = row(*OLD[:3], math.nan)  # what stands in padding does not matter
    rewards = mmfast.token_rewards(score, nowhere, row(*REF), kl_coef=0.1, mask=mask)
    close(rewards, (-0.05, 0.02, -4.3, 0.0), row.tolerance)
    none = mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, mask=torch.zeros_like(mask))
    assert (none == 0).all()
    gaps = torch.tensor([[True, False, True, False]], device=row.device)
    close(mmfast.token_rewards(score, row(*OLD), row(*REF), kl_coef=0.1, mask=gaps.long()), (-0.05, 0.0, -4.3, 0.0), row.tolerance)


def test_rewards_stand_one_column_past_the_end_in_trl(row):
    """Two tokens, a score of 1, the KL of the first 2 with coefficient .05: TRL's example, with the column that its value loss counts too."""
    mask, full = (torch.tensor([m], device=row.device) for m in ([True, True, False], [True, True, True]))
    score = torch.ones(1, dtype=row.dtype, device=row.device)
    logp, ref = row(-1.0, -2.0, math.nan), row(-3.0, -2.0, math.nan)
    trl = dict(kl_coef=0.05, score_at="after_end")
    rewards = mmfast.token_rewards(score, logp, ref, mask=mask, **trl)
    close(rewards, (-0.1, 0.0, 1.0), row.tolerance)
    counted = mask | mask.roll(1, -1)
    assert counted.tolist() == [[True, True, True]]
    advantages, returns = mmfast.gae(rewards, row(0.2, 0.3, 0.4), gamma=1.0, lam=0.95, mask=counted)
    close(advantages, (0.6365, 0.67, 0.6), row.tolerance)
    close(returns, (0.8365, 0.97, 1.0), row.tolerance)
    close(mmfast.token_rewards(score, logp, ref, mask=mask, kl_coef=0.05), (-0.1, 1.0, 0.0), row.tolerance)  # on the end token
    # A full row has no column to spare; a row without a token gets nothing.
    close(mmfast.token_rewards(score, row(-1.0, -2.0, -3.0), row(-3.0, -2.0, -3.0), mask=full, **trl), (-0.1, 0.0, 1.0), row.tolerance)
    assert (mmfast.token_rewards(score, row(-1.0, -2.0, 0.0), row(-3.0, -2.0, 0.0), mask=torch.zeros_like(mask), **trl) == 0).all()
    last = mmfast.token_rewards(
        score, row(-1.0, math.nan, math.nan), ref, mask=full & (full.cumsum(-1) == 1), kl_coef=0.05, score_at="last"
    )
    close(last, (-0.1, 0.0, 1.0), row.tolerance)
    one = mmfast.token_rewards(score, row(-1.0), row(-3.0), kl_coef=0.05, score_at="after_end")
    close(one, (0.9,), row.tolerance)


def test_llava_rlhf_update(row):
    """From rewards to losses as the released code computes them."""
    advantages, returns = mmfast.gae(row(-0.5, 0.0, 0.0, -43.0), row(*VALUES), gamma=1.0, lam=1.0)
    close(advantages, ADVANTAGES, row.tolerance)
    close(returns, RETURNS, row.tolerance)
    whitened = mmfast.masked_whiten(row(*ADVANTAGES), semantics="llava_rlhf")
    # In float32 the advantages themselves are rounded: 2e-6 of 43, which is 1e-5 of their deviation.
    close(whitened, WHITENED, 1e-9 if row.dtype == torch.float64 else 1e-4)

    mask = torch.tensor([REAL], device=row.device)
    loss, stats = mmfast.ppo_policy_loss(row(*NEW), row(*OLD), row(*WHITENED), mask=mask, semantics="llava_rlhf")
    close(loss, 0.10553330794943361, row.tolerance)
    close(stats["ratio"], (1.221402758160 + 0.740818220682 + 1 + 1) / 4, row.tolerance)
    each = (1.833460664469, -0.256626947626, 0.115470048505, -1.270170533550)
    for t in range(4):
        here = torch.arange(4, device=row.device).view(1, 4) == t
        close(mmfast.ppo_policy_loss(row(*NEW), row(*OLD), row(*WHITENED), mask=here)[0], each[t], row.tolerance)
    loss, _ = mmfast.ppo_value_loss(row(*NEW_VALUES), row(*VALUES), row(*RETURNS), mask=mask, semantics="llava_rlhf")
    close(loss, 938.60625, row.tolerance)
    close(0.1 * loss, 93.860625, row.tolerance)


def test_masked_update(row):
    """The same row with masked means; neither loss may be the other semantics' number."""
    mask = torch.tensor([REAL], device=row.device)
    loss, _ = mmfast.ppo_policy_loss(row(*NEW), row(*OLD), row(*WHITENED), mask=mask)
    close(loss, 0.5641012551160729, row.tolerance)
    assert abs(loss.item() - 0.10553330794943361) > 0.1
    loss, stats = mmfast.ppo_value_loss(row(*NEW_VALUES), row(*VALUES), row(*RETURNS), mask=mask)
    close(loss, (44.0**2 + 43.2**2 + 43.1**2) / 6, row.tolerance)
    close(stats["clip_fraction"], 1 / 3, row.tolerance)
    close(stats["squared_error"], (44.0**2 + 43.2**2 + 42.9**2) / 3, row.tolerance)
    assert abs(loss.item() - 938.60625) > 1


def test_whitening_semantics_differ(row):
    """Over three tokens and unbiased, not over four columns and biased; eps inside the root, not outside."""
    mask = torch.tensor([REAL], device=row.device)
    inside = mmfast.masked_whiten(row(*ADVANTAGES), mask)
    mean, deviation = -130.1 / 3, math.sqrt(((43.6 - 130.1 / 3) ** 2 + (43.2 - 130.1 / 3) ** 2 + (43.3 - 130.1 / 3) ** 2) / 2 + 1e-8)
    expected = [(a - mean) / deviation for a in ADVANTAGES[:3]]
    close(inside[:, :3], expected, 1e-9 if row.dtype == torch.float64 else 1e-4)
    assert inside[0, 3] == 0
    kept = mmfast.masked_whiten(row(*ADVANTAGES), mask, shift_mean=False)
    close(kept[:, :3], [e + mean for e in expected], row.tolerance)
    assert kept[0, 3] == 0
    # A large eps tells the two placements apart: 1 / sqrt(var + 1) against 1 / (std + 1), var 4 / 3 and 1.
    x = row(-1.0, 1.0, -1.0, 1.0)
    close(mmfast.masked_whiten(x, eps=1.0), [v / math.sqrt(4 / 3 + 1) for v in (-1, 1, -1, 1)], row.tolerance)
    close(mmfast.masked_whiten(x, eps=1.0, semantics="llava_rlhf"), (-0.5, 0.5, -0.5, 0.5), row.tolerance)
    close(mmfast.masked_whiten(x, eps=0.0, unbiased=False), (-1.0, 1.0, -1.0, 1.0), row.tolerance)


def test_advantages_as_in_trl(row):
    """gamma 1, lambda .95; a column of padding behind the row, whatever it holds, moves nothing."""
    advantages, returns = mmfast.gae(row(-0.1, 0.0, 1.0), row(0.2, 0.3, 0.4), gamma=1.0, lam=0.95)
    close(advantages, (0.6365, 0.67, 0.6), row.tolerance)
    close(returns, (0.8365, 0.97, 1.0), row.tolerance)
    mask = torch.tensor([[True, True, True, False]], device=row.device)
    padded = mmfast.gae(row(-0.1, 0.0, 1.0, math.nan), row(0.2, 0.3, 0.4, 7.0), gamma=1.0, lam=0.95, mask=mask)
    close(padded[0], (0.6365, 0.67, 0.6, 0.0), row.tolerance)
    close(padded[1], (0.8365, 0.97, 1.0, 0.0), row.tolerance)
    unmasked = mmfast.gae(row(-0.1, 0.0, 1.0, 0.0), row(0.2, 0.3, 0.4, 7.0), gamma=1.0, lam=0.95)
    assert abs(unmasked[0][0, 0].item() - 0.6365) > 0.1


def test_advantages_by_hand(row):
    """A finished episode lets nothing through, a cut one gets the value behind it."""
    dones = torch.tensor([[False, True, False]], device=row.device)
    ahead = torch.tensor([2.0], dtype=row.dtype, device=row.device)
    advantages, returns = mmfast.gae(row(1.0, 2.0, 3.0), row(0.5, 0.25, 1.0), gamma=0.5, lam=0.5, dones=dones, bootstrap=ahead)
    a2 = 3 + 0.5 * 2 - 1
    a1 = 2 - 0.25
    a0 = 1 + 0.5 * 0.25 - 0.5 + 0.25 * a1
    close(advantages, (a0, a1, a2), row.tolerance)
    close(returns, (a0 + 0.5, a1 + 0.25, a2 + 1.0), row.tolerance)


# -------------------------------------------------------------------------------------------------------- against the reference


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gae(device, dtype, size):
    rewards, values = torch.randn(size).to(device, dtype), torch.randn(size).to(device, dtype)
    dones, bootstrap = torch.rand(size).to(device) > 0.9, torch.randn(size[0]).to(device, dtype)
    for options in ({}, {"mask": some(size, device)}, {"dones": dones, "bootstrap": bootstrap, "mask": some(size, device)}):
        options |= {"gamma": 0.99, "lam": 0.95}
        got = mmfast.gae(rewards, values, **options)
        truth = ppo.gae_ref(rewards.double(), values.double(), **options)
        for g, t in zip(got, truth, strict=True):
            assert g.dtype == wide(dtype)
            check_close(g, t)


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_whiten(device, dtype, size):
    x, mask = torch.randn(size).to(device, dtype) + 2, some(size, device)
    for options in ({}, {"shift_mean": False}, {"unbiased": False, "eps": 1e-3}, {"semantics": "llava_rlhf"}):
        got = mmfast.masked_whiten(x, mask, **options)
        assert got.dtype == wide(dtype)
        check_close(got, ppo.masked_whiten_ref(x.double(), mask, **options), floor=2 * UNIT[wide(dtype)])
        check_close(mmfast.masked_whiten(x, **options), ppo.masked_whiten_ref(x.double(), **options), floor=2 * UNIT[wide(dtype)])


def check_loss(op, ref, tensors, options):
    """Value, statistics and the one gradient of a loss."""
    loss, stats = op(*tensors, **options)
    plain, plain_stats = ref(*tensors, **options)
    wider = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth, truth_stats = ref(*[t.double() for t in tensors], **wider)
    assert loss.dtype == wide(tensors[0].dtype)
    assert stats.keys() == truth_stats.keys()
    check_close(loss, truth, plain, floor=1e-6 if loss.dtype == torch.float32 else 1e-13)
    for name, value in stats.items():
        assert not value.requires_grad
        check_close(value, truth_stats[name], plain_stats[name], floor=1e-6 if loss.dtype == torch.float32 else 1e-13, what=name)
    first, rest = tensors[0], tensors[1:]
    doubled = [t.double() for t in rest]
    check_gradients(
        lambda t: op(t, *rest, **options)[0],
        lambda t: ref(t, *(doubled if t.dtype == torch.float64 else rest), **(wider if t.dtype == torch.float64 else options))[0],
        [first],
    )


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_policy_loss(device, dtype, size):
    *tensors, weights, ref_logp = rollout(size, device, dtype)
    for options in (
        {},
        {"mask": some(size, device), "clip": (0.1, 0.3)},
        {"mask": some(size, device), "weights": weights, "dual_clip": 1.2, "ref_logp": ref_logp, "kl_coef": 0.3},
        {"mask": some(size, device), "semantics": "llava_rlhf"},
    ):
        check_loss(mmfast.ppo_policy_loss, ppo.ppo_policy_loss_ref, tensors, options)


@pytest.mark.parametrize("kl_kind", KL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_loss_on_every_instruction_set(isa, dtype, kl_kind):
    *tensors, weights, ref_logp = rollout((7, 700), "cpu", dtype)
    options = {"mask": some((7, 700), "cpu"), "weights": weights, "dual_clip": 1.2, "ref_logp": ref_logp, "kl_coef": 0.3}
    check_loss(mmfast.ppo_policy_loss, ppo.ppo_policy_loss_ref, tensors, options | {"kl_kind": kl_kind})
    check_loss(mmfast.ppo_value_loss, ppo.ppo_value_loss_ref, tensors, {"mask": options["mask"], "clip": 0.1})


@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_kl_penalty(device, kl_kind):
    *tensors, _, ref_logp = rollout((5, 40), device)
    check_loss(mmfast.ppo_policy_loss, ppo.ppo_policy_loss_ref, tensors, {"ref_logp": ref_logp, "kl_coef": 0.7, "kl_kind": kl_kind})


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_loss(device, dtype, size):
    values = torch.randn(size).to(device, dtype)
    tensors = [values, values + 0.3 * torch.randn(size).to(device, dtype), torch.randn(size).to(device, dtype)]
    for options in (
        {},
        {"clip": None},
        {"clip": 0.05, "mask": some(size, device)},
        {"mask": some(size, device), "semantics": "llava_rlhf"},
    ):
        check_loss(mmfast.ppo_value_loss, ppo.ppo_value_loss_ref, tensors, options)


def test_mixed_types(device):
    """A bfloat16 model beside float32 statistics of the rollout."""
    logp, old, advantages, _, _ = rollout((6, 50), device)
    logp = logp.bfloat16().requires_grad_()
    loss, _ = mmfast.ppo_policy_loss(logp, old, advantages.double())
    check_close(loss, ppo.ppo_policy_loss_ref(logp.detach().double(), old.double(), advantages.double())[0], floor=1e-6)
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad.dtype == torch.bfloat16
    advantages, _ = mmfast.gae(advantages.half(), old, gamma=1.0, lam=0.9)
    assert advantages.dtype == torch.float32
    assert mmfast.gae(old.double(), old, gamma=1.0, lam=0.9)[0].dtype == torch.float64


@pytest.mark.reduced
def test_layouts(device):
    """Slices, transposes and expanded rows read what they show."""
    base = torch.randn(40, 30, device=device)
    pieces = [base[::2, 3:27:2], base.T[:24, :20].T, base[:1, :12].expand(20, 12), base[:20, :12].flip(0)]
    mask = (torch.rand(40, 24, device=device) > 0.4)[::2, ::2]
    for a in pieces:
        for b in pieces:
            if a.shape != b.shape:
                continue
            dense, m = (a.contiguous(), b.contiguous()), mask[: a.shape[0], : a.shape[1]]
            m = m if m.shape == a.shape else None
            for call in (
                lambda x, y: mmfast.gae(x, y, gamma=0.9, lam=0.9, mask=m)[0],
                lambda x, y: mmfast.masked_whiten(x + 0 * y, m),
                lambda x, y: mmfast.ppo_policy_loss(x, y, y, mask=m)[0],
                lambda x, y: mmfast.ppo_value_loss(x, y, y, mask=m)[0],
            ):
                assert torch.equal(call(a, b), call(*dense))
    leaf = base.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mmfast.ppo_policy_loss(leaf[::2, 3:27:2], base[::2, 3:27:2] + 0.1, base[1::2, 3:27:2])[0], leaf)
    assert (grad[1::2] == 0).all()
    assert grad.count_nonzero() > 0


# ----------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.reduced
@pytest.mark.parametrize("size", EMPTY, ids=str)
def test_empty(device, size):
    x = torch.empty(size, device=device, requires_grad=True)
    assert [t.shape for t in mmfast.gae(x, x, gamma=1.0, lam=1.0)] == [size, size]
    assert mmfast.masked_whiten(x).shape == size
    for loss, stats in (mmfast.ppo_policy_loss(x, x, x), mmfast.ppo_value_loss(x, x, x)):
        assert loss == 0
        assert all(s == 0 for s in stats.values())
        assert torch.autograd.grad(loss, x)[0].shape == size


@pytest.mark.reduced
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_masked(device, dtype):
    """0 with gradient 0, though everything outside the mask is NaN."""
    x = torch.full((3, 7), math.nan, device=device, dtype=dtype, requires_grad=True)
    mask = torch.zeros(3, 7, dtype=torch.bool, device=device)
    for loss, stats in (
        mmfast.ppo_policy_loss(x, x, x, mask=mask, weights=x, ref_logp=x, kl_coef=1.0, dual_clip=3.0),
        mmfast.ppo_value_loss(x, x, x, mask=mask),
    ):
        assert loss == 0
        assert all(s == 0 for s in stats.values())
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
    assert (mmfast.masked_whiten(x, mask) == 0).all()
    assert all((t == 0).all() for t in mmfast.gae(x, x, gamma=1.0, lam=1.0, mask=mask))


def test_what_stands_outside_the_mask_does_not_matter(device):
    tensors = rollout((9, 60), device)
    mask = some((9, 60), device)
    other = [torch.where(mask, t, bad) for t, bad in zip(tensors, (math.nan, math.inf, -math.inf, math.nan, 1e30), strict=True)]

    def run(logp, old, advantages, weights, ref):
        leaf = logp.clone().requires_grad_()
        loss, stats = mmfast.ppo_policy_loss(leaf, old, advantages, mask=mask, weights=weights, ref_logp=ref, kl_coef=0.1)
        value_loss, _ = mmfast.ppo_value_loss(leaf, old, advantages, mask=mask)
        return loss, *stats.values(), value_loss, torch.autograd.grad(loss + value_loss, leaf)[0], mmfast.masked_whiten(old, mask)

    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), run(*other), strict=True))


@pytest.mark.parametrize("change", [-2000.0, -700.0, -100.0, -1e-6, 0.0, 1e-9, 100.0, 700.0, 2000.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 3.0])
def test_extreme_ratios(device, isa_or_default, change, advantage):
    """The clip decides where it should, 0 stays 0, and what is infinite is so in the unclipped direction alone."""
    t = lambda v: torch.tensor([v], dtype=torch.float64, device=device)  # noqa: E731
    logp = t(change).requires_grad_()
    loss, stats = mmfast.ppo_policy_loss(logp, t(0.0), t(advantage))
    (grad,) = torch.autograd.grad(loss, logp)
    ratio = math.exp(change) if change < 709 else math.inf
    held = min(max(ratio, 0.8), 1.2)
    plain, clipped = (ratio * advantage, held * advantage) if advantage else (0.0, 0.0)
    assert loss.item() == pytest.approx(-min(plain, clipped), rel=1e-12, abs=1e-300)
    assert grad.item() == pytest.approx(-plain if plain <= clipped else 0.0, rel=1e-12, abs=1e-300)
    assert stats["clip_fraction"].item() == (plain > clipped)
    excess = change**2 / 2 if abs(change) < 0.1 else ratio - 1 - change
    assert stats["approx_kl"].item() == pytest.approx(excess, rel=1e-6, abs=0)
    bounded, _ = mmfast.ppo_policy_loss(logp, t(0.0), t(advantage), dual_clip=3.0)
    assert bounded.item() == pytest.approx(min(-min(plain, clipped), 6.0) if advantage < 0 else -min(plain, clipped), rel=1e-12, abs=1e-300)


@pytest.fixture(params=["default", "baseline", "avx2", "avx512"])
def isa_or_default(request):
    if request.param != "default":
        if request.param not in mmfast.build_info()["cpu_isas"]:
            pytest.skip(f"this machine or build has no {request.param} kernels")
        mmfast.ops.library.force_cpu_isa(request.param)
    yield
    mmfast.ops.library.force_cpu_isa("auto")


@pytest.mark.parametrize("d", [1e-12, 1e-8, 1e-4, 0.1, 0.34, 0.35, 1.0, 30.0])
def test_k3_of_nearly_equal_policies(device, d):
    """e^-d - 1 + d is d^2 / 2 there, which exp(-d) - 1 + d would lose in rounding."""
    for sign in (-1, 1):
        logp = torch.tensor([sign * d], dtype=torch.float64, device=device, requires_grad=True)
        ref = torch.zeros_like(logp)
        loss, stats = mmfast.ppo_policy_loss(logp, logp, ref, ref_logp=ref, kl_coef=1.0)
        series = sum((-sign * d) ** k / math.factorial(k) for k in range(2, 25))
        exact = series if d < 2 else math.expm1(-sign * d) + sign * d
        assert loss.item() == pytest.approx(exact, rel=1e-13, abs=0)
        assert stats["ref_kl"].item() == pytest.approx(exact, rel=1e-13, abs=0)
        assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(-math.expm1(-sign * d), rel=1e-13, abs=0)


def test_nan_shows(device):
    """Inside the mask nothing is hidden: training that diverges must show."""
    logp, old, advantages, _, _ = rollout((3, 200), device)
    logp[1, 150] = math.nan
    assert mmfast.ppo_policy_loss(logp, old, advantages)[0].isnan()
    assert mmfast.ppo_value_loss(logp, old, advantages)[0].isnan()
    assert mmfast.masked_whiten(logp).isnan().all()
    advantages, _ = mmfast.gae(logp, old, gamma=1.0, lam=1.0)
    assert advantages[1, :151].isnan().all()
    assert advantages[1, 151:].isfinite().all()
    assert advantages[[0, 2]].isfinite().all()


def test_whitening_of_a_large_mean(device):
    """The variance is what is left of the mean: raw squares would lose it."""
    x = torch.randn(3, 3000, dtype=torch.float64, device=device) * 1e-3 + 1e6
    mask = some((3, 3000), device)
    check_close(mmfast.masked_whiten(x, mask, eps=0.0), ppo.masked_whiten_ref(x, mask, eps=0.0), floor=1e-6)
    constant = torch.full((5, 5), 7.25, device=device)
    assert (mmfast.masked_whiten(constant) == 0).all()
    assert (mmfast.masked_whiten(constant, semantics="llava_rlhf") == 0).all()
    assert (mmfast.masked_whiten(constant, shift_mean=False) == 7.25).all()
    assert mmfast.masked_whiten(constant[:1, :1]).item() == 0


def test_long_sequences(device):
    """100,000 columns without decay: rounding does not pile up, since all arithmetic is float64."""
    rewards, values = torch.randn(2, 100_000, device=device), torch.randn(2, 100_000, device=device)
    advantages, returns = mmfast.gae(rewards, values, gamma=1.0, lam=1.0)
    check_close(returns, rewards.double().flip(-1).cumsum(-1).flip(-1))
    check_close(advantages, rewards.double().flip(-1).cumsum(-1).flip(-1) - values.double())


def test_threads_do_not_change_results():
    tensors, mask = rollout((40, 700), "cpu"), some((40, 700), "cpu")

    def run():
        leaf = tensors[0].clone().requires_grad_()
        loss, stats = mmfast.ppo_policy_loss(leaf, *tensors[1:3], mask=mask, ref_logp=tensors[4], kl_coef=0.1)
        targets = mmfast.gae(tensors[2], tensors[0], gamma=1.0, lam=0.95, mask=mask)
        return loss, *stats.values(), torch.autograd.grad(loss, leaf)[0], *targets, mmfast.masked_whiten(targets[0], mask)

    many, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


# --------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.5}, *({"kl_kind": kind, "kl_coef": 0.5} for kind in KL_KINDS)], ids=str)
def test_gradcheck(options):
    logp, old, advantages, weights, ref = rollout((4, 9), "cpu", torch.float64)
    mask = some((4, 9), "cpu")
    extra = {"ref_logp": ref} if "kl_kind" in options else {}
    policy = lambda t: mmfast.ppo_policy_loss(t, old, advantages, mask=mask, weights=weights, **extra, **options)[0]  # noqa: E731
    assert torch.autograd.gradcheck(policy, (logp.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda t: mmfast.ppo_value_loss(t, old, advantages, mask=mask)[0], (logp,))


def test_clipped_tokens_have_no_gradient(device):
    t = lambda *v: torch.tensor(v, device=device, dtype=torch.float64)  # noqa: E731
    logp = t(0.5, -0.5, 0.5, -0.5, 0.1).requires_grad_()
    loss, stats = mmfast.ppo_policy_loss(logp, t(0.0, 0.0, 0.0, 0.0, 0.0), t(1.0, 1.0, -1.0, -1.0, 1.0))
    (grad,) = torch.autograd.grad(loss, logp)
    close(grad, (0.0, -math.exp(-0.5) / 5, math.exp(0.5) / 5, 0.0, -math.exp(0.1) / 5), 1e-12)
    assert stats["clip_fraction"].item() == pytest.approx(0.4)


def test_targets_are_constants(device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    assert not any(t.requires_grad for t in mmfast.gae(x, x, gamma=1.0, lam=1.0))
    assert not mmfast.masked_whiten(x).requires_grad
    assert not mmfast.token_rewards(x[:, 0], x, x, kl_coef=0.1).requires_grad
    y = x.detach().clone().requires_grad_()
    loss, _ = mmfast.ppo_policy_loss(y, x, x)
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None
    (grad,) = torch.autograd.grad(mmfast.ppo_policy_loss(y, x, x)[0], y, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_one_number_clips_both_sides():
    new, old, advantages = (torch.randn(3, 5) for _ in range(3))
    both, one = (mmfast.ppo_policy_loss(new, old, advantages, clip=c)[0] for c in ((0.3, 0.3), 0.3))
    assert both.item() == one.item()
    with pytest.raises(ValueError, match="expected clip >= 0 on both sides"):
        mmfast.ppo_policy_loss(new, old, advantages, clip=(0.2,))


# ------------------------------------------------------------------------------------------------------------ registration


def test_registration(device):
    logp, old, advantages, weights, ref = rollout((4, 9), device)
    mask, ops = some((4, 9), device), torch.ops.mmfast
    check_registration(ops.gae.default, (old, advantages, mask, mask, advantages[:, 0].contiguous(), 0.99, 0.95))
    check_registration(ops.gae.default, (old, advantages.double(), None, None, None, 0.99, 0.95))
    check_registration(ops.masked_whiten.default, (old, mask, True, 1e-8, True, False))
    logp.requires_grad_()
    check_registration(ops.ppo_policy_loss.default, (logp, old, advantages, mask, weights, ref, 0.2, 0.2, 3.0, 0.1, 4))
    check_registration(ops.ppo_policy_loss.default, (logp, old, advantages, None, None, None, 0.2, 0.2, math.inf, 0.0, 0))
    check_registration(ops.ppo_value_loss.default, (logp, old, advantages, mask, 0.2))


def test_compile_full_graph_with_dynamic_shapes(device):
    def update(logp, old, ref, scores, values, mask):
        rewards = mmfast.token_rewards(scores, old, ref, kl_coef=0.1, mask=mask)
        advantages, returns = mmfast.gae(rewards, values, gamma=1.0, lam=0.95, mask=mask)
        policy, stats = mmfast.ppo_policy_loss(logp, old, mmfast.masked_whiten(advantages, mask), mask=mask, ref_logp=ref, kl_coef=0.1)
        value, _ = mmfast.ppo_value_loss(logp * 2, values, returns, mask=mask)
        return policy + 0.1 * value, stats["approx_kl"]

    compiled = torch.compile(update, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((4, 9), (5, 40), (2, 130)):
        logp, old, values, _, ref = rollout(size, device)
        rest = old, ref, torch.randn(size[0], device=device), values, some(size, device)
        logp.requires_grad_()
        plain, kl = update(logp, *rest)
        (grad,) = torch.autograd.grad(plain, logp)
        fused, fused_kl = compiled(logp, *rest)
        torch.testing.assert_close(fused, plain)
        torch.testing.assert_close(fused_kl, kl)
        torch.testing.assert_close(torch.autograd.grad(fused, logp)[0], grad)


def test_registered_rule_and_eager_rule_agree():
    logp, old, advantages, _, _ = rollout((4, 9), "cpu")
    logp.requires_grad_()
    loss, *_ = torch.ops.mmfast.ppo_policy_loss(logp, old, advantages, None, None, None, 0.2, 0.2, math.inf, 0.0, 0)
    expected = torch.autograd.grad(mmfast.ppo_policy_loss(logp, old, advantages)[0], logp)[0]
    assert torch.equal(torch.autograd.grad(loss, logp)[0], expected)


# --------------------------------------------------------------------------------------------------------------- bad input

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmfast.gae(X[0], X[0], gamma=1.0, lam=1.0), RuntimeError, r"gae: expected rewards \[B, T\], got \[3\]"),
        (lambda: mmfast.gae(X, X.T, gamma=1.0, lam=1.0), RuntimeError, r"gae: expected values \[2, 3\] like rewards, got \[3, 2\]"),
        (lambda: mmfast.gae(X, X, gamma=1.0, lam=1.0, bootstrap=X[0]), RuntimeError, r"gae: expected bootstrap \[B=2\], got \[3\]"),
        (lambda: mmfast.gae(X.long(), X, gamma=1.0, lam=1.0), RuntimeError, r"gae: expected rewards of type float32.* got Long"),
        (lambda: mmfast.masked_whiten(X, X[0] > 0), RuntimeError, r"masked_whiten: expected mask \[2, 3\] like x, got \[3\]"),
        (lambda: mmfast.masked_whiten(X, eps=-1.0), RuntimeError, r"masked_whiten: expected eps >= 0, got -1"),
        (lambda: mmfast.masked_whiten(X, semantics="trl"), ValueError, r"unknown semantics 'trl', expected one of 'masked', 'llava_rlhf'"),
        (lambda: mmfast.ppo_policy_loss(X, X, X[0]), RuntimeError, r"ppo_policy_loss: expected advantages \[2, 3\] like logp, got \[3\]"),
        (lambda: mmfast.ppo_policy_loss(X, X, X, mask=X[:1] > 0), RuntimeError, r"expected mask \[2, 3\] like logp, got \[1, 3\]"),
        (lambda: mmfast.ppo_policy_loss(X, X, X, weights=X.T), RuntimeError, r"expected weights \[2, 3\] like logp, got \[3, 2\]"),
        (lambda: mmfast.ppo_policy_loss(X, X, X, ref_logp=X, kl_kind="k4"), ValueError, r"unknown kl_kind 'k4', expected one of 'k1', "),
        (lambda: mmfast.ppo_policy_loss(X, X, X, clip=(-0.1, 0.2)), ValueError, r"clip >= 0 on both sides .* got clip \(-0.1, 0.2\)"),
        (lambda: mmfast.ppo_policy_loss(X, X, X, dual_clip=0.5), ValueError, r"dual_clip >= 1, got .* dual_clip 0.5"),
        (lambda: mmfast.ppo_value_loss(X, X, X, clip=-1.0), ValueError, r"ppo_value_loss: expected clip >= 0, got -1.0"),
        (lambda: mmfast.ppo_value_loss(X, X, X.T), RuntimeError, r"ppo_value_loss: expected returns \[2, 3\] like values, got \[3, 2\]"),
        (lambda: mmfast.token_rewards(X[0], X, X, kl_coef=0.1), ValueError, r"expected scores \[B\].* got \[3\], \[2, 3\], \[2, 3\]"),
    ],
)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
