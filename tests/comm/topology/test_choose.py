"""The choice is the one that is predicted to end first, says why, and can be pinned."""

import random

import pytest
import torch
from collective_cases import operands, results, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal.comm as comm
from shoal.cluster.topology import Speed, Topology
from shoal.comm.collectives.actions import block_sizes
from shoal.comm.collectives.check import check
from shoal.comm.collectives.choose import choose, plan
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.curves import Curve
from shoal.comm.measuring.probing import Probed
from shoal.errors import UserError

MiB = 1 << 20
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather", "gather", "scatter", "all_to_all")


@settings(max_examples=12)
@given(st.sampled_from(COLLECTIVES), st.integers(2, 6), st.integers(1, 3), st.integers(0, 1 << 22), st.data())
def test_the_choice_is_right_and_ends_before_its_alternatives(collective, ranks, hosts, nbytes, data):
    rates = data.draw(st.lists(st.floats(1e8, 1e10), min_size=1, max_size=2))
    topology = Topology.synthetic(ranks, hosts=min(hosts, ranks), between=[Speed(rate, 1e-5) for rate in rates])
    choice = choose(collective, nbytes, topology)
    check(choice.program)
    assert choice.predicted_s == cost(choice.program, nbytes, topology, itemsize=4).seconds
    assert all(other.predicted_s >= choice.predicted_s for other in choice.alternatives)
    assert choice.algorithm not in {other.algorithm for other in choice.alternatives}
    assert choice.why.count(".") - choice.why.count("e.") >= 1
    assert "\n" not in choice.why


def test_a_sentence_says_why():
    four = Topology.synthetic(4)
    assert choose("all_reduce", 64 * MiB, four, only=("ring", "direct")).why == (
        "direct: 64 MiB over 4 ranks are bound by bandwidth (0.999 GB/s); ring would take 1.5x."
    )
    assert choose("all_reduce", 64, four, only=("ring",)).why == (
        "ring: asked for; 64 bytes over 4 ranks are bound by latency (6 rounds of messages, 300 us)."
    )
    own = Curve(name="gloo", collective="all_reduce", sizes=(1024,), values=(1e-6,))
    assert choose("all_reduce", 1024, four, curves=(own,)).why.startswith(
        "gloo: the backend's own all_reduce of 1 KiB over 4 ranks was measured to take 1 us; "
    )
    assert "move nothing" in choose("all_reduce", 0, four).why


def test_size_decides_between_few_rounds_and_few_bytes():
    topology = Topology.synthetic(8, inside=Speed(1e9, 1e-4))
    flat = ("ring", "recursive_doubling")
    assert choose("all_reduce", 1024, topology, only=flat).algorithm == "recursive_doubling"
    assert choose("all_reduce", 64 * MiB, topology, only=flat).algorithm == "ring"
    assert choose("broadcast", 64, topology).segments == 1
    assert choose("broadcast", 64 * MiB, topology, only=("ring",)).segments > 8


def test_slow_links_between_hosts_call_for_two_levels_and_two_interfaces_for_both():
    inside, slow = Speed(5e9, 2e-5), Speed(1.25e8, 1e-4)
    one = Topology.synthetic(8, hosts=2, inside=inside, between=[slow])
    assert choose("all_reduce", 16 * MiB, one).algorithm.startswith("two_level")
    two = Topology.synthetic(8, hosts=2, inside=inside, between=[slow, Speed(0.5e8, 1e-4)])
    choice = choose("all_reduce", 16 * MiB, two)
    assert choice.algorithm == "multipath"
    assert choice.program.lanes == 2
    check(choice.program)
    both = choose("all_reduce", 16 * MiB, one).predicted_s / choice.predicted_s
    assert both == pytest.approx((1.25 + 0.5) / 1.25, rel=0.05)


