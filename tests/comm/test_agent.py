"""Workers end with their job, however it ends, and the first cause comes out in one line."""

import os
import re
import resource
import signal
import socket
import threading

import pytest
import torch

from shoal.comm import descriptors
from shoal.comm.launch import Agent
from shoal.comm.status import Phase
from shoal.errors import RunFailed, UserError

HOST = socket.gethostname()


def _own_pid(group):
    group.emit(("hello", group.rank))
    return os.getpid()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_results_come_by_rank_and_the_workers_are_gone(on_workers):
    heard = []
    pids = on_workers(3, _own_pid, listen=lambda rank, message: heard.append((rank, message)))
    assert len(set(pids)) == 3
    assert all(map(gone, pids))
    assert sorted(heard) == [(rank, ("hello", rank)) for rank in range(3)]


def _many_words(group):
    for number in range(2000):
        group.emit((number, b"x" * 500))


def test_no_message_is_lost_when_a_worker_ends_right_after_it(on_workers):
    heard = []
    on_workers(1, _many_words, listen=lambda rank, message: heard.append(message[0]))
    assert heard == list(range(2000))


def _raise(group, what):
    group.report(Phase.forward, step=5, shard=2)
    if group.rank == 1:
        raise what
    group.gather(b"")


def test_a_worker_that_raises_is_named_with_host_step_and_cause_and_its_trace_is_kept(on_workers):
    with pytest.raises(RunFailed) as failed:
        on_workers(3, _raise, ValueError("bad\nnumber"))
    pattern = rf"rank 1 on {HOST} \(pid \d+\) failed at step 5, forward shard 2: ValueError: bad number"
    assert re.fullmatch(pattern, str(failed.value))
    assert "in _raise" in "".join(failed.value.__notes__)


def test_a_user_error_stays_one(on_workers):
    with pytest.raises(UserError, match=r"^no such file$"):
        on_workers(2, _raise, UserError("no such file"))


def test_a_program_that_exits_is_told(on_workers):
    with pytest.raises(RunFailed, match=r"rank 1 .* failed at step 5, forward shard 2: .*exit\(3\)"):
        on_workers(2, _raise, SystemExit(3))


def _kill_oneself(group, number):
    group.report(Phase.backward, step=8, shard=0)
    if group.rank == 0:
        os.kill(os.getpid(), number)
    group.gather(b"")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, r"SIGKILL \(out of memory\?\)"), (11, "SIGSEGV")])
def test_a_killed_worker_is_named_with_the_signal(on_workers, number, name):
    pattern = rf"^rank 0 on {HOST} \(pid \d+\) was killed by {name} at step 8, backward shard 0$"
    with pytest.raises(RunFailed, match=pattern):
        on_workers(3, _kill_oneself, number)


def test_a_stopped_worker_is_called_hung_and_who_waits_for_it_is_told(on_workers):
    pattern = (
        rf"^rank 0 on {HOST} \(pid \d+\) hangs at step 8, backward shard 0 since \d+ s \(stopped by a signal\); "
        r"rank 1 is step 8, waiting for rank 0$"
    )
    with pytest.raises(RunFailed, match=pattern):
        on_workers(2, _kill_oneself, signal.SIGSTOP, hang_after_s=0.3)


def _wait_for_each_other(group):
    group.report(Phase.exchanging, step=2)
    group.mesh.receive(1 - group.rank, 9, 1)


def test_workers_that_wait_for_each_other_are_told(on_workers):
    with pytest.raises(RunFailed, match=r"rank 0 .* hangs at step 2, waiting for rank 1 .*rank 1 .*waiting for rank 0"):
        on_workers(2, _wait_for_each_other, hang_after_s=0.3)


def _return_a_lock(group):
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_a_failure_not_a_hang(on_workers):
    with pytest.raises(RunFailed, match="cannot pickle"):
        on_workers(2, _return_a_lock)


def test_after_a_failure_the_agent_runs_the_next_job(on_workers):
    with pytest.raises(RunFailed):
        on_workers(2, _raise, ValueError("x"))
    assert len(on_workers(2, _own_pid)) == 2


