"""Everybody talks to everybody: the fewest rounds, and for long tensors the most bytes.

`direct` posts all messages at once; an all_reduce sends the whole tensor to all others ("one-shot"). `two_shot` is a
reduce_scatter and an all_gather, each in one round: as few bytes as a ring. `pairwise` has one partner a round, so that
links to different peers take turns.
"""

from collections.abc import Sequence

from shoal.comm.collectives.actions import Add, Program
from shoal.comm.collectives.draft import Draft


def add_in_order(draft: Draft, step: int, rank: int, own: int, at: int, others: Sequence[int]) -> None:
    """chunk ``own`` becomes the sum of others[:at], itself and others[at:], from left to right."""
    for other in others[1:at]:
        draft.local(step, rank, Add(others[0], other))
    if at:
        draft.local(step, rank, Add(own, others[0], other_first=True))
    for other in others[at:]:
        draft.local(step, rank, Add(own, other))


def exchange(
    draft: Draft,
    members: Sequence[int],
    owned: Sequence[Sequence[int]],
    step: int = 0,
    *,
    reduce: bool = False,
    pairwise: bool = False,
) -> int:
    """Member j gives its own chunks to all others, or (``reduce``) gets their operands of these chunks; the next step.

    Operands are added to the owner's in the order of the members, from the one after it on."""
    n = len(members)
    for distance in range(1, n):
        for j, owner in enumerate(members):
            other = members[(j + distance) % n]
            for chunk in owned[j]:
                origin, to = (other, owner) if reduce else (owner, other)
                draft.message(step, origin, to, chunk, reduce=reduce)
        step += pairwise
    return step + (n > 1 and not pairwise)


def send_recv(ranks: int, root: int, target: int) -> Program:
    draft = Draft(ranks, 1)
    if root != target:
        draft.message(0, root, target, 0)
    return draft.program("send_recv", "direct", root=root, target=target)


def broadcast(ranks: int, root: int) -> Program:
    draft = Draft(ranks, 1)
    for rank in _others(ranks, root):
        draft.message(0, root, rank, 0)
    return draft.program("broadcast", "direct", root=root)


def reduce(ranks: int, root: int) -> Program:
    """The root adds all operands in the order of the ranks."""
    draft = Draft(ranks, 1)
    _one_shot(draft, [root])
    return draft.program("reduce", "direct", root=root)


def all_reduce(ranks: int) -> Program:
    """One-shot: everybody adds all operands in the order of the ranks."""
    draft = Draft(ranks, 1)
    _one_shot(draft, range(ranks))
    return draft.program("all_reduce", "direct")


def barrier(ranks: int) -> Program:
    draft = Draft(ranks, 1)
    for rank in range(ranks):
        for other in _others(ranks, rank):
            draft.message(0, other, rank, 0, reduce=True)
    return draft.program("barrier", "direct")


def _one_shot(draft: Draft, receivers: Sequence[int]) -> None:
    held = [draft.scratch_like(0) for _ in range(draft.ranks - 1)]
    for rank in receivers:
        for other, scratch in zip(_others(draft.ranks, rank), held, strict=True):
            draft.message(0, other, rank, 0, scratch)
        add_in_order(draft, 0, rank, 0, rank, held)


def scatter(ranks: int, root: int) -> Program:
    draft = Draft(ranks, ranks)
    for rank in _others(ranks, root):
        draft.message(0, root, rank, rank)
    return draft.program("scatter", "direct", root=root)


def gather(ranks: int, root: int) -> Program:
    draft = Draft(ranks, ranks)
    for rank in _others(ranks, root):
        draft.message(0, rank, root, rank)
    return draft.program("gather", "direct", root=root)


def reduce_scatter(ranks: int, *, pairwise: bool = False) -> Program:
    draft = Draft(ranks, ranks)
    exchange(draft, range(ranks), _own(ranks), reduce=True, pairwise=pairwise)
    return draft.program("reduce_scatter", "pairwise" if pairwise else "direct")


def all_gather(ranks: int, *, pairwise: bool = False) -> Program:
    draft = Draft(ranks, ranks)
    exchange(draft, range(ranks), _own(ranks), pairwise=pairwise)
    return draft.program("all_gather", "pairwise" if pairwise else "direct")


def scattered_all_reduce(ranks: int, *, pairwise: bool = False) -> Program:
    """Each rank adds up its slice, then hands it to all others."""
    draft = Draft(ranks, ranks)
    step = exchange(draft, range(ranks), _own(ranks), reduce=True, pairwise=pairwise)
    exchange(draft, range(ranks), _own(ranks), step, pairwise=pairwise)
    return draft.program("all_reduce", "pairwise" if pairwise else "two_shot")


def all_to_all(ranks: int, *, pairwise: bool = False) -> Program:
    draft = Draft(ranks, ranks**2)
    for distance in range(1, ranks):
        for rank in range(ranks):
            to = (rank + distance) % ranks
            draft.message((distance - 1) * pairwise, rank, to, rank * ranks + to)
    return draft.program("all_to_all", "pairwise" if pairwise else "direct")


def _others(ranks: int, rank: int) -> list[int]:
    return [other for other in range(ranks) if other != rank]


def _own(ranks: int) -> list[list[int]]:
    return [[rank] for rank in range(ranks)]
