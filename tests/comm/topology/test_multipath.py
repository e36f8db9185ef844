"""Shares of two lanes are such that both are done at the same moment; one lane is used where two gain nothing."""

import pytest
import torch
from collective_cases import equal, expected, operands, results, simulate
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.cluster.topology import Speed, Topology
from shoal.comm.collectives.actions import block_sizes
from shoal.comm.collectives.check import check
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.multipath import Fit, Lane, fit, over_lane, program, split
from shoal.comm.collectives.registry import build
from shoal.comm.collectives.traffic import traffic
from shoal.errors import UserError

lanes = st.builds(Lane, st.floats(1e6, 1e11), st.floats(0, 1e-2))


@given(st.integers(1, 1 << 34), lanes, lanes)
def test_two_lanes_get_what_the_closed_form_says(nbytes, one, two):
    first = (nbytes + two.bytes_per_s * (two.start_s - one.start_s)) * one.bytes_per_s
    first = min(max(first / (one.bytes_per_s + two.bytes_per_s), 0), nbytes)
    both = max(one.seconds(first), two.seconds(nbytes - first))
    alone = min(one.seconds(nbytes), two.seconds(nbytes))
    assume(abs(both / alone - 0.95) > 1e-6)  # at the border either is right
    parts = split(nbytes, (one, two))
    if both < 0.95 * alone:
        assert parts[0] == pytest.approx(first, abs=1)
    else:
        assert sorted(parts) == [0, nbytes]
        assert max(lane.seconds(part) for lane, part in zip((one, two), parts, strict=True)) == alone
    assert sum(parts) == nbytes


@given(st.integers(1, 1 << 34), st.lists(lanes, min_size=1, max_size=4))
def test_all_lanes_in_use_are_done_together_and_no_lane_alone_is_faster(nbytes, given_lanes):
    parts = split(nbytes, given_lanes)
    assert sum(parts) == nbytes
    assert min(parts) >= 0
    ends = [lane.seconds(part) for lane, part in zip(given_lanes, parts, strict=True) if part]
    slack = 2 / min(lane.bytes_per_s for lane in given_lanes)  # parts are whole bytes
    if len(ends) > 1:
        assert max(ends) - min(ends) <= slack + 1e-9 * max(ends)
        assert max(ends) <= 0.95 * min(lane.seconds(nbytes) for lane in given_lanes) + slack
    else:
        assert ends[0] == min(lane.seconds(nbytes) for lane in given_lanes)


@given(lanes, lanes, st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_fit_follows_what_is_observed(one, two, faster, slower):
    """Lanes that are other than was thought: after some runs the shares are those of the true lanes."""
    nbytes = 1 << 40  # so long that no start takes half of the time
    truth = (Lane(one.bytes_per_s * faster, one.start_s), Lane(two.bytes_per_s * slower, two.start_s))
    known = Fit((one, two))
    for _ in range(40):  # half of each: both are seen whatever their share
        known = known.observed([nbytes // 2] * 2, [lane.seconds(nbytes // 2) for lane in truth])
    assert [lane.bytes_per_s for lane in known.lanes] == pytest.approx([t.bytes_per_s for t in truth], rel=0.02)


def test_a_lane_that_carried_nothing_stays_as_it_was():
    known = Fit((Lane(1e9, 0.0), Lane(1e8, 1e-3)))
    seen = known.observed((1 << 20, 0), (2e-3, 0.0))
    assert seen.lanes[1] == known.lanes[1]
    assert seen.lanes[0].bytes_per_s == pytest.approx(1 / (0.5 / 1e9 + 0.5 * 2e-3 / (1 << 20)))


@pytest.mark.parametrize(
    ("collective", "algorithm"), [("all_reduce", "ring"), ("all_gather", "ring"), ("all_to_all", "direct")]
)
def test_both_interfaces_are_busy_to_the_end_on_the_virtual_clock(collective, algorithm):
    rates = (1.25e8, 0.5e8)
    topology = Topology.synthetic(3, hosts=3, between=[Speed(rates[0], 1e-4), Speed(rates[1], 3e-4)])
    base = build(collective, algorithm, 3)
    both = [base, over_lane(base, topology, 1)]
    nbytes = 3 << 21
    parts = fit(both, nbytes, topology).split(nbytes)
    made = program(both, parts)
    check(made)
    sizes = block_sizes(collective, 3, nbytes // 4)
    given_ = operands(made, sizes, torch.float32)
    want = expected(made, sizes, given_)
    into = results(made, sizes, given_)
    ran = simulate(made, given_, into, sizes, topology)
    assert equal(into, want)
    assert all(ran.utilisation(line) > 0.95 for line in ran.busy_s)
    alone = cost(base, nbytes, topology, itemsize=4).seconds
    assert ran.seconds == pytest.approx(alone * rates[0] / sum(rates), rel=0.03)
    told = traffic(made, nbytes, 4)
    assert told.on_lane(1) / told.total == pytest.approx(rates[1] / sum(rates), rel=0.02)


def test_a_lane_that_does_not_join_all_ranks_is_used_where_it_is():
    topology = Topology.synthetic(4, hosts=2, between=[Speed(1e9), Speed(5e8)])
    moved = over_lane(build("all_reduce", "ring", 4), topology, 1)
    lines = traffic(moved, 1 << 20).by_line
    assert {(0, 1, 0), (1, 2, 1), (2, 3, 0), (3, 0, 1)} == set(lines)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="above 0"):
        Lane(0.0)
    with pytest.raises(UserError, match="at least one lane"):
        split(8, ())
    with pytest.raises(UserError, match="as many parts"):
        program([build("all_reduce", "ring", 2)], (0,))
    with pytest.raises(UserError, match="as many bytes and seconds"):
        Fit((Lane(1.0),)).observed((1, 2), (1.0, 2.0))
