"""Trees: binomial for short messages; binary, in a pipeline of segments, for long ones; two binary trees at once.

    binomial tree of 8            binary tree of 8             its mirror image
    0                                     0                                7
    +- 4 - 6 - 7                          4                                3
    |  +- 5                            2     6                           5     1
    +- 2 - 3                          1 3   5 7                         6 4   2 0
    +- 1

The binomial reduce adds in the order of Shoal's training tree. In the binary tree, odd ranks are leaves; in its mirror
image (for an odd count: the same tree one rank on) they are the inner nodes. Each carries half of the tensor, and then
every rank sends and receives about as much as any other (Sanders, Speck and Träff, 2009).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.draft import Draft, merge


def binomial_reduce(draft: Draft, members: Sequence[int], chunks: Sequence[int], step: int = 0) -> int:
    """Member 0 ends with the sum of the chunks. Returns the next step."""
    n, distance = len(members), 1
    while distance < n:
        for place in range(distance, n, 2 * distance):
            for chunk in chunks:
                draft.message(step, members[place], members[place - distance], chunk, reduce=True)
        distance, step = 2 * distance, step + 1
    return step


def binomial_broadcast(draft: Draft, members: Sequence[int], chunks: Sequence[int], step: int = 0) -> int:
    """All members end with member 0's chunks. Returns the next step."""
    n, distance = len(members), 1 << max(0, len(members) - 1).bit_length() >> 1
    while distance:
        for place in range(distance, n, 2 * distance):
            for chunk in chunks:
                draft.message(step, members[place - distance], members[place], chunk)
        distance, step = distance // 2, step + 1
    return step


def _from(ranks: int, root: int) -> list[int]:
    return [(root + place) % ranks for place in range(ranks)]


def reduce(ranks: int, root: int) -> Program:
    draft = Draft(ranks, 1)
    binomial_reduce(draft, _from(ranks, root), [0])
    return draft.program("reduce", "binomial", root=root)


def broadcast(ranks: int, root: int) -> Program:
    draft = Draft(ranks, 1)
    binomial_broadcast(draft, _from(ranks, root), [0])
    return draft.program("broadcast", "binomial", root=root)


def all_reduce(ranks: int) -> Program:
    draft = Draft(ranks, 1)
    binomial_broadcast(draft, range(ranks), [0], binomial_reduce(draft, range(ranks), [0]))
    return draft.program("all_reduce", "binomial")


def barrier(ranks: int) -> Program:
    draft = Draft(ranks, 1)
    binomial_broadcast(draft, range(ranks), [0], binomial_reduce(draft, range(ranks), [0]))
    return draft.program("barrier", "binomial")


def gather(ranks: int, root: int) -> Program:
    """Every rank passes on what it got: log2 n rounds."""
    draft, members = Draft(ranks, ranks), _from(ranks, root)
    step, distance = 0, 1
    while distance < ranks:
        for place in range(distance, ranks, 2 * distance):
            for held in members[place : place + distance]:
                draft.message(step, members[place], members[place - distance], held)
        distance, step = 2 * distance, step + 1
    return draft.program("gather", "binomial", root=root)


def scatter(ranks: int, root: int) -> Program:
    draft, members = Draft(ranks, ranks), _from(ranks, root)
    step, distance = 0, 1 << (ranks - 1).bit_length() >> 1
    while distance:
        for place in range(distance, ranks, 2 * distance):
            for held in members[place : place + distance]:
                draft.message(step, members[place - distance], members[place], held)
        distance, step = distance // 2, step + 1
    return draft.program("scatter", "binomial", root=root)


@dataclass(frozen=True)
class Tree:
    """A rooted tree of ranks; children in the order of the additions: those ``before`` a node are left operands."""

    parent: tuple[int, ...]  # -1: the root
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]

    @property
    def root(self) -> int:
        return self.parent.index(-1)

    def children(self, rank: int) -> tuple[int, ...]:
        return (*self.before[rank], *self.after[rank])

    def depths(self) -> list[int]:
        depth = [0] * len(self.parent)
        level = [self.root]
        while level:
            level = [child for rank in level for child in self.children(rank)]
            for child in level:
                depth[child] = depth[self.parent[child]] + 1
        return depth

    def relabelled(self, order: Sequence[int]) -> "Tree":
        """What rank i was, rank ``order[i]`` is."""
        where = {rank: place for place, rank in enumerate(order)}
        old = [where[rank] for rank in range(len(order))]
        return Tree(
            tuple(-1 if self.parent[i] < 0 else order[self.parent[i]] for i in old),
            tuple(tuple(order[child] for child in self.before[i]) for i in old),
            tuple(tuple(order[child] for child in self.after[i]) for i in old),
        )


