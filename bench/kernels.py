"""Which kernels a call launches and how long each runs, by torch's profiler: where an op's time goes on a GPU.

    python bench/kernels.py [vq] [logp] [attention] > bench/results/<device>/kernels.txt

A line a call (its time in a row of calls, the host's part of it, the sum of its kernels), below it the longest kernels.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mmfast
from mmfast.nn import FusedLinearDPOLoss, VectorQuantize

REPEATS, SHOWN = 5, 9


def show(name: str, call: Callable[[], object]) -> None:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    host = (time.perf_counter() - start) / REPEATS * 1e3
    end.record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    kernels = sorted((e for e in seen.key_averages() if e.device_type == DeviceType.CUDA), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / REPEATS / 1e3
    print(f"## {name}: {begin.elapsed_time(end) / REPEATS:.4f} ms a call (host {host:.4f}), kernels {total:.4f} ms", flush=True)
    for e in kernels[:SHOWN]:
        print(f"   {e.self_device_time_total / REPEATS / 1e3:9.4f} ms  x{e.count / REPEATS:<5g} {e.key[:110]}")


def vq() -> None:
    for n, k, d in ((32768, 8192, 256), (1024, 8192, 256), (32768, 16384, 32)):
        x, codes = torch.randn(n, d, device="cuda"), torch.randn(k, d, device="cuda")
        show(f"vq_nearest {n} x {k} x {d}", lambda x=x, codes=codes: mmfast.vq_nearest(x, codes))
        show(f"cdist argmin {n} x {k} x {d}", lambda x=x, codes=codes: torch.cdist(x, codes).argmin(1))
    module, x = VectorQuantize(256, 8192).cuda().train(), torch.randn(32, 1024, 256, device="cuda")
    show("VectorQuantize training step 32 x 1024", lambda: module(x))


def logp() -> None:
    """LLaVA's head, 16 pairs of 640 positions, 15 % scored."""
    answers, positions, width, words = 32, 640, 4096, 32064
    hidden = (torch.randn(answers, positions, width, device="cuda") / 2).bfloat16().requires_grad_()
    head = (torch.randn(words, width, device="cuda") * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, words, (answers, positions), device="cuda")
    labels[:, : positions - 96] = -100
    chosen, rejected = torch.randn(answers, device="cuda").chunk(2)
    module = FusedLinearDPOLoss()

    def fused():
        loss = module(head, hidden, labels, ref_chosen_logps=chosen, ref_rejected_logps=rejected)[0]
        return torch.autograd.grad(loss, (hidden, head))

    def plain():
        sums = mmfast.linear_logp(hidden, head, labels).sum(-1)
        return torch.autograd.grad(mmfast.preference_loss(*sums.chunk(2), chosen, rejected)[0], (hidden, head))

    show("FusedLinearDPOLoss", fused)
    show("linear_logp + preference_loss", plain)
    rows = hidden.detach().flatten(0, 1)[:4096].clone().requires_grad_()
    targets = torch.randint(0, words, (4096,), device="cuda")
    show("linear_cross_entropy 4096 rows", lambda: torch.autograd.grad(mmfast.linear_cross_entropy(rows, head, targets), (rows, head)))


def attention() -> None:
    """Flamingo's resampler: 64 latents on n image tokens and themselves."""
    for dtype in (torch.bfloat16, torch.float32):
        for batch, n in ((64, 256), (1, 2048), (256, 256)):
            q, k, v, k2, v2 = (
                torch.randn(batch, rows, 8, 64, device="cuda", dtype=dtype, requires_grad=True) for rows in (64, n, n, 64, 64)
            )
            out = mmfast.cross_attention(q, k, v, k2, v2)
            weight, name = torch.randn_like(out), f"resampler, batch {batch}, {n} tokens, {str(dtype).removeprefix('torch.')}"
            leaves = (q, k, v, k2, v2)
            still = [t.detach() for t in leaves]
            show(f"{name}: forward", lambda t=still: mmfast.cross_attention(*t))
            show(f"{name}: forward and backward", lambda t=leaves, w=weight: torch.autograd.grad(mmfast.cross_attention(*t), t, w))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("kernels.py: no GPU here; it shows what kernels take on one")
    parts = {"vq": vq, "logp": logp, "attention": attention}
    if unknown := [a for a in sys.argv[1:] if a not in parts]:
        sys.exit(f"kernels.py: unknown part {unknown[0]!r}, expected {', '.join(parts)}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, mmfast {mmfast.__version__}")
    for name in sys.argv[1:] or parts:
        parts[name]()
