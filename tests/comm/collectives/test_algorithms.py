"""Every algorithm is what its collective says, for any ranks, root, hosts and segments; and as cheap as it claims."""

from math import ceil, log2

import pytest
from collective_cases import PAIRS, any_program, host_lists, programs
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.collectives.actions import COLLECTIVES, REDUCING
from shoal.comm.collectives.check import check, order
from shoal.comm.collectives.registry import ALGORITHMS, algorithms, build
from shoal.comm.collectives.traffic import traffic
from shoal.comm.collectives.trees import binary_tree, second_tree
from shoal.comm.tree import Node, children
from shoal.errors import UserError


@pytest.mark.parametrize(("collective", "name"), PAIRS)
def test_every_algorithm_is_right_for_1_to_9_ranks(collective, name):
    for ranks in range(1, 10):
        for program in programs(collective, name, ranks):
            check(program)


@pytest.mark.parametrize("ranks", [23, 64])
def test_every_algorithm_is_right_for_many_ranks(ranks):
    for collective, name in PAIRS:
        if ranks > 32 and collective not in ("all_reduce", "broadcast"):
            continue
        hosts = [rank * 5 // ranks for rank in range(ranks)]
        segments = 2 if collective in ALGORITHMS[name].pipelined else 1
        check(build(collective, name, ranks, hosts=hosts, segments=segments))


@settings(max_examples=30)
@given(any_program())
def test_any_program_is_right(program):
    check(program)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_has_the_direct_algorithm(collective):
    assert algorithms(collective)[0] == "direct"


# ---- bytes


@given(ranks=st.integers(1, 40), share=st.integers(1, 5))
@settings(max_examples=12)
def test_a_ring_moves_the_least_that_any_algorithm_can(ranks, share):
    size = ranks * share * 16
    part = size // ranks
    moved = traffic(build("all_reduce", "ring", ranks), size)
    assert set(moved.sent) == set(moved.received) == {2 * (ranks - 1) * part}
    assert set(moved.reduced) == {(ranks - 1) * part}
    assert len(moved.by_line) == (ranks if ranks > 1 else 0)
    for half in ("reduce_scatter", "all_gather"):
        assert set(traffic(build(half, "ring", ranks), size).sent) == {(ranks - 1) * part}


@pytest.mark.parametrize("name", ["two_shot", "pairwise", "canonical"])
def test_direct_exchanges_of_slices_move_what_a_ring_moves(name):
    for ranks in range(2, 10):
        moved = traffic(build("all_reduce", name, ranks), 16 * ranks)
        assert set(moved.sent) == {2 * (ranks - 1) * 16}


@given(st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=10)
def test_halving_and_doubling_moves_what_a_ring_moves_in_logarithmic_rounds(bits, share):
    ranks = 2**bits
    program = build("all_reduce", "halving_doubling", ranks)
    assert set(traffic(program, ranks * share).sent) == {2 * (ranks - 1) * share}
    assert program.length == 2 * bits


@pytest.mark.parametrize(("name", "collective"), [(n, c) for c, n in PAIRS if n in ("binomial", "recursive_doubling")])
def test_trees_for_short_messages_take_logarithmic_rounds(name, collective):
    for ranks in range(2, 40):
        rounds = build(collective, name, ranks).length
        once = ceil(log2(ranks))
        assert rounds <= (2 * once if collective in ("all_reduce", "barrier") else once)


def test_one_shot_sends_everything_to_everybody_in_one_round():
    program = build("all_reduce", "direct", 5)
    assert program.length == 1
    assert set(traffic(program, 100).sent) == {400}


@pytest.mark.parametrize("collective", ["broadcast", "reduce"])
def test_a_chain_moves_the_tensor_once_over_each_link_in_a_pipeline(collective):
    program = build(collective, "ring", 6, segments=10, root=2)
    assert program.length == 6 - 2 + 10
    assert set(traffic(program, 1000).by_line.values()) == {1000}


@pytest.mark.parametrize("ranks", range(2, 40))
def test_two_trees_give_every_rank_at_most_two_children_in_all(ranks):
    first, second = binary_tree(ranks), second_tree(ranks)
    for rank in range(ranks):
        assert len(first.children(rank)) + len(second.children(rank)) <= 2
    assert max(*first.depths(), *second.depths()) <= ceil(log2(ranks)) + 1


@pytest.mark.parametrize("ranks", range(2, 20))
def test_a_double_tree_moves_at_most_the_tensor_twice_over_each_rank(ranks):
    """One tree makes an inner rank send it three times: to two children, and up."""
    size = 64 * 8
    double = traffic(build("all_reduce", "double_tree", ranks, segments=4), size)
    assert max(double.sent) <= 2 * size
    if ranks >= 4:
        assert max(traffic(build("all_reduce", "binary_tree", ranks, segments=4), size).sent) >= 2.5 * size


@pytest.mark.parametrize("hosts", [host for ranks in (4, 6, 9) for host in host_lists(ranks) if host])
def test_two_levels_send_each_byte_between_hosts_as_often_as_a_ring_of_hosts(hosts):
    ranks, count = len(hosts), len(set(hosts))
    size = 16 * 5040 * count
    program = build("all_reduce", "two_level", ranks, hosts=hosts)
    for host in set(hosts):
        leaving = sum(b for (a, to, _), b in traffic(program, size).by_line.items() if hosts[a] == host != hosts[to])
        assert leaving == 2 * (count - 1) * size // count
    for collective, times in (("reduce_scatter", 1), ("all_gather", 1)):
        moved = traffic(build(collective, "two_level", ranks, hosts=hosts), ranks * 16)
        across = sum(count for (a, to, _), count in moved.by_line.items() if hosts[a] != hosts[to])
        assert across == (count - 1) * ranks * 16 * times


def test_every_rank_of_a_host_carries_its_share_of_what_leaves_it():
    hosts = [0, 0, 0, 1, 1]
    size = 6 * 2 * 16
    moved = traffic(build("all_reduce", "two_level", 5, hosts=hosts), size)
    leaving = [
        sum(b for (a, to, _), b in moved.by_line.items() if a == rank and hosts[to] != hosts[a]) for rank in range(5)
    ]
    assert leaving == [size // 3] * 3 + [size // 2] * 2


def test_all_to_all_by_two_levels_sends_one_message_from_a_rank_to_a_rank_of_another_host():
    hosts = [rank // 4 for rank in range(16)]
    direct, level = (build("all_to_all", name, 16, hosts=hosts) for name in ("direct", "two_level"))
    across = {
        program.algorithm: {(a, to) for a, to, _ in traffic(program, 16 * 16).by_line if hosts[a] != hosts[to]}
        for program in (direct, level)
    }
    assert len(across["two_level"]) * 4 == len(across["direct"])


def test_traffic_counts_the_bytes_that_cuts_of_odd_sizes_give():
    for collective, name in PAIRS:
        program = build(collective, name, 5, target=1)
        moved = traffic(program, 1003 * 4, 4)
        assert sum(moved.sent) == sum(moved.received) == moved.total == sum(moved.by_line.values())
        assert all(count % 4 == 0 for count in moved.by_line.values())


# ---- order


def canonical(ranks):
    def visit(node):
        return node.start if node.stop - node.start == 1 else tuple(map(visit, children(node)))

    return visit(Node(0, ranks))


@given(ranks=st.integers(1, 24), root=st.integers(0, 23))
@settings(max_examples=15)
def test_the_canonical_algorithm_adds_as_the_training_tree_whatever_the_chunk(ranks, root):
    for collective in REDUCING:
        program = build(collective, "canonical", ranks, root=root % ranks if collective == "reduce" else 0)
        found = order(program)
        assert found.uniform
        assert all(found.tree(rank, chunk) == canonical(ranks) for rank in range(ranks) for chunk in program.ends[rank])


def test_who_else_adds_as_the_training_tree():
    for ranks in range(1, 33):
        assert order(build("all_reduce", "binomial", ranks)).tree(0, 0) == canonical(ranks)
        if ranks & (ranks - 1) == 0:
            for name in ("halving_doubling", "recursive_doubling"):
                found = order(build("all_reduce", name, ranks))
                assert found.uniform
                assert found.tree(0, 0) == canonical(ranks)


def test_a_ring_adds_every_chunk_in_another_order_but_all_ranks_alike():
    found = order(build("all_reduce", "ring", 4))
    assert found.agrees
    assert not found.uniform
    assert found.text(2, 0) == "(((1+2)+3)+0)"
    assert found.depth == 3
    assert str(found).splitlines()[0] == "chunks 0: (((1+2)+3)+0)"


# ---- what users mistype


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("all_reduce", "rign", 4), "unknown algorithm 'rign' in all_reduce (of 4 ranks): did you mean 'ring'?"),
        (("all_gather", "double_tree", 4), "unknown algorithm 'double_tree' in all_gather"),
        (("all_reduec", "ring", 4), "unknown collective 'all_reduec': did you mean 'all_reduce'?"),
        (("all_reduce", "ring", 0), "all_reduce needs at least 1 rank, got 0."),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_one(call, said):
    with pytest.raises(UserError) as told:
        build(*call)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        (("broadcast", "ring", 4), {"root": 4}, "must be ranks from 0 to 3, got 4"),
        (("all_reduce", "ring", 4), {"root": 1}, "all_reduce has no root"),
        (("all_reduce", "ring", 4), {"segments": 2}, "takes 1 segment: it is no pipeline, got 2"),
        (("all_reduce", "binary_tree", 4), {"segments": 0}, "takes at least 1 segment, got 0"),
        (("all_reduce", "two_level", 4), {"hosts": [0, 0, 1]}, "4 ranks need a host each, got 3"),
    ],
)
def test_what_is_out_of_range_is_told(call, options, said):
    with pytest.raises(UserError, match=r"^[^\n]+$") as told:
        build(*call, **options)
    assert said in str(told.value)


def test_a_program_is_built_once():
    assert build("all_reduce", "ring", 4, hosts=["a"] * 4) is build("all_reduce", "ring", 4, hosts=["a"] * 4)


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_a_long_broadcast_by_halves_moves_the_tensor_about_twice_over_the_root(ranks):
    """A binomial tree's root sends it once for each of its children."""
    size = 16 * ranks
    halves, tree = (traffic(build("broadcast", name, ranks, root=1), size) for name in ("halving_doubling", "binomial"))
    assert halves.sent[1] == 2 * size * (ranks - 1) // ranks
    assert tree.sent[1] == size * (ranks.bit_length() - 1)
