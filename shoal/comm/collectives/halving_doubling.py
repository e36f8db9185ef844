"""Recursive halving and doubling: log2 n rounds (Thakur, Rabenseifner and Gropp, 2005).

Partners are near first when halving and far first when doubling, so that the most bytes go to the nearest rank. A
round adds the lower partner's sum as the left operand on both sides: with a power of two of ranks the additions are
those of Shoal's training tree. Other counts fold: of the first pairs of neighbours only the lower takes part, with both
operands, and hands back what belongs to the upper. A long broadcast is a scatter down the binomial tree and a doubling;
a long reduce is a halving and a gather.
"""

from collections.abc import Sequence
from itertools import chain

from shoal.comm.collectives import trees
from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.draft import Draft
from shoal.comm.collectives.draft import chain as one_after_the_other


class _Fold:
    """The largest power of two of ranks that take part; the others stand behind a neighbour."""

    def __init__(self, members: Sequence[int]) -> None:
        n = len(members)
        self.count = 1 << (n.bit_length() - 1)
        extra = n - self.count
        self.pairs = [(members[2 * i], members[2 * i + 1]) for i in range(extra)]
        self.active = [members[2 * i] if i < extra else members[i + extra] for i in range(self.count)]
        # which members' places participant i stands for
        self.places = [[2 * i, 2 * i + 1] if i < extra else [i + extra] for i in range(self.count)]


def _halve(draft: Draft, active: Sequence[int], owned: Sequence[Sequence[int]], step: int) -> int:
    """Participant i of a power of two ends with the sum of owned[i]."""
    count, distance = len(active), 1
    while distance < count:
        for i, rank in enumerate(active):
            partner = i ^ distance  # gets what belongs to those who have its last bits
            for chunk in sorted(chain.from_iterable(owned[partner % (2 * distance) :: 2 * distance])):
                draft.message(step, rank, active[partner], chunk, reduce=True, incoming_first=i < partner)
        distance, step = 2 * distance, step + 1
    return step


def _double(draft: Draft, active: Sequence[int], owned: Sequence[Sequence[int]], step: int) -> int:
    """All participants end with all chunks; the mirror image of ``_halve``."""
    distance = len(active) // 2
    while distance:
        for i, rank in enumerate(active):
            for chunk in sorted(chain.from_iterable(owned[i % (2 * distance) :: 2 * distance])):
                draft.message(step, rank, active[i ^ distance], chunk)
        distance, step = distance // 2, step + 1
    return step


def _reversed_bits(number: int, count: int) -> int:
    bits = count.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


def all_reduce(ranks: int) -> Program:
    """As many bytes as a ring, 2 log2 n rounds. Owners lie in bit-reversed order: every message is one stretch."""
    fold = _Fold(range(ranks))
    draft = Draft(ranks, fold.count)
    owned = [[_reversed_bits(i, fold.count)] for i in range(fold.count)]
    step = _fold_in(draft, fold, 0)
    step = _double(draft, fold.active, owned, _halve(draft, fold.active, owned, step))
    _fold_out(draft, fold, step)
    return draft.program("all_reduce", "halving_doubling")


def doubling_all_reduce(ranks: int) -> Program:
    draft = Draft(ranks, 1)
    recursive_doubling(draft, range(ranks), [0])
    return draft.program("all_reduce", "recursive_doubling")


def barrier(ranks: int) -> Program:
    draft = Draft(ranks, 1)
    recursive_doubling(draft, range(ranks), [0])
    return draft.program("barrier", "recursive_doubling")


def recursive_doubling(draft: Draft, members: Sequence[int], chunks: Sequence[int], step: int = 0) -> int:
    """An all_reduce of ``chunks`` among the members that exchanges them whole: log2 n rounds, for short tensors."""
    fold = _Fold(members)
    step = _fold_in(draft, fold, step, chunks)
    distance = 1
    while distance < fold.count:
        for i, rank in enumerate(fold.active):
            partner = i ^ distance
            for chunk in chunks:
                to = fold.active[partner]
                draft.message(step, rank, to, chunk, reduce=True, incoming_first=i < partner)
        distance, step = 2 * distance, step + 1
    return _fold_out(draft, fold, step, chunks)


def _fold_in(draft: Draft, fold: _Fold, step: int, chunks: Sequence[int] | None = None) -> int:
    for lower, upper in fold.pairs:
        for chunk in range(draft.chunks) if chunks is None else chunks:
            draft.message(step, upper, lower, chunk, reduce=True)
    return step + bool(fold.pairs)


def _fold_out(draft: Draft, fold: _Fold, step: int, chunks: Sequence[int] | None = None) -> int:
    for lower, upper in fold.pairs:
        for chunk in range(draft.chunks) if chunks is None else chunks:
            draft.message(step, lower, upper, chunk)
    return step + bool(fold.pairs)


def reduce_scatter(ranks: int) -> Program:
    fold = _Fold(range(ranks))
    draft = Draft(ranks, ranks)
    step = _halve(draft, fold.active, fold.places, _fold_in(draft, fold, 0))
    for lower, upper in fold.pairs:
        draft.message(step, lower, upper, upper)
    return draft.program("reduce_scatter", "halving_doubling")


def all_gather(ranks: int) -> Program:
    fold = _Fold(range(ranks))
    draft = Draft(ranks, ranks)
    for lower, upper in fold.pairs:
        draft.message(0, upper, lower, upper)
    step = _double(draft, fold.active, fold.places, int(bool(fold.pairs)))
    for lower, upper in fold.pairs:
        for chunk in range(ranks):
            if chunk != upper:
                draft.message(step, lower, upper, chunk)
    return draft.program("all_gather", "halving_doubling")


def broadcast(ranks: int, root: int) -> Program:
    parts = [trees.scatter(ranks, root), all_gather(ranks)]
    return one_after_the_other("broadcast", "halving_doubling", parts, root=root)


def reduce(ranks: int, root: int) -> Program:
    parts = [reduce_scatter(ranks), trees.gather(ranks, root)]
    return one_after_the_other("reduce", "halving_doubling", parts, root=root)
