"""Losses and gradients worked out by hand, from token log-probabilities or logits to the scalar, and values that common slips give.

A table of pair losses on two sets of numbers, then one test a method. Everything runs in float64, held to 1e-9, and in float32, held to
1e-5 relative. Where a wrong value has been published or shipped, the test says that ours is not it.
"""

import math

import pytest
import torch
from worked import near, row

from mmfast.data.pairs import correction_weights, ranked_pairs
from mmfast.losses import (
    anchor,
    contrast,
    forward_kl,
    kto_margin,
    likelihood,
    phrase_contrast,
    preference_loss,
    segment_logp,
    strongest_alternative,
    wpo_weights,
)

# Log-probability sums (chosen, rejected, ref_chosen, ref_rejected): in A the policy leans the right way, in B the wrong one.
A, B = (-20, -24, -22, -23), (-24, -20, -22, -23)
LENS = (10, 12)
LN2 = math.log(2)


def pair(values, dtype, **options):
    """Loss and its gradients for chosen and rejected, of one pair."""
    chosen, rejected = (row(v, dtype=dtype, grad=True) for v in values[:2])
    ref_chosen, ref_rejected = (row(v, dtype=dtype) for v in values[2:]) if len(values) == 4 else (None, None)
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, **options)[0]
    grads = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    return loss.item(), *(0.0 if g is None else g.item() for g in grads)


def lens():
    return dict(chosen_lens=torch.tensor(LENS[:1]), rejected_lens=torch.tensor(LENS[1:]))


def deltas(chosen, rejected):
    """Log-ratios as values for ``pair``."""
    return chosen, rejected, 0.0, 0.0


# ------------------------------------------------------------------------------------------------- pair losses, TRL's names

# loss_type, options, (A: loss, d/dchosen, d/drejected), (B: ..)
PAIRS = [
    ("sigmoid", {}, (0.5543552444685271, -0.042555748319, 0.042555748319), (0.9740769841801067, -0.062245933120, 0.062245933120)),
    ("hinge", {}, (0.7, -0.1, 0.1), (1.5, -0.1, 0.1)),
    ("ipo", lens(), (22.246944444444445, -0.943333333333, 0.786111111111), (29.7025, -1.09, 0.908333333333)),
    ("exo_pair", {}, (2.25819919150928, -0.161507611894, 0.161507611894), (3.6373271420471958, -0.174061486835, 0.174061486835)),
    ("nca_pair", {}, (1.319406634109173, -0.017524900403, 0.023751040626), (1.5243859263066513, -0.032475099597, 0.028722125841)),
    ("robust", {"label_smoothing": 0.1}, (0.5168552444685272, -0.055055748319, 0.055055748319), (1.0365769841801067, -0.074745933120, 0.074745933120)),
    ("bco_pair", {}, (1.2425355294551625, -0.045016600269, 0.047502081252), (1.652494113850119, -0.054983399731, 0.057444251681)),
    ("sppo_hard", {}, (25.0, -6, 8), (113.0, -14, 16)),
    ("apo_zero", {}, (0.925186815208582, -0.024751657271, 0.024937604019), (1.124276514124137, -0.024751657271, 0.024445831169)),
    ("apo_down", {}, (0.9753914805008189, 0.000305826102, 0.024445831169), (1.0726253338893765, 0.001251286051, 0.023500371220)),
    ("discopop", {}, (0.7403571680088782, -0.073084044642, 0.073084044642), (0.9741076115928471, -0.062189340086, 0.062189340086)),
    ("sigmoid_norm", lens(), (0.6790808577591588, -0.004929171405, 0.004107642837), (0.7159002842054063, -0.005112481019, 0.004260400850)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "on_a", "on_b"), PAIRS, ids=[p[0] for p in PAIRS])
