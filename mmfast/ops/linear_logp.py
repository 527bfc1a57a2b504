"""Log-probabilities of labels straight from hidden states and the output head: ``[N, V]`` logits never exist beyond a workspace.

Letters: N rows (tokens), n rows with a label, H hidden width, V vocabulary, C columns of a block.

Rows without a label are dropped before the first product. The head is walked in blocks of the vocabulary; one row kernel folds each block
into running sums (maximum, sum of exponentials, ...), another turns it into its gradient in place. Walking the vocabulary rather than the
rows reads the head once a pass and makes every slice of its gradient by one product, so that nothing is accumulated in half precision.
If all logits fit the workspace they are kept for backward (three products in all), otherwise they are formed again (four).

    z = softcap tanh((h W^T + b) / softcap) / temperature      logp = z[label] - lse      lse = log sum exp z
    entropy = lse - sum p z      squares = sum p^2      kl = sum p0 (log p0 - log p)

Types: float32, float16, bfloat16 (sums and results in float32), float64. The label's logit and lse come from the same rounded logits, so
``logp`` is never positive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.ops.library import differentiable, without_graph

LOGP, LSE, ENTROPY, SQUARES, HIT, REF_LOGP, _REF_LSE, KL = range(
    8
)  # the first rows of the ops' output, as in csrc/linear_logp/linear_logp.h
_STATES, _OUTPUTS = 10, 12
_WORKSPACE_MB = {"cpu": 128, "cuda": 1024}
_LEAST_COLUMNS = 1024


class LogpStats(NamedTuple):
    """What a pass over the logits yields beside the log-probability, each shaped like the labels and 0 where ignored."""

    lse: Tensor  # log sum exp z
    squares: Tensor  # sum p^2; its logarithm is WPO's denominator (arXiv:2406.11827)
    hit: Tensor  # bool: the label is the most likely token


@dataclass(frozen=True)
class _Options:
    ignore_index: int = -100
    temperature: float = 1.0
    softcap: float = 0.0
    wide: bool = False  # logits in float32
    more: bool = False  # entropy and stats
    workspace: int = 0  # bytes
    num_valid: int | None = None
    kl: bool = False

    def rows(self, weight: Tensor) -> int:
        """Rows whose logits fit the workspace, but no fewer than products are efficient with."""
        return max(1024 if weight.is_cuda else 256, self.workspace // max(1, len(weight) * (4 if self.wide else weight.element_size())))


def objective_options(
    hidden: Tensor, *, ignore_index: int = -100, temperature: float = 1.0, softcap: float | None = None, logits_dtype: str = "input",
    workspace_mb: float | None = None,
) -> _Options:  # fmt: skip
    """The options of :func:`linear_objective`, as in :func:`linear_logp`."""
    return _options("linear_objective", hidden.device, ignore_index, temperature, softcap, logits_dtype, False, workspace_mb, None)


def _options(op: str, device: torch.device, ignore_index, temperature, softcap, logits_dtype, more, workspace_mb, num_valid) -> _Options:
    if logits_dtype not in ("input", "float32"):
        raise ValueError(f"{op}: unknown logits_dtype {logits_dtype!r}, expected 'input' or 'float32'")
    if not temperature > 0:
        raise ValueError(f"{op}: expected temperature > 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected softcap > 0 or None, got {softcap}")
    if workspace_mb is not None and not workspace_mb > 0:
        raise ValueError(f"{op}: expected workspace_mb > 0, got {workspace_mb}")
    room = (workspace_mb or _WORKSPACE_MB.get(device.type, 128)) * 2**20
    return _Options(ignore_index, float(temperature), float(softcap or 0.0), logits_dtype == "float32", more, int(room), num_valid)


# ------------------------------------------------------------------------------------------------------------- the public ops


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_stats: bool = False,
    logits_dtype: str = "input",
    keep_logits: bool | str = "auto",
    workspace_mb: float | None = None,
    num_valid: int | None = None,
):
    """Log-probability of every label under ``softmax(hidden @ weight.T + bias)``; nothing is shifted.

    Args:
        hidden: ``[.., H]``. weight: ``[V, H]``, bias: ``[V]`` or None, both of hidden's type (autocast casts all three).
        labels: int64 ``[..]`` like hidden without H; rows with ``ignore_index`` cost nothing and get 0.
        softcap: logits are first capped to ``softcap * tanh(logit / softcap)``; temperature divides after that.
        return_entropy: also the entropy of each row. return_stats: also :class:`LogpStats`. Both differentiable, but for ``hit``.
        logits_dtype: ``"input"`` rounds logits to hidden's type, as a model's own head does (error of a log-probability up to
            2^-8 max|z| in bfloat16); ``"float32"`` does not.
        keep_logits: keep them for backward: ``"auto"`` if they fit the workspace.
        workspace_mb: room for logits; default 1024 on CUDA, 128 on the CPU. At least 1024 columns are formed at a time.
        num_valid: the number of labels that are not ignored, if known: CUDA then needs no synchronisation to drop the other rows. -1: drop
            none, as CUDA graphs need.

    Returns:
        ``logp[, entropy][, stats]``, shaped like labels, float32 (float64 for float64). Arbitrary upstream gradients are exact; the head's
        gradient is not formed when it needs none.

    Raises:
        ValueError: unknown options; shapes, types or devices that do not fit. RuntimeError: on the CPU, a label out of range (on CUDA, where
            raising would cost a synchronisation, its row is NaN).
    """
    options = _options(
        "linear_logp", hidden.device, ignore_index, temperature, softcap, logits_dtype, return_entropy or return_stats, workspace_mb, num_valid
    )  # fmt: skip
    out = _linear_logp("linear_logp", (hidden, weight, bias), labels, None, options, keep_logits)
    return _select(out, labels.shape, return_entropy, return_stats)


def linear_logp_pair(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_kl: bool = False,
    logits_dtype: str = "input",
    keep_logits: bool | str = "auto",
    workspace_mb: float | None = None,
    num_valid: int | None = None,
):
    """Policy and reference in one walk over the vocabulary.

    Args:
        ref_hidden, ref_weight, ref_bias: the reference's, over the same vocabulary; no gradient reaches them. If ``ref_weight is weight``
            and ``ref_bias is bias`` (a frozen or shared head) both models share one product.
        return_kl: also ``KL(reference || policy)`` of every row, over the whole vocabulary (token-level DPO, arXiv:2404.11999; HALVA's
            anchor, arXiv:2405.18654), with gradient to the policy.
        The rest as in :func:`linear_logp`.

    Returns:
        ``logp, ref_logp[, kl]``, each shaped like labels.
    """
    options = _options(
        "linear_logp_pair", hidden.device, ignore_index, temperature, softcap, logits_dtype, False, workspace_mb, num_valid
    )  # fmt: skip
    options = replace(options, kl=return_kl)
    # The same objects stay the same, which is how a shared product is known.
    reference = (
        ref_hidden.detach(),
        weight if ref_weight is weight else ref_weight.detach(),
        ref_bias if ref_bias is None or ref_bias is bias else ref_bias.detach(),
    )
    out = _linear_logp("linear_logp_pair", (hidden, weight, bias), labels, reference, options, keep_logits)
    pair = out[LOGP].clone().view(labels.shape), out[REF_LOGP].detach().clone().view(labels.shape)
    return (*pair, out[KL].clone().view(labels.shape)) if return_kl else pair


def mean_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.mean(0, dtype=dtype)`` of a head ``[V, H]``, a piece at a time: in one call a head of half type would be widened whole."""
    return sum(part.sum(0, dtype=dtype) for part in weight.split(4096)) / len(weight)


