"""Carrying out the reduction tree between workers: partial sums in, one global mean gradient out, on every worker.

The protocol of a step, the same for every exchange:

    begin(passes)      which leaves have samples; `partials` now names this worker's buffers, the last result is let go
    claim()            before the first write to `partials`
    facts[...] = ...   this worker's row of small numbers: what the denominators need, before the first post; the rest
                       before the last one
    inside()           around a backward pass: what it makes may be adopted
    adopt(...)         a gradient stays where it is and stands for its slot of a partial, instead of being copied there
    post()             the next bucket of all own partials is final; called once a bucket, in order
    advance()          reduce what every worker has posted, without waiting; called whenever there is a moment
    finish()           wait for the rest; returns each block's sum of squares, and `result_of` gives the mean gradient
"""

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from shoal.comm.accounting.account import Account, stand
from shoal.comm.accounting.counters import Tally
from shoal.comm.arena import OwnMemory
from shoal.comm.finishing import Slice, fast_path, finish_flat, finish_pieces, slice_of
from shoal.comm.layout import BLOCK, Layout
from shoal.comm.tree import Accumulation, Add, Node, accumulation, completion, covering, row

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup

Denominators = Callable[[torch.Tensor], tuple[float, float]]  # all facts -> (for gradients, for buffers)
NOWHERE = -1  # a gradient was not adopted: it lies in its slot of the flat buffer
_READY, _DONE, _CLIPPED, _RELEASED = 2, 3, 4, 5  # message kinds; the group uses 1
_WHEN = struct.Struct("<d")  # what each of them says: when it was sent, by the clock that all workers of a host share


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

    @property
    def leaves(self) -> Sequence[int]:
        """Those that this worker computes, in order."""
        return self.ownership[self.rank]

    @property
    def kept(self) -> Sequence[Node]:
        """Nodes that its first partial sums hold before it computes anything."""
        return ()

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


@dataclass(frozen=True)
class Terms:
    """What an exchange is made for. Equal on all workers, but for the rank of the placement and the device."""

    layout: Layout
    placement: Placement
    most_passes: tuple[int, ...]  # of a full step, a leaf: what memory is reserved for
    facts: int  # numbers in a worker's row
    denominators: Denominators
    dtype: torch.dtype  # of the flat buffers
    device: torch.device  # where these lie

    def partials(self) -> list[int]:
        """How many partial sums each worker has at most."""
        return self.placement.partials(self.most_passes)


class Exchange(Protocol):
    layout: Layout
    facts: torch.Tensor  # float64 [facts]: this worker's row, to be filled before the first post
    all_facts: torch.Tensor  # float64 [workers, facts]: complete after finish
    partials: Sequence[torch.Tensor]  # this worker's flat buffers [elements] for the step, those of `placement`
    shared_result: bool  # True: the result is other workers' memory too, and must not be written
    sliced_result: bool  # True: of the gradients each worker has its slices only, and `result_of` is for buffers
    keeps_sums: bool  # the partial sums are there from finish to the next begin, but for what was added in place
    account: Account  # what this worker's steps cost

    @property
    def rows(self) -> np.ndarray:
        """On rank 0, after finish: the accounts of all workers up to the step before, [workers, account.form.width]."""

    def begin(self, passes: tuple[int, ...]) -> None: ...
    def claim(self) -> None: ...
    def inside(self) -> AbstractContextManager[None]: ...
    def adopt(self, buffer: int, slot: int, gradient: torch.Tensor) -> bool:
        """Let a contiguous gradient, whose memory nobody else uses, be its slot of partial ``buffer`` until the step's
        end. False: its memory is not of the right kind, and it must be copied."""

    def post(self) -> None: ...
    def advance(self) -> None: ...
    def finish(self) -> torch.Tensor:
        """Wait until the result is whole on this worker; the sum of squares of each block of gradients, float64
        [blocks, perhaps with more that are zero], valid until the next begin: `global_norm` takes it."""

    def result_of(self, slot: int) -> torch.Tensor:
        """The mean of a slot, flat [size]: valid after finish, until the next begin."""

    def scale(self, factor: float) -> None:
        """Multiply the gradients of the result, on all workers; called by all of them."""


