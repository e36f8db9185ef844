"""The network between hosts that this machine plays, and what may go wrong on it: ways that are slow, lose or are cut.

A *way* leads from one host to another one; the way back is another one. `Relay` is a process's own: every connection
between two agents, and between two workers of theirs, goes through it. `shoal.elastic.namespaces` has real ones.
"""

import errno
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Protocol

Address = tuple[str, int]
HELD = 1 << 20  # bytes of one direction that are under way: a sender is not read from beyond
LATE_S = 0.2  # by how much a segment is late that was lost: TCP sends it again after so long (RFC 6298, in practice)
LOOK_S = 0.05  # between two looks whether a host whose door was closed is there again
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Trouble:
    """Of a way. ``loss``: the share of segments; what TCP makes of one that is lost is a delay."""

    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False


class Network(Protocol):
    def addresses(self, number: int) -> tuple[Address, ...]:
        """Of all agents, as the one with this number sees them."""

    def within(self, number: int) -> Sequence[str]:
        """A command that runs another one on this host."""

    def trouble(self, host: int, *, out: Trouble, into: Trouble) -> None:
        """On all ways that lead from this host, and to it, from now on."""

    def close(self) -> None: ...


def free_addresses(count: int) -> tuple[Address, ...]:
    """Of this machine's loopback."""
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(("127.0.0.1", door.getsockname()[1]) for door in doors)


class Direct:
    """Loopback as it is: nothing can go wrong on it."""

    def __init__(self, hosts: int) -> None:
        self._addresses = free_addresses(hosts)

    def addresses(self, number: int) -> tuple[Address, ...]:
        return self._addresses

    def within(self, number: int) -> Sequence[str]:
        return ()

    def trouble(self, host: int, *, out: Trouble, into: Trouble) -> None:
        raise NotImplementedError("this network has no troubles")

    def close(self) -> None: ...


@dataclass
class _Stream:
    """One direction of a connection, and what is under way on it."""

    source: socket.socket
    sink: socket.socket
    way: tuple[int, int]
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)  # when it is due; b"": the end
    size: int = 0
    last_s: float = 0.0
    ended: bool = False  # the source says no more
    closed: bool = False  # and the sink has heard it


@dataclass
class _Door:
    """Where host ``way[0]`` finds host ``way[1]``. Its port stays taken while it is closed."""

    way: tuple[int, int]
    socket: socket.socket
    open: bool = False

    @property
    def address(self) -> Address:
        found: Address = self.socket.getsockname()
        return found


