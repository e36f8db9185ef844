"""The Group: what a worker knows of the others, and the small collectives over it."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.comm.heap import Heap
from shoal.comm.mesh import Mesh
from shoal.comm.status import Reporter

_GATHER = 1  # message kind; the exchange uses the kinds above


class Group(Protocol):
    """The workers of one run. Every collective is called by all of them, in the same order."""

    rank: int
    world: int
    host: str
    report: Reporter

    def gather(self, payload: bytes) -> list[bytes]:
        """Every worker's payload, by rank, on every worker."""

    def emit(self, message: Any) -> None:
        """Hand a message to whoever started the workers (rank 0's listener)."""

    @property
    def stop_asked(self) -> bool:
        """Somebody asked this worker to end the run after the step in flight."""


@dataclass
class HostGroup:
    """Workers that one agent forked on this host: sockets for words, the heap for numbers."""

    rank: int
    world: int
    mesh: Mesh
    heap: Heap
    report: Reporter
    emit: Callable[[Any], None]
    host: str = field(default_factory=socket.gethostname)
    _sequence: int = 0

    def gather(self, payload: bytes) -> list[bytes]:
        self._sequence += 1
        self.mesh.broadcast(_GATHER, self._sequence, payload)
        return [
            payload if rank == self.rank else self.mesh.receive(rank, _GATHER, self._sequence)
            for rank in range(self.world)
        ]

    @property
    def stop_asked(self) -> bool:
        return self.report.board is not None and self.report.board.stop_asked
