"""Where a run takes place: its device, and the processes that share it. Alone and under torchrun the same code runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfast.nn import VQGAN
from mmfast.spec import Compute

from .checkpoint import RunError

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Device, rank and number of processes; ``sharded`` when weights and optimiser are split among them (FSDP2) instead of copied (DDP)."""

    device: torch.device
    rank: int = 0
    processes: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """float64 ``[n]`` summed over all processes."""
        if self.processes > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows ``[N, ..]``, in the order of their ranks; this process's own keep their gradient, the others' are constants."""
        if self.processes == 1:
            return rows
        counts = self.sum(torch.eye(self.processes, dtype=torch.float64)[self.rank] * len(rows)).long().tolist()
        sent = rows.new_zeros(max(counts), *rows.shape[1:])
        sent[: len(rows)] = rows.detach()
        got = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(got, sent)
        return torch.cat([rows if i == self.rank else part[:n] for i, (part, n) in enumerate(zip(got, counts, strict=True))])

    def seed(self, seed: int) -> None:
        """``torch.manual_seed`` for the generators of this place alone. For every kind of device that has not been used yet that function notes
        the caller's stack, which takes longer than all else around a step."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def barrier(self) -> None:
        if self.processes > 1:
            dist.barrier()

    def part(self, index: Tensor) -> Tensor:
        """This process's share of a micro-batch's rows."""
        return index[self.rank :: self.processes]

    def to(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch's tensors on the device."""
        if self.device.type == "cpu":
            return batch
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def find(compute: Compute, requested: str | None = None) -> Place:
    """The place of this process: alone, or one of torchrun's (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), whose group is opened once.

    Raises:
        RunError: CUDA is asked for and not there.
    """
    kind = requested or compute.device
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: this torch finds no CUDA device; use --device cpu, or install a CUDA build of torch")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    processes, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise RunError(
            f"process {local} of this node has no CUDA device, {torch.cuda.device_count()} exist; lower torchrun's --nproc-per-node"
        )
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Place(device, int(os.environ.get("RANK", 0)), processes, processes > 1 and compute.parallel == "fsdp")


def share(objective: nn.Module, blocks: Sequence[nn.Module], place: Place, precision: str = "fp32") -> nn.Module:
    """The objective as all processes train it: itself when alone, a DDP wrapper, or sharded in place.

    Under FSDP2 each block of ``blocks`` is a unit of its own, gathered when it runs; everything else (tower, connector, embeddings, head) is
    one unit that is gathered for the whole step. A rank whose batch has no picture so takes part in the same exchanges as all others. An image
    tokenizer is never gathered in half precision, which would give pictures other codes: a frozen one stays whole on every process.
    """
    if place.processes == 1:
        return objective
    if place.sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Gradients are summed in fp32 whatever the blocks compute in.
        policy = MixedPrecisionPolicy(param_dtype=_TYPES.get(precision), reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(place.device.type, (place.processes,))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        codes = [p for module in objective.modules() if isinstance(module, VQGAN) for p in module.parameters()]
        frozen = {p for p in codes if not p.requires_grad}
        # The objective's own inputs stay as they are: in half precision a step's totals would be rounded, and infinite from 65520 tokens on.
        policy = replace(policy, cast_forward_inputs=False, **({"param_dtype": None} if len(frozen) < len(codes) else {}))
        return fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    if not any(p.requires_grad for p in objective.parameters()):
        return objective
    ids = [place.device] if place.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def last_only(shared: nn.Module, last: bool) -> Iterator[None]:
    """Under DDP gradients travel with the last micro-batch of a step, not with each. Under FSDP2 they do travel with each: kept back, every
    process would hold all of them whole."""
    with shared.no_sync() if isinstance(shared, nn.parallel.DistributedDataParallel) and not last else nullcontext():
        yield


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Whole weights on every rank while the model is used outside the objective's forward: samples, measures. All ranks must enter."""
    units = [m for m in objective.modules() if hasattr(m, "unshard")]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def autocast(place: Place, precision: str):
    """The context that a step's forward runs in."""
    return torch.autocast(place.device.type, _TYPES[precision]) if precision in _TYPES else nullcontext()
