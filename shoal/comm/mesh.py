"""Small messages between the workers of a host, over one socket a pair. A peer that dies is an end of file at once."""

import select
import socket
import struct
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy

from shoal.comm.status import Phase, Reporter, peer_name
from shoal.errors import ShoalError

_HEAD = struct.Struct("<IHBq")  # payload bytes, channel, kind, sequence
LARGEST = 64 << 20  # bytes of one message


class PeerLost(ShoalError):
    """Another worker went away: the follow-up of somebody else's failure, never the first cause."""


class OutOfStep(ShoalError):
    """Two workers are not at the same place of the same program."""


def _until(
    readable: Iterable[socket.socket], writable: Iterable[socket.socket] = (), within_s: float | None = None
) -> None:
    """Wait until one of these can be read (or has ended) or written. By poll: select takes no descriptor past 1,023."""
    wanted: dict[int, int] = defaultdict(int)
    for peers, what in ((readable, select.POLLIN), (writable, select.POLLOUT)):
        for peer in peers:
            wanted[peer.fileno()] |= what
    asked = select.poll()
    for descriptor, what in wanted.items():
        asked.register(descriptor, what)
    asked.poll(None if within_s is None else 1000 * within_s)


class _Wire:
    """The sockets of one process, and what has come over them: by peer and channel, in order."""

    def __init__(self, peers: Sequence[socket.socket | None]) -> None:
        self.peers = peers
        self._bytes: list[bytearray] = [bytearray() for _ in peers]
        self._ended: set[int] = set()
        self._inbox: dict[tuple[int, int], deque[tuple[int, int, bytes]]] = defaultdict(deque)
        for peer in peers:
            if peer is not None:
                peer.setblocking(False)

    def socket_of(self, peer: int) -> socket.socket:
        found = self.peers[peer]
        assert found is not None
        return found

    def close(self) -> None:
        for peer in self.peers:
            if peer is not None:
                with suppress(OSError):  # the other end was quicker
                    peer.shutdown(socket.SHUT_WR)  # an agent may have it, too: closing alone would tell nobody
                peer.close()

    def inbox(self, origin: int, channel: int) -> deque[tuple[int, int, bytes]]:
        return self._inbox[origin, channel]

    def drain(self, origin: int) -> bool:
        """Take in what a peer has sent; False when it has gone."""
        data, alive = self._bytes[origin], True
        try:
            while chunk := self.socket_of(origin).recv(1 << 18):
                data += chunk
            alive = False
        except BlockingIOError:
            pass
        except OSError:  # between hosts there are many ways to lose a connection
            alive = False
        if not alive:
            self._ended.add(origin)
        self._split(origin)
        return alive

    def drain_all(self) -> None:
        for origin, peer in enumerate(self.peers):
            if peer is not None and origin not in self._ended:
                self.drain(origin)

    def open(self) -> list[socket.socket]:
        """Those that may still say something: of several that all send, each must take in what any other one sends."""
        return [peer for origin, peer in enumerate(self.peers) if peer is not None and origin not in self._ended]

    def _split(self, origin: int) -> None:
        """Move whole messages to their inboxes."""
        data = self._bytes[origin]
        while len(data) >= _HEAD.size:
            size, channel, kind, sequence = _HEAD.unpack_from(data)
            if size > LARGEST:
                raise OutOfStep(f"rank {origin} sent a message of {size} bytes; the limit is {LARGEST}")
            if len(data) < _HEAD.size + size:
                break
            self._inbox[origin, channel].append((kind, sequence, bytes(data[_HEAD.size : _HEAD.size + size])))
            del data[: _HEAD.size + size]


