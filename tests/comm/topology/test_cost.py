"""The cost model says what the loopback's virtual clock says, and what the textbooks say."""

from dataclasses import replace
from math import log2

import pytest
import torch
from collective_cases import any_program, operands, results, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.topology import Speed, Topology
from shoal.comm.collectives.actions import block_sizes
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.multipath import over_lane
from shoal.comm.collectives.registry import build
from shoal.comm.collectives.traffic import traffic
from shoal.errors import UserError

speeds = st.builds(Speed, st.floats(1e8, 1e10), st.floats(0, 1e-4))
LATENCY_S, RATE, ADDING = 2e-5, 1e9, 2e-10
EVEN = 64 * 3 * 5 * 7 * 8  # elements that divide by all numbers of ranks here, at aligned cuts


@st.composite
def machines(draw, ranks):
    made = Topology.synthetic(
        ranks,
        hosts=draw(st.integers(1, min(3, ranks))),
        inside=draw(speeds),
        between=draw(st.lists(speeds, min_size=1, max_size=2)),
    )
    cores = {host: draw(st.integers(1, 4)) for host in made.host_names} if draw(st.booleans()) else {}
    message_s, adding = draw(st.sampled_from([(0.0, 0.0), (5e-6, 2e-10), (0.0, 1e-9)]))
    return replace(made, cores=cores, message_s=message_s, reduce_s_per_byte=adding)


@settings(max_examples=30)
@given(st.data())
def test_predicted_seconds_are_those_of_the_virtual_clock(data):
    program = data.draw(any_program(most_ranks=9))
    topology = data.draw(machines(program.ranks))
    lane = data.draw(st.integers(0, topology.lanes - 1))
    program = over_lane(program, topology, lane) if lane else program
    elements = data.draw(st.integers(0, 20_000))
    sizes = block_sizes(program.collective, program.ranks, elements)
    given_ = operands(program, sizes, torch.float32)
    ran = simulate(program, given_, results(program, sizes, given_), sizes, topology)
    predicted = cost(program, 4 * elements, topology, itemsize=4)
    # Arrivals that cost a processor's time are taken in the order of their sending here, of their coming there.
    tolerance = 0.03 if topology.message_s else 1e-6
    assert predicted.seconds == pytest.approx(ran.seconds, rel=tolerance, abs=1e-12)
    assert sum(predicted.busy_s.values()) == pytest.approx(sum(ran.busy_s.values()), rel=tolerance, abs=1e-12)


@settings(max_examples=20)
@given(any_program(most_ranks=9), st.integers(0, 50_000))
def test_bytes_by_line_are_those_of_the_account(program, elements):
    found = cost(program, 4 * elements, Topology.synthetic(program.ranks), itemsize=4)
    told = {line: count for line, count in traffic(program, 4 * elements, 4).by_line.items() if count}
    assert sum(found.sent.values()) == pytest.approx(sum(told.values()), abs=64 * program.chunks)  # cuts are aligned
    assert set(found.sent) <= set(told)


# Thakur, Rabenseifner and Gropp, 2005; Sanders, Speck and Träff, 2009. S bytes, n ranks, B bytes a second, a seconds of
# latency, g seconds to add a byte.
LAWS = {
    ("all_reduce", "ring"): lambda n, s: 2 * (n - 1) * (LATENCY_S + s / n / RATE) + (n - 1) / n * s * ADDING,
    ("reduce_scatter", "ring"): lambda n, s: (n - 1) * (LATENCY_S + s / n / RATE + s / n * ADDING),
    ("all_gather", "ring"): lambda n, s: (n - 1) * (LATENCY_S + s / n / RATE),
    ("all_to_all", "pairwise"): lambda n, s: (n - 1) * (LATENCY_S + s / n / RATE),
    ("all_reduce", "two_shot"): lambda n, s: 2 * (LATENCY_S + s / n / RATE) + (n - 1) / n * s * ADDING,
    ("all_reduce", "direct"): lambda n, s: LATENCY_S + s / RATE + (n - 1) * s * ADDING,
}
POWER_OF_TWO = {
    ("all_reduce", "halving_doubling"): lambda n, s: (
        2 * log2(n) * LATENCY_S + 2 * (n - 1) / n * s / RATE + (n - 1) / n * s * ADDING
    ),
    ("all_reduce", "recursive_doubling"): lambda n, s: log2(n) * (LATENCY_S + s / RATE + s * ADDING),
    ("broadcast", "binomial"): lambda n, s: log2(n) * (LATENCY_S + s / RATE),
    ("reduce", "binomial"): lambda n, s: log2(n) * (LATENCY_S + s / RATE + s * ADDING),
    ("all_reduce", "binomial"): lambda n, s: log2(n) * (2 * (LATENCY_S + s / RATE) + s * ADDING),
}


