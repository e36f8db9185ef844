"""Servers anywhere: pyzmq. A server is a ROUTER, a worker a DEALER; both watch their connections.

A message is two frames, see wire.py. Who does not know the token is not answered. A worker whose connection ends has
left; a server whose connection ends is told by an error that names it. Sockets listen on the loopback interface unless
somebody says otherwise: the token keeps strangers out, it does not hide what is sent.
"""

import secrets
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal.comm.heap import Heap, heap_file
from shoal.comm.mesh import PeerLost
from shoal.comm.server import wire
from shoal.comm.server.service import Out, Service
from shoal.comm.server.wire import Message, WireError
from shoal.comm.status import SERVERS, Phase, Reporter

LOOPBACK = "127.0.0.1"
FRAME_LIMIT = wire.DATA_LIMIT
QUEUED = 256  # messages of one worker that a server takes in before it has handled them
_SILENT_MS = 30_000  # a connection over which nothing comes for so long, pings included, has ended
_END = b"end"


def new_token() -> bytes:
    """What workers and servers of one run know, and nobody else."""
    return secrets.token_bytes(wire.TOKEN_BYTES)


class TcpServer:
    """One server behind a port. `run` serves until `end` is called or, with ``until_empty``, its workers have left."""

    def __init__(
        self,
        server: int = 0,
        *,
        token: bytes,
        host: str = LOOPBACK,
        port: int = 0,
        until_empty: bool = False,
        limit_bytes: int = 1 << 40,
        report: Reporter | None = None,
    ) -> None:
        self.service = Service(server, Heap(heap_file()), shared=False, limit_bytes=limit_bytes)
        self.refused: Counter[str] = Counter()  # messages of nobody we know, by reason
        self._token, self._until_empty, self._report = token, until_empty, report
        self._context = zmq.Context(io_threads=1)  # one: what it tells of connections comes before their messages
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        self._socket.setsockopt(zmq.RCVHWM, QUEUED)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # answers only, each asked for
        _keep_alive(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._ending = self._context.socket(zmq.PAIR)
        self._ending.bind("inproc://end")
        if port:
            self._socket.bind(f"tcp://{host}:{port}")
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"{host}:{port}"
        self._peers: dict[bytes, int] = {}  # identity -> worker
        self._identities: dict[int, bytes] = {}
        self._files: dict[int, bytes] = {}  # file of a connection -> identity
        self._taken: dict[bytes, int] = {}
        self._sent: dict[bytes, int] = {}
        self._had_workers = False

    def run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._socket, self._monitor, self._ending):
            poller.register(socket, zmq.POLLIN)
        while not (self._until_empty and self._had_workers and not self._peers):
            self._say(Phase.waiting)
            ready = dict(poller.poll())
            if self._ending in ready:
                break
            self._forget_the_gone()
            if self._socket in ready:
                self._take()

    def _say(self, phase: Phase, step: int | None = None) -> None:
        if self._report:
            self._report(phase, step=step)

    def _take(self) -> None:
        for _ in range(QUEUED):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._forget_the_gone()  # before a new connection takes over the file of one that has gone
            identity = frames[0].bytes
            try:
                if len(frames) != 3:
                    raise WireError("a message that is not of two frames")
                message, sequence = wire.decode(frames[1].buffer, frames[2].buffer, self._token)
                self._know(identity, frames[1], message, sequence)
            except WireError as error:
                self.refused[str(error).split(":")[0][:60]] += 1
                continue
            self._say(Phase.updating, message.clock)
            self._answer(self.service.handle(message.worker, message))
            if message.kind is wire.Kind.leave:
                self._forget(identity)

    def _know(self, identity: bytes, frame: "zmq.Frame", message: Message, sequence: int) -> None:
        """Raises WireError for a message that is not the next one of the worker behind this connection."""
        if identity not in self._peers:
            if message.worker in self._identities:
                raise WireError(f"worker {message.worker} is another connection")
            if sequence != 0:
                raise WireError("a connection that does not begin at its beginning")
            self._peers[identity], self._identities[message.worker] = message.worker, identity
            self._taken[identity] = self._sent[identity] = 0
            self._files[frame.get(zmq.SRCFD)] = identity
            self._had_workers = True
        if self._peers[identity] != message.worker:
            raise WireError("a message in another worker's name")
        if sequence != self._taken[identity]:
            raise WireError("a message that was sent before, or after a lost one")
        self._taken[identity] += 1

    def _answer(self, out: Out) -> None:
        for worker, message in out:
            identity = self._identities.get(worker)
            if identity is None:
                continue
            head, data = wire.encode(message, self._sent[identity], self._token)
            self._sent[identity] += 1
            with suppress(zmq.ZMQError):  # it has just gone: the monitor will say so
                self._socket.send_multipart([identity, head, data], copy=False)

    def _forget_the_gone(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            identity = self._files.pop(int(event["value"]), None)
            if identity is not None:
                worker = self._peers.get(identity)
                self._forget(identity)
                if worker is not None:
                    self._answer(self.service.leave(worker))

    def _forget(self, identity: bytes) -> None:
        worker = self._peers.pop(identity, None)
        if worker is not None:
            del self._identities[worker], self._taken[identity], self._sent[identity]

    def end(self) -> None:
        """From any thread: `run` returns soon."""
        caller = self._context.socket(zmq.PAIR)
        caller.connect("inproc://end")
        caller.send(_END)
        caller.close(linger=1000)

    def close(self) -> None:
        self._socket.disable_monitor()
        for socket in (self._monitor, self._ending, self._socket):
            socket.close(0)
        self._context.destroy(linger=0)


class ServerThread:
    """A server in a thread of this process, as BytePS places them: beside the workers, each with its slice."""

    def __init__(self, server: int, *, token: bytes, host: str = LOOPBACK) -> None:
        self._server = TcpServer(server, token=token, host=host)
        self.address = self._server.address
        self._thread = threading.Thread(target=self._server.run, name=f"shoal-server-{server}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.end()
        self._thread.join()
        self._server.close()


class TcpLink:
    """A worker's way to the server at ``address`` ("host:port")."""

    def __init__(
        self,
        address: str,
        server: int,
        *,
        token: bytes,
        report: Reporter | None = None,
        context: "zmq.Context[Any] | None" = None,
        patience_s: float = 60.0,
    ) -> None:
        """``patience_s``: how long a server may take to be there when the first answer is awaited."""
        self.name = f"server {server} at {address}"
        self.sent_bytes = self.received_bytes = 0
        self._server, self._token, self._report = server, token, report
        self._patience_ms = int(patience_s * 1000)
        self._sent = self._received = 0
        self._socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        _keep_alive(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(f"tcp://{address}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def send(self, message: Message) -> None:
        """Returns at once; the bytes leave behind the caller's back, and must not change until they are answered."""
        head, data = wire.encode(message, self._sent, self._token)
        self._sent += 1
        self.sent_bytes += len(head) + memoryview(data).nbytes
        self._socket.send_multipart([head, data], copy=False)

    def receive(self) -> Message:
        """Raises PeerLost when the server has gone."""
        if not self._socket.poll(0):
            self._await()
        frames = self._socket.recv_multipart(copy=False)
        if len(frames) != 2:
            raise PeerLost(f"{self.name} speaks another protocol")
        message, sequence = wire.decode(frames[0].buffer, frames[1].buffer, self._token)
        if sequence != self._received:
            raise PeerLost(f"{self.name} lost a message")
        self._received += 1
        self.received_bytes += frames[0].buffer.nbytes + frames[1].buffer.nbytes
        return message

    def _await(self) -> None:
        before = self._report.position if self._report else None
        if self._report:
            self._report(Phase.waiting, peer=SERVERS + self._server)
        ready = dict(self._poller.poll(None if self._received else self._patience_ms))
        if self._socket not in ready:
            what = "has gone" if ready else f"did not answer within {self._patience_ms / 1000:.0f} s"
            raise PeerLost(f"{self.name} {what}")
        if self._report and before:
            self._report(before.phase, shard=before.shard)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()


def _keep_alive(socket: "zmq.Socket[Any]") -> None:
    """A host that falls silent without a word is noticed too."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _SILENT_MS // 6)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENT_MS)
