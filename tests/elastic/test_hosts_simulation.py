"""Agents, log, decider and workers of three hosts under drawn faults; and mistakes that the simulation must find."""

import time
from collections import Counter
from dataclasses import replace

import pytest

from shoal.elastic import consensus
from shoal.elastic import fleet as f
from shoal.elastic.consensus import Agent, Role
from shoal.elastic.hosts_simulation import HostsSimulation
from shoal.elastic.simulation import Wrong

SCHEDULES = 100


def test_no_drawn_schedule_of_deaths_stops_and_cuts_makes_two_epochs_commit_and_a_thousand_take_less_than_a_minute():
    begun = time.process_time()
    ended, epochs, lost = Counter[str](), 0, 0
    for seed in range(SCHEDULES):
        outcome = HostsSimulation(seed).run()
        ended[outcome.ended] += 1
        epochs, lost = epochs + outcome.epochs, lost + outcome.lost
    took = time.process_time() - begun
    assert ended == {"finished": SCHEDULES}, "cuts heal and agents come back: every run gets through"
    assert epochs > 1.5 * SCHEDULES, "the schedules are rough"
    assert lost > SCHEDULES / 2
    assert SCHEDULES / took * 60 > 1000


def test_a_schedule_is_its_seed_alone():
    assert HostsSimulation(7).run() == HostsSimulation(7).run()
    assert HostsSimulation(7).run() != HostsSimulation(8).run()


class CommitsWithoutALease(HostsSimulation):
    """A worker of a host that was cut off, or whose agent stands still, goes on committing."""

    def _may_commit(self, worker):
        return True


class KeepsItsWorkers(HostsSimulation):
    """An agent that was counted as lost comes back, and its old workers go on."""

    def _fence(self, agent):
        pass


class ForgetsItsPromises(HostsSimulation):
    """An agent that is started anew knows neither its votes nor its log."""

    def _keep(self, agent, term, voted, log):
        pass


class HearsOldLives(f.Fleet):
    """What the workers of a lost life say counts."""

    def on(self, value, now):
        if isinstance(value, f.Said) and value.agent in self.hosts:
            host = self.hosts[value.agent]
            host.heard = value.number - 1
            value = replace(value, life=host.life)
        return super().on(value, now)

    def _said(self, home, event, now):
        return super()._said(self.homes.get(event.seat) or home, event, now)


class CountsAsLostTooSoon(Agent):
    """Before the lease of the one that is silent has run out."""

    def silent(self, now):
        return tuple(a for a, at in self._heard.items() if now - at > 0.5) if self.role is Role.leader else ()


def with_mistake(*, fleet=None, agent=None):
    class Mistaken(HostsSimulation):
        def _council(self, *kept):
            made = super()._council(*kept)
            made.fleet.__class__ = fleet or f.Fleet
            made.raft.__class__ = agent or Agent
            return made

    return Mistaken


@pytest.mark.parametrize(
    "kind",
    [
        CommitsWithoutALease,
        KeepsItsWorkers,
        ForgetsItsPromises,
        with_mistake(fleet=HearsOldLives),
        with_mistake(agent=CountsAsLostTooSoon),
    ],
    ids=["no lease", "no fence", "no promises", "old lives", "too soon"],
)
def test_a_mistake_is_found(kind):
    for seed in range(3 * SCHEDULES):
        try:
            kind(seed).run()
        except Wrong:
            return
    pytest.fail("no schedule found it")


def test_a_lease_is_shorter_than_the_silence_after_which_an_agent_is_counted_as_lost():
    assert consensus.LEASE_S * 1.1 < consensus.SILENT_S * 0.9, "by more than clocks differ"
