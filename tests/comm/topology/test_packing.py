"""Packed trees reach what no trees can exceed, on any subset of a DGX-1; the programs made of them are right."""

import itertools

import pytest
import torch
from collective_cases import equal, expected, operands, results, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.topology import Capacity, Link, Topology
from shoal.comm.collectives import ring_packing
from shoal.comm.collectives.actions import block_sizes
from shoal.comm.collectives.arborescence import Arc, cheapest_tree
from shoal.comm.collectives.check import check
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.disjoint_trees import arborescences, spanning_trees
from shoal.comm.collectives.packing import Packing, pack, program
from shoal.errors import UserError

GB = 1e9
# First n GPUs of a DGX-1 V100: smallest cut (GB/s), the rate of all-reduce trees that no packing exceeds (GB/s of the
# tensor; derived over all partitions, Nash-Williams), and what NCCL was measured to reach (VIA-Research/vTrain, V100).
HEADROOM = {2: (25, 25.0, 22.6), 3: (50, 50.0, 33.9), 4: (100, 75.0, 56.9), 5: (50, 50.0, 23.2), 6: (75, 62.5, 27.4),
            7: (100, 75.0, 50.8), 8: (150, 85.7, 76.9)}  # fmt: skip
# Broadcast of 512 MiB from GPU 0 to one other with the help of others, as Blink+ measured it on a DGX-1 V100
# (UCBerkeley-Spring2022-CS267-project/blinkplus, test_bandwidth/logs), beside NCCL, which takes the direct link. GB/s.
BLINK = {(0, 1): ([0, 1, 2, 3], 2, 22.89, 66.14), (0, 3): ([0, 3, 1], 1, 45.7, 66.41)}


def machine(pairs, size=None) -> Topology:
    """Links of so many GB/s, by (source, target)."""
    size = size or 1 + max(max(ends) for ends in pairs)
    links = tuple(Link(source=a, target=b, bytes_per_s=rate * GB) for (a, b), rate in pairs.items())
    return Topology(hosts=("h",) * size, links=links)


@st.composite
def graphs(draw, both_ways: bool):
    size = draw(st.integers(2, 5))
    rates = {}
    for a, b in itertools.combinations(range(size), 2):
        rates[a, b] = draw(st.integers(0, 3))
        rates[b, a] = rates[a, b] if both_ways else draw(st.integers(0, 3))
    order = draw(st.permutations(range(size)))
    for a, b in itertools.pairwise([*order, order[0]]):  # a ring, so that all are joined
        rates[a, b] = max(1, rates[a, b])
        rates[b, a] = max(1, rates[b, a]) if both_ways else rates[b, a]
    return machine({ends: rate for ends, rate in rates.items() if rate}, size)


def least_cut(topology: Topology, root: int) -> float:
    """Edmonds: the least rate into any set of ranks without the root."""
    others = [rank for rank in range(topology.size) if rank != root]
    sets = (set(s) for count in range(1, topology.size) for s in itertools.combinations(others, count))
    return min(sum(x.bytes_per_s for x in topology.links if x.source not in s and x.target in s) for s in sets)


def partitions(ranks: list[int]):
    if not ranks:
        yield []
        return
    first, *rest = ranks
    for parts in partitions(rest):
        yield [[first], *parts]
        for place, part in enumerate(parts):
            yield [*parts[:place], [first, *part], *parts[place + 1 :]]


def least_partition(topology: Topology) -> float:
    """Nash-Williams and Tutte: crossing links, counted once, over the number of parts less one."""
    rates = {frozenset((x.source, x.target)): x.bytes_per_s for x in topology.links}
    bounds = []
    for parts in partitions(list(range(topology.size))):
        home = {rank: place for place, part in enumerate(parts) for rank in part}
        crossing = sum(rate for ends, rate in rates.items() if len({home[rank] for rank in ends}) == 2)
        if len(parts) > 1:
            bounds.append(crossing / (len(parts) - 1))
    return min(bounds)


def holds(packing: Packing) -> None:
    """Every tree spans, no link and no capacity carries more than it can, and little is left to the bound."""
    topology = packing.topology
    load: dict[object, float] = {}
    for tree in packing.trees:
        for links, ends in ((tree.up, "source"), (tree.down, "target")):
            if links:
                met = {getattr(link, ends) for link in links} | {tree.root}
                assert len(links) == topology.size - 1
                assert met == set(range(topology.size))
        for link in (*tree.up, *tree.down):
            for what in (link, *link.through):
                load[what] = load.get(what, 0.0) + tree.bytes_per_s
    for what, carried in load.items():
        most = what.bytes_per_s if isinstance(what, Link) else topology.rates[what]
        assert carried <= most * (1 + 1e-6)
    assert packing.bound_bytes_per_s * 0.95 * (1 - 1e-6) <= packing.bytes_per_s
    assert packing.bytes_per_s <= packing.bound_bytes_per_s * (1 + 1e-6)
    check(program(packing, 2))


