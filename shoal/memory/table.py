"""What each block keeps and costs in one micro-batch, and the peak that a choice of ways leads to: numbers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["plain", "selective", "full", "away"]  # away: as full, and its inputs are not in memory either


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One block: bytes between forward and backward, and the work of computing again, in bytes that memory moves."""

    name: str
    outside: int  # kept by what ran before it and is no block
    inputs: int
    plain: int  # all that autograd saves, the inputs among it if it does
    selective: int  # inputs, and results of operations that are dear to compute
    filled: int  # inputs and all that autograd saves, once it has been computed again
    selective_filled: int
    full_work: float
    selective_work: float

    def kept(self, way: Way) -> int:
        return {"plain": self.plain, "selective": self.selective, "full": self.inputs, "away": 0}[way]

    def filled_by(self, way: Way) -> int:
        """While its backward pass runs."""
        return {"plain": self.plain, "selective": self.selective_filled}.get(way, self.filled)

    def work(self, way: Way) -> float:
        return {"plain": 0.0, "selective": self.selective_work}.get(way, self.full_work)


@dataclass(frozen=True, kw_only=True)
class Table:
    blocks: tuple[BlockCost, ...]  # in the order of the forward pass
    outside: int  # bytes kept by all that is no block

    def peak(self, ways: Sequence[Way]) -> int:
        """Bytes that are held at once for sure: at the end of the forward pass, or in the backward pass of a block.

        What operations take while they run comes on top."""
        before = most = 0
        for block, way in zip(self.blocks, ways, strict=True):
            most = max(most, block.outside + before + block.filled_by(way))
            before += block.kept(way)
        return max(self.outside + before, most)

    def work(self, ways: Sequence[Way]) -> float:
        """Of computing again, in one micro-batch."""
        return sum(block.work(way) for block, way in zip(self.blocks, ways, strict=True))
