"""A worker's end of an elastic run: what it is told by the agent, and what it says."""

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from shoal.comm.arena import Arenas
from shoal.comm.group import HostGroup
from shoal.comm.heap import MOST_PARTS, MOST_WORKERS, Heap, heap_file
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.status import SERVERS, Phase, Reporter, StatusBoard
from shoal.comm.wired import WiredGroup
from shoal.elastic.faults import RECOVERING, Fault, Rehearsal
from shoal.elastic.replan import Formation

ROWS = 900  # of the status board; seats take turns on them, and faults have the last ones
_LENGTH = struct.Struct("<I")
_OF_SERVERS = MOST_PARTS // MOST_WORKERS - 1  # the number of the part of an epoch's heap that servers share
_FILES_AT_ONCE = 200  # the kernel passes at most 253 in one message
_LOOKS = (Phase.loading, Phase.forward, Phase.evaluating)  # where a step can be dropped without a trace
DRAINS = {signal.SIGTERM: b"T", signal.SIGUSR1: b"1"}  # signals that ask one worker to leave, and how it passes them on


class Released(Exception):
    """The run goes on, or has ended, without this worker."""


class SeatReporter(Reporter):
    """Says where the worker is; and drops a step whose epoch is over as soon as the worker says something."""

    member = False
    rank = -1  # in the epoch
    rehearsal: Rehearsal | None = None

    def __call__(self, phase: Phase, *, step: int | None = None, shard: int = -1, peer: int = -1) -> None:
        if self.member and phase in _LOOKS and self.board is not None and self.board.broken:
            raise PeerLost("the agent says that a worker has gone")
        if phase in _LOOKS or phase is Phase.updating:
            self.fence()
        super().__call__(phase, step=step, shard=shard, peer=peer)
        if self.rehearsal is not None and self.member:
            self.rehearsal.at(self.rank, self.position.step, phase)

    def fence(self) -> None:
        """Before anything that counts. Raises PeerLost where other hosts may be going on without this one."""
        if self.member and self.board is not None and not self.board.leased(time.monotonic()):
            raise PeerLost("the agent has lost those of the other hosts")


@dataclass(frozen=True)
class Place:
    """A worker's place in an epoch."""

    epoch: int
    steps: tuple[int, ...]  # that each rank holds; FRESH: nothing
    due: bool  # what follows the newest step is still to be done
    cold: bool  # nobody holds anything
    donor: int  # the rank that hands the newest state on
    formation: Formation
    rank: int  # workers come first, then servers
    run: str  # the run directory; "" when there is none yet
    quiet: bool  # all who are not in this epoch any more can write to no memory
    homes: tuple[int, ...]  # the host that each rank lives on; () in a run on one host
    group: HostGroup | WiredGroup  # of all workers; of a server, it alone
    copies: HostGroup | WiredGroup | None  # of several hosts: all, for what these keep of each other

    @property
    def server(self) -> int:
        """Which parameter server this is; below 0: it is a worker."""
        return self.rank - self.formation.workers

    @property
    def first_here(self) -> bool:
        """Of its host's, which share its memory."""
        return self.rank == (self.homes.index(self.homes[self.rank]) if self.homes else 0)

    @property
    def takers(self) -> list[int]:
        return [rank for rank, step in enumerate(self.steps) if step < self.steps[self.donor]]


def send_order(link: socket.socket, order: dict[str, Any], files: list[int]) -> None:
    """From the agent to a worker. Raises OSError when the worker has gone."""
    raw = json.dumps({**order, "files": len(files)}).encode()
    link.sendall(_LENGTH.pack(len(raw)) + raw)
    for start in range(0, len(files), _FILES_AT_ONCE):
        socket.send_fds(link, [b"f"], files[start : start + _FILES_AT_ONCE])