class Mesh:
    """``peers[r]`` is the socket to rank r; the entry of the own rank is None.

    Between workers and servers the peers are all of the other kind: ``rank`` is -1, and ``first`` is what peer 0 is
    called where waiting is told."""

    def __init__(self, rank: int, peers: Sequence[socket.socket | None], report: Reporter, *, first: int = 0) -> None:
        self.rank = rank
        self.world = len(peers)
        self._wire, self._channel, self._report = _Wire(peers), 0, report
        self._places = tuple(range(len(peers)))  # rank -> where its socket stands
        self._names = tuple(range(first, first + len(peers)))

    def part(self, ranks: Sequence[int], channel: int) -> "Mesh":
        """Some of the ranks, numbered anew in this order, with messages of their own: ``channel`` is theirs alone."""
        made = copy(self)
        made.rank, made.world = ranks.index(self.rank), len(ranks)
        made._channel = channel
        made._places = tuple(self._places[rank] for rank in ranks)
        made._names = tuple(self._names[rank] for rank in ranks)
        return made

    def across(self, ranks: Sequence[int], channel: int, *, first: int) -> "Mesh":
        """From one side to the other one: to these ranks, of which this one is none. See ``first`` of the class."""
        made = copy(self)
        made.rank, made.world = -1, len(ranks)
        made._channel = channel
        made._places = tuple(self._places[rank] for rank in ranks)
        made._names = tuple(range(first, first + len(ranks)))
        return made

    def close(self) -> None:
        """Hang up on all peers: each finds it out at its next word."""
        self._wire.close()

    @property
    def sockets(self) -> list[socket.socket]:
        """To the others, for who waits for more than their words; what has come over them is in `take` at once."""
        return [self._wire.socket_of(self._places[rank]) for rank in self.others]

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def send(self, to: int, kind: int, sequence: int, payload: bytes | memoryview = b"") -> None:
        """Messages to one peer arrive in order. Raises PeerLost."""
        peer = self._wire.socket_of(self._places[to])
        data = memoryview(_HEAD.pack(len(payload), self._channel, kind, sequence) + payload)
        while data:
            try:
                data = data[peer.send(data) :]
            except BlockingIOError:
                self._wire.drain_all()  # both sides may be sending: reading is what makes room
                _until(self._wire.open(), [peer], within_s=1.0)
            except OSError:
                raise PeerLost(f"{peer_name(self._names[to])} has gone") from None

    def broadcast(self, kind: int, sequence: int, payload: bytes = b"") -> None:
        for rank in self.others:
            self.send(rank, kind, sequence, payload)

    def take(self, origin: int, kind: int, sequence: int) -> bytes | None:
        """The next message of a peer when it has come, else None. Raises OutOfStep, PeerLost."""
        if not self._wire.inbox(self._places[origin], self._channel):
            self._drain(origin)
        return self._pop(origin, kind, sequence)

    def receive(self, origin: int, kind: int, sequence: int) -> bytes:
        """Wait for the next message of a peer. The agent watches for hangs, a dead peer wakes us: no timeout here."""
        found = self.take(origin, kind, sequence)
        if found is not None:
            return found
        peer, before = self._wire.socket_of(self._places[origin]), self._report.position
        self._report(Phase.waiting, peer=self._names[origin])
        while found is None:
            _until([peer])
            found = self.take(origin, kind, sequence)
        self._report(before.phase, shard=before.shard)
        return found

    def wait(self, origins: Sequence[int]) -> None:
        """Wait until one of these peers has said something or has gone."""
        _until(self._wire.socket_of(self._places[origin]) for origin in origins)

    def gone(self, peer: int) -> bool:
        """Whether a peer has gone, also where something that it said before has not been read yet."""
        asked = select.poll()
        asked.register(self._wire.socket_of(self._places[peer]), 0)  # an end is told unasked
        return bool(asked.poll(0))

    def _pop(self, origin: int, kind: int, sequence: int) -> bytes | None:
        inbox = self._wire.inbox(self._places[origin], self._channel)
        if not inbox:
            return None
        got_kind, got_sequence, payload = inbox.popleft()
        if (got_kind, got_sequence) != (kind, sequence):
            raise OutOfStep(
                f"{peer_name(self._names[origin])} is at message {got_kind}/{got_sequence} where rank {self.rank} is "
                f"at {kind}/{sequence}: the workers do not run the same program"
            )
        return payload

    def _drain(self, origin: int) -> None:
        place = self._places[origin]
        if not self._wire.drain(place) and not self._wire.inbox(place, self._channel):
            raise PeerLost(f"{peer_name(self._names[origin])} has gone")
