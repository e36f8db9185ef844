"""Who shares a host, how many cores there are, and how much memory is left: pure decisions."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.backend.hosts import MOST_RANKS, Card, cores_of, hosts_of, rank_list, without_library
from shoal.comm.backend.memory import SPARE_BYTES, free_bytes
from shoal.comm.backend.reform import missing_members, plain_name
from shoal.comm.native import build

CARD = Card("ant", "boot", 1000, "1:2", 42, "address", "token", "library", "", "", (0, 1), 2)


def everyone_reached(size: int) -> list[frozenset[int]]:
    return [frozenset(range(rank)) for rank in range(size)]


def test_a_card_is_read_as_it_was_written():
    assert Card.from_json(CARD.to_json()) == CARD
    assert Card.from_json(CARD.to_json().encode()) == CARD


def test_one_boot_id_and_one_user_that_reach_each_other_are_one_host():
    assert hosts_of([CARD] * 3, everyone_reached(3), 256) == ((0, 1, 2),)


def test_another_boot_another_user_and_no_boot_id_are_other_hosts():
    cards = [CARD, replace(CARD, boot="other"), replace(CARD, user=0), replace(CARD, boot=""), replace(CARD, boot="")]
    assert hosts_of(cards, everyone_reached(5), 256) == ((0,), (1,), (2,), (3,), (4,))


def test_containers_of_one_machine_that_cannot_reach_each_other_are_other_hosts():
    reached = [frozenset(), frozenset({0}), frozenset(), frozenset({2})]
    assert hosts_of([CARD] * 4, reached, 256) == ((0, 1), (2, 3))


def test_both_sides_know_the_same_largest_group():
    assert build.backend().most_ranks == MOST_RANKS


def test_a_host_has_no_more_ranks_than_the_transport_can_take():
    assert hosts_of([CARD] * 5, everyone_reached(5), 2) == ((0, 1), (2, 3), (4,))


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sets(st.integers(0, 7))), min_size=1, max_size=8), st.integers(1, 8)
)
def test_every_rank_has_one_host_and_has_reached_everybody_there(said, most):
    cards = [replace(CARD, boot=boot) for boot, _ in said]
    reached = [frozenset(r for r in others if r < rank) for rank, (_, others) in enumerate(said)]
    hosts = hosts_of(cards, reached, most)
    assert sorted(r for host in hosts for r in host) == list(range(len(said)))
    assert [host[0] for host in hosts] == sorted(host[0] for host in hosts)
    for host in hosts:
        assert len(host) <= most
        assert list(host) == sorted(host)
        assert all(a in reached[b] and cards[a].boot == cards[b].boot for b in host for a in host if a < b)


def test_cores_are_those_of_all_ranks_together_within_the_quota():
    pinned = [replace(CARD, cpus=(0,), cores=1), replace(CARD, cpus=(1,), cores=1)]
    assert cores_of(pinned) == 2
    assert cores_of([replace(CARD, cpus=(0, 1, 2, 3), cores=4)] * 2) == 4
    assert cores_of([replace(CARD, cpus=(0, 1, 2, 3), cores=1)] * 2) == 1  # a quota is shared


def test_all_ranks_come_to_one_reason_to_go_without_the_library():
    without = replace(CARD, library="", why="no compiler")
    assert without_library([CARD, CARD]) == ""
    assert without_library([CARD, without]) == "on rank 1: no compiler"
    assert without_library([without, without]) == "no compiler"
    assert (
        without_library([CARD, replace(CARD, library="newer")]) == "ranks 0 and 1 have loaded different versions of it"
    )


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_list_of_ranks_names_them_all(ranks):
    word, text = rank_list(sorted(ranks)).split(" ", 1)
    named = set()
    for span in text.split(", "):
        a, _, b = span.partition("-")
        named |= set(range(int(a), int(b or a) + 1))
    assert named == ranks
    assert word == ("rank" if len(ranks) == 1 else "ranks")


def test_free_memory_is_the_smaller_of_the_machines_and_the_control_groups():
    machine = "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n"
    assert free_bytes(machine, "", "", "") == 1 << 30
    assert free_bytes(machine, "max\n", "500\n", "") == 1 << 30
    assert free_bytes(machine, str(SPARE_BYTES), "1000", "anon 1\ninactive_file 600\n") == SPARE_BYTES - 400
    assert free_bytes("", "", "", "") is None


def test_those_who_are_alive_are_waited_for_and_hosts_from_which_nobody_came():
    hosts = [(0, 1), (2, 3)]
    assert missing_members(hosts, {}, None) == ([], [0, 2])
    assert missing_members(hosts, {0: [0, 1]}, None) == ([1], [2])
    assert missing_members(hosts, {0: [0], 3: [2, 3]}, None) == ([2], [])
    assert missing_members(hosts, {0: [0], 2: [2, 3], 3: [2, 3]}, None) == ([], [])
    assert missing_members(hosts, {0: [0, 1]}, [0, 3]) == ([3], [])


def test_a_group_is_made_again_under_the_name_that_the_user_gave():
    assert plain_name("cpu:shm") == "shm"
    assert plain_name("cpu:hier,cuda:nccl") == "cpu:hier,cuda:nccl"
    assert plain_name("cpu:gloo") == "cpu:gloo"
