"""Who is late, said from positions, step times and what the kernel says: no process is needed."""

import os
import time

from shoal.comm.status import Phase, Position
from shoal.elastic.kernel import COMPUTING, Look, look
from shoal.elastic.watch import KNOWN_AFTER, STOPPED, Watch


def at(row: int, phase: Phase, since_s: float, peer: int = -1) -> Position:
    return Position(row, 7, phase, -1, peer, since_s, 100 + row)


def said(state: str, cpu_s: float) -> Look:
    return Look(lambda: state, cpu_s)


def used_to(step_s: float) -> Watch:
    watch = Watch(patience_s=120)
    for _ in range(KNOWN_AFTER):
        watch.committed(step_s)
    return watch


def late(watch: Watch, now: float, *found: tuple[Position, Look]) -> list[int]:
    return [row for row, _ in watch.late(found, now)]


def test_the_limit_is_two_seconds_or_three_of_the_slowest_steps():
    asleep = said("asleep", 0.0)
    assert late(used_to(0.01), 2.1, (at(0, Phase.backward, 0.0), asleep)) == [0]
    assert late(used_to(0.01), 1.9, (at(0, Phase.backward, 0.0), asleep)) == []
    assert late(used_to(2.0), 5.9, (at(0, Phase.backward, 0.0), asleep)) == []
    assert late(used_to(2.0), 6.1, (at(0, Phase.backward, 0.0), asleep)) == [0]


def test_who_waits_for_a_stopped_worker_is_not_the_one_that_is_named():
    waits = (at(0, Phase.waiting, 0.0, peer=1), said("asleep", 0.0))
    stopped = (at(1, Phase.waiting, 0.0, peer=0), said(STOPPED, 0.0))
    assert late(used_to(0.01), 2.1, waits, stopped) == [1]
    (_, evidence) = used_to(0.01).late([waits, stopped], 2.1)[0]
    assert "no progress for 2.1 s at step 7, waiting for rank 0 (stopped by a signal)" in evidence
    assert "steps take at most 0.01 s" in evidence


def test_a_worker_that_got_no_core_is_not_hung_and_one_that_used_it_up_is():
    watch = used_to(0.01)
    assert late(watch, 1.0, (at(0, Phase.forward, 0.5), said(COMPUTING, 10.0))) == []
    assert late(watch, 9.0, (at(0, Phase.forward, 0.5), said(COMPUTING, 10.4))) == []
    assert late(watch, 9.5, (at(0, Phase.forward, 0.5), said(COMPUTING, 12.1))) == [0]


def test_evaluation_and_the_first_steps_have_the_plans_patience():
    asleep = said("asleep", 0.0)
    assert late(used_to(0.01), 100.0, (at(0, Phase.evaluating, 0.0), asleep)) == []
    assert late(used_to(0.01), 121.0, (at(0, Phase.evaluating, 0.0), asleep)) == [0]
    assert late(Watch(patience_s=120), 599.0, (at(0, Phase.forward, 0.0), asleep)) == []
    assert late(Watch(patience_s=120), 601.0, (at(0, Phase.forward, 0.0), asleep)) == [0]


def test_workers_that_all_wait_for_each_other_are_told_with_what_each_waits_for():
    found = [(at(row, Phase.waiting, float(row), peer=1 - row), said("asleep", 0.0)) for row in (0, 1)]
    assert used_to(0.01).late(found, 100.0) == []
    ((row, evidence),) = used_to(0.01).late(found, 122.0)
    assert row == 0
    assert "wait for each other" in evidence


def test_a_worker_whose_clock_is_wrong_is_neither_accused_nor_overlooked():
    """Its own word is believed where it lies between two looks; else the time counts since it was first seen there."""
    asleep = said("asleep", 0.0)
    for skew in (-3600.0, 3600.0):
        watch = used_to(0.01)
        assert late(watch, 100.0, (at(0, Phase.loading, 99.95), asleep)) == []
        assert late(watch, 100.1, (at(0, Phase.backward, 100.05 + skew), asleep)) == []
        assert late(watch, 102.0, (at(0, Phase.backward, 100.05 + skew), asleep)) == []
        assert late(watch, 102.2, (at(0, Phase.backward, 100.05 + skew), asleep)) == [0]


def test_what_the_kernel_says_of_a_process_is_what_it_has_computed_and_whether_it_does(monkeypatch):
    begun = time.process_time()
    found = look(os.getpid())
    assert begun <= found.cpu_s <= time.process_time()
    assert found.state() == COMPUTING

    def has_none(clock: int) -> float:
        raise OSError(22, "no such clock")

    monkeypatch.setattr(time, "clock_gettime", has_none)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert begun - 2 * tick <= look(os.getpid()).cpu_s <= time.process_time() + tick


def test_the_state_of_a_worker_that_gets_on_is_not_asked_for():
    asked: list[int] = []
    watch = used_to(0.01)
    for moment in range(20):
        position = at(0, Phase.backward, 0.1 * moment)
        assert late(watch, 0.1 * moment, (position, Look(lambda: str(asked.append(1)), 0.0))) == []
    assert not asked
    assert late(watch, 4.0, (position, Look(lambda: str(asked.append(1)), 0.0))) == [0]
    assert asked == [1]
