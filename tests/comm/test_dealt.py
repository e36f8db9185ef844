"""A step that is done again: kept sums and new ones make the same expression, however often and whoever is lost."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm import dealt
from shoal.comm.dealt import DealtPlacement, deal
from shoal.comm.exchange import Placement
from shoal.comm.tree import Add, Node, children, contents

Sum = object  # (leaf, pass), or the two sums that were added: a + b and b + a are the same bits


def wanted(passes: Sequence[int], node: Node) -> Sum | None:
    if node.stop - node.start == 1:
        total: Sum | None = None
        for number in range(passes[node.start]):
            total = plus(total, (node.start, number)) if total is not None else (node.start, number)
        return total
    left, right = (wanted(passes, half) for half in children(node))
    return plus(left, right) if left is not None and right is not None else left if right is None else right


def plus(one: Sum, other: Sum) -> Sum:
    return frozenset((one, other))


class Worker:
    """Carries out its part of a step on symbols, up to some pass."""

    def __init__(self, placement: Placement, passes: tuple[int, ...], held: Sequence[Sum], done: int | None) -> None:
        program = placement.accumulation(passes)
        self.buffers: list[Sum] = [*held, *[None] * (program.buffers - len(held))]
        order = [(leaf, number) for leaf in placement.leaves for number in range(passes[leaf])]
        self.done = len(order) if done is None else min(done, len(order))
        for gradient, now in zip(order[: self.done], program.passes, strict=False):
            self.buffers[now.buffer] = gradient if now.first else plus(self.buffers[now.buffer], gradient)
            for add in now.then:
                self.buffers[add.into] = plus(self.buffers[add.into], self.buffers[add.other])
        whole = contents(program, placement.kept, placement.leaves, passes, self.done)
        self.kept = {node: self.buffers[number] for number, node in whole.items()}
        self.partials = self.buffers[: program.partials]


@st.composite
def tries(draw: Callable) -> tuple[tuple[int, ...], list[int], list[list[tuple[int, bool]]]]:
    """Passes of each leaf, where workers' shares end, and of each try, each worker's passes and whether it is lost."""
    passes = draw(st.tuples(st.integers(1, 3), *[st.integers(0, 3)] * draw(st.integers(0, 11))))
    inner = st.sets(st.integers(1, len(passes) - 1), max_size=4) if len(passes) > 1 else st.just(set())
    ends = [0, *sorted(draw(inner)), len(passes)]
    one = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=len(ends) - 1, max_size=len(ends) - 1)
    return passes, ends, draw(st.lists(one, min_size=1, max_size=4))


def end_of(passes: tuple[int, ...], ends: list[int], attempts: list[list[tuple[int, bool]]]) -> tuple[Sum, Sum]:
    owned = [range(start, stop) for start, stop in itertools.pairwise(ends)]
    placements: list[Placement] = [Placement(owned, rank, fast=False) for rank in range(len(owned))]
    held: list[list[Sum]] = [[] for _ in owned]
    for attempt in attempts:
        workers = [Worker(p, passes, h, done) for p, h, (done, _) in zip(placements, held, attempt, strict=True)]
        left = [worker.kept for worker, (_, lost) in zip(workers, attempt, strict=True) if not lost] or [{}]
        brings, computes = deal([sorted(kept) for kept in left], passes)
        placements = [DealtPlacement(brings, computes, rank) for rank in range(len(left))]
        held = [[kept[node] for node in nodes] for kept, nodes in zip(left, brings, strict=True)]
        attempts = attempts[1:]
        for placement in placements:
            assert placement.partials(passes)[placement.rank] == placement.accumulation(passes).partials
        if attempts:
            attempts[0][len(left) :] = []
            attempts[0] += [(0, False)] * (len(left) - len(attempts[0]))
    operands = [sum_ for p, h in zip(placements, held, strict=True) for sum_ in Worker(p, passes, h, None).partials]
    for add in placements[0].adds(passes):
        operands[add.into] = plus(operands[add.into], operands[add.other])
    return operands[0], wanted(passes, Node(0, len(passes)))


@given(tries())
def test_whoever_is_lost_and_however_often_the_same_sum_comes_out(drawn):
    found, asked = end_of(*drawn)
    assert found == asked


def test_only_what_is_not_kept_is_computed_and_evenly():
    brings, computes = deal([[Node(0, 2)], [Node(4, 6), Node(6, 7)]], [1] * 8)
    assert brings == [(Node(0, 2),), (Node(4, 6), Node(6, 7))]
    assert computes == [(2, 3), (7,)]


def test_the_first_worker_always_has_a_sum_when_there_is_something_to_compute():
    """The result lies in its memory."""
    assert deal([[], [Node(1, 2)], []], [1, 1])[1] == [(0,), (), ()]


def test_an_addition_in_another_order_would_be_seen(monkeypatch):
    found = dealt.completion_of
    monkeypatch.setattr(dealt, "completion_of", lambda nodes, passes: [Add(0, n) for n in range(1, len(nodes))])
    with pytest.raises(AssertionError):
        test_whoever_is_lost_and_however_often_the_same_sum_comes_out()
    assert found is not dealt.completion_of
