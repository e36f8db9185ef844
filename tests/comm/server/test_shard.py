"""The decisions of a server, on many random schedules: bounds hold, nobody waits without a reason, nothing is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.server.shard import (
    Apply,
    Commit,
    Grant,
    Hold,
    Join,
    Leave,
    Pull,
    Push,
    Refuse,
    Retract,
    Shard,
    Sum,
    Welcome,
)

SCHEDULES = st.integers(0, 2**32)


class Crowd:
    """Workers that do what the shard lets them, in an order drawn from a seed; some join late, some leave early."""

    def __init__(self, shard: Shard, workers: int, seed: int) -> None:
        self.shard, self.random = shard, random.Random(seed)
        self.can_push: set[int] = set()
        self.can_commit: set[int] = set()
        self.waiting: set[int] = set()
        self.clocks: dict[int, int] = {}
        self.applied: list[tuple[int, int]] = []
        self.grants: list[Grant] = []
        for worker in range(workers):
            self.do(Join(worker))

    def do(self, event) -> None:
        for instruction in self.shard.on(event):
            assert not isinstance(instruction, Refuse), instruction
            if isinstance(instruction, Welcome):
                self.clocks[instruction.worker] = instruction.clock
                self.can_push.add(instruction.worker)
            elif isinstance(instruction, Sum):
                self.can_commit |= set(instruction.workers)
            elif isinstance(instruction, Apply):
                self.applied.append((instruction.worker, instruction.clock))
            elif isinstance(instruction, Grant):
                self.grants.append(instruction)
                self.waiting.discard(instruction.worker)
                self.clocks[instruction.worker] = instruction.clock
                self.can_push.add(instruction.worker)

    def step(self) -> bool:
        """One random worker takes its next step; False when nobody can."""
        able = sorted(self.can_push | self.can_commit)
        if not able:
            return False
        worker = self.random.choice(able)
        if worker in self.can_push:
            self.can_push.discard(worker)
            self.do(Push(worker, self.clocks[worker]))
            if not self.shard.synchronous:
                self.can_commit.add(worker)
        else:
            self.can_commit.discard(worker)
            self.waiting.add(worker)
            self.do(Commit(worker, self.clocks[worker]))
        return True

    def leave(self, worker: int) -> None:
        for group in (self.can_push, self.can_commit, self.waiting):
            group.discard(worker)
        self.clocks.pop(worker, None)
        self.do(Leave(worker))


@given(workers=st.integers(1, 6), bound=st.integers(0, 4), seed=SCHEDULES)
def test_no_worker_ever_begins_a_step_further_ahead_than_the_bound(workers, bound, seed):
    crowd = Crowd(Shard(synchronous=False, bound=bound), workers, seed)
    for _ in range(200):
        assert crowd.step(), "somebody must always be able to go on"
        assert max(crowd.shard.clocks.values()) - min(crowd.shard.clocks.values()) <= bound + 1
    assert all(grant.ahead <= bound for grant in crowd.grants)


def test_thousands_of_schedules_reach_the_bound_and_never_pass_it():
    for bound in (0, 1, 3):
        most = 0
        for seed in range(1000):
            crowd = Crowd(Shard(synchronous=False, bound=bound), 3, seed)
            for _ in range(60):
                crowd.step()
            most = max(most, *(grant.ahead for grant in crowd.grants))
        assert most == bound


@given(workers=st.integers(2, 5), bound=st.integers(0, 3), seed=SCHEDULES)
def test_workers_that_join_and_leave_never_block_the_others(workers, bound, seed):
    crowd = Crowd(Shard(synchronous=False, bound=bound), workers, seed)
    fresh = workers
    for number in range(150):
        if number % 11 == 5 and len(crowd.clocks) > 1:
            crowd.leave(crowd.random.choice(sorted(crowd.clocks)))
        if number % 13 == 7:
            crowd.do(Join(fresh))
            fresh += 1
        assert crowd.step()
    assert all(grant.ahead <= bound for grant in crowd.grants)


@given(workers=st.integers(1, 5), seed=SCHEDULES)
def test_synchronous_rounds_take_one_push_of_every_worker(workers, seed):
    crowd = Crowd(Shard(synchronous=True, expected=range(workers)), workers, seed)
    for _ in range(20 * 2 * workers):
        assert crowd.step()
    assert crowd.applied == [(0, clock) for clock in range(20)]
    assert crowd.shard.version == 20
    assert all(grant.ahead == 0 for grant in crowd.grants)


@given(workers=st.integers(2, 5), seed=SCHEDULES, when=st.integers(0, 30))
def test_a_synchronous_round_goes_on_without_those_who_left_in_its_middle(workers, seed, when):
    crowd = Crowd(Shard(synchronous=True), workers, seed)
    for _ in range(when):
        crowd.step()
    for worker in range(workers - 1):
        crowd.leave(worker)
    crowd.do(Join(workers))
    before = crowd.shard.version
    for _ in range(40):
        assert crowd.step()
    assert crowd.shard.version >= before + 9


def test_expected_workers_are_waited_for_before_they_have_come():
    shard = Shard(synchronous=False, bound=1, expected=range(2))
    for event in (Join(0), Push(0, 0)):
        shard.on(event)
    assert isinstance(shard.on(Commit(0, 0))[-1], Grant)
    shard.on(Push(0, 1))
    assert shard.on(Commit(0, 1)) == [Apply(0, 1), Hold(0)]
    shard.on(Join(1))
    shard.on(Push(1, 0))
    assert [type(i) for i in shard.on(Commit(1, 0))] == [Apply, Grant, Grant]


def test_without_a_bound_nobody_is_held():
    shard = Shard(synchronous=False, bound=None, expected=range(2))
    shard.on(Join(0))
    for clock in range(50):
        shard.on(Push(0, clock))
        assert isinstance(shard.on(Commit(0, clock))[-1], Grant)


@pytest.mark.parametrize("synchronous", [True, False])
def test_what_is_out_of_order_is_refused_and_changes_nothing(synchronous):
    shard = Shard(synchronous=synchronous, bound=0)
    assert isinstance(shard.on(Push(0, 0))[0], Refuse)
    shard.on(Join(0))
    shard.on(Join(1))
    for event in (Join(0), Push(0, 1), Push(0, -1), Commit(0, 0), Commit(0, 5), Push(2, 0), Pull(2)):
        assert [type(i) for i in shard.on(event)] == [Refuse], event
    shard.on(Push(0, 0))
    assert isinstance(shard.on(Push(0, 0))[0], Refuse)
    assert (shard.version, shard.clocks) == (0, {0: 0, 1: 0})


def test_a_pull_waits_for_the_version_it_wants():
    shard = Shard(synchronous=False, bound=None)
    shard.on(Join(0))
    shard.on(Join(1))
    assert shard.on(Pull(1, 1)) == [Hold(1)]
    shard.on(Push(0, 0))
    out = shard.on(Commit(0, 0))
    assert [i.worker for i in out if isinstance(i, Grant)] == [0, 1]


@given(workers=st.integers(1, 5), bound=st.integers(0, 3), seed=SCHEDULES, when=st.integers(0, 60))
def test_asked_to_stop_all_workers_end_after_the_same_step(workers, bound, seed, when):
    crowd = Crowd(Shard(synchronous=False, bound=bound, expected=range(workers)), workers, seed)
    for _ in range(when):
        crowd.step()
    known = dict.fromkeys(range(workers), -1)
    asked = False
    done: dict[int, int] = {}
    while crowd.can_push or crowd.can_commit:
        worker = crowd.random.choice(sorted(crowd.can_push | crowd.can_commit))
        clock = crowd.clocks[worker]
        if worker in crowd.can_push:
            for grant in crowd.grants:
                if grant.worker == worker and grant.clock <= clock:
                    known[worker] = max(known[worker], grant.last)
            if 0 <= known[worker] <= clock:  # what it has heard of before it began
                crowd.can_push.discard(worker)
                done[worker] = clock
                continue
            crowd.can_push.discard(worker)
            crowd.do(Push(worker, clock))
            crowd.can_commit.add(worker)
        else:
            crowd.can_commit.discard(worker)
            crowd.do(Commit(worker, clock, stop=not asked))
            asked = True
        assert clock < when + 10
    assert len(done) == workers
    assert len(set(done.values())) == 1


@given(workers=st.integers(1, 5), seed=SCHEDULES, spoilt=st.sets(st.integers(0, 9), max_size=4))
def test_a_round_that_all_take_back_is_summed_anew_of_new_pushes_alone(workers, seed, spoilt):
    """In any order: one may push again before another one has taken back what it pushed first."""
    shard, draw = Shard(synchronous=True, expected=range(workers)), random.Random(seed)
    for worker in range(workers):
        shard.on(Join(worker))
    applied: list[tuple[int, int]] = []
    for clock in range(10):
        rounds = 2 if clock in spoilt else 1
        todo: dict[int, list] = {worker: [Push(worker, clock)] for worker in range(workers)}
        fresh: set[int] = set()
        for number in range(rounds):
            sums = 0
            while any(todo.values()):
                worker = draw.choice([w for w, events in todo.items() if events])
                event = todo[worker].pop(0)
                done = shard.on(event)
                assert not any(isinstance(each, Refuse) for each in done), done
                if isinstance(event, Push):
                    fresh.add(worker)
                for each in done:
                    if isinstance(each, Sum):
                        sums += 1
                        assert set(each.workers) == fresh == set(range(workers)), "nobody's old push is in it"
                    elif isinstance(each, Apply):
                        applied.append((each.worker, each.clock))
            assert sums == 1
            if number < rounds - 1:
                fresh.clear()
                todo = {worker: [Retract(worker, clock), Push(worker, clock)] for worker in range(workers)}
        for worker in range(workers):
            for each in shard.on(Commit(worker, clock)):
                if isinstance(each, Apply):
                    applied.append((each.worker, each.clock))
    assert applied == [(0, clock) for clock in range(10)]


def test_only_a_push_whose_sum_is_known_can_be_taken_back():
    shard = Shard(synchronous=True, expected=range(2))
    for worker in range(2):
        shard.on(Join(worker))
    assert isinstance(shard.on(Retract(0, 0))[0], Refuse), "nothing has been pushed"
    shard.on(Push(0, 0))
    assert isinstance(shard.on(Retract(0, 0))[0], Refuse), "it has not been summed"
    shard.on(Push(1, 0))
    assert isinstance(shard.on(Retract(0, 1))[0], Refuse), "another step"
    assert shard.on(Retract(0, 0)) == []
    assert isinstance(shard.on(Commit(1, 0))[0], Refuse), "its sum is gone"
    stale = Shard(synchronous=False)
    stale.on(Join(0))
    stale.on(Push(0, 0))
    assert isinstance(stale.on(Retract(0, 0))[0], Refuse), "it is applied when it comes"
