"""The exchange between hosts for sharded states: what a worker has of the mean gradient in the end is its slices.

ZeRO-2 (Rajbhandari et al., 2020). No worker holds the whole result; what comes in lies in a few pieces of memory that
are used again; and a bucket of the own partial sums is given back as soon as it has been sent.
"""

import json
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from shoal.comm.distributed import DistributedExchange
from shoal.comm.exchange import Terms, cuts, denominator
from shoal.comm.finishing import block_squares, finish_flat
from shoal.comm.lanes import Lane, LanedGroup
from shoal.comm.layout import BLOCK
from shoal.comm.pages import Pages, now_and_then, resident_bytes
from shoal.comm.slices import Piece, Sharing, owned_ranges, pieces_of

ROOMS = 4  # buckets that may be coming in at once


class SlicedExchange(DistributedExchange):
    """See shoal.comm.exchange. ``piece`` gives what `result_of` does not."""

    sliced_result = True
    keeps_sums = False

    def __init__(self, group: LanedGroup, terms: Terms, sharing: Sharing) -> None:
        self.sharing = sharing
        self.before_finish: Callable[[], None] = lambda: None
        self.gauged = False  # the memory of partial sums is to be measured before it is given back
        self._most = 0
        super().__init__(group, terms)
        self._even = True  # all workers have as many passes in this step
        self._twins = group.split(sharing.twins())
        self._twins_lane = self._twins.lane(shared=True)

    def _reserve(self, terms: Terms) -> None:
        layout, dtype, device = terms.layout, terms.dtype, terms.device
        self._counts = counts = terms.partials()
        self._pages = [Pages(layout.elements, dtype, device) for _ in range(counts[self._group.rank])]
        self._buffers = [pages.tensor for pages in self._pages]
        self._room_elements = sum(counts) * max(bucket.slice for bucket in layout.buckets)
        self._like = torch.zeros(0, dtype=dtype, device=device)
        self._rooms: list[Tensor] = []  # free ones
        self._used: dict[int, Tensor] = {}  # bucket -> where it comes in
        copies = self.sharing.world // self.sharing.members
        sizes = [bucket.slice * copies for bucket in layout.buckets]
        self._own = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self._own_of = list(torch.split(self._own, sizes))
        ranges = [own for _, own in owned_ranges(layout, self.sharing.slices(self._group.rank))]
        self._starts = [own.start for own in ranges]
        self._places = list(accumulate(map(len, ranges), initial=0))  # where each lies in the own memory
        self._squares = torch.zeros(sum(bucket.slice for bucket in layout.buckets) // BLOCK, dtype=torch.float64)
        self._all_squares = torch.zeros(self._group.world, len(self._squares), dtype=torch.float64)
        state = [bucket for bucket in layout.buckets if bucket.stop > layout.state_start]
        has_state = layout.slots[-1].offset >= layout.state_start
        self._state_from = state[0].start if state and has_state else layout.elements
        self._state = torch.zeros(layout.elements - self._state_from, dtype=dtype, device=device)

    @property
    def beside_bytes(self) -> int:
        """Of what a step holds beside partial sums, at the most."""
        uneven = len(set(map(len, self._placement.ownership))) > 1
        buckets = len(self.layout.buckets)
        rooms = self._room_elements * (buckets if uneven else min(ROOMS, buckets))
        gathered = 2 * max(bucket.stop - bucket.start for bucket in self.layout.buckets)  # copies while gathers run
        return self._own.nbytes + self._state.nbytes + (rooms + gathered) * self._like.itemsize

    def _partials_there(self) -> int:
        return sum(resident_bytes(pages.tensor) for pages in self._pages)

    def most_sums(self) -> int:
        """The most memory of this worker's partial sums in this step: pages, which torch does not count."""
        return max(self._most, self._partials_there())

    def _room(self, bucket: int) -> Tensor:
        """See DistributedExchange. When all are taken, wait until the oldest bucket has come in; but not in a step in
        which a peer has more passes: it may be waiting for this worker to take part in gathers of parameters."""
        if not self._rooms and (len(self._used) < ROOMS or not self._even):
            self._rooms.append(self._like.new_zeros(self._room_elements))
        while not self._rooms:
            self._advance_one()
        self._used[bucket] = self._rooms.pop()
        return self._used[bucket]

    def _advance_one(self) -> None:
        posted, self._posted = self._posted, self._reduced + 1
        self._advance(wait=True)
        self._posted = posted

    def begin(self, passes: tuple[int, ...]) -> None:
        super().begin(passes)
        self.passes, self._most = passes, 0
        del self._rooms[ROOMS:]
        self._even = len({self.most_passes([rank]) for rank in range(self._group.world)}) == 1

    def most_passes(self, ranks: Sequence[int]) -> int:
        """Of the workers of these ranks, how many backward passes the one with the most has in this step."""
        return max(sum(self.passes[leaf] for leaf in self._placement.ownership[rank]) for rank in ranks)

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        bucket, operands, rank = self.layout.buckets[index], self._operands[index], self._group.rank
        denominators = self._denominators(self._early_facts)
        owned = bucket.owned(rank)
        first = sum(b.slice for b in self.layout.buckets[:index]) // BLOCK
        for start, stop in cuts(self.layout, owned.start, owned.stop):
            parts = [operand[start - owned.start : stop - owned.start] for operand in operands]
            squares = None
            if start < self.layout.state_start:
                squares = self._squares[first : first + (stop - start) // BLOCK]
            on_host = operands[0].device.type == "cpu"
            by = denominator(start, self.layout, denominators)
            finish_flat(parts, self._placement.adds(self.passes), by, squares if on_host else None)
            if squares is not None and not on_host:
                squares.copy_(block_squares(parts[0]))
        if self.sharing.members == self.sharing.world:
            self._own_of[index].copy_(operands[0])
        else:
            mine = operands[0].clone()  # the room is used again while this goes out
            self._start_gather(self._own_of[index], mine, self._twins_lane, self._twins.world)
        if bucket.stop > self._state_from:
            place = bucket.start - self._state_from
            whole = self._state[place : place + bucket.stop - bucket.start]
            self._start_gather(whole, operands[0].clone(), self._results)
        if index == len(self.layout.buckets) - 1:
            self._start_gather(self._all_squares.view(-1), self._squares, self._results)
        self._operands[index] = []
        self._rooms.append(self._used.pop(index))
        if self.gauged and now_and_then(index, len(self.layout.buckets)):
            self._most = max(self._most, self._partials_there())
        for pages in self._pages:
            pages.release(bucket.start, bucket.stop)

    def _start_gather(self, whole: Tensor, mine: Tensor, lane: Lane, workers: int = 0) -> None:
        self._gathers.append(lane.all_gather(whole, mine))
        self.count_gather(mine.nbytes, workers or self._group.world)

    def count_gather(self, nbytes: int, workers: int) -> None:
        """An all-gather among so many workers, each with so many bytes, over the links to all: which is not asked."""
        self._count("all-gather", nbytes * (workers - 1) / max(1, self._group.world - 1))

    @torch.no_grad()
    def finish(self) -> Tensor:
        self.before_finish()
        self._complete()
        columns = [bucket.slice // BLOCK for bucket in self.layout.buckets]
        return torch.cat([part.reshape(-1) for part in torch.split(self._all_squares, columns, 1)])

    def result_of(self, slot: int) -> Tensor:
        place = self.layout.slots[slot]
        return self._state[place.offset - self._state_from :][: place.size]

    def piece(self, piece: Piece) -> Tensor:
        """The mean of a piece that this worker holds, flat: valid after finish, until the next begin."""
        index = bisect(self._starts, piece.place) - 1
        start = self._places[index] + piece.place - self._starts[index]
        return self._own[start : start + piece.length]

    def not_finite(self) -> set[int]:
        """The slots whose mean is not finite, on whichever worker. Called by all, after finish."""
        pieces = pieces_of(self.layout, self.sharing.slices(self._group.rank))
        mine = sorted({piece.slot for piece in pieces if not bool(self.piece(piece).isfinite().all())})
        return {slot for row in self._group.gather(json.dumps(mine).encode()) for slot in json.loads(row)}

    def held_bytes(self) -> dict[str, int]:
        """After finish: the own slices of the result; what partial sums still hold, and what has come in."""
        return {
            "gradients": self._own.nbytes,
            "partial sums": self._partials_there(),
            "coming in": sum(room.nbytes for room in self._rooms),
        }

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self._own.mul_(factor)
