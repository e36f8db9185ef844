"""Hosts with limited links, made of namespaces: the bytes that programs claim are those that leave a host, sums are
right, and the model says of hierarchy and of a second interface what the virtual clock says. No clock decides here."""

import os
from functools import partial
from pathlib import Path

import pytest
from benches import bench
from emulated_hosts import emulated_hosts, why_not
from forked_programs import Program

from shoal.cluster.topology import Topology
from shoal.comm.collectives.choose import choose
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.registry import build
from shoal.comm.native import build as build_native

hosts = bench("hosts")

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
RATES = (1.0, 0.4)  # gigabits a second
PLACES = (0, 0, 1, 1)
NBYTES = 1 << 21
CONTROL = 30_000  # bytes of the barriers around what is counted


@pytest.fixture(scope="module")
def two_hosts(warm):
    with emulated_hosts(2, RATES, partial(Program, source=warm)) as hosts:
        yield hosts
    for holder in hosts.holders:
        with pytest.raises(ProcessLookupError):
            os.kill(holder, 0)


def within_headers(sent: int, claimed: int) -> bool:
    return claimed <= sent <= claimed * hosts.HEADERS + CONTROL


def test_two_levels_send_out_of_a_host_what_they_claim_and_gloos_ring_half_more(two_hosts):
    """The sums are compared in the ranks themselves: a wrong one would end them."""
    found = two_hosts.run("hosts:hierarchy", PLACES, places=list(PLACES), nbytes=NBYTES, segments=2, rounds=3)
    made = build("all_reduce", "two_level", 4, hosts=PLACES, segments=2)
    claimed = hosts.leaving_bytes(made, NBYTES, PLACES)
    assert claimed == NBYTES  # the whole tensor once: less cannot be
    assert within_headers(hosts.sent(found, "two_level", "eth0"), claimed)
    ring = hosts.leaving_bytes(build("all_reduce", "ring", 4), NBYTES, PLACES)
    assert ring == NBYTES * 3 // 2
    assert within_headers(hosts.sent(found, "gloo", "eth0"), ring)
    assert hosts.sent(found, "two_level", "eth1") < CONTROL


def test_the_hier_backend_sends_out_of_a_host_what_two_levels_do(two_hosts):
    if build_native.backend() is None:
        pytest.skip(f"hier is not here: {build_native.why_not(('backend',))}")
    found = two_hosts.run("hosts:by_hier", PLACES, places=list(PLACES), nbytes=NBYTES, rounds=3)
    assert within_headers(hosts.sent(found, "hier", "eth0"), NBYTES)


def test_two_interfaces_carry_the_shares_that_end_together(two_hosts):
    found = two_hosts.run("hosts:interfaces", (0, 1), rates=list(RATES), nbytes=NBYTES, rounds=3)
    parts, claimed = found[0]["parts"], found[0]["claimed"]
    assert sum(parts) == NBYTES
    for lane in range(2):
        assert within_headers(hosts.sent(found, "both", f"eth{lane}"), claimed[lane])
        assert within_headers(hosts.sent(found, f"eth{lane}", f"eth{lane}"), NBYTES)
        assert hosts.sent(found, f"eth{lane}", f"eth{1 - lane}") < CONTROL
    assert sum(claimed) == pytest.approx(NBYTES, rel=0.01)


def test_a_probe_finds_the_hosts_and_all_ranks_come_to_the_same_choice(two_hosts):
    found = two_hosts.run("emulated_jobs:probed", PLACES, nbytes=NBYTES)
    assert all(rank["right"] for rank in found)
    assert len({(rank["topology"], rank["chosen"]) for rank in found}) == 1  # all ranks come to the same
    topology = Topology.from_json(found[0]["topology"])
    assert topology.groups() == ((0, 1), (2, 3))
    assert topology.link(0, 2).kind == "network"
    assert topology.link(0, 1).kind == "memory"


def test_the_model_says_what_pays_here_as_the_virtual_clock_does():
    nbytes = 16 << 20
    one, two = hosts.two_hosts(PLACES, (1.0,)), hosts.two_hosts(PLACES, RATES)
    ring, levels = (build("all_reduce", name, 4, hosts=PLACES) for name in ("ring", "two_level"))
    assert cost(levels, nbytes, one).seconds < cost(ring, nbytes, one).seconds
    pipelined = choose("all_reduce", nbytes, one, only=("two_level",))
    gain = cost(ring, nbytes, one).seconds / pipelined.predicted_s
    assert 1.4 < gain < 1.5  # neighbours' ring sends 1.5 times the tensor out of a host; nothing sends less than once
    in_turn = hosts.two_hosts((0, 1, 0, 1), (1.0,))
    assert cost(ring, nbytes, in_turn).seconds / choose("all_reduce", nbytes, in_turn).predicted_s > 2.5
    both = choose("all_reduce", nbytes, two)
    assert both.algorithm == "multipath"
    assert pipelined.predicted_s / both.predicted_s == pytest.approx(1.4, rel=0.05)
    simulated = [_simulated(choice.program, nbytes, links) for choice, links in ((pipelined, one), (both, two))]
    assert simulated == pytest.approx([pipelined.predicted_s, both.predicted_s], rel=0.02)


def _simulated(program, nbytes, topology):
    import torch
    from collective_cases import operands, results, simulate

    sizes = [nbytes // 4]
    given = operands(program, sizes, torch.float32)
    return simulate(program, given, results(program, sizes, given), sizes, topology).seconds


def test_hosts_are_apart_in_all_that_a_program_looks_at(two_hosts):
    found = two_hosts.run("emulated_jobs:surroundings", PLACES)
    assert [rank["name"] for rank in found] == ["h0", "h0", "h1", "h1"]
    assert found[0]["boot"] == found[1]["boot"] != found[2]["boot"] == found[3]["boot"]
    assert found[0]["interfaces"] == ["eth0", "eth1", "lo"]
    assert not {"left-by-2", "left-by-3"} & set(found[0]["shared memory"])
    assert not list(Path("/dev/shm").glob("left-by-*"))
    for rank in found:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["process"], 0)


@pytest.mark.parametrize(("job", "told"), [("one_fails", "rank 1: .*planted"), ("one_dies", "rank 1 died")])
def test_one_rank_that_fails_ends_all_and_is_named(two_hosts, job, told):
    with pytest.raises(RuntimeError, match=f"(?s){told}"):
        two_hosts.run(f"emulated_jobs:{job}", (0, 1))
