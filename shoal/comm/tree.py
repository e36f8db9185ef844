"""The canonical summation tree over shards, as values: which additions, in which order, on which operands.

A node covers an aligned power of two of leaves, cut off at the last leaf; its sum is left child + right child. A leaf
without samples is left out. The order is a function of the leaves alone, so that every placement gives the same bits.

    leaves   0   1   2   3   4   5
              \\ /     \\ /     \\ /
               +-------+       |         (((0+1) + (2+3)) + (4+5))
                   \\----------/
"""

from collections.abc import Sequence
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
    out: list[Accumulate] = []
    nodes = [node for node in covering(owned, len(passes)) if any(passes[node.start : node.stop])]
    most = len(nodes)

    def visit(node: Node, buffer: int, spare: int) -> None:
        nonlocal most
        most = max(most, buffer + 1)
        if node.stop - node.start == 1:
            out.extend(Accumulate(buffer, first == 0, ()) for first in range(passes[node.start]))
            return
        present = [child for child in children(node) if any(passes[child.start : child.stop])]
        visit(present[0], buffer, spare)
        if len(present) == 1:
            return
        right = present[1]
        if sum(passes[right.start : right.stop]) == 1:  # one gradient: it is the right operand itself
            out.append(Accumulate(buffer, False, ()))
            return
        visit(right, spare, spare + 1)
        out[-1] = out[-1]._replace(then=(*out[-1].then, Add(buffer, spare)))

    for index, node in enumerate(nodes):
        visit(node, index, len(nodes))
    return Accumulation(tuple(out), len(nodes), most)


def row(owned: range, passes: Sequence[int]) -> Accumulation:
    """All of a worker's gradients added in a row into one buffer: the fast mode, whose bits depend on the placement."""
    total = sum(passes[leaf] for leaf in owned)
    steps = tuple(Accumulate(0, index == 0, ()) for index in range(total))
    return Accumulation(steps, min(total, 1), min(total, 1))


def completion(ownership: Sequence[range], passes: Sequence[int]) -> list[Add]:
    """The additions that finish the tree over all workers' partial sums; the total ends up in operand 0.

    Operands are numbered over the workers in order: first all partial sums of worker 0, then those of worker 1, ..."""
    index: dict[Node, int] = {}
    for owned in ownership:
        for node in covering(owned, len(passes)):
            if any(passes[node.start : node.stop]):
                index[node] = len(index)
    adds: list[Add] = []

    def visit(node: Node) -> int | None:
        if node in index:
            return index[node]
        if not any(passes[node.start : node.stop]):
            return None
        left, right = (visit(child) for child in children(node))
        if left is None or right is None:
            return right if left is None else left
        adds.append(Add(left, right))
        return left

    visit(Node(0, len(passes)))
    return adds


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
