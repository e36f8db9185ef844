"""A step that is done again: who brings sums that were finished in an earlier try, and who computes the rest. Pure."""

from collections.abc import Sequence
from itertools import pairwise

from shoal.comm.exchange import Placement
from shoal.comm.tree import Accumulation, Add, Node, accumulation_of, completion_of, covering, present


def deal(kept: Sequence[Sequence[Node]], passes: Sequence[int]) -> tuple[list[tuple[Node, ...]], list[tuple[int, ...]]]:
    """For each worker: the nodes that it brings, and the leaves that it computes, as many as any other one, or one
    more, the first ones more. Of nodes that overlap the first worker's counts."""
    taken: set[int] = set()
    brings = []
    for nodes in kept:
        new = []
        for node in nodes:
            if taken.isdisjoint(range(*node)):
                taken.update(range(*node))
                new.append(node)
        brings.append(tuple(new))
    rest = [leaf for leaf, count in enumerate(passes) if count and leaf not in taken]
    cuts = [-(-worker * len(rest) // len(kept)) for worker in range(len(kept) + 1)]
    return brings, [tuple(rest[start:stop]) for start, stop in pairwise(cuts)]


def nodes_of(leaves: Sequence[int], passes: Sequence[int]) -> list[Node]:
    """The fewest nodes that together are exactly these leaves, in order; they need not be next to each other."""
    runs: list[range] = []
    for leaf in leaves:
        if runs and runs[-1].stop == leaf:
            runs[-1] = range(runs[-1].start, leaf + 1)
        else:
            runs.append(range(leaf, leaf + 1))
    return [node for run in runs for node in present(covering(run, len(passes)), passes)]


class DealtPlacement(Placement):
    """Each worker's partial sums are the nodes that it brings, then those of the leaves that it computes."""

    def __init__(self, brings: Sequence[Sequence[Node]], computes: Sequence[Sequence[int]], rank: int) -> None:
        super().__init__((), rank, fast=False)
        self._brings, self._computes = brings, computes

    @property
    def leaves(self) -> Sequence[int]:
        return self._computes[self.rank]

    @property
    def kept(self) -> Sequence[Node]:
        return self._brings[self.rank]

    def _accumulation(self, passes: tuple[int, ...]) -> Accumulation:
        return accumulation_of(nodes_of(self.leaves, passes), passes, len(self.kept))

    def operands(self, passes: Sequence[int]) -> list[list[Node]]:
        both = zip(self._brings, self._computes, strict=True)
        return [[*brought, *nodes_of(leaves, passes)] for brought, leaves in both]

    def partials(self, passes: Sequence[int]) -> list[int]:
        return [len(nodes) for nodes in self.operands(passes)]

    def _adds(self, passes: tuple[int, ...]) -> list[Add]:
        return completion_of([node for nodes in self.operands(passes) for node in nodes], passes)
