"""What simulated workers have finished of a step, where it lies, and who may have written to it.

The rule by which survivors keep sums is `shoal.comm.exchange.HeapExchange.untouched`'s, told here again of simulated
memory; what has really been written to is known beside it, so that a rule that keeps too much is found out."""

from dataclasses import dataclass, field
from functools import lru_cache

from shoal.comm.exchange import Placement
from shoal.comm.tree import Node, contents
from shoal.elastic.pace import evenly


@dataclass
class Memory:
    """Of an epoch: it outlives who dies."""

    posted: dict[int, int] = field(default_factory=dict)  # the newest step that each rank has posted all of
    brought: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # shards of a step, by step and rank
    reduced: set[int] = field(default_factory=set)  # steps in which somebody has begun to add in place


@lru_cache(maxsize=1024)
def usual(workers: int, rank: int, shards: int) -> Placement:
    """As the agent deals the shards out."""
    shares = evenly(workers, shards)
    starts = [sum(shares[:each]) for each in range(workers)]
    owned = [range(start, start + count) for start, count in zip(starts, shares, strict=True)]
    return Placement(owned, rank, fast=False)


@dataclass
class Part:
    """One worker's part in a step."""

    step: int
    placement: Placement
    memory: Memory
    passes: tuple[int, ...]
    done: int = 0  # of its leaves

    def _numbers(self) -> dict[Node, int]:
        """Whole nodes, by the buffer that they lie in."""
        placement = self.placement
        program = placement.accumulation(self.passes)
        held = contents(program, placement.kept, placement.leaves, self.passes, self.done)
        return {node: number for number, node in held.items()}

    def _written(self) -> set[Node]:
        """Those that owners of slices add to, when they add."""
        counts, rank = self.placement.partials(self.passes), self.placement.rank
        first = sum(counts[:rank])
        into = {0, *(add.into for add in self.placement.adds(self.passes))}
        return {n for n, number in self._numbers().items() if number < counts[rank] and first + number in into}

    def kept(self) -> list[Node]:
        """What the rule lets it keep."""
        everybody = range(len(self.placement.partials(self.passes)))
        begun = all(self.memory.posted.get(rank) == self.step for rank in everybody)
        return sorted(set(self._numbers()) - (self._written() if begun else set()))

    def torn(self) -> set[Node]:
        """What has really been added to."""
        return self._written() if self.step in self.memory.reduced else set()

    def post(self) -> None:
        placement, memory = self.placement, self.memory
        kept = (leaf for node in placement.kept for leaf in range(*node))
        memory.posted[placement.rank] = self.step
        memory.brought[self.step, placement.rank] = (*kept, *placement.leaves)

    def shards(self) -> tuple[int, ...]:
        """All that go into the step, of all workers, once these have posted."""
        ranks = range(len(self.placement.partials(self.passes)))
        return tuple(sorted(shard for rank in ranks for shard in self.memory.brought[self.step, rank]))
