"""Preference losses: token log-probabilities summed by sequence or phrase, and what pairs of sums say about the policy.

Letters: N tokens, S sequences, K phrases of a sequence, P pairs. Types: float32, float16, bfloat16, float64 on CPU and CUDA. Everything
is computed in float64 inside and returned in float32 (float64 for float64): half-precision sums over a few hundred tokens are off by
whole units, and exponentials of log-ratios in the hundreds are 0 or infinite in float32.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops.library import differentiable, without_graph


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _known(op: str, what: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}"
        raise ValueError(f"{op}: unknown {what} {value!r}{hint}")
    return value


# -------------------------------------------------------------------------------------------------------- sums over segments

_NORMS = ("none", "count", "weight")


def segment_logp(
    logp: Tensor,
    seq_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    segment_ids: Tensor | None = None,
    norm: str = "none",
    num_segments: int | None = None,
    segments_per_sequence: int | None = None,
) -> Tensor:
    """Sums token log-probabilities by sequence, or by phrase inside the sequences; the same bits each time, tokens in any order.

    Args:
        logp: ``[..]`` token log-probabilities, N in all.
        seq_ids: ``[..]`` int64, which sequence a token belongs to; negative: none (prompt, image, padding), its value is not read.
        token_weights: ``[..]``, a factor for each token: corrected words count more (RLHF-V, arXiv:2312.00849), the tail beyond the
            shorter answer less (LD-DPO, arXiv:2409.06411).
        segment_ids: ``[..]`` int64, which phrase of its sequence a token belongs to, from 0; negative: none (HALVA, arXiv:2405.18654).
        norm: ``"none"`` for the sum; ``"count"`` divides by the number of tokens, ``"weight"`` by the sum of their weights.
        num_segments: S; read from ``seq_ids`` when left out, which waits for the device.
        segments_per_sequence: K, likewise from ``segment_ids``.

    Returns:
        ``[S]``, with ``segment_ids`` ``[S, K]``, in float32 (float64 for float64). A segment without tokens gets 0. Gradients reach
        ``logp`` and ``token_weights``.

    Raises:
        ValueError: unknown ``norm``. RuntimeError: shapes or types that do not fit; on the CPU an id that is too large, which on CUDA
            belongs to no segment.
    """
    _known("segment_logp", "norm", norm, _NORMS)
    sizes = _sizes(seq_ids, segment_ids, num_segments, segments_per_sequence)
    values, _ = _segment(logp, seq_ids, segment_ids, token_weights, *sizes, _NORMS.index(norm))
    return values.view(-1) if segment_ids is None else values


def _sizes(seq_ids: Tensor, segment_ids: Tensor | None, S: int | None, K: int | None) -> tuple[int, int]:
    if S is None:
        S = max(int(seq_ids.max()) + 1, 0) if seq_ids.numel() else 0
    if segment_ids is None:
        return S, 1
    if K is None:
        K = max(int(segment_ids.max()) + 1, 0) if segment_ids.numel() else 0
    return S, K


def segment_logp_ref(
    logp: Tensor,
    seq_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    segment_ids: Tensor | None = None,
    norm: str = "none",
    num_segments: int | None = None,
    segments_per_sequence: int | None = None,
) -> Tensor:
    """``segment_logp`` in plain PyTorch; autograd supplies the gradients."""
    _known("segment_logp", "norm", norm, _NORMS)
    S, K = _sizes(seq_ids, segment_ids, num_segments, segments_per_sequence)
    keep = seq_ids >= 0 if segment_ids is None else (seq_ids >= 0) & (segment_ids >= 0)
    ids = seq_ids[keep] if segment_ids is None else seq_ids[keep] * K + segment_ids[keep]
    values = logp[keep].to(_wide(logp))
    weights = torch.ones_like(values) if token_weights is None else token_weights[keep].to(values.dtype)
    zeros = values.new_zeros(S * K)
    sums = zeros.index_add(0, ids, values * weights)
    if norm != "none":
        norms = zeros.index_add(0, ids, torch.ones_like(values) if norm == "count" else weights)
        sums = torch.where(norms != 0, sums / torch.where(norms != 0, norms, 1.0), 0.0)
    return sums if segment_ids is None else sums.view(S, K)


@torch.library.register_fake("mmfast::segment_logp")
def _(logp, seq_ids, segment_ids, token_weights, num_sequences, num_segments, norm):
    torch._check(
        logp.shape == seq_ids.shape, lambda: f"segment_logp: expected seq_ids {list(logp.shape)} like logp, got {list(seq_ids.shape)}"
    )
    return tuple(logp.new_empty([num_sequences, num_segments], dtype=_wide(logp)) for _ in range(2))


@torch.library.register_fake("mmfast::segment_logp_backward")
def _(grad, logp, seq_ids, segment_ids, token_weights, values, norms, norm, need_logp, need_weights):
    other = logp if token_weights is None else token_weights
    return logp.new_empty(logp.shape if need_logp else [0]), other.new_empty(logp.shape if need_weights else [0])


def _segment_setup(ctx, inputs, output):
    logp, seq_ids, segment_ids, token_weights, _, _, ctx.norm = inputs
    values, norms = output
    ctx.save_for_backward(logp, seq_ids, segment_ids, token_weights, values, norms)
    ctx.mark_non_differentiable(norms)
    ctx.set_materialize_grads(False)


def _segment_backward(ctx, grad, _):
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if grad is None or not any(needs):
        return (None,) * 4
    grad_logp, grad_weights = _segment_grad(grad, *ctx.saved_tensors, ctx.norm, *needs)
    return grad_logp if needs[0] else None, None, None, grad_weights if needs[1] else None


_segment_grad = without_graph(torch.ops.mmfast.segment_logp_backward.default)
_segment = differentiable(torch.ops.mmfast.segment_logp.default, 4, _segment_backward, _segment_setup)


def _no_second(ctx, *_):
    raise RuntimeError("segment_logp: it has first derivatives only; segment_logp_ref has all of them")


torch.library.register_autograd("mmfast::segment_logp_backward", _no_second)


# -------------------------------------------------------------------------------------------------------------- pair losses

_KERNELS = (
    *("sigmoid", "hinge", "ipo", "exo", "nca", "robust", "bco", "sppo", "apo_zero", "apo_down", "discopop", "odds_ratio"),
    *("anchor", "prospect"),
)  # numbered as PairLoss; the last two look at one side
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")  # numbered as Divergence


class Loss(NamedTuple):
    """What a caller of ``preference_loss`` has to know about a name."""

    kernel: str
    lens: bool = False  # divides by the answers' lengths
    reference: bool = True
    margin: float | None = None  # the default margin; None: the loss has none
    whole: bool = False  # a pair's loss depends on the rest of the batch


LOSSES = {
    "sigmoid": Loss("sigmoid", margin=0.0),
    "hinge": Loss("hinge"),
    "ipo": Loss("ipo", lens=True),
    "exo_pair": Loss("exo"),
    "nca_pair": Loss("nca"),
    "robust": Loss("robust"),
    "bco_pair": Loss("bco", margin=0.0),
    "sppo_hard": Loss("sppo"),
    "aot": Loss("sigmoid", whole=True),
    "aot_unpaired": Loss("sigmoid", whole=True),
    "apo_zero": Loss("apo_zero"),
    "apo_down": Loss("apo_down"),
    "discopop": Loss("discopop"),
    "sft": Loss("", lens=True, whole=True),
    "sigmoid_norm": Loss("sigmoid", lens=True, margin=0.0),
    "simpo": Loss("sigmoid", lens=True, reference=False, margin=0.5),
    "cpo": Loss("sigmoid", reference=False, margin=0.0),
    "orpo": Loss("odds_ratio", lens=True, reference=False),
    "kto": Loss("prospect", margin=0.0, whole=True),
    "anchor": Loss("anchor", margin=0.0),
}
LOSS_TYPES = tuple(LOSSES)


def loss_facts(op: str, name: str) -> Loss:
    """The facts about a loss type; an unknown one is refused with the nearest name."""
    return LOSSES[_known(op, "loss_type", name, LOSS_TYPES)]


class _Answers(NamedTuple):
    """What a pair loss is a function of, in the op's order: tensors like chosen, the margin also a number."""

    chosen: Tensor
    rejected: Tensor | None
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lens: Tensor | None = None
    rejected_lens: Tensor | None = None
    rejected_scale: Tensor | None = None
    margin: Tensor | float | None = None