@settings(max_examples=20)
@given(graphs(both_ways=False), st.data())
def test_broadcast_trees_reach_the_smallest_cut(topology, data):
    root = data.draw(st.integers(0, topology.size - 1))
    packing = pack(topology, "broadcast", root)
    assert packing.bound_bytes_per_s == pytest.approx(least_cut(topology, root), rel=1e-5)
    holds(packing)


@settings(max_examples=20)
@given(graphs(both_ways=True))
def test_all_reduce_trees_reach_the_bound_over_all_partitions(topology):
    packing = pack(topology)
    assert packing.bound_bytes_per_s == pytest.approx(least_partition(topology), rel=1e-5)
    holds(packing)


@settings(max_examples=10)
@given(graphs(both_ways=False))
def test_one_way_links_carry_sums_up_and_results_down_other_trees(topology):
    if any(least_cut(topology, root) == 0 for root in range(topology.size)):
        return
    packing = pack(topology)
    assert packing.bound_bytes_per_s <= min(least_cut(topology, root) for root in range(topology.size)) * (1 + 1e-6)
    holds(packing)


def test_what_links_share_limits_the_trees_too():
    """Three ranks on a switch: each port carries 10, so a broadcast root sends its tensor once at 10, by a chain."""
    ends = list(itertools.permutations(range(3), 2))
    links = tuple(Link(source=a, target=b, bytes_per_s=10.0, through=(f"{a}o", f"{b}i")) for a, b in ends)
    ports = tuple(Capacity(name=f"{rank}{way}", bytes_per_s=10.0) for rank in range(3) for way in "oi")
    packing = pack(Topology(hosts=("h",) * 3, links=links, capacities=ports), "broadcast")
    assert packing.bound_bytes_per_s == pytest.approx(10, rel=1e-5)
    assert all(len({link.source for link in tree.down}) == 2 for tree in packing.trees)  # chains, not stars
    holds(packing)


@pytest.mark.parametrize("count", HEADROOM)
def test_the_first_gpus_of_a_dgx1_reach_their_bounds_and_more_than_nccl_reached(count):
    topology = Topology.preset("dgx1-v100", range(count))
    cut, bound, nccl = HEADROOM[count]
    assert pack(topology, "broadcast").bound_bytes_per_s == pytest.approx(cut * GB, rel=1e-5)
    packing = pack(topology)
    assert packing.bound_bytes_per_s == pytest.approx(bound * GB, rel=1e-3)
    assert packing.bytes_per_s >= 1.05 * nccl * GB
    holds(packing)


def test_trees_are_few():
    assert len(pack(Topology.preset("dgx1-v100"), "broadcast").trees) == 6  # as many as a GPU has links
    assert len(pack(Topology.preset("dgx1-p100"), "broadcast").trees) == 4
    assert len(pack(Topology.preset("dgx1-v100", range(7))).trees) == 3


@pytest.mark.parametrize("ends", BLINK)
def test_helpers_carry_what_blink_was_measured_to_gain_by_them(ends):
    order, helpers, direct, measured = BLINK[ends]
    topology = Topology.preset("dgx1-v100", order)
    found = pack(topology, "send_recv", 0, target=1)
    check(program(found, 4))
    alone = topology.link(0, 1).bytes_per_s
    # The paths that Blink+ used are those over one helper; some of ours lead over two.
    used = [tree for tree in found.trees if len(tree.down) <= 2]
    assert len(used) == 1 + helpers
    ours = sum(tree.bytes_per_s for tree in used)
    assert direct * GB / alone == pytest.approx(0.915, abs=0.005)  # a link's share that a copy reaches
    assert measured * GB == pytest.approx(0.885 * ours, rel=0.01)  # ours, times nearly that share
    predicted = cost(program(found, 64), 512 << 20, topology).bytes_per_s
    assert predicted >= 0.93 * found.bytes_per_s


def test_trees_beat_rings_where_the_links_are_irregular_and_not_on_the_whole_machine():
    faster = {}
    for count in (3, 4, 6, 7, 8):
        topology = Topology.preset("dgx1-v100", range(count))
        rings = ring_packing.program("all_reduce", topology, ring_packing.rings(topology))
        seconds = [cost(made, 1 << 30, topology).seconds for made in (rings, program(pack(topology), 64))]
        faster[count] = seconds[0] / seconds[1]
    assert all(faster[count] > 1.05 for count in (3, 4, 6, 7))
    assert faster[6] > 1.8  # one ring where there are links for 2.5 trees
    assert faster[8] < 1


