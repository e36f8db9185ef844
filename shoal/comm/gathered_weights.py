"""Parameters that each worker holds a slice of, and that are gathered bucket by bucket where they are needed.

They lie in the order of the flat buffer of gradients. That buffer's memory for parameters is as large as all of them,
but what others own is there only between `start` and `release`: on the processor its pages are given back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shoal.comm.lanes import LanedGroup, Work
from shoal.comm.layout import Layout
from shoal.comm.pages import Pages, resident_bytes
from shoal.comm.slices import Piece, Sharing, owned_ranges


class GatheredWeights:
    """Every worker of the group makes the same calls of `start`, in the same order."""

    def __init__(
        self,
        group: LanedGroup,
        rank: int,
        sharing: Sharing,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        count: Callable[[int, int], None],
    ) -> None:
        """``group``: the workers that hold everything once; ``rank``: this one's among all that train.

        ``count`` is told of every all-gather: bytes of each worker, and how many workers."""
        self._group, self._layout, self.parameters, self._count = group, layout, parameters, count
        self._lane = group.lane()  # gathers are matched by their order among themselves
        self._members = sharing.members
        self._pages: dict[torch.dtype, Pages] = {}
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            self._pages[dtype] = Pages(layout.elements, dtype, parameters[0].device)
        self._place()
        self._kinds: list[list[torch.dtype]] = [[] for _ in layout.buckets]  # of the parameters in each bucket
        for slot, parameter in enumerate(parameters):
            for index in layout.buckets_of(slot):
                if parameter.dtype not in self._kinds[index]:
                    self._kinds[index].append(parameter.dtype)
        self._own: list[list[range]] = [[] for _ in layout.buckets]
        for index, own in owned_ranges(layout, sharing.slices(rank)):
            self._own[index].append(own)
        self._works: dict[int, list[Work]] = {}  # buckets that are coming in
        self.here = set(range(len(layout.buckets)))  # buckets that are whole
        self._foreign = foreign_bytes(layout, parameters, sharing.slices(rank))
        self._owned_bytes = sum(p.nbytes for p in parameters) - sum(self._foreign)
        self._there = set(self.here)  # buckets of which there is memory for what others own
        self._most = 0

    @torch.no_grad()
    def _place(self) -> None:
        for parameter, slot in zip(self.parameters, self._layout.slots, strict=False):
            flat = self._pages[parameter.dtype].tensor
            view = flat[slot.offset : slot.offset + slot.size].view(parameter.shape)
            parameter.data = view.copy_(parameter)

    def piece(self, piece: Piece) -> Tensor:
        """See `Piece.of`."""
        parameter = self.parameters[piece.slot]
        return piece.of(self._pages[parameter.dtype].tensor, parameter.shape)

    def start(self, bucket: int) -> None:
        """Begin to bring in what others own of a bucket that is not here."""
        if bucket in self.here or bucket in self._works:
            return
        self._there.add(bucket)
        self._most = max(self._most, self._foreign_bytes())
        works: list[Work] = []
        with self._group.explained("the all-gather of parameters"):
            for dtype in self._kinds[bucket]:
                flat = self._pages[dtype].tensor
                for run, own in self._runs(bucket):
                    whole, mine = flat[run.start : run.stop], flat[own.start : own.stop]
                    works.append(self._lane.all_gather(whole, mine))
                    self._count(mine.nbytes, self._members)
        self._works[bucket] = works

    def _runs(self, bucket: int) -> list[tuple[range, range]]:
        """The parts of a bucket of which each worker of the group holds one slice, and which slice this one holds."""
        size = self._layout.buckets[bucket].slice
        found = []
        for own in self._own[bucket]:
            start = own.start - self._group.rank * size
            found.append((range(start, start + size * self._members), own))
        return found

    def wait(self, bucket: int) -> None:
        """Until the bucket is whole."""
        if bucket in self._works:
            with self._group.explained("the all-gather of parameters"):
                for work in self._works.pop(bucket):
                    work.wait()
            self.here.add(bucket)

    def stale(self, bucket: int) -> None:
        """What others own of a bucket is not here any more, or not as it should be; its memory stays."""
        self.wait(bucket)
        self.here.discard(bucket)

    def release(self, bucket: int) -> None:
        """Give back the memory of what others own of a bucket."""
        self.stale(bucket)
        self._there.discard(bucket)
        whole = self._layout.buckets[bucket]
        ends = [whole.start, *(end for own in self._own[bucket] for end in (own.start, own.stop)), whole.stop]
        for dtype in self._kinds[bucket]:
            for start, stop in zip(ends[::2], ends[1::2], strict=True):
                self._pages[dtype].release(start, stop)

    def _foreign_bytes(self) -> int:
        return sum(self._foreign[bucket] for bucket in self._there)

    def count_anew(self) -> None:
        """`most_bytes` is from now on."""
        self._most = self._foreign_bytes()

    def most_bytes(self) -> int:
        """The most memory that parameters have had on this worker at once: its own slices, and what came in."""
        return self._owned_bytes + self._most

    def bucket_at(self, address: int) -> int | None:
        """The bucket that memory at this address belongs to; None for other memory."""
        for pages in self._pages.values():
            offset = address - pages.tensor.data_ptr()
            if 0 <= offset < pages.tensor.nbytes:
                element = offset // pages.tensor.itemsize
                return next(i for i, b in enumerate(self._layout.buckets) if b.start <= element < b.stop)
        return None

    def held_bytes(self) -> dict[str, int]:
        """The memory that parameters have on this worker right now: its own slices, and what has been gathered."""
        every = own = 0
        for pages in self._pages.values():
            every += resident_bytes(pages.tensor)
            own += sum(resident_bytes(pages.tensor[r.start : r.stop]) for ranges in self._own for r in ranges)
        return {"parameters": own, "gathered": every - own}


def foreign_bytes(layout: Layout, parameters: Sequence[nn.Parameter], slices: Sequence[int]) -> list[int]:
    """Bytes of parameters in each bucket that lie in none of the ``slices`` of these ranks."""
    found = []
    for bucket in layout.buckets:
        count = 0
        for parameter, slot in zip(parameters, layout.slots, strict=False):
            place = range(slot.offset, slot.offset + slot.size)
            own = sum(_common(place, bucket.owned(rank)) for rank in slices)
            count += (_common(place, range(bucket.start, bucket.stop)) - own) * parameter.itemsize
        found.append(count)
    return found


def _common(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