def uniform(ranks: int) -> Topology:
    return replace(Topology.synthetic(ranks, inside=Speed(RATE, LATENCY_S)), reduce_s_per_byte=ADDING)


@pytest.mark.parametrize(
    ("collective", "algorithm", "ranks"),
    [(*key, n) for key in LAWS for n in (2, 3, 4, 5, 7, 8)] + [(*key, n) for key in POWER_OF_TWO for n in (2, 4, 8)],
)
def test_standard_algorithms_take_what_the_textbook_says(collective, algorithm, ranks):
    law = LAWS.get((collective, algorithm)) or POWER_OF_TWO[collective, algorithm]
    nbytes = 4 * EVEN
    found = cost(build(collective, algorithm, ranks), nbytes, uniform(ranks), itemsize=4)
    assert found.seconds == pytest.approx(law(ranks, nbytes), rel=1e-9)


@pytest.mark.parametrize("segments", [1, 5, 16])
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_a_chain_of_segments_takes_its_length_and_its_segments(ranks, segments):
    nbytes = 64 * segments * 100
    found = cost(build("broadcast", "ring", ranks, segments=segments), nbytes, uniform(ranks), itemsize=4)
    assert found.seconds == pytest.approx((ranks - 2 + segments) * (LATENCY_S + nbytes / segments / RATE), rel=1e-9)


@pytest.mark.parametrize(("ranks", "hosts"), [(4, 2), (8, 2), (6, 3)])
def test_two_levels_take_both_their_levels(ranks, hosts):
    """Inside, all slices at once; between, a ring of hosts for each slice, which share the cards."""
    each, nbytes, outside = ranks // hosts, 4 * EVEN, Speed(1e8, 1e-4)
    topology = Topology.synthetic(ranks, hosts=hosts, inside=Speed(RATE, LATENCY_S), between=[outside])
    found = cost(build("all_reduce", "two_level", ranks, hosts=topology.hosts), nbytes, topology, itemsize=4)
    inside = 2 * (LATENCY_S + nbytes / each / RATE)
    ring = 2 * (hosts - 1) * (outside.latency_s + nbytes / hosts / outside.bytes_per_s)
    assert found.seconds == pytest.approx(inside + ring, rel=1e-9)


def test_a_shared_card_divides_its_rate():
    alone = Topology.synthetic(2, hosts=2, between=[Speed(1e9)])
    shared = Topology.synthetic(4, hosts=2, between=[Speed(1e9)])
    swap = build("all_to_all", "direct", 2), build("all_to_all", "two_level", 4, hosts=[0, 1, 2, 3])
    one = cost(swap[0], 2_000_000, alone).seconds  # a megabyte each way
    four = cost(build("all_to_all", "direct", 4), 4_000_000, shared)  # 2 ranks to 2 ranks: 4 megabytes each way
    assert one == pytest.approx(1e-3)
    assert four.seconds == pytest.approx(4e-3)
    assert four.bound_by == "bandwidth"


def test_short_messages_are_bound_by_latency_and_long_ones_are_not():
    program, topology = build("all_reduce", "ring", 4), Topology.synthetic(4, inside=Speed(1e9, 1e-4))
    assert cost(program, 1024, topology).bound_by == "latency"
    assert cost(program, 1 << 28, topology).bound_by == "bandwidth"
    assert cost(program, 1024, topology).latency_s == pytest.approx(6e-4)
    assert "0 -> 1 memory: 1536 bytes in 6 messages, busy" in str(cost(program, 1024, topology))


def test_half_precision_that_is_summed_on_the_way_costs_twice_the_bytes():
    program, topology = build("reduce_scatter", "ring", 4), Topology.synthetic(4, inside=Speed(1e9, 0.0))
    once = cost(program, 1 << 20, topology, itemsize=2).seconds
    hop = cost(program, 1 << 20, topology, itemsize=2, half=True).seconds
    assert once < hop <= 2 * once


def test_a_program_for_other_ranks_or_links_is_refused():
    with pytest.raises(UserError, match="made for 3 ranks, but the topology has 4"):
        cost(build("all_reduce", "ring", 3), 8, Topology.synthetic(4))
    chain = Topology.synthetic(3).only(lambda link: link.source + 1 == link.target)
    with pytest.raises(UserError, match="no link from rank"):
        cost(build("all_reduce", "ring", 3), 1024, chain)
