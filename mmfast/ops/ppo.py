"""Proximal policy optimisation: rewards of tokens, advantages, whitening, and the clipped losses with their gradients in one pass.

Letters: B sequences, T tokens (columns) of a response; ``mask`` is True on response tokens, the end token included. Types: float32, float16,
bfloat16 (both widened to float32 results) and float64, on CPU and CUDA; arithmetic is float64 throughout.

Two semantics, chosen by name and not comparable in numbers:

``"masked"``  statistics and means over the tokens inside the mask, the score on the end token. What a new run should use.
``"llava_rlhf"``  what the released code of LLaVA-RLHF (arXiv:2309.14525) does: every column counts, padding included, the score stands on the
    last column, the KL estimate is held at or above 0, rewards are multiplied by 10. For reproducing it.

Sources: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438), dual clip (arXiv:1912.09729). How the kernels work: docs/kernels.md.
"""

import torch
from torch import Tensor

from mmfast.ops.library import differentiable, of_constants

_SEMANTICS = ("masked", "llava_rlhf")
_SCORE_AT = ("end", "after_end", "last")
_KL_KINDS = {"k1": 1, "k1_clamped": 2, "k2": 3, "k3": 4}
_POLICY_STATS = ("clip_fraction", "approx_kl", "ratio", "ref_kl")
_VALUE_STATS = ("clip_fraction", "squared_error")


def _choice(op: str, what: str, value: str, known) -> str:
    if value not in known:
        raise ValueError(f"{op}: unknown {what} {value!r}, expected one of {', '.join(map(repr, known))}")
    return value


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


# ---------------------------------------------------------------------------------------------------------------- rewards


def token_rewards(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    *,
    kl_coef: float,
    mask: Tensor | None = None,
    kl_kind: str | None = None,
    scale: float | None = None,
    score_at: str | None = None,
    semantics: str = "masked",
) -> Tensor:
    """A sequence's score and a penalty for leaving the reference, as rewards of its tokens. Once a rollout: plain PyTorch, no kernel.

    ``r_t = scale (-kl_coef kl_t + [t is where the score stands] score)``.

    Args:
        scores: ``[B]``. logp, ref_logp: ``[B, T]`` of the sampled tokens under the sampling policy and the reference.
        mask: ``[B, T]``; all True when left out. A row without a token gets no reward.
        kl_kind: as in ``ppo_policy_loss``; left out ``"k1"``, under llava_rlhf ``"k1_clamped"``.
        scale: left out 1, under llava_rlhf 10 (a constant of its code).
        score_at: where the score stands. ``"end"``: the last token inside the mask. ``"after_end"``: one column past it, or on it where the
            row is full, as in TRL's PPO; ``gae`` and the value loss must then count that column too: their mask is
            ``mask | mask.roll(1, -1)``. ``"last"``: column T - 1, padding or not. Left out ``"end"``, under llava_rlhf ``"last"``.
        semantics: ``"llava_rlhf"`` ignores the mask, so padding must hold equal log-probabilities.

    Returns:
        ``[B, T]``, float32 (float64 for float64 logp); a constant, without gradient.
    """
    faithful = _choice("token_rewards", "semantics", semantics, _SEMANTICS) == "llava_rlhf"
    score_at = _choice("token_rewards", "score_at", score_at or ("last" if faithful else "end"), _SCORE_AT)
    kl_kind = _choice("token_rewards", "kl_kind", kl_kind or ("k1_clamped" if faithful else "k1"), _KL_KINDS)
    if logp.dim() != 2 or ref_logp.shape != logp.shape or scores.shape != logp.shape[:1]:
        got = ", ".join(str(list(t.shape)) for t in (scores, logp, ref_logp))
        raise ValueError(f"token_rewards: expected scores [B], logp [B, T] and ref_logp [B, T], got {got}")
    wide = _wide(logp)
    kl = _kl(logp.detach().to(wide), ref_logp.detach().to(wide), kl_kind)
    inside = torch.ones_like(kl, dtype=torch.bool) if mask is None or faithful else _bool(mask)
    end = inside & (inside.flip(-1).cumsum(-1).flip(-1) == 1)
    if score_at == "after_end":
        end = torch.where(end[:, -1:], end, end.roll(1, -1))
    elif score_at == "last":
        end = end.any(-1, keepdim=True) & (torch.arange(end.shape[1], device=end.device) == end.shape[1] - 1)
    rewards = torch.where(inside, -kl_coef * kl, 0.0) + torch.where(end, scores.detach().to(wide).unsqueeze(-1), 0.0)
    return rewards * ((10.0 if faithful else 1.0) if scale is None else scale)


