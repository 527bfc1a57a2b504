"""Sums over segments and pair losses against plain PyTorch in float64: types, orders, awkward sizes, gradients, registration.

Worked values are in tests/losses/test_worked_values.py.
"""

import math

import pytest
import torch
from check_op import check_close, check_gradients, check_registration

import mmfast
from mmfast.ops.preference import LOSS_TYPES, preference_loss, preference_loss_ref, segment_logp, segment_logp_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NORMS = ["none", "count", "weight"]
# N tokens, S sequences, how the ids lie.
SIZES = [
    (1, 1, "rows"),
    (7, 3, "rows"),
    (1000, 5, "rows"),
    (1000, 5, "shuffled"),
    (130, 40, "shuffled"),
    (300, 300, "shuffled"),
    (513, 2, "waves"),
]


def tokens(n, s, order, dtype=torch.float32, device="cpu"):
    """Log-probabilities, ids with some tokens in no sequence, weights."""
    ids = torch.arange(n) * s // n if order == "rows" else torch.arange(n) % s if order == "waves" else torch.randint(0, s, (n,))
    ids[torch.rand(n) < 0.3] = -1
    logp, weights = -3 * torch.rand(n), 0.5 + torch.rand(n)
    return logp.to(device, dtype), ids.to(device), weights.to(device, dtype)


# -------------------------------------------------------------------------------------------------------- sums over segments


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_segment_values_and_gradients(device, dtype, size, norm):
    logp, ids, weights = tokens(*size, dtype, device)
    options = dict(norm=norm, num_segments=size[1] + 2)  # the last two have no tokens
    for w in (None, weights):
        got = segment_logp(logp, ids, token_weights=w, **options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (got[-2:] == 0).all()
        want = segment_logp_ref(logp.double(), ids, token_weights=None if w is None else w.double(), **options)
        check_close(got, want, floor=1e-13 if dtype == torch.float64 else 1e-7)  # float64 inside
        assert torch.equal(got, segment_logp(logp, ids, token_weights=w, **options))
    if size[0] > 1:  # a single token's weighted mean does not depend on its weight
        check_gradients(
            lambda x, w: segment_logp(x, ids, token_weights=w, **options),
            lambda x, w: segment_logp_ref(x, ids, token_weights=w, **options),
            [logp, weights],
        )
    check_gradients(lambda x: segment_logp(x, ids, **options), lambda x: segment_logp_ref(x, ids, **options), [logp])


@pytest.mark.reduced
@pytest.mark.parametrize("norm", NORMS)
def test_phrases_inside_sequences(device, norm):
    logp, ids, weights = tokens(200, 4, "rows", device=device)
    phrases = torch.randint(-1, 3, (200,), device=device)
    options = dict(token_weights=weights, norm=norm)
    got = segment_logp(logp, ids, segment_ids=phrases, segments_per_sequence=5, num_segments=4, **options)
    want = [segment_logp_ref(logp, torch.where(phrases == k, ids, -1), num_segments=4, **options) for k in range(5)]
    torch.testing.assert_close(got, torch.stack(want, 1))
    torch.testing.assert_close(got, segment_logp_ref(logp, ids, segment_ids=phrases, segments_per_sequence=5, num_segments=4, **options))
    assert segment_logp(logp, ids, segment_ids=phrases, **options).shape == (4, 3)


@pytest.mark.reduced
def test_segment_layouts(device):
    """Strided and expanded inputs, more than one dimension, types that differ."""
    logp, weights = torch.randn(6, 10, device=device)[::2, 1:9:2], torch.rand(4, 3, device=device, dtype=torch.float64).T
    ids = torch.arange(3, device=device)[:, None].expand(3, 4)
    want = (logp.double() * weights).sum(1)
    torch.testing.assert_close(segment_logp(logp, ids, token_weights=weights), want.float())
    torch.testing.assert_close(segment_logp(logp.bfloat16(), ids).double(), logp.bfloat16().double().sum(1), rtol=1e-6, atol=1e-6)
    leaf = logp.clone().requires_grad_()
    (grad,) = torch.autograd.grad(segment_logp(leaf.T, ids.T).sum(), leaf)
    assert (grad == 1).all()


def test_segments_by_hand(device):
    logp = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], device=device)
    ids = torch.tensor([[-1, 0, 0], [1, 1, -1]], device=device)
    weights = torch.tensor([[9.0, 5.0, 1.0], [1.0, 0.5, 9.0]], device=device)
    assert segment_logp(logp, ids).tolist() == [-6, -24]
    assert segment_logp(logp, ids, token_weights=weights).tolist() == [-14, -16]
    assert segment_logp(logp, ids, token_weights=weights, norm="weight").tolist() == pytest.approx([-14 / 6, -16 / 1.5])
    assert segment_logp(logp, ids, num_segments=4).tolist() == [-6, -24, 0, 0]


