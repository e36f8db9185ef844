"""Messages between workers: in order, checked, and awake at once when a peer dies."""

import fcntl
import os
import resource
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.mesh import Mesh, OutOfStep, PeerLost
from shoal.comm.status import Phase, Reporter
from shoal.errors import RunFailed


def pair() -> tuple[Mesh, Mesh]:
    left, right = socket.socketpair()
    return Mesh(0, [None, left], Reporter(0, 1, None)), Mesh(1, [right, None], Reporter(1, 2, None))


def hang_up(mesh: Mesh) -> None:
    for peer in mesh._wire.peers:
        if peer is not None:
            peer.close()


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**40), st.binary(max_size=200)), max_size=20))
def test_messages_arrive_whole_and_in_order(messages):
    a, b = pair()
    for kind, sequence, payload in messages:
        a.send(1, kind, sequence, payload)
    assert [b.receive(0, kind, sequence) for kind, sequence, _ in messages] == [payload for *_, payload in messages]
    assert b.take(0, 1, 1) is None
    hang_up(a)
    hang_up(b)


@pytest.mark.parametrize(("kind", "sequence"), [(3, 7), (2, 8)])
def test_a_peer_at_another_place_of_the_program_is_out_of_step(kind, sequence):
    a, b = pair()
    a.send(1, kind, sequence)
    with pytest.raises(OutOfStep, match=f"rank 0 is at message {kind}/{sequence} where rank 1 is at 2/7"):
        b.receive(0, 2, 7)
    hang_up(a)
    hang_up(b)


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1100, reason="no descriptor may pass 1,023")
def test_sockets_of_many_workers_may_have_any_number():
    left, right = socket.socketpair()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 1050) for end in (left, right)]
    a, b = (socket.socket(fileno=each) for each in high)
    first, second = Mesh(0, [None, a], Reporter(0, 1, None)), Mesh(1, [b, None], Reporter(1, 2, None))
    thread = threading.Thread(target=lambda: first.send(1, 1, 1, bytes(4 << 20)))  # more than a socket takes at once
    thread.start()
    second.wait([0])
    assert len(second.receive(0, 1, 1)) == 4 << 20
    thread.join()
    for mesh in (first, second):
        hang_up(mesh)
    left.close()
    right.close()


def test_what_a_peer_said_before_it_died_is_still_heard():
    a, b = pair()
    a.send(1, 1, 1, b"last words")
    hang_up(a)
    assert b.receive(0, 1, 1) == b"last words"
    with pytest.raises(PeerLost, match="rank 0 has gone"):
        b.receive(0, 1, 2)
    hang_up(b)


def test_sending_to_a_dead_peer_is_told():
    a, b = pair()
    hang_up(b)
    with pytest.raises(PeerLost, match="rank 1 has gone"):
        a.send(1, 1, 1, b"x")
    hang_up(a)


def test_a_message_beyond_the_limit_is_refused_before_memory_is_spent():
    a, b = pair()
    peer = a._wire.peers[1]
    assert peer is not None
    peer.send((2**31).to_bytes(4, "little") + bytes(11))
    with pytest.raises(OutOfStep, match="message of 2147483648 bytes"):
        b.receive(0, 1, 1)
    hang_up(a)
    hang_up(b)


def test_big_messages_both_ways_at_once_do_not_deadlock():
    a, b = pair()
    big = os.urandom(8 << 20)
    got: list[bytes] = []

    def other_side() -> None:
        b.send(0, 1, 1, big)
        got.append(b.receive(0, 1, 1))

    thread = threading.Thread(target=other_side)
    thread.start()
    a.send(1, 1, 1, big)
    got.append(a.receive(1, 1, 1))
    thread.join()
    assert got == [big, big]
    hang_up(a)
    hang_up(b)


def test_whoever_waits_says_for_whom_and_then_goes_back_to_its_work():
    a, b = pair()
    said = []
    b._report = Reporter(1, 2, None)
    b._report(Phase.backward, step=3, shard=5)
    original = b._report.__class__.__call__

    class Listening(Reporter):
        def __call__(self, phase, **more):  # type: ignore[no-untyped-def]
            original(self, phase, **more)
            said.append(str(self.position))
            if phase is Phase.waiting:
                a.send(1, 1, 1)  # only now: the wait is sure to have begun

    b._report.__class__ = Listening
    b.receive(0, 1, 1)
    assert said == ["step 3, waiting for rank 0", "step 3, backward shard 5"]
    hang_up(a)
    hang_up(b)


# --- the group ----------------------------------------------------------------------------------------------------


def _gather(group, sizes):
    return [group.gather(bytes([group.rank]) * size) for size in sizes]


def test_a_gather_gives_every_payload_by_rank_on_every_worker(on_workers):
    sizes = [0, 1, 3 << 20]
    results = on_workers(4, _gather, sizes)
    assert results == [[[bytes([rank]) * size for rank in range(4)] for size in sizes]] * 4


def _say_and_die(group):
    group.gather(b"")
    if group.rank == 1:
        os._exit(7)
    group.gather(b"")


def test_the_death_of_a_worker_wakes_those_who_wait_for_it(on_workers):
    with pytest.raises(RunFailed, match=r"^rank 1 on \S+ \(pid \d+\) exited with code 7 at starting$"):
        on_workers(3, _say_and_die)


def _one_gather_less(group):
    if group.rank:
        group.gather(b"")
    group.mesh.broadcast(9, 1)
    for rank in group.mesh.others:
        group.mesh.receive(rank, 9, 1)


def test_workers_that_do_not_run_the_same_program_are_told_so(on_workers):
    with pytest.raises(RunFailed, match="do not run the same program"):
        on_workers(2, _one_gather_less)


def test_parts_number_their_ranks_anew_and_do_not_hear_each_other():
    left, right = socket.socketpair()
    third = socket.socketpair()
    a = Mesh(0, [None, third[0], left], Reporter(0, 1, None))
    b = Mesh(2, [right, third[1], None], Reporter(2, 3, None))
    part_a, part_b = a.part([0, 2], 7), b.part([0, 2], 7)
    a.send(2, 1, 5, b"to all")
    part_a.send(1, 1, 0, b"to the part")
    assert part_b.receive(0, 1, 0) == b"to the part"
    assert b.receive(0, 1, 5) == b"to all"
    hang_up(a)
    with pytest.raises(PeerLost, match="rank 0 has gone"):
        part_b.receive(0, 1, 1)
    hang_up(b)
