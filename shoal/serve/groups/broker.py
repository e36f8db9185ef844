"""Which parents of rank 0 want agents on the other hosts, told to those hosts: at MASTER_PORT, or where torchrun's
store says.

Each version of the weights has a parent of its own, with agents of its own. The first one listens for the hosts; others
tell it of themselves, and when it has gone, one of them listens in its place, and the hosts come to it."""

import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from shoal.errors import RunFailed
from shoal.serve.frames import FrameReader, encode
from shoal.serve.groups.hearing import received

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

AGAIN_S = 0.2  # how often one who finds nobody tries again
SETTLE_S = 20.0
FAREWELL_S = 1.5  # of the last parent, for hosts that look for the one before
_ADDRESS = "shoal-serve"  # where torchrun's store has the broker's port


class Host(msgspec.Struct, tag="host", frozen=True):
    """What a host says: the rank whose agents it starts."""

    rank: int


class Load(msgspec.Struct, tag="load", frozen=True):
    """A parent of rank 0, at this port, wants agents with this model: it tells the broker, and that one the hosts."""

    port: int
    target: str
    task: str
    dtype: str
    name: str


class Ending(msgspec.Struct, tag="ending", frozen=True):
    """What a parent says to the broker: it will not take its place."""


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """The server has ended, or refuses an agent; ``why`` is "" when all is well."""

    why: str


ToBroker = Host | Load | Ending
ToHost = Load | Leave


def to_broker() -> FrameReader[ToBroker]:
    return FrameReader(msgspec.msgpack.Decoder(list[ToBroker]))


def to_hosts() -> FrameReader[ToHost]:
    return FrameReader(msgspec.msgpack.Decoder(list[ToHost]))


def _stored() -> bool:
    """torchrun has a store at MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def broker_address() -> tuple[str, int] | None:
    """None: nobody has said yet where it is."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not _stored():
        return host, port
    store = _store(host, port)
    return (host, int(store.get(_ADDRESS))) if store.check([_ADDRESS]) else None


def _store(host: str, port: int) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))


def _same_host(connection: socket.socket) -> bool:
    """What is run here, and on the other hosts, is for nobody else to say."""
    return bool(connection.getpeername()[0] == connection.getsockname()[0])


class Broker:
    """Of one parent: it listens, or is a client of the parent that does."""

    def __init__(self, own: Load, hosts: int) -> None:
        """``hosts``: how many there are beside this one. Raises RunFailed."""
        self._own, self._count = own, hosts
        self._listener: socket.socket | None = None
        self._above: socket.socket | None = None  # the parent that listens; None: this one does
        self._readers: dict[socket.socket, FrameReader[ToBroker]] = {}
        self._hosts: set[socket.socket] = set()
        self._parents: dict[socket.socket, Load] = {}
        self._settle()

    @property
    def newer(self) -> bool:
        """Another parent serves already."""
        return self._above is not None

    def _settle(self) -> None:
        end, why = time.monotonic() + SETTLE_S, ""
        while time.monotonic() < end:
            try:
                address = broker_address()
                if address is not None:
                    self._above = self._client(address)
                if self._above is None:
                    self._listen()
                return
            except OSError as error:
                why = str(error.strerror)
                time.sleep(AGAIN_S)
        raise RunFailed(
            f"cannot listen on {':'.join(map(str, broker_address() or ('?',)))} for the other ranks: {why}."
        )

    def _client(self, address: tuple[str, int]) -> socket.socket | None:
        """None: nobody listens there."""
        try:
            connection = socket.create_connection(address, timeout=5.0)
        except ConnectionRefusedError:
            return None
        connection.settimeout(None)
        connection.sendall(encode([self._own]))
        return connection

    def _listen(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._listener = socket.create_server((host, 0 if _stored() else port))
        if _stored():
            _store(host, port).set(_ADDRESS, str(self._listener.getsockname()[1]))

    def sockets(self) -> Iterator[socket.socket]:
        if self._above is not None:
            yield self._above
        if self._listener is not None:
            yield self._listener
        yield from self._readers

    def look(self, ready: set[int]) -> None:
        """Take in what has come over these file descriptors."""
        for each in [each for each in self.sockets() if each.fileno() in ready]:
            if each is self._listener:
                connection, _ = each.accept()
                self._readers[connection] = to_broker()
            elif each is self._above:
                self._hear_above(each)
            else:
                self._read(each)

    def _hear_above(self, above: socket.socket) -> None:
        with suppress(OSError):
            if above.recv(1 << 16):
                return
        above.close()
        self._above = None
        self._settle()

    def _read(self, connection: socket.socket) -> None:
        messages, lost = received(connection, self._readers[connection])
        for message in messages:
            match message:
                case Host():
                    self._hosts.add(connection)
                    self._tell([connection], self._own, *self._parents.values())
                case Load() if _same_host(connection):
                    self._parents[connection] = message
                    self._tell(self._hosts, message)
                case Ending():
                    self._parents.pop(connection, None)
        if lost:
            del self._readers[connection]
            self._hosts.discard(connection)
            self._parents.pop(connection, None)
            connection.close()

    def _tell(self, whom: Iterable[socket.socket], *messages: msgspec.Struct) -> None:
        for connection in whom:
            with suppress(OSError):  # it has gone: the next read says so
                connection.sendall(encode(messages))

    def leave(self) -> None:
        """This parent ends. The last one sends the hosts home; another one takes its place otherwise."""
        end = time.monotonic() + FAREWELL_S
        if self._above is not None:
            self._tell([self._above], Ending())
        while self._above is not None:  # does the parent that listens end too? It may leave the hosts to this one
            if time.monotonic() > end:
                return
            self._wait(end)
        if self._parents:
            for each in (*filter(None, (self._listener,)), *self._readers):  # in this order: they then find nobody
                each.close()
            return
        while len(self._hosts) < self._count and time.monotonic() < end:
            self._wait(end)
        self._tell(self._hosts, Leave(""))

    def _wait(self, end: float) -> None:
        sockets = list(self.sockets())
        ready, _, _ = select.select(sockets, [], [], max(0.0, end - time.monotonic()))
        self.look({each.fileno() for each in ready})
