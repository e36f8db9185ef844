"""The decider under a thousand drawn schedules of faults; and mistakes that the simulation must find."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import pytest

from shoal.data.ledger import Ledger
from shoal.elastic import membership as m
from shoal.elastic import simulation
from shoal.elastic.simulation import Simulation, Wrong

SCHEDULES = 200


def first_wrong(make: Callable[[int], Simulation], seeds: range = range(SCHEDULES)) -> str:
    for seed in seeds:
        try:
            make(seed).run()
        except Wrong as wrong:
            return str(wrong)
    return ""


def test_no_drawn_schedule_breaks_an_invariant_and_a_thousand_take_less_than_a_minute():
    begun = time.process_time()
    ended, lost, epochs, kept = Counter[str](), 0, 0, 0
    for seed in range(SCHEDULES):
        outcome = Simulation(seed).run()
        ended[outcome.ended] += 1
        lost, epochs, kept = lost + outcome.lost, epochs + outcome.epochs, kept + outcome.kept
    took = time.process_time() - begun
    assert ended == {"finished": SCHEDULES}, "faults are few enough that every run gets through"
    assert lost > SCHEDULES, "the schedules are rough"
    assert epochs > 2 * SCHEDULES
    assert kept > SCHEDULES, "shards of lost steps are kept"
    assert SCHEDULES / took * 60 > 1000


def test_a_schedule_is_its_seed_alone():
    assert Simulation(7).run() == Simulation(7).run()
    assert Simulation(7).run() != Simulation(8).run()


def with_mistake(kind: type[m.Membership]) -> Callable[[int], Simulation]:
    def make(seed: int) -> Simulation:
        made = Simulation(seed)
        made.membership = kind(made.membership.wanted, made.membership.least, made.membership.most)
        return made

    return make


class DoesNotWait(m.Membership):
    """Forms the next epoch while a member is still in the last one: two epochs at once."""

    def _decide(self, now, out):
        if self._broken:
            self._form([s for s in self.seats.values() if s.at is not m.At.gone], now, out)
        super()._decide(now, out)


class TakesTheOldest(m.Membership):
    """Lets who holds the newest step take the older one from the others."""

    def on(self, event, now):
        if isinstance(event, m.Left) and event.step > 0 and event.seat % 2:
            event = m.Left(event.seat, event.step - 1, event.due)
        return super().on(event, now)


class ForgetsTheDead(m.Membership):
    """Does not tell the survivors of a loss that the epoch is over, nor makes new workers."""

    def _lost(self, seat, why, now, out):
        del self.seats[seat.number]

    def _fill(self, out):
        if len(self.seats) < 2:
            super()._fill(out)


class DoesNotFence(m.Membership):
    """Goes on without a suspect that has not been killed: thawed, it would commit."""

    def on(self, event, now):
        return [do for do in super().on(event, now) if not (isinstance(do, m.Kill) and self.epoch)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DoesNotWait, "begins while seats"),
        (TakesTheOldest, "hold a newer one"),
        (ForgetsTheDead, "nothing happens any more"),
        (DoesNotFence, "begins while seats"),
    ],
)
def test_a_mistake_in_the_decider_is_found(kind, said):
    assert said in first_wrong(with_mistake(kind))


def test_a_worker_that_applies_a_step_twice_is_found(monkeypatch):
    commit = Simulation._commit

    def twice(self, worker):
        if worker.state and self.random.random() < 0.01:
            worker.state.append(worker.state[-1])
        commit(self, worker)

    monkeypatch.setattr(simulation.Simulation, "_commit", twice)
    assert first_wrong(Simulation)


def test_a_rank_0_that_does_not_look_what_has_been_told_is_found(monkeypatch):
    join = Simulation._join

    def tells_again(self, worker, form, rank):
        join(self, worker, form, rank)
        if rank == 0 and worker.alive and worker.step > 0:
            self.log.append((worker.step, form.epoch))

    monkeypatch.setattr(simulation.Simulation, "_join", tells_again)
    assert "the log has steps" in first_wrong(Simulation)


class KeepsTornSums(Simulation):
    """Sums that owners of slices may have added to in place."""

    def _kept(self, part):
        return sorted(set(part.kept()) | part.torn())


class DoesNotListen(Simulation):
    """Computes what is missing as if it were the only one that has kept anything."""

    def _deal(self, worker):
        worker.offers = {rank: nodes if rank == worker.rank else () for rank, nodes in worker.offers.items()}
        super()._deal(worker)


@pytest.mark.parametrize(("kind", "said"), [(KeepsTornSums, "that others have added to"), (DoesNotListen, "ends with")])
def test_a_survivor_that_keeps_what_it_must_not_is_found(kind, said):
    assert said in first_wrong(kind)


@cache
def samples(step: int, shard: int) -> tuple[tuple[int, int], ...]:
    """(epoch, id) of a shard's samples in a step of the simulated runs; of 101 in all, so that epochs end unevenly."""
    ledger = Ledger(101, 16, 8, 1, 0)
    epoch = ledger.position(step - 1)[0]
    return tuple((epoch, int(one)) for ids in ledger.shard(step - 1, shard) for one in ids)


def samples_of(applied: Sequence[simulation.Applied]) -> Counter[tuple[int, int]]:
    """What went into a worker's weights, and how often."""
    return Counter(one for step, shards in applied for shard in shards for one in samples(step, shard))


class Ending(Simulation):
    """Keeps what the first worker that came to the end had applied."""

    applied: tuple[simulation.Applied, ...] = ()

    def _finish(self, worker):
        self.applied = self.applied or tuple(worker.state)
        super()._finish(worker)


def check_samples(seeds: range) -> int:
    """Faults and resizes that a seed draws; returns how many workers were lost in all."""
    lost = 0
    for seed in seeds:
        made = Ending(seed)
        outcome = made.run()
        lost += outcome.lost
        if outcome.ended != "finished":  # all new workers died, one after the other, before anybody could join
            assert [step for step, _ in made.log] == list(range(1, len(made.log) + 1)), f"seed {seed}"
            continue
        wanted = [(step, tuple(range(made.shards))) for step in range(1, made.steps + 1)]
        assert samples_of(made.applied) == samples_of(wanted), f"seed {seed}"
        assert [step for step, _ in made.log] == list(range(1, made.steps + 1)), f"seed {seed}"
    return lost


A_THOUSAND = [range(1000, 1200), pytest.param(range(1200, 2000), marks=pytest.mark.soak)]


@pytest.mark.parametrize("seeds", A_THOUSAND, ids=["200", "800"])
def test_no_sample_is_lost_or_doubled_in_a_thousand_drawn_schedules_of_faults_and_resizes(seeds):
    assert check_samples(seeds) > len(seeds)


def test_a_step_that_lost_a_shard_would_show_in_the_samples():
    whole = tuple(range(8))
    assert samples_of([(1, whole)]) != samples_of([(1, (*whole[:-1], 0))])
