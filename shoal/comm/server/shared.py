"""Servers of the same host: doorbells over socket pairs, numbers in shared memory. No port, no name, no copy."""

from collections.abc import Callable

from shoal.comm.heap import Heap
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.server import wire
from shoal.comm.server.service import Out, Service
from shoal.comm.server.wire import Message
from shoal.comm.status import ANYBODY, Phase, Reporter

_SERVED = 6  # message kind; the group and the exchange use those below


class SharedLink:
    """A worker's way to server ``server`` of its host; ``mesh`` has a socket to each server."""

    def __init__(self, mesh: Mesh, server: int) -> None:
        self.name = f"server {server}"
        self.sent_bytes = self.received_bytes = 0
        self._mesh, self._server = mesh, server
        self._sent = self._received = 0

    def send(self, message: Message) -> None:
        head, data = wire.encode(message, self._sent)
        payload = head + bytes(memoryview(data).cast("B"))
        self._mesh.send(self._server, _SERVED, self._sent, payload)
        self._sent += 1
        self.sent_bytes += len(payload)

    def receive(self) -> Message:
        raw = self._mesh.receive(self._server, _SERVED, self._received)
        self._received += 1
        self.received_bytes += len(raw)
        return unpacked(raw)[0]

    def close(self) -> None:
        """The sockets are the group's."""


def unpacked(raw: bytes) -> tuple[Message, int]:
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
    updated: Callable[[Service], None] = lambda service: None,
    first: Callable[[], int] = lambda: 0,
) -> None:
    """The life of a server process: until its last worker has gone, or any before it is set up. ``mesh`` has a socket
    to each worker.

    ``updated`` is called after each update, before any worker hears of it; ``first`` is what the first step is
    called."""
    service = Service(server, heap, shared=True)
    here = set(mesh.others)
    taken = [0] * mesh.world
    updates = 0
    sent = [0] * mesh.world

    def answer(out: Out) -> None:
        for worker, message in out:
            if worker not in here:
                continue
            head, data = wire.encode(message, sent[worker])
            try:
                mesh.send(worker, _SERVED, sent[worker], head + bytes(memoryview(data).cast("B")))
            except PeerLost:
                continue  # its end of file is found below
            sent[worker] += 1

    while here:
        for worker in sorted(here):
            try:
                while (raw := mesh.take(worker, _SERVED, taken[worker])) is not None:
                    taken[worker] += 1
                    message, _ = unpacked(raw)
                    report(Phase.updating, step=first() + message.clock)
                    out = service.handle(worker, message)
                    if service.updates > updates:
                        updates = service.updates
                        updated(service)
                    answer(out)
            except PeerLost:
                if not service.ready:
                    return  # perhaps nobody sets it up any more: the others hear that it has gone, and do not wait
                here.discard(worker)
                answer(service.leave(worker))
        if here:
            report(Phase.waiting, peer=ANYBODY)
            mesh.wait(sorted(here))