@pytest.mark.reduced
def test_tokens_of_no_sequence_are_not_read(device):
    """Prompt and padding positions may hold anything, and get gradient 0."""
    logp, ids, weights = tokens(300, 4, "shuffled", device=device)
    dirty, dirty_weights = (torch.where(ids < 0, math.nan, x).requires_grad_() for x in (logp, weights))
    for norm in NORMS:
        got = segment_logp(dirty, ids, token_weights=dirty_weights, norm=norm)
        torch.testing.assert_close(got, segment_logp_ref(logp, ids, token_weights=weights, norm=norm))
        for grad in torch.autograd.grad(got.sum(), (dirty, dirty_weights)):
            assert (grad[ids < 0] == 0).all()
            assert grad.isfinite().all()


def test_half_precision_sums(device):
    logp = torch.full((600,), -1.0, dtype=torch.bfloat16, device=device)  # a bf16 running sum sticks at -256
    assert segment_logp(logp, torch.zeros(600, dtype=torch.long, device=device)).item() == -600


@pytest.mark.reduced
def test_weights_that_cancel(device):
    """A norm of 0 gives 0 and no gradient, not infinity."""
    logp = torch.tensor([-1.0, -2.0], device=device, requires_grad=True)
    weights = torch.tensor([1.0, -1.0], device=device)
    value = segment_logp(logp, torch.zeros(2, dtype=torch.long, device=device), token_weights=weights, norm="weight")
    assert value.item() == 0
    assert not torch.autograd.grad(value.sum(), logp)[0].any()


@pytest.mark.reduced
def test_ids_that_are_too_large(device):
    logp, ids = torch.tensor([-1.0, -2.0, -4.0], device=device), torch.tensor([0, 3, 1], device=device)
    phrases = torch.tensor([0, 0, 7], device=device)
    if device == "cuda":
        assert segment_logp(logp, ids, num_segments=2).tolist() == [-1, -4]
        assert segment_logp(logp, ids, segment_ids=phrases, num_segments=4, segments_per_sequence=1).tolist() == [[-1], [0], [0], [-2]]
        return
    with pytest.raises(RuntimeError, match="token 1 belongs to sequence 3, segment 0; expected ids below 2 and 1"):
        segment_logp(logp, ids, num_segments=2)
    with pytest.raises(RuntimeError, match="token 2 belongs to sequence 1, segment 7; expected ids below 4 and 3"):
        segment_logp(logp, ids, segment_ids=phrases, num_segments=4, segments_per_sequence=3)


@pytest.mark.reduced
def test_empty(device):
    nothing, no_ids = torch.empty(0, device=device, requires_grad=True), torch.empty(0, dtype=torch.long, device=device)
    assert segment_logp(nothing, no_ids).shape == (0,)
    assert segment_logp(nothing, no_ids, num_segments=3).tolist() == [0, 0, 0]
    assert segment_logp(torch.ones(4, device=device), -torch.ones(4, dtype=torch.long, device=device)).shape == (0,)
    for name in LOSS_TYPES:
        lens = dict(chosen_lens=nothing.detach(), rejected_lens=nothing.detach())
        loss, won, lost = preference_loss(nothing, nothing, loss_type=name, **lens)
        assert loss.item() == 0
        assert won.shape == lost.shape == (0,)
        torch.autograd.grad(loss, nothing)


def test_threads_do_not_change_results():
    logp, ids, weights = tokens(50000, 7, "shuffled")
    pairs = torch.randn(2, 5000, requires_grad=True)

    def run():
        x = logp.clone().requires_grad_()
        sums, loss = segment_logp(x, ids, token_weights=weights), preference_loss(*pairs, reduction="none")[0]
        return sums, *torch.autograd.grad(sums.square().sum(), x), loss, *torch.autograd.grad(loss.sum(), pairs)

    many, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


