"""Workers of several hosts whose agents gave them a socket to each other one: groups that can be abandoned at once.

The exchange is that of shoal.comm.distributed, its two collectives carried by plain messages. gloo cannot give up a
collective that a lost peer never ends; of these sockets the agent keeps a second handle, and shuts them down when the
epoch is over: whoever waits on one raises PeerLost.
"""

import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from shoal.comm.accounting.counters import Counters
from shoal.comm.distributed import DistributedExchange, DistributedGroup
from shoal.comm.exchange import Terms
from shoal.comm.group import Partition, gather_over
from shoal.comm.mesh import Mesh
from shoal.comm.status import Reporter
from shoal.errors import UserError

_PIECE = 6  # message kind, on lanes of its own


@dataclass
class WiredGroup:
    """See Group. ``mesh`` has a socket to every worker, of this host and of others."""

    rank: int
    world: int
    mesh: Mesh
    report: Reporter
    emit: Callable[[Any], None]
    host: str = field(default_factory=socket.gethostname)
    names: tuple[int, ...] = ()  # what its ranks are called among all workers of the run; () for all of them
    parts: "count[int]" = field(default_factory=lambda: count(1))  # channels that are still free
    _sequence: int = 0

    def __post_init__(self) -> None:
        self.names = self.names or tuple(range(self.world))
        self.counters = Counters.of_workers(self.rank, self.names)
        self._gathers = self.counters.tally("gather", "sockets")

    def gather(self, payload: bytes) -> list[bytes]:
        self._sequence += 1
        return gather_over(self.mesh, self._sequence, payload, self.counters, self._gathers)

    def split(self, partition: Partition) -> "WiredGroup":
        numbers = [next(self.parts) for _ in partition]  # all count alike, also those that are in another part
        part, number = next((p, n) for p, n in zip(partition, numbers, strict=True) if self.rank in p)
        names = tuple(self.names[rank] for rank in part)
        mesh = self.mesh.part(part, number)
        made = replace(self, rank=part.index(self.rank), world=len(part), mesh=mesh, names=names, _sequence=0)
        self.counters.adopt(made.counters)
        return made

    @property
    def stop_asked(self) -> bool:
        return self.report.board is not None and self.report.board.stop_asked

    def explained(self, action: str) -> AbstractContextManager[None]:
        """A lost peer is no failure here: PeerLost goes through as it is."""
        return nullcontext()


class WiredExchange(DistributedExchange):
    """Workers with processors, `sync = "exact"`. Raises PeerLost."""

    def __init__(self, group: WiredGroup, terms: Terms) -> None:
        if terms.device.type != "cpu" or terms.placement.fast:
            raise UserError("elastic workers of several hosts train on processors, with sync = 'exact'.")
        super().__init__(cast(DistributedGroup, group), terms)

    def _open_lanes(self, group: DistributedGroup) -> None:
        """Facts, scatters and results are taken in another order than they are sent in: a channel for each."""
        self._facts_lane, self._scatters_lane, self._results_lane = (
            _Lane(cast(Mesh, cast(Any, group.split([range(group.world)])).mesh)) for _ in range(3)
        )

    def _link(self, device: torch.device) -> str:
        return "sockets"

    def _all_gather(self, whole: torch.Tensor, own: torch.Tensor, *, result: bool) -> dist.Work:
        lane = self._results_lane if result else self._facts_lane
        rows = whole.view(lane.mesh.world, -1)
        return lane.exchange(dict.fromkeys(lane.mesh.others, own), own, dict(enumerate(rows)))

    def _all_to_all(
        self, out: torch.Tensor, data: torch.Tensor, received: list[int], sent: list[int]
    ) -> dist.Work:  # fmt: skip
        lane = self._scatters_lane
        rooms = {rank: room for rank, room in enumerate(torch.split(out, received)) if len(room)}
        pieces = {rank: piece for rank, piece in enumerate(torch.split(data, sent)) if len(piece)}
        return lane.exchange(pieces, pieces.pop(lane.mesh.rank, data[:0]), rooms)

    def _start_cost(self, device: torch.device) -> float:
        own, everybody = torch.zeros(1), torch.zeros(self._group.world)

        def once() -> float:
            begun = self.account.now()
            self._all_gather(everybody, own, result=False).wait()
            return self.account.now() - begun

        return min(once() for _ in range(3))


class _Lane:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._sequence = 0

    def exchange(
        self, pieces: Mapping[int, torch.Tensor], own: torch.Tensor, rooms: Mapping[int, torch.Tensor]
    ) -> dist.Work:
        """Send each peer its piece, keep the own one, and have those of peers come into their rooms."""
        self._sequence += 1
        if self.mesh.rank in rooms:
            rooms[self.mesh.rank].copy_(own)
        for rank, piece in pieces.items():
            self.mesh.send(rank, _PIECE, self._sequence, _raw(piece).data)
        peers = {rank: room for rank, room in rooms.items() if rank != self.mesh.rank}
        return cast(dist.Work, _Arrival(self.mesh, self._sequence, peers))


class _Arrival:
    """Pieces on their way: what an exchange asks of torch.distributed's Work."""

    def __init__(self, mesh: Mesh, sequence: int, rooms: dict[int, torch.Tensor]) -> None:
        self._mesh, self._sequence, self._rooms = mesh, sequence, rooms

    def is_completed(self) -> bool:
        for rank in list(self._rooms):
            raw = self._mesh.take(rank, _PIECE, self._sequence)
            if raw is None:
                return False
            self._fill(rank, raw)
        return True

    def wait(self) -> None:
        for rank in list(self._rooms):
            self._fill(rank, self._mesh.receive(rank, _PIECE, self._sequence))

    def _fill(self, rank: int, raw: bytes) -> None:
        _raw(self._rooms.pop(rank))[:] = np.frombuffer(raw, dtype=np.uint8)


def _raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()
