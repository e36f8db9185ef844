"""What a worker has finished of a step that was cut short: sums of whole nodes of the tree, good for the next try.

A gradient depends on weights, samples and random streams alone, and these are the same when the step is done again. So
a survivor keeps its sums, as far as nobody can have written to them: once all workers had posted a bucket of
gradients, its owner, which may be the one that died in the middle of it, adds into some of them in place."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shoal.comm.dealt import DealtPlacement, deal
from shoal.comm.exchange import HeapExchange, Placement
from shoal.comm.tree import Accumulation, Node, contents

Sums = dict[int, Tensor]  # of one slot of the flat buffer: by the number of the buffer


class Row(NamedTuple):
    """What a worker tells the others."""

    nodes: list[Node]  # that it keeps
    left: list[int]  # leaves that it had not begun
    passes: tuple[int, ...]  # of each leaf of the step; () of a worker that had begun none


@dataclass(frozen=True)
class Kept:
    """Sums of nodes, and what is told of their leaves."""

    nodes: tuple[Node, ...]
    sums: tuple[Sequence[Tensor], ...]  # of each node: of all slots, parameters first
    facts: Tensor  # the worker's row
    used: Sequence[bool]  # parameters that a pass has reached

    def some(self, nodes: Sequence[Node]) -> "Kept":
        chosen = [number for number, node in enumerate(self.nodes) if node in nodes]
        sums = tuple(self.sums[number] for number in chosen)
        return Kept(tuple(self.nodes[number] for number in chosen), sums, self.facts, self.used)


@dataclass(frozen=True)
class CutShort:
    """One worker's part of such a step, between two passes; its sums still lie where they were made."""

    step: int  # as it would have been committed
    exchange: HeapExchange
    placement: Placement
    programs: tuple[Accumulation, Accumulation]  # of gradients, of buffers' changes
    passes: tuple[int, ...]
    done: tuple[int, int]  # passes, and ends of leaves
    sums: tuple[list[Sums], list[Sums]]
    facts: Tensor
    used: Sequence[bool]

    def kept(self, *, quiet: bool) -> Kept:
        """See `HeapExchange.untouched`."""
        once = tuple(min(1, count) for count in self.passes)
        found = [
            {
                node: number
                for number, node in contents(program, self.placement.kept, self.placement.leaves, passes, done).items()
            }
            for program, passes, done in zip(self.programs, (self.passes, once), self.done, strict=True)
        ]
        safe = self.exchange.untouched(quiet=quiet)
        own = len(self.exchange.partials)  # sums beyond these are in nobody else's reach
        nodes = [
            node
            for node in sorted(found[0])
            if all(node in each and (each[node] in safe or each[node] >= own) for each in found)
        ]
        sums = tuple(
            [slot[each[node]] for slots, each in zip(self.sums, found, strict=True) for slot in slots] for node in nodes
        )
        return Kept(tuple(nodes), sums, self.facts, self.used)

    def row(self, kept: Kept) -> Row:
        passes, ended = self.done
        leaves = [leaf for leaf in self.placement.leaves if self.passes[leaf]]
        begun = ended + (passes > sum(self.passes[leaf] for leaf in leaves[:ended]))
        return Row(list(kept.nodes), leaves[begun:], self.passes)


def row_of(told: bytes) -> Row | None:
    """From a row written as JSON."""
    row = json.loads(told)
    return Row([Node(*node) for node in row[0]], row[1], tuple(row[2])) if row else None


class Dealt(NamedTuple):
    """What all workers agree on of the step to come."""

    placement: DealtPlacement
    passes: tuple[int, ...]
    counts: dict[str, int]  # shards that are kept, and computed again


def dealt(rows: Sequence[Row | None], rank: int) -> Dealt | None:
    """From the rows of those who have one. None when nobody had begun the step."""
    told = [row for row in rows if row is not None]
    passes = next((row.passes for row in told if row.passes), ())
    if not passes:
        return None
    brings, computes = deal([row.nodes if row else [] for row in rows], passes)
    if not (brings[0] or computes[0]):
        return None  # the result lies in a sum of rank 0
    whole = sum(1 for count in passes if count)
    kept = whole - sum(map(len, computes))
    left = sum(1 for row in told for leaf in row.left if passes[leaf])
    return Dealt(DealtPlacement(brings, computes, rank), passes, {"kept": kept, "again": whole - kept - left})