def denominator(start: int, layout: Layout, denominators: tuple[float, float]) -> float:
    """What turns the sum in a slice into a mean; ``start`` is where it lies in the flat buffer."""
    return denominators[0] if start < layout.state_start else denominators[1]


def cuts(layout: Layout, start: int, stop: int) -> list[tuple[int, int]]:
    """A slice in parts that hold either gradients or buffers."""
    middle = min(max(layout.state_start, start), stop)
    return [(a, b) for a, b in ((start, middle), (middle, stop)) if a < b]


class HeapExchange:
    """Workers of one host: every partial sum lies in shared memory, and owners add in place. Nothing is copied.

    The result is the memory of operand 0, which all workers map; a reduce-scatter whose all-gather costs nothing."""

    shared_result = True
    sliced_result = False
    keeps_sums = True

    def __init__(self, group: "HostGroup", terms: Terms) -> None:
        self.layout, self._placement, self._denominators = terms.layout, terms.placement, terms.denominators
        layout, facts, dtype, device = terms.layout, terms.facts, terms.dtype, terms.device
        self._group, self._mesh, self._dtype = group, group.mesh, dtype

        def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
            if device.type == "cpu":
                return group.heap.tensor(elements, dtype)
            return torch.zeros(elements, dtype=dtype, device=device)  # a lone worker with an accelerator shares nothing

        self._facts = group.heap.tensor(group.world * facts, torch.float64).view(group.world, facts)
        self.facts = self._facts[group.rank]
        self.all_facts = torch.empty_like(self._facts)
        link = "shared memory"
        operations = (("reduce-scatter", link), ("release", link), ("barrier", link))
        bucket_bytes = [bucket.slice * group.world * dtype.itemsize for bucket in layout.buckets]
        self.account = Account(group.counters, group.report, operations, bucket_bytes)
        self._reduces, self._releases, self._barriers = self.account.tallies
        shape = (group.world, self.account.form.width)
        self._rows = group.heap.tensor(shape[0] * shape[1], torch.float64).view(shape).numpy()
        self.rows = np.zeros(shape)
        self._squares = allocate(layout.elements // BLOCK, torch.float64)
        self._allocate = allocate
        self._buffers: list[list[torch.Tensor]] = [[] for _ in range(group.world)]
        self.partials: Sequence[torch.Tensor] = ()
        self._sequence = self._began = 0
        self._posts = group.heap.tensor(group.world, torch.int64).numpy()  # buckets that each worker has posted, ever
        self._operands: list[tuple[int, int]] = []  # (rank, buffer), in the order of the tree
        self._adds: list[Add] = []
        self._posted = self._reduced = 0
        self._slices_moved = (0, 0)  # to and from others, of each bucket of the step
        self._heard = [0] * group.world
        self._by = (1.0, 1.0)  # the step's denominators, for gradients and for buffers
        # Where gradients were adopted: every worker's row is read by the owners of slices.
        self._fast = fast_path(dtype, device)
        self._memory = OwnMemory() if group.world == 1 else group.arenas
        self._places = np.empty((group.world, 0, len(layout.slots)), dtype=np.int64)
        self._result_places = np.full(len(layout.slots), NOWHERE)
        self._adopted: dict[tuple[int, int], torch.Tensor] = {}
        self._slot_addresses: dict[tuple[int, int], np.ndarray] = {}
        self._slices: dict[int, list[Slice]] = {}  # bucket -> the own slice's parts
        self._reserve(terms.partials())

    def _reserve(self, counts: Sequence[int]) -> None:
        """Room for so many partial sums of each worker: what is not touched costs nothing. Called by all alike."""
        slots = self.layout.slots
        offsets = np.array([slot.offset for slot in slots], dtype=np.uint64) * np.uint64(self._dtype.itemsize)
        for rank, (buffers, count) in enumerate(zip(self._buffers, counts, strict=True)):
            while len(buffers) < count:
                made = self._allocate(self.layout.elements, self._dtype)
                self._slot_addresses[rank, len(buffers)] = np.uint64(made.data_ptr()) + offsets
                buffers.append(made)
        if self._places.shape[1] < max(counts):
            places = self._group.heap.tensor(len(counts) * max(counts) * len(slots), torch.int64)
            self._places = places.numpy().reshape(len(counts), max(counts), len(slots))
            self._places[self._group.rank] = NOWHERE

    def deal(self, placement: Placement, passes: tuple[int, ...]) -> None:
        """Let other workers bring other sums from the next step on. Called by all, before the first step or after one
        that was dealt so."""
        self._placement = placement
        self._reserve(placement.partials(passes))

    def untouched(self, *, quiet: bool) -> set[int]:
        """After a step was cut short: the own partial sums that nobody has added to, for sure.

        A bucket is reduced by whoever has heard that all have posted it, and each says so here before it says so to
        others. ``quiet``: all other workers of the step have ended or left it, so that what they have said is final;
        else it is this worker's own word that counts, without which nobody can have reduced anything."""
        begun = self._posts.min() if quiet else self._posts[self._group.rank]
        own = {index: number for number, (rank, index) in enumerate(self._operands) if rank == self._group.rank}
        changed = {0, *(add.into for add in self._adds)} if begun > self._began else set()
        return {index for index, number in own.items() if number not in changed}

    def begin(self, passes: tuple[int, ...]) -> None:
        counts, me = self._placement.partials(passes), self._group.rank
        self.partials = self._buffers[me][: counts[me]]
        self._operands = [(rank, index) for rank, count in enumerate(counts) for index in range(count)]
        self._adds = self._placement.adds(passes)
        self._posted = self._reduced = 0
        self._began = self._sequence
        self._heard = [0] * self._group.world
        row = self.account.begin()
        self._rows[me, : len(row)], self._rows[me, len(row) :] = row, 0.0
        own = counts[me]  # each worker reads the others' partial sums of its own slices
        self._slices_moved = own * len(self._mesh.others), sum(counts) - own
        if me:
            self._let_go()
            self._mesh.send(0, _RELEASED, self._sequence, _WHEN.pack(self.account.now()))

    def _let_go(self) -> None:
        self._adopted.clear()
        self._places[self._group.rank] = NOWHERE

    def claim(self) -> None:
        """The last result was this worker's first buffer: wait until nobody reads it any more."""
        if self._group.rank == 0:
            self._stand(self._releases, _RELEASED, self.account.now())
            self._let_go()

    def _stand(self, tally: Tally, kind: int, asked: float) -> None:
        """Stand still until a message of this kind has come from everybody."""
        last, late = asked, self._group.rank
        for rank in self._mesh.others:
            (sent,) = _WHEN.unpack(self._mesh.receive(rank, kind, self._sequence))
            if sent > last:
                last, late = sent, rank
        if self._mesh.others:
            tally.call()
            stand(tally, asked, last, late, self.account.now())

    def inside(self) -> AbstractContextManager[None]:
        return self._memory.inside()

    def adopt(self, buffer: int, slot: int, gradient: torch.Tensor) -> bool:
        place = self._memory.place(gradient) if self._fast and gradient.dtype == self._dtype else None
        if place is None:
            return False
        self._adopted[buffer, slot] = gradient
        self._places[self._group.rank, buffer, slot] = place
        return True

    def post(self) -> None:
        when = self.account.posted(self._posted)
        self._posts[self._group.rank] = self._sequence + self._posted + 1
        self._mesh.broadcast(_READY, self._sequence + self._posted, _WHEN.pack(when))
        if self._mesh.others:
            size = self.layout.buckets[self._posted].slice * self._dtype.itemsize
            sent, received = self._slices_moved
            self._reduces.call(sent=sent * size, received=received * size)
        self._posted += 1

    def advance(self) -> None:
        self._advance(wait=False)

    def _advance(self, *, wait: bool) -> None:
        while self._reduced < self._posted:
            for rank in self._mesh.others:
                if self._heard[rank] > self._reduced:
                    continue
                ask = self._mesh.receive if wait else self._mesh.take
                when = ask(rank, _READY, self._sequence + self._reduced)
                if when is None:
                    return
                self.account.peer_posted(self._reduced, rank, *_WHEN.unpack(when))
                self._heard[rank] += 1
            if self._reduced == 0:
                self.all_facts.copy_(self._facts)
                self._by = self._denominators(self.all_facts)
            self.account.reduces(self._reduced, in_place=True)
            self._reduce(self._reduced)
            self.account.reduced(self._reduced)
            self._reduced += 1

    def _own(self, bucket: int) -> list[Slice]:
        """The parts of the own slice of a bucket: gradients, buffers, or both."""
        if bucket not in self._slices:
            owned = self.layout.buckets[bucket].owned(self._group.rank)
            self._slices[bucket] = [slice_of(self.layout, *cut) for cut in cuts(self.layout, owned.start, owned.stop)]
        return self._slices[bucket]

    @torch.no_grad()
    def _reduce(self, bucket: int) -> None:
        """Finish the own slice: one pass over memory where that can be."""
        addresses = self._addresses() if self._fast else None
        for part in self._own(bucket):
            by = denominator(part.start, self.layout, self._by)
            squares = None
            if part.start < self.layout.state_start:
                squares = self._squares[part.start // BLOCK : part.stop // BLOCK]
            if addresses is not None:
                finish_pieces(part, addresses, self._dtype, self._adds, by, squares)
                continue
            operands = [self._buffers[rank][index][part.start : part.stop] for rank, index in self._operands]
            finish_flat(operands, self._adds, by, squares)

    def _addresses(self) -> np.ndarray:
        """Where each slot of each operand lies in this process: uint64 [operands, slots]."""
        rows = []
        for rank, index in self._operands:
            flat, places = self._slot_addresses[rank, index], self._places[rank, index]
            rows.append(np.where(places == NOWHERE, flat, np.uint64(self._memory.bases[rank]) + places.view(np.uint64)))
        return np.stack(rows)

    def finish(self) -> torch.Tensor:
        self.account.finishes()
        self._advance(wait=True)
        self.all_facts.copy_(self._facts)  # all have posted their last bucket: the rows are complete
        if self._group.rank == 0:
            self.rows[:] = self._rows
        self._result_places[:] = self._places[self._operands[0]]
        self._barrier(_DONE)
        self.account.settle()
        self._sequence += len(self.layout.buckets)
        return self._squares

    def result_of(self, slot: int) -> torch.Tensor:
        rank, index = self._operands[0]
        place, size = int(self._result_places[slot]), self.layout.slots[slot].size
        if place == NOWHERE:
            start = self.layout.slots[slot].offset
            return self._buffers[rank][index][start : start + size]
        if rank == self._group.rank:
            return self._adopted[index, slot].view(-1)
        return self._group.arenas.view(rank, place, size, self._dtype)

    def _barrier(self, kind: int) -> None:
        asked = self.account.now()
        self._mesh.broadcast(kind, self._sequence, _WHEN.pack(asked))
        self._stand(self._barriers, kind, asked)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        for bucket in range(len(self.layout.buckets)):
            for part in self._own(bucket):
                if part.start < self.layout.state_start:
                    for slot, offset, (_, length) in zip(part.slots, part.offsets, part.places, strict=True):
                        self.result_of(int(slot))[offset : offset + length].mul_(factor)
        self._barrier(_CLIPPED)
