"""Which item of several data sets comes when: a function of (seed, epoch) alone, so a resumed run needs no state but these and a place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Mixed:
    """An order over the items of several parts; item i of part p has the index ``starts[p] + i``. An epoch has as many items as all parts.

    Without weights, every item comes once an epoch. With weights, an epoch is divided among the parts by them (to the nearest item, the
    sequence of parts shuffled), and each part is walked in shuffled order, on from where the last epoch left it: no item of a part comes a
    second time before all of them have come.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None] | None = None, seed: int = 0):
        self.sizes, self.seed, self.total = list(sizes), seed, sum(sizes)
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"a mixture needs parts with items in them, got sizes {self.sizes}")
        self.starts = [sum(self.sizes[:p]) for p in range(len(self.sizes))]
        weights = [None] * len(self.sizes) if weights is None else list(weights)
        if len(weights) != len(self.sizes):
            raise ValueError(f"a mixture of {len(self.sizes)} parts got {len(weights)} weights")
        self.counts: list[int] | None = None
        if all(w is None for w in weights):
            return
        if any(w is None for w in weights):
            raise ValueError(f"some parts of a mixture have a weight and some none ({weights}); give one to all of them or to none")
        if not all(0 < w < math.inf for w in weights):
            raise ValueError(f"weights of a mixture must be above 0, got {weights}")
        # Largest remainders: the counts add up to the epoch, each within one of its exact share.
        exact = [self.total * w / sum(weights) for w in weights]
        self.counts = [math.floor(e) for e in exact]
        for p in sorted(range(len(exact)), key=lambda p: self.counts[p] - exact[p])[: self.total - sum(self.counts)]:
            self.counts[p] += 1
        if 0 in self.counts:
            raise ValueError(f"part {self.counts.index(0)} of a mixture has too small a weight to be drawn once in an epoch: {weights}")

    def __len__(self) -> int:
        return self.total

    def order(self, epoch: int) -> Tensor:
        """Indices int64 ``[total]`` of an epoch."""
        if self.counts is None:
            return self._shuffled(self.total, "all", epoch)
        part = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.counts))[self._shuffled(self.total, "parts", epoch)]
        order = torch.empty(self.total, dtype=torch.long)
        for p, count in enumerate(self.counts):
            order[part == p] = self._walk(p, epoch * count, count)
        return order

    def _walk(self, part: int, first: int, count: int) -> Tensor:
        """``count`` draws of a part from its ``first`` on, as global indices."""
        size, draws = self.sizes[part], torch.arange(first, first + count)
        walk = torch.empty(count, dtype=torch.long)
        for lap in range(first // size, (first + count - 1) // size + 1):
            here = draws // size == lap
            walk[here] = self._shuffled(size, f"part {part}", lap)[draws[here] % size]
        return walk + self.starts[part]

    def _shuffled(self, count: int, what: str, lap: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {what} {lap}".encode()).digest()
        return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
