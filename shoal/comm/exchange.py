"""Carrying out the reduction tree between workers: partial sums in, one global mean gradient out, on every worker.

The protocol of a step, the same for every exchange:

    begin(passes)      which leaves have samples; `partials` now names this worker's buffers, the last result is let go
    claim()            before the first write to `partials`
    facts[...] = ...   this worker's row of small numbers: what the denominators need, before the first post; the rest
                       before the last one
    post()             the next bucket of all own partials is final; called once a bucket, in order
    advance()          reduce what every worker has posted, without waiting; called whenever there is a moment
    finish()           wait for the rest; `result` is the mean gradient, `norm` its global norm
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch

from shoal.comm.layout import BLOCK, Bucket, Layout
from shoal.comm.tree import Accumulation, Add, accumulation, completion, covering, row

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup

Denominators = Callable[[torch.Tensor], tuple[float, float]]  # all facts -> (for gradients, for buffers)
_READY, _DONE, _CLIPPED, _RELEASED = 2, 3, 4, 5  # message kinds; the group uses 1


class Placement:
    """Who owns which leaves, and what follows from it for a step with the given passes a leaf."""

    def __init__(self, ownership: Sequence[range], rank: int, *, fast: bool) -> None:
        self.ownership = tuple(ownership)
        self.rank = rank
        self.fast = fast
        self.accumulation = lru_cache(maxsize=8)(self._accumulation)
        self.adds = lru_cache(maxsize=8)(self._adds)

    def _accumulation(self, passes: tuple[int, ...]) -> Accumulation:
        return (row if self.fast else accumulation)(self.ownership[self.rank], passes)

    def partials(self, passes: Sequence[int]) -> list[int]:
        """How many partial sums each worker ends up with."""
        if self.fast:
            return [int(any(passes[leaf] for leaf in owned)) for owned in self.ownership]
        return [
            sum(any(passes[node.start : node.stop]) for node in covering(owned, len(passes)))
            for owned in self.ownership
        ]

    def _adds(self, passes: tuple[int, ...]) -> list[Add]:
        """The additions over all workers' partials; the total ends up in operand 0."""
        if self.fast:
            return [Add(0, other) for other in range(1, sum(self.partials(passes)))]
        return completion(self.ownership, passes)


class Exchange(Protocol):
    layout: Layout
    facts: torch.Tensor  # float64 [facts]: this worker's row, to be filled before the first post
    all_facts: torch.Tensor  # float64 [workers, facts]: complete after finish
    partials: Sequence[torch.Tensor]  # this worker's flat buffers [elements] for the step, those of `placement`
    result: torch.Tensor  # [elements]: valid after finish, until the next begin
    shared_result: bool  # True: the result is other workers' memory too, and must not be written
    alone: bool  # True: the one worker divides by the denominators itself, while each gradient is in the cache

    def begin(self, passes: tuple[int, ...]) -> None: ...
    def claim(self) -> None: ...
    def post(self) -> None: ...
    def advance(self) -> None: ...
    def finish(self) -> float:
        """Wait until the result is whole on this worker; the global norm of the gradients."""

    def scale(self, factor: float) -> None:
        """Multiply the gradients of the result, on all workers; called by all of them."""


def divide(chunk: torch.Tensor, start: int, layout: Layout, denominators: tuple[float, float]) -> None:
    """Turn a finished sum into a mean; ``start`` is where the chunk of whole blocks lies in the flat buffer."""
    by = denominators[0] if start < layout.state_start else denominators[1]
    if by != 1.0:
        chunk.div_(by)


def global_norm(squares: Sequence[float]) -> float:
    """From the sums of squares of all blocks; fsum rounds once, so that neither order nor padding matters."""
    if not all(map(math.isfinite, squares)):
        return math.nan
    return math.sqrt(math.fsum(squares))


