"""What each block keeps and costs in one micro-batch, and the peak that a choice of ways leads to: numbers only.

A worker of a pipeline has several micro-batches in flight, in one chunk or in several: each keeps what one keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["plain", "selective", "full", "away"]  # away: as full, and its inputs are not in memory either


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One block: bytes between forward and backward, and the work of computing again, in bytes that memory moves."""

    name: str
    outside: int  # kept by what ran before it in its chunk and is no block
    inputs: int
    plain: int  # all that autograd saves, the inputs among it if it does
    selective: int  # inputs, and results of operations that are dear to compute
    filled: int  # inputs and all that autograd saves, once it has been computed again
    selective_filled: int
    full_work: float
    selective_work: float
    received: int = 0  # tensors that it is given, wherever they lie
    outputs: int = 0
    chunk: int = 0  # of those that the worker holds

    def kept(self, way: Way) -> int:
        return {"plain": self.plain, "selective": self.selective, "full": self.inputs, "away": 0}[way]

    def filled_by(self, way: Way) -> int:
        """While its backward pass runs."""
        return {"plain": self.plain, "selective": self.selective_filled}.get(way, self.filled)

    def work(self, way: Way) -> float:
        return {"plain": 0.0, "selective": self.selective_work}.get(way, self.full_work)


@dataclass(frozen=True, order=True)
class Moment:
    """A backward pass begins."""

    chunk: int
    flights: tuple[int, ...]  # micro-batches of each chunk that have gone forward and not back, this one among them


ALONE = (Moment(0, (1,)),)


@dataclass(frozen=True, kw_only=True)
class Table:
    blocks: tuple[BlockCost, ...]  # in the order of the forward pass
    outside: tuple[int, ...]  # of each chunk: bytes kept by all that is no block
    moments: tuple[Moment, ...] = ALONE  # of a step, those that no other one exceeds

    def peak(self, ways: Sequence[Way]) -> int:
        """Bytes that are held at once for sure: at the end of the forward pass, or in the backward pass of a block.

        What operations take while they run comes on top."""
        kept, most = list(self.outside), [0] * len(self.outside)
        for block, way in zip(self.blocks, ways, strict=True):
            before = kept[block.chunk] - self.outside[block.chunk]
            most[block.chunk] = max(most[block.chunk], block.outside + before + block.filled_by(way))
            kept[block.chunk] += block.kept(way)
        return max(
            sum(count * each for count, each in zip(moment.flights, kept, strict=True))
            + max(0, most[moment.chunk] - kept[moment.chunk])
            for moment in self.moments
        )

    def most_flights(self, chunk: int) -> int:
        return max(moment.flights[chunk] for moment in self.moments)

    def work(self, ways: Sequence[Way]) -> float:
        """Of computing again, in one micro-batch."""
        return sum(block.work(way) for block, way in zip(self.blocks, ways, strict=True))
