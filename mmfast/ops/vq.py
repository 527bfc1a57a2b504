"""Vector quantisation: exact nearest codes, the quantised output with its gradients, and codebook statistics.

Letters: N rows (tokens) of x, D width, K codes. ``x`` is ``[.., D]`` or, with ``channel_dim=1``, ``[B, D, ..]`` as convolutions
leave it; no copy is made for either. Types: float32, float16, bfloat16, float64 on CPU and CUDA; x and codebook may differ.

Sources: VQ-VAE (arXiv:1711.00937), VQGAN / taming-transformers (arXiv:2012.09841), the rotation trick (arXiv:2410.06424). How the
search certifies its answers: docs/kernels.md.
"""

import torch
from torch import Tensor

from mmfast.ops.library import differentiable, of_constants, without_graph

_METRICS = {"l2": 0, "cosine": 1, "ip": 2}
_GRADIENTS = {"none": 0, "ste": 1, "rotation": 2}


def _number(op: str, what: str, value: str, known: dict[str, int]) -> int:
    if value not in known:
        raise ValueError(f"{op}: unknown {what} {value!r}, expected one of {', '.join(map(repr, known))}")
    return known[value]


# ---------------------------------------------------------------------------------------------------------- nearest code


def vq_nearest(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", channel_dim: int = -1, return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code of every row; exactly the float64 argmin of the given values, ties to the lowest index.

    Args:
        x: ``[.., D]``, or with another ``channel_dim`` the D values along that dim; any strides.
        codebook: ``[K, D]``.
        metric: ``"l2"`` minimises ``||x - e||^2``, ``"cosine"`` ``1 - x.e / (||x|| ||e||)`` (0 over 0 is 0), ``"ip"`` ``-x.e``.
        return_distance: also return the minimised quantity (no gradient), float64 for float64 x and float32 otherwise.

    Returns:
        int64 indices of x's shape without the channel dim, and the distances in the same shape if asked for.

    Raises:
        RuntimeError: shapes, types or devices that do not fit; on the CPU also a row of x or a code that holds NaN or Inf. On CUDA,
            where raising would cost a synchronisation, such a row gets index -1 (NaN distance) and such a code is never chosen.
    """
    number = _number("vq_nearest", "metric", metric, _METRICS)
    indices, distance = _nearest(x, codebook, number, channel_dim, return_distance)
    return (indices, distance) if return_distance else indices


_nearest = of_constants(torch.ops.mmfast.vq_nearest.default)


def vq_nearest_ref(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", channel_dim: int = -1, return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """``vq_nearest`` in plain PyTorch, in float64: its meaning and its test oracle. Makes the N x K matrix."""
    number = _number("vq_nearest", "metric", metric, _METRICS)
    rows, codes = x.movedim(channel_dim, -1).double(), codebook.double()
    flat = rows.reshape(-1, rows.shape[-1])
    if number == 0:
        cost = torch.stack([(row - codes).square().sum(-1) for row in flat]) if len(flat) else flat.new_empty(0, len(codes))
    else:
        if number == 1:
            flat, codes = (v / v.norm(dim=-1, keepdim=True).where(v.norm(dim=-1, keepdim=True) > 0, 1.0) for v in (flat, codes))
        cost = (1.0 if number == 1 else 0.0) - flat @ codes.T
    distance, indices = cost.min(-1) if len(flat) else (cost.new_empty(0), cost.new_empty(0, dtype=torch.long))
    indices, distance = indices.view(rows.shape[:-1]), distance.view(rows.shape[:-1])
    return (indices, distance.to(torch.float64 if x.dtype == torch.float64 else torch.float32)) if return_distance else indices


@torch.library.register_fake("mmfast::vq_nearest")
def _(x, codebook, metric, channel_dim, return_distance):
    _check_fake("vq_nearest", x, codebook, channel_dim)
    sizes = _row_sizes(x, channel_dim)
    return x.new_empty(sizes, dtype=torch.long), x.new_empty(sizes if return_distance else [0], dtype=_wide(x))


def _check_fake(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> None:
    """What the kernel checks first: tensors on the meta device come here instead, also a codebook alone beside real rows."""
    torch._check(x.device == codebook.device, lambda: f"{op}: x is on {x.device}, codebook on {codebook.device}; move one to the other's")
    torch._check(
        codebook.dim() == 2 and codebook.shape[1] == x.shape[channel_dim],
        lambda: f"{op}: expected codebook [K, D={x.shape[channel_dim]}] like x {list(x.shape)}, got {list(codebook.shape)}",
    )


def _row_sizes(x: Tensor, channel_dim: int) -> list[int]:
    sizes = list(x.shape)
    del sizes[channel_dim]
    return sizes


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -------------------------------------------------------------------------------------------------------------- quantise


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    legacy: bool = True,
    gradient: str = "ste",
    channel_dim: int = -1,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces every row by its nearest code (l2) and returns the codebook loss, in one pass over x.

    ``loss = w_commit mean((x - sg e)^2) + w_code mean((sg x - e)^2)`` over the elements of all valid rows, sg the stop-gradient.
    taming-transformers put beta on the wrong side once and kept it: ``legacy=True`` is that (w_commit 1, w_code beta),
    ``legacy=False`` the paper's (w_commit beta, w_code 1). The value is the same, the gradients are not.

    Args:
        x: ``[.., D]`` or any ``channel_dim``.
        codebook: ``[K, D]``.
        gradient: how the gradient of ``quantized`` reaches x: ``"ste"`` unchanged, ``"rotation"`` rotated and scaled from the code to
            x (arXiv:2410.06424, eq. 4; a row or code of length 0 falls back to ste), ``"none"`` not at all.
        mask: bool, x's shape without the channel dim. Rows with False come back unchanged with index -1 and no share in the loss.

    Returns:
        quantized (x's shape and type, the code's values), indices (int64), loss (scalar, float32; float64 for float64 x; 0 if no row
        is valid).

    Raises:
        ValueError: unknown ``gradient``. RuntimeError: as ``vq_nearest``.
    """
    number = _number("vq_quantize", "gradient", gradient, _GRADIENTS)
    w_commit, w_code = (1.0, beta) if legacy else (beta, 1.0)
    total = w_commit + w_code
    # The op returns the mean squared error; the shares say how its gradient is split between x and the codes.
    shares = (w_commit / total, w_code / total) if total else (0.0, 0.0)
    quantized, indices, mse = _quantize(x, codebook, mask, channel_dim, number, *shares)
    return quantized, indices, mse * total


def vq_quantize_ref(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    legacy: bool = True,
    gradient: str = "ste",
    channel_dim: int = -1,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``vq_quantize`` in plain PyTorch; autograd supplies the gradients."""
    number = _number("vq_quantize", "gradient", gradient, _GRADIENTS)
    w_commit, w_code = (1.0, beta) if legacy else (beta, 1.0)
    rows = x.movedim(channel_dim, -1)
    valid = torch.ones(rows.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    indices = vq_nearest_ref(torch.where(valid.unsqueeze(-1), rows, 0).detach(), codebook.detach())
    code = codebook[indices].to(_wide(x))
    wide = rows.to(_wide(x))
    count = max(int(valid.sum()) * rows.shape[-1], 1)
    commit = (wide - code.detach())[valid].square().sum() / count
    codes = (wide.detach() - code)[valid].square().sum() / count
    if number == 1:
        out = wide + (code - wide).detach()
    elif number == 2:
        out = _rotate(wide, code.detach())
    else:
        out = code.detach() + 0.0 * wide.detach()
    out = torch.where(valid.unsqueeze(-1), out.to(x.dtype), rows).movedim(-1, channel_dim)
    return out, torch.where(valid, indices, -1), w_commit * commit + w_code * codes


def _rotate(x: Tensor, e: Tensor) -> Tensor:
    """Value e; gradient of the fixed linear map that rotates x's direction into e's and scales its length (arXiv:2410.06424)."""
    nx, ne = x.detach().norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
    u, q = x.detach() / nx, e / ne
    w = torch.nn.functional.normalize(u + q, dim=-1)
    turned = x - 2 * w * (w * x).sum(-1, keepdim=True) + 2 * q * (u * x).sum(-1, keepdim=True)
    return torch.where((nx > 0) & (ne > 0), ne / nx * turned, x + (e - x).detach())


@torch.library.register_fake("mmfast::vq_quantize")
def _(x, codebook, mask, channel_dim, gradient, commit_share, code_share):
    _check_fake("vq_quantize", x, codebook, channel_dim)
    return (
        torch.empty_like(x),
        x.new_empty(_row_sizes(x, channel_dim), dtype=torch.long),
        x.new_empty([], dtype=_wide(x)),
    )


@torch.library.register_fake("mmfast::vq_quantize_backward")
def _(grad_q, grad_mse, x, codebook, indices, commit_share, code_share, gradient, channel_dim, need_x, need_codebook):
    return torch.empty_like(x) if need_x else x.new_empty([0]), (
        codebook.new_empty(codebook.shape) if need_codebook else codebook.new_empty([0])
    )


def _quantize_setup(ctx, inputs, output):
    x, codebook, _, ctx.channel_dim, ctx.gradient, ctx.commit_share, ctx.code_share = inputs
    quantized, indices, _ = output
    # A fixed codebook is usually about to be moved in place by its running average, so keep the rows it gave (an output that lives
    # anyway) instead of the codebook, unless they are rounded to a narrower type.
    ctx.keeps_rows = not codebook.requires_grad and quantized.dtype == codebook.dtype
    ctx.save_for_backward(x, quantized if ctx.keeps_rows else codebook, indices)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _quantize_backward(ctx, grad_q, _, grad_mse):
    x, codes, indices = ctx.saved_tensors
    need_x, need_codebook = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if grad_q is None and grad_mse is None:
        return None, None
    if ctx.keeps_rows:  # row r's code is row r
        codes = codes.movedim(ctx.channel_dim, -1).reshape(-1, x.shape[ctx.channel_dim])
        indices = torch.where(indices < 0, indices, torch.arange(len(codes), device=x.device).view(indices.shape))
        if len(codes) == 0:
            return grad_q, None
    grad_x, grad_codebook = _quantize_grad(
        grad_q, grad_mse, x, codes, indices, ctx.commit_share, ctx.code_share, ctx.gradient, ctx.channel_dim, need_x, need_codebook
    )
    return grad_x if need_x else None, grad_codebook if need_codebook else None


_quantize_grad = without_graph(torch.ops.mmfast.vq_quantize_backward.default)
_quantize = differentiable(torch.ops.mmfast.vq_quantize.default, 2, _quantize_backward, _quantize_setup)


# --------------------------------------------------------------------------------------------------- codebook statistics


def vq_code_stats(x: Tensor, indices: Tensor, K: int, *, weight: Tensor | None = None, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
    """How many rows each code got and what they add up to: ``counts [K]``, ``sums [K, D]``, in float32 (float64 for float64 x).

    Deterministic: sums are formed in row order, whatever the number of threads. Rows with index -1 are left out; ``weight`` (float32, one
    a row) multiplies both. Both outputs are plain sums over rows, so all-reduce them across ranks before ``vq_ema_step_``.

    Raises:
        RuntimeError: shapes that do not fit; on the CPU also an index outside [-1, K), which CUDA leaves out instead.
    """
    return _code_stats(x, indices, K, weight, channel_dim)


_code_stats = of_constants(torch.ops.mmfast.vq_code_stats.default)


def vq_code_stats_ref(x: Tensor, indices: Tensor, K: int, *, weight: Tensor | None = None, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
    """``vq_code_stats`` in plain PyTorch: the one-hot matrix product."""
    rows = x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim]).double()
    hot = (indices.reshape(-1, 1) == torch.arange(K, device=x.device)).double()
    if weight is not None:
        hot = hot * weight.reshape(-1, 1).double()
    return hot.sum(0).to(_wide(x)), (hot.T @ rows).to(_wide(x))


@torch.library.register_fake("mmfast::vq_code_stats")
def _(x, indices, K, weight, channel_dim):
    return x.new_empty([K], dtype=_wide(x)), x.new_empty([K, x.shape[channel_dim]], dtype=_wide(x))


def vq_ema_step_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    normalize: bool = False,
) -> None:
    """One moving-average step of the codebook from (all-reduced) statistics, in place (VQ-VAE, arXiv:1711.00937, appendix A.1).

    ``N <- decay N + (1 - decay) counts``, ``M <- decay M + (1 - decay) sums``, ``n = sum N``,
    ``e_k = M_k / ((N_k + eps) / (n + K eps) n)``, then to unit length if ``normalize``. All of one type, float32 or float64, contiguous.
    """
    torch.ops.mmfast.vq_ema_step_(cluster_size, embed_avg, codebook, counts, sums, decay, eps, normalize)


def vq_ema_step_ref_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    normalize: bool = False,
) -> None:
    """``vq_ema_step_`` in plain PyTorch."""
    cluster_size.copy_(decay * cluster_size.double() + (1 - decay) * counts.double())
    embed_avg.copy_(decay * embed_avg.double() + (1 - decay) * sums.double())
    n = cluster_size.double().sum()
    smoothed = (cluster_size.double() + eps) / (n + len(codebook) * eps) * n
    code = embed_avg.double() / smoothed.unsqueeze(-1)
    if normalize:
        length = code.norm(dim=-1, keepdim=True)
        code = code / torch.where(length > 0, length, 1.0)
    codebook.copy_(torch.where(smoothed.unsqueeze(-1) > 0, code, codebook.double()))


@torch.library.register_fake("mmfast::vq_ema_step_")
def _(cluster_size, embed_avg, codebook, counts, sums, decay, eps, normalize):
    return None


def vq_ema_update_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    channel_dim: int = -1,
    normalize: bool = False,
) -> None:
    """``vq_code_stats`` and ``vq_ema_step_`` at once: the single-process update, in place and deterministic.

    On the CPU the ``[K, D]`` sums never exist.
    """
    torch.ops.mmfast.vq_ema_update_(cluster_size, embed_avg, codebook, x, indices, weight, channel_dim, decay, eps, normalize)


@torch.library.register_fake("mmfast::vq_ema_update_")
def _(cluster_size, embed_avg, codebook, x, indices, weight, channel_dim, decay, eps, normalize):
    return None


def vq_ema_update_ref_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    channel_dim: int = -1,
    normalize: bool = False,
) -> None:
    """``vq_ema_update_`` in plain PyTorch."""
    counts, sums = vq_code_stats_ref(x, indices, len(codebook), weight=weight, channel_dim=channel_dim)
    vq_ema_step_ref_(cluster_size, embed_avg, codebook, counts, sums, decay=decay, eps=eps, normalize=normalize)
