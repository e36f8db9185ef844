"""What every worker of a host is doing right now, in a shared page: so that a hang can be explained, not timed out."""

import mmap
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

_ROW = struct.Struct("<qqqqqq")  # step, phase, shard, peer, since (monotonic ns), pid
_NOTE = struct.Struct("<d")
_STRIDE = 64  # a cache line a worker
_TRAIL = 512  # changes of phase that a worker remembers
_STOP = 0  # byte 0: somebody asked the run to stop after the step in flight
_CHANGE = 1  # byte 1: other workers go on after the step in flight
_BROKEN = 2  # byte 2: a worker has been lost, and the step in flight with it
_LEASE = 8  # bytes 8 to 15: until when workers may commit (time.monotonic()); 0.0: as long as they live


SERVERS = 1 << 20  # peers from here on are parameter servers, not workers
ANYBODY = -1  # waiting for whoever speaks first


def peer_name(peer: int) -> str:
    if peer == ANYBODY:
        return "its workers"
    return f"server {peer - SERVERS}" if peer >= SERVERS else f"rank {peer}"


class Phase(IntEnum):
    starting = 0
    building = 1
    loading = 2
    forward = 3
    backward = 4
    exchanging = 5
    waiting = 6
    updating = 7
    evaluating = 8
    saving = 9
    ended = 10


@dataclass(frozen=True)
class Position:
    """Where a worker stood when it last said so."""

    rank: int
    step: int
    phase: Phase
    shard: int  # -1: none
    peer: int  # phase waiting: the rank waited for
    since_s: float  # time.monotonic()
    pid: int

    def __str__(self) -> str:
        where = f"step {self.step}, " if self.step >= 0 else ""
        if self.phase is Phase.waiting:
            return f"{where}waiting for {peer_name(self.peer)}"
        return f"{where}{self.phase.name}{f' shard {self.shard}' if self.shard >= 0 else ''}"


class StatusBoard:
    """A page that all workers of a host and their agent map; each worker writes its own row."""

    SIZE = 64 * 1024  # room for 1023 workers

    def __init__(self, file: int, workers: int) -> None:
        self.workers = workers
        self._page = mmap.mmap(file, self.SIZE)

    def close(self) -> None:
        self._page.close()

    def write(self, position: Position) -> None:
        p = position
        row = (p.step, int(p.phase), p.shard, p.peer, int(p.since_s * 1e9), p.pid)
        _ROW.pack_into(self._page, (1 + p.rank) * _STRIDE, *row)

    def read(self, rank: int) -> Position:
        step, phase, shard, peer, since, pid = _ROW.unpack_from(self._page, (1 + rank) * _STRIDE)
        return Position(rank, step, Phase(phase), shard, peer, since / 1e9, pid)

    def note(self, index: int, moment: float) -> None:
        """Keep a moment (time.monotonic()) in one of the last rows, ``index`` from the end."""
        _NOTE.pack_into(self._page, self.SIZE - (1 + index) * _STRIDE, moment)

    def noted(self, index: int) -> float:
        """0.0 where nothing has been noted."""
        moment: float = _NOTE.unpack_from(self._page, self.SIZE - (1 + index) * _STRIDE)[0]
        return moment

    def all(self) -> list[Position]:
        return [self.read(rank) for rank in range(self.workers)]

    @property
    def stop_asked(self) -> bool:
        return self._page[_STOP] != 0

    def ask_stop(self) -> None:
        self._page[_STOP] = 1

    @property
    def change_asked(self) -> bool:
        return self._page[_CHANGE] != 0

    def ask_change(self, asked: bool) -> None:
        self._page[_CHANGE] = asked

    @property
    def broken(self) -> bool:
        return self._page[_BROKEN] != 0

    def call_broken(self, broken: bool) -> None:
        self._page[_BROKEN] = broken

    def lease(self, until: float) -> None:
        _NOTE.pack_into(self._page, _LEASE, until)

    def leased(self, now: float) -> bool:
        """Whether what is done now can count: the agents of the other hosts surely do not go on without this one."""
        until: float = _NOTE.unpack_from(self._page, _LEASE)[0]
        return not until or now < until


class Reporter:
    """One worker's hand on its status; without a board (a worker started by others) it only remembers."""

    def __init__(
        self, rank: int, pid: int, board: StatusBoard | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.board, self._clock = board, clock
        self.position = Position(rank, -1, Phase.starting, -1, -1, clock(), pid)
        self.seconds = [0.0] * len(Phase)  # spent in each phase, up to the last change
        self.trail: deque[tuple[Phase, float]] = deque(maxlen=_TRAIL)  # the newest changes: to what, when
        self._write()

    def __call__(self, phase: Phase, *, step: int | None = None, shard: int = -1, peer: int = -1) -> None:
        old = self.position
        now = self._clock()
        self.seconds[old.phase] += now - old.since_s
        self.trail.append((phase, now))
        self.position = Position(old.rank, old.step if step is None else step, phase, shard, peer, now, old.pid)
        self._write()

    @property
    def change_asked(self) -> bool:
        return self.board is not None and self.board.change_asked

    def _write(self) -> None:
        if self.board:
            self.board.write(self.position)
