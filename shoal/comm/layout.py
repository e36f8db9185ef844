"""Where each gradient lies in the one flat buffer that is reduced, and how that buffer is cut up.

The order and the blocks depend on the model alone; only the cuts into buckets and slices depend on the placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 16  # elements: 64 bytes of float32; some matmul libraries sum unaligned operands in another order
BLOCK = 32768  # elements: 128 KiB of float32; the unit of the global norm, and what stays in a core's cache


@dataclass(frozen=True)
class Slot:
    offset: int  # elements from the start of the flat buffer
    size: int


@dataclass(frozen=True)
class Bucket:
    """A run of the flat buffer that is reduced as one; worker r finishes its r-th slice of equal size."""

    start: int
    slice: int  # elements a worker
    workers: int

    @property
    def stop(self) -> int:
        return self.start + self.slice * self.workers

    def owned(self, rank: int) -> range:
        return range(self.start + rank * self.slice, self.start + (rank + 1) * self.slice)


@dataclass(frozen=True)
class Layout:
    slots: tuple[Slot, ...]  # in the order given to `flat_layout`
    state_start: int  # from this element on: buffers, not gradients
    buckets: tuple[Bucket, ...]

    @property
    def elements(self) -> int:
        return self.buckets[-1].stop

    def buckets_of(self, slot: int) -> list[int]:
        """The buckets that hold a part of this slot."""
        begin, end = self.slots[slot].offset, self.slots[slot].offset + max(1, self.slots[slot].size)
        return [i for i, bucket in enumerate(self.buckets) if bucket.start < end and begin < bucket.stop]


def flat_layout(
    gradients: Sequence[int],
    state: Sequence[int],
    workers: int,
    bucket_elements: int,
    held: Sequence[int] | None = None,
    *,
    alignment: int = ALIGNMENT,
) -> Layout:
    """Lay out gradients (sizes in elements, in the order in which they become ready), then buffers.

    Buckets are whole blocks, as many for each worker; the end is padded, and padding is zero.
    ``held``: the numbers of the gradients that are there, in order; None: all. Each has its place in the layout of all,
    without the blocks that hold none of them: `blocks_held` says which are left.
    ``alignment``: of what elements each gradient starts at a multiple."""
    places, offset = _places(gradients, alignment)
    if held is not None:
        blocks = blocks_held(gradients, held, alignment)
        number = {block: index for index, block in enumerate(blocks)}
        places = [
            Slot(number[at.offset // BLOCK] * BLOCK + at.offset % BLOCK, at.size)
            for at in map(places.__getitem__, held)
        ]
        offset = len(blocks) * BLOCK
    state_start = -(-offset // BLOCK) * BLOCK
    more, offset = _places(state, ALIGNMENT, state_start)
    slots = [*places, *more]
    blocks_in_all = max(1, -(-offset // BLOCK))
    rounds = -(-blocks_in_all // workers)  # blocks of each worker over all buckets
    each = max(1, bucket_elements // (BLOCK * workers))
    buckets = []
    start = 0
    for first in range(0, rounds, each):
        part = min(each, rounds - first) * BLOCK
        buckets.append(Bucket(start, part, workers))
        start += part * workers
    return Layout(tuple(slots), state_start, tuple(buckets))


def blocks_held(gradients: Sequence[int], held: Sequence[int], alignment: int = ALIGNMENT) -> list[int]:
    """Which blocks of the layout of all gradients hold some of these, in order."""
    places, _ = _places(gradients, alignment)
    found: set[int] = set()
    for slot in map(places.__getitem__, held):
        found.update(range(slot.offset // BLOCK, (slot.offset + max(1, slot.size) - 1) // BLOCK + 1))
    return sorted(found)


def _places(sizes: Sequence[int], alignment: int, offset: int = 0) -> tuple[list[Slot], int]:
    """One after the other, each aligned; and where the last one ends."""
    slots = []
    for size in sizes:
        slots.append(Slot(offset, size))
        offset += -(-size // alignment) * alignment
    return slots, offset