def label_logp(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_stats: bool = False,
):
    """:func:`linear_logp` for logits that exist already: ``log softmax(logits)`` at the labels, in one pass and without its copy.

    Args:
        logits: ``[.., V]``, any float type. labels: int64 ``[..]``, each ``ignore_index`` or in ``0 .. V - 1``. Nothing is shifted.

    Returns:
        ``logp[, entropy][, stats]``, shaped like labels, float32 (float64 for float64), 0 where ignored; logp is never positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"label_logp: expected labels {list(logits.shape[:-1])} like logits [.., V], got {list(labels.shape)}")
    options = _options("label_logp", logits.device, ignore_index, temperature, softcap, "input", return_entropy or return_stats, None, None)
    out = _label(logits, labels, options.more, options.temperature, options.softcap, ignore_index)
    return _select(out, labels.shape, return_entropy, return_stats)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "input",
    workspace_mb: float | None = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels)`` without the logits, as ``torch.nn.functional.linear_cross_entropy``.

    Args:
        reduction: ``"mean"`` divides by the number of labels that are not ignored (by the sum of their weights, if given), ``"sum"``,
            or ``"none"`` for ``[..]`` like labels. For the first two the gradients are formed in forward, while the logits of a chunk of
            rows exist: three products, whatever the size.
        label_smoothing: eps; the target is ``(1 - eps)`` of the label and ``eps / V`` of every token. Not with softcap.
        token_weights: ``[..]`` like labels, a factor for each token's loss; no gradient.
        The rest as in :func:`linear_logp`.

    Returns:
        The loss, float32 (float64 for float64); 0 with zero gradients when every label is ignored.
    """
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: unknown reduction {reduction!r}, expected mean, sum or none")
    if not 0.0 <= label_smoothing <= 1.0 or (label_smoothing and softcap):
        raise ValueError(f"{op}: expected 0 <= label_smoothing <= 1, and 0 with softcap; got {label_smoothing} and softcap {softcap}")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"{op}: expected token_weights {list(labels.shape)} like labels, got {list(token_weights.shape)}")
    same = dict(ignore_index=ignore_index, temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, workspace_mb=workspace_mb)
    weights = None if token_weights is None else token_weights.detach()
    keep = labels != ignore_index
    if reduction != "none" and not label_smoothing and not torch.compiler.is_compiling():
        options = objective_options(hidden, **same)
        rows = keep.reshape(-1).nonzero()[:, 0]
        flat = None if weights is None else weights.reshape(-1)[rows].to(_wide_type(hidden.dtype))
        total = len(rows) if flat is None else flat.sum()
        scale = 1.0 if reduction == "sum" else 1.0 / (max(total, 1) if flat is None else total.clamp_min(torch.finfo(flat.dtype).tiny))
        size = options.rows(weight)
        chunks = list(rows.split(size))

        def objective(logp: Tensor, chunk: int) -> Tensor:
            part = logp if flat is None else logp * flat[chunk * size : chunk * size + len(logp)]
            return -part.sum() * scale

        return linear_objective(hidden, weight, labels, bias, chunks, objective, options)
    if label_smoothing:
        logp, stats = linear_logp(hidden, weight, labels, bias, return_stats=True, **same)
        # The mean logit needs no logits: it is the row's product with the mean row of the head. What ignored rows hold stays out.
        wide = logp.dtype
        seen = torch.where(keep.unsqueeze(-1), hidden, 0).to(wide)
        mean = seen @ mean_row(weight, wide) + (0 if bias is None else bias.mean(dtype=wide))
        uniform = mean / temperature - stats.lse
        losses = torch.where(keep, -(1 - label_smoothing) * logp - label_smoothing * uniform, 0.0)
    else:
        losses = -linear_logp(hidden, weight, labels, bias, **same)
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    if reduction == "none":
        return losses
    counted = keep.to(losses.dtype) if weights is None else torch.where(keep, weights.to(losses.dtype), 0.0)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp_min(torch.finfo(losses.dtype).tiny)


