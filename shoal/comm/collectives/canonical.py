"""The canonical order: the training tree of `shoal.comm.tree` with the ranks as leaves, whoever does the additions.

Every slice is added up by its owner, who gets all operands of it in one round, and is then handed to all others. So the
bits do not depend on how the tensor is cut, and are those of `tree_sum` over the ranks.
"""

from shoal.comm.collectives.actions import Add, Program
from shoal.comm.collectives.direct import exchange
from shoal.comm.collectives.draft import Draft
from shoal.comm.tree import Node, children


def _collect(draft: Draft, owner: int, chunk: int, step: int) -> None:
    """``owner`` ends with the sum of all ranks' operands of ``chunk``, added in tree order."""
    ranks = draft.ranks
    place = {owner: chunk}
    for rank in (*range(owner + 1, ranks), *range(owner)):
        place[rank] = draft.scratch_like(chunk)
        draft.message(step, rank, owner, chunk, place[rank])

    def add(node: Node) -> int:
        """Where the node's sum is: in ``chunk`` when the owner is one of its leaves."""
        if node.stop - node.start == 1:
            return place[node.start]
        left, right = map(add, children(node))
        if right == chunk:
            draft.local(step, owner, Add(right, left, other_first=True))
            return right
        draft.local(step, owner, Add(left, right))
        return left

    add(Node(0, ranks))


def reduce_scatter(ranks: int) -> Program:
    draft = Draft(ranks, ranks)
    for rank in range(ranks):
        _collect(draft, rank, rank, 0)
    return draft.program("reduce_scatter", "canonical")


def all_reduce(ranks: int) -> Program:
    draft = Draft(ranks, ranks)
    for rank in range(ranks):
        _collect(draft, rank, rank, 0)
    exchange(draft, range(ranks), [[rank] for rank in range(ranks)], 1)
    return draft.program("all_reduce", "canonical")


def reduce(ranks: int, root: int) -> Program:
    draft = Draft(ranks, ranks)
    for rank in range(ranks):
        _collect(draft, rank, rank, 0)
        if rank != root:
            draft.message(1, rank, root, rank)
    return draft.program("reduce", "canonical", root=root)