# -------------------------------------------------------------------------------------------------------------- pair losses

DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
HAS_MARGIN = ("sigmoid", "bco_pair", "sigmoid_norm", "simpo", "cpo", "kto", "anchor")
NO_REFERENCE = ("simpo", "cpo", "orpo")
BATCHWISE = ("aot", "aot_unpaired", "kto")


def case(name, p, dtype=torch.float32, device="cpu"):
    """Log-probability sums of answers of 5 to 20 tokens, and every option that the loss takes."""
    lens = [torch.randint(5, 21, (p,)) for _ in range(2)]
    policy = [-(0.5 + torch.rand(p)) * n for n in lens]
    reference = [x + 2 * torch.randn(p) for x in policy]
    options = dict(loss_type=name, beta=0.3, chosen_lens=lens[0].to(device), rejected_lens=lens[1].to(device))
    if name in NO_REFERENCE:
        reference = [None, None]
    if name in HAS_MARGIN:
        options["margin"] = torch.rand(1 if name == "kto" else p).to(device, dtype)
    if name in ("sigmoid", "exo_pair", "robust", "aot", "simpo"):
        options["label_smoothing"] = 0.15
    if name not in (*BATCHWISE, "sft", "anchor"):
        options["rejected_scale"] = (1 + 2 * torch.rand(p)).to(device)
    if name not in BATCHWISE:
        options["pair_weights"] = torch.rand(p).to(device)
    if name == "kto":
        options |= dict(desirable_weight=1.1, undesirable_weight=0.8)
    return [x if x is None else x.to(device, dtype) for x in (*policy, *reference)], options


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_pair_values_and_gradients(device, name, dtype, divergence):
    if name in NO_REFERENCE and divergence != "reverse_kl":
        pytest.skip(f"{name} has no reference to diverge from")
    for p in (1, 37):
        (chosen, rejected, *reference), options = case(name, p, dtype, device)
        options |= dict(f_divergence_type=divergence, f_alpha_divergence_coef=0.6, reduction="none")
        got = preference_loss(chosen, rejected, *reference, **options)
        want = preference_loss_ref(*(x if x is None else x.double() for x in (chosen, rejected, *reference)), **options)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            check_close(g, w, floor=1e-12 if dtype == torch.float64 else 2e-7)
        rest = [None if x is None else x.double() for x in reference]
        check_gradients(
            lambda x, y: preference_loss(x, y, *reference, **options)[0],
            lambda x, y: preference_loss_ref(x, y, *(rest if x.dtype == torch.float64 else reference), **options)[0],
            [chosen, rejected],
            floor=1e-14 if dtype == torch.float64 else None,
        )


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradcheck(name):
    (chosen, rejected, *reference), options = case(name, 5, torch.float64)
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    for divergence in DIVERGENCES if reference[0] is not None else DIVERGENCES[:1]:
        assert torch.autograd.gradcheck(lambda x, y: preference_loss(x, y, *reference, f_divergence_type=divergence, **options)[0], leaves)


def test_gradcheck_of_sums():
    logp, ids, weights = tokens(20, 3, "shuffled", torch.float64)
    phrases = torch.randint(-1, 2, (20,))
    for norm in NORMS:
        for segments in (None, phrases):
            assert torch.autograd.gradcheck(
                lambda x, w: segment_logp(x, ids, token_weights=w, segment_ids=segments, norm=norm),
                (logp.requires_grad_(), weights.requires_grad_()),
            )


@pytest.mark.reduced
def test_pair_layouts(device):
    """Halves of one tensor, strided and expanded columns, any shape, types that differ."""
    both = torch.randn(12, device=device)
    torch.testing.assert_close(preference_loss(*both.chunk(2))[0], preference_loss_ref(*both.chunk(2))[0])
    grid = torch.randn(4, 6, device=device)
    chosen, rejected, reference = grid[:, ::2], grid.T[1:6:2].T.double(), torch.zeros(1, 1, device=device, dtype=torch.float16).expand(4, 3)
    got, won, _ = preference_loss(chosen, rejected, reference, reference, reduction="none")
    assert got.shape == won.shape == (4, 3)
    torch.testing.assert_close(got, preference_loss_ref(chosen.double(), rejected, reduction="none")[0].float())


