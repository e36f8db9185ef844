"""A group over several hosts: what its first rank and the agents of the others say to each other, and the first's side.

Every rank is started by itself, as torchrun does: rank 0 has the HTTP side, and its parent of model processes leads an
agent on each of the others over TCP; for each version of the weights there is a parent with agents of its own, which
find it by a `broker`. For each group all fork one process; these meet in a torch.distributed group of their own, at
a port that is new each time, so that what is left of an older one disturbs nobody. An agent that loses its parent ends,
and its processes with it; another one comes in the place of one that has died. The ports are for a private network, as
torch.distributed's are."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.serve.frames import FrameReader, encode
from shoal.serve.groups.broker import Leave
from shoal.serve.groups.hearing import received

if TYPE_CHECKING:
    from shoal.comm.distributed import DistributedGroup

FOREVER_S = 1e8  # an idle group waits for its next step


class Hello(msgspec.Struct, tag="hello", frozen=True):
    rank: int
    model: str  # a digest of its weights and facts: all must have the same


class Cannot(msgspec.Struct, tag="cannot", frozen=True):
    """It cannot load the model, in one line."""

    rank: int
    why: str


class Ended(msgspec.Struct, tag="ended", frozen=True):
    number: int


class Form(msgspec.Struct, tag="form", frozen=True):
    """Fork a process for this group; it meets the others at this port of rank 0."""

    number: int
    port: int


class End(msgspec.Struct, tag="end", frozen=True):
    number: int


FromAgent = Hello | Cannot | Ended
ToAgent = Form | End | Leave


def from_agents() -> FrameReader[FromAgent]:
    return FrameReader(msgspec.msgpack.Decoder(list[FromAgent]))


def to_agents() -> FrameReader[ToAgent]:
    return FrameReader(msgspec.msgpack.Decoder(list[ToAgent]))


def join(rank: int, world: int, port: int) -> "DistributedGroup":
    """In a forked process: the torch.distributed group of its group. gloo, between processors."""
    from shoal.comm.distributed import DistributedGroup

    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    return DistributedGroup(FOREVER_S, accelerator=False)


class Agents:
    """The agents of ranks 1 .. world - 1, as their parent at rank 0 sees them."""

    def __init__(
        self,
        world: int,
        all_here: Callable[[], None],
        lost: Callable[[int | None], None],
        refused: Callable[[str], None],
    ) -> None:
        """``all_here`` is called whenever nobody is missing any more; ``lost`` with the number of a group whose process
        has ended on another host, None: of all that there are, as an agent has gone; ``refused`` with why an agent
        cannot take part."""
        self._world = world
        self._all_here, self._lost, self._refused = all_here, lost, refused
        self.model = ""  # a digest of what all must have loaded; to be set before the first `look`
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._readers: dict[socket.socket, FrameReader[FromAgent]] = {}
        self._listener = socket.create_server((os.environ["MASTER_ADDR"], 0))
        self.port: int = self._listener.getsockname()[1]

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
        messages, lost = received(connection, self._readers[connection])
        for message in messages:
            match message:
                case Hello():
                    self._greet(connection, message)
                case Cannot():
                    self._refused(f"rank {message.rank}: {message.why}")
                case Ended():
                    self._lost(message.number)
        if lost:
            self._hang_up(connection)

    def _greet(self, connection: socket.socket, hello: Hello) -> None:
        why = ""
        if hello.rank not in self.missing:
            why = f"rank {hello.rank} is there already, or none of {self._world}"
        elif hello.model != self.model:
            why = f"rank {hello.rank} has loaded another model than rank 0: start all with the same target and options"
            self._refused(why)
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
