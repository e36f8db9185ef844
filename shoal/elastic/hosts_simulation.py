"""Agents, their log, the decider and workers of several hosts, all together, under faults that a seed draws.

`shoal.elastic.simulation` with a `Council` for each host instead of one decider: agents are killed and come back with
what they kept, are stopped and thawed, alone or with their workers, and are cut off from others, one way or both. Each
has a clock of its own, which is off and runs too fast or too slow. Beside what holds on one host: no two agents do
different things for one entry of the log, and no epoch commits a step once a later one has.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from shoal.elastic import fleet as f
from shoal.elastic import membership as m
from shoal.elastic.consensus import Agent, Entry, Keep, Message, Send
from shoal.elastic.council import Council, Do, Output, Propose
from shoal.elastic.simulated_worker import SimWorker, Word
from shoal.elastic.simulation import GIVES_UP_S, Outcome, Simulation

TICK_S = 0.05
MESSAGE_S = (0.0005, 0.02)
REFUSED_S = 0.1  # from the end of an agent to the others' knowledge of it, where nothing is cut
LENGTHS = ((1, 150), (1, 150), (2, 80), (3, 50))  # workers and steps: long enough for a lost host to be missed
RATES = (0.95, 1.05)  # of the agents' clocks


@dataclass
class SimAgent:
    number: int
    council: Council
    offset: float
    rate: float
    alive: bool = True
    frozen: bool = False
    died_s: float = float("-inf")
    board: float = float("-inf")  # until when its workers may commit, by its clock
    broken: bool = False
    asked: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)  # what has come while it was frozen
    term: int = 0  # this and the next two are on disk
    voted: int | None = None
    log: list[Entry] = field(default_factory=list)


class HostsSimulation(Simulation):
    """``run`` raises Wrong when an invariant does not hold."""

    by_shards = False  # what a worker has done of a step is not kept

    def __init__(self, seed: int, *, hosts: int = 3, shards: int = 8) -> None:
        workers, steps = random.Random(seed).choice(LENGTHS)
        super().__init__(seed, workers=workers, shards=shards, steps=steps)
        self.hosts, self.wanted = hosts, workers
        self.least = 1
        self.agents: dict[int, SimAgent] = {}
        for number in range(hosts):
            offset, rate = self.random.uniform(-1e5, 1e5), self.random.uniform(*RATES)
            self.agents[number] = SimAgent(number, self._council(number, 0, None, []), offset, rate)
        self.membership = self.agents[0].council.fleet.membership
        self.homes: dict[int, int] = {}
        self.cut: set[tuple[int, int]] = set()  # (from, to)
        self._held: dict[tuple[int, int], list[Callable[[], None]]] = defaultdict(list)
        self._decided: dict[int, tuple[Any, ...]] = {}  # entry -> what it led to
        self._went: set[tuple[int, int]] = set()
        self._wish = 0

    def _council(self, number: int, term: int, voted: int | None, log: list[Entry]) -> Council:
        draw = random.Random(self.random.getrandbits(32))
        raft = Agent(number, tuple(range(self.hosts)), draw, term=term, voted=voted, log=list(log))
        return Council(raft, f.Fleet(self.hosts, self.wanted, self.least, self.shards), draw, f"host-{number}")

    def run(self) -> Outcome:
        for agent in self.agents.values():
            self._at(self.random.uniform(0, TICK_S), partial(self._tick, agent, agent.council))
        self._plan_faults()
        while not self.ended:
            if self.now > GIVES_UP_S:
                self._wrong(f"nothing happens any more: {self.membership}")
            self._next()
        self._check_log()
        return Outcome(self.seed, self.ended, len(self.epochs), self.lost, self.now)

    # --- agents -----------------------------------------------------------------------------------------------

    def _clock(self, agent: SimAgent) -> float:
        return agent.offset + agent.rate * self.now

    def _tick(self, agent: SimAgent, council: Council) -> None:
        if not agent.alive or agent.council is not council:
            return
        self._at(TICK_S, partial(self._tick, agent, council))
        if agent.frozen:
            return
        for other in self.agents.values():
            known = not other.alive and self.now - other.died_s > REFUSED_S
            if known and not {(agent.number, other.number), (other.number, agent.number)} & self.cut:
                council.ended(other.number, self._clock(agent))
        self._carry(agent, council.tick(self._clock(agent)))

    def _carry(self, agent: SimAgent, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Keep(term, voted, before, entries):
                    self._keep(agent, term, voted, [*agent.log[:before], *entries])
                case Send(to, message):
                    self._in(MESSAGE_S, partial(self._arrive, agent.number, to, message))
                case Do(index, instructions):
                    self._agree(index, instructions)
                    for instruction in instructions:
                        self._do_at(agent, instruction)
                case _:
                    self._fence(agent)
        council, clock = agent.council, self._clock(agent)
        agent.board = council.raft.lease if council.holds(clock) else float("-inf")

    def _keep(self, agent: SimAgent, term: int, voted: int | None, log: list[Entry]) -> None:
        agent.term, agent.voted, agent.log = term, voted, log

    def _agree(self, index: int, instructions: tuple[f.Instruction, ...]) -> None:
        plain = tuple(replace(each, cost_s=0.0) if isinstance(each, m.Tell) else each for each in instructions)
        if self._decided.setdefault(index, plain) != plain:
            self._wrong(f"entry {index} means {plain} to one agent and {self._decided[index]} to another")

    def _arrive(self, sender: int, to: int, message: Message | Propose) -> None:
        agent = self.agents[to]
        if (sender, to) in self.cut or not agent.alive:
            return
        if agent.frozen:
            agent.waiting.append(partial(self._arrive, sender, to, message))
        else:
            self._carry(agent, agent.council.on(message, self._clock(agent)))

    def _fence(self, agent: SimAgent) -> None:
        for worker in self._own(agent):
            self._kill(worker)

    def _own(self, agent: SimAgent) -> list[SimWorker]:
        return [worker for seat, worker in self.workers.items() if self.homes[seat] == agent.number]

    def _tell(self, event: m.Event) -> None:
        assert not isinstance(event, m.Resize | m.Rebalance)
        if isinstance(event, m.Went):
            if (event.seat, event.epoch) in self._went:
                return  # only an epoch's first step is told
            self._went.add((event.seat, event.epoch))
        agent = self.agents[self.homes[event.seat]]
        if agent.frozen:
            agent.waiting.append(partial(self._see, agent, event))
        elif agent.alive:
            self._see(agent, event)

    def _see(self, agent: SimAgent, event: Any) -> None:
        self._carry(agent, agent.council.say(event, self._clock(agent)))

    def _do_at(self, agent: SimAgent, instruction: f.Instruction) -> None:
        match instruction:
            case m.Fork(seat):
                if agent.council.fleet.homes.get(seat) == agent.council.me:
                    self.homes[seat] = agent.number
                    self._do([instruction])
            case m.Kill(seat) | m.Release(seat):
                if self.homes.get(seat) == agent.number:
                    self._do([instruction])
            case m.Break(epoch):
                agent.broken = True
                for worker in self._own(agent):  # their links are shut
                    self._in((0.0, 0.001), partial(self._peer_lost, worker.seat, epoch))
            case m.Ask():
                agent.asked = True
            case m.Form():
                self._form_at(agent, instruction)
            case m.GiveUp(why):
                self.ended = why
            case _:
                pass

    def _form_at(self, agent: SimAgent, form: m.Form) -> None:
        agent.broken = agent.asked = False
        if form.epoch > max(self.epochs, default=0):
            self.epochs.append(form.epoch)
        for rank, seat in enumerate(form.seats):
            if self.homes.get(seat) == agent.number and seat in self.workers:
                self._at(self.random.uniform(0.0005, 0.02), partial(self._join, self.workers[seat], form, rank))

    # --- what workers see of it -------------------------------------------------------------------------------

    def _asked_of(self, worker: SimWorker) -> bool:
        return self.agents[self.homes[worker.seat]].asked

    def _broken_for(self, worker: SimWorker) -> bool:
        return self.agents[self.homes[worker.seat]].broken

    def _may_commit(self, worker: SimWorker) -> bool:
        agent = self.agents[self.homes[worker.seat]]
        return self._clock(agent) < agent.board

    def _commit(self, worker: SimWorker) -> None:
        if worker.epoch < max(self.epochs):
            self._wrong(f"epoch {worker.epoch} commits step {worker.step + 1} after epoch {max(self.epochs)} has begun")
        super()._commit(worker)

    def _offer(self, worker: SimWorker) -> None:
        self._begin_step(worker)  # sums of a step that was cut short are kept on one host only

    def _finish(self, worker: SimWorker) -> None:
        self._check_state(worker)
        self.ended = "finished"

    def _join(self, worker: SimWorker, form: m.Form, rank: int) -> None:
        donor = form.seats[form.donor]
        takes = not form.cold and worker.step < max(form.steps)
        if takes and worker.alive and self._is_cut(donor, worker.seat) and not self._broken_for(worker):
            self._at(0.1, partial(self._join, worker, form, rank))
        else:
            super()._join(worker, form, rank)

    # --- the network ------------------------------------------------------------------------------------------

    def _is_cut(self, origin: int, seat: int) -> bool:
        return (self.homes[origin], self.homes[seat]) in self.cut

    def _over(self, origin: int, seat: int, act: Callable[[], None]) -> None:
        """At once; or, where the way is cut, in its order once it is not."""
        way = (self.homes[origin], self.homes[seat])
        if way in self.cut or self._held[way]:
            self._held[way].append(act)
        else:
            act()

    def _deliver(self, sender: SimWorker, seat: int, word: Word, sent: float) -> None:
        if sender.died_s >= sent:
            self._over(sender.seat, seat, partial(self._hear, seat, word))

    def _hung_up(self, origin: SimWorker, seat: int, epoch: int) -> None:
        self._over(origin.seat, seat, partial(self._peer_lost, seat, epoch))

    # --- faults -----------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        at = self.random.uniform(0.5, 2.0)
        kinds = (self._kill_agent, self._freeze, self._cut, self._cut, self._flap, self._kill_one, self._stop_one)
        for _ in range(self.random.randrange(2, 8)):
            at += self.random.choice((self.random.uniform(0, 0.05), self.random.uniform(0, 2.5)))
            self._at(at, self.random.choice((*kinds, self._resize, self._drain_host)))

    def _kill_agent(self) -> None:
        """Its workers end with it; a new process takes its place later."""
        self._end_agent(self.random.choice(list(self.agents.values())))

    def _end_agent(self, agent: SimAgent) -> None:
        if agent.alive:
            agent.alive, agent.frozen, agent.died_s = False, False, self.now
            agent.waiting.clear()
            for worker in self._own(agent):
                self._kill(worker)
            self._in((0.3, 4.0), partial(self._restart, agent))

    def _restart(self, agent: SimAgent) -> None:
        agent.alive, agent.board, agent.broken, agent.asked = True, float("-inf"), False, False
        agent.council = self._council(agent.number, agent.term, agent.voted, agent.log)
        if agent.number == 0:
            self.membership = agent.council.fleet.membership
        self._at(0.0, partial(self._tick, agent, agent.council))

    def _freeze(self) -> None:
        """The agent, or its whole host."""
        agent = self.random.choice(list(self.agents.values()))
        if not agent.alive or agent.frozen:
            return
        agent.frozen = True
        stopped = [worker for worker in self._own(agent) if not worker.stopped] if self.random.random() < 0.5 else []
        for worker in stopped:
            worker.stopped = True
        self._in((0.1, 5.0), partial(self._thaw_agent, agent, agent.council, stopped))

    def _thaw_agent(self, agent: SimAgent, council: Council, stopped: list[SimWorker]) -> None:
        for worker in stopped:
            self._thaw(worker)
        if agent.council is council and agent.frozen:
            agent.frozen = False
            waiting, agent.waiting = agent.waiting, []
            for act in waiting:
                act()

    def _cut(self, lasts_s: tuple[float, float] = (0.1, 5.0)) -> None:
        inside = set(self.random.sample(sorted(self.agents), self.random.randrange(1, self.hosts)))
        ways = {(a, b) for a in inside for b in set(self.agents) - inside}
        if self.random.random() < 0.5:
            ways |= {(b, a) for a, b in ways}
        elif self.random.random() < 0.5:
            ways = {(b, a) for a, b in ways}
        self.cut |= ways
        self._in(lasts_s, partial(self._heal, ways))

    def _flap(self) -> None:
        for number in range(self.random.randrange(2, 6)):
            self._at(0.4 * number, partial(self._cut, (0.05, 0.4)))

    def _heal(self, ways: set[tuple[int, int]]) -> None:
        self.cut -= ways
        for way in ways:
            for act in self._held.pop(way, []):
                act()

    def _drain_host(self) -> None:
        """A notice comes to one; its agent ends some time later, in time or not, and another one comes."""
        agent = self.random.choice(list(self.agents.values()))
        if agent.alive and not agent.frozen:
            self._wish += 1
            wished = f.Wished(self._wish, 0, f"host:{agent.number}", "notice was given")
            self._carry(agent, agent.council.want(wished, self._clock(agent)))
            self._in((0.2, 3.0), partial(self._end_agent, agent))

    def _resize(self) -> None:
        agent = self.random.choice(list(self.agents.values()))
        if agent.alive and not agent.frozen:
            self._wish += 1
            wished = f.Wished(self._wish, self.random.randrange(1, self.shards + 1), "", "asked")
            self._carry(agent, agent.council.want(wished, self._clock(agent)))