def test_pair_losses(name, options, on_a, on_b, dtype):
    # Gradients are written with twelve decimals.
    slack = 1e-12 if dtype == torch.float64 else 1e-8
    for values, want in ((A, on_a), (B, on_b)):
        got = pair(values, dtype, loss_type=name, **options)
        assert got[0] == near(want[0], dtype)
        assert got[1:] == pytest.approx(want[1:], rel=1e-9 if dtype == torch.float64 else 1e-5, abs=slack)


# options, loss on A, loss on B
VARIANTS = {
    "cDPO": (dict(label_smoothing=0.1), 0.5843552444685272, 0.9240769841801066),
    "bco, running mean .05": (dict(loss_type="bco_pair", margin=0.05), 1.2419140955790642, 1.6518788397576871),
    "forward KL": (dict(f_divergence_type="forward_kl"), 0.5723162894492977, None),
    "Jensen-Shannon": (dict(f_divergence_type="js_divergence"), 0.6355887005576846, None),
    "alpha .5": (dict(f_divergence_type="alpha_divergence"), 0.5732434456754528, None),
    "alpha 1 is reverse KL": (
        dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
        0.5543552444685271,
        0.9740769841801067,
    ),
    "CPO's contrast": (dict(loss_type="cpo", reference_free=True), 0.5130152523999526, None),
    "reference free": (dict(reference_free=True), 0.5130152523999526, None),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype):
    options, *wants = VARIANTS[name]
    for values, want in zip((A, B), wants, strict=True):
        if want is not None:
            assert pair(values, dtype, **options)[0] == near(want, dtype)


def test_divergence_scores(dtype):
    """f(2) and f(-1), seen through the slope of a hinge whose margin is far away: d loss / d chosen = -beta f'(a)."""
    slopes = {"forward_kl": (math.exp(-2), math.e), "js_divergence": (1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1)))}
    slopes["alpha_divergence"] = (math.exp(-1), math.exp(0.5))
    for name, (at_a, at_c) in slopes.items():
        assert pair(A, dtype, loss_type="hinge", f_divergence_type=name)[1:] == near((-0.1 * at_a, 0.1 * at_c), dtype)


def test_ipo_divides_by_the_lengths(dtype):
    ones = dict(chosen_lens=torch.ones(1), rejected_lens=torch.ones(1))
    assert pair(A, dtype, loss_type="ipo", **ones)[0] == near(4.0, dtype)  # sums taken for means
    with pytest.raises(ValueError, match="ipo divides by the answers' lengths"):
        pair(A, dtype, loss_type="ipo")


def test_alignment_by_optimal_transport(dtype):
    chosen, rejected, ref_chosen, ref_rejected = (row(*v, dtype=dtype) for v in ((-20, -30), (-24, -29), (-22, -31), (-23, -30)))
    batch = chosen, rejected, ref_chosen, ref_rejected
    assert preference_loss(*batch, loss_type="aot")[0].item() == near(0.6237512125142362, dtype)
    assert preference_loss(*batch, loss_type="aot_unpaired")[0].item() == near(0.6212677647275813, dtype)
    smooth = preference_loss(*batch, loss_type="aot", label_smoothing=0.1, reduction="none")[0]
    assert smooth.tolist() == near([0.6931471805599453, 0.5843552444685272], dtype)


def test_mixed_preference_optimisation(dtype):
    """MPO: .8 sigmoid + .2 bco + 1 sft; the chosen answer has 10 tokens, -20 in all."""
    mixed = pair(A, dtype, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], **lens())
    assert mixed[0] == near(0.8 * 0.5543552444685271 + 0.2 * 1.2425355294551625 + 2.0, dtype)
    assert mixed[1] == near(0.8 * -0.0425557483188341 + 0.2 * -0.045016600268752216 - 0.1, dtype)


def test_cpo_with_its_likelihood(dtype):
    assert pair(A[:2], dtype, loss_type=["cpo", "sft"], **lens())[0] == near(2.5130152523999527, dtype)