class HeapExchange:
    """Workers of one host: every partial sum lies in shared memory, and owners add in place. Nothing is copied.

    The result is the memory of operand 0, which all workers map; a reduce-scatter whose all-gather costs nothing."""

    shared_result = True

    def __init__(
        self,
        group: "HostGroup",
        layout: Layout,
        placement: Placement,
        most_passes: tuple[int, ...],
        facts: int,
        denominators: Denominators,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self._placement, self._denominators = layout, placement, denominators
        self._group, self._mesh = group, group.mesh
        self.alone = group.world == 1

        def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
            if device.type == "cpu":
                return group.heap.tensor(elements, dtype)
            return torch.zeros(elements, dtype=dtype, device=device)  # a lone worker with an accelerator shares nothing

        self._facts = group.heap.tensor(group.world * facts, torch.float64).view(group.world, facts)
        self.facts = self._facts[group.rank]
        self.all_facts = torch.empty_like(self._facts)
        self._squares = allocate(layout.elements // BLOCK, torch.float64)
        self._buffers = [
            [allocate(layout.elements, dtype) for _ in range(count)] for count in placement.partials(most_passes)
        ]
        self.partials: Sequence[torch.Tensor] = ()
        self._sequence = 0
        self.result = self._buffers[0][0]
        self._operands: list[torch.Tensor] = []
        self._adds: list[Add] = []
        self._posted = self._reduced = 0
        self._heard = [0] * group.world
        self._views: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def begin(self, passes: tuple[int, ...]) -> None:
        counts = self._placement.partials(passes)
        self.partials = self._buffers[self._group.rank][: counts[self._group.rank]]
        self._operands = [b for buffers, n in zip(self._buffers, counts, strict=True) for b in buffers[:n]]
        self._adds = self._placement.adds(passes)
        self.result = self._operands[0]
        self._posted = self._reduced = 0
        self._heard = [0] * self._group.world
        if self._group.rank:
            self._mesh.send(0, _RELEASED, self._sequence)

    def claim(self) -> None:
        """Rank 0's first buffer was the last result: wait until nobody reads it any more."""
        if self._group.rank == 0:
            for rank in self._mesh.others:
                self._mesh.receive(rank, _RELEASED, self._sequence)

    def post(self) -> None:
        self._mesh.broadcast(_READY, self._sequence + self._posted)
        self._posted += 1

    def advance(self) -> None:
        self._advance(wait=False)

    def _advance(self, *, wait: bool) -> None:
        while self._reduced < self._posted:
            for rank in self._mesh.others:
                if self._heard[rank] > self._reduced:
                    continue
                ask = self._mesh.receive if wait else self._mesh.take
                if ask(rank, _READY, self._sequence + self._reduced) is None:
                    return
                self._heard[rank] += 1
            if self._reduced == 0:
                self.all_facts.copy_(self._facts)
            self._reduce(self.layout.buckets[self._reduced])
            self._reduced += 1

    @torch.no_grad()
    def _reduce(self, bucket: Bucket) -> None:
        """Finish the own slice, block by block while it is in the cache."""
        denominators = self._denominators(self.all_facts)
        owned = bucket.owned(self._group.rank)
        squares: list[torch.Tensor] = []
        columns = [self._blocks(operand, owned) for operand in self._operands]
        for start, blocks in zip(range(owned.start, owned.stop, BLOCK), zip(*columns, strict=True), strict=True):
            for add in self._adds:
                blocks[add.into].add_(blocks[add.other])
            if not self.alone:
                divide(blocks[0], start, self.layout, denominators)
            if start < self.layout.state_start:
                squares.append(torch.dot(blocks[0], blocks[0]))
        if squares:
            first = owned.start // BLOCK
            self._squares[first : first + len(squares)] = torch.stack(squares)

    def _blocks(self, buffer: torch.Tensor, owned: range) -> tuple[torch.Tensor, ...]:
        """The blocks of a slice of a buffer; the views are made once."""
        key = (buffer.data_ptr(), owned.start)
        if key not in self._views:
            self._views[key] = torch.split(buffer[owned.start : owned.stop], BLOCK)
        return self._views[key]

    def finish(self) -> float:
        self._advance(wait=True)
        self.all_facts.copy_(self._facts)  # all have posted their last bucket: the rows are complete
        self._barrier(_DONE)
        self._sequence += len(self.layout.buckets)
        return global_norm(self._squares.tolist())

    def _barrier(self, kind: int) -> None:
        self._mesh.broadcast(kind, self._sequence)
        for rank in self._mesh.others:
            self._mesh.receive(rank, kind, self._sequence)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        for bucket in self.layout.buckets:
            owned = bucket.owned(self._group.rank)
            stop = min(owned.stop, self.layout.state_start)
            if owned.start < stop:
                self.result[owned.start : stop].mul_(factor)
        self._barrier(_CLIPPED)
