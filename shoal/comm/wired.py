"""Workers of several hosts whose agents gave them a socket to each other one: groups that can be abandoned at once.

The exchanges are those of torch.distributed, over lanes that are carried by plain messages. gloo cannot give up a
collective that a lost peer never ends; of these sockets the agent keeps a second handle, and shuts them down when the
epoch is over: whoever waits on one raises PeerLost.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shoal.comm.group import Partition, SocketGroup
from shoal.comm.lanes import Work, each_of
from shoal.comm.mesh import Mesh
from shoal.comm.status import SERVERS

_PIECE, _ALONE = 6, 7  # message kinds, on lanes of their own


@dataclass
class WiredGroup(SocketGroup):
    """See Group. ``mesh`` has a socket to every worker, of this host and of others."""

    servers: Mesh | None = field(default=None, kw_only=True)  # to parameter servers; of a server, to the workers

    def split(self, partition: Partition) -> "WiredGroup":
        made = self._split(partition)[0]
        made.servers = None
        return made

    def apart(self, workers: int) -> "WiredGroup":
        """Of workers and then servers: all workers, with a way to each server; or a server alone, with a way to each
        worker. The last part that is made of this group."""
        made = self.split([range(workers), *([server] for server in range(workers, self.world))])
        serves = self.rank >= workers
        others = range(workers) if serves else range(workers, self.world)
        made.servers = self.mesh.across(others, next(self.parts), first=0 if serves else SERVERS)
        return made

    def lane(self, *, shared: bool = False) -> "WiredLane":
        return WiredLane(self.split([range(self.world)]).mesh)

    def explained(self, action: str) -> AbstractContextManager[None]:
        """A lost peer is no failure here: PeerLost goes through as it is."""
        return nullcontext()


class WiredLane:
    """See Lane. Raises PeerLost. What comes is taken in the order in which it was asked for, whoever waits for what."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sequence = 0
        self._due: deque[_Arrival] = deque()

    def link(self, device: torch.device) -> str:
        return "sockets"

    def all_gather(self, whole: Tensor, own: Tensor) -> Work:
        rows = dict(enumerate(whole.view(self._mesh.world, -1)))
        return self._exchange(dict.fromkeys(self._mesh.others, own), own, rows)

    def all_to_all(self, out: Tensor, data: Tensor, received: list[int], sent: list[int]) -> Work:
        pieces = each_of(data, sent)
        return self._exchange(pieces, pieces.pop(self._mesh.rank, data[:0]), each_of(out, received))

    def send(self, data: Tensor, to: int) -> None:
        self._mesh.send(to, _ALONE, 0, _raw(data).data)

    def receive(self, out: Tensor, origin: int) -> None:
        _fill(out, self._mesh.receive(origin, _ALONE, 0))

    def _exchange(self, pieces: Mapping[int, Tensor], own: Tensor, rooms: dict[int, Tensor]) -> Work:
        """Send each peer its piece, keep the own one, and have those of peers come into their rooms."""
        self._sequence += 1
        kept = rooms.pop(self._mesh.rank, None)
        if kept is not None:
            kept.copy_(own)
        for rank, piece in pieces.items():
            self._mesh.send(rank, _PIECE, self._sequence, _raw(piece).data)
        self._due.append(_Arrival(self, self._sequence, rooms))
        return self._due[-1]

    def advance(self, arrival: "_Arrival", *, wait: bool) -> bool:
        """Whether all of it is here."""
        while arrival.rooms:
            first = self._due[0]
            for rank in list(first.rooms):
                asked = self._mesh.receive if wait else self._mesh.take
                raw = asked(rank, _PIECE, first.sequence)
                if raw is None:
                    return False
                _fill(first.rooms.pop(rank), raw)
            self._due.popleft()
        return True


class _Arrival:
    """Pieces on their way into ``rooms``, by rank."""

    def __init__(self, lane: WiredLane, sequence: int, rooms: dict[int, Tensor]) -> None:
        self._lane, self.sequence, self.rooms = lane, sequence, rooms

    def is_completed(self) -> bool:
        return self._lane.advance(self, wait=False)

    def wait(self) -> None:
        self._lane.advance(self, wait=True)


def _raw(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def _fill(room: Tensor, raw: bytes) -> None:
    _raw(room)[:] = np.frombuffer(raw, dtype=np.uint8)
