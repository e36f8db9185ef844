"""What each block keeps and costs, measured on one micro-batch; and the peak that a choice leads to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.memory.meter import Meter, bytes_of, storage_of
from shoal.memory.operations import Observe
from shoal.memory.recompute import Pass
from shoal.recipe.memory_plan import CHEAP

Way = Literal["plain", "selective", "full", "away"]  # away: as full, and its inputs are not in memory either
WAYS: tuple[Way, ...] = ("plain", "selective", "full", "away")


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One block, in bytes between forward and backward, and in seconds of computing again."""

    name: str
    outside: int  # kept by what ran before it and is no block
    inputs: int
    plain: int  # all that autograd saves, the inputs among it if it does
    selective: int  # inputs, and results of operations that are dear to compute
    filled: int  # inputs and all that autograd saves, once it has been computed again
    selective_filled: int
    full_s: float
    selective_s: float

    def kept(self, way: Way) -> int:
        return {"plain": self.plain, "selective": self.selective, "full": self.inputs, "away": 0}[way]

    def filled_by(self, way: Way) -> int:
        """While its backward pass runs."""
        return {"plain": self.plain, "selective": self.selective_filled}.get(way, self.filled)

    def seconds(self, way: Way) -> float:
        return {"plain": 0.0, "selective": self.selective_s}.get(way, self.full_s)


@dataclass(frozen=True, kw_only=True)
class Table:
    blocks: tuple[BlockCost, ...]  # in the order of the forward pass
    outside: int  # bytes kept by all that is no block
    in_flight: int = 1  # micro-batches whose activations are held at once

    def peak(self, ways: Sequence[Way]) -> int:
        """Most bytes of activations at once, at the end of the forward pass or in the backward pass of a block."""
        before = 0
        most = 0
        for block, way in zip(self.blocks, ways, strict=True):
            most = max(most, block.outside + before + block.filled_by(way))
            before += block.kept(way)
        whole = self.outside + before
        return max(whole, most) + (self.in_flight - 1) * whole

    def seconds(self, ways: Sequence[Way]) -> float:
        """Of computing again, in one micro-batch."""
        return sum(block.seconds(way) for block, way in zip(self.blocks, ways, strict=True))


class Measurement:
    """Fills a table while one micro-batch goes through blocks that are recomputed in full."""

    def __init__(self, meter: Meter, wait: Callable[[], None]) -> None:
        self._meter, self._wait = meter, wait
        self._rows: dict[str, BlockCost] = {}
        self._kept_by_blocks = 0
        self.outside: int | None = None  # known once the forward pass is over

    def observe(self, done: Pass, held_before: set[int], live_before: int) -> Any:
        """Have a pass done. ``held_before``: the storages that were counted before its inputs were kept."""
        inputs = self._meter.live - live_before
        seen: list[tuple[int, Tensor]] = []
        with Observe(self._wait) as operations:
            output = done.first(lambda tensor: seen.append((len(operations.done), tensor.detach())))
        last = seen[-1][0] if seen else 0
        counted = {key: size for key, size in _sizes(t for _, t in seen).items() if key not in held_before}
        own = self._meter.storages() - held_before
        outputs = _sizes(t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor))
        dear = [each for each in operations.done[:last] if each.kind not in CHEAP and each.results]
        kept = [each for each in dear if not any(storage_of(t) in outputs for t in each.results)]
        results = {k: s for k, s in _sizes(t for each in kept for t in each.results).items() if k not in own}
        total_s = sum(each.seconds for each in operations.done[:last])
        inputs_filled = inputs + sum(size for key, size in counted.items() if key not in own)
        row = BlockCost(
            name=done.block.name,
            outside=live_before - self._kept_by_blocks,
            inputs=inputs,
            plain=sum(counted.values()),
            selective=inputs + sum(results.values()),
            filled=inputs_filled,
            selective_filled=inputs_filled + sum(s for k, s in results.items() if k not in counted),
            full_s=total_s,
            selective_s=total_s - sum(each.seconds for each in kept),
        )
        self._kept_by_blocks += inputs
        before = self._rows.get(row.name)
        self._rows[row.name] = row if before is None else _twice(before, row)
        return output

    def forward_is_over(self) -> None:
        if self.outside is None:
            self.outside = self._meter.live - self._kept_by_blocks

    def table(self, in_flight: int) -> Table:
        assert self.outside is not None
        return Table(blocks=tuple(self._rows.values()), outside=self.outside, in_flight=in_flight)


def _sizes(tensors: Any) -> dict[int, int]:
    return {storage_of(tensor): bytes_of(tensor) for tensor in tensors}


def _twice(one: BlockCost, other: BlockCost) -> BlockCost:
    """A block that is called more than once in a pass."""
    return replace(
        one,
        inputs=one.inputs + other.inputs,
        plain=one.plain + other.plain,
        selective=one.selective + other.selective,
        filled=max(one.filled, other.filled) + one.inputs,
        selective_filled=max(one.selective_filled, other.selective_filled) + one.selective,
        full_s=one.full_s + other.full_s,
        selective_s=one.selective_s + other.selective_s,
    )
