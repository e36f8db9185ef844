"""A program is a plain value: it prints, compares, goes through JSON, and is put together from others."""

from itertools import pairwise

import pytest
from collective_cases import PAIRS, any_program
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.comm.collectives.actions import Add, Copy, Program, Receive, Reduce, Send, block_sizes, cut
from shoal.comm.collectives.check import check, order
from shoal.comm.collectives.draft import Draft, chain, merge, on_lane, relabel
from shoal.comm.collectives.registry import build
from shoal.comm.collectives.traffic import traffic
from shoal.errors import UserError


@pytest.mark.parametrize(("collective", "name"), PAIRS)
def test_a_program_goes_through_json_unchanged(collective, name):
    program = build(collective, name, 5, hosts=[0, 0, 1, 1, 1])
    again = Program.from_json(program.to_json())
    assert again == program
    assert hash(again) == hash(program)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"rounds": 3}', build("barrier", "direct", 2).to_json().replace("reduce", "redcue")],
)
def test_what_is_no_program_is_told_in_one_line(text):
    with pytest.raises(
        UserError, match=r"^this is not a program in JSON: [^\n]+$|^unknown action 'redcue': did you mean"
    ):
        Program.from_json(text)


def test_kinds_of_actions_with_the_same_numbers_differ():
    assert len({Send(1, 2), Receive(1, 2), Reduce(1, 2), Add(1, 2), Copy(1, 2)}) == 5


def test_a_program_prints_as_a_table():
    assert str(build("all_reduce", "canonical", 3)) == "\n".join(
        [
            "all_reduce by canonical: 3 ranks, 3 chunks, 2 rounds",
            "round  rank 0                     rank 1                     rank 2",
            "0      3<1 4<2 1>1 2>2 0+=3 0+=4  0>0 5<2 6<0 2>2 1=6+ 1+=5  0>0 1>1 7<0 8<1 7+=8 2=7+",
            "1      0>1 2<2 0>2 1<1            0<0 1>2 1>0 2<2            1<1 2>0 0<0 2>1",
        ]
    )


def test_a_wide_program_wraps_into_groups_of_ranks():
    lines = str(build("all_reduce", "ring", 40)).splitlines()
    assert all(len(line) <= 130 for line in lines[1:])
    assert sum(line.startswith("round") for line in lines) > 1
    assert all(any(f"rank {rank}" in line for line in lines) for rank in range(40))


def test_lanes_and_the_side_of_an_addition_show():
    draft = Draft(2, 1)
    draft.message(0, 1, 0, 0, lane=1, reduce=True, incoming_first=True)
    assert "0<1+@1" in str(draft.program("reduce", "mine"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"collective": "all_reduse"}, "did you mean 'all_reduce'?"),
        ({"ranks": 3}, "3 ranks need one list of rounds each, got 2"),
        ({"collective": "all_gather", "chunks": 3}, "3 chunks do not divide into 2 blocks"),
        ({"shares": (1, 2)}, "shares must be 1 weights of 0 or more"),
        ({"shares": (0,)}, "shares must be 1 weights of 0 or more"),
        ({"root": 2}, "root and target must be ranks from 0 to 1"),
        ({"scratch": (1,)}, "scratch must be like chunks from 0 to 0"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(UserError) as told:
        Program(**{"collective": "all_reduce", "algorithm": "mine", "ranks": 2, "rounds": ((), ())} | change)
    assert said in str(told.value)


# ---- cutting


@given(
    size=st.integers(0, 2000),
    shares=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    alignment=st.sampled_from([1, 2, 16]),
)
def test_cuts_cover_the_vector_in_proportion(size, shares, alignment):
    cuts = cut(size, shares, alignment)
    assert cuts[0] == 0
    assert cuts[-1] == size
    assert cuts == sorted(cuts)
    assert all(at % alignment == 0 or at == size for at in cuts)
    for (begin, end), share in zip(pairwise(cuts), shares, strict=True):
        assert abs((end - begin) - size * share / sum(shares)) <= 2 * alignment


@settings(max_examples=20)
@given(any_program(most_ranks=7), st.integers(0, 100))
def test_spans_lie_side_by_side_in_every_block(program, elements):
    sizes = block_sizes(program.collective, program.ranks, elements)
    spans = program.spans(sizes, 4)
    assert len(spans) == program.chunks
    assert spans[0].start == 0
    assert spans[-1].stop == sum(sizes)
    assert all(a.stop == b.start for a, b in pairwise(spans))
    bounds = [spans[i].start for i in range(0, program.chunks, program.segments)]
    assert bounds == [sum(sizes[:block]) for block in range(program.blocks)]


# ---- putting together


@settings(max_examples=30)
@given(any_program(most_ranks=9), st.randoms(use_true_random=False))
def test_other_numbers_for_the_ranks_leave_a_program_right(program, random):
    order_of_ranks = list(range(program.ranks))
    random.shuffle(order_of_ranks)
    again = relabel(program, order_of_ranks)
    check(again)
    assert sorted(traffic(again, 5040 * 60).sent) == sorted(traffic(program, 5040 * 60).sent)


@settings(max_examples=30)
@given(data=st.data(), delay=st.integers(0, 3))
def test_programs_side_by_side_are_right_and_carry_their_weights(data, delay):
    first = data.draw(any_program(most_ranks=6))
    second = data.draw(any_program(most_ranks=6))
    kinds = [(p.collective, p.ranks, p.root, p.target) for p in (first, second)]
    second = second if kinds[0] == kinds[1] else first
    weights = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=2))
    both = merge([first, on_lane(second, 1)], "both", weights, delay=delay)
    check(both)
    assume(traffic(first, 960).total and traffic(second, 960).total)
    size = sum(weights) * 5040 * 60 * both.ranks**2
    moved = traffic(both, size)
    shares = [traffic(p, size).total * w / sum(weights) for p, w in zip((first, second), weights, strict=True)]
    assert moved.on_lane(0) == pytest.approx(shares[0], rel=1e-3)
    assert moved.on_lane(1) == pytest.approx(shares[1], rel=1e-3)


@pytest.mark.parametrize("ranks", range(1, 8))
@pytest.mark.parametrize("first", ["ring", "canonical", "halving_doubling"])
@pytest.mark.parametrize("second", ["ring", "direct", "halving_doubling"])
def test_a_reduce_scatter_and_an_all_gather_make_an_all_reduce(ranks, first, second):
    parts = [build("reduce_scatter", first, ranks), build("all_gather", second, ranks)]
    check(chain("all_reduce", "mixed", parts))


def test_programs_that_do_not_fit_are_not_put_together():
    with pytest.raises(UserError, match="must be of one collective, ranks and root"):
        merge([build("all_reduce", "ring", 4), build("broadcast", "ring", 4)], "both")
    with pytest.raises(UserError, match="must have the same ranks and chunks"):
        chain("all_reduce", "mixed", [build("reduce_scatter", "ring", 4), build("all_gather", "ring", 3)])
    with pytest.raises(UserError, match="the order must name each of 3 ranks once"):
        relabel(build("all_reduce", "ring", 3), [0, 1, 1])


def test_two_lanes_are_counted():
    program = build("all_reduce", "ring", 3)
    assert program.lanes == 1
    assert merge([program, on_lane(program, 1)], "both").lanes == 2
    assert order(on_lane(program, 2)).agrees
