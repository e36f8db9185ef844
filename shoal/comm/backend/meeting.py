"""How the ranks of a group find those of their own host, and come to share a piece of memory and nothing else.

Each rank listens on a Unix-domain socket with a random abstract name, which no file leads to and which other network
namespaces cannot reach, and puts its card into the group's store. It tries to connect to every lower rank that may be
on its host; from what all could reach, all conclude who is with whom. The lowest rank of a host makes one memory file
and hands it round over these connections. A visitor of another user, or one who does not know the token from the store,
is sent away: two users, or two runs, never meet.
"""

import hmac
import os
import secrets
import select
import socket
import stat
import struct
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shoal.cluster.detect import usable_cores
from shoal.comm.backend.hosts import Card, hosts_of, rank_list
from shoal.comm.backend.memory import NoRoom, reserved_file
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_HELLO = struct.Struct("<I32s")  # rank, token of the one who is visited
_HERE, _NOTHING = b"F", b"N"  # before a file; before a reason why there is none
_LONGEST_REASON = 1000


class NotMet(ShoalError):
    """A rank of this host did not come to the meeting, or went away from it."""


def boot_id() -> str:
    """Which run of which kernel this is; containers of a machine share it. "" where nothing says so."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _namespace(kind: str) -> str:
    with suppress(OSError):
        state = os.stat(f"/proc/self/ns/{kind}")
        return f"{state.st_dev}:{state.st_ino}"
    return ""


def new_card(library: str, why: str, not_in_python: str = "") -> Card:
    return Card(
        host=socket.gethostname(),
        boot=boot_id(),
        user=os.geteuid(),
        pids=_namespace("pid"),
        pid=os.getpid(),
        address=f"shoal-{secrets.token_hex(16)}",
        token=secrets.token_hex(16),
        library=library,
        why=why,
        not_in_python=not_in_python,
        cpus=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        cores=usable_cores(),
    )


def abstract(address: str) -> str:
    return "\0" + address


def listener(address: str, backlog: int) -> socket.socket:
    """Raises OSError."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.bind(abstract(address))
        found.listen(backlog)
    except OSError:
        found.close()
        raise
    return found


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process and user id of the other end, as the kernel knows them."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def connected(address: str, user: int, wait_s: float = 1.0) -> socket.socket | None:
    """A connection to a rank of this user, or None: nobody listens there as far as this process can see."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(wait_s)
    try:
        connection.connect(abstract(address))
        if peer_credentials(connection)[1] == user:
            return connection
    except OSError:
        pass
    connection.close()
    return None


def read_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Raises OSError when the time is over, and EOFError when the other end has gone."""
    data = b""
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def accepted(door: socket.socket, token: str, user: int, wanted: set[int], deadline: float) -> dict[int, socket.socket]:
    """One connection from each of the wanted ranks that come in time; strangers are sent away."""
    found: dict[int, socket.socket] = {}
    while wanted - set(found):
        try:
            door.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = door.accept()
        except TimeoutError:
            break
        try:
            if peer_credentials(connection)[1] != user:
                raise EOFError
            rank, theirs = _HELLO.unpack(read_exactly(connection, _HELLO.size, min(deadline, time.monotonic() + 5.0)))
            if not hmac.compare_digest(theirs, token.encode()) or rank not in wanted or rank in found:
                raise EOFError
            found[rank] = connection
        except (OSError, EOFError):
            connection.close()
    return found


def greet(connection: socket.socket, rank: int, token: str, whom: int) -> None:
    connection.settimeout(5.0)
    try:
        connection.sendall(_HELLO.pack(rank, token.encode()))
    except OSError as error:
        raise NotMet(f"rank {whom} went away from the meeting: {error.strerror or error}") from None


def is_socket(descriptor: int) -> bool:
    """Words may come over it, too."""
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


class Watches:
    """A descriptor for each other rank of the host that becomes readable when it dies: a pidfd, or else a socket."""

    def __init__(self, descriptors: dict[int, int]) -> None:
        self.descriptors = descriptors
        self._close = weakref.finalize(self, _close_all, list(descriptors.values()))

    def dead(self) -> set[int]:
        """Ranks that have ended. A socket also says so when its rank has closed the group."""
        poll = select.poll()
        for descriptor in self.descriptors.values():
            poll.register(descriptor, select.POLLRDHUP if is_socket(descriptor) else select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(0)}
        return {rank for rank, descriptor in self.descriptors.items() if descriptor in ready}

    def close(self) -> None:
        self._close()


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def _watched(rank: int, cards: Sequence[Card], connections: dict[int, socket.socket]) -> Watches:
    """The connections stay the caller's. Raises NotMet when a rank has gone already."""
    found: dict[int, int] = {}
    for other, connection in connections.items():
        card = cards[other]
        if card.pids == cards[rank].pids and peer_credentials(connection)[0] == card.pid:
            try:
                found[other] = os.pidfd_open(card.pid)
            except ProcessLookupError:
                _close_all(list(found.values()))
                raise NotMet(f"rank {other} (pid {card.pid}) died while the group was being made") from None
            except (OSError, AttributeError):
                pass  # not on this kernel, or not allowed in this container
        if other not in found:
            found[other] = os.dup(connection.fileno())
    return Watches(found)