class _Settings(NamedTuple):
    beta: float
    label_smoothing: float
    tau: float
    divergence: str
    alpha: float
    side_weights: tuple[float, float]


def preference_loss(
    chosen: Tensor,
    rejected: Tensor | None,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float | Tensor | None = None,
    chosen_lens: Tensor | None = None,
    rejected_lens: Tensor | None = None,
    pair_weights: Tensor | None = None,
    rejected_scale: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_free: bool = False,
    reduction: str = "mean",
    _evaluate: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How well the policy tells the better of two answers, under TRL's names; one kernel gives each pair's loss and its derivatives.

    With the log-ratios ``a = chosen - ref_chosen`` and ``c = rejected_scale (rejected - ref_rejected)``, the scores ``u = f(a)`` and
    ``v = f(c)``, ``x = beta (u - v)``, ``eps`` the label smoothing and ``m`` the margin; ``s`` is the logistic function,
    ``sp(y) = log(1 + exp(y))``:

    ================  ==========================================================================================================
    ``sigmoid``       ``(1 - eps) sp(m - x) + eps sp(x - m)``: DPO (arXiv:2305.18290, eq. 7); with eps the labels are wrong that
                      often (cDPO; TRL 1.x ignores eps here)
    ``hinge``         ``max(0, 1 - x)``: SLiC-HF (arXiv:2305.10425)
    ``ipo``           ``(u / n - v / n' - 1 / (2 beta))^2``: IPO (arXiv:2310.12036) on token means
    ``exo_pair``      ``KL((s(x), s(-x)) || (1 - eps, eps))``, eps 0 meaning 1e-3: EXO (arXiv:2402.00856)
    ``nca_pair``      ``sp(-beta u) + sp(beta u) / 2 + sp(beta v) / 2``: NCA (arXiv:2402.05369)
    ``robust``        ``((1 - eps) sp(-x) - eps sp(x)) / (1 - 2 eps)``: rDPO (arXiv:2403.00409)
    ``bco_pair``      ``sp(m - beta u) + sp(beta v - m)``: BCO (arXiv:2404.04656); m: the running mean of the rewards
    ``sppo_hard``     ``(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2``: SPPO (arXiv:2405.00675)
    ``aot``           ``sigmoid`` of ``sort(chosen - rejected) - sort(ref_chosen - ref_rejected)``, sorted over the batch: AOT
                      (arXiv:2406.05882)
    ``aot_unpaired``  ``sigmoid`` of ``sort(a) - sort(c)``
    ``apo_zero``      ``s(-beta a) + s(beta c)``: APO (arXiv:2408.06266)
    ``apo_down``      ``s(beta a) + s(-x)``
    ``discopop``      ``(1 - g) sp(-x) + g exp(-x)``, ``g = s(x / tau)``: DiscoPOP (arXiv:2406.08414)
    ``sft``           ``-chosen`` summed, over the chosen tokens of the batch
    ``sigmoid_norm``  ``sigmoid`` with ``u / n``, ``v / n'``
    ``simpo``         ``sigmoid`` on token means without reference; m (gamma, not times beta) defaults to 0.5: SimPO (arXiv:2405.14734)
    ``cpo``           ``sigmoid`` without reference: CPO's contrast (arXiv:2401.08417), to which ``sft`` belongs
    ``orpo``          ``beta sp(-(logit(chosen / n) - logit(rejected / n')))``, no reference: ORPO's odds ratio (arXiv:2403.07691)
    ``kto``           chosen answers ``lambda s(beta (m - u))``, rejected ``lambda' s(beta (v - m))``, m the policy's KL from the
                      reference: KTO (arXiv:2402.01306). Sides may differ in number; the mean is over answers
    ``anchor``        ``sp(m - beta u)``: mDPO's floor under the chosen reward (arXiv:2406.11839); rejected may be None
    ================  ==========================================================================================================

    A list of names is their sum under ``loss_weights``, for example MPO: ``sigmoid`` .8, ``bco_pair`` .2, ``sft`` 1
    (arXiv:2411.10442).

    Args:
        chosen, rejected: ``[..]`` log-probabilities of the answers under the policy (``segment_logp``), P in all.
        ref_chosen, ref_rejected: under the reference, constants; without both, or with ``reference_free``, ratios are to a uniform one.
        margin: m, one for all or ``[..]``; a constant.
        chosen_lens, rejected_lens: ``[..]`` token counts n, n', which ``ipo``, ``sigmoid_norm``, ``simpo``, ``orpo`` and (chosen) ``sft``
            divide by, at least 1. Ones, if the log-probabilities are means already.
        pair_weights: ``[..]`` constant factors (WPO, arXiv:2406.11827).
        rejected_scale: ``[..]`` the severity of the rejected answer (HSA-DPO, arXiv:2404.14233); does not show in the rewards.
        f_divergence_type: the score ``f(r)`` (arXiv:2309.16240): ``reverse_kl`` r, ``forward_kl`` -exp(-r), ``js_divergence`` log s(r),
            ``alpha_divergence`` exp((alpha - 1) r) / (alpha - 1), at alpha 1 reverse_kl; exponents at most 80. ``aot``,
            ``aot_unpaired``, ``apo_zero`` and the first term of ``apo_down`` look at r itself.
        reduction: ``mean``, 0 for an empty batch, or ``none``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: the loss, a scalar or of chosen's shape (``kto``: all answers in one row); the
        implicit rewards beta times the log-ratio (``simpo``, ``orpo``: times the token mean), without gradient. The loss has first
        derivatives only.

    Raises:
        ValueError: an unknown name, or an argument that the loss lacks or has no use for. RuntimeError: shapes or types that do not fit.
    """
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    if reference_free:
        ref_chosen = ref_rejected = None
    for name in names:
        _known("preference_loss", "loss_type", name, LOSS_TYPES)
    _known("preference_loss", "f_divergence_type", f_divergence_type, _DIVERGENCES)
    _known("preference_loss", "reduction", reduction, ("mean", "none"))
    if f_divergence_type == "alpha_divergence" and abs(f_alpha_divergence_coef - 1) < 1e-6:  # its limit; the formula divides by 0 there
        f_divergence_type = "reverse_kl"
    answers = _Answers(chosen, rejected, ref_chosen, ref_rejected, chosen_lens, rejected_lens, rejected_scale, margin)
    sides = desirable_weight, undesirable_weight
    settings = _Settings(beta, label_smoothing, discopop_tau, f_divergence_type, f_alpha_divergence_coef, sides)
    _refuse(names, weights, answers, settings, pair_weights, reduction)
    parts, rewards = [], []
    for name, weight in zip(names, weights, strict=True):
        losses, *rewards_of = _SPECIAL.get(name, _pair)(name, _evaluate or _evaluate_op, answers, settings)
        if pair_weights is not None:
            losses = losses * pair_weights.detach().to(losses.dtype)
        if reduction == "mean":
            losses = losses.mean() if losses.numel() else losses.sum()
        parts.append(losses if weight == 1 else weight * losses)  # on a GPU every step of this chain is a launch
        rewards = rewards or rewards_of
    return sum(parts[1:], parts[0]), *rewards


def preference_loss_ref(
    chosen: Tensor, rejected: Tensor | None, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """``preference_loss`` with each pair's loss in plain PyTorch; autograd supplies the gradients."""
    return preference_loss(chosen, rejected, ref_chosen, ref_rejected, _evaluate=_evaluate_ref, **options)


def _refuse(names, weights, answers, settings, pair_weights, reduction) -> None:
    """What cannot be, in one sentence; sentences are made only when needed, since their numbers may be symbols of torch.compile."""

    def check(good: bool, sentence: Callable[[], str]) -> None:
        if not good:
            raise ValueError(f"preference_loss: {sentence()}")

    chosen, rejected, ref_chosen, ref_rejected = answers[:4]
    check(len(weights) == len(names) > 0, lambda: f"expected a weight for each loss_type, got {len(weights)} for {len(names)}")
    check(settings.beta > 0, lambda: f"expected beta > 0, got {settings.beta}")
    check(0.0 <= settings.label_smoothing < 0.5, lambda: f"expected 0 <= label_smoothing < 0.5, got {settings.label_smoothing}")
    check(rejected is None or (ref_chosen is None) == (ref_rejected is None), lambda: "give both ref_chosen and ref_rejected, or neither")
    check(answers.margin is None or any(LOSSES[n].margin is not None for n in names), lambda: f"{names[0]} has no margin")
    check(
        "kto" in names or rejected is None or rejected.shape == chosen.shape,
        lambda: f"expected chosen and rejected [P] alike, got {list(chosen.shape)} and {list(rejected.shape)}",
    )
    sides = dict(ref_chosen=chosen, chosen_lens=chosen, ref_rejected=rejected, rejected_lens=rejected, rejected_scale=rejected)
    for what, like in sides.items():
        given = getattr(answers, what)
        check(
            given is None or like is None or given.shape == like.shape,
            lambda what=what, like=like, given=given: f"expected {what} {list(like.shape)} like its answers, got {list(given.shape)}",
        )
    check(
        pair_weights is None or pair_weights.shape == chosen.shape,
        lambda: f"expected pair_weights {list(chosen.shape)} like chosen, got {list(pair_weights.shape)}",
    )
    for name in names:
        loss = LOSSES[name]
        check(rejected is not None or name in ("anchor", "sft"), lambda: f"{name} compares pairs, rejected is None")
        check(
            not loss.lens or (answers.chosen_lens is not None and (name == "sft" or answers.rejected_lens is not None)),
            lambda: f"{name} divides by the answers' lengths: give chosen_lens and rejected_lens (ones, if the inputs are means already)",
        )
        check(loss.reference or ref_chosen is None, lambda: f"{name} has no reference; leave ref_chosen and ref_rejected out")
        check(
            loss.reference or settings.divergence == "reverse_kl", lambda: f"{name} has no reference, so no {settings.divergence} from it"
        )
        batchwise = name in ("aot", "aot_unpaired", "kto")  # what is averaged are not the given pairs
        check(not batchwise or pair_weights is None, lambda: f"{name} has no pairs for pair_weights to weigh")
        scales = not batchwise and name not in ("sft", "anchor")
        check(scales or answers.rejected_scale is None, lambda: f"{name} has no use for rejected_scale")
        single = len(names) == 1 or reduction == "mean"
        check(name != "kto" or single, lambda: "kto has a loss for each answer and cannot be added to pairs' losses")


def _rewards(answers: _Answers, beta: float) -> tuple[Tensor, Tensor]:
    wide, sides = _wide(answers.chosen), ((answers.chosen, answers.ref_chosen), (answers.rejected, answers.ref_rejected))
    chosen, rejected = (None if x is None else beta * (x.double() - (0 if ref is None else ref)).detach() for x, ref in sides)
    return chosen.to(wide), (torch.zeros_like(chosen) if rejected is None else rejected).to(wide)


def _pair(name: str, evaluate: Callable, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    loss, lens = LOSSES[name], (answers.chosen_lens, answers.rejected_lens)
    if loss.margin is None or answers.margin is None:
        answers = answers._replace(margin=loss.margin or None)
    if not loss.lens:
        answers = answers._replace(chosen_lens=None, rejected_lens=None)
    if name == "exo_pair" and settings.label_smoothing == 0:
        settings = settings._replace(label_smoothing=1e-3)
    losses, *rewards = evaluate(loss.kernel, answers, settings)
    if loss.lens and not loss.reference:
        rewards = (r / n.clamp_min(1) for r, n in zip(rewards, lens, strict=True))
    return losses, *rewards


def _sft(name: str, evaluate: Callable, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    tokens_of_an_answer = answers.chosen_lens.double().sum().clamp_min(1) / max(answers.chosen.numel(), 1)
    return -answers.chosen.to(_wide(answers.chosen)) / tokens_of_an_answer, *_rewards(answers, settings.beta)


def _aot(name: str, evaluate: Callable, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    a, c, ref_a, ref_c = (None if x is None else x.double().reshape(-1) for x in answers[:4])
    if ref_a is None:
        ref_a, ref_c = torch.zeros_like(a), torch.zeros_like(c)
    first, second = (a - c, ref_a - ref_c) if name == "aot" else (a - ref_a, c - ref_c)
    ranked = _Answers(first.sort().values, second.sort().values, None, None)
    losses = evaluate("sigmoid", ranked, settings._replace(divergence="reverse_kl"))[0].to(_wide(answers.chosen))
    return losses.view(answers.chosen.shape), *_rewards(answers, settings.beta)


def _kto(name: str, evaluate: Callable, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    losses = []
    sides = (answers.chosen, answers.ref_chosen, 1), (answers.rejected, answers.ref_rejected, -1)
    for (x, ref, sign), factor in zip(sides, settings.side_weights, strict=True):  # a loss to be undone is a gain: the same curve, mirrored
        side = _Answers(x.reshape(-1), None, None if ref is None else ref.reshape(-1), None, margin=answers.margin)
        losses.append(factor * evaluate("prospect", side, settings._replace(beta=sign * settings.beta))[0])
    return torch.cat(losses), *_rewards(answers, settings.beta)


_SPECIAL = {"sft": _sft, "aot": _aot, "aot_unpaired": _aot, "kto": _kto}


def _evaluate_op(kernel: str, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    margin = answers.margin
    if margin is not None and not isinstance(margin, Tensor):
        margin = torch.full((1,), margin, dtype=torch.float64, device=answers.chosen.device)
    # Lengths and severities are often whole numbers.
    numbers = (x.double() if x is not None and not x.is_floating_point() else x for x in answers[4:7])
    columns = (x if x is None or x.dim() == 1 else x.reshape(-1) for x in (*answers[:4], *numbers, margin))
    losses, rewards, _ = _pairs(*columns, _KERNELS.index(kernel), _DIVERGENCES.index(settings.divergence), settings.alpha, *settings[:3])
    results, shape = (losses, *rewards.unbind()), answers.chosen.shape
    return results if len(shape) == 1 else tuple(x.view(shape) for x in results)


def _evaluate_ref(kernel: str, answers: _Answers, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The table of ``preference_loss``, line by line."""
    wide, one = _wide(answers.chosen), torch.ones((), dtype=_wide(answers.chosen), device=answers.chosen.device)
    chosen, rejected, ref_chosen, ref_rejected, n, n_, scale, m = (
        None if x is None else x.to(wide) if isinstance(x, Tensor) else x * one for x in answers
    )
    b, eps, tau, divergence, alpha, _ = settings
    a = chosen - (0 if ref_chosen is None else ref_chosen)
    lost = torch.zeros_like(a) if rejected is None else rejected - (0 if ref_rejected is None else ref_rejected)
    c = lost if scale is None else scale * lost
    log_s, s = F.logsigmoid, torch.sigmoid
    f = {
        "reverse_kl": lambda r: r,
        "forward_kl": lambda r: -torch.exp((-r).clamp_max(80)),
        "js_divergence": log_s,
        "alpha_divergence": lambda r: torch.exp(((alpha - 1) * r).clamp_max(80)) / (alpha - 1),
    }[divergence]
    u, v = (f(r) if k is None else f(r) / k.clamp_min(1) for r, k in ((a, n), (c, n_)))
    m = 0.0 if m is None else m
    x, half = b * (u - v), 0.5 / b

    def logit(w):
        w = w.clamp_max(-1e-12)
        return w - torch.log(-torch.expm1(w))

    losses = {
        "sigmoid": lambda: -(1 - eps) * log_s(x - m) - (eps * log_s(m - x) if eps else 0.0),
        "hinge": lambda: (1 - x).clamp_min(0),
        "ipo": lambda: (u - v - half) ** 2,
        "exo": lambda: s(x) * (log_s(x) - math.log(1 - eps)) + s(-x) * (log_s(-x) - math.log(eps)),
        "nca": lambda: -log_s(b * u) - 0.5 * log_s(-b * u) - 0.5 * log_s(-b * v),
        "robust": lambda: (-(1 - eps) * log_s(x) + eps * log_s(-x)) / (1 - 2 * eps),
        "bco": lambda: -log_s(b * u - m) - log_s(m - b * v),
        "sppo": lambda: (u - half) ** 2 + (v + half) ** 2,
        "apo_zero": lambda: s(-b * a) + s(b * c),
        "apo_down": lambda: s(b * a) + s(-x),
        "discopop": lambda: -s(-x / tau) * log_s(x) + torch.exp(log_s(x / tau) - x),
        "odds_ratio": lambda: -b * log_s(logit(u) - logit(v)),
        "anchor": lambda: -log_s(b * u - m),
        "prospect": lambda: s(b * (m - u)),
    }[kernel]()
    return losses, (b * a).detach(), (b * lost).detach()


@torch.library.register_fake("mmfast::preference_pairs")
def _(chosen, *rest):
    P = chosen.shape[0]
    return tuple(chosen.new_empty(size, dtype=_wide(chosen)) for size in ([P], [2, P], [2, P]))


def _pairs_setup(ctx, inputs, output):
    chosen, rejected = inputs[:2]
    _, rewards, slopes = output
    # The derivatives are there already: nothing else is kept, and backward is a multiplication.
    ctx.save_for_backward(slopes)
    ctx.types = chosen.dtype, None if rejected is None else rejected.dtype
    ctx.mark_non_differentiable(rewards, slopes)
    ctx.set_materialize_grads(False)


def _pairs_backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # a second derivative would silently take the slopes for constants
        raise RuntimeError("preference_loss: the op has first derivatives only; preference_loss_ref has all of them")
    if grad is None:
        return None, None
    both = zip((grad * ctx.saved_tensors[0]).unbind(), ctx.types, strict=True)
    return [g.to(kind) if need else None for (g, kind), need in zip(both, ctx.needs_input_grad[:2], strict=True)]


_pairs = differentiable(torch.ops.mmfast.preference_pairs.default, 2, _pairs_backward, _pairs_setup)