class Relay:
    """A thread that hands on what hosts say to each other, on loopback.

    A door is closed as long as nobody listens behind it, so that the end of an agent is seen through it as without."""

    def __init__(self, hosts: int, seed: int = 0) -> None:
        self._real = free_addresses(hosts)
        self._random = random.Random(seed)
        self._troubles: dict[tuple[int, int], Trouble] = {}
        self._pairs: list[tuple[_Stream, _Stream]] = []
        self._held: list[tuple[_Door, socket.socket]] = []  # connections that a cut keeps from being made
        self._doors: dict[tuple[int, int], _Door] = {}
        for a in range(hosts):
            for b in range(hosts):
                if a != b:
                    self._doors[a, b] = _Door((a, b), _bound())
        self._looked_s = 0.0
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="shoal-relay", daemon=True)
        self._thread.start()

    def addresses(self, number: int) -> tuple[Address, ...]:
        found = list(self._real)
        for (a, b), door in self._doors.items():
            if a == number:
                found[b] = door.address
        return tuple(found)

    def within(self, number: int) -> Sequence[str]:
        return ()

    def trouble(self, host: int, *, out: Trouble, into: Trouble) -> None:
        for a, b in self._doors:
            if host in (a, b):
                self._troubles[a, b] = out if a == host else into

    def close(self) -> None:
        self._ends = True
        self._thread.join()
        for streams in self._pairs:
            self._drop(streams)
        for door in self._doors.values():
            door.socket.close()
        for _, stranger in self._held:
            stranger.close()

    # --- the loop ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ends:
            self._wait()
            now = time.monotonic()
            for door in self._doors.values():
                self._accept(door)
            held, self._held = self._held, []
            for door, stranger in held:
                self._connect(door, stranger)
            for streams in list(self._pairs):
                try:
                    alive = [self._go_on(stream, now) for stream in streams]
                except OSError:
                    alive = [False, False]
                if not any(alive):
                    self._drop(streams)
                    self._pairs.remove(streams)
            if now - self._looked_s > LOOK_S:
                self._looked_s = now
                self._look()

    def _wait(self) -> None:
        with selectors.DefaultSelector() as asked:
            limit, wanted = LOOK_S, dict[socket.socket, int]()
            now = time.monotonic()
            for door in self._doors.values():
                if door.open:
                    wanted[door.socket] = selectors.EVENT_READ
            for stream in (each for streams in self._pairs for each in streams):
                if not stream.ended and stream.size < HELD:
                    wanted[stream.source] = wanted.get(stream.source, 0) | selectors.EVENT_READ
                if stream.waiting and not self._is_cut(stream.way):
                    due = stream.waiting[0][0] - now
                    if due > 0:
                        limit = min(limit, due)
                    else:
                        wanted[stream.sink] = wanted.get(stream.sink, 0) | selectors.EVENT_WRITE
            for each, events in wanted.items():
                asked.register(each, events)
            asked.select(limit)

    def _look(self) -> None:
        """Closed doors follow those behind them, but for those that a cut lies before. Whoever is behind an open one is
        not asked: that would take up the few strangers that an agent has time for."""
        for door in self._doors.values():
            if not door.open and not self._is_cut(door.way) and not self._is_cut(door.way[::-1]):
                self._follow(door)

    def _follow(self, door: _Door) -> None:
        there = self._reach(door.way[1])
        if there is not None:
            there.close()
        if there is None and door.open:
            door.socket.shutdown(socket.SHUT_RDWR)  # who knocks is refused
        elif there is not None and not door.open:
            door.socket.listen(64)
        door.open = there is not None

    def _reach(self, host: int) -> socket.socket | None:
        try:
            return socket.create_connection(self._real[host], timeout=1.0)
        except OSError:
            return None

    def _is_cut(self, way: tuple[int, int]) -> bool:
        return self._troubles.get(way, Trouble()).cut

    # --- connections ------------------------------------------------------------------------------------------

    def _accept(self, door: _Door) -> None:
        with suppress(BlockingIOError):
            while door.open:
                self._connect(door, door.socket.accept()[0])

    def _connect(self, door: _Door, stranger: socket.socket) -> None:
        if self._is_cut(door.way) or self._is_cut(door.way[::-1]):
            self._held.append((door, stranger))
            return
        behind = self._reach(door.way[1])
        if behind is None:
            self._follow(door)
            stranger.close()
            return
        for end in (stranger, behind):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append((_Stream(stranger, behind, door.way), _Stream(behind, stranger, door.way[::-1])))

    def _go_on(self, stream: _Stream, now: float) -> bool:
        """Whether there is anything left to be done on it. Raises OSError when an end has gone."""
        if not stream.ended and stream.size < HELD:
            with suppress(BlockingIOError):
                chunk = self._read(stream)
                stream.ended = not chunk
                if not chunk and not self._is_cut(stream.way):
                    self._follow(self._doors[stream.way[::-1]])  # before the other end asks again
                stream.last_s = max(stream.last_s, now + self._takes(stream.way))
                stream.waiting.append((stream.last_s, chunk))
                stream.size += len(chunk)
        while stream.waiting and stream.waiting[0][0] <= now and not self._is_cut(stream.way):
            due, chunk = stream.waiting.popleft()
            if not chunk:
                stream.closed = True
                stream.sink.shutdown(socket.SHUT_WR)
                break
            try:
                sent = stream.sink.send(chunk)
            except BlockingIOError:
                sent = 0
            stream.size -= sent
            if sent < len(chunk):
                stream.waiting.appendleft((due, chunk[sent:]))
                break
        return not stream.closed

    @staticmethod
    def _read(stream: _Stream) -> bytes:
        try:
            return stream.source.recv(_CHUNK)
        except BlockingIOError:
            raise
        except OSError:
            return b""  # it has gone without a word

    def _takes(self, way: tuple[int, int]) -> float:
        trouble = self._troubles.get(way, Trouble())
        late = LATE_S if self._random.random() < trouble.loss else 0.0
        return trouble.delay_s + late

    @staticmethod
    def _drop(streams: tuple[_Stream, _Stream]) -> None:
        for stream in streams:
            stream.source.close()


def _bound() -> socket.socket:
    """At a free port that is asked for by its number: the system takes one that it chose itself back when the socket
    stops listening, and a door that is opened again would be elsewhere."""
    while True:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may still end at it
        try:
            made.bind(free_addresses(1)[0])
        except OSError as error:
            made.close()
            if error.errno != errno.EADDRINUSE:  # somebody else was faster
                raise
        else:
            return made


def make_network(kind: str, hosts: int, *, shapes: bool) -> Network:
    """``kind``: "relay", or "namespaces", which only root can make. ``shapes``: links are to be slow or lossy, not only
    cut. Raises UserError."""
    if kind == "relay":
        return Relay(hosts)
    from shoal.elastic.namespaces import Namespaces

    return Namespaces(hosts, shapes=shapes)
