"""The model of remedies: gains are never negative, grow with what brings them, and are 0 where nothing is lost."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.accounting import remedies as model
from shoal.comm.accounting.remedies import Measured
from shoal.comm.layout import BLOCK

seconds = st.floats(0.0, 1.0)


@st.composite
def steps(draw, algorithms=("direct", "ring", "memory")):
    workers, hosts = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    latency, under_way = draw(seconds), draw(seconds)
    busy = draw(st.lists(st.floats(0.0, 2.0), min_size=workers, max_size=workers))
    return Measured(
        step_s=latency + under_way + max(busy) + 0.01,
        algorithm=draw(st.sampled_from(algorithms)),
        hosts=tuple(sorted(rank % hosts for rank in range(workers))),
        gradient_bytes=draw(st.floats(1e3, 1e9)),
        buckets=draw(st.integers(1, 100)),
        latency_s=latency,
        bytes_s=under_way,
        exposed_s=(latency + under_way) * draw(st.floats(0.0, 1.0)),
        wait_s=tuple(max(busy) - one for one in busy),
        busy_s=tuple(busy),
        load_s=tuple(one * draw(st.floats(0.0, 1.0)) for one in busy),
        shards=tuple(draw(st.integers(1, 4)) for _ in busy),
    )


@given(steps())
def test_no_remedy_costs_or_gives_back_more_than_a_step(m):
    for remedy in model.remedies(m):
        assert 0.0 <= remedy.gain_s <= m.step_s
        assert math.isfinite(remedy.gain_s)


@given(steps())
def test_remedies_stand_in_the_order_of_their_gain(m):
    gains = [remedy.gain_s for remedy in model.remedies(m)]
    assert gains == sorted(gains, reverse=True)


@given(steps())
def test_where_nothing_is_exposed_nothing_of_communication_gains(m):
    calm = replace(m, exposed_s=0.0, wait_s=(0.0,) * m.workers, load_s=(0.0,) * m.workers)
    assert all(remedy.gain_s == 0.0 for remedy in model.remedies(calm))


@given(steps(), st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_a_faster_link_and_a_stronger_codec_never_gain_less(m, one, other):
    less, more = sorted((one, other))
    slack = 1e-9
    assert model.faster_link(m, more) >= model.faster_link(m, less) - slack
    assert model.lower_latency(m, more) >= model.lower_latency(m, less) - slack
    assert model.compression(m, more) >= model.compression(m, less) - slack
    assert model.compression(m, less, 1e12) >= model.compression(m, less, 1e9) - slack


@given(steps())
def test_what_changes_nothing_gains_nothing(m):
    assert model.faster_link(m, 1.0) == pytest.approx(0.0, abs=1e-9)
    assert model.gain(m, m.latency_s, m.bytes_s) == pytest.approx(0.0, abs=1e-9)
    assert model.takes(m, m.algorithm) == pytest.approx((m.latency_s, m.bytes_s))


@given(steps(algorithms=("server",)), st.integers(1, 8))
def test_more_servers_never_take_longer(m, servers):
    few = replace(m, servers=servers)
    assert sum(model.takes(few, "server", 2 * servers)) <= sum(model.takes(few, "server", servers)) + 1e-9


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 50))
def test_what_is_exposed_is_at_least_the_last_bucket_and_at_most_everything(spent, wide, buckets):
    left = model.exposed(spent, wide, buckets)
    assert spent / buckets - 1e-12 <= left <= spent + 1e-12


@given(st.floats(0.0, 1.0), st.floats(0.001, 1.0), st.integers(1, 50))
def test_the_closed_form_is_what_a_queue_of_buckets_does(spent, wide, buckets):
    free = 0.0
    for bucket in range(1, buckets + 1):
        free = max(free, wide * bucket / buckets) + spent / buckets
    assert model.exposed(spent, wide, buckets) == pytest.approx(free - wide, abs=1e-9)


@given(steps())
def test_the_window_explains_what_was_exposed(m):
    if m.exposed_s >= m.spent_s / m.buckets and m.buckets > 1:
        assert model.exposed(m.spent_s, model.window(m), m.buckets) == pytest.approx(m.exposed_s, abs=1e-9)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), st.integers(0, 5))
def test_no_other_placement_ends_sooner(costs, more):
    shards = len(costs) + more
    found = model.balanced(costs, shards)
    assert (sum(found), min(found) >= 1) == (shards, True)
    longest = max(cost * count for cost, count in zip(costs, found, strict=True))
    for other in itertools.product(range(1, shards + 1), repeat=len(costs)):
        if sum(other) == shards:
            assert longest <= max(cost * count for cost, count in zip(costs, other, strict=True)) + 1e-12


@given(steps())
def test_buckets_are_never_smaller_than_a_block_a_worker_nor_more_where_start_costs_are_unknown(m):
    count, saved = model.bucket_count(m)
    assert count <= max(m.buckets, m.gradient_bytes / (BLOCK * 4 * m.workers))
    assert model.bucket_count(replace(m, latency_s=0.0))[0] <= m.buckets
    assert saved == 0.0 or count != m.buckets


def test_a_worker_of_half_the_speed_gets_half_the_work():
    m = Measured(step_s=0.2, algorithm="direct", hosts=(0, 0), gradient_bytes=1e6, buckets=1,
                 busy_s=(0.16, 0.08), wait_s=(0.0, 0.08), shards=(6, 6), load_s=(0.0, 0.0))  # fmt: skip
    placement, saved = model.rebalancing(m)
    assert placement == (4, 8)
    assert saved == pytest.approx(0.16 - 0.16 * 4 / 6)


def test_lines_are_those_of_the_textbook():
    flat, two = (0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1)
    assert model.lines("ring", flat) == (14, 1.75)
    assert model.lines("direct", flat) == (2, 1.75)
    assert model.lines("halving-doubling", flat) == (6, 1.75)
    assert model.lines("two-level", two) == (4, 1.0)
    assert model.lines("direct", two) == (2, 4.0)  # four workers send half of theirs over one line, twice
    assert model.lines("server", flat, 1) == (2, 8)
    assert model.lines("server", flat, 16) == (2, 1)
    assert model.lines("ring", (0,)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no algorithm 'rign'"):
        model.lines("rign", flat)


def test_a_parameter_server_moves_what_the_textbook_says():
    m = Measured(
        step_s=1.0, algorithm="ring", hosts=(0,) * 4, gradient_bytes=100.0, buckets=4, bytes_s=0.3, exposed_s=0.3
    )
    ways = {way.name: way for way in model.ways(m)}
    ring, one, two = ways["all-reduce (ring)"], ways["1 parameter server"], ways["2 parameter servers"]
    assert (ring.worker_bytes, ring.server_bytes) == (150.0, 0.0)
    assert (one.worker_bytes, one.server_bytes) == (100.0, 400.0)
    assert (two.worker_bytes, two.server_bytes) == (100.0, 200.0)
    assert ring.spent_s == pytest.approx(0.3)
    assert one.spent_s == pytest.approx(0.3 * 4 / 1.5)  # all gradients cross the one server's line
    assert two.spent_s == pytest.approx(one.spent_s / 2)
    assert ring.step_s == pytest.approx(1.0)
    assert one.step_s == pytest.approx(1.0 - 0.3 + 0.8)


def test_compression_is_no_remedy_where_gradients_lie_in_memory_that_all_map():
    m = Measured(
        step_s=0.2,
        algorithm="server",
        hosts=(0, 0),
        gradient_bytes=1e8,
        buckets=1,
        bytes_s=0.1,
        exposed_s=0.1,
        servers=2,
    )
    over_a_link, shared = ({r.name for r in model.remedies(one)} for one in (m, replace(m, shared=True)))
    assert over_a_link - shared == {f"compression: {codec}" for codec in model.CODECS} | {"a link twice as fast"}
    assert shared - over_a_link == {"memory twice as fast"}