def binary_tree(ranks: int) -> Tree:
    """Root 0 with one child; each other node lies between its (at most two) subtrees. Odd ranks are leaves."""
    parent = [-1] * ranks
    before: list[tuple[int, ...]] = [()] * ranks
    after: list[tuple[int, ...]] = [()] * ranks

    def subtree(start: int, bits: int) -> int | None:
        """The root of the tree over start < rank < start + 2**bits, as far as there are ranks."""
        if bits == 0:
            return None
        middle = start + (1 << bits - 1)
        left = subtree(start, bits - 1)
        if middle >= ranks:
            return left
        right = subtree(middle, bits - 1)
        before[middle] = () if left is None else (left,)
        after[middle] = () if right is None else (right,)
        for child in (*before[middle], *after[middle]):
            parent[child] = middle
        return middle

    top = subtree(0, (ranks - 1).bit_length())
    if top is not None:
        after[0], parent[top] = (top,), 0
    return Tree(tuple(parent), tuple(before), tuple(after))


def second_tree(ranks: int) -> Tree:
    """The partner of ``binary_tree``: who is an inner node there is a leaf here."""
    order = [(rank + 1) % ranks if ranks % 2 else ranks - 1 - rank for rank in range(ranks)]
    return binary_tree(ranks).relabelled(order)


def tree_reduce(draft: Draft, tree: Tree, chunks: Sequence[int], step: int = 0) -> int:
    """The root ends with the sums; the chunks follow each other up. Returns the step after the first is done."""
    depths = tree.depths()
    deepest = max(depths)
    for rank, depth in enumerate(depths):
        for place, chunk in enumerate(chunks):
            for child in tree.children(rank):
                at = step + deepest - depth - 1 + place
                left = child in tree.before[rank]
                draft.message(at, child, rank, chunk, reduce=True, incoming_first=left)
    return step + deepest


def tree_broadcast(draft: Draft, tree: Tree, chunks: Sequence[int], step: int = 0) -> None:
    """All ranks end with the root's chunks, which follow each other down the tree."""
    for rank, depth in enumerate(tree.depths()):
        for place, chunk in enumerate(chunks):
            for child in tree.children(rank):
                draft.message(step + depth + place, rank, child, chunk)


def _one_tree(collective: str, tree: Tree, segments: int) -> Program:
    draft, chunks = Draft(len(tree.parent), segments), range(segments)
    step = 0
    if collective != "broadcast":
        step = tree_reduce(draft, tree, chunks)
    if collective != "reduce":
        tree_broadcast(draft, tree, chunks, step)
    rooted = collective != "all_reduce"
    return draft.program(collective, "binary_tree", root=tree.root if rooted else 0)


def binary(collective: str, ranks: int, root: int, segments: int) -> Program:
    """all_reduce, reduce or broadcast in a pipeline of segments along one binary tree."""
    return _one_tree(collective, binary_tree(ranks).relabelled(_from(ranks, root)), segments)


def _under(root: int, tree: Tree, ranks: int) -> Tree:
    """A tree of all other ranks hung below ``root``."""
    others = [rank for rank in range(ranks) if rank != root]

    def named(places: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(others[place] for place in places)

    parent = [-1] * ranks
    before: list[tuple[int, ...]] = [()] * ranks
    after: list[tuple[int, ...]] = [()] * ranks
    for place, rank in enumerate(others):
        parent[rank] = root if tree.parent[place] < 0 else others[tree.parent[place]]
        before[rank], after[rank] = named(tree.before[place]), named(tree.after[place])
    after[root] = (others[tree.root],)
    return Tree(tuple(parent), tuple(before), tuple(after))


def double(collective: str, ranks: int, root: int, segments: int) -> Program:
    """all_reduce, reduce or broadcast along two binary trees, half of the tensor and ``segments`` chunks each."""
    trees: list[Tree]
    if collective == "all_reduce" or ranks == 1:
        trees = [binary_tree(ranks), second_tree(ranks)]
    else:
        trees = [_under(root, make(ranks - 1), ranks) for make in (binary_tree, second_tree)]
    return merge([_one_tree(collective, tree, segments) for tree in trees], "double_tree")
