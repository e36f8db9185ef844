"""Which hosts there are and which of them each worker lives on: the decider, as agents of several hosts replicate it.

Entries of the agents' log in, instructions out: who applies the same entries has the same members, epochs and homes.
An agent's *life* is drawn anew by each of its processes, and once more whenever it has been counted as lost: what an
older life still says is not heard, and what was to be done in it is not done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.elastic import membership as m
from shoal.elastic import roster
from shoal.elastic.replan import MOST_SERVERS, named, servers_for

Life = tuple[int, int]  # agent, life


# --- entries ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Up:
    """An agent is there, without a worker."""

    agent: int
    life: int
    name: str


@dataclass(frozen=True)
class Lost:
    agent: int
    life: int
    why: str


@dataclass(frozen=True)
class Begin:
    """The first worker may be made. ``wish``: the newest wish that is older than the run."""

    wish: int


@dataclass(frozen=True)
class Wished:
    """Somebody asks for another number of workers or servers, for an end, or for a host to go: see
    shoal.elastic.roster."""

    number: int
    workers: int
    drain: str
    why: str
    servers: int = 0


@dataclass(frozen=True)
class Forked:
    seat: int
    pid: int


@dataclass(frozen=True)
class Made:
    """A worker makes the run directory, or has found it."""

    seat: int


@dataclass(frozen=True)
class Failed:
    """A member has raised: it would raise again."""

    seat: int
    line: str
    user_error: bool
    trace: str


Event = m.Opened | m.Ready | m.Left | m.Went | m.Dead | m.Suspect | m.Drain | m.Done | Forked | Made | Failed


@dataclass(frozen=True)
class Said:
    """An agent passes on what it sees of its own workers. Heard once, in the order of ``number``, from 1."""

    agent: int
    life: int
    number: int
    event: Event


Value = Up | Lost | Begin | Wished | Said


# --- instructions, beside those of the decider -------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """The run ends after the step in flight, saved."""


@dataclass(frozen=True)
class Fail:
    line: str
    user_error: bool
    trace: str


Instruction = m.Instruction | Stop | Fail


@dataclass
class Host:
    life: int
    name: str
    heard: int = 0  # the number of the last thing that it said
    leaves: bool = False  # it is to go: its workers are drained, and no new one is made there


@dataclass
class Fleet:
    """``asked`` workers, of which so many are parameter ``servers``, on ``agents`` hosts, each of which takes its even
    part: who is lost leaves room."""

    agents: int
    asked: int
    least: int
    most: int
    servers: int = 0
    membership: m.Membership = field(init=False)
    hosts: dict[int, Host] = field(default_factory=dict)
    homes: dict[int, Life | None] = field(default_factory=dict)  # seat -> where it lives; None: no host was there
    names: dict[int, str] = field(default_factory=dict)  # of all agents that have ever been there
    pids: dict[int, int] = field(default_factory=dict)
    begun: bool = False
    made: bool = False
    wish: int = 0

    def __post_init__(self) -> None:
        self.membership = m.Membership(self.asked, self.least, self.most)

    # --- what is asked ----------------------------------------------------------------------------------------

    def name(self, agent: int) -> str:
        """Of its host; two agents of one host are told apart by their numbers."""
        name = self.names.get(agent, "?")
        return name if list(self.names.values()).count(name) == 1 else f"{name}/{agent}"

    def host(self, seat: int) -> str:
        home = self.homes.get(seat)
        return self.name(home[0]) if home else "no host"

    def rank(self, seat: int) -> int | None:
        members = self.membership.members
        return members.index(seat) if seat in members else None

    def who(self, seat: int) -> str:
        rank, count = self.rank(seat), len(self.membership.members)
        name = "a new worker" if rank is None else named(rank, count - servers_for(count, self.servers))
        return f"{name} on {self.host(seat)} (pid {self.pids.get(seat)})"

    # --- entries ----------------------------------------------------------------------------------------------

    def on(self, value: Value, now: float) -> list[Instruction]:
        """What is to be done, in this order."""
        before = set(self.homes)
        out = self._on(value, now)
        for instruction in out:
            if isinstance(instruction, m.Fork) and instruction.seat not in before:
                self.homes[instruction.seat] = self._place()
        return out

    def _on(self, value: Value, now: float) -> list[Instruction]:
        match value:
            case Up(agent, life, name):
                return self._up(agent, life, name, now)
            case Lost(agent, life, why):
                host = self.hosts.get(agent)
                return self._lose(agent, why, now) if host is not None and host.life == life else []
            case Begin(wish):
                if self.begun:
                    return []
                self.begun, self.wish = True, wish
                self.membership.wanted = min(self.asked, self._room)
                return [*self.membership.begin(now)]
            case Wished():
                return self._wished(value, now)
            case Said(agent, life, number, event):
                host = self.hosts.get(agent)
                if host is None or host.life != life or number != host.heard + 1:
                    return []
                host.heard = number
                return self._said((agent, life), event, now) if self.homes.get(event.seat) == (agent, life) else []

    def _said(self, home: Life, event: Event, now: float) -> list[Instruction]:
        match event:
            case Forked(seat, pid):
                self.pids[seat] = pid
                return []
            case Made():
                self.made = True
                return []
            case Failed(_, line, user_error, trace):
                self.membership.finished = True
                return [Fail(line, user_error, trace)]
            case m.Drain():
                before = self.membership.wanted
                out = self.membership.on(event, now)
                self.asked -= before - self.membership.wanted
                return [*out]
            case _:
                return [*self.membership.on(event, now)]

    def _wished(self, wished: Wished, now: float) -> list[Instruction]:
        if wished.number <= self.wish:
            return []
        self.wish = wished.number
        members = self.membership.members
        if wished.drain == "all":
            return [Stop()]
        if wished.drain.startswith(roster.HOST):
            return self._drain(wished.drain.removeprefix(roster.HOST), wished.why, now)
        if wished.drain.isdecimal() and int(wished.drain) < len(members):
            seat = members[int(wished.drain)]
            why = wished.why or f"{self.who(seat)} was asked to leave"
            home = self.homes[seat]
            return self._said(home, m.Drain(seat, why), now) if home else []
        if wished.servers and self.servers:
            asked, self.servers = self.asked - self.servers, min(wished.servers, MOST_SERVERS)
            why = wished.why or f"{wished.servers} servers were asked for"
        else:
            asked, why = wished.workers, wished.why or f"{wished.workers} workers were asked for"
        processes = asked + self.servers
        if not asked:
            return []
        if not self.least <= processes <= self.most:
            return [*self.membership.on(m.Resize(processes, ""), now)]
        self.asked = processes
        return self._fit(why, now)

    # --- hosts ------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        return sum(not host.leaves for host in self.hosts.values()) * -(-self.asked // self.agents)

    def _drain(self, who: str, why: str, now: float) -> list[Instruction]:
        """A host that is to go, by its name or its agent's number, is empty after the step in flight. When its agent
        has been started anew it takes its part again."""
        agent = next((agent for agent in sorted(self.hosts) if who in (str(agent), self.name(agent))), None)
        if agent is None or self.hosts[agent].leaves:
            return []
        host = self.hosts[agent]
        host.leaves = True
        seats = self.membership.seats
        here = [n for n, home in self.homes.items() if home == (agent, host.life) and n in seats]
        out: list[Instruction] = []
        for number in here:
            why = why or f"{self.name(agent)} was asked to go"
            out += self.membership.on(m.Drain(number, why), now)
        self.membership.wanted = max(self.least, min(self.asked, self._room))
        return out

    def _fit(self, why: str, now: float) -> list[Instruction]:
        """As many workers as are asked for and as have room."""
        fitting = min(self.asked, self._room)
        if fitting < self.least:
            self.membership.wanted = fitting
            return []
        return [*self.membership.on(m.Resize(fitting, why), now)] if fitting != self.membership.wanted else []

    def _up(self, agent: int, life: int, name: str, now: float) -> list[Instruction]:
        host = self.hosts.get(agent)
        if host is not None and host.life == life:
            return []
        out = self._lose(agent, "its agent has been started anew", now) if host is not None else []
        self.hosts[agent] = Host(life, name)
        self.names[agent] = name
        if not self.begun or self.membership.finished:
            return out
        homeless = [seat for seat, home in self.homes.items() if home is None and seat in self.membership.seats]
        out += self._fit(f"{self.name(agent)} has joined", now)
        for seat in homeless:
            out += self.membership.on(m.Dead(seat, "there was no host for it"), now)
        return out

    def _lose(self, agent: int, why: str, now: float) -> list[Instruction]:
        host = self.hosts.pop(agent)
        self.membership.wanted = min(self.asked, self._room)
        seats = self.membership.seats
        here = [n for n, home in self.homes.items() if home == (agent, host.life) and n in seats]
        for number in here:
            if seats[number].at is not m.At.active:
                seats[number].at = m.At.gone  # nobody chooses it while the others of its host are still to be lost
        out: list[Instruction] = []
        for number in here:
            out += self.membership.on(m.Dead(number, f"{self.who(number)} was lost with its host: {why}"), now)
        return out

    def _place(self) -> Life | None:
        """The host with the fewest workers takes the next one."""
        seats = self.membership.seats
        lives = {(agent, host.life): 0 for agent, host in sorted(self.hosts.items()) if not host.leaves}
        for number, home in self.homes.items():
            if home in lives and number in seats and seats[number].at is not m.At.gone:
                lives[home] += 1
        return min(lives, key=lambda life: (lives[life], life[0])) if lives else None


def seats_of(fleet: Fleet, life: Life, seats: Sequence[int]) -> list[int]:
    """Those of them that live there."""
    return [seat for seat in seats if fleet.homes.get(seat) == life]