def _select(out: Tensor, shape: torch.Size, entropy: bool, stats: bool):
    def row(i: int) -> Tensor:  # a copy: the caller may write to it, and autograd keeps `out`
        return out[i].clone().view(shape)

    results = [row(LOGP)]
    if entropy:
        results.append(row(ENTROPY))
    if stats:
        results.append(LogpStats(row(LSE), row(SQUARES), out[HIT].detach().view(shape) > 0))
    return results[0] if len(results) == 1 else tuple(results)


# ------------------------------------------------------------------------------------------------------------- plain PyTorch


def label_logp_ref(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0, softcap: float | None = None,
    return_entropy: bool = False, return_stats: bool = False,
):  # fmt: skip
    """``label_logp`` in plain PyTorch: its meaning and its test oracle."""
    z = logits.to(_wide_type(logits.dtype))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    keep = labels != ignore_index
    lse, every = z.logsumexp(-1), z.log_softmax(-1)
    logp = every.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    p = every.exp()
    results = [torch.where(keep, logp, 0.0)]
    if return_entropy:
        results.append(torch.where(keep, -(p * every).sum(-1), 0.0))
    if return_stats:
        squares = p.square().sum(-1)
        results.append(LogpStats(torch.where(keep, lse, 0.0), torch.where(keep, squares, 0.0), (z.argmax(-1) == labels) & keep))
    return results[0] if len(results) == 1 else tuple(results)


def linear_logp_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, logits_dtype: str = "input",
    keep_logits: bool | str = "auto", workspace_mb: float | None = None, num_valid: int | None = None, **options,
):  # fmt: skip
    """``linear_logp`` in plain PyTorch, with the logits whole."""
    if logits_dtype == "float32":
        hidden, weight, bias = (t if t is None else t.to(_wide_type(t.dtype)) for t in (hidden, weight, bias))
    return label_logp_ref(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def linear_logp_pair_ref(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, bias: Tensor | None = None,
    ref_bias: Tensor | None = None, *, return_kl: bool = False, ignore_index: int = -100, temperature: float = 1.0,
    softcap: float | None = None, logits_dtype: str = "input", keep_logits: bool | str = "auto", workspace_mb: float | None = None,
    num_valid: int | None = None,
):  # fmt: skip
    """``linear_logp_pair`` in plain PyTorch."""

    def every(h, w, b):
        if logits_dtype == "float32":
            h, w, b = (t if t is None else t.to(_wide_type(t.dtype)) for t in (h, w, b))
        z = torch.nn.functional.linear(h, w, b)
        z = z.to(_wide_type(z.dtype))
        return ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1)

    keep = labels != ignore_index
    policy = every(hidden, weight, bias)
    with torch.no_grad():
        reference = every(ref_hidden, ref_weight, ref_bias)
    at = labels.where(keep, 0).unsqueeze(-1)
    pair = tuple(torch.where(keep, x.gather(-1, at).squeeze(-1), 0.0) for x in (policy, reference))
    kl = torch.where(keep, (reference.exp() * (reference - policy)).sum(-1), 0.0)
    return (*pair, kl) if return_kl else pair


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, reduction: str = "mean", ignore_index: int = -100,
    label_smoothing: float = 0.0, token_weights: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None,
    logits_dtype: str = "input", workspace_mb: float | None = None,
) -> Tensor:  # fmt: skip
    """``linear_cross_entropy`` in plain PyTorch."""
    if logits_dtype == "float32":
        hidden, weight, bias = (t if t is None else t.to(_wide_type(t.dtype)) for t in (hidden, weight, bias))
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(_wide_type(z.dtype))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    losses = torch.nn.functional.cross_entropy(
        z.reshape(-1, z.shape[-1]), labels.reshape(-1), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    ).view(labels.shape)
    keep = (labels != ignore_index).to(losses.dtype)
    counted = keep if token_weights is None else keep * token_weights.to(losses.dtype)
    losses = losses if token_weights is None else losses * token_weights.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp_min(torch.finfo(losses.dtype).tiny)


