"""Servers that a run's workers have sockets to. On one host these are doorbells, and numbers lie in shared memory: no
port, no name, no copy. Between hosts the numbers travel too."""

import struct
from collections.abc import Callable
from contextlib import suppress

from shoal.comm.heap import Heap
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.server import wire
from shoal.comm.server.service import Out, Service
from shoal.comm.server.wire import Message
from shoal.comm.status import ANYBODY, Phase, Reporter

_SERVED = 6  # message kind; the group and the exchange use those below
_SIZE = struct.Struct("<Q")  # bytes of the message that follows
PIECE = 16 << 20  # bytes that go over a socket at a time


class SharedLink:
    """A worker's way to server ``server``; ``mesh`` has a socket to each server."""

    def __init__(self, mesh: Mesh, server: int) -> None:
        self.name = f"server {server}"
        self.sent_bytes = self.received_bytes = 0
        self._out, self._in = _Out(mesh, server), _In(mesh, server)

    def send(self, message: Message) -> None:
        self.sent_bytes += self._out.send(message)

    def receive(self) -> Message:
        raw = self._in.receive()
        self.received_bytes += len(raw)
        return unpacked(raw)[0]

    def close(self) -> None:
        """The sockets are the group's."""


class _Out:
    """Messages to one peer, the longer ones in pieces."""

    def __init__(self, mesh: Mesh, to: int) -> None:
        self._mesh, self._to, self._count = mesh, to, 0

    def send(self, message: Message) -> int:
        """The bytes that have left. Raises PeerLost."""
        head, data = wire.encode(message, self._count)
        numbers = memoryview(data).cast("B")
        first = _SIZE.pack(len(head) + len(numbers)) + head
        room = PIECE - len(first)
        self._mesh.send(self._to, _SERVED, self._count, first + numbers[: max(0, room)])
        for start in range(max(0, room), len(numbers), PIECE):
            self._mesh.send(self._to, _SERVED, self._count, numbers[start : start + PIECE])
        self._count += 1
        return len(head) + len(numbers)


class _In:
    """Messages of one peer, put together."""

    def __init__(self, mesh: Mesh, origin: int) -> None:
        self._mesh, self._origin, self._count = mesh, origin, 0
        self._size = -1
        self._data = bytearray()

    def take(self) -> bytearray | None:
        """The next one when it has come. Raises PeerLost."""
        while (piece := self._mesh.take(self._origin, _SERVED, self._count)) is not None:
            if (whole := self._whole(piece)) is not None:
                return whole
        return None

    def receive(self) -> bytearray:
        """Waits for it. Raises PeerLost."""
        while (whole := self._whole(self._mesh.receive(self._origin, _SERVED, self._count))) is None:
            pass
        return whole

    def _whole(self, piece: bytes) -> bytearray | None:
        if self._size < 0:
            (self._size,) = _SIZE.unpack_from(piece)
            self._data += memoryview(piece)[_SIZE.size :]
        else:
            self._data += piece
        if len(self._data) < self._size:
            return None
        whole, self._data, self._size = self._data, bytearray(), -1
        self._count += 1
        return whole


def unpacked(raw: bytes | bytearray) -> tuple[Message, int]:
    """A message that came in one run of bytes. Raises WireError."""
    view = memoryview(raw)
    edge = wire.head_length(view)
    return wire.decode(view[:edge], view[edge:])


def links(mesh: Mesh) -> list[SharedLink]:
    return [SharedLink(mesh, server) for server in range(mesh.world)]


def serve(
    server: int,
    mesh: Mesh,
    heap: Heap,
    report: Reporter,
    *,
    shared: bool = True,
    updated: Callable[[Service], None] = lambda service: None,
    first: Callable[[], int] = lambda: 0,
) -> None:
    """The life of a server process: until its last worker has gone, or any before it is set up. ``mesh`` has a socket
    to each worker, ``heap`` is memory ``shared`` with them, or the server's own.

    ``updated`` is called after each update, before any worker hears of it; ``first`` is what the first step is
    called."""
    service = Service(server, heap, shared=shared)
    here = set(mesh.others)
    updates = 0
    ins, outs = [_In(mesh, worker) for worker in mesh.others], [_Out(mesh, worker) for worker in mesh.others]
    gone: set[int] = set()

    def heard(worker: int) -> bytearray | None:
        try:
            return ins[worker].take()
        except PeerLost:
            gone.add(worker)
            return None

    def answer(out: Out) -> None:
        for worker, message in out:
            if worker in here:
                with suppress(PeerLost):  # its end of file is found below
                    outs[worker].send(message)

    while here:
        for worker in sorted(here):
            while (raw := heard(worker)) is not None:
                message, _ = unpacked(raw)
                report(Phase.updating, step=first() + message.clock)
                out = service.handle(worker, message)
                if service.updates > updates:
                    updates = service.updates
                    updated(service)
                answer(out)
        if gone and not service.ready:
            return  # perhaps nobody sets it up any more: the others hear that it has gone, and do not wait
        for worker in sorted(gone & here):
            here.discard(worker)
            answer(service.leave(worker))
        if here:
            report(Phase.waiting, peer=ANYBODY)
            mesh.wait(sorted(here))
