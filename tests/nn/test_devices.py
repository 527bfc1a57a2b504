"""Every module of mmfast.nn gives on a GPU what it gives on the CPU: values, the gradient of the input, and updated buffers."""

import copy

import pytest
import torch
from torch import nn

import mmfast.nn

TEXT = torch.tensor([[0, 1, 0, 0, 1, 0]] * 2)
MODULES = {
    "VectorQuantize": (lambda: mmfast.nn.VectorQuantize(dim=24, codebook_size=40), lambda: (torch.randn(2, 50, 24),)),
    "VectorQuantizer2": (lambda: mmfast.nn.VectorQuantizer2(40, 24), lambda: (torch.randn(2, 24, 5, 6),)),
    "PerceiverResampler": (
        lambda: mmfast.nn.PerceiverResampler(dim=32, depth=2, dim_head=16, heads=4, num_latents=5, max_num_frames=3),
        lambda: (torch.randn(2, 2, 3, 17, 32),),
    ),
    "QFormer": (
        lambda: mmfast.nn.QFormer(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, encoder_hidden_size=20, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        lambda: (torch.randn(2, 4, 32), torch.randn(2, 11, 20)),
    ),
    "GatedCrossAttention": (
        lambda: mmfast.nn.GatedCrossAttention(dim=32, dim_visual=24, dim_head=16, heads=2),
        lambda: (torch.randn(2, 6, 32), torch.randn(2, 2, 5, 24), TEXT),
    ),
    "IdeficsGatedBlock": (
        lambda: mmfast.nn.IdeficsGatedBlock(dim=32, dim_visual=24, heads=2, inner=40, qk_norm=True, gates="vector"),
        lambda: (torch.randn(2, 6, 32), torch.randn(2, 2, 5, 24), TEXT),
    ),
}  # fmt: skip


def run(module: nn.Module, args: tuple) -> dict[str, torch.Tensor]:
    args = tuple(a.detach().clone().requires_grad_(a.is_floating_point()) for a in args)
    out = module(*args)
    out = out if isinstance(out, tuple) else (out,)
    floats = [t for t in out if isinstance(t, torch.Tensor) and t.is_floating_point()]
    sum((t * torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)).sum() for t in floats).backward()
    seen = {f"out {i}": t for i, t in enumerate(floats)} | {f"grad of input {i}": a.grad for i, a in enumerate(args) if a.requires_grad}
    return seen | {f"grad of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None} | dict(module.named_buffers())


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_gpu_gives_what_the_cpu_gives(name):
    make, inputs = MODULES[name]
    module, args = make().train(), inputs()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.2)  # gates that start at 0 would hide what is behind them
    twin = copy.deepcopy(module).cuda()
    cpu, gpu = run(module, args), run(twin, tuple(a.cuda() for a in args))
    assert cpu.keys() == gpu.keys()
    for key, value in cpu.items():
        size = max(1.0, value.double().abs().max().item())  # of a flag, too
        torch.testing.assert_close(gpu[key].cpu(), value, rtol=1e-4, atol=1e-4 * size, msg=key)
