"""The Group: what a worker knows of the others, and the small collectives over it."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

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
class HostGroup:
    """Workers that one agent forked on this host: sockets for words, heap and arenas for numbers."""

    rank: int
    world: int
    mesh: Mesh
    heap: Heap
    arenas: Arenas
    report: Reporter
    emit: Callable[[Any], None]
    host: str = field(default_factory=socket.gethostname)
    servers: Mesh | None = None  # sockets to parameter servers, in runs that have some
    server_heap: Heap | None = None  # memory shared with them
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

    def split(self, partition: Partition) -> "HostGroup":
        numbers = [next(self.parts) for _ in partition]  # all count alike, also those that are in another part
        part, number = next((p, n) for p, n in zip(partition, numbers, strict=True) if self.rank in p)
        names = tuple(self.names[rank] for rank in part)
        made = replace(
            self,
            rank=part.index(self.rank),
            world=len(part),
            mesh=self.mesh.part(part, number),
            heap=self.heap.part(number, min(names)),
            arenas=self.arenas.part(part),
            names=names,
            servers=None,
            server_heap=None,
            _sequence=0,
        )
        self.counters.adopt(made.counters)
        return made

    @property
    def stop_asked(self) -> bool:
        return self.report.board is not None and self.report.board.stop_asked