def test_the_mean_over_pairs_is_that_of_single_pairs(device):
    """All losses but those that look at the batch."""
    for name in LOSS_TYPES:
        if name in (*BATCHWISE, "sft"):
            continue
        (chosen, rejected, *reference), options = case(name, 2, torch.float64, device)

        def part(i, values, options):
            cut = [x if x is None else x[i : i + 1] for x in values]
            return preference_loss(*cut, **{k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in options.items()})[0]

        values = (chosen, rejected, *reference)
        whole = preference_loss(*values, **options)[0]
        torch.testing.assert_close(whole, (part(0, values, options) + part(1, values, options)) / 2)


def test_losses_of_log_ratios_ignore_the_divergence(device):
    for name in ("aot", "aot_unpaired", "apo_zero"):
        values, options = case(name, 7, torch.float64, device)
        plain, other = (preference_loss(*values, f_divergence_type=f, **options)[0] for f in ("reverse_kl", "forward_kl"))
        assert torch.equal(plain, other)


def test_upstream_gradients_and_frozen_sides(device):
    (chosen, rejected, *reference), _ = case("sigmoid", 6, torch.float64, device)
    upstream = torch.randn(6, dtype=torch.float64, device=device)
    leaf = chosen.clone().requires_grad_()
    frozen = reference[0].clone().requires_grad_()
    loss, won, lost = preference_loss(leaf, rejected, frozen, reference[1], reduction="none")
    assert not won.requires_grad
    assert not lost.requires_grad
    grad, to_reference = torch.autograd.grad(loss, (leaf, frozen), upstream, allow_unused=True)
    assert to_reference is None
    plain = chosen.clone().requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(preference_loss_ref(plain, rejected, *reference, reduction="none")[0], plain, upstream)[0]
    )


def test_second_derivatives_of_sums_are_refused():
    logp = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(segment_logp(logp, torch.tensor([0, 0, 1, 1, 1])).square().sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="segment_logp: it has first derivatives only"):
        grad.square().sum().backward()


def test_second_derivatives_are_refused():
    chosen, rejected = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(preference_loss(chosen, rejected)[0], chosen, create_graph=True)


# ----------------------------------------------------------------------------------------------------------- registration


def test_registration(device):
    logp, ids, weights = tokens(30, 4, "shuffled", device=device)
    phrases, ops = torch.randint(-1, 2, (30,), device=device), torch.ops.mmfast
    logp, weights = logp.requires_grad_(), weights.requires_grad_()
    check_registration(ops.segment_logp.default, (logp, ids, None, None, 4, 1, 0))
    check_registration(ops.segment_logp.default, (logp, ids, phrases, weights, 4, 2, 2))
    values, norms = (x.detach() for x in ops.segment_logp(logp, ids, phrases, weights, 4, 2, 2))
    rest = ids, phrases, weights.detach(), values, norms, 2
    for need in ((True, True), (True, False), (False, True)):
        check_registration(ops.segment_logp_backward.default, (torch.rand_like(values), logp.detach(), *rest, *need))
    chosen, rejected = (torch.randn(5, device=device, requires_grad=True) for _ in range(2))
    column = torch.rand(5, device=device) + 1
    settings = 0, 0.5, 0.1, 0.1, 0.05
    check_registration(ops.preference_pairs.default, (chosen, rejected, *(None,) * 6, 0, *settings))
    check_registration(ops.preference_pairs.default, (chosen, rejected, *(column,) * 5, column[:1], 2, *settings))
    check_registration(ops.preference_pairs.default, (chosen, None, column, *(None,) * 5, 12, *settings))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "kto", "simpo"])
def test_compile_full_graph_with_dynamic_shapes(device, name):
    def step(logp, weights, ids, count):
        chosen, rejected = segment_logp(logp, ids, token_weights=weights, num_segments=count, norm="count").chunk(2)
        lens = torch.ones_like(chosen)
        loss, won, lost = preference_loss(chosen, rejected, loss_type=name, chosen_lens=lens, rejected_lens=lens)
        return loss, won - lost

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, s in ((20, 4), (33, 6), (70, 10)):
        logp, ids, weights = tokens(n, s, "shuffled", device=device)
        logp, weights = logp.requires_grad_(), weights.requires_grad_()
        plain, compiled_loss = step(logp, weights, ids, s), compiled(logp, weights, ids, s)
        torch.testing.assert_close(compiled_loss, plain)
        torch.testing.assert_close(torch.autograd.grad(compiled_loss[0], (logp, weights)), torch.autograd.grad(plain[0], (logp, weights)))


