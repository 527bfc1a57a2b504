"""From hidden states to a loss and its gradients: preference batches and cross-entropy, against whole logits and chunked peers.

``mmfast bench linear_logp`` (or ``pytest bench/ops/bench_linear_logp.py -s``) prints the tables and writes
``bench/results/<device>/linear_logp.csv``. The clock starts only after a provider's loss and gradients were compared with those written out in float64
and float32. Memory is the peak beyond inputs and gradients.

``dpo``: pairs of 640 positions of which a share is answer (LLaVA: prompt and 576 image tokens are not), reference values known. ``eager`` is
TRL's way: logits of every position, logsumexp in float32, gather. ``cross-entropy``: every row counts. ``vocabulary``: Qwen's 151,936 tokens.
Shapes: LLaVA's head on a GPU (4096 x 32064), scaled to 1024 x 32000 on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast.nn import FusedLinearDPOLoss

DEVICE = timing.DEVICE
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]
PAIRS, POSITIONS = timing.sizes((4, 640), (16, 640), (2, 24))
H, V = timing.sizes((1024, 32000), (4096, 32064), (32, 300))
LARGE = timing.sizes((4096, 512, 151_936), (4096, 4096, 151_936), (40, 32, 2000))  # rows, width, vocabulary
TOLERANCE = {
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (2e-2, 3e-2),
}  # relative error of the loss (float32 sums are in the thousands), of the gradients
ROWS: list[dict] = []


def write() -> None:
    timing.write_rows("linear_logp", ROWS, columns=[*timing.COLUMNS, "valid_fraction"])


@dataclass
class Batch:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    reference: Tensor  # [2P] log-probabilities

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def make(rows: tuple[int, ...], width: int, vocabulary: int, fraction: float, dtype: torch.dtype) -> Batch:
    torch.manual_seed(0)
    hidden = torch.randn(*rows, width, device=DEVICE).mul(0.5).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).mul(width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, rows, device=DEVICE)
    labels[..., : rows[-1] - round(rows[-1] * fraction)] = -100
    with torch.no_grad():
        near = mmfast.linear_logp(hidden, weight, labels).reshape(rows).sum(-1) if len(rows) == 2 else torch.zeros(0)
    return Batch(hidden, weight, labels, near + torch.randn(near.shape, device=near.device))


# ------------------------------------------------------------------------------------------------------------------ providers


def selected(logits: Tensor, labels: Tensor) -> Tensor:
    """Gather minus logsumexp in float32, row by row, as TRL's ``selective_log_softmax`` has it for float32 logits."""
    at = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float()
    return at - torch.stack([row.float().logsumexp(-1) for row in logits])


def selected_in_half(logits: Tensor, labels: Tensor) -> Tensor:
    """.. and for half types: log-softmax in that type."""
    return torch.stack([F.log_softmax(row, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1) for row, y in zip(logits, labels, strict=True)])


def pair_loss(sums: Tensor, reference: Tensor) -> Tensor:
    return mmfast.preference_loss(*sums.chunk(2), *reference.chunk(2))[0]


def dpo_providers(b: Batch) -> dict[str, Callable[[], Tensor]]:
    keep = b.labels != -100
    chosen, rejected = b.reference.chunk(2)
    fused = FusedLinearDPOLoss()

    def eager(select=selected):
        logp = select(F.linear(b.hidden, b.weight), b.labels.masked_fill(~keep, 0))
        return pair_loss((logp * keep).sum(-1).to(b.reference.dtype), b.reference)

    def compact():
        return pair_loss(mmfast.linear_logp(b.hidden, b.weight, b.labels).sum(-1), b.reference)

    made = {
        "eager": eager,
        "mmfast": lambda: fused(b.weight, b.hidden, b.labels, ref_chosen_logps=chosen, ref_rejected_logps=rejected)[0],
        "mmfast linear_logp": compact,
    }
    if b.hidden.dtype != torch.float32:
        made["eager, log-softmax in half"] = lambda: eager(selected_in_half)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        print(f"liger-kernel left out: {error}")
    else:  # it takes no reference values: the reference's hidden states are made to cost nothing but their product
        liger = LigerFusedLinearDPOLoss()
        still = b.hidden.detach()
        made["liger"] = lambda: liger(b.weight, b.hidden, b.labels, None, still, b.weight.detach())[0]
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        print(f"cut-cross-entropy left out: {error}")
    else:
        made["cut-cross-entropy"] = lambda: pair_loss(
            -linear_cross_entropy(b.hidden, b.weight, b.labels, reduction="none", ignore_index=-100).sum(-1), b.reference
        )
    return made