def test_the_virtual_clock_says_so_too_and_the_sums_are_right():
    count = 6
    topology = Topology.preset("dgx1-v100", range(count))
    rings = ring_packing.program("all_reduce", topology, ring_packing.rings(topology))
    trees = program(pack(topology), 16)
    seconds = []
    for made in (rings, trees):
        sizes = block_sizes("all_reduce", count, 1 << 21)
        given_ = operands(made, sizes, torch.float32)
        want = expected(made, sizes, given_)
        into = results(made, sizes, given_)
        seconds.append(simulate(made, given_, into, sizes, topology).seconds)
        assert equal(into, want)
    assert seconds[1] < seconds[0]


def test_a_whole_dgx1_has_three_rings_both_ways_and_an_odd_part_may_have_none():
    topology = Topology.preset("dgx1-v100")
    orders = ring_packing.rings(topology)
    assert len(orders) == 3
    used: dict[frozenset[int], int] = {}
    for order in orders:
        assert sorted(order) == list(range(8))
        for a, b in zip(order, (*order[1:], order[0]), strict=True):
            used[frozenset((a, b))] = used.get(frozenset((a, b)), 0) + 1
    assert all(25e9 * count <= topology.link(*ends).bytes_per_s for ends, count in used.items())
    check(ring_packing.program("all_reduce", topology, orders))
    assert ring_packing.rings(Topology.preset("dgx1-v100", range(5))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dgx1-p100", "dgx1-v100"])
def test_any_gpus_of_a_dgx1_reach_within_5_percent_of_the_bound(name):
    for count in range(2, 9):
        for gpus in itertools.combinations(range(8), count):
            for collective in ("broadcast", "all_reduce"):
                topology = Topology.preset(name, gpus)
                packing = pack(topology, collective)
                holds(packing)
                nvlink = topology.only(lambda link: link.lane == 0)
                if all(link.lane == 0 for tree in packing.trees for link in (*tree.up, *tree.down)):
                    bound = least_cut(nvlink, 0) if collective == "broadcast" else least_partition(nvlink)
                    assert packing.bound_bytes_per_s == pytest.approx(bound, rel=1e-5)


@given(st.integers(2, 5), st.data())
def test_the_cheapest_tree_is_the_cheapest_of_all_trees(size, data):
    ends = list(itertools.permutations(range(size), 2))
    arcs = [Arc(a, b, data.draw(st.integers(0, 5))) for a, b in ends if data.draw(st.booleans())]
    found = cheapest_tree(size, 0, arcs)
    into = [[place for place, arc in enumerate(arcs) if arc.target == node] for node in range(1, size)]
    costs = []
    for ways in itertools.product(*into):
        above = {arcs[place].target: arcs[place].source for place in ways}
        if all(_reaches(node, above) for node in range(1, size)):
            costs.append(sum(arcs[place].price for place in ways))
    if not costs:
        assert found is None
    else:
        assert sum(arcs[place].price for place in found) == min(costs)
        assert sorted(arcs[place].target for place in found) == list(range(1, size))


def _reaches(node, above):
    for _ in range(len(above) + 1):
        if node == 0:
            return True
        node = above[node]
    return False


@given(st.integers(2, 5), st.data())
def test_disjoint_trees_are_as_many_as_the_cuts_allow(size, data):
    pairs = [ends for ends in itertools.combinations(range(size), 2) for _ in range(data.draw(st.integers(0, 3)))]
    rates: dict[tuple[int, int], int] = {}
    for a, b in pairs:
        rates[a, b] = rates[b, a] = rates.get((a, b), 0) + 1
    topology = machine(rates, size)
    most = int(least_partition(topology) / GB + 1e-9)
    trees = spanning_trees(size, pairs, most)
    assert trees is not None
    assert spanning_trees(size, pairs, most + 1) is None
    assert len({place for tree in trees for place in tree}) == most * (size - 1)
    arcs = [(a, b) for pair in pairs for a, b in (pair, pair[::-1])]
    most = int(least_cut(topology, 0) / GB + 1e-9)
    directed = arborescences(size, 0, arcs, most)
    assert directed is not None
    assert arborescences(size, 0, arcs, most + 1) is None
    for tree in directed:
        assert sorted(arcs[place][1] for place in tree) == list(range(1, size))


def test_links_that_do_not_join_the_ranks_are_told_of():
    with pytest.raises(UserError, match="do not join all 3 ranks"):
        pack(machine({(0, 1): 1, (1, 0): 1}, 3))
    with pytest.raises(UserError, match="did you mean 'broadcast'"):
        pack(Topology.synthetic(2), "brodcast")
    with pytest.raises(UserError, match="ranks below 2"):
        pack(Topology.synthetic(2), "broadcast", 2)
    with pytest.raises(UserError, match="at least 1 segment"):
        program(pack(Topology.synthetic(2)), 0)
