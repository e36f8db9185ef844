"""One agent's part of what agents of several hosts decide together: its log, its fleet, and what it still has to say.

Pure: messages and a clock in, messages and instructions out. `shoal.elastic.crew_of_hosts` carries them over sockets
and does what is decided; `shoal.elastic.hosts_simulation` runs many of them under drawn faults.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.elastic import fleet as f
from shoal.elastic.consensus import Agent, Apply, Keep, Message, Role, Send

AGAIN_S = 0.2  # what is not yet in the log is said again after so long
GATHER_S = 10.0  # the run begins without the agents that are not there by then


@dataclass(frozen=True)
class Propose:
    """To the leader: these are to be in the log."""

    sender: int
    values: tuple[f.Value, ...]


@dataclass(frozen=True)
class Do:
    """What the entry at ``index`` of the log asks for: the same on every agent."""

    index: int
    instructions: tuple[f.Instruction, ...]


@dataclass(frozen=True)
class Fence:
    """This agent has been counted as lost: its workers are to end before it comes back."""


Output = Keep | Send | Do | Fence


@dataclass
class Council:
    raft: Agent
    fleet: f.Fleet
    random: random.Random
    name: str
    wish: int = 0  # the newest that is older than the run
    life: int = 0
    _waiting: list[f.Said] = field(default_factory=list)  # said, and not yet in the log
    _number: int = 0
    _was_up: bool = False
    _again: float = float("-inf")
    _led_since: float | None = None
    _counted: dict[f.Life, float] = field(default_factory=dict)  # as lost, by this leader, and when

    def __post_init__(self) -> None:
        self._live_anew()

    @property
    def me(self) -> f.Life:
        return self.raft.number, self.life

    @property
    def leads(self) -> bool:
        return self.raft.role is Role.leader

    def holds(self, now: float) -> bool:
        """Whether this agent's workers may commit: nobody can have counted it as lost by now."""
        return now < self.raft.lease and self._was_up

    def _live_anew(self) -> None:
        self.life, self._waiting, self._number, self._was_up = self.random.getrandbits(48), [], 0, False
        self._again = float("-inf")

    # --- events -----------------------------------------------------------------------------------------------

    def say(self, event: f.Event, now: float) -> list[Output]:
        """Something that this agent has seen of its own workers."""
        self._number += 1
        said = f.Said(*self.me, self._number, event)
        self._waiting.append(said)
        return self._pass_on([said], now)

    def want(self, wished: f.Wished, now: float) -> list[Output]:
        return self._pass_on([wished], now)

    def on(self, message: "Message | Propose", now: float) -> list[Output]:
        if isinstance(message, Propose):
            return self._add(message.values, now) if self.leads else []
        return self._carry(self.raft.on(message, now), now)

    def ended(self, agent: int, now: float) -> None:
        """Another agent's process has surely ended."""
        self.raft.ended(agent, now)

    def tick(self, now: float) -> list[Output]:
        out = self._carry(self.raft.tick(now), now)
        if not self.leads:
            self._led_since = None
        elif self._led_since is None:
            self._led_since = now
            self._counted.clear()
        if self.leads and self._settled:
            out += self._add(self._duties(now), now)
        if now - self._again >= AGAIN_S:
            self._again = now
            host = self.fleet.hosts.get(self.raft.number)
            up = host is not None and host.life == self.life
            out += self._pass_on(self._waiting if up else [f.Up(*self.me, self.name)], now)
        return out

    # --- the leader -------------------------------------------------------------------------------------------

    @property
    def _settled(self) -> bool:
        """All that earlier leaders have decided is known here."""
        raft = self.raft
        return raft.applied > 0 and raft.log[raft.applied - 1].term == raft.term

    def _duties(self, now: float) -> list[f.Value]:
        assert self._led_since is not None
        found: list[f.Value] = []
        hosts = self.fleet.hosts
        for agent in self.raft.silent(now):
            life = (agent, hosts[agent].life) if agent in hosts else None
            if life and now - self._counted.get(life, float("-inf")) > 1.0:
                self._counted[life] = now
                known = self.raft.known_to_have_ended(agent)
                found.append(f.Lost(*life, "its agent has ended" if known else "its agent does not answer any more"))
        gathered = len(hosts) == self.fleet.agents or now - self._led_since > GATHER_S
        if hosts and gathered and not self.fleet.begun:
            found.append(f.Begin(self.wish))
        return found

    def _add(self, values: Sequence[f.Value], now: float) -> list[Output]:
        out: list[Output] = []
        for value in values:
            if not any(entry.value == value for entry in self.raft.log[self.raft.applied :]):
                out += self._carry(self.raft.propose(value, now)[1], now)
        return out

    # --- both -------------------------------------------------------------------------------------------------

    def _pass_on(self, values: Sequence[f.Value], now: float) -> list[Output]:
        if not values:
            return []
        if self.leads:
            return self._add(values, now)
        leader = self.raft.leader
        return [] if leader is None else [Send(leader, Propose(self.raft.number, tuple(values)))]

    def _carry(self, outputs: Sequence[Any], now: float) -> list[Output]:
        """What the log says becomes what is to be done."""
        out: list[Output] = []
        for output in outputs:
            if not isinstance(output, Apply):
                out.append(output)
            elif isinstance(output.value, f.Value):
                out.append(Do(output.index, tuple(self.fleet.on(output.value, now))))
                out += self._look_at_own_life()
        return out

    def _look_at_own_life(self) -> list[Output]:
        host = self.fleet.hosts.get(self.raft.number)
        if host is not None and host.life == self.life:
            self._was_up = True
            self._waiting = [said for said in self._waiting if said.number > host.heard]
        elif self._was_up:
            self._live_anew()
            return [Fence()]
        return []