def test_irregular_links_call_for_trees_and_a_whole_dgx1_for_rings():
    chosen = {}
    for count in (5, 6, 8):
        nvlink = Topology.preset("dgx1-v100", range(count)).only(lambda link: link.lane == 0)
        if (
            count != 5
        ):  # GPU 4 reaches the others of the five over one link only: there is no ring, and no send from 1 to 4
            chosen[count] = choose("all_reduce", 256 * MiB, nvlink, only=("rings", "packed_trees")).algorithm
        else:
            chosen[count] = choose("all_reduce", 256 * MiB, nvlink, only=("packed_trees",)).algorithm
    assert chosen == {5: "packed_trees", 6: "packed_trees", 8: "rings"}


def test_what_was_measured_counts():
    four = Topology.synthetic(4)
    base = choose("all_reduce", MiB, four)
    slower = Curve(name=base.algorithm, collective="all_reduce", sizes=(1024,), values=(50.0,), ratio=True)
    found = Probed(four, 0.1, "gloo", 1.0, (), {f"all_reduce/{base.algorithm}": slower})
    assert plan("all_reduce", MiB, found).algorithm != base.algorithm
    fast = Curve(name="gloo", collective="all_reduce", sizes=(1024, MiB), values=(1e-5, 1e-4))
    native = plan("all_reduce", MiB // 2, Probed(four, 0.1, "gloo", 1.0, (fast,)))
    assert native.algorithm == "gloo"
    assert native.program is None
    assert native.predicted_s == pytest.approx(5.5e-5, rel=0.01)
    assert plan("all_reduce", MiB, four, "ring").algorithm == "ring"
    assert comm.plan is plan


def test_curves_are_straight_between_sizes_and_go_on_as_they_must():
    seconds = Curve(name="a", collective="all_reduce", sizes=(10, 20), values=(1.0, 3.0))
    assert [seconds.seconds(size) for size in (0, 10, 15, 20, 40)] == [1.0, 1.0, 2.0, 3.0, 6.0]
    ratio = Curve(name="a", collective="all_reduce", sizes=(10, 20), values=(1.0, 3.0), ratio=True)
    assert ratio.seconds(40) == 3.0
    with pytest.raises(UserError, match="rising sizes"):
        Curve(name="a", collective="all_reduce", sizes=(10, 10), values=(1.0, 1.0))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"only": ("rng",)}, "did you mean 'ring'"),
        ({"only": ("two_level",)}, "cannot run on these 4 ranks"),
        ({"only": ("multipath",)}, "cannot run on these 4 ranks"),
        ({"only": ()}, "no algorithm to choose from"),
        ({"nbytes": -1}, "nbytes must be at least 0"),
        ({"collective": "allreduce"}, "did you mean 'all_reduce'"),
        ({"only": ("ring",), "segments": 4}, "takes 1 segment"),
    ],
)
def test_mistakes_are_told(options, told):
    asked = {"collective": "all_reduce", "nbytes": 8, **options}
    with pytest.raises(UserError, match=told) as caught:
        choose(asked.pop("collective"), asked.pop("nbytes"), Topology.synthetic(4), **asked)
    assert "\n" not in str(caught.value)


def test_on_random_machines_the_choice_is_within_10_percent_of_the_best_that_the_virtual_clock_sees():
    draw, good, count = random.Random(1), 0, 12
    for _ in range(count):
        ranks = draw.randint(2, 6)
        topology = Topology.synthetic(
            ranks,
            hosts=draw.randint(1, min(2, ranks)),
            inside=Speed(10 ** draw.uniform(9, 10), 10 ** draw.uniform(-6, -4)),
            between=[Speed(10 ** draw.uniform(8, 9), 10 ** draw.uniform(-5, -4))],
        )
        collective, nbytes = draw.choice(COLLECTIVES), 4 * draw.randint(64, 1 << 17)
        choice = choose(collective, nbytes, topology)
        times = []
        for name in (choice.algorithm, *(other.algorithm for other in choice.alternatives)):
            program = choose(collective, nbytes, topology, only=(name,)).program
            sizes = block_sizes(collective, ranks, nbytes // 4)
            given_ = operands(program, sizes, torch.float32)
            times.append(simulate(program, given_, results(program, sizes, given_), sizes, topology).seconds)
        good += times[0] <= 1.1 * min(times)
    assert good >= 0.9 * count