@dataclass(frozen=True)
class Meeting:
    """What came of it. ``memory`` is what ``attach`` made; ``why`` says why there is none, the same on all ranks."""

    cards: tuple[Card, ...]
    hosts: tuple[tuple[int, ...], ...]
    memory: Any
    watches: Watches
    why: str = ""


def _hand_round(members: dict[int, socket.socket], total: int, reserved: int, deadline: float) -> int:
    """The lowest rank's part: a file for all. Raises NoRoom."""
    try:
        file = reserved_file(total, reserved)
    except NoRoom as error:
        for connection in members.values():
            with suppress(OSError):
                connection.sendall(_NOTHING + str(error).encode()[:_LONGEST_REASON])
                connection.shutdown(socket.SHUT_WR)
        raise
    for rank, connection in members.items():
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            socket.send_fds(connection, [_HERE], [file])
        except OSError as error:
            os.close(file)
            raise NotMet(f"rank {rank} went away from the meeting: {error.strerror or error}") from None
    return file


def _take(connection: socket.socket, lowest: int, total: int, deadline: float) -> int:
    """What `_hand_round` sends. Raises NoRoom, NotMet."""
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        said, files, _, _ = socket.recv_fds(connection, _LONGEST_REASON + 1, 1)
    except OSError as error:
        raise NotMet(f"rank {lowest} did not hand over the memory: {error.strerror or error}") from None
    if said[:1] == _NOTHING:
        raise NoRoom(said[1:].decode(errors="replace"))
    if not files:
        raise NotMet(f"rank {lowest} went away from the meeting")
    state = os.fstat(files[0])
    if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_size < total:
        _close_all(files)
        raise NotMet(f"what rank {lowest} handed over is not the memory that was agreed on")
    return files[0]


def _all_say(store: "Store", topic: str, rank: int, size: int, text: str, timeout_s: float) -> list[str]:
    """Everybody's text, by rank."""
    store.set(f"{topic}/{rank}", text)
    keys = [f"{topic}/{other}" for other in range(size)]
    store.wait(keys, timedelta(seconds=timeout_s))
    return [value.decode() for value in store.multi_get(keys)]


def meet(
    store: "Store",
    rank: int,
    size: int,
    timeout_s: float,
    library: str,
    why: str,
    refuse: Callable[[Sequence[Card], Sequence[Sequence[int]]], str],
    sizes: Callable[[int], tuple[int, int]],
    attach: Callable[[int, int, Sequence[int], Sequence[int], Sequence[Card], Mapping[int, socket.socket]], Any],
    not_in_python: str = "",
) -> Meeting:
    """Find the ranks of this host and share memory with them.

    ``refuse(cards, hosts)`` may say why nobody should try, from what all know alike. ``sizes(ranks)`` is (total,
    reserved) bytes of a host's file. ``attach(file, place, host, descriptors, cards, connections)`` maps it, as the
    place-th of the host's ranks; what it needs of the connections, by rank, it duplicates. ``library``, ``why`` and
    ``not_in_python`` are for the card. Raises ShoalError, and what the store raises when a rank is late."""
    deadline = time.monotonic() + timeout_s
    card = new_card(library, why, not_in_python)
    connections: dict[int, socket.socket] = {}
    watches = Watches({})
    file, memory, failure = -1, None, ""
    with listener(card.address, max(16, size)) as door:
        try:
            cards = tuple(map(Card.from_json, _all_say(store, "card", rank, size, card.to_json(), timeout_s)))
            for other in range(rank):
                if cards[other].boot == card.boot and cards[other].user == card.user and card.boot:
                    reached = connected(cards[other].address, card.user)
                    if reached:
                        connections[other] = reached
            said = _all_say(store, "reached", rank, size, " ".join(map(str, connections)), timeout_s)
            hosts = hosts_of(cards, [frozenset(map(int, text.split())) for text in said])
            refusal = refuse(cards, hosts)
            if refusal:
                return Meeting(cards, hosts, None, watches, refusal)
            host = next(host for host in hosts if rank in host)
            for other in set(connections) - set(host):
                connections.pop(other).close()
            total, reserved = sizes(len(host))
            try:
                for other, connection in connections.items():
                    greet(connection, rank, cards[other].token, other)
                higher = {r for r in host if r > rank}
                connections |= accepted(door, card.token, card.user, higher, deadline)
                if late := higher - set(connections):
                    raise NotMet(f"{rank_list(sorted(late))} did not come to the meeting")
                if rank == host[0]:
                    file = _hand_round(connections, total, reserved, deadline)
                else:
                    file = _take(connections[host[0]], host[0], total, deadline)
                watches = _watched(rank, cards, connections)
                descriptors = [watches.descriptors.get(other, -1) for other in host]
                memory = attach(file, host.index(rank), host, descriptors, cards, connections)
            except (NoRoom, NotMet) as error:
                failure = str(error)
            verdicts = _all_say(store, "made", rank, size, failure, timeout_s)
        finally:
            _close_all([file] if file >= 0 else [])
            for connection in connections.values():
                connection.close()
    reasons = [text for text in verdicts if text]
    return Meeting(cards, hosts, None if reasons else memory, watches, reasons[0] if reasons else "")
