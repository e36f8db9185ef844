"""What a transport counts while it works: calls, bytes and seconds, by operation and kind of link.

Every transport of a worker writes into one `Counters`, from the threads that do the work, without a lock and without a
message of its own. To count in a transport (an exchange, a parameter server's client, a server):

    counters = Counters(rank, peers=[f"rank {r}" for r in range(world)] + [f"server {k}" for k in range(servers)])
    push = counters.tally("push", "tcp")              # once, in the thread that will write it
    push.call(sent=nbytes)                            # once an operation
    push.spend(Kind.queued, begun - posted, exposed=False)       # it lay in the queue while the worker computed
    push.spend(Kind.transferring, done - begun, exposed=False)
    pull = counters.tally("pull", "tcp")
    pull.wait(peer=world + k, seconds=late - asked)   # stood still: server k had nothing to give yet
    pull.spend(Kind.transferring, done - late, exposed=True)     # stood still: bytes came in

Seconds are of one of four kinds, and either *hidden* (the worker computed meanwhile) or *exposed* (it stood still).
They are wall-clock seconds of the worker, each counted once: a transport with several operations in flight gives a
moment to the oldest of them. So the exposed seconds of all tallies add up to what communication cost the worker.
Clocks are `time.monotonic`, which all processes of a host share.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import count, zip_longest
from typing import ClassVar, Self

KEPT_SPANS = 20_000  # of the newest steps that somebody wanted to see

Place = tuple[str, str]  # operation, kind of link: ("reduce-scatter", "shared memory")


_numbers = count()


class Kind(IntEnum):
    """What the seconds of an operation go to."""

    queued = 0  # handed over, and nobody had time for it
    waiting = 1  # a peer had not arrived: skew
    transferring = 2  # all had arrived, bytes were under way
    reducing = 3  # additions and copies on this worker


class Tally:
    """One operation over one kind of link. Has one writer: each thread asks `Counters.tally` for its own."""

    __slots__ = ("_owner", "calls", "exposed", "hidden", "received_bytes", "sent_bytes", "waits")

    def __init__(self, peers: int, owner: "Counters | None" = None) -> None:
        self._owner = owner  # lives as long
        self.calls = self.sent_bytes = self.received_bytes = 0
        self.hidden = [0.0] * len(Kind)
        self.exposed = [0.0] * len(Kind)
        self.waits = [0.0] * peers  # exposed seconds of Kind.waiting, by the peer that came last

    def call(self, *, sent: int = 0, received: int = 0, calls: int = 1) -> None:
        """An operation was handed over; ``sent`` and ``received`` are the bytes that cross the link for it."""
        self.calls += calls
        self.sent_bytes += sent
        self.received_bytes += received

    def spend(self, kind: Kind, seconds: float, *, exposed: bool) -> None:
        (self.exposed if exposed else self.hidden)[kind] += seconds

    def wait(self, peer: int, seconds: float) -> None:
        """The worker stood still because ``peer`` had not arrived. Of several, name the last one: it decided."""
        self.exposed[Kind.waiting] += seconds
        self.waits[peer] += seconds


@dataclass(frozen=True)
class Total:
    """A tally as it stood at one moment, or what came to it between two."""

    calls: float = 0.0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    hidden: tuple[float, ...] = (0.0,) * len(Kind)  # seconds by Kind
    exposed: tuple[float, ...] = (0.0,) * len(Kind)
    waits: tuple[float, ...] = ()  # exposed seconds by the peer waited for

    @property
    def hidden_s(self) -> float:
        return sum(self.hidden)

    @property
    def exposed_s(self) -> float:
        return sum(self.exposed)

    @property
    def bytes(self) -> float:
        return self.sent_bytes + self.received_bytes

    def spent(self, kind: Kind) -> float:
        return self.hidden[kind] + self.exposed[kind]

    def __add__(self, other: "Total") -> "Total":
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, earlier: "Total") -> "Total":
        return self._with(earlier, lambda a, b: a - b)

    def __mul__(self, factor: float) -> "Total":
        return self._with(self, lambda a, _: a * factor)

    def _with(self, other: "Total", make: Callable[[float, float], float]) -> "Total":
        def each(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
            return tuple(make(x, y) for x, y in zip_longest(a, b, fillvalue=0.0))

        return Total(
            make(self.calls, other.calls),
            make(self.sent_bytes, other.sent_bytes),
            make(self.received_bytes, other.received_bytes),
            each(self.hidden, other.hidden),
            each(self.exposed, other.exposed),
            each(self.waits, other.waits),
        )


Totals = Mapping[Place, Total]


def total(tallies: Iterable[Total]) -> Total:
    return sum(tallies, start=Total())


def since(earlier: Totals, later: Totals) -> dict[Place, Total]:
    """What came to each operation between two snapshots; operations to which nothing came are left out."""
    gained = {place: now - earlier.get(place, Total()) for place, now in later.items()}
    return {place: gain for place, gain in gained.items() if gain.calls or gain.exposed_s or gain.hidden_s}


@dataclass(frozen=True)
class Span:
    """Something that a worker did from one moment to another, for timelines."""

    row: str  # "compute" or "communication", or what the transport likes to have a row of its own
    name: str
    start_s: float  # time.monotonic of the worker's host
    end_s: float
    facts: Mapping[str, float | str] | None = None


class Counters:
    """All that one worker's transports count. ``peers`` names whom it can wait for: its own rank stands among them."""

    live: ClassVar["weakref.WeakSet[Counters]"] = (
        weakref.WeakSet()
    )  # those of this process: what `shoal.comm.record` reads

    def __init__(self, rank: int, peers: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.rank, self.peers, self.clock = rank, tuple(peers), clock
        self.watchers = 0  # recordings under way: while there are any, transports keep the spans of every step
        self.spans: deque[Span] = deque(maxlen=KEPT_SPANS)
        self._tallies: dict[tuple[str, str, int], Tally] = {}
        self.number = next(_numbers)
        self._family = [weakref.ref(self)]  # of a group, and of all that were split off it, or off one of these
        Counters.live.add(self)

    @classmethod
    def of_workers(cls, rank: int, names: Iterable[int]) -> Self:
        """``names``: what the ranks of the group are called among all workers of the run."""
        return cls(rank, [f"rank {name}" for name in names])

    def tally(self, operation: str, link: str) -> Tally:
        """The calling thread's tally of an operation over a kind of link. Keep hold of it: looking it up takes time."""
        key = (operation, link, threading.get_ident())
        if key not in self._tallies:
            self._tallies[key] = Tally(len(self.peers), self)
        return self._tallies[key]

    def tallies(self) -> list[tuple[tuple[str, str, int], Tally]]:
        """((operation, link, thread), tally) of each."""
        return list(self._tallies.items())

    def adopt(self, part: "Counters") -> None:
        """``part`` is what a group counts that was split off this one's. It stays while somebody counts in it."""
        self._family[:] = [*(each for each in self._family if each() is not None), weakref.ref(part)]
        part._family = self._family

    def with_parts(self) -> list["Counters"]:
        """These, and those of all groups that were split off, in the order in which they were made."""
        return [found for each in self._family if (found := each()) is not None]

    def totals(self) -> dict[Place, Total]:
        """How everything stands, over all threads. A tally that is being written may be caught between two numbers."""
        out: dict[Place, Total] = {}
        for (operation, link, _), t in list(self._tallies.items()):
            now = Total(t.calls, t.sent_bytes, t.received_bytes, tuple(t.hidden), tuple(t.exposed), tuple(t.waits))
            out[operation, link] = out.get((operation, link), Total()) + now
        return out
