"""Ranks meet those of their own host and nobody else, and without the means they go on over gloo, saying why."""

import contextlib
import ctypes
import io
import os
import socket
import stat
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from shoal.comm.backend import meeting, memory
from shoal.comm.backend.meeting import Meeting, Watches, abstract, accepted, connected, greet, listener, meet

SIZE = (1 << 20, 4096)


def join(store, rank: int, size: int, timeout_s: float = 20.0) -> Meeting:
    def attach(file, place, host, descriptors, cards, connections):
        state = os.fstat(file)
        return state.st_ino, stat.S_IMODE(state.st_mode), state.st_size, os.readlink(f"/proc/self/fd/{file}"), place

    return meet(store, rank, size, timeout_s, "library", "", lambda *_: "", lambda _: SIZE, attach)


def meetings(size: int, store=None, **options) -> list[Meeting]:
    """All ranks as threads of this process."""
    store = store or dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    results: list = [None] * size

    def run(rank: int) -> None:
        results[rank] = join(store, rank, size, **options)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_child(function) -> int:
    """Run it in a forked child, which leaves with what it returns as its exit code; the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_ranks_of_a_host_get_one_memory_of_this_user_only_that_has_no_name():
    before = files()
    found = meetings(3)
    for rank, met in enumerate(found):
        assert met.hosts == ((0, 1, 2),)
        assert met.why == ""
        inode, mode, size, name, place = met.memory
        assert (inode, mode, size, place) == (found[0].memory[0], 0o600, SIZE[0], rank)
        assert name == "/memfd:shoal (deleted)"
        assert met.watches.dead() == set()
        assert set(met.watches.descriptors) == {0, 1, 2} - {rank}
    del found, met
    assert files() == before


def test_ranks_of_other_machines_have_memories_of_their_own(monkeypatch):
    ids = {}
    monkeypatch.setattr(meeting, "boot_id", lambda: ids.setdefault(threading.get_ident(), f"machine {len(ids) % 2}"))
    found = meetings(4)
    assert len({met.hosts for met in found}) == 1
    assert sorted(map(len, found[0].hosts)) == [2, 2]
    for host in found[0].hosts:
        assert len({found[rank].memory[0] for rank in host}) == 1
    assert len({met.memory[0] for met in found}) == 2


def test_a_stranger_who_does_not_know_the_token_is_sent_away_and_the_ranks_meet(monkeypatch):
    strangers = []

    def door_with_a_stranger(address: str, backlog: int) -> socket.socket:
        door = listener(address, backlog)
        strangers.append(connected(address, os.geteuid()))  # before anybody else
        greet(strangers[-1], 1, "0" * 32, 0)
        return door

    monkeypatch.setattr(meeting, "listener", door_with_a_stranger)
    found = meetings(2)
    assert found[0].memory[0] == found[1].memory[0]
    for stranger in strangers:
        with stranger, contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_knows_everything_is_sent_away():
    def visit() -> int:
        os.setuid(65534)
        if connected("shoal-test-of-users", 65534) is not None:  # the door belongs to somebody else
            return 1
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.connect(abstract("shoal-test-of-users"))
            with contextlib.suppress(BrokenPipeError, meeting.NotMet):
                greet(visitor, 1, "t" * 32, 0)
            visitor.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                return len(visitor.recv(1))
        return 0

    with listener("shoal-test-of-users", 4) as door:
        pid = in_child(visit)
        assert accepted(door, "t" * 32, 0, {1}, time.monotonic() + 0.5) == {}
        assert exit_code(pid) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_a_container_of_the_same_machine_that_cannot_be_reached_is_another_host(tmp_path):
    new_network = 0x40000000

    def rank_of(rank: int) -> int:
        if rank == 1:
            assert ctypes.CDLL(None, use_errno=True).unshare(new_network) == 0
        met = join(dist.FileStore(str(tmp_path / "store"), 3), rank, 3)
        return 0 if met.hosts == ((0, 2), (1,)) and met.memory[4] == (1 if rank == 2 else 0) else 1

    pids = [in_child(partial(rank_of, rank)) for rank in range(3)]
    assert [exit_code(pid) for pid in pids] == [0, 0, 0]


def test_too_little_memory_is_told_to_all_ranks_in_one_line_with_what_was_wanted(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 5 << 20)
    found = meetings(3)
    assert {met.why for met in found} == {"0.0 MiB of shared memory are wanted, 5.0 MiB are free"}
    assert all(met.memory is None for met in found)


def test_a_limit_on_file_sizes_is_no_more_than_too_little_memory(tmp_path):
    import resource

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
        with pytest.raises(memory.NoRoom, match="the kernel refuses"):
            memory.reserved_file(*SIZE)
        return 0

    assert exit_code(in_child(limited)) == 0


def test_a_rank_that_fails_to_map_the_memory_makes_all_go_without(monkeypatch):
    store = dist.HashStore()
    results: list = [None] * 2

    def attach(file, place, host, descriptors, cards, connections):
        if place == 1:
            raise memory.NoRoom("no address space")
        return "mapped"

    def run(rank: int) -> None:
        results[rank] = meet(store, rank, 2, 20.0, "library", "", lambda *_: "", lambda _: SIZE, attach)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(met.memory, met.why) for met in results] == [(None, "no address space")] * 2


def test_without_process_descriptors_the_socket_tells_of_a_death(monkeypatch):
    def refuse(pid):
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    found = meetings(2)
    assert found[0].watches.dead() == set()
    found[1].watches.close()  # as the kernel does for a process that ends
    assert found[0].watches.dead() == {1}


def test_a_process_that_has_ended_is_dead_although_nobody_has_waited_for_it():
    pid = in_child(lambda: 0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie now
    os.kill(pid, 0)  # which finds nothing wrong
    assert Watches({7: os.pidfd_open(pid)}).dead() == {7}
    os.waitpid(pid, 0)


def test_a_process_id_of_another_namespace_is_not_trusted():
    cards = [replace(meeting.new_card("", ""), pids="1:1"), replace(meeting.new_card("", ""), pids="1:2")]
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            watches = meeting._watched(0, cards, {1: ours})
        assert os.readlink(f"/proc/self/fd/{watches.descriptors[1]}").startswith("socket:")
    assert watches.dead() == {1}


def _without(group, file: str, how: str) -> tuple[str, str, float]:
    from shoal.comm.backend import memory, registration

    said = io.StringIO()
    kind = "shm"
    with contextlib.redirect_stderr(said):
        if how.startswith("no compiler") or (how == "none on rank 1" and group.rank == 1):
            os.environ["SHOAL_NATIVE"] = "0"
        if how == "no compiler, two hosts":
            kind, meeting.boot_id = "hier", lambda: f"machine {group.rank}"
        elif how == "no compiler, but an accelerator":
            torch.accelerator.is_available = lambda: True
        elif how == "no memory on rank 0":
            memory.free_memory = lambda: 1 << 20
        registration.install()
        registration.install()
        dist.init_process_group(kind, init_method=f"file://{file}", rank=group.rank, world_size=group.world)
        tensor = torch.ones(3)
        dist.all_reduce(tensor)
        sub = dist.new_group([0, 1])
        dist.all_reduce(tensor, group=sub)
        from shoal.comm import symm_empty

        assert symm_empty(5, torch.float32).shape == (5,)
        name = dist.get_backend()
        dist.destroy_process_group()
    return name, said.getvalue(), tensor[0].item()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no compiler", "SHOAL_NATIVE=0 is set"),
        ("none on rank 1", "on rank 1: SHOAL_NATIVE=0 is set"),
    ],
)
def test_without_the_compiled_part_the_group_goes_over_shared_memory_in_python_and_says_so_once(
    backend_agent, tmp_path, how, why
):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first, second = backend_agent.run(_without, (str(tmp_path / "store"), how), workers=2)
    line = (
        f"shoal: backend 'shm' goes over shared memory in Python: {why}; collectives take longer and more processor "
        "time; `shoal doctor` measures how much\n"
    )
    assert first == ("shm", line, 4.0)
    assert second == ("shm", "", 4.0)


@pytest.mark.parametrize(
    ("how", "kind", "why"),
    [
        ("no compiler, two hosts", "hier", "SHOAL_NATIVE=0 is set; ranks on 2 hosts need the compiled part"),
        (
            "no compiler, but an accelerator",
            "shm",
            "SHOAL_NATIVE=0 is set; a group in Python cannot stand beside one for accelerators",
        ),
        ("no memory on rank 0", "shm", "6.0 MiB of shared memory are wanted, 1.0 MiB are free"),
    ],
)
def test_without_the_means_the_group_is_gloos_and_says_so_once_with_what_it_costs(
    backend_agent, tmp_path, how, kind, why
):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first, second = backend_agent.run(_without, (str(tmp_path / "store"), how), workers=2)
    line = f"shoal: backend {kind!r} goes over gloo: {why}; collectives on one host go over TCP, 2 to 10 times slower\n"
    assert first == (kind, line, 4.0)
    assert second == (kind, "", 4.0)