def test_autocast():
    logp, ids, _ = tokens(40, 4, "rows")
    leaf = logp.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = preference_loss(*segment_logp(leaf.bfloat16(), ids).chunk(2))[0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert leaf.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- bad input

TWO = torch.zeros(2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sigmoit"}, r"unknown loss_type 'sigmoit'; did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid", "bco_pairs"]}, r"unknown loss_type 'bco_pairs'; did you mean 'bco_pair'"),
        ({"loss_type": "zzz"}, r"unknown loss_type 'zzz', expected one of sigmoid, hinge"),
        ({"f_divergence_type": "reverse"}, r"unknown f_divergence_type 'reverse'"),
        ({"reduction": "sum"}, r"unknown reduction 'sum', expected one of mean, none"),
        ({"label_smoothing": 0.5}, r"0 <= label_smoothing < 0.5, got 0.5"),
        ({"beta": 0.0}, r"beta > 0, got 0.0"),
        ({"ref_chosen": TWO}, r"both ref_chosen and ref_rejected"),
        ({"rejected": torch.zeros(3)}, r"chosen and rejected \[P\] alike, got \[2\] and \[3\]"),
        ({"rejected": None}, r"sigmoid compares pairs"),
        ({"loss_type": "simpo"}, r"simpo divides by the answers' lengths: give chosen_lens and rejected_lens"),
        ({"loss_type": "sft"}, r"sft divides"),
        ({"loss_type": "cpo", "ref_chosen": TWO, "ref_rejected": TWO}, r"cpo has no reference"),
        ({"loss_type": "cpo", "f_divergence_type": "forward_kl"}, r"cpo has no reference, so no forward_kl"),
        ({"loss_type": "hinge", "margin": 0.1}, r"hinge has no margin"),
        ({"loss_type": "aot", "pair_weights": TWO}, r"aot has no pairs for pair_weights"),
        ({"loss_type": "kto", "rejected_scale": TWO}, r"kto has no use for rejected_scale"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, r"a weight for each loss_type, got 1 for 2"),
        ({"loss_type": ["sigmoid", "kto"], "reduction": "none"}, r"kto has a loss for each answer"),
    ],
)
def test_what_cannot_be_says_so(options, words):
    with pytest.raises(ValueError, match=rf"preference_loss: .*{words}"):
        preference_loss(**{"chosen": TWO, "rejected": TWO, **options})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: segment_logp(TWO, torch.zeros(3, dtype=torch.long)), r"segment_logp: expected seq_ids \[2\] like logp, got \[3\]"),
        (lambda: segment_logp(TWO, TWO, num_segments=1), r"expected seq_ids of type int64, got Float"),
        (
            lambda: segment_logp(TWO, torch.zeros(2).long(), token_weights=torch.ones(1)),
            r"expected token_weights \[2\] like logp, got \[1\]",
        ),
        (lambda: segment_logp(TWO.int(), torch.zeros(2).long()), r"expected logp of type float32.* got Int"),
        (
            lambda: preference_loss(TWO, TWO, TWO, torch.zeros(3)),
            r"preference_loss: expected ref_rejected \[2\] like its answers, got \[3\]",
        ),
        (lambda: preference_loss(TWO, TWO, pair_weights=torch.zeros(2, 1)), r"expected pair_weights \[2\] like chosen, got \[2, 1\]"),
        (lambda: preference_loss(TWO, TWO, margin=torch.zeros(3)), r"expected margin \[P=2\]"),
        (lambda: preference_loss(TWO.int(), TWO), r"expected chosen of type float32"),
    ],
)
def test_clear_errors(call, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        call()


def test_unknown_norm():
    with pytest.raises(ValueError, match=r"segment_logp: unknown norm 'counts'; did you mean 'count'"):
        mmfast.segment_logp(TWO, torch.zeros(2).long(), norm="counts")
