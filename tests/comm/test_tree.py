"""The canonical tree's laws, checked on symbols: whoever owns which leaf, the same expression comes out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm import tree
from shoal.comm.exchange import Placement
from shoal.comm.tree import Accumulation, Add, Node, accumulation, children, completion, covering, row, tree_sum

Expression = tuple  # (leaf, pass), or ("+", left, right)


class Case(NamedTuple):
    passes: tuple[int, ...]
    ownership: tuple[range, ...]


def ownerships(leaves: int) -> st.SearchStrategy[tuple[range, ...]]:
    """Contiguous, every worker at least one leaf."""
    cuts = st.sets(st.integers(1, leaves - 1)) if leaves > 1 else st.just(set())
    return cuts.map(lambda c: tuple(range(a, b) for a, b in zip([0, *sorted(c)], [*sorted(c), leaves], strict=True)))


@st.composite
def cases(draw: Callable) -> Case:
    leaves = draw(st.integers(1, 17))
    passes = draw(st.tuples(st.integers(1, 3), *[st.integers(0, 3)] * (leaves - 1)))
    return Case(passes, draw(ownerships(leaves)))


def written_down(passes: Sequence[int], node: Node | None = None) -> Expression | None:
    """The sum that the contract asks for, straight from its words."""
    node = node or Node(0, len(passes))
    if node.stop - node.start == 1:
        total = None
        for number in range(passes[node.start]):
            one = (node.start, number)
            total = one if total is None else ("+", total, one)
        return total
    half = 1
    while half * 2 < node.stop - node.start:
        half *= 2
    left = written_down(passes, Node(node.start, node.start + half))
    right = written_down(passes, Node(node.start + half, node.stop))
    if left is None or right is None:
        return right if left is None else left
    return ("+", left, right)


def partial_sums(program: Accumulation, owned: range, passes: Sequence[int]) -> list[Expression]:
    """Carry out one worker's program on symbols."""
    buffers: list[Expression | None] = [None] * program.buffers
    gradients = [(leaf, number) for leaf in owned for number in range(passes[leaf])]
    for gradient, now in zip(gradients, program.passes, strict=True):
        buffers[now.buffer] = gradient if now.first else ("+", buffers[now.buffer], gradient)
        for add in now.then:
            buffers[add.into] = ("+", buffers[add.into], buffers[add.other])
    found = buffers[: program.partials]
    assert all(found)
    return found


def finished(case: Case, adds: Sequence[Add], programs: Sequence[Accumulation]) -> Expression:
    operands = [
        partial
        for owned, program in zip(case.ownership, programs, strict=True)
        for partial in partial_sums(program, owned, case.passes)
    ]
    for add in adds:
        operands[add.into] = ("+", operands[add.into], operands[add.other])
    return operands[0]


def operands_of(expression: Expression) -> list[Expression]:
    if expression[0] != "+":
        return [expression]
    return operands_of(expression[1]) + operands_of(expression[2])


def whole(case: Case) -> Expression:
    programs = [accumulation(owned, case.passes) for owned in case.ownership]
    return finished(case, completion(case.ownership, case.passes), programs)


@given(cases())
def test_every_ownership_gives_the_expression_that_the_contract_writes_down(case):
    assert whole(case) == written_down(case.passes)


@given(cases())
def test_every_gradient_is_summed_exactly_once(case):
    every = [(leaf, number) for leaf, count in enumerate(case.passes) for number in range(count)]
    assert operands_of(whole(case)) == every


@given(cases())
def test_extra_buffers_are_at_most_the_logarithm_of_the_leaves(case):
    for owned in case.ownership:
        program = accumulation(owned, case.passes)
        assert program.buffers - program.partials <= len(owned).bit_length()


@given(cases())
def test_partials_are_as_many_as_the_placement_announces(case):
    for fast in (False, True):
        placement = Placement(case.ownership, 0, fast=fast)
        announced = placement.partials(case.passes)
        for rank in range(len(case.ownership)):
            assert Placement(case.ownership, rank, fast=fast).accumulation(case.passes).partials == announced[rank]


