"""Predicted seconds of a program on a topology: pure, and fast enough to ask for every algorithm.

The rules of the loopback, without tensors: a message begins when both ends have come to it, a link carries one at a
time, a rank's processor does one thing at a time, and links that cross the same capacities share them fairly.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from heapq import heappop, heappush
from typing import NamedTuple

from shoal.cluster.topology import Topology
from shoal.comm.collectives.actions import Copy, Program, block_sizes
from shoal.comm.collectives.schedule import schedule, spans
from shoal.comm.layout import ALIGNMENT
from shoal.comm.transports.sharing import fair_rates
from shoal.errors import UserError

Line = tuple[int, int, int]  # (origin, to, lane)


@dataclass(frozen=True)
class Cost:
    """What a program takes. Seconds are predicted."""

    program: Program
    topology: Topology
    nbytes: int  # of the whole vector on a rank
    itemsize: int
    half: bool
    finish_s: tuple[float, ...]  # by rank
    sent: Mapping[Line, int]  # bytes, by the line that the program names
    busy_s: Mapping[Line, float]  # how long each link carries bytes, by the link that there is
    waits: Mapping[Line, int]  # messages, each of which waits for the link's latency

    @property
    def seconds(self) -> float:
        return max(self.finish_s)

    @cached_property
    def latency_s(self) -> float:
        """The part that would go if messages had no latency and cost no processor time."""
        links = tuple(replace(link, latency_s=0.0) for link in self.topology.links)
        free = replace(self.topology, links=links, message_s=0.0)
        return self.seconds - cost(self.program, self.nbytes, free, itemsize=self.itemsize, half=self.half).seconds

    @property
    def bound_by(self) -> str:
        """Either latency or bandwidth: what takes the larger part."""
        return "latency" if self.latency_s > self.seconds / 2 else "bandwidth"

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the tensor a second."""
        return self.nbytes / self.seconds if self.seconds else float("inf")

    def __str__(self) -> str:
        """A line for every link in use."""
        lines = [f"{self.program.name}: {self.seconds * 1e6:.1f} us, of which latency {self.latency_s * 1e6:.1f} us"]
        for line, busy in sorted(self.busy_s.items()):
            origin, to, lane = line
            share = busy / self.seconds if self.seconds else 0.0
            kind = self.topology.link(origin, to, lane).kind
            count = f"{self.sent.get(line, 0)} bytes in {self.waits.get(line, 0)} messages"
            lines.append(f"  {origin} -> {to} {kind}: {count}, busy {share:.0%}")
        return "\n".join(lines)


def cost(program: Program, nbytes: int, topology: Topology, *, itemsize: int = 1, half: bool = False) -> Cost:
    """``nbytes`` is the whole vector on a rank, as in ``traffic``: the tensor; the input of scatter, reduce_scatter and
    all_to_all; the output of gather and all_gather. ``half``: sums that lack operands travel twice as wide.

    Raises UserError when the program has another number of ranks or needs links that are not there."""
    if program.ranks != topology.size:
        raise UserError(f"{program.name}: made for {program.ranks} ranks, but the topology has {topology.size}.")
    return _Run(program, nbytes, topology, itemsize, half).cost()


class _Message(NamedTuple):
    line: Line
    chunks: tuple[int, ...]
    wide: bool
    sender: tuple[int, int]  # rank, step
    receiver: tuple[int, int]


class _Step(NamedTuple):
    sends: tuple[int, ...]  # places in the messages
    receives: tuple[int, ...]
    reduced: tuple[int, ...]  # chunks, each as often as it is added to
    copied: tuple[int, ...]