def test_simpo(dtype):
    means = dict(loss_type="simpo", chosen_lens=torch.tensor([10]), rejected_lens=torch.tensor([12]))
    for beta, want in ((2.0, 0.4740769841801067), (0.1, 0.9432489459974549)):  # means -1.5 and -2, gamma .5 not times beta
        assert pair((-15, -24), dtype, beta=beta, **means)[0] == near(want, dtype)
    assert pair((-15, -24), dtype, beta=0.1, **means)[0] != pytest.approx(LN2, rel=1e-3)  # gamma times beta
    _, won, lost = preference_loss(row(-15), row(-24), beta=0.1, **means)
    assert (won.item(), lost.item()) == pytest.approx((-0.15, -0.2))


def test_orpo(dtype):
    means = dict(loss_type="orpo", chosen_lens=torch.tensor([10]), rejected_lens=torch.tensor([12]))
    assert pair((-15, -24), dtype, **means)[0] == near(0.04349888068705395, dtype)
    assert 1.5 + pair((-15, -24), dtype, **means)[0] == near(1.543498880687054, dtype)
    assert pair((-20, -24), dtype, **means)[0] == near(0.1 * LN2, dtype)  # equal means
    # From the loss back to the odds.
    assert -math.log(math.expm1(pair((-15, -24), torch.float64, **means)[0] / 0.1)) == pytest.approx(0.6070690010565949, rel=1e-9)


def test_kto(dtype):
    """Two liked answers and one disliked; three pairs of answers and prompts that do not belong together."""
    z = kto_margin(row(0.3, -0.1, 0.4, dtype=dtype), torch.zeros(3, dtype=dtype))
    assert z.item() == near(0.2, dtype)
    assert kto_margin(row(-3.0), row(-1.0)).item() == 0
    chosen, rejected = row(2, 0.5, dtype=dtype, grad=True), row(-1, dtype=dtype, grad=True)
    sides = chosen, rejected, torch.zeros(2, dtype=dtype), torch.zeros(1, dtype=dtype)
    losses = preference_loss(*sides, loss_type="kto", margin=z, reduction="none")[0]
    assert losses.tolist() == near([0.4551211076264199, 0.4925005624493797, 0.47003594823542827], dtype)
    loss, won, lost = preference_loss(*sides, loss_type="kto", margin=z)
    assert loss.item() == near(0.4725525394370759, dtype)
    assert (won.tolist(), lost.tolist()) == (near([0.2, 0.05], dtype), near([-0.1], dtype))
    up, down = torch.autograd.grad(loss, (chosen, rejected))
    assert up[0].item() == near(-0.1 / 3 * 0.4551211076264199 * (1 - 0.4551211076264199), dtype)
    assert down[0].item() == near(0.1 / 3 * 0.47003594823542827 * (1 - 0.47003594823542827), dtype)
    weighed = preference_loss(*sides, loss_type="kto", margin=z, undesirable_weight=4 / 3, reduction="none")[0]
    assert weighed.tolist() == near([0.4551211076264199, 0.4925005624493797, 4 / 3 * 0.47003594823542827], dtype)


# ----------------------------------------------------------------------------------------------- token weights, pair weights


def test_length_desensitised(dtype):
    """LD-DPO: tokens past the shorter answer's length count less, under policy and reference alike."""
    policy, reference = row(-1, -2, -3, -4, -1.5, -2.5, dtype=dtype), row(-1.2, -2.1, -2.8, -4.4, -1.4, -2.2, dtype=dtype)
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    for alpha, want in ((1.0, 0.6491593390256101), (0.5, 0.6539469673175899), (0.0, 0.6587595555486971)):
        weights = row(1, 1, alpha, alpha, 1, 1, dtype=dtype)
        now, before = (segment_logp(x, ids, token_weights=weights).split(1) for x in (policy, reference))
        assert preference_loss(*now, *before)[0].item() == near(want, dtype)


