"""Which part of each parameter a worker updates: its slices of the flat buffer, cut at the ends of parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm.layout import Layout


@dataclass(frozen=True)
class Piece:
    """The elements ``start <= i < stop`` of a slot, flat."""

    slot: int
    start: int
    stop: int
    place: int  # where it starts in the flat buffer

    @property
    def length(self) -> int:
        return self.stop - self.start

    def of(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """Its memory in a flat buffer of parameters, flat; in the parameter's shape when it is all of it."""
        part = flat[self.place : self.place + self.length]
        return part.view(shape) if self.length == shape.numel() else part


@dataclass(frozen=True)
class Sharing:
    """Who holds which slices: ``members`` workers, next to each other by rank, hold all of them together once.

    The worker that finishes a slice of the gradient is one of those that hold it: within its group, worker i holds the
    slices of all ranks that are i modulo the size of a group. One group of all workers: each holds what it finishes."""

    world: int
    members: int

    def groups(self) -> list[tuple[int, ...]]:
        """The ranks of each group that holds everything once."""
        return [tuple(range(first, first + self.members)) for first in range(0, self.world, self.members)]

    def twins(self) -> list[tuple[int, ...]]:
        """The ranks that hold the same slices, of each set of slices."""
        return [tuple(range(first, self.world, self.members)) for first in range(self.members)]

    def slices(self, rank: int) -> tuple[int, ...]:
        """Whose slices of each bucket a rank holds."""
        return self.twins()[rank % self.members]


def owned_ranges(layout: Layout, slices: Sequence[int]) -> Iterator[tuple[int, range]]:
    """(bucket, elements of the flat buffer) of all slices of these ranks, in the order of the buffer."""
    for index, bucket in enumerate(layout.buckets):
        for rank in slices:
            yield index, bucket.owned(rank)


def pieces_of(layout: Layout, slices: Sequence[int]) -> list[Piece]:
    """The parts of gradients (not of buffers) in the slices of these ranks, in the order of the flat buffer.

    What lies in two slices next to each other is one piece."""
    ranges: list[range] = []
    for _, own in owned_ranges(layout, slices):
        if ranges and ranges[-1].stop == own.start:
            ranges[-1] = range(ranges[-1].start, own.stop)
        else:
            ranges.append(own)
    found = []
    slots = [(index, slot) for index, slot in enumerate(layout.slots) if slot.offset < layout.state_start]
    for own in ranges:
        for index, slot in slots:
            start, stop = max(slot.offset, own.start), min(slot.offset + slot.size, own.stop)
            if start < stop:
                found.append(Piece(index, start - slot.offset, stop - slot.offset, start))
    return found
