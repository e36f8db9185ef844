"""Small messages between the workers of a host, over one socket a pair. A peer that dies is an end of file at once."""

import select
import socket
import struct
from collections import deque
from collections.abc import Sequence

from shoal.comm.status import Phase, Reporter, peer_name
from shoal.errors import ShoalError

_HEAD = struct.Struct("<IBq")  # payload bytes, kind, sequence
LARGEST = 64 << 20  # bytes of one message


class PeerLost(ShoalError):
    """Another worker went away: the follow-up of somebody else's failure, never the first cause."""


class OutOfStep(ShoalError):
    """Two workers are not at the same place of the same program."""


class Mesh:
    """``peers[r]`` is the socket to rank r; the entry of the own rank is None.

    Between workers and servers the peers are all of the other kind: ``rank`` is -1, and ``first`` is what peer 0 is
    called where waiting is told."""

    def __init__(self, rank: int, peers: Sequence[socket.socket | None], report: Reporter, *, first: int = 0) -> None:
        self.rank, self._first = rank, first
        self.world = len(peers)
        self._peers = peers
        self._report = report
        self._bytes: list[bytearray] = [bytearray() for _ in peers]
        self._inbox: list[deque[tuple[int, int, bytes]]] = [deque() for _ in peers]
        for peer in peers:
            if peer is not None:
                peer.setblocking(False)

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def send(self, to: int, kind: int, sequence: int, payload: bytes = b"") -> None:
        """Messages to one peer arrive in order. Raises PeerLost."""
        peer = self._peers[to]
        assert peer is not None
        data = memoryview(_HEAD.pack(len(payload), kind, sequence) + payload)
        while data:
            try:
                data = data[peer.send(data) :]
            except BlockingIOError:
                self._drain()  # both sides may be sending: reading is what makes room
                select.select([peer], [peer], [], 1.0)
            except (BrokenPipeError, ConnectionResetError):
                raise PeerLost(f"{peer_name(self._first + to)} has gone") from None

    def broadcast(self, kind: int, sequence: int, payload: bytes = b"") -> None:
        for rank in self.others:
            self.send(rank, kind, sequence, payload)

    def take(self, origin: int, kind: int, sequence: int) -> bytes | None:
        """The next message of a peer when it has come, else None. Raises OutOfStep, PeerLost."""
        if not self._inbox[origin]:
            self._drain(origin)
        return self._pop(origin, kind, sequence)

    def receive(self, origin: int, kind: int, sequence: int) -> bytes:
        """Wait for the next message of a peer. The agent watches for hangs, a dead peer wakes us: no timeout here."""
        found = self.take(origin, kind, sequence)
        if found is not None:
            return found
        peer, before = self._peers[origin], self._report.position
        assert peer is not None
        self._report(Phase.waiting, peer=self._first + origin)
        while found is None:
            select.select([peer], [], [])
            found = self.take(origin, kind, sequence)
        self._report(before.phase, shard=before.shard)
        return found

    def wait(self, origins: Sequence[int]) -> None:
        """Wait until one of these peers has said something or has gone."""
        select.select([peer for origin in origins if (peer := self._peers[origin]) is not None], [], [])

    def _pop(self, origin: int, kind: int, sequence: int) -> bytes | None:
        if not self._inbox[origin]:
            return None
        got_kind, got_sequence, payload = self._inbox[origin].popleft()
        if (got_kind, got_sequence) != (kind, sequence):
            raise OutOfStep(
                f"rank {origin} is at message {got_kind}/{got_sequence} where rank {self.rank} is at "
                f"{kind}/{sequence}: the workers do not run the same program"
            )
        return payload

    def _drain(self, only: int | None = None) -> None:
        for origin in self.others if only is None else [only]:
            peer, data = self._peers[origin], self._bytes[origin]
            assert peer is not None
            try:
                while chunk := peer.recv(1 << 18):
                    data += chunk
                if not self._split(origin):
                    raise PeerLost(f"{peer_name(self._first + origin)} has gone")
            except BlockingIOError:
                self._split(origin)
            except ConnectionResetError:
                raise PeerLost(f"{peer_name(self._first + origin)} has gone") from None

    def _split(self, origin: int) -> int:
        """Move whole messages to the inbox; how many there are now."""
        data = self._bytes[origin]
        while len(data) >= _HEAD.size:
            size, kind, sequence = _HEAD.unpack_from(data)
            if size > LARGEST:
                raise OutOfStep(f"rank {origin} sent a message of {size} bytes; the limit is {LARGEST}")
            if len(data) < _HEAD.size + size:
                break
            self._inbox[origin].append((kind, sequence, bytes(data[_HEAD.size : _HEAD.size + size])))
            del data[: _HEAD.size + size]
        return len(self._inbox[origin])