def test_weighted_preference_optimisation(dtype):
    logits = torch.tensor([[2, 0, -1], [0, 1, 0], [1, 1, 0], [0.5, 0, 0]], dtype=dtype)
    labels, ids = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 1, 1])
    logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    square = (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)
    weights = wpo_weights(logp, square, ids)
    assert weights.log().tolist() == near([0.23058241415956146, -0.5768484080678349], dtype)
    weight = weights.prod()[None]
    assert weight.item() == near(0.7073243181219153, dtype)
    assert pair(A, dtype, pair_weights=weight)[0] == near(0.39210894529100865, dtype)


CHANGED = {  # tokens under policy and reference, and which of them were corrected
    "chosen": ((-0.5, -1, -2, -0.25), (-0.6, -1.1, -2.5, -0.25), (0, 0, 1, 0)),
    "rejected": ((-0.5, -1, -3, -1.5, -0.25), (-0.6, -1.1, -2.4, -1.3, -0.25), (0, 0, 1, 1, 0)),
}


@pytest.mark.parametrize(
    ("gamma", "norm", "beta", "sums", "want"),
    [
        (5, "weight", 0.5, (-1.46875, -1.8653846153846154, -1.80625, -1.5730769230769230), 0.548039930999711),  # the paper
        (1, "weight", 0.5, None, 0.6221142500963335),
        (1, "count", 0.5, None, 0.6221142500963335),
        (1.1, "none", 0.1, (-3.95, -6.70, -4.70, -6.02), 0.6242011305994324),  # the code
        (1.1, "weight", 0.1, None, 0.677585379037469),  # the code, averaging
    ],
)
def test_dense_weights_of_corrected_tokens(gamma, norm, beta, sums, want, dtype):
    """RLHF-V."""
    now, before, changed = (row(*(a + b), dtype=dtype) for a, b in zip(CHANGED["chosen"], CHANGED["rejected"], strict=True))
    ids, weights = torch.tensor([0] * 4 + [1] * 5), 1 + (gamma - 1) * changed
    found = correction_weights([1, 2, 30, 31, 4], [1, 2, 3, 4], gamma, min_match=1)  # so short that one shared token must do
    assert found[1] + found[0] == near(weights.tolist(), dtype)
    chosen, rejected = segment_logp(now, ids, token_weights=weights, norm=norm).split(1)
    ref_chosen, ref_rejected = segment_logp(before, ids, token_weights=weights, norm=norm).split(1)
    if sums is not None:
        assert [x.item() for x in (chosen, rejected, ref_chosen, ref_rejected)] == near(list(sums), dtype)
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)[0]
    assert loss.item() == near(want, dtype)


# ------------------------------------------------------------------------------------------------------------- the methods

R_W, R_L = 0.4, -0.3  # log-ratios of chosen and rejected


