"""A group over several hosts: what its first rank and the agents of the others say to each other, and the first's side.

Every rank is started by itself, as torchrun does: rank 0 has the HTTP side, and its parent of model processes leads the
others' agents over TCP. For each group all fork one process; these meet in a torch.distributed group of their own, at a
port that is new each time, so that what is left of an older one disturbs nobody. Who loses its connection ends its
process; a lost agent may come back. The ports are for a private network, as torch.distributed's are."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.errors import RunFailed
from shoal.serve.frames import FrameError, FrameReader, encode

if TYPE_CHECKING:
    from shoal.comm.distributed import DistributedGroup

FOREVER_S = 1e8  # an idle group waits for its next step
_ADDRESS = "shoal-serve"  # where torchrun's store has the port of rank 0's parent


class Hello(msgspec.Struct, tag="hello", frozen=True):
    rank: int
    model: str  # a digest of its weights and facts: all must have the same


class Ended(msgspec.Struct, tag="ended", frozen=True):
    number: int


class Form(msgspec.Struct, tag="form", frozen=True):
    """Fork a process for this group; it meets the others at this port of rank 0."""

    number: int
    port: int


class End(msgspec.Struct, tag="end", frozen=True):
    number: int


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """The server has ended, or refuses this agent; ``why`` is "" when all is well."""

    why: str


FromAgent = Hello | Ended
ToAgent = Form | End | Leave


def from_agents() -> FrameReader[FromAgent]:
    return FrameReader(msgspec.msgpack.Decoder(list[FromAgent]))


def to_agents() -> FrameReader[ToAgent]:
    return FrameReader(msgspec.msgpack.Decoder(list[ToAgent]))


def main_port(publish: int = 0) -> int:
    """The port of rank 0's parent: MASTER_PORT, unless torchrun has its store there, which then knows it.

    ``publish``: what it is from now on."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return port
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=10))
    if publish:
        store.set(_ADDRESS, str(publish))
        return publish
    return int(store.get(_ADDRESS))


def join(rank: int, world: int, port: int) -> "DistributedGroup":
    """In a forked process: the torch.distributed group of its group. gloo, between processors."""
    from shoal.comm.distributed import DistributedGroup

    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    return DistributedGroup(FOREVER_S, accelerator=False)


class Agents:
    """The agents of ranks 1 .. world - 1, as the parent of rank 0 sees them."""

    def __init__(
        self, world: int, model: str, all_here: Callable[[], None], lost: Callable[[int | None], None]
    ) -> None:
        """``all_here`` is called whenever nobody is missing any more; ``lost`` with the number of a group whose process
        has ended on another host, None: of all that there are, as an agent has gone. Raises RunFailed."""
        self._world, self._model = world, model
        self._all_here, self._lost = all_here, lost
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._readers: dict[socket.socket, FrameReader[FromAgent]] = {}
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        stored = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self._listener = socket.create_server((host, 0 if stored else port))
        except OSError as error:
            raise RunFailed(f"cannot listen on {host}:{port} for the other ranks: {error.strerror}.") from None
        main_port(publish=self._listener.getsockname()[1])

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(1, self._world) if rank not in self._connections]

    def sockets(self) -> Iterator[socket.socket]:
        yield self._listener
        yield from self._readers

    def look(self, ready: set[int]) -> None:
        """Take in what has come over these file descriptors."""
        for each in [each for each in self.sockets() if each.fileno() in ready]:
            if each is self._listener:
                connection, _ = each.accept()
                self._readers[connection] = from_agents()
            else:
                self._read(each)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
            messages = self._readers[connection].feed(data)
        except (OSError, FrameError):
            data, messages = b"", []
        for message in messages:
            match message:
                case Hello():
                    self._greet(connection, message)
                case Ended():
                    self._lost(message.number)
        if not data:
            self._hang_up(connection)

    def _greet(self, connection: socket.socket, hello: Hello) -> None:
        why = ""
        if hello.rank not in self.missing:
            why = f"rank {hello.rank} is there already, or none of {self._world}"
        elif hello.model != self._model:
            why = f"rank {hello.rank} has loaded another model than rank 0: start all with the same target and options"
        if why:
            self._send(connection, Leave(why))
            self._hang_up(connection)
            return
        self._connections[hello.rank] = connection
        if not self.missing:
            self._all_here()

    def _hang_up(self, connection: socket.socket) -> None:
        if self._readers.pop(connection, None) is None:
            return
        connection.close()
        for rank in [rank for rank, one in self._connections.items() if one is connection]:
            del self._connections[rank]
            self._lost(None)

    def tell(self, message: ToAgent) -> None:
        """All of them."""
        for connection in list(self._connections.values()):
            self._send(connection, message)

    def _send(self, connection: socket.socket, message: ToAgent) -> None:
        with suppress(OSError):  # it has gone: the next read says so
            connection.sendall(encode([message]))


def free_port() -> int:
    """A port of rank 0's address that nobody listens on."""
    with socket.create_server((os.environ["MASTER_ADDR"], 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def digest(facts: Mapping[str, Any], weights: str) -> str:
    """Of a loaded model, whatever its path is on this host."""
    plain = {name: value for name, value in facts.items() if name not in ("name", "source")}
    return f"{weights} {msgspec.json.encode(plain, order='sorted').decode()}"
