"""All ranks in one process, in virtual time: for tests, and to ask what a program would take on another machine.

A message begins when both ends have come to it. A link carries one message at a time, in order, and its bytes arrive
its latency later; links that cross the same capacity (a network card, a switch) share its rate fairly (max-min). The
processor time of messages, additions and copies is the topology's. Runs are deterministic: there is no clock in them.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shoal.comm.transports.contract import Message, Pending, Steps
from shoal.comm.transports.sharing import fair_rates
from shoal.errors import RunFailed, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.cluster.topology import Topology

T = TypeVar("T")
Line = tuple[int, int, int]  # (origin, to, lane)


@dataclass(frozen=True)
class Simulated(Generic[T]):
    """What all ranks returned, and when. Seconds are virtual."""

    results: list[T]  # by rank
    finish_s: list[float]  # by rank
    busy_s: Mapping[Line, float]  # how long each link carried bytes
    sent: Mapping[Line, int]  # bytes
    line_finish_s: Mapping[Line, float]  # when the last byte of each link arrived

    @property
    def seconds(self) -> float:
        return max(self.finish_s)

    def utilisation(self, line: Line) -> float:
        """The share of the whole time in which the link carried bytes; 0.0 to 1.0."""
        return self.busy_s.get(line, 0.0) / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Round:
    """What a rank waits for."""

    rank: int
    missing: int
    posted_s: float
    done_s: float

    def wait(self) -> None:
        if self.missing:
            raise UserError("a loopback does not wait by itself: yield what post() returns, under Loopback.run.")


@dataclass(slots=True)
class _Transfer:
    line: Line
    data: "Tensor"
    sender: _Round
    receiver: _Round | None = None
    target: "Tensor | None" = None
    size: int = 0
    ready_s: float = 0.0


@dataclass(slots=True)
class _Wire:
    """A link's state."""

    line: Line
    bytes_per_s: float
    latency_s: float
    through: tuple[str, ...]
    queue: deque[_Transfer] = field(default_factory=deque)
    left: float = 0.0  # bytes of the first in the queue
    rate: float = 0.0  # at which they go now
    begun_s: float = 0.0
    version: int = 0  # an event that names an older one was overtaken by a change of rates


class _End:
    """One rank's Transport."""

    def __init__(self, network: "_Network", rank: int) -> None:
        self._network = network
        self.rank, self.size, self.lanes = rank, network.size, network.lanes

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return self._network.post(self.rank, sends, receives)

    def worked(self, reduced: int, copied: int) -> None:
        self._network.worked(self.rank, reduced, copied)


class Loopback:
    """``topology`` has ranks and links; a number instead: so many ranks, and messages that take no time."""

    def __init__(self, topology: "Topology | int") -> None:
        self.topology = topology

    def run(self, steps: Callable[[_End], Steps[T]]) -> Simulated[T]:
        """Carry out ``steps(transport)`` on every rank, from virtual time 0.

        Raises RunFailed when ranks wait for each other for ever, for messages whose ends differ in size, and for
        messages that are left over."""
        return _Network(self.topology).run(steps)


