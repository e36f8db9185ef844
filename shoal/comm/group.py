"""The Group: what a worker knows of the others, and the small collectives over it."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol, Self

from shoal.comm.accounting.account import stand
from shoal.comm.accounting.counters import Counters, Tally
from shoal.comm.arena import Arenas
from shoal.comm.heap import Heap
from shoal.comm.mesh import Mesh
from shoal.comm.status import Reporter

Partition = Sequence[Sequence[int]]  # of the ranks of a group: each is in one part

_GATHER = 1  # message kind; the exchange uses the kinds above


class Group(Protocol):
    """The workers of one run. Every collective is called by all of them, in the same order."""

    rank: int
    world: int
    host: str
    report: Reporter
    counters: Counters  # what this worker's transports have done

    def gather(self, payload: bytes) -> list[bytes]:
        """Every worker's payload, by rank, on every worker."""

    def split(self, partition: "Partition") -> "Group":
        """The part that this worker is in, as a group of its own: ranks are places in the part.

        Called by all workers of the group, with the same partition, as often as each other."""

    def emit(self, message: Any) -> None:
        """Hand a message to whoever started the workers (rank 0's listener)."""

    @property
    def stop_asked(self) -> bool:
        """Somebody asked this worker to end the run after the step in flight."""


def gather_over(mesh: Mesh, sequence: int, payload: bytes, counters: Counters, tally: Tally) -> list[bytes]:
    """Every worker's payload, by rank. Raises PeerLost."""
    mesh.broadcast(_GATHER, sequence, payload)
    found = [payload] * mesh.world
    now = counters.clock()
    for rank in mesh.others:
        asked = now
        found[rank] = mesh.receive(rank, _GATHER, sequence)
        now = counters.clock()
        stand(tally, asked, now, rank, now)
    tally.call(sent=len(payload) * (mesh.world - 1), received=sum(map(len, found)) - len(payload))
    return found


@dataclass
class SocketGroup:
    """Workers that have a socket to each other one, whether of one host or of several."""

    rank: int
    world: int
    mesh: Mesh
    report: Reporter
    emit: Callable[[Any], None]
    host: str = field(default_factory=socket.gethostname)
    parts: "count[int]" = field(default_factory=lambda: count(1))  # numbers of heaps and channels that are still free
    names: tuple[int, ...] = ()  # what its ranks are called among all workers of the run; () for all of them
    _sequence: int = 0

    def __post_init__(self) -> None:
        self.names = self.names or tuple(range(self.world))
        self.counters = Counters.of_workers(self.rank, self.names)
        self._gathers = self.counters.tally("gather", "sockets")

    def gather(self, payload: bytes) -> list[bytes]:
        self._sequence += 1
        return gather_over(self.mesh, self._sequence, payload, self.counters, self._gathers)

    def _split(self, partition: Partition) -> tuple[Self, Sequence[int], int]:
        """The part that this worker is in, which ranks of this group it has, and the number that is its alone."""
        numbers = [next(self.parts) for _ in partition]  # all count alike, also those that are in another part
        part, number = next((p, n) for p, n in zip(partition, numbers, strict=True) if self.rank in p)
        made = replace(
            self,
            rank=part.index(self.rank),
            world=len(part),
            mesh=self.mesh.part(part, number),
            names=tuple(self.names[rank] for rank in part),
            _sequence=0,
        )
        self.counters.adopt(made.counters)
        return made, part, number

    @property
    def stop_asked(self) -> bool:
        return self.report.board is not None and self.report.board.stop_asked


@dataclass
class HostGroup(SocketGroup):
    """Workers that one agent forked on this host: sockets for words, heap and arenas for numbers."""

    heap: Heap = field(kw_only=True)
    arenas: Arenas = field(kw_only=True)
    servers: Mesh | None = field(default=None, kw_only=True)  # sockets to parameter servers, in runs that have some
    server_heap: Heap | None = field(default=None, kw_only=True)  # memory shared with them

    def split(self, partition: Partition) -> "HostGroup":
        made, part, number = self._split(partition)
        made.heap, made.arenas = self.heap.part(number, min(made.names)), self.arenas.part(part)
        made.servers = made.server_heap = None
        return made