# ---------------------------------------------------------------------------------------------------- the walk over the vocabulary


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


Head = tuple[Tensor, Tensor, Tensor | None]  # hidden [n, H], weight [V, H], bias [V] or None


def _z_type(hidden: Tensor, options: _Options) -> torch.dtype:
    return _wide_type(hidden.dtype) if options.wide else hidden.dtype


def _blocks(n: int, V: int, size: int, options: _Options) -> list[tuple[int, int]]:
    """Column ranges of about equal width that fit the workspace, multiples of 64 so that rows of a block stay aligned."""
    most = max(_LEAST_COLUMNS, options.workspace // max(1, n * size))
    width = -(-V // (-(-V // most)))
    width = min(V, -(-width // 64) * 64)
    return [(a, min(V, a + width)) for a in range(0, V, width)]


def _logits(head: Head, a: int, b: int, buffer: Tensor) -> Tensor:
    """Logits of columns [a, b) in the front of a flat buffer of their type."""
    hidden, weight, bias = head
    z = buffer[: len(hidden) * (b - a)].view(len(hidden), b - a)
    w, c = weight[a:b], None if bias is None else bias[a:b]
    if _ours(hidden, w) and buffer.dtype == torch.float32:
        torch.ops.mmfast.logp_product_(hidden, w.t(), z if c is None else z.copy_(c.expand_as(z)), c is not None)
    elif buffer.dtype == hidden.dtype:
        torch.mm(hidden, w.t(), out=z) if c is None else torch.addmm(c, hidden, w.t(), out=z)
    elif hidden.is_cuda:
        torch.mm(hidden, w.t(), out_dtype=buffer.dtype, out=z)
        if c is not None:
            z.add_(c)
    else:  # the CPU has no product of half types with a wide result
        torch.ops.mmfast.logp_product_(hidden.to(buffer.dtype), w.to(buffer.dtype).t(), z, False)
        if c is not None:
            z.add_(c)
    return z


def _ours(*tensors: Tensor) -> bool:
    """Whether a product is made by the CPU's own fp32 kernel, which beats the library's; half types and CUDA are the library's."""
    return all(t.dtype == torch.float32 and not t.is_cuda and 1 in t.stride() for t in tensors)


def _stacked(policy: Head, reference: Head | None) -> bool:
    return reference is not None and reference[1] is policy[1] and reference[2] is policy[2]


def _forward(policy: Head, labels: Tensor, reference: Head | None, options: _Options, keep: bool) -> tuple[Tensor, tuple | None]:
    """``[12, n]`` outputs, and the logits if they are to be kept and are one block."""
    hidden, weight, _ = policy
    n, V = len(hidden), len(weight)
    kind = _z_type(hidden, options)
    size = torch.empty((), dtype=kind).element_size() * (1 if reference is None else 2)
    blocks = [(0, V)] if keep else _blocks(n, V, size, options)
    widest = max(b - a for a, b in blocks)
    wide = _wide_type(kind)
    state, out = hidden.new_empty((_STATES, n), dtype=wide), hidden.new_zeros((_OUTPUTS, n), dtype=wide)
    buffer = hidden.new_empty(n * widest * (1 if reference is None else 2), dtype=kind)
    together = (torch.cat([hidden, reference[0]]), *policy[1:]) if _stacked(policy, reference) else None
    z = z0 = None
    for a, b in blocks:
        if together is not None:
            z, z0 = _logits(together, a, b, buffer).chunk(2)
        else:
            z = _logits(policy, a, b, buffer)
            z0 = None if reference is None else _logits(reference, a, b, buffer[n * widest :])
        torch.ops.mmfast.logp_update_(
            z, z0, labels, a, V, options.more, options.temperature, options.softcap, options.ignore_index, state, out
        )
    return out, (z, z0 if options.kl else None) if keep else None


def _backward(
    policy: Head, labels: Tensor, reference: Head | None, options: _Options, out: Tensor, grads: Sequence[Tensor | None],
    needs: tuple[bool, bool, bool], kept: tuple | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden, weight and bias from those of (logp, lse, entropy, squares, kl), each ``[n]`` or None."""
    hidden, weight, bias = policy
    n, V = len(hidden), len(weight)
    kind = _z_type(hidden, options)
    reference = reference if grads[4] is not None else None
    size = torch.empty((), dtype=kind).element_size() * (1 if reference is None else 2)
    blocks = [(0, V)] if kept else _blocks(n, V, size, options)
    widest = max(b - a for a, b in blocks)
    buffers = [] if kept else [hidden.new_empty(n * widest, dtype=kind) for _ in range(1 if reference is None else 2)]
    grad_hidden = grad_weight = grad_bias = None
    if needs[1]:
        grad_weight = weight.new_empty(weight.shape)  # contiguous, however the head lies
    if needs[2]:
        grad_bias = torch.empty_like(bias)
    for a, b in blocks:
        if kept:
            z, z0 = kept
        else:
            z = _logits(policy, a, b, buffers[0])
            z0 = None if reference is None else _logits(reference, a, b, buffers[1])
        torch.ops.mmfast.logp_grad_(
            z,
            z0 if reference is not None else None,
            z,
            labels,
            a,
            V,
            options.temperature,
            options.softcap,
            options.ignore_index,
            out,
            *grads,
        )
        if needs[2]:
            grad_bias[a:b] = z.sum(0, dtype=out.dtype)
        z = z if z.dtype == hidden.dtype else z.to(hidden.dtype)
        if needs[1]:
            _product(z.t(), hidden, grad_weight[a:b])
        if needs[0]:
            grad_hidden = _accumulate(grad_hidden, z, weight[a:b], len(blocks) > 1)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    if _ours(x, y, out):
        torch.ops.mmfast.logp_product_(x, y, out, False)
        return out
    return torch.mm(x, y, out=out)


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in float32 of half types."""
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return _product(x.float(), y.float(), x.new_empty((len(x), y.shape[1]), dtype=torch.float32))


def _accumulate(total: Tensor | None, x: Tensor, y: Tensor, wide: bool) -> Tensor:
    """``total + x @ y``, where several products are summed in float32 whatever their type."""
    kind = _wide_type(x.dtype)
    if _ours(x, y):
        result = x.new_empty(len(x), y.shape[1]) if total is None else total
        torch.ops.mmfast.logp_product_(x, y, result, total is not None)
        return result
    if x.dtype == kind:
        return x @ y if total is None else total.addmm_(x, y)
    if not wide:
        return x @ y
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=kind) if total is None else torch.addmm(total, x, y, out_dtype=kind, out=total)
    total = x.new_zeros((len(x), y.shape[1]), dtype=kind) if total is None else total
    for part, to in zip(x.split(8192), total.split(8192), strict=True):  # the CPU's product is rounded before it is added: in pieces
        to.add_(part @ y)
    return total


# --------------------------------------------------------------------------------------------------------------------- autograd


def _check(op: str, policy, labels: Tensor, reference) -> None:
    first, V = policy[0], policy[1].shape[0]
    for name, head in (("", policy), ("ref_", reference)):
        if head is None:
            continue
        hidden, weight, bias = head
        if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"{op}: expected {name}hidden [.., H], {name}weight [V, H] and labels [..], got {list(hidden.shape)}, {list(weight.shape)} "
                f"and {list(labels.shape)}"
            )
        if weight.shape[0] != V:
            raise ValueError(f"{op}: policy and reference differ in vocabulary, {V} and {weight.shape[0]}")
        if V == 0:
            raise ValueError(f"{op}: expected at least one token in the vocabulary, got weight {list(weight.shape)}")
        if bias is not None and bias.shape != (V,):
            raise ValueError(f"{op}: expected {name}bias [V={V}], got {list(bias.shape)}")
        for what, t in ((f"{name}weight", weight), (f"{name}bias", bias), (f"{name}hidden", hidden)):
            if t is not None and (t.dtype != first.dtype or t.device != first.device):
                raise ValueError(f"{op}: hidden is {first.dtype} on {first.device} but {what} {t.dtype} on {t.device}; make them alike")
    if labels.dtype != torch.long:
        raise ValueError(f"{op}: expected labels of type int64, got {labels.dtype}")


def _check_labels(op: str, labels: Tensor, V: int, options: _Options) -> None:
    """Where looking costs nothing: on the CPU."""
    if labels.is_cuda:
        return
    valid = labels != options.ignore_index
    wrong = valid & ((labels < 0) | (labels >= V))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{op}: label {int(labels[i])} of row {i} is outside the vocabulary of {V} and is not ignore_index {options.ignore_index}"
        )
    if options.num_valid not in (None, -1) and options.num_valid != int(valid.sum()):
        raise ValueError(f"{op}: num_valid is {options.num_valid}, but {int(valid.sum())} labels are not ignored")


def _compact(labels: Tensor, options: _Options) -> Tensor | None:
    """Indices of the rows that count; None: all of them."""
    if options.num_valid == -1:
        return None
    valid = labels != options.ignore_index
    if labels.is_cuda and options.num_valid is not None:
        rows = torch.nonzero_static(valid, size=options.num_valid)[:, 0]
    else:
        rows = valid.nonzero()[:, 0]
    return None if len(rows) == len(labels) else rows


def _take(rows: Tensor | None, head: Head | None) -> Head | None:
    return head if rows is None or head is None else (head[0].index_select(0, rows), *head[1:])


def _fit(policy, labels: Tensor, reference, options: _Options, keep_logits: bool | str) -> bool:
    """Whether all logits of these rows are to be kept for backward."""
    size = torch.empty((), dtype=_z_type(policy[0], options)).element_size() * (1 if reference is None else 2)
    return keep_logits is True or (keep_logits == "auto" and len(labels) * len(policy[1]) * size <= options.workspace)


def _walk_forward(op, policy, labels, reference, options, keep_logits) -> tuple[Tensor, Tensor | None, tuple | None]:
    """``[12, N]`` outputs, the rows that count (None: all), the logits if kept."""
    hidden = policy[0].reshape(-1, policy[0].shape[-1])
    policy = (hidden, *policy[1:])
    reference = None if reference is None else (reference[0].reshape(hidden.shape), *reference[1:])
    labels = labels.reshape(-1).contiguous()
    _check_labels(op, labels, len(policy[1]), options)
    rows = _compact(labels, options)
    policy, reference = _take(rows, policy), _take(rows, reference)
    labels = labels if rows is None else labels[rows]
    keep = keep_logits is not False and _fit(policy, labels, reference, options, keep_logits)
    out, kept = _forward(policy, labels, reference, options, keep)
    return out if rows is None else out.new_zeros(_OUTPUTS, len(hidden)).index_copy_(1, rows, out), rows, kept


def _walk_backward(grad, policy, labels, reference, options, out, rows, needs, kept=None):
    """Gradients of hidden, weight and bias from ``[12, N]`` of the outputs."""
    shape = policy[0].shape
    hidden = policy[0].reshape(-1, shape[-1])
    labels = labels.reshape(-1).contiguous()
    policy = _take(rows, (hidden, *policy[1:]))
    reference = None if reference is None else _take(rows, (reference[0].reshape(hidden.shape), *reference[1:]))
    if rows is not None:
        labels, out, grad = labels[rows], out[:, rows], grad[:, rows]
    used = [grad[i].contiguous() for i in (LOGP, LSE)] + [grad[i].contiguous() if options.more else None for i in (ENTROPY, SQUARES)]
    used.append(grad[KL].contiguous() if options.kl else None)
    grad_hidden, grad_weight, grad_bias = _backward(policy, labels, reference, options, out.contiguous(), used, needs, kept)
    if grad_hidden is not None and rows is not None:
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    return None if grad_hidden is None else grad_hidden.view(shape), grad_weight, grad_bias


class _Eager(torch.autograd.Function):
    """The registered op's rule, with the logits kept for backward where they fit: a graph that torch.compile owns cannot hold them."""

    @staticmethod
    def forward(ctx, op, hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, options, keep_logits):
        policy, reference = (hidden, weight, bias), None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
        out, rows, ctx.kept = _walk_forward(op, policy, labels, reference, options, keep_logits)
        ctx.save_for_backward(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, out, rows)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, out, rows = ctx.saved_tensors
        reference = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
        kept, ctx.kept = ctx.kept, None  # their gradient is written over them: a second backward forms them again
        needs = tuple(ctx.needs_input_grad[1:4])
        grads = _walk_backward(grad, (hidden, weight, bias), labels, reference, ctx.options, out, rows, needs, kept)
        return (None, *grads, *(None,) * 6)


def _linear_logp(op: str, policy, labels: Tensor, reference, options: _Options, keep_logits) -> Tensor:
    kind = policy[0].device.type
    if torch.is_autocast_enabled(kind) and policy[0].dtype != torch.float64:
        narrow = torch.get_autocast_dtype(kind)
        shared = _stacked(policy, reference)
        policy = tuple(t if t is None else t.to(narrow) for t in policy)
        reference = None if reference is None else tuple(t if t is None else t.to(narrow) for t in reference)
        reference = (reference[0], *policy[1:]) if shared else reference
    _check(op, policy, labels, reference)
    if keep_logits not in (True, False, "auto"):
        raise ValueError(f"{op}: unknown keep_logits {keep_logits!r}, expected True, False or 'auto'")
    tail = reference if reference is not None else (None, None, None)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(t is not None and t.requires_grad for t in policy):
        return _Eager.apply(op, *policy, labels, *tail, options, keep_logits)
    if torch.compiler.is_compiling():
        return torch.ops.mmfast.linear_logp(*policy, labels, *tail, *_flat(options))
    with torch.no_grad():
        return _walk_forward(op, policy, labels, reference, options, False)[0]


def _flat(o: _Options) -> tuple:
    return o.more, o.ignore_index, o.temperature, o.softcap, o.wide, o.workspace, o.num_valid, o.kl


def _from_flat(more, ignore_index, temperature, softcap, wide, workspace, num_valid, kl) -> _Options:
    return _Options(ignore_index, temperature, softcap, wide, more, workspace, num_valid, kl)


@torch.library.custom_op("mmfast::linear_logp", mutates_args=())
def _linear_logp_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, more: bool, ignore_index: int, temperature: float, softcap: float, wide: bool, workspace: int,
    num_valid: int | None, kl: bool,
) -> Tensor:  # fmt: skip
    reference = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
    options = _from_flat(more, ignore_index, temperature, softcap, wide, workspace, num_valid, kl)
    return _walk_forward("linear_logp", (hidden, weight, bias), labels, reference, options, False)[0]


@_linear_logp_op.register_fake
def _(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, *options):
    return hidden.new_empty(_OUTPUTS, labels.numel(), dtype=_wide_type(hidden.dtype))


@torch.library.custom_op("mmfast::linear_logp_backward", mutates_args=())
def _linear_logp_backward_op(
    grad: Tensor, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, more: bool, ignore_index: int, temperature: float, softcap: float, wide: bool,
    workspace: int, num_valid: int | None, kl: bool, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    reference = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
    options = _from_flat(more, ignore_index, temperature, softcap, wide, workspace, num_valid, kl)
    needs = (need_hidden, need_weight, need_bias)
    rows = _compact(labels.reshape(-1), options)
    grads = _walk_backward(grad, (hidden, weight, bias), labels, reference, options, out, rows, needs)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_linear_logp_backward_op.register_fake
def _(grad, out, hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, *rest):
    needed = rest[-3:]
    return tuple(hidden.new_empty(t.shape if n else [0]) for t, n in zip((hidden, weight, bias), needed, strict=True))


def _op_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output)
    ctx.options = inputs[7:]


def _op_backward(ctx, grad):
    *tensors, out = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.mmfast.linear_logp_backward(grad, out, *tensors, *ctx.options, *needs)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 12)