class _Network:
    def __init__(self, topology: "Topology | int") -> None:
        self.topology = None if isinstance(topology, int) else topology
        self.size = topology if isinstance(topology, int) else topology.size
        self.lanes = 64 if self.topology is None else self.topology.lanes  # without links, any lane will do
        self.now = 0.0
        self.clock = [0.0] * self.size  # when each rank's processor is free
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.sends: defaultdict[Line, deque[_Transfer]] = defaultdict(deque)
        self.receives: defaultdict[Line, deque[tuple[_Round, Tensor]]] = defaultdict(deque)
        self.wires: dict[Line, _Wire] = {}
        self.shared: dict[Line, _Wire] = {}  # busy, and crossing capacities
        self.shared_s = 0.0  # up to when their bytes are counted
        self.dirty = False
        self.busy_s: defaultdict[Line, float] = defaultdict(float)
        self.sent: defaultdict[Line, int] = defaultdict(int)
        self.line_finish_s: dict[Line, float] = {}
        self.slow = [1.0] * self.size  # how many ranks share a core
        if self.topology is not None:
            ranks = {host: len(self.topology.ranks_of(host)) for host in self.topology.cores}
            for rank, host in enumerate(self.topology.hosts):
                if host in ranks:
                    self.slow[rank] = max(1.0, ranks[host] / self.topology.cores[host])

    def run(self, steps: Callable[[_End], Steps[T]]) -> Simulated[T]:
        self.running: dict[int, Steps[T]] = {rank: steps(_End(self, rank)) for rank in range(self.size)}
        self.results: dict[int, T] = {}
        self.waiting: dict[int, _Round] = {}
        try:
            for rank in range(self.size):
                self._resume(rank)
            while self.events or self.dirty:
                if self.dirty and (not self.events or self.events[0][0] > self.now):
                    self._share()
                    continue
                self.now, _, act, arguments = heappop(self.events)
                act(*arguments)
            self._all_ended()
        finally:
            for left in self.running.values():
                left.close()
        results = [self.results[rank] for rank in range(self.size)]
        return Simulated(results, self.clock, dict(self.busy_s), dict(self.sent), self.line_finish_s)

    def _at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        self.count += 1  # events of one moment keep their order
        heappush(self.events, (when, self.count, act, arguments))

    def _resume(self, rank: int) -> None:
        self.clock[rank] = max(self.clock[rank], self.now)
        self.waiting.pop(rank, None)
        try:
            pending = next(self.running[rank])
        except StopIteration as done:
            self.results[rank] = done.value
            del self.running[rank]
            return
        assert isinstance(pending, _Round)
        self.waiting[rank] = pending
        if not pending.missing:
            self._at(max(self.clock[rank], pending.done_s), self._resume, rank)

    def _spend(self, rank: int, seconds: float, since: float) -> float:
        """The rank's processor works for so long, not before ``since``; when it is done."""
        self.clock[rank] = max(self.clock[rank], since) + seconds * self.slow[rank]
        return self.clock[rank]

    def worked(self, rank: int, reduced: int, copied: int) -> None:
        if self.topology is not None:
            each = self.topology.reduce_s_per_byte, self.topology.copy_s_per_byte
            self._spend(rank, reduced * each[0] + copied * each[1], self.now)

    def post(self, rank: int, sends: Sequence[Message], receives: Sequence[Message]) -> _Round:
        message_s = self.topology.message_s if self.topology is not None else 0.0
        posted = _Round(rank, len(sends) + len(receives), self.clock[rank], self.clock[rank])
        for verb, messages in (("sends to", sends), ("receives from", receives)):
            for peer, _, lane in messages:
                if not 0 <= peer < self.size or peer == rank or not 0 <= lane < self.lanes:
                    raise UserError(
                        f"loopback: rank {rank} {verb} rank {peer} on lane {lane}: "
                        f"there are ranks 0 to {self.size - 1} but itself, and {self.lanes} lanes."
                    )
        for peer, data, lane in receives:
            line = (peer, rank, lane)
            self.receives[line].append((posted, data))
            self._match(line)
        for peer, data, lane in sends:
            line = (rank, peer, lane)
            size = data.numel() * data.element_size()
            ready = self._spend(rank, message_s, self.now)
            self.sends[line].append(_Transfer(line, data, posted, size=size, ready_s=ready))
            self._match(line)
        return posted

    def _match(self, line: Line) -> None:
        sends, receives = self.sends[line], self.receives[line]
        while sends and receives:
            transfer, (transfer.receiver, transfer.target) = sends.popleft(), receives.popleft()
            have = transfer.target.numel() * transfer.target.element_size()
            if have != transfer.size:
                origin, to, lane = line
                raise RunFailed(
                    f"loopback: rank {origin} sends {transfer.size} bytes to rank {to} on lane {lane}, "
                    f"which has room for {have}"
                )
            self._at(max(transfer.receiver.posted_s, transfer.ready_s, self.now), self._ready, transfer)

    def _wire(self, line: Line) -> _Wire:
        wire = self.wires.get(line)
        if wire is None:
            if self.topology is None:
                wire = _Wire(line, inf, 0.0, ())
            else:
                link = self.topology.link(*line)
                if link.lane != line[2]:  # lane 0 is the first that there is
                    wire = self._wire((link.source, link.target, link.lane))
                else:
                    wire = _Wire(line, link.bytes_per_s, link.latency_s, link.through)
            self.wires[line] = wire
        return wire

    def _ready(self, transfer: _Transfer) -> None:
        wire = self._wire(transfer.line)
        wire.queue.append(transfer)
        if len(wire.queue) == 1:
            self._begin(wire)

    def _begin(self, wire: _Wire) -> None:
        wire.left, wire.begun_s = float(wire.queue[0].size), self.now
        wire.version += 1
        if wire.through and wire.left:
            self._count_shared()
            self.shared[wire.line] = wire
            wire.rate, self.dirty = 0.0, True
        else:
            self._at(self.now + wire.left / wire.bytes_per_s, self._sent, wire, wire.version)

    def _count_shared(self) -> None:
        for wire in self.shared.values():
            wire.left -= wire.rate * (self.now - self.shared_s)
        self.shared_s = self.now

    def _share(self) -> None:
        """The set of links that cross capacities has changed: new rates, and when each would be done."""
        assert self.topology is not None
        self.dirty = False
        self._count_shared()
        wires = list(self.shared.values())
        rates = fair_rates([(wire.bytes_per_s, wire.through) for wire in wires], self.topology.rates)
        for wire, rate in zip(wires, rates, strict=True):
            if rate != wire.rate:
                wire.rate = rate
                wire.version += 1
                self._at(self.now + max(0.0, wire.left) / rate, self._sent, wire, wire.version)

    def _sent(self, wire: _Wire, version: int) -> None:
        if version != wire.version:
            return
        if wire.line in self.shared:
            self._count_shared()
            del self.shared[wire.line]
            self.dirty = bool(self.shared)
        transfer = wire.queue.popleft()
        assert transfer.target is not None
        transfer.target.copy_(transfer.data)
        self.busy_s[wire.line] += self.now - wire.begun_s
        self.sent[wire.line] += transfer.size
        self._done(transfer.sender)
        self._at(self.now + wire.latency_s, self._arrived, transfer, wire)
        if wire.queue:
            self._begin(wire)

    def _arrived(self, transfer: _Transfer, wire: _Wire) -> None:
        assert transfer.receiver is not None
        self.line_finish_s[wire.line] = self.now
        if self.topology is not None and self.topology.message_s:
            self._spend(transfer.receiver.rank, self.topology.message_s, self.now)
        self._done(transfer.receiver)

    def _done(self, pending: _Round) -> None:
        pending.missing -= 1
        pending.done_s = max(self.now, self.clock[pending.rank])
        if not pending.missing and self.waiting.get(pending.rank) is pending:
            self._at(pending.done_s, self._resume, pending.rank)

    def _all_ended(self) -> None:
        if self.running:
            names = {line: ("to send to", line[0], line[1]) for line, queue in self.sends.items() if queue}
            names |= {line: ("to receive from", line[1], line[0]) for line, queue in self.receives.items() if queue}
            told = [f"rank {rank} waits {what} rank {peer}" for what, rank, peer in names.values()]
            raise RunFailed(f"loopback: deadlock: {'; '.join(sorted(told))}")
        for line, queue in [*self.sends.items(), *self.receives.items()]:
            if queue:
                raise RunFailed(f"loopback: a message from rank {line[0]} to rank {line[1]} is left over")
