"""Rings: every rank talks to its two neighbours only, and all links of the ring are busy in every round.

An all_reduce takes 2(n-1) rounds and 2(n-1)/n of the tensor a rank, which no algorithm on one link a rank undercuts
(Patarasuk and Yuan, 2009). A broadcast or a reduce is a chain: its segments follow each other from rank to rank.
"""

from collections.abc import Sequence

from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.draft import Draft


def ring_reduce_scatter(draft: Draft, members: Sequence[int], owned: Sequence[Sequence[int]], step: int = 0) -> int:
    """Member j ends with the sum of its own chunks, added on the way from member j + 1 on. Returns the next step."""
    n = len(members)
    for turn in range(n - 1):
        for j, member in enumerate(members):
            for chunk in owned[(j - turn - 1) % n]:
                draft.message(step + turn, member, members[(j + 1) % n], chunk, reduce=True, incoming_first=True)
    return step + n - 1


def ring_all_gather(draft: Draft, members: Sequence[int], owned: Sequence[Sequence[int]], step: int = 0) -> int:
    """All members end with all chunks; every chunk goes round from its owner. Returns the next step."""
    n = len(members)
    for turn in range(n - 1):
        for j, member in enumerate(members):
            for chunk in owned[(j - turn) % n]:
                draft.message(step + turn, member, members[(j + 1) % n], chunk)
    return step + n - 1


def ring_all_reduce(draft: Draft, members: Sequence[int], owned: Sequence[Sequence[int]], step: int = 0) -> int:
    return ring_all_gather(draft, members, owned, ring_reduce_scatter(draft, members, owned, step))


def _own(ranks: int) -> list[list[int]]:
    return [[rank] for rank in range(ranks)]


def all_reduce(ranks: int) -> Program:
    draft = Draft(ranks, ranks)
    ring_all_reduce(draft, range(ranks), _own(ranks))
    return draft.program("all_reduce", "ring")


def reduce_scatter(ranks: int) -> Program:
    draft = Draft(ranks, ranks)
    ring_reduce_scatter(draft, range(ranks), _own(ranks))
    return draft.program("reduce_scatter", "ring")


def all_gather(ranks: int) -> Program:
    draft = Draft(ranks, ranks)
    ring_all_gather(draft, range(ranks), _own(ranks))
    return draft.program("all_gather", "ring")


def broadcast(ranks: int, root: int, segments: int) -> Program:
    """A chain from the root on: n - 2 + segments rounds."""
    draft = Draft(ranks, segments)
    for place in range(ranks - 1):
        for segment in range(segments):
            draft.message(place + segment, (root + place) % ranks, (root + place + 1) % ranks, segment)
    return draft.program("broadcast", "ring", root=root)


def reduce(ranks: int, root: int, segments: int) -> Program:
    """A chain that ends on the root."""
    draft = Draft(ranks, segments)
    for place in range(1, ranks):
        for segment in range(segments):
            origin, to = (root + place) % ranks, (root + place + 1) % ranks
            draft.message(place - 1 + segment, origin, to, segment, reduce=True, incoming_first=True)
    return draft.program("reduce", "ring", root=root)