_linear_logp_op.register_autograd(_op_backward, setup_context=_op_setup)


# ---------------------------------------------------------------------------------------------------------- logits that exist


def _rows_of(logits: Tensor) -> list[Tensor]:
    """Logits as [n, V] pieces without a copy, where at most the outermost dim breaks the rows' even spacing."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() > 2:
        try:
            return [logits.view(-1, logits.shape[-1])]
        except RuntimeError:
            return [piece for part in logits.unbind(0) for piece in _rows_of(part)]
    return [logits if logits.dim() == 2 else logits.unsqueeze(0)]


def _split(x: Tensor, pieces: list[Tensor], dim: int = -1) -> Sequence[Tensor]:
    return [x] if len(pieces) == 1 else x.split([len(z) for z in pieces], dim)


def _label_forward(logits: Tensor, labels: Tensor, more: bool, temperature: float, softcap: float, ignore_index: int) -> Tensor:
    V, wide = logits.shape[-1], _wide_type(logits.dtype)
    pieces, labels = _rows_of(logits), labels.reshape(-1).contiguous()
    outs = []
    for z, y in zip(pieces, _split(labels, pieces), strict=True):
        state, out = z.new_empty((_STATES, len(z)), dtype=wide), z.new_zeros((_OUTPUTS, len(z)), dtype=wide)
        torch.ops.mmfast.logp_update_(z, None, y, 0, V, more, temperature, softcap, ignore_index, state, out)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1) if outs else logits.new_zeros((_OUTPUTS, 0), dtype=wide)


def _label_gradient(
    grad: Tensor, out: Tensor, logits: Tensor, labels: Tensor, more: bool, temperature: float, softcap: float, ignore_index: int
) -> Tensor:
    V = logits.shape[-1]
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    pieces, labels = _rows_of(logits), labels.reshape(-1).contiguous()
    parts = (_split(x, pieces) for x in (labels, out, grad))
    for z, to, y, o, g in zip(pieces, _split(result.view(-1, V), pieces, 0), *parts, strict=True):
        used = [g[i].contiguous() if more or i < ENTROPY else None for i in (LOGP, LSE, ENTROPY, SQUARES)]
        torch.ops.mmfast.logp_grad_(z, None, to, y, 0, V, temperature, softcap, ignore_index, o.contiguous(), *used, None)
    return result


_label_op = torch.library.custom_op("mmfast::label_logp", _label_forward, mutates_args=())
_label_gradient_op = torch.library.custom_op("mmfast::label_logp_backward", _label_gradient, mutates_args=())


@_label_op.register_fake
def _(logits, labels, more, temperature, softcap, ignore_index):
    return logits.new_empty(_OUTPUTS, labels.numel(), dtype=_wide_type(logits.dtype))


@_label_gradient_op.register_fake
def _(grad, out, logits, labels, *options):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


for _name in ("logp_update_", "logp_grad_"):  # they write to tensors given to them: for fake ones there is nothing to do
    torch.library.register_fake(f"mmfast::{_name}", lambda *_: None)


def _label_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)
    ctx.options = inputs[2:]


def _label_backward(ctx, grad):
    logits, labels, out = ctx.saved_tensors
    return (_label_grad(grad, out, logits, labels, *ctx.options),)


_label_grad = without_graph(torch.ops.mmfast.label_logp_backward.default, _label_gradient)
_label = differentiable(torch.ops.mmfast.label_logp.default, 1, _label_backward, _label_setup, _label_forward)


# ------------------------------------------------------------------------------------------------------- gradients in forward


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunks: Sequence[Tensor],
    objective: Callable[[Tensor, int], Tensor],
    options: _Options | None = None,
) -> Tensor:
    """A sum of objectives over chunks of rows, its gradients formed in forward while a chunk's logits exist: three products, any size.

    Args:
        hidden: ``[.., H]``, weight ``[V, H]``, bias ``[V]`` or None, labels int64 ``[..]``.
        chunks: int64 row indices of each chunk (into the flattened labels), none of them ignored.
        objective: ``(logp [rows of the chunk], chunk number) -> scalar``; called with gradient on, and differentiated at once.

    Returns:
        The sum, a scalar in float32 (float64 for float64). Backward only multiplies what forward made, and does so once.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden, weight, bias = (t if t is None else t.to(torch.get_autocast_dtype(kind)) for t in (hidden, weight, bias))
    options = options or objective_options(hidden)
    _check("linear_objective", (hidden, weight, bias), labels, None)
    _check_labels("linear_objective", labels.reshape(-1), len(weight), options)
    if not torch.is_grad_enabled():  # a parameter needs its gradient even then, as an autograd.Function sees it
        hidden, weight, bias = (t if t is None else t.detach() for t in (hidden, weight, bias))
    return _GradInForward.apply(hidden, weight, bias, labels, chunks, objective, options)