def test_sum_is_not_the_mean_over_tokens(dtype):
    """Three and four tokens: the sum gives .6588, a mean by length .6828."""
    assert pair(deltas(R_W, R_L), dtype)[0] == near(0.658759555548697, dtype)
    assert pair(deltas(R_W, R_L), dtype, beta=0.5) == near((0.533382155418777, -0.206691210541335, 0.206691210541335), dtype)
    logp, ids = row(0.1, 0.2, 0.1, -0.1, -0.05, -0.05, -0.1, dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert preference_loss(*segment_logp(logp, ids).split(1))[0].item() == near(0.658759555548697, dtype)
    assert preference_loss(*segment_logp(logp, ids, norm="count").split(1))[0].item() == near(0.682784766384383, dtype)


@pytest.mark.parametrize(
    ("alpha", "want", "to_chosen"),
    [
        (0, 0.658759555548697, -0.048250714233361),
        (1 / 1024, 0.660907993048697, -0.049227276733361),
        (0.05, 0.768759555548697, -0.098250714233361),
        (1, 2.858759555548697, -1.048250714233361),
    ],
)
def test_stic(alpha, want, to_chosen, dtype):
    """A contrast and a likelihood whose weight is per summed log-probability."""
    logp = row(-1.2, -0.7, -0.3, -0.9, -1.4, -0.6, -0.2, dtype=dtype)
    chosen, rejected = (x.requires_grad_() for x in segment_logp(logp, torch.tensor([0, 0, 0, 1, 1, 1, 1])).split(1))
    assert (chosen.item(), rejected.item()) == near((-2.2, -3.1), dtype)
    loss = contrast(chosen, rejected, row(-2.6, dtype=dtype), row(-2.8, dtype=dtype))[0] + alpha * likelihood(chosen)
    assert loss.item() == near(want, dtype)
    assert [g.item() for g in torch.autograd.grad(loss, (chosen, rejected))] == near([to_chosen, 0.048250714233361], dtype)


def label_sums(logits, ids):
    """Sum of the log-probabilities that rows of logits give to ids, as [1]."""
    logp = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    return segment_logp(logp, torch.zeros(len(ids), dtype=torch.long))


def test_rejected_text_is_scored_on_its_own_labels(dtype):
    """The strongest alternative to each rejected token scored in its place gives .6811, shipped as DPO by two projects."""
    policy = torch.tensor([[2, 0.5, -1, 0], [0.2, 1.5, 1, -0.5], [-0.3, 0.1, 0.4, 2.2]], dtype=dtype)
    reference = torch.tensor([[1.8, 0.7, -0.9, 0.1], [0.4, 1.1, 1.3, -0.4], [-0.2, 0.3, 0.2, 2]], dtype=dtype)
    for logits in (policy, reference):
        assert strongest_alternative(logits, torch.tensor([0, 2, 1])).tolist() == [1, 1, 3]
    for ids, sums, want in (
        ([0, 2, 1], (-3.957364017505260, -3.415564380004120), 0.647165522360424),
        ([1, 1, 3], (-2.857364017505259, -3.015564380004120), 0.681130280735412),  # not the labels: a value to be refused
    ):
        lost, ref = label_sums(policy, ids), label_sums(reference, ids)
        assert (lost.item(), ref.item()) == near(sums, dtype)
        assert contrast(row(R_W, dtype=dtype), lost, row(0, dtype=dtype), ref)[0].item() == near(want, dtype)


def test_povid(dtype):
    """Stage 2: half a contrast with the tokens that the noised image suggests, half with the rejected text."""

    def make(rows):
        return torch.tensor(rows, dtype=dtype)

    clean = make([[2, 0.5, -1, 0], [0.2, 1.5, 1, -0.5], [-0.3, 0.1, 0.4, 2.2]])
    noisy = make([[0.6, 1.1, -0.5, 0.2], [0.5, 0.8, 1.2, -0.2], [0.1, 0, 0.3, 1]])
    ref_clean = make([[1.7, 0.6, -0.9, 0.1], [0.3, 1.2, 0.9, -0.4], [-0.2, 0.3, 0.2, 2]])
    ref_noisy = make([[0.9, 0.8, -0.4, 0.3], [0.6, 0.7, 1, -0.1], [0.2, 0.1, 1.1, 0.9]])
    ids, ref_ids = noisy.argmax(-1).tolist(), ref_noisy.argmax(-1).tolist()
    assert (ids, ref_ids) == ([1, 2, 3], [0, 2, 2])
    chosen, ref_chosen = label_sums(clean, [0, 1, 3]), label_sums(ref_clean, [0, 1, 3])
    assert (chosen.item(), ref_chosen.item()) == near((-1.357364017505260, -1.707353520280588), dtype)
    text = contrast(chosen, row(-5.2, dtype=dtype), ref_chosen, row(-5.0, dtype=dtype))[0]
    assert text.item() == near(0.666025768341374, dtype)

    def total(n, ref_n):
        noised = contrast(chosen, n, ref_chosen, ref_n)[0]
        return n.item(), ref_n.item(), noised.item(), (0.5 * noised + 0.5 * text).item()

    # Each model its own ids, scored under the clean image: the released code.
    want = (-3.357364017505260, -3.807353520280588, 0.698159680507862, 0.682092724424618)
    assert total(label_sums(clean, ids), label_sums(ref_clean, ref_ids)) == near(want, dtype)
    # The same ids for both.
    want = (-3.357364017505260, -3.107353520280588, 0.663597113076141, 0.664811440738757)
    assert total(label_sums(clean, ids), label_sums(ref_clean, ids)) == near(want, dtype)
    # The same ids, scored under noise.
    n, ref_n, _, loss = total(label_sums(noisy, ids), label_sums(ref_noisy, ids))
    assert (n, ref_n, loss) == near((-2.496565323094847, -3.265206655608469, 0.690162305541811), dtype)
    # The runner-up where the arg-max is the chosen token: an earlier variant, to be refused.
    assert strongest_alternative(noisy, torch.tensor([0, 1, 3])).tolist() == [1, 2, 2]
    assert label_sums(clean, [1, 2, 2]).item() == near(-5.157364017505260, dtype)


def test_bpo(dtype):
    """Each negative of a prompt makes its own pair with the ground truth; the loss is the mean over pairs."""
    assert ranked_pairs([1, 0, 0]) == [(0, 1), (0, 2)]
    chosen, rejected = row(-2.2, -2.2, dtype=dtype), row(-3.1, -4.0, dtype=dtype)
    batch = chosen, rejected, row(-2.6, -2.6, dtype=dtype), row(-2.8, -4.1, dtype=dtype)
    assert preference_loss(*batch, reduction="none")[0].tolist() == near([0.658759555548697, 0.678259676341449], dtype)
    assert contrast(*batch)[0].item() == near(0.668509615945073, dtype)


@pytest.mark.parametrize(
    ("severity", "want", "to_chosen", "to_rejected"),
    [
        (0, 0.673347167228034, None, 0.0),
        (1, 0.658759555548697, -0.048250714233361, 0.048250714233361),
        (1.5, 0.651550033812573, None, 0.071814417755059),
        (2, 0.644396660073571, -0.047502081252106, 0.095004162504212),
        (3, 0.630258194681691, None, 0.140263708083804),
    ],
)
def test_hsa_dpo(severity, want, to_chosen, to_rejected, dtype):
    chosen, rejected = row(R_W, dtype=dtype, grad=True), row(R_L, dtype=dtype, grad=True)
    zero = torch.zeros(1, dtype=dtype)
    loss, _, lost = contrast(chosen, rejected, zero, zero, severity=row(severity, dtype=dtype))
    grads = torch.autograd.grad(loss, (chosen, rejected))
    assert loss.item() == near(want, dtype)
    assert grads[1].item() == near(to_rejected, dtype)
    assert to_chosen is None or grads[0].item() == near(to_chosen, dtype)
    assert lost.item() == near(-0.03, dtype)  # the logged reward does not know of severity


def test_llava_hound(dtype):
    """alpha 1, gamma .1 and a token-mean cross-entropy of 2."""
    loss = pair(A, dtype)[0] + 0.1 * likelihood(row(-20, dtype=dtype), torch.tensor([10])).item()
    assert loss == near(0.7543552444685271, dtype)


def test_mdpo(dtype):
    chosen, rejected, blind = (row(v, dtype=dtype, grad=True) for v in (-20, -24, -26))
    ref_chosen, ref_rejected, ref_blind = (row(v, dtype=dtype) for v in (-22, -23, -25))
    terms = (
        contrast(chosen, rejected, ref_chosen, ref_rejected)[0],
        contrast(chosen, blind, ref_chosen, ref_blind)[0],
        anchor(chosen, ref_chosen),
    )
    assert [t.item() for t in terms] == near([0.5543552444685271, 0.5543552444685271, 0.5981388693815918], dtype)
    assert sum(terms).item() == near(1.706849358318646, dtype)
    grads = torch.autograd.grad(sum(terms), (chosen, rejected, blind))
    assert [g.item() for g in grads] == near([-0.13012809690642044, 0.0425557483188341, 0.0425557483188341], dtype)
    assert anchor(chosen, ref_chosen, margin=0.5).item() == near(0.8543552444685272, dtype)
    start = contrast(ref_chosen, ref_rejected, ref_chosen, ref_rejected)[0] + contrast(ref_chosen, ref_blind, ref_chosen, ref_blind)[0]
    assert (start + anchor(ref_chosen, ref_chosen)).item() == near(2.0794415416798357, dtype)


def halva_phrases(dtype):
    """Two samples, two phrases and one, as tokens: (correct, wrong) [2, 2]."""
    seq, phrase = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([-1, 0, 0, 1, -1, 0])
    correct, wrong = row(-9, -0.3, -0.4, -1.1, -9, -0.8, dtype=dtype), row(-9, -1.0, -0.9, -2.4, -9, -0.5, dtype=dtype)
    return [segment_logp(x, seq, segment_ids=phrase).requires_grad_() for x in (correct, wrong)]


def halva_kl(dtype):
    reference = torch.tensor([[1, 0, -1], [0.5, 0.5, 0], [2, -1, 0.3], [0, 0.2, 0.1], [1.5, 1.4, -2]], dtype=dtype)
    policy = torch.tensor([[0.8, 0.1, -0.9], [0.7, 0.2, 0.1], [1.5, -0.8, 0.6], [0.1, 0.1, 0.1], [1, 1.7, -1.5]], dtype=dtype)
    return policy, reference


def test_halva_phrases(dtype):
    correct, wrong = halva_phrases(dtype)
    assert correct.tolist() == [near([-0.7, -1.1], dtype), near([-0.8, 0], dtype)]
    loss = phrase_contrast(correct, wrong)
    assert loss.item() == near(0.452882055213184, dtype)
    up, down = (g.flatten()[:3].tolist() for g in torch.autograd.grad(3 * loss, (correct, wrong)))
    assert down == near([0.231475216500982, 0.214165016957441, 0.574442516811659], dtype)
    assert up == near([-v for v in down], dtype)
    assert phrase_contrast(correct, wrong, padded_mean=True).item() == near(0.512948336549874, dtype)  # log 2 for the phrase that is not
    one = phrase_contrast(row(-0.7, dtype=dtype), row(-1.9, dtype=dtype)).item()
    assert one == near(0.263282467338031, dtype)
    present = torch.tensor([[True, False], [True, False]])
    assert phrase_contrast(correct, wrong, present).item() == near((0.263282467338031 + 0.854355244468527) / 2, dtype)


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_halva_kl(chunk, dtype):
    policy, reference = halva_kl(dtype)
    each = [0.010324799446, 0.025024980314, 0.054128670537, 0.003325020014, 0.080241358703]
    got = [forward_kl(p, r).item() for p, r in zip(policy, reference, strict=True)]
    assert got == pytest.approx(each, rel=1e-9 if dtype == torch.float64 else 1e-4, abs=1e-12 if dtype == torch.float64 else 1e-7)
    assert forward_kl(policy, reference, total=1, chunk=chunk).item() == near(0.173044829013338, dtype)
    assert forward_kl(policy, reference, total=2, chunk=chunk).item() == near(0.086522414506669, dtype)
    assert forward_kl(policy, reference, chunk=chunk).item() == near(0.034608965802668, dtype)
    assert forward_kl(policy.log_softmax(-1), reference.log_softmax(-1), total=1).item() == near(0.173044829013338, dtype)
    assert forward_kl(reference, policy, total=1).item() == near(0.176234352268320, dtype)  # the other way round
    keep = torch.tensor([True, False, True, False, False])
    assert forward_kl(policy, reference, keep, total=1, chunk=chunk).item() == near(0.010324799446 + 0.054128670537, dtype)


def test_halva_total(dtype):
    correct, wrong = halva_phrases(dtype)
    policy, reference = halva_kl(dtype)
    kl = 0.4 * forward_kl(policy, reference, total=2)
    assert (phrase_contrast(correct, wrong) + kl).item() == near(0.487491021015851, dtype)
    assert (phrase_contrast(correct, wrong, padded_mean=True) + kl).item() == near(0.547557302352542, dtype)


# --------------------------------------------------------------------------------------------------------------- the edges


def test_at_the_start_the_loss_is_ln_2(dtype):
    assert pair((-31.5, -47.25, -31.5, -47.25), dtype, beta=0.37)[0] == pytest.approx(LN2, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softplus_edges(dtype):
    """beta 1 and everything in the chosen side, so that u is the log-ratio itself."""
    for u, loss, slope in [(-800, 800, 1), (-40, 40, 1), (0, LN2, 0.5), (40, 4.248354255e-18, 4.248354255e-18), (800, 0, 0)]:
        got, to_chosen, _ = pair(deltas(float(u), 0.0), dtype, beta=1.0)
        assert got == pytest.approx(loss, rel=1e-6, abs=1e-30)
        assert to_chosen == pytest.approx(-slope, rel=8e-3 if dtype == torch.bfloat16 else 1e-6, abs=1e-30)


def test_long_answers_stay_linear(dtype):
    assert pair(deltas(-2000, 0), dtype) == (200.0, pytest.approx(-0.1, rel=1e-7), pytest.approx(0.1, rel=1e-7))
    assert pair(deltas(2000, 0), dtype)[0] == (pytest.approx(1.3838965267367376e-87, rel=1e-9) if dtype == torch.float64 else 0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
                                  "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "kto", "anchor"])  # fmt: skip
def test_extremes_are_finite(name, divergence, dtype):
    """Squares of scores that stand for exp(80) are past float32; there and nowhere else the loss may be infinite, never NaN."""
    for values in ((2000, 0), (-2000, 0), (0, 2000), (0, -2000), (-2000, 2000), (2000, -2000), (0, 0)):
        got = pair(deltas(*values), dtype, loss_type=name, f_divergence_type=divergence, **lens())
        square = name in ("ipo", "sppo_hard") and divergence in ("forward_kl", "alpha_divergence") and dtype == torch.float32
        assert all(math.isfinite(v) or (square and not math.isnan(v)) for v in got), (values, got)


def test_discopop_far_below_zero(dtype):
    """g exp(-x) is 0 times infinity there; as one exponential it vanishes and the logistic part stays."""
    assert pair(deltas(-2000, 0), dtype, loss_type="discopop") == near((200.0, -0.1, 0.1), dtype)


def test_no_answer_at_all(dtype):
    """A batch in which every label is ignored: sums of nothing, lengths 0."""
    logp = torch.full((6,), math.nan, dtype=dtype, requires_grad=True)
    sums = segment_logp(logp, torch.full((6,), -1), num_segments=4, norm="count")
    assert sums.tolist() == [0, 0, 0, 0]
    nothing = dict(chosen_lens=torch.zeros(2), rejected_lens=torch.zeros(2))
    for name in ("sigmoid", "ipo", "sigmoid_norm", "simpo", "orpo", "sft"):
        loss = preference_loss(*sums.split(2), loss_type=name, **nothing)[0]
        (grad,) = torch.autograd.grad(loss, logp, retain_graph=True)
        assert math.isfinite(loss.item())
        assert not grad.any()
    assert likelihood(sums, torch.zeros(4)).item() == 0
