"""The canonical summation tree over shards, as values: which additions, in which order, on which operands.

A node covers an aligned power of two of leaves, cut off at the last leaf; its sum is left child + right child. A leaf
without samples is left out. The order is a function of the leaves alone, so that every placement gives the same bits.

    leaves   0   1   2   3   4   5
              \\ /     \\ /     \\ /
               +-------+       |         (((0+1) + (2+3)) + (4+5))
                   \\----------/
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Node(NamedTuple):
    """The leaves ``start <= leaf < stop`` of the tree."""

    start: int
    stop: int


class Add(NamedTuple):
    """``buffers[into] += buffers[other]``."""

    into: int
    other: int


class Accumulate(NamedTuple):
    """What becomes of the gradient of one backward pass."""

    buffer: int
    first: bool  # True: overwrite the buffer; False: add to it
    then: tuple[Add, ...]  # additions between buffers that this gradient completes


@dataclass(frozen=True)
class Accumulation:
    """One worker's part of a step: where each of its backward passes goes, in order."""

    passes: tuple[Accumulate, ...]
    partials: int  # buffers 0 .. partials - 1 hold the worker's partial sums in the end
    buffers: int  # partials and the extra ones needed on the way


def children(node: Node) -> tuple[Node, Node]:
    """The two halves of an inner node; the left one is the largest power of two below its size."""
    half = 1 << ((node.stop - node.start - 1).bit_length() - 1)
    return Node(node.start, node.start + half), Node(node.start + half, node.stop)


def covering(owned: range, leaves: int) -> list[Node]:
    """The fewest nodes of the tree over ``leaves`` that together are exactly the ``owned`` leaves, left to right."""
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        if node.stop <= owned.start or node.start >= owned.stop:
            return
        if owned.start <= node.start and node.stop <= owned.stop:
            nodes.append(node)
            return
        for child in children(node):
            visit(child)

    visit(Node(0, leaves))
    return nodes


def accumulation(owned: range, passes: Sequence[int]) -> Accumulation:
    """Where one worker's gradients go so that its partial sums come out in tree order.

    ``passes[leaf]`` is the number of backward passes (micro-batches) of every leaf of the tree; 0 leaves it out.
    A leaf's own passes are added in order. Needs at most log2 of the owned leaves in extra buffers."""
    return accumulation_of(present(covering(owned, len(passes)), passes), passes)


def present(nodes: Iterable[Node], passes: Sequence[int]) -> list[Node]:
    """Those that have samples."""
    return [node for node in nodes if any(passes[node.start : node.stop])]


def accumulation_of(nodes: Sequence[Node], passes: Sequence[int], kept: int = 0) -> Accumulation:
    """The same for given nodes, left to right; buffers 0 .. ``kept`` - 1 hold sums that are there already."""
    out: list[Accumulate] = []
    most = partials = kept + len(nodes)

    def visit(node: Node, buffer: int, spare: int) -> None:
        nonlocal most
        most = max(most, buffer + 1)
        if node.stop - node.start == 1:
            out.extend(Accumulate(buffer, first == 0, ()) for first in range(passes[node.start]))
            return
        halves = present(children(node), passes)
        visit(halves[0], buffer, spare)
        if len(halves) == 1:
            return
        right = halves[1]
        if sum(passes[right.start : right.stop]) == 1:  # one gradient: it is the right operand itself
            out.append(Accumulate(buffer, False, ()))
            return
        visit(right, spare, spare + 1)
        out[-1] = out[-1]._replace(then=(*out[-1].then, Add(buffer, spare)))

    for index, node in enumerate(nodes, start=kept):
        visit(node, index, partials)
    return Accumulation(tuple(out), partials, most)


def row(owned: range, passes: Sequence[int]) -> Accumulation:
    """All of a worker's gradients added in a row into one buffer: the fast mode, whose bits depend on the placement."""
    total = sum(passes[leaf] for leaf in owned)
    steps = tuple(Accumulate(0, index == 0, ()) for index in range(total))
    return Accumulation(steps, min(total, 1), min(total, 1))


def completion(ownership: Sequence[range], passes: Sequence[int]) -> list[Add]:
    """The additions that finish the tree over all workers' partial sums; the total ends up in operand 0.

    Operands are numbered over the workers in order: first all partial sums of worker 0, then those of worker 1, ..."""
    return completion_of([n for owned in ownership for n in present(covering(owned, len(passes)), passes)], passes)


def completion_of(operands: Sequence[Node], passes: Sequence[int]) -> list[Add]:
    """The same over sums of nodes, in any order, that are together the whole tree, without those of no samples.

    Into the operand that comes first, so that the total ends up in operand 0: a + b and b + a are the same bits."""
    index = {node: number for number, node in enumerate(operands)}
    adds: list[Add] = []

    def visit(node: Node) -> int | None:
        if node in index:
            return index[node]
        if not any(passes[node.start : node.stop]):
            return None
        left, right = (visit(child) for child in children(node))
        if left is None or right is None:
            return right if left is None else left
        adds.append(Add(min(left, right), max(left, right)))
        return min(left, right)

    visit(Node(0, len(passes)))
    return adds


def contents(
    program: Accumulation, kept: Sequence[Node], leaves: Sequence[int], passes: Sequence[int], done: int
) -> Mapping[int, Node]:
    """Which whole node each buffer of a program holds after its first ``done`` passes; buffers of half leaves are left
    out. ``leaves``: of the program, in order; ``kept``: what its first buffers held when it began."""
    held = {number: Counter({leaf: passes[leaf] for leaf in range(*node)}) for number, node in enumerate(kept)}
    order = [leaf for leaf in leaves for _ in range(passes[leaf])]
    for leaf, now in zip(order[:done], program.passes, strict=False):
        if now.first:
            held[now.buffer] = Counter()
        held[now.buffer][leaf] += 1
        for add in now.then:
            held[add.into] += held.pop(add.other)
    found = {number: _node_of(sums, passes) for number, sums in held.items()}
    return {number: node for number, node in found.items() if node is not None}


def _node_of(sums: Counter[int], passes: Sequence[int]) -> Node | None:
    """The largest node whose passes are these."""
    node = Node(0, len(passes))
    while True:
        within = {leaf: passes[leaf] for leaf in range(*node) if passes[leaf]}
        if within == +sums:
            return node
        if node.stop - node.start == 1:
            return None
        left, right = children(node)
        node = left if min(sums, default=0) < left.stop else right


def tree_sum(values: Sequence[float]) -> float:
    """The sum of numbers in the order of the canonical tree. 0.0 for none."""
    if not values:
        return 0.0

    def visit(node: Node) -> float:
        if node.stop - node.start == 1:
            return values[node.start]
        left, right = children(node)
        return visit(left) + visit(right)

    return visit(Node(0, len(values)))