@given(cases())
def test_a_short_step_needs_no_partial_that_a_full_one_lacks(case):
    placement = Placement(case.ownership, 0, fast=False)
    full = placement.partials(tuple(3 for _ in case.passes))
    assert all(few <= many for few, many in zip(placement.partials(case.passes), full, strict=True))


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_a_covering_is_exactly_the_owned_leaves_in_aligned_nodes(drawn):
    leaves, one, other = drawn
    owned = range(min(one, other), max(one, other))
    nodes = covering(owned, leaves)
    assert [leaf for node in nodes for leaf in range(*node)] == list(owned)
    for node in nodes:
        size = 1 << (node.stop - node.start - 1).bit_length()
        assert node.start % size == 0
        assert node.stop in (node.start + size, leaves)
    assert len(nodes) <= 2 * leaves.bit_length()


@given(st.integers(2, 1000))
def test_children_are_two_halves_and_the_left_one_a_power_of_two(leaves):
    left, right = children(Node(0, leaves))
    assert left.stop == right.start
    assert (left.start, right.stop) == (0, leaves)
    assert left.stop & (left.stop - 1) == 0
    assert left.stop >= right.stop - right.start > 0


@given(cases())
def test_the_fast_mode_also_sums_every_gradient_exactly_once(case):
    programs = [row(owned, case.passes) for owned in case.ownership]
    placement = Placement(case.ownership, 0, fast=True)
    total = finished(case, placement.adds(case.passes), programs)
    every = [(leaf, number) for leaf, count in enumerate(case.passes) for number in range(count)]
    assert sorted(operands_of(total)) == every
    assert all(program.buffers <= 1 for program in programs)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=17))
def test_numbers_are_summed_in_the_same_order_as_gradients(values):
    def value(expression: Expression) -> float:
        if expression[0] != "+":
            return values[expression[0]]
        return value(expression[1]) + value(expression[2])

    assert tree_sum(values) == value(written_down([1] * len(values)))


def test_a_sum_of_nothing_is_zero():
    assert tree_sum([]) == 0.0


# --- planted faults: the checks above must see them ---------------------------------------------------------------

FIVE = Case((1, 2, 1, 1, 2), (range(0, 3), range(3, 5)))


def test_a_dropped_addition_is_seen():
    adds = completion(FIVE.ownership, FIVE.passes)
    programs = [accumulation(owned, FIVE.passes) for owned in FIVE.ownership]
    assert finished(FIVE, adds, programs) == written_down(FIVE.passes)
    for gone in range(len(adds)):
        assert finished(FIVE, adds[:gone] + adds[gone + 1 :], programs) != written_down(FIVE.passes)


def test_a_swapped_addition_is_seen():
    adds = completion(FIVE.ownership, FIVE.passes)
    programs = [accumulation(owned, FIVE.passes) for owned in FIVE.ownership]
    assert finished(FIVE, adds[::-1], programs) != written_down(FIVE.passes)


@pytest.mark.parametrize("fault", ["forgets an addition", "overwrites", "adds in a row"])
def test_a_wrong_program_is_seen(fault):
    programs = [accumulation(owned, FIVE.passes) for owned in FIVE.ownership]
    good = programs[0]
    if fault == "forgets an addition":
        bad = replace(good, passes=tuple(p._replace(then=()) for p in good.passes))
    elif fault == "overwrites":
        bad = replace(good, passes=tuple(p._replace(first=True) for p in good.passes))
    else:
        bad = row(FIVE.ownership[0], FIVE.passes)
        placement = Placement(FIVE.ownership, 0, fast=True)
        programs = [bad, row(FIVE.ownership[1], FIVE.passes)]
        assert finished(FIVE, placement.adds(FIVE.passes), programs) != written_down(FIVE.passes)
        return
    adds = completion(FIVE.ownership, FIVE.passes)
    broken = good.passes != bad.passes
    assert broken
    try:
        total = finished(FIVE, adds, [bad, programs[1]])
    except AssertionError:
        return
    assert total != written_down(FIVE.passes)


def test_a_tree_that_splits_elsewhere_is_seen(monkeypatch):
    def middle(node: Node) -> tuple[Node, Node]:
        half = (node.start + node.stop) // 2
        return Node(node.start, half), Node(half, node.stop)

    monkeypatch.setattr(tree, "children", middle)
    assert whole(FIVE) != written_down(FIVE.passes)
