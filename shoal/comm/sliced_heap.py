"""The exchange on one host for sharded states: each worker updates its slices of the one result.

The result is the memory of the first partial sum, there once for all. ZeRO-2 gives back the memory of every other one,
bucket by bucket, as soon as all workers have finished their slices of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.comm.exchange import HeapExchange, Terms
from shoal.comm.group import HostGroup
from shoal.comm.pages import give_back_shared, now_and_then, resident_bytes
from shoal.comm.slices import Piece

_REDUCED = 1  # the only message kind of its channel


class SlicedHeapExchange(HeapExchange):
    """See shoal.comm.exchange. ``piece`` gives the part of the result that this worker holds."""

    sliced_result = True

    def __init__(self, group: HostGroup, terms: Terms, *, releases: bool) -> None:
        super().__init__(group, terms)
        self._gives_back = releases and group.world > 1 and terms.device.type == "cpu"
        self._words = group.split([range(group.world)]).mesh  # of their own: they come between those of the exchange
        self.keeps_sums = not self._gives_back  # the partial sums are there until the next step
        self.on_release: Callable[[Sequence[int]], None] = lambda slots: None
        self._released = 0  # buckets of this step
        self._heard_of = [0] * group.world  # buckets that each worker has said to have finished its slice of
        self._step = 0
        self.gauged = False  # the memory of partial sums is to be measured before it is given back
        self._most = 0
        self._last_bucket = [max(self.layout.buckets_of(slot)) for slot in range(len(self.layout.slots))]

    def begin(self, passes: tuple[int, ...]) -> None:
        super().begin(passes)
        self._released, self._heard_of, self._most = 0, [0] * self._group.world, 0

    def advance(self) -> None:
        super().advance()
        self._release(wait=False)

    @torch.no_grad()
    def _reduce(self, bucket: int) -> None:
        super()._reduce(bucket)
        if self._gives_back:
            self._words.broadcast(_REDUCED, self._step + bucket)

    def finish(self) -> torch.Tensor:
        squares = super().finish()  # all have finished everything: nobody is waited for any more
        self._release(wait=True)
        self._step += len(self.layout.buckets)
        return squares

    def _release(self, *, wait: bool) -> None:
        if not self._gives_back:
            return
        while self._released < self._reduced:
            for rank in self._words.others:
                if self._heard_of[rank] > self._released:
                    continue
                ask = self._words.receive if wait else self._words.take
                if ask(rank, _REDUCED, self._step + self._released) is None:
                    return
                self._heard_of[rank] += 1
            if self.gauged and now_and_then(self._released, len(self.layout.buckets)):
                self._most = max(self._most, self._partials_there())
            self._give_back(self._released)
            self._released += 1

    def _give_back(self, bucket: int) -> None:
        """The memory of a bucket of the own partial sums, but for the one that holds the result."""
        whole = self.layout.buckets[bucket]
        over = [slot for slot, last in enumerate(self._last_bucket) if last == bucket]
        for index, buffer in enumerate(self._buffers[self._group.rank]):
            if (self._group.rank, index) == self._operands[0]:
                continue
            for slot in over:
                self._adopted.pop((index, slot), None)
            give_back_shared(buffer[whole.start : whole.stop])
        self.on_release(over)

    def piece(self, piece: Piece) -> Tensor:
        """The mean of a piece, flat: valid after finish, until the next begin."""
        return self.result_of(piece.slot)[piece.start : piece.stop]

    def _partials_there(self) -> int:
        return sum(resident_bytes(partial) for partial in self.partials)

    def most_sums(self) -> int:
        """The most memory of this worker's partial sums, the result among them where it lies in one, in this step."""
        return max(self._most, self._partials_there())

    def not_finite(self) -> set[int]:
        """The slots whose mean is not finite."""
        slots = [slot for slot, place in enumerate(self.layout.slots) if place.offset < self.layout.state_start]
        return {slot for slot in slots if not bool(self.result_of(slot).isfinite().all())}

    def held_bytes(self) -> dict[str, int]:
        """After finish: this worker's share of the result, and what its other partial sums still hold."""
        result = sum(slot.size for slot in self.layout.slots if slot.offset < self.layout.state_start)
        kept = [key for key in self._adopted if (self._group.rank, key[0]) != self._operands[0]]
        partials = sum(self._adopted[key].nbytes for key in kept)
        for index, buffer in enumerate(self._buffers[self._group.rank]):
            if (self._group.rank, index) != self._operands[0]:
                partials += resident_bytes(buffer)
        return {"gradients": result * self._dtype.itemsize // self._group.world, "partial sums": partials}