@lru_cache(maxsize=256)
def _prepared(program: Program) -> tuple[tuple[_Message, ...], tuple[tuple[_Step, ...], ...]]:
    """The messages of a program, and what each rank does with them, step by step."""
    steps = schedule(program)
    coming: defaultdict[Line, list[tuple[int, int]]] = defaultdict(list)
    for rank, own in enumerate(steps):
        for number, step in enumerate(own):
            for transfer in step.receives:
                coming[transfer.peer, rank, transfer.lane].append((rank, number))
    messages: list[_Message] = []
    sends: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    receives: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    taken: defaultdict[Line, int] = defaultdict(int)
    for rank, own in enumerate(steps):
        for number, step in enumerate(own):
            for transfer in step.sends:
                line = (rank, transfer.peer, transfer.lane)
                receiver = coming[line][taken[line]]
                taken[line] += 1
                sends[rank, number].append(len(messages))
                receives[receiver].append(len(messages))
                messages.append(_Message(line, transfer.chunks, transfer.wide, (rank, number), receiver))
    out = []
    for rank, own in enumerate(steps):
        prepared = []
        for number, step in enumerate(own):
            reduced = [c for place, a, b in step.additions for c in step.receives[place].chunks[a:b]]
            reduced += [action.into for action in step.local if not isinstance(action, Copy)]
            copied = tuple(action.into for action in step.local if isinstance(action, Copy))
            at = (rank, number)
            prepared.append(_Step(tuple(sends[at]), tuple(receives[at]), tuple(reduced), copied))
        out.append(tuple(prepared))
    return tuple(messages), tuple(out)


@dataclass(slots=True, eq=False)
class _Wire:
    line: Line
    bytes_per_s: float
    latency_s: float
    through: tuple[str, ...]
    queue: deque[int] = field(default_factory=deque)  # messages
    left: float = 0.0  # bytes of the first
    rate: float = 0.0  # at which they go now, where capacities are crossed
    begun_s: float = 0.0
    busy_s: float = 0.0
    version: int = 0  # an event that names an older one was overtaken by a change of rates

    def __lt__(self, other: "_Wire") -> bool:
        return self.line < other.line  # events of one moment and message have an order, whatever it is