def _until_stopped(group):
    group.emit("ready")
    while not group.stop_asked:
        continue
    return group.rank


def test_a_request_to_stop_reaches_every_worker(on_workers):
    ask = []
    results = on_workers(2, _until_stopped, on_start=ask.append, listen=lambda *_: ask[0]())
    assert results == [0, 1]


def test_a_request_to_stop_that_comes_after_the_end_does_no_harm(agent, on_workers):
    ask = []
    on_workers(1, _own_pid, on_start=ask.append)
    ask[0]()
    assert len(on_workers(1, _own_pid)) == 1


def test_a_listener_that_raises_ends_the_job_and_the_next_one_runs(on_workers):
    def listen(rank, message):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_workers(2, _own_pid, listen=listen)
    assert len(on_workers(2, _own_pid)) == 2


def _forever(group):
    group.emit(os.getpid())
    signal.pause()


def test_leaving_the_block_by_an_exception_ends_every_worker(on_workers):
    pids: list[int] = []

    class Enough(Exception):
        pass

    def listen(rank: int, pid: int) -> None:
        pids.append(pid)
        if len(pids) == 2:
            raise Enough

    def inside() -> None:
        with Agent() as agent:
            agent.run(_forever, workers=2, listen=listen)

    with pytest.raises(Enough):
        inside()
    assert all(map(gone, pids))


def test_no_workers_is_refused(agent):
    with pytest.raises(UserError, match="at least 1 worker, got 0"):
        agent.run(_own_pid, workers=0)


def _file_descriptors(group):
    return len(os.listdir("/proc/self/fd"))


def test_jobs_leave_no_file_open(on_workers):
    first = on_workers(3, _file_descriptors)
    for _ in range(5):
        on_workers(3, _file_descriptors)
    assert on_workers(3, _file_descriptors) == first


def _in_parts(group, elements):
    rows, columns = group.split([(0, 1), (2, 3)]), group.split([(0, 2), (1, 3)])
    heard = [part.gather(str(group.rank).encode()) for part in (columns, rows)]
    tensors = [part.heap.tensor(elements, torch.int64) for part in (group, rows, columns)]
    for part, tensor in zip((group, rows, columns), tensors, strict=True):
        tensor[part.rank] = 1 + group.rank
    group.gather(b"")
    inner = rows.split([(0,), (1,)])
    return [b"".join(words).decode() for words in heard], [t.tolist() for t in tensors], inner.world, inner.names


def _in_parts_of_parts(group):
    """Both halves are split again, and count alike."""
    inner = group.split([(0, 1), (2, 3)]).split([(0, 1)])
    own = inner.heap.tensor(2, torch.int64)
    own[inner.rank] = 1 + group.rank
    group.gather(b"")
    return own.tolist()


def test_parts_of_two_parts_have_memory_of_their_own(on_workers):
    assert on_workers(4, _in_parts_of_parts) == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_parts_of_a_group_have_words_and_memory_of_their_own(on_workers):
    told = on_workers(4, _in_parts, 4)
    assert [heard for heard, *_ in told] == [["02", "01"], ["13", "01"], ["02", "23"], ["13", "23"]]
    whole, first_row, last_column = [1, 2, 3, 4], [1, 2, 0, 0], [2, 4, 0, 0]
    assert told[0][1][:2] == [whole, first_row]
    assert told[3][1] == [whole, [3, 4, 0, 0], last_column]
    assert [(world, names) for *_, world, names in told] == [(1, (rank,)) for rank in range(4)]


def test_workers_that_the_limit_of_open_files_does_not_allow_are_refused_before_any_is_made(monkeypatch, on_workers):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, descriptors.needed(8)))
    with pytest.raises(UserError, match=r"9 workers .* need 364 open files, and the limit is 344: use at most 8 w"):
        on_workers(9, _own_pid)
    descriptors.check(8)
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


@pytest.mark.slow
def test_an_agent_raises_its_own_limit_as_far_as_its_workers_need():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with Agent() as agent:
            assert len(agent.run(_own_pid, workers=20)) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
