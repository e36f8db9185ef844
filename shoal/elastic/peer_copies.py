"""Copies of what one worker alone holds, in the memory of another host; and how a step is put together from them.

After each step every worker sends what it has mirrored to a worker of another host, its *keeper*, which writes it into
its own host's memory: any one host may be lost, with its agent, its workers and its memory. A worker posts its part of
the next step only when it has all of its *wards'* copies. So whoever has ended that step's exchange knows that the step
before it is there twice, and may write over the one before that. A parameter server answers for an update once its
keeper has said that it has the copy.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.comm.group import SocketGroup
from shoal.comm.mesh import Mesh
from shoal.elastic.mirror import Kept, Mirror
from shoal.elastic.mirror_regions import Packed, Pen
from shoal.elastic.transfer import PIECE

_COPY, _KEPT = 10, 11  # message kinds
_HEAD = struct.Struct("<qqq")  # bytes of the table (-1: as before), of the facts, of the numbers


def keepers(homes: Sequence[int]) -> list[int | None]:
    """Of each rank, the rank that keeps its copy: on another host; None where all live on one. ``homes``: the host of
    each rank. A host's workers spread theirs over the others, so that whoever goes on has about as much to take."""
    hosts = sorted(set(homes))
    if len(hosts) < 2:
        return [None] * len(homes)
    here = {host: [rank for rank, home in enumerate(homes) if home == host] for host in hosts}
    found: list[int | None] = []
    for rank, home in enumerate(homes):
        place = here[home].index(rank)
        other = hosts[(hosts.index(home) + 1 + place % (len(hosts) - 1)) % len(hosts)]
        found.append(here[other][place // (len(hosts) - 1) % len(here[other])])
    return found


class PeerCopies:
    """Of one process in one epoch. ``group`` is a part of its own, so that copies are not among other words; the last
    ranks of it are ``servers``."""

    def __init__(self, mirror: Mirror, group: SocketGroup, homes: Sequence[int], *, servers: int = 0) -> None:
        self._mirror, self._mesh, rank = mirror, group.mesh, group.rank
        keeps = keepers(homes)
        self._keeper = keeps[rank]
        self.wards = [ward for ward, keeper in enumerate(keeps) if keeper == rank]
        here = {each for each, home in enumerate(homes) if home == homes[rank]}
        kept = here | {ward for ward, keeper in enumerate(keeps) if keeper in here}
        self.elsewhere = [each for each in range(group.world) if each not in kept]
        self._servers = range(group.world - servers, group.world)
        self._sent = b""  # the last table
        self._tables: dict[int, bytes] = {}

    def send(self, step: int, written: Packed) -> None:
        """Raises PeerLost."""
        if self._keeper is not None:
            _send(self._mesh, self._keeper, step, written, known=written.table == self._sent)
            self._sent = written.table

    def take(self, step: int) -> None:
        """What wards have sent; waits for it. Raises PeerLost."""
        for ward in self.wards:
            table, facts, size = _head(self._mesh, ward, step)
            self._tables[ward] = table = self._tables[ward] if table is None else table
            room = self._mirror.take(ward, step, table, facts, size)
            _numbers(self._mesh, ward, step, room)
            self._mirror.taken(ward, step)
            if ward in self._servers:
                self._mesh.send(ward, _KEPT, step)

    def acknowledged(self, step: int) -> None:
        """Of a server: waits until its keeper has the copy. Raises PeerLost."""
        if self._keeper is not None:
            self._mesh.receive(self._keeper, _KEPT, step)


# --- a step put together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The step that all go on from, of the epoch that has made it."""

    epoch: int
    world: int
    step: int


@dataclass(frozen=True)
class Move:
    """What a rank held goes from one worker to another one, of a host that lacks it."""

    rank: int
    origin: int
    to: int


def newest(inventories: Sequence[Sequence[Kept]]) -> Found | None:
    """The newest step of which what every worker held is somewhere."""
    there: dict[Found, set[int]] = {}
    for inventory in inventories:
        for kept in inventory:
            there.setdefault(Found(kept.epoch, kept.world, kept.step), set()).add(kept.rank)
    whole = [found for found, ranks in there.items() if len(ranks) == found.world]
    return max(whole, key=lambda found: (found.step, found.epoch), default=None)


def moves(found: Found, inventories: Sequence[Sequence[Kept]], homes: Sequence[int]) -> list[Move]:
    """What has to be sent so that every host has all of it: the first worker of each takes it for the others.

    ``inventories`` are those of the ranks' hosts. Whoever has a copy sends about as much as another one."""
    holders: dict[int, list[int]] = {rank: [] for rank in range(found.world)}
    for place, inventory in enumerate(inventories):
        for kept in inventory:
            if (kept.epoch, kept.step) == (found.epoch, found.step):
                holders[kept.rank].append(place)
    made: list[Move] = []
    load = [0] * len(homes)
    for rank, places in holders.items():
        there = {homes[place] for place in places}
        for host in sorted(set(homes) - there):
            origin = min(places, key=lambda place: (load[place], place))
            load[origin] += 1
            made.append(Move(rank, origin, homes.index(host)))
    return made


def replenish(mirror: Mirror, group: SocketGroup, homes: Sequence[int], due: int) -> tuple[int, bool] | None:
    """Called by all workers of a new epoch: afterwards the memory of each host has the newest step that there is of all
    workers of an older one. That step, and whether what follows it is ``due``, which each worker says of one step; None
    where too much was lost. Raises PeerLost."""
    mine = [[kept.epoch, kept.world, kept.rank, kept.step] for kept in mirror.inventory()]
    rows = [json.loads(row) for row in group.gather(json.dumps([mine, due]).encode())]
    inventories = [[Kept(*kept) for kept in row[0]] for row in rows]
    found = newest(inventories)
    if found is None:
        return None
    todo = moves(found, inventories, homes)
    own = group.rank == homes.index(homes[group.rank])
    missing = [move.rank for move in todo if move.to == group.rank]
    pens = mirror.adopt(found.epoch, found.world, found.step, missing) if own else {}
    for move in todo:
        if move.origin == group.rank:
            kept = Kept(found.epoch, found.world, move.rank, found.step)
            _send(group.mesh, move.to, found.step, mirror.packed(kept), known=False)
        if move.to == group.rank:
            _receive(group.mesh, move.origin, found.step, pens[move.rank])
    group.gather(b"")  # whoever sends has read
    if own:
        mirror.adopted(found.epoch, found.step)
    group.gather(b"")
    return found.step, any(row[1] == found.step for row in rows)


# --- on the way -----------------------------------------------------------------------------------------------------


def _send(mesh: Mesh, to: int, step: int, region: Packed, *, known: bool) -> None:
    """``known``: the table is that of the last one."""
    table, size = b"" if known else region.table, len(region.numbers)
    head = _HEAD.pack(-1 if known else len(table), len(region.facts), size)
    mesh.send(to, _COPY, step, head + table + region.facts)
    for start in range(0, size, PIECE):
        mesh.send(to, _COPY, step, region.numbers[start : start + PIECE])


def _head(mesh: Mesh, origin: int, step: int) -> tuple[bytes | None, bytes, int]:
    raw = mesh.receive(origin, _COPY, step)
    table, facts, size = _HEAD.unpack_from(raw)
    start = _HEAD.size + max(0, table)
    return (raw[_HEAD.size : start] if table >= 0 else None), raw[start : start + facts], size


def _numbers(mesh: Mesh, origin: int, step: int, room: memoryview) -> None:
    for start in range(0, len(room), PIECE):
        room[start : start + PIECE] = mesh.receive(origin, _COPY, step)


def _receive(mesh: Mesh, origin: int, step: int, pen: Pen) -> None:
    table, facts, size = _head(mesh, origin, step)
    assert table is not None
    _numbers(mesh, origin, step, pen.take(table, facts, size))