def receive_order(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Raises PeerLost when the agent has gone."""
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    order: dict[str, Any] = json.loads(_exactly(link, length))
    files: list[int] = []
    while len(files) < order["files"]:
        data, got, _, _ = socket.recv_fds(link, 1, _FILES_AT_ONCE)
        if not data:
            raise PeerLost("the agent has gone")
        files += got
    return order, files


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = link.recv(size - len(data))
        if not chunk:
            raise PeerLost("the agent has gone")
        data += chunk
    return data


class Seat:
    """What a worker of an elastic run holds instead of a group: it is given a place in one epoch after the other."""

    def __init__(
        self,
        number: int,
        orders: socket.socket,
        arena: list[int],
        board: StatusBoard,
        say: Callable[[str, Any], None],
        faults: Sequence[Fault] = (),
    ) -> None:
        self.say = say
        self._orders = orders
        self.report = SeatReporter(number % ROWS, os.getpid(), board)
        if faults:
            self.report.rehearsal = Rehearsal(faults, board)
        self._arenas = Arenas(0, arena)
        for file in arena:
            os.close(file)
        self._heap = self.mirror = -1
        self._group: HostGroup | WiredGroup | None = None
        self._epoch = 0
        for asks in DRAINS:
            signal.signal(asks, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.write(self._orders.fileno(), DRAINS[signal.Signals(number)])

    def alone(self) -> HostGroup:
        """A group of this worker only, to build the model in."""
        self._heap = heap_file()
        return self._group_of(0, [None], self._heap, self._arenas)

    def nobody(self) -> HostGroup:
        """A group of this worker only, to load a state in: others are elsewhere, and it has no memory to share."""
        return self._group_of(0, [None], -1, self._arenas)

    def _group_of(self, rank: int, peers: list[socket.socket | None], heap: int, arenas: Arenas) -> HostGroup:
        mesh = Mesh(rank, peers, self.report)
        return HostGroup(rank, len(peers), mesh, self.report, self._emit, heap=Heap(heap), arenas=arenas)

    def _beside_servers(self, rank: int, workers: int, places: list[socket.socket | None], arenas: Arenas) -> HostGroup:
        """Of all workers, with sockets to the servers; of a server alone, with sockets to the workers."""
        others = places[workers:] if rank < workers else places[:workers]
        if rank < workers:
            group = self._group_of(rank, places[:workers], self._heap, arenas.part(range(workers)))
        else:
            group = self._group_of(0, [None], -1, self._arenas)
            for peer in places[workers:]:
                if peer is not None:
                    peer.close()  # servers do not speak to each other
        group.servers = Mesh(-1, others, self.report, first=SERVERS if rank < workers else 0)
        group.server_heap = Heap(self._heap).part(_OF_SERVERS, 0)
        return group

    def ready(self, deepest: int) -> None:
        """The model is built, and can be cut into so many stages; the memory of `alone` has been let go."""
        self._close_heap()
        self.say("ready", deepest)

    def wait(self) -> Place:
        """The next epoch. Raises Released, and PeerLost when the agent has gone."""
        self.report(Phase.starting)
        order, files = receive_order(self._orders)
        if order["kind"] == "release":
            raise Released
        rank, world = order["rank"], len(order["steps"])
        self._heap = files.pop(0)
        if self.mirror >= 0:
            os.close(files.pop(0))  # it has the same memory in all epochs
        else:
            self.mirror = files.pop(0)
        arenas = self._arenas
        if order["arenas"]:
            arenas = arenas.again(rank, files[:world])
            for file in files[:world]:
                os.close(file)
            del files[:world]
        peers = [socket.socket(fileno=file) for file in files]
        places = [*peers[:rank], None, *peers[rank:]]
        workers = world - order["servers"]
        homes: tuple[int, ...] = tuple(order.get("homes", ()))
        copies: HostGroup | WiredGroup | None = None
        if order.get("wired", False):
            everybody = WiredGroup(rank, world, Mesh(rank, places, self.report), self.report, self._emit)
            copies = everybody.split([range(world)])
            self._group = everybody.apart(workers) if order["servers"] else everybody
        elif order["servers"]:
            self._group = self._beside_servers(rank, workers, places, arenas)
        else:
            self._group = group = self._group_of(rank, places, self._heap, arenas)
            copies = group.split([range(world)]) if homes else None
        self._epoch = order["epoch"]
        self.report.member, self.report.rank = True, rank
        if self.report.rehearsal is not None and order["epoch"] > 1:
            self.report.rehearsal.at(rank, max(order["steps"]), RECOVERING)
        return Place(
            epoch=order["epoch"],
            steps=tuple(order["steps"]),
            due=order["due"],
            cold=order["cold"],
            donor=order["donor"],
            formation=Formation(tuple(order["shares"]), order["depth"], order["servers"]),
            rank=rank,
            run=order["run"],
            quiet=order["quiet"],
            homes=homes,
            group=self._group,
            copies=copies,
        )

    def hang_up(self) -> None:
        """No message of the epoch is sent or taken any more, and its memory is let go of."""
        self.report.member = False
        if self._group is not None:
            self._group.mesh.close()
            if self._group.servers is not None:
                self._group.servers.close()
            self._group = None
        self._close_heap()

    def accuse(self, why: str) -> NoReturn:
        """This worker is at fault: it commits nothing any more, and waits for its end."""
        self.say("accused", why)
        while True:
            signal.pause()

    def left(self, step: int, due: bool) -> None:
        self.say("left", (step, due))

    def went(self, step: int, shards: dict[str, int]) -> None:
        """The epoch's first step has been committed; ``shards``: how many were kept, and done again."""
        self.say("went", (self._epoch, step, shards))

    def _emit(self, event: Any) -> None:
        self.say("event", event)

    def _close_heap(self) -> None:
        if self._heap >= 0:
            os.close(self._heap)
            self._heap = -1