def _kl(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Estimates of KL(policy || reference) from one sample; see ``ppo_policy_loss``."""
    d = logp - ref_logp
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    return d.clamp_min(0) if kind == "k1_clamped" else d


# ------------------------------------------------------------------------------------------------------------- advantages


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) and the returns that the critic is to predict.

    ``delta_t = r_t + gamma (1 - done_t) V_{t+1} - V_t``, ``A_t = delta_t + gamma lam (1 - done_t) A_{t+1}``, ``G_t = A_t + V_t``.

    Both are targets, constants of the update: not differentiable, on purpose.

    Args:
        rewards, values: ``[B, T]``.
        mask: ``[B, T]``; outside it rewards and values are taken as 0, whatever they hold. LLaVA-RLHF passes none: its padding has values
            and its score stands there.
        dones: ``[B, T]``; nothing flows back over a column where it is True (several episodes in a row).
        bootstrap: ``[B]``, the value after the last column, for sequences that were cut off; 0 when left out.

    Returns:
        advantages, returns: ``[B, T]``, float32, or float64 if either input is.

    Raises:
        RuntimeError: shapes, types or devices that do not fit.
    """
    return _gae(rewards, values, _bool(mask), _bool(dones), bootstrap, gamma, lam)


_gae = of_constants(torch.ops.mmfast.gae.default)


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``gae`` in plain PyTorch: the loop over columns."""
    wide = _wide(rewards, values)
    rewards, values = rewards.detach().to(wide), values.detach().to(wide)
    if mask is not None:
        rewards, values = torch.where(_bool(mask), rewards, 0), torch.where(_bool(mask), values, 0)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.detach().to(wide)
    advantage, advantages = torch.zeros_like(next_value), []
    for t in reversed(range(rewards.shape[1])):
        on = 1.0 if dones is None else 1.0 - _bool(dones)[:, t].to(wide)
        delta = rewards[:, t] + gamma * on * next_value - values[:, t]
        advantage = delta + gamma * lam * on * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], -1)
    return advantages, advantages + values


@torch.library.register_fake("mmfast::gae")
def _(rewards, values, mask, dones, bootstrap, gamma, lam):
    return tuple(rewards.new_empty(rewards.shape, dtype=_wide(rewards, values)) for _ in range(2))


# -------------------------------------------------------------------------------------------------------------- whitening


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    unbiased: bool | None = None,
    semantics: str = "masked",
) -> Tensor:
    """x with mean 0 and standard deviation 1 over all its elements inside the mask. A constant: not differentiable, on purpose.

    ``"masked"``      ``(x - mean) / sqrt(var + eps)`` inside the mask, 0 outside; variance over count - 1.
    ``"llava_rlhf"``  ``(x - mean) / (std + eps)`` over all elements, the mask ignored; variance over count.

    Args:
        x: any shape. mask: x's shape.
        shift_mean: False adds the mean back (rewards, whose sign means something).
        unbiased: variance over count - 1 or over count, against what the semantics says. A single element counts as one degree.

    Returns:
        x's shape, float32 (float64 for float64 x).
    """
    faithful = _choice("masked_whiten", "semantics", semantics, _SEMANTICS) == "llava_rlhf"
    unbiased = not faithful if unbiased is None else unbiased
    return _whiten(x, None if faithful else _bool(mask), shift_mean, eps, unbiased, faithful)


_whiten = of_constants(torch.ops.mmfast.masked_whiten.default)


def masked_whiten_ref(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    unbiased: bool | None = None,
    semantics: str = "masked",
) -> Tensor:
    """``masked_whiten`` in plain PyTorch."""
    faithful = semantics == "llava_rlhf"
    unbiased = not faithful if unbiased is None else unbiased
    x = x.detach().to(_wide(x))
    inside = torch.ones_like(x, dtype=torch.bool) if mask is None or faithful else _bool(mask)
    count = inside.sum()
    mean = torch.where(inside, x, 0).sum() / count.clamp_min(1)
    variance = torch.where(inside, x - mean, 0).square().sum() / (count - int(unbiased)).clamp_min(1)
    scaled = (x - mean) / (variance.sqrt() + eps if faithful else (variance + eps).sqrt())
    return torch.where(inside, scaled if shift_mean else scaled + mean, 0)


@torch.library.register_fake("mmfast::masked_whiten")
def _(x, mask, shift_mean, eps, unbiased, eps_on_std):
    return x.new_empty(x.shape, dtype=_wide(x))


# ----------------------------------------------------------------------------------------------------------------- losses


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip: float | tuple[float, float] = (0.2, 0.2),
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    semantics: str = "masked",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (arXiv:1707.06347, eq. 7), averaged over tokens, its gradient formed in the same pass.

    With ``rho = exp(logp - old_logp)`` and A the advantage, a token costs
    ``weight (-min(rho A, clip(rho, 1 - clip[0], 1 + clip[1]) A) + kl_coef kl)``. No advantage, no cost: A = 0 gives 0 even if rho overflows.

    Args:
        logp, old_logp, advantages: one shape, usually ``[B, T]``; the gradient goes to logp alone.
        mask: tokens outside it give nothing, whatever they hold, and are not counted. If all are outside, loss and gradient are 0.
        weights: a factor for each token; the mean is still over the number of tokens, so ``weights`` can express any other average.
        dual_clip: for A < 0 a token costs at most ``dual_clip |A|`` (arXiv:1912.09729, eq. 5); usually 3, left out: no bound.
        ref_logp: adds the estimate of KL(policy || reference), ``d = logp - ref_logp``: ``"k1"`` d, ``"k1_clamped"`` max(d, 0), ``"k2"`` d^2 / 2,
            ``"k3"`` e^-d - 1 + d. As a loss, k1 has an expected gradient of 0: prefer k2 or k3, or put k1 into the rewards.
        semantics: ``"llava_rlhf"`` ignores the mask: the mean is over all columns.

    Returns:
        loss (scalar, float32; float64 for float64 logp) and constants, means over the same tokens: ``clip_fraction`` (where a bound is
        active, so that the surrogate has no gradient), ``approx_kl`` (of old to new policy, k3), ``ratio`` (rho), ``ref_kl`` (0 without ref_logp).

    Raises:
        ValueError: an unknown choice or bound. RuntimeError: shapes, types or devices that do not fit.
    """
    op = "ppo_policy_loss"
    faithful = _choice(op, "semantics", semantics, _SEMANTICS) == "llava_rlhf"
    number = 0 if ref_logp is None else _KL_KINDS[_choice(op, "kl_kind", kl_kind, _KL_KINDS)]
    clip = tuple(clip) if isinstance(clip, tuple | list) else (clip, clip)
    if len(clip) != 2 or min(clip) < 0 or (dual_clip is not None and dual_clip < 1):
        raise ValueError(f"{op}: expected clip >= 0 on both sides and dual_clip >= 1, got clip {clip}, dual_clip {dual_clip}")
    mask = None if faithful else _bool(mask)
    bound = float("inf") if dual_clip is None else dual_clip
    loss, stats, *_ = _policy_loss(logp, old_logp, advantages, mask, weights, ref_logp, *clip, bound, kl_coef, number)
    return loss, dict(zip(_POLICY_STATS, stats.unbind(), strict=False))


def ppo_policy_loss_ref(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    semantics: str = "masked",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``ppo_policy_loss`` in plain PyTorch; autograd supplies the gradient."""
    wide = _wide(logp)
    logp, old_logp, advantages = logp.to(wide), old_logp.detach().to(wide), advantages.detach().to(wide)
    inside = torch.ones_like(logp, dtype=torch.bool) if mask is None or semantics == "llava_rlhf" else _bool(mask)
    logp, old_logp, advantages = (torch.where(inside, t, 0) for t in (logp, old_logp, advantages))
    change = logp - old_logp
    ratio = change.exp()
    plain = torch.where(advantages == 0, 0, ratio * advantages)
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    surrogate = torch.minimum(plain, clipped)
    bound = plain > clipped
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        bound, surrogate = bound | (surrogate < floor), torch.maximum(surrogate, floor)
    kl = torch.zeros_like(logp) if ref_logp is None else _kl(logp, torch.where(inside, ref_logp.detach().to(wide), 0), kl_kind)
    each = (kl_coef * kl - surrogate) * (1 if weights is None else torch.where(inside, weights.detach().to(wide), 0))
    count = inside.sum().clamp_min(1)
    mean = lambda t: torch.where(inside, t, 0).sum() / count  # noqa: E731
    stats = (bound.to(wide), torch.expm1(change) - change, ratio, kl)
    return mean(each), {name: mean(t.detach()) for name, t in zip(_POLICY_STATS, stats, strict=True)}


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip: float | None = 0.2,
    mask: Tensor | None = None,
    semantics: str = "masked",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``mean(max((V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2)) / 2`` over tokens, its gradient formed in the same pass.

    Args:
        values, old_values, returns: one shape, usually ``[B, T]``; the gradient goes to values alone.
        clip: c, in units of the values; None for the plain squared error.
        mask, semantics: as in ``ppo_policy_loss``.

    Returns:
        loss (scalar, float32; float64 for float64 values; the coefficient, say 0.1, is the caller's) and constants: ``clip_fraction`` (where
        the clipped error is the larger one and gives no gradient), ``squared_error`` (mean of ``(V - G)^2``).

    Raises:
        ValueError: an unknown choice or bound. RuntimeError: shapes, types or devices that do not fit.
    """
    faithful = _choice("ppo_value_loss", "semantics", semantics, _SEMANTICS) == "llava_rlhf"
    if clip is not None and clip < 0:
        raise ValueError(f"ppo_value_loss: expected clip >= 0, got {clip}")
    mask, bound = None if faithful else _bool(mask), float("inf") if clip is None else clip
    loss, stats, *_ = _value_loss(values, old_values, returns, mask, bound)
    return loss, dict(zip(_VALUE_STATS, stats.unbind(), strict=False))


def ppo_value_loss_ref(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip: float | None = 0.2,
    mask: Tensor | None = None,
    semantics: str = "masked",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``ppo_value_loss`` in plain PyTorch; autograd supplies the gradient."""
    wide = _wide(values)
    inside = torch.ones_like(values, dtype=torch.bool) if mask is None or semantics == "llava_rlhf" else _bool(mask)
    values, old_values, returns = (torch.where(inside, t.to(wide), 0) for t in (values, old_values.detach(), returns.detach()))
    plain = (values - returns).square()
    moved = values - old_values
    held = values if clip is None else torch.where(moved.abs() <= clip, values, old_values + moved.clamp(-clip, clip))
    clipped = (held - returns).square()
    count = inside.sum().clamp_min(1)
    mean = lambda t: torch.where(inside, t, 0).sum() / count  # noqa: E731
    stats = ((clipped > plain).to(wide), plain)
    return mean(torch.maximum(plain, clipped)) / 2, {n: mean(t.detach()) for n, t in zip(_VALUE_STATS, stats, strict=True)}


@torch.library.register_fake("mmfast::ppo_policy_loss")
def _(logp, old_logp, advantages, mask, weights, ref_logp, clip_low, clip_high, dual_clip, kl_coef, kl):
    return _fake_loss(logp)


@torch.library.register_fake("mmfast::ppo_value_loss")
def _(values, old_values, returns, mask, clip):
    return _fake_loss(values)


def _fake_loss(first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = lambda *shape: first.new_empty(shape, dtype=_wide(first))  # noqa: E731
    return new(), new(len(_POLICY_STATS)), new(), new(*first.shape)


def _setup(ctx, inputs, output):
    # The gradient of the sum is there already, and so is the divisor that makes it the mean's. The input is there to be named (_FirstOnly).
    _, stats, scale, grad = output
    ctx.save_for_backward(scale, grad, inputs[0])
    ctx.mark_non_differentiable(stats, scale, grad)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,)
    scale, grad, source = ctx.saved_tensors
    grad = (grad * (grad_loss.detach() * scale)).to(source.dtype)
    return (_FirstOnly.apply(grad, source) if torch.is_grad_enabled() else grad,)  # with create_graph


class _FirstOnly(torch.autograd.Function):
    """Stands for the graph that the gradient has not: whoever differentiates it is told, rather than given 0."""

    @staticmethod
    def forward(ctx, grad, source):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("ppo losses have first derivatives only; their _ref twins have all of them")


# The other inputs are constants of the loss: they may require gradients, and get none.
_policy_loss = differentiable(torch.ops.mmfast.ppo_policy_loss.default, 1, _backward, _setup)
_value_loss = differentiable(torch.ops.mmfast.ppo_value_loss.default, 1, _backward, _setup)
