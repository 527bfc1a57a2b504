"""``FusedLinearDPOLoss`` against logits, log-softmax and the pair loss, in float64; chunks, references, weights, what it returns."""

import inspect

import pytest
import torch
from check_op import check_close

from mmfast.nn import FusedLinearDPOLoss
from mmfast.ops import preference_loss, segment_logp

P, T, H, V = 5, 13, 16, 300
BY_LENGTH = ("ipo", "sigmoid_norm", "simpo", "orpo", "sft")
NO_REFERENCE = ("simpo", "cpo", "orpo")
LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm", "simpo", "cpo", "orpo", "sft", "kto"),
]


@pytest.fixture
def batch(device):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)

    labels = torch.randint(0, V, (2 * P, T))
    labels[:, :4] = -100
    labels[3, 4:9] = -100
    return dict(hidden=make(2 * P, T, H), weight=make(V, H), bias=make(V), labels=labels.to(device), ref_hidden=make(2 * P, T, H),
                ref_weight=make(V, H), token_weights=make(2 * P, T).abs())  # fmt: skip


def plain_logps(hidden, weight, labels, bias=None):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    keep = labels != -100
    return logits.log_softmax(-1).gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1) * keep


def plain(b, leaves, loss_type, *, average=False, alpha=0.0, weights=None, smoothing=0.0):
    """The loss by the book, from whole logits."""
    hidden, weight, bias = leaves
    labels, counts = b["labels"], (b["labels"] != -100).sum(1)
    logp = plain_logps(hidden, weight, labels, bias)

    def value(per_token):
        total = (per_token if weights is None else per_token * weights).sum(1)
        return total / counts if average else total

    reference = value(plain_logps(b["ref_hidden"], b["ref_weight"], labels)).chunk(2) if loss_type not in NO_REFERENCE else ()
    lens = dict(chosen_lens=counts[:P], rejected_lens=counts[P:]) if loss_type in BY_LENGTH else {}
    loss, won, lost = preference_loss(*value(logp).chunk(2), *reference, loss_type=loss_type, label_smoothing=smoothing, **lens)
    nll = -logp[:P].sum() / counts[:P].sum()
    logits = hidden @ weight.T + bias
    return loss + alpha * nll, (*value(logp).chunk(2), logits[:P].mean(), logits[P:].mean(), nll, won, lost)


