"""The loopback keeps the contract, and its clock obeys the laws of the links."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_contract import CONTRACT

from shoal.cluster.topology import Capacity, Link, Topology
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.registry import algorithms, build
from shoal.comm.transports.contract import Message, drive
from shoal.comm.transports.loopback import Loopback
from shoal.comm.transports.sharing import fair_rates
from shoal.errors import RunFailed, UserError


def joined(ranks, *, bytes_per_s=100.0, latency_s=0.0, lanes=1, through=(), **rest):
    links = tuple(
        Link(source=a, target=b, bytes_per_s=bytes_per_s, latency_s=latency_s, lane=lane, through=through)
        for a in range(ranks)
        for b in range(ranks)
        for lane in range(lanes)
        if a != b
    )
    return Topology(hosts=("h",) * ranks, links=links, **rest)


@pytest.mark.parametrize("steps", CONTRACT, ids=lambda steps: steps.__name__)
@pytest.mark.parametrize(
    "topology", [3, joined(3, bytes_per_s=1e9, latency_s=1e-5, lanes=2, message_s=1e-6)], ids=["bare", "linked"]
)
def test_it_keeps_the_contract(steps, topology):
    results = Loopback(topology).run(steps).results
    assert results == [CONTRACT[steps](rank, 3) for rank in range(3)]


def sends(*messages, then=()):
    """Steps: rank origin sends so many bytes to rank to, on a lane, all at once; the later ones after them."""

    def steps(end):
        for some in (messages, then):
            out = [
                Message(to, torch.zeros(size, dtype=torch.uint8), lane) for a, to, size, lane in some if a == end.rank
            ]
            into = [
                Message(a, torch.zeros(size, dtype=torch.uint8), lane) for a, to, size, lane in some if to == end.rank
            ]
            yield end.post(out, into)

    return steps


def test_a_message_takes_its_latency_and_its_bytes():
    done = Loopback(joined(2, latency_s=3.0)).run(sends((0, 1, 200, 0)))
    assert done.finish_s == [2.0, 5.0]  # the sender is free when the last byte has left
    assert done.busy_s == {(0, 1, 0): 2.0}
    assert done.sent == {(0, 1, 0): 200}
    assert done.line_finish_s == {(0, 1, 0): 5.0}
    assert done.utilisation((0, 1, 0)) == pytest.approx(0.4)
    assert done.utilisation((1, 0, 0)) == 0.0


def test_messages_on_one_link_follow_each_other_and_share_the_latency():
    done = Loopback(joined(2, latency_s=3.0)).run(sends((0, 1, 100, 0), (0, 1, 100, 0)))
    assert done.finish_s[1] == 5.0


def test_both_directions_and_both_lanes_go_at_once():
    done = Loopback(joined(2, lanes=2)).run(sends((0, 1, 100, 0), (0, 1, 100, 1), (1, 0, 100, 0)))
    assert done.seconds == 1.0


def test_a_message_waits_for_its_receiver():
    """Rank 1 is busy with rank 2 for 4 s before it comes to the message of rank 0."""

    def steps(end):
        if end.rank == 0:
            yield end.post([Message(1, torch.zeros(100, dtype=torch.uint8))], [])
        else:
            data = torch.zeros(400, dtype=torch.uint8)
            yield end.post(*([[Message(1, data)], []] if end.rank == 2 else [[], [Message(2, data)]]))
            if end.rank == 1:
                yield end.post([], [Message(0, torch.zeros(100, dtype=torch.uint8))])

    assert Loopback(joined(3)).run(steps).finish_s == [5.0, 5.0, 4.0]


def test_links_through_one_capacity_share_it():
    card = Capacity(name="card", bytes_per_s=100.0)
    done = Loopback(joined(3, through=("card",), capacities=(card,))).run(sends((0, 1, 100, 0), (0, 2, 100, 0)))
    assert done.seconds == pytest.approx(2.0)
    uneven = Loopback(joined(3, through=("card",), capacities=(card,))).run(sends((0, 1, 50, 0), (0, 2, 150, 0)))
    assert uneven.line_finish_s[0, 1, 0] == pytest.approx(1.0)  # 50 bytes at half the rate
    assert uneven.line_finish_s[0, 2, 0] == pytest.approx(2.0)  # then the other has all of it


def test_a_wide_capacity_lets_links_run_at_their_own_rate():
    card = Capacity(name="card", bytes_per_s=250.0)
    done = Loopback(joined(3, through=("card",), capacities=(card,))).run(sends((0, 1, 100, 0), (0, 2, 100, 0)))
    assert done.seconds == pytest.approx(1.0)


def test_processors_take_time_for_messages_additions_and_copies():
    topology = joined(2, message_s=1.0, reduce_s_per_byte=0.25, copy_s_per_byte=0.125)

    def steps(end):
        yield from sends((0, 1, 100, 0))(end)
        end.worked(8, 16)

    done = Loopback(topology).run(steps)
    assert done.finish_s == [1.0 + 1.0 + 4.0, 1.0 + 1.0 + 1.0 + 4.0]


def test_ranks_that_share_a_core_are_slower():
    topology = joined(4, reduce_s_per_byte=1.0, cores={"h": 2})

    def steps(end):
        yield end.post([], [])
        end.worked(10, 0)

    assert Loopback(topology).run(steps).finish_s == [20.0] * 4


def test_a_run_is_deterministic():
    topology = Topology.synthetic(6, hosts=2)
    program = build("all_reduce", "two_level", 6, hosts=topology.hosts, segments=3)

    def run():
        tensors = [torch.full((1000,), float(rank)) for rank in range(6)]
        return Loopback(topology).run(lambda end: carry_out(end, program, tensors[end.rank], tensors[end.rank]))

    first, second = run(), run()
    assert first.finish_s == second.finish_s
    assert first.busy_s == second.busy_s
    assert 0.0 < first.seconds < 1.0


@settings(max_examples=20)
@given(st.sampled_from(algorithms("all_reduce")), st.integers(2, 8), st.integers(1, 4000))
def test_no_run_is_faster_than_its_busiest_link_or_slower_than_all_messages_in_a_row(name, ranks, elements):
    topology = joined(ranks, latency_s=0.5)
    program = build("all_reduce", name, ranks, hosts=[rank // 3 for rank in range(ranks)])
    tensors = [torch.ones(elements) for _ in range(ranks)]
    done = Loopback(topology).run(lambda end: carry_out(end, program, tensors[end.rank], tensors[end.rank]))
    assert done.seconds >= max(count / 100.0 for count in done.sent.values()) - 1e-6
    messages = sum(len(actions) for rounds in program.rounds for actions in rounds)
    assert done.seconds <= sum(done.sent.values()) / 100.0 + 0.5 * messages
    for line, busy in done.busy_s.items():
        assert busy == pytest.approx(done.sent[line] / 100.0)
        assert 0.0 <= done.utilisation(line) <= 1.0


@given(
    st.lists(st.tuples(st.floats(1, 100), st.sets(st.sampled_from("abc"))), min_size=1, max_size=8),
    st.fixed_dictionaries({name: st.floats(1, 100) for name in "abc"}),
)
def test_shares_are_fair(transfers, capacities):
    """Nothing carries more than it can; and who gets less than its link carries crosses something full, in which nobody
    gets more."""
    given_rates = [(rate, tuple(sorted(through))) for rate, through in transfers]
    rates = fair_rates(given_rates, capacities)
    used = {name: sum(r for r, (_, t) in zip(rates, given_rates, strict=True) if name in t) for name in capacities}
    assert all(used[name] <= capacities[name] * (1 + 1e-9) for name in capacities)
    for rate, (own, through) in zip(rates, given_rates, strict=True):
        assert 0 < rate <= own
        if rate < own * (1 - 1e-9):
            full = [name for name in through if used[name] >= capacities[name] * (1 - 1e-9)]
            others = [max(r for r, (_, t) in zip(rates, given_rates, strict=True) if name in t) for name in full]
            assert any(rate >= most * (1 - 1e-9) for most in others)


# ---- what goes wrong


def test_ranks_that_wait_for_ever_are_named():
    def steps(end):
        yield end.post([], [Message(1 - end.rank, torch.zeros(1))])

    with pytest.raises(
        RunFailed, match="deadlock: rank 0 waits to receive from rank 1; rank 1 waits to receive from rank 0"
    ):
        Loopback(2).run(steps)


def test_ends_of_different_size_are_told():
    def steps(end):
        data = torch.zeros(3 + end.rank)
        yield end.post(*([[Message(1, data)], []] if end.rank == 0 else [[], [Message(0, data)]]))

    with pytest.raises(RunFailed, match="rank 0 sends 12 bytes to rank 1 on lane 0, which has room for 16"):
        Loopback(2).run(steps)


def test_a_message_that_nobody_takes_is_told():
    def steps(end):
        if end.rank == 0:
            end.post([Message(1, torch.zeros(3))], [])
        yield end.post([], [])

    with pytest.raises(RunFailed, match="a message from rank 0 to rank 1 is left over"):
        Loopback(2).run(steps)


@pytest.mark.parametrize(("peer", "lane"), [(0, 0), (2, 0), (1, 1)])
def test_a_peer_or_lane_that_is_not_there_is_told(peer, lane):
    def steps(end):
        if end.rank == 0:
            yield end.post([Message(peer, torch.zeros(3), lane)], [])

    with pytest.raises(
        UserError, match=f"rank 0 sends to rank {peer} on lane {lane}: there are ranks 0 to 1 but itself"
    ):
        Loopback(joined(2)).run(steps)


def test_a_link_that_is_missing_is_told():
    with pytest.raises(UserError, match="no link from rank 0 to rank 1"):
        Loopback(Topology(hosts=("a", "b"))).run(sends((0, 1, 10, 0)))


def test_an_error_in_one_rank_ends_the_run_and_closes_the_others():
    closed = []

    def steps(end):
        try:
            yield end.post([], [Message(1 - end.rank, torch.zeros(1))])
        finally:
            closed.append(end.rank)

    def wrong(end):
        if end.rank == 1:
            raise UserError("rank 1 has had enough")
        yield from steps(end)

    with pytest.raises(UserError, match="rank 1 has had enough"):
        Loopback(2).run(wrong)
    assert closed == [0]


def test_a_loopback_is_not_driven_alone():
    def steps(end):
        ends.append(end)
        yield end.post([], [])

    ends = []
    Loopback(2).run(steps)

    def later():
        yield ends[0].post([], [Message(1, torch.zeros(1))])

    with pytest.raises(UserError, match=r"yield what post\(\) returns, under Loopback\.run"):
        drive(later())


def test_small_programs_run_by_the_hundred_in_a_second():
    """A floor far below what is measured (about two thousand): a guard against a cost that grows without notice."""
    program = build("all_reduce", "ring", 4)
    tensors = [torch.ones(64) for _ in range(4)]
    start = time.process_time()
    for _ in range(200):
        Loopback(4).run(lambda end: carry_out(end, program, tensors[end.rank], tensors[end.rank]))
    assert time.process_time() - start < 1.0