class _Run:
    def __init__(self, program: Program, nbytes: int, topology: Topology, itemsize: int, half: bool) -> None:
        self.program, self.topology = program, topology
        self.nbytes, self.itemsize, self.half = nbytes, itemsize, half
        self.messages, self.steps = _prepared(program)
        elements = tuple(block_sizes(program.collective, program.ranks, nbytes // itemsize))
        self.size = [(stop - start) * itemsize for start, stop in spans(program, elements, ALIGNMENT)]
        self.size += [self.size[like] for like in program.scratch]
        self.bytes = [sum(self.size[c] for c in m.chunks) << (half and m.wide) for m in self.messages]
        ranks = {host: len(topology.ranks_of(host)) / cores for host, cores in topology.cores.items()}
        self.slow = [max(1.0, ranks.get(host, 0.0)) for host in topology.hosts]
        self.clock = [0.0] * program.ranks
        self.at = [-1] * program.ranks  # the step of each rank
        self.missing = [0] * program.ranks
        self.posted: list[float] = [-1.0] * len(self.messages)  # by the first of the two ends
        self.events: list[tuple[float, int, _Wire | None, int]] = []  # a message begins, or a wire is done with one
        self.wires: dict[Line, _Wire] = {}
        self.shared: dict[Line, _Wire] = {}  # those that carry bytes through capacities
        self.shared_s = 0.0  # up to when these are counted
        self.dirty = False  # they have changed: new rates are due

    def cost(self) -> Cost:
        ready = list(range(self.program.ranks))
        sent: defaultdict[Line, int] = defaultdict(int)
        waits: defaultdict[Line, int] = defaultdict(int)
        now = 0.0
        while ready or self.events or self.dirty:
            while ready:
                self._advance(ready.pop(), ready)
            if self.dirty and (not self.events or self.events[0][0] > now):
                self._share(now)
            if not self.events:
                break
            now, number, wire, version = heappop(self.events)
            if wire is None:
                line = self.messages[number].line
                sent[line] += self.bytes[number]
                waits[line] += 1
                wire = self._wire(line)
                wire.queue.append(number)
                if len(wire.queue) == 1:
                    self._begin(wire, now)
            elif version == wire.version:
                self._end(wire, now, ready)
        busy = {line: wire.busy_s for line, wire in self.wires.items() if line == wire.line}
        return Cost(
            self.program, self.topology, self.nbytes, self.itemsize, self.half, tuple(self.clock), sent, busy, waits
        )

    def _wire(self, line: Line) -> "_Wire":
        wire = self.wires.get(line)
        if wire is None:
            link = self.topology.link(*line)
            own = (link.source, link.target, link.lane)  # lane 0 is the first that there is
            wire = self.wires.get(own) or _Wire(own, link.bytes_per_s, link.latency_s, link.through)
            self.wires[line] = self.wires[own] = wire
        return wire

    def _advance(self, rank: int, ready: list[int]) -> None:
        """The rank's step is done: its additions, then the messages of the next one."""
        if self.at[rank] >= 0:
            step = self.steps[rank][self.at[rank]]
            work = self.topology.reduce_s_per_byte * sum(self.size[c] for c in step.reduced)
            work += self.topology.copy_s_per_byte * sum(self.size[c] for c in step.copied)
            self.clock[rank] += work * self.slow[rank]
        self.at[rank] += 1
        if self.at[rank] == len(self.steps[rank]):
            return
        step = self.steps[rank][self.at[rank]]
        sends = [number for number in step.sends if self.bytes[number]]  # what is empty does not travel
        receives = [number for number in step.receives if self.bytes[number]]
        self.missing[rank] = len(sends) + len(receives)
        for number in receives:
            self._post(number, self.clock[rank])
        for number in sends:
            self.clock[rank] += self.topology.message_s * self.slow[rank]
            self._post(number, self.clock[rank])
        if not self.missing[rank]:
            ready.append(rank)

    def _post(self, number: int, when: float) -> None:
        other = self.posted[number]
        if other < 0:
            self.posted[number] = when
        else:
            heappush(self.events, (max(when, other), number, None, 0))

    def _begin(self, wire: "_Wire", now: float) -> None:
        wire.left, wire.begun_s = float(self.bytes[wire.queue[0]]), now
        wire.version += 1
        if wire.through:
            self._count(now)
            self.shared[wire.line] = wire
            wire.rate, self.dirty = 0.0, True
        else:
            heappush(self.events, (now + wire.left / wire.bytes_per_s, wire.queue[0], wire, wire.version))

    def _count(self, now: float) -> None:
        for wire in self.shared.values():
            wire.left -= wire.rate * (now - self.shared_s)
        self.shared_s = now

    def _share(self, now: float) -> None:
        self.dirty = False
        self._count(now)
        wires = list(self.shared.values())
        rates = fair_rates([(wire.bytes_per_s, wire.through) for wire in wires], self.topology.rates)
        for wire, rate in zip(wires, rates, strict=True):
            if rate != wire.rate:
                wire.rate = rate
                wire.version += 1
                heappush(self.events, (now + max(0.0, wire.left) / rate, wire.queue[0], wire, wire.version))

    def _end(self, wire: "_Wire", now: float, ready: list[int]) -> None:
        if wire.through:
            self._count(now)
            del self.shared[wire.line]
            self.dirty = bool(self.shared)
        wire.busy_s += now - wire.begun_s
        message = self.messages[wire.queue.popleft()]
        self._done(message.sender[0], now, ready)
        receiver, arrival = message.receiver[0], now + wire.latency_s
        if self.topology.message_s:
            arrival = max(arrival, self.clock[receiver]) + self.topology.message_s * self.slow[receiver]
        self._done(receiver, arrival, ready)
        if wire.queue:
            self._begin(wire, now)

    def _done(self, rank: int, when: float, ready: list[int]) -> None:
        self.missing[rank] -= 1
        self.clock[rank] = max(self.clock[rank], when)
        if not self.missing[rank]:
            ready.append(rank)