def leaves_of(b, dtype=torch.float64):
    return [b[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight", "bias")]


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradients_and_what_is_logged(batch, loss_type, chunk_size):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot") else 0.0
    fused = FusedLinearDPOLoss(
        loss_type=loss_type, chunk_size=chunk_size, label_smoothing=smoothing, compute_nll_loss=True, alpha=0.3,
        use_ref_model=loss_type not in NO_REFERENCE,
    )  # fmt: skip
    reference = {} if loss_type in NO_REFERENCE else dict(ref_input=batch["ref_hidden"], ref_weight=batch["ref_weight"])
    ours, theirs = leaves_of(batch), leaves_of(batch)
    loss, logged = fused(ours[1], ours[0], batch["labels"], ours[2], **reference, token_weights=batch["token_weights"])
    want, want_logged = plain(batch, theirs, loss_type, alpha=0.3, weights=batch["token_weights"], smoothing=smoothing)
    check_close(loss, want, floor=1e-12)
    for got, expected in zip(logged, want_logged, strict=True):
        assert not got.requires_grad
        check_close(got, expected.detach(), floor=1e-12)
    for got, expected in zip(torch.autograd.grad(2 * loss, ours), torch.autograd.grad(2 * want, theirs), strict=True):
        check_close(got, expected, floor=1e-12)


def test_means_instead_of_sums(batch):
    ours, theirs = leaves_of(batch), leaves_of(batch)
    loss, logged = FusedLinearDPOLoss(average_log_prob=True)(
        ours[1], ours[0], batch["labels"], ours[2], batch["ref_hidden"], batch["ref_weight"]
    )
    want, want_logged = plain(batch, theirs, "sigmoid", average=True)
    check_close(loss, want, floor=1e-12)
    check_close(logged[0], want_logged[0].detach(), floor=1e-12)
    check_close(torch.autograd.grad(loss, ours)[1], torch.autograd.grad(want, theirs)[1], floor=1e-12)


def test_a_weighted_mean_divides_by_the_weights(batch):
    hidden, weight, _ = leaves_of(batch)
    w, labels = batch["token_weights"], batch["labels"]
    _, logged = FusedLinearDPOLoss(average_log_prob=True)(
        weight, hidden, labels, None, batch["ref_hidden"], batch["ref_weight"], token_weights=w
    )
    norms = (w * (labels != -100)).sum(1)
    want, ref = ((plain_logps(h, v, labels) * w).sum(1) / norms for h, v in ((hidden, weight), (batch["ref_hidden"], batch["ref_weight"])))
    check_close(torch.cat(logged[:2]), want.detach(), floor=1e-12)
    check_close(torch.cat(logged[5:]), 0.1 * (want - ref).detach(), floor=1e-12)


def test_beta_may_change_between_steps(batch):
    hidden, weight, _ = leaves_of(batch)
    fused, tail = FusedLinearDPOLoss(), (None, batch["ref_hidden"], batch["ref_weight"])
    fused.beta = 0.5
    later, _ = fused(weight, hidden, batch["labels"], *tail)
    other, _ = FusedLinearDPOLoss(beta=0.5)(weight, hidden, batch["labels"], *tail)
    assert later.item() == other.item()


def test_a_reference_computed_before(batch):
    hidden, weight, bias = leaves_of(batch)
    fused = FusedLinearDPOLoss()
    live, _ = fused(weight, hidden, batch["labels"], bias, batch["ref_hidden"], batch["ref_weight"])
    chosen, rejected = plain_logps(batch["ref_hidden"], batch["ref_weight"], batch["labels"]).sum(1).chunk(2)
    stored, _ = fused(weight, hidden, batch["labels"], bias, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    check_close(stored, live.detach(), floor=1e-12)


def test_step_zero_is_log_2(batch):
    """Policy and reference alike: every log-ratio is 0, whatever the masking."""
    loss, logged = FusedLinearDPOLoss()(
        batch["weight"].float(), batch["hidden"].float(), batch["labels"], None, batch["hidden"].float(), batch["weight"].float()
    )
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-6)
    assert logged[5].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types_are_as_good_as_logits_in_that_type(batch, dtype):
    b = {k: v if k == "labels" else v.to(dtype) for k, v in batch.items()}
    ours, rounded, theirs = leaves_of(b, dtype), leaves_of(b), leaves_of(b, dtype)
    loss, _ = FusedLinearDPOLoss(chunk_size=2)(ours[1], ours[0], b["labels"], ours[2], b["ref_hidden"], b["ref_weight"])
    wide = {k: v if k == "labels" else v.double() for k, v in b.items()}
    truth, _ = plain(wide, rounded, "sigmoid")
    hidden, weight, bias = theirs

    def sums(h, w, c=None):
        logits = (h @ w.T if c is None else h @ w.T + c).float()
        keep = b["labels"] != -100
        return (logits.log_softmax(-1).gather(-1, b["labels"].where(keep, 0).unsqueeze(-1)).squeeze(-1) * keep).sum(1)

    eager, _, _ = preference_loss(*sums(hidden, weight, bias).chunk(2), *sums(b["ref_hidden"], b["ref_weight"]).chunk(2))
    check_close(loss, truth, eager, floor=4e-7)
    for g, t, p in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(truth, rounded), torch.autograd.grad(eager, theirs), strict=True
    ):
        assert g.dtype == dtype
        check_close(g, t, p)


def test_frozen_head_eval_and_masks(batch):
    hidden, weight, _ = leaves_of(batch, torch.float32)
    fused, tail = FusedLinearDPOLoss(), (batch["ref_hidden"].float(), batch["ref_weight"].float())
    loss, _ = fused(weight.detach(), hidden, batch["labels"], None, *tail)
    loss.backward()
    assert weight.grad is None
    assert not hidden.grad[batch["labels"] == -100].any()
    with torch.no_grad():
        quiet, _ = fused(weight, hidden, batch["labels"], None, *tail)
        moved = hidden.clone()
        moved[batch["labels"] == -100] = 1e3  # prompts and images do not count
        same, _ = fused(weight, moved, batch["labels"], None, *tail)
    assert quiet.item() == loss.item() == same.item()


def test_a_batch_is_the_mean_of_its_halves(batch):
    hidden, weight, _ = leaves_of(batch)
    pick = [torch.tensor([0, 1, P, P + 1]), torch.tensor([2, 3, P + 2, P + 3])]
    fused = FusedLinearDPOLoss()

    def part(i):
        return fused(weight, hidden[i], batch["labels"][i], None, batch["ref_hidden"][i], batch["ref_weight"])[0]

    both = torch.cat([torch.cat([p[:2] for p in pick]), torch.cat([p[2:] for p in pick])])
    check_close((part(pick[0]) + part(pick[1])).detach() / 2, part(both).detach(), floor=1e-12)


def test_nothing_scored(batch):
    hidden, weight, bias = leaves_of(batch)
    labels = torch.full_like(batch["labels"], -100)
    for loss_type in ("sigmoid", "ipo", "orpo", "aot", "sft"):
        reference = dict(ref_input=batch["ref_hidden"], ref_weight=batch["ref_weight"])
        average = loss_type in ("sigmoid", "aot")
        fused = FusedLinearDPOLoss(loss_type=loss_type, use_ref_model=loss_type != "orpo", average_log_prob=average, compute_nll_loss=True)
        loss, _ = fused(weight, hidden, labels, bias, **({} if loss_type == "orpo" else reference))
        assert loss.isfinite()
        for g in torch.autograd.grad(loss, (hidden, weight, bias)):
            assert not g.any()
    empty, _ = FusedLinearDPOLoss(use_ref_model=False)(weight, hidden[:0], labels[:0], bias)
    assert empty.item() == 0


def test_arguments_are_ligers():
    """The positional order that TRL and other callers of Liger rely on."""
    assert list(inspect.signature(FusedLinearDPOLoss).parameters)[:8] == [
        *("ignore_index", "beta", "compute_nll_loss", "compiled", "use_ref_model", "average_log_prob", "chunk_size", "loss_type")
    ]  # fmt: skip
    assert list(inspect.signature(FusedLinearDPOLoss.forward).parameters)[1:8] == [
        *("lin_weight", "_input", "target", "bias", "ref_input", "ref_weight", "ref_bias")
    ]  # fmt: skip


def test_wrong_input_is_named(batch):
    hidden, weight, _ = leaves_of(batch)
    with pytest.raises(ValueError, match=r"expected ref_input and ref_weight, or ref_chosen_logps"):
        FusedLinearDPOLoss()(weight, hidden, batch["labels"])
    with pytest.raises(ValueError, match=r"expected _input \[2P, T, H\], lin_weight \[V, H\], target and .* got \[9, 13, 16\]"):
        FusedLinearDPOLoss()(weight, hidden[:9], batch["labels"][:9])
    with pytest.raises(ValueError, match=r"lin_weight \[V, H\].* got \[8, 13, 16\], \[300, 15\]"):
        FusedLinearDPOLoss()(weight[:, 1:], hidden[:8], batch["labels"][:8])
    with pytest.raises(ValueError, match="simpo divides by the answers' lengths itself"):
        FusedLinearDPOLoss(loss_type="simpo", average_log_prob=True)
    with pytest.raises(ValueError, match="a reference was given, but use_ref_model is False"):
        FusedLinearDPOLoss(use_ref_model=False)(weight, hidden, batch["labels"], None, batch["ref_hidden"], batch["ref_weight"])
    with pytest.raises(ValueError, match="FusedLinearDPOLoss: unknown loss_type 'sigmoidd'; did you mean 'sigmoid'"):
        FusedLinearDPOLoss(loss_type="sigmoidd")


def test_rows_are_those_that_segment_logp_sums(batch):
    """Chunked sums equal the op's on whole rows: no row is lost at a chunk's border."""
    hidden, weight, _ = leaves_of(batch)
    _, logged = FusedLinearDPOLoss(use_ref_model=False, chunk_size=3)(weight, hidden, batch["labels"])
    ids = torch.arange(2 * P, device=hidden.device).unsqueeze(1).expand(-1, T)
    want = segment_logp(plain_logps(hidden, weight, batch["labels"]), ids)
    check_close(torch.cat(logged[:2]), want.detach(), floor=1e-12)
