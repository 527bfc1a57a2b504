"""Loads the compiled ops, once, says how to build them when they are missing, and calls them at the least cost to the host."""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    from mmfast import _C
except ImportError as error:
    found = torch.__version__.split("+")[0]
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 10):
        hint = f"mmfast needs torch >= 2.10, this is {found}: pip install 'torch>=2.10'."
    else:
        hint = "The compiled part of mmfast is missing or broken: in its source folder run `pip install --no-build-isolation .`"
    raise ImportError(f"{hint} ({error})") from error

build_info = _C.build_info
force_cpu_isa = _C.force_cpu_isa

_below_autograd = torch._C._AutoDispatchBelowAutograd  # what torch.library's own rules enter before they call the kernel
_transformed = torch._C._are_functorch_transforms_active


def without_graph(op: Callable, run: Callable | None = None) -> Callable:
    """``op`` for calls that no gradient flows through, such as those of a backward rule: where no graph is recorded, eager code goes past the
    dispatcher's stop for autograd, a function in Python. ``run``: what the op does, if that is Python itself."""
    run = run or op

    def call(*args):
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or _transformed():
            return op(*args)
        with _below_autograd():
            return run(*args)

    return call


def of_constants(op: Callable) -> Callable:
    """``op``, its arguments taken as constants of whatever graph they belong to."""

    def call(*args):
        if torch.compiler.is_compiling() or _transformed():
            return op(*(a.detach() if isinstance(a, Tensor) else a for a in args))
        with _below_autograd():
            return op(*args)

    return call


def differentiable(op: Callable, count: int, backward: Callable, setup: Callable, run: Callable | None = None) -> Callable:
    """Registers ``op``'s autograd rule, and returns the op under that rule as eager code is to call it.

    ``backward(ctx, *grads)`` gives the gradients of the first ``count`` arguments, ``setup(ctx, inputs, output)`` saves what it needs. A call
    of the op itself takes tens of microseconds longer: torch.library fills in defaults and looks up signatures, every time.
    """
    run, others = run or op, len(op._schema.arguments) - count
    torch.library.register_autograd(op, lambda ctx, *grads: (*backward(ctx, *grads), *(None,) * others), setup_context=setup)

    class Rule(torch.autograd.Function):  # the other arguments travel as one
        @staticmethod
        def forward(*args):
            with _below_autograd():
                return run(*args[:-1], *args[-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, (*inputs[:-1], *inputs[-1]), output)

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    Rule.__name__ = Rule.__qualname__ = op._schema.name.removeprefix("mmfast::")
    apply = super(torch.autograd.Function, Rule).apply  # without the signature that Function.apply looks up for torch.func alone

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled():
            for t in args[:count]:
                if t is not None and t.requires_grad:
                    return (Rule.apply if _transformed() else apply)(*args[:count], args[count:])
        if _transformed():
            return op(*args)
        with _below_autograd():
            return run(*args)

    return call