def cross_entropy_providers(b: Batch) -> dict[str, Callable[[], Tensor]]:
    made = {
        "eager": lambda: F.cross_entropy(F.linear(b.hidden, b.weight).float(), b.labels),
        "mmfast": lambda: mmfast.linear_cross_entropy(b.hidden, b.weight, b.labels),
        "mmfast linear_logp": lambda: -mmfast.linear_logp(b.hidden, b.weight, b.labels).mean(),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        made["torch chunked"] = lambda: F.linear_cross_entropy(b.hidden, b.weight, b.labels, options=options)
    else:
        print("F.linear_cross_entropy left out: this torch has no chunked form of it")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
    except ImportError as error:
        print(f"liger-kernel left out: {error}")
    else:
        made["liger"] = lambda: Liger.apply(b.hidden, b.weight, b.labels)[0]
    if DEVICE == "cuda":  # peers that have no CPU path
        try:
            from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled
        except ImportError as error:
            print(f"liger-kernel's per-token op left out: {error}")
        else:
            made["liger per token"] = lambda: (lambda nll: (nll[0] if isinstance(nll, tuple) else nll).mean())(
                Scaled.apply(b.hidden, b.weight, b.labels)
            )
        try:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy
        except ImportError as error:
            print(f"quack-kernels left out: {error}")
        else:
            made["quack"] = lambda: chunked_linear_cross_entropy(b.hidden, b.weight, b.labels)
    return made


# ---------------------------------------------------------------------------------------------------------------------- tests


def truth(b: Batch, made: str) -> tuple[float, list[Tensor]]:
    """The loss and its gradients, written out a piece of rows at a time: log-probabilities in float64, products in float32."""
    flat, labels = b.hidden.detach().reshape(-1, b.hidden.shape[-1]).float(), b.labels.reshape(-1)
    weight, pieces = b.weight.detach().float(), (labels != -100).nonzero()[:, 0].split(512)
    logp = torch.zeros(len(labels), dtype=torch.float64, device=DEVICE)
    for rows in pieces:
        logp[rows] = (flat[rows] @ weight.T).double().log_softmax(-1).gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
    logp.requires_grad_()
    loss = pair_loss(logp.view(b.labels.shape).sum(-1), b.reference.double()) if made == "dpo" else -logp.mean()
    (upstream,) = torch.autograd.grad(loss, logp)
    grads = [torch.zeros_like(flat), torch.zeros_like(weight)]
    for rows in pieces:
        dz = -(flat[rows] @ weight.T).softmax(-1)
        dz[torch.arange(len(rows)), labels[rows]] += 1
        dz *= upstream[rows].float().unsqueeze(-1)
        grads[0][rows] = dz @ weight
        grads[1] += dz.T @ flat[rows]
    return loss.item(), [g.view(t.shape) for g, t in zip(grads, b.leaves(), strict=True)]


def measure(op: str, b: Batch, made: dict[str, Callable[[], Tensor]], dtype: torch.dtype, fraction: float, repeats: int) -> None:
    shape = f"{' x '.join(map(str, b.labels.shape))} rows, {b.hidden.shape[-1]} x {len(b.weight)}"
    print(f"\n{op} {shape}, {fraction:.0%} scored, {str(dtype).removeprefix('torch.')}")
    expected, whole = truth(b, op)
    calls, errors = {}, {}
    for name, forward in made.items():
        try:
            loss = forward()
            grads = torch.autograd.grad(loss, b.leaves())
        except Exception as refusal:  # whatever a peer says, it does not end the run
            if name.startswith("mmfast") or name == "eager":
                raise
            print(f"  {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
            continue
        wrong = abs(loss.item() - expected) / abs(expected)
        apart = max(((g.float() - w).norm() / w.norm()).item() for g, w in zip(grads, whole, strict=True))
        if name != "liger" or op != "dpo":  # Liger's DPO has another reference
            assert not name.startswith("mmfast") or (wrong < TOLERANCE[dtype][0] and apart < TOLERANCE[dtype][1]), (name, wrong, apart)
            if wrong > TOLERANCE[dtype][0] or apart > TOLERANCE[dtype][1]:
                print(f"  {name} left out: loss off by {wrong:.1e}, gradients by {apart:.1e}")
                continue
        errors[name] = wrong
        calls[name] = lambda f=forward: torch.autograd.grad(f(), b.leaves())
    del whole, grads, loss
    times = timing.interleaved(calls, repeats=repeats if DEVICE == "cpu" else 100, warmup=0 if DEVICE == "cpu" else 5, device=DEVICE)
    gradients = sum(t.numel() * t.element_size() for t in b.leaves()) / 2**20
    valid = int((b.labels != -100).sum())  # three products over the rows that count; inputs read and gradients written once
    least = {"flops": 6 * valid * b.weight.numel(), "bytes_": 2 * gradients * 2**20, "rate": str(dtype).removeprefix("torch.")}
    for name, (median, p20, p80) in times.items():
        peak = timing.peak_memory_mb(calls[name], DEVICE) - gradients
        ratio = times["eager"][0] / median
        print(f"  {name:26s} {median:10.2f} ms  [{p20:.2f}, {p80:.2f}]  {ratio:6.2f} x eager  {peak:8.1f} MB  error {errors[name]:.1e}")
        ROWS.append(dict(op=op, provider=name, mode="forward+backward", shape=shape, dtype=str(dtype).removeprefix("torch."),
                         median_ms=f"{median:.3f}", p20_ms=f"{p20:.3f}", p80_ms=f"{p80:.3f}", peak_mb=f"{peak:.1f}",
                         ratio_vs_eager=f"{ratio:.3f}", max_err=f"{errors[name]:.1e}", valid_fraction=fraction,
                         **timing.work(median_ms=median, **least),
                         version=mmfast.__version__ if name.startswith("mmfast") else torch.__version__))  # fmt: skip
    write()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fraction", [0.15, 0.5, 1.0])
def test_dpo(fraction, dtype):
    batch = make((2 * PAIRS, POSITIONS), H, V, fraction, dtype)
    measure("dpo", batch, dpo_providers(batch), dtype, fraction, repeats=5 if fraction < 0.5 else 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", timing.sizes([512, 1280], [4096, 16384], [40]))
def test_cross_entropy(rows, dtype):
    batch = make((rows,), H, V, 1.0, dtype)
    measure("cross-entropy", batch, cross_entropy_providers(batch), dtype, 1.0, repeats=5)


def test_a_large_vocabulary():
    """4,096 rows on 151,936 tokens: logits and their gradient would take 5 GB. Time and memory of ours alone."""
    rows, width, vocabulary = LARGE
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    batch = make((rows,), width, vocabulary, 1.0, dtype)
    call = lambda: torch.autograd.grad(-mmfast.linear_logp(batch.hidden, batch.weight, batch.labels).mean(), batch.leaves())  # noqa: E731
    times = timing.interleaved({"mmfast linear_logp": call}, repeats=2, warmup=0, device=DEVICE)["mmfast linear_logp"]
    peak = timing.peak_memory_mb(call, DEVICE) - sum(t.numel() * t.element_size() for t in batch.leaves()) / 2**20
    shape = f"{rows} rows, {width} x {vocabulary}"
    print(f"\nvocabulary {shape}: {times[0]:.0f} ms, {peak:.0f} MB beyond inputs and gradients")
    ROWS.append(dict(op="vocabulary", provider="mmfast linear_logp", mode="forward+backward", shape=shape,
                     dtype=str(dtype).removeprefix("torch."), median_ms=f"{times[0]:.3f}", p20_ms=f"{times[1]:.3f}",
                     p80_ms=f"{times[2]:.3f}", peak_mb=f"{peak:.1f}", ratio_vs_eager="", max_err="", valid_fraction=1.0,
                     **timing.work(6 * rows * batch.weight.numel(), 0, str(dtype).removeprefix("torch."), times[0]),
                     version=mmfast.__version__))  # fmt: skip
    write()
