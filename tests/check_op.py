"""Three questions about an op: are its values right, are its gradients right, is its registration sound?"""

from collections.abc import Callable

import torch
from torch import Tensor

# One rounding of the type, relative. Float64 is compared with float64 sums in another order: a few roundings.
UNIT = {torch.float64: 2.0**-48, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference over the norm of the truth (over 1 if that is 0)."""
    difference = (value.double() - truth.double()).norm().item()
    return difference / (truth.double().norm().item() or 1.0)


def check_close(value: Tensor, truth: Tensor, plain: Tensor | None = None, floor: float | None = None, what: str = "value") -> None:
    """The error against the float64 ``truth`` may be twice that of ``plain`` PyTorch in the same type, plus one rounding."""
    assert value.shape == truth.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    allowed = (floor if floor is not None else UNIT[value.dtype]) + (2 * relative_error(plain, truth) if plain is not None else 0.0)
    error = relative_error(value, truth)
    assert error <= allowed, f"{what}: relative error {error:.2e} over the allowed {allowed:.2e}"


def check_gradients(op: Callable, ref: Callable, inputs: list[Tensor], floor: float | None = None) -> None:
    """Gradients of every floating input under random cotangents: op against ref run in float64."""

    def run(function, tensors):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = function(*leaves)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
        scalar = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [
            g if g is not None else torch.zeros_like(t)
            for g, t in zip(torch.autograd.grad(scalar, wanted, allow_unused=True), wanted, strict=True)
        ]

    got = run(op, inputs)
    truth = run(ref, [t.double() if t.is_floating_point() else t for t in inputs])
    plain = run(ref, inputs)
    for i, (g, t, p) in enumerate(zip(got, truth, plain, strict=True)):
        assert g.dtype == p.dtype, f"gradient {i}: type {g.dtype}, expected {p.dtype}"
        check_close(g, t, p, floor, what=f"gradient {i}")


def check_registration(op, args: tuple, kwargs: dict | None = None) -> None:
    """All four of torch's checks: schema, autograd registration, fake tensors, ahead-of-time dispatch with dynamic shapes."""
    torch.library.opcheck(op, args, kwargs or {})