class _GradInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunks, objective, options):
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        V, kind = len(weight), _z_type(hidden, options)
        wide = _wide_type(kind)
        needs = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=wide)
        # fp16 has no room for derivatives before the loss scale comes, in backward: they are brought to the size of 1 and kept in fp32.
        narrow = hidden.dtype == torch.float16
        grad_hidden = torch.zeros_like(flat, dtype=wide if narrow else None) if needs[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] and narrow else None
        grad_bias = weight.new_zeros(V, dtype=wide) if needs[2] else None
        buffer = hidden.new_empty(max((len(c) for c in chunks), default=0) * V, dtype=kind)
        for i, rows in enumerate(chunks):
            h, y, n = flat.index_select(0, rows), labels[rows], len(rows)
            z = _logits((h, weight, bias), 0, V, buffer)
            state, out = h.new_empty((_STATES, n), dtype=wide), h.new_zeros((_OUTPUTS, n), dtype=wide)
            torch.ops.mmfast.logp_update_(z, None, y, 0, V, False, options.temperature, options.softcap, options.ignore_index, state, out)
            with torch.enable_grad():
                logp = out[LOGP].detach().requires_grad_()
                value = objective(logp, i)
            total += value.detach()
            if n == 0 or not any(needs):
                continue
            (g,) = torch.autograd.grad(value, logp, allow_unused=True) if value.requires_grad else (None,)
            if g is None:
                continue
            scale = torch.ldexp(torch.ones_like(g[:1]), torch.frexp(g.abs().max()).exponent) if narrow else None
            g = g.contiguous() if scale is None else g / scale
            torch.ops.mmfast.logp_grad_(
                z, None, z, y, 0, V, options.temperature, options.softcap, options.ignore_index, out, g, None, None, None, None
            )
            if needs[2]:
                grad_bias += z.sum(0, dtype=wide) if scale is None else z.sum(0, dtype=wide) * scale
            z = z if z.dtype == h.dtype else z.to(h.dtype)
            if needs[0]:
                part = _accumulate(None, z, weight, False)
                grad_hidden.index_copy_(0, rows, part if scale is None else part.to(wide) * scale)
            if needs[1]:
                if scale is None:
                    grad_weight = _accumulate(grad_weight, z.t(), h, len(chunks) > 1)  # several add up in fp32, whatever the head's type
                else:
                    for a in range(0, V, 8192):  # in pieces: the product and its multiple are as large as the head
                        grad_weight[a : a + 8192].add_(_wide_product(z[:, a : a + 8192].t(), h) * scale)
        if needs[1] and grad_weight is None:  # nothing was scored
            grad_weight = torch.zeros_like(weight)
        ctx.grads = (None if grad_hidden is None else grad_hidden.view(hidden.shape), grad_weight, grad_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_objective: its gradients were used up by an earlier backward; call it again for another one")
        grads, ctx.grads = ctx.grads, None
        for g in grads:
            if g is not None and g.is_cuda:  # mostly by 1, which only the device knows: then nothing is touched
                torch.ops.mmfast.logp_scale_(g, grad)
            elif g is not None and grad != 1:
                g.mul_(grad)
        return (*(g if g is None else g.to(t) for g, t in zip(grads, ctx.types, strict=True)), *(None,) * 4)
