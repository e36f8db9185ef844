"""Words between the ranks of a host, all to all: who has come, what each asks for, who has gone.

A rank that waits sleeps in one poll over its sockets to the others and over descriptors that tell of their deaths."""

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_HEAD = struct.Struct("<BxxxIIQ")  # kind, bytes of the words, bytes of what goes with them, operation
_SAID, _ABORTED, _LEFT = range(3)
LARGEST = 1 << 20  # bytes of one message
SOON_S = 0.5  # until a process that has hung up counts as alive: its death is told a moment later
_AT_ONCE = 1 << 16  # bytes that are taken in in one go
_SURE_S = 1.0  # a caller of `abort` waits this long for its turn to speak

Clock = time.monotonic


class Failure(Exception):
    """The group cannot go on, or not with this operation: one line that says what, where and who."""


class Mismatch(Failure):
    """The ranks ask for different things; nothing has been written, and the group goes on."""


@dataclass(frozen=True)
class Said:
    operation: int
    words: str
    data: bytes


@dataclass
class Standing:
    """Where this rank is, for what errors say."""

    operation: int = 0
    words: str = ""
    nbytes: int = 0


class Lines:
    """Used by one thread at a time, but for `abort`, `close` and what they set."""

    def __init__(
        self,
        place: int,
        sockets: Mapping[int, socket.socket],
        watches: Mapping[int, int],
        pids: Sequence[int],
        name: str,
        timeout_s: float,
    ) -> None:
        """``sockets[r]`` and ``watches[r]``, of the other ranks: connections, and descriptors that are readable once
        the rank is dead; where there is no such descriptor, the connection alone tells."""
        self.place, self.name, self.timeout_s = place, name, timeout_s
        self.why_aborted = ""
        self.standing = Standing()
        self.waited_s = dict.fromkeys(sorted({*sockets, place}), 0.0)
        self._sockets, self._watches, self._pids = dict(sockets), dict(watches), pids
        self._owner = os.getpid()
        self._buffers = {rank: bytearray() for rank in sockets}
        self._inbox: dict[int, deque[Said]] = {rank: deque() for rank in sockets}
        self._last = {rank: Said(0, "", b"") for rank in sockets}
        self._gone: dict[int, str] = {}
        self._speaking = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._rank_of = {}
        for rank, connection in self._sockets.items():
            connection.setblocking(False)
            self._poll.register(connection, select.POLLIN)
            self._rank_of[connection.fileno()] = rank
        for rank, watch in self._watches.items():
            self._poll.register(watch, select.POLLIN)
            self._rank_of[watch] = rank
        self._closed = False

    @property
    def world(self) -> int:
        return len(self.waited_s)

    def check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise Failure(
                f"{self.described()}: this process was forked from the member; only the member may use the group"
            )

    def described(self) -> str:
        at = self.standing
        return (
            f"{at.words} of {at.nbytes} bytes in group {self.name!r}, rank {self.place}, operation {at.operation}"
            if at.operation
            else f"group {self.name!r}, rank {self.place}"
        )

    def meet(self, words: str = "", data: bytes = b"", timeout_s: float = 0.0) -> list[Said]:
        """What every rank says, by rank, once all have come. Raises Failure on all ranks when one does not."""
        limit = timeout_s or self.timeout_s
        mine = Said(self.standing.operation, words, data)
        text = words.encode()
        message = _HEAD.pack(_SAID, len(text), len(data), mine.operation) + text + data
        begun = Clock()
        with self._speaking:
            for rank in self._sockets:
                self._tell(rank, message, begun + limit)
        missing = {rank for rank, inbox in self._inbox.items() if not inbox}
        since = begun
        for rank in sorted(missing):  # who came first has spoken: that is seen without asking who may be heard
            if self._take_in(rank) and self._inbox[rank]:
                missing.discard(rank)
        while missing:
            if self.why_aborted:
                raise Failure(f"{self.described()}: {self.why_aborted}")
            for rank in missing & set(self._gone):
                self._fail(self._gone[rank])
            left = begun + limit - Clock()
            if left <= 0:
                self._fail(f"timed out after {limit:.3g} s waiting for {'; '.join(map(self._where, sorted(missing)))}")
            ready: dict[int, bool] = {}  # rank -> whether its death is told
            for file, _ in self._poll.poll(left * 1000):
                if file != self._wake:
                    rank = self._rank_of[file]
                    ready[rank] = ready.get(rank, False) or file == self._watches.get(rank)
            now = Clock()
            for rank, dead in ready.items():
                self._listen(rank, dead)
                if rank in missing and self._inbox[rank]:
                    missing.discard(rank)
                    self.waited_s[rank] += now - since
                    since = now
        return [mine if rank == self.place else self._inbox[rank].popleft() for rank in self.waited_s]

    def _tell(self, rank: int, message: bytes, deadline: float) -> None:
        """Whole messages only: whoever speaks holds the lock. Who has gone is found out by listening."""
        rest = memoryview(message)
        while rest:
            try:
                rest = rest[self._sockets[rank].send(rest) :]
            except BlockingIOError:  # it has not read the last three messages
                ready = select.poll()
                ready.register(self._sockets[rank], select.POLLOUT)
                if not ready.poll(max(0.0, deadline - Clock()) * 1000):
                    return  # it is missed soon
            except OSError:
                return

    def _take_in(self, rank: int) -> bool:
        """What a rank has said by now; False when it has hung up."""
        chunk = b""
        try:
            chunk = self._sockets[rank].recv(_AT_ONCE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._buffers[rank] += chunk
        self._split(rank, self._buffers[rank])
        return self._take_in(rank) if len(chunk) == _AT_ONCE else bool(chunk)

    def _listen(self, rank: int, dead: bool) -> None:
        """Take in what a rank has said, and whether it has gone."""
        ended = not self._take_in(rank)
        if rank not in self._gone and (ended or dead):
            dead = dead or self._is_dead(rank, SOON_S)
            what = f"rank {rank} (pid {self._pids[rank]}) died" if dead else f"rank {rank} has left the group"
            self._gone[rank] = what + self._last_words(rank)
        if rank in self._gone:
            for file in (self._sockets[rank], self._watches.get(rank)):
                with suppress(KeyError, ValueError):
                    if file is not None:
                        self._poll.unregister(file)

    def _is_dead(self, rank: int, wait_s: float) -> bool:
        if rank not in self._watches:
            return False
        asked = select.poll()
        asked.register(self._watches[rank], select.POLLIN)
        return bool(asked.poll(wait_s * 1000))

    def _split(self, rank: int, buffer: bytearray) -> None:
        while len(buffer) >= _HEAD.size:
            kind, words, data, operation = _HEAD.unpack_from(buffer)
            size = _HEAD.size + words + data
            if size > LARGEST:
                self._fail(f"rank {rank} sends a message of {size} bytes; the limit is {LARGEST}")
            if len(buffer) < size:
                return
            text = bytes(buffer[_HEAD.size : _HEAD.size + words]).decode(errors="replace")
            said = Said(operation, text, bytes(buffer[_HEAD.size + words : size]))
            del buffer[:size]
            if kind == _ABORTED:
                self.why_aborted = self.why_aborted or text
            elif kind == _LEFT:
                self._gone[rank] = f"rank {rank} has left the group{self._last_words(rank)}"
            else:
                self._inbox[rank].append(said)
                self._last[rank] = said if said.words else Said(operation, self._last[rank].words, b"")

    def _last_words(self, rank: int) -> str:
        last = self._last[rank]
        return f", last in operation {last.operation}, {last.words}" if last.operation else ""

    def _where(self, rank: int) -> str:
        return f"rank {rank} (pid {self._pids[rank]}){self._last_words(rank) or ', which has not begun any operation'}"

    def _fail(self, why: str) -> None:
        line = f"{self.described()}: {why}"
        at = self.standing
        self.abort(f"rank {self.place} gave up in {at.words}, operation {at.operation}: {why}")
        raise Failure(line)

    def abort(self, why: str) -> None:
        """End this operation and all later ones on every rank; by any thread."""
        if self.why_aborted:
            return
        self.why_aborted = why
        self._shout(_ABORTED, why)

    def _shout(self, kind: int, text: str) -> None:
        message = text.encode()[: LARGEST // 2]
        message = _HEAD.pack(kind, len(message), 0, self.standing.operation) + message
        if self._speaking.acquire(timeout=_SURE_S):
            try:
                for rank in self._sockets:
                    self._tell(rank, message, 0.0)
            finally:
                self._speaking.release()
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Leave the group: nobody of this process uses it any more. Can be called again."""
        if self._closed:
            return
        if os.getpid() == self._owner:
            self._shout(_LEFT, "")
        self._closed = True
        for connection in self._sockets.values():
            connection.close()
        for watch in self._watches.values():
            os.close(watch)
        os.close(self._wake)
