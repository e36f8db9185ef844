"""Connections of one agent to the others: for what agents say to each other, and for workers of two hosts to share.

Every agent listens at its own address and connects to all others; what it says goes over the connections that it has
made. Both ends of each prove that they know the run's token before anything else is read (a challenge and an HMAC
each way), and every message carries one; the sockets that workers get are plain once that has been done.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shoal.elastic import frames
from shoal.errors import UserError

CONNECT_S = 1.0  # an attempt to connect that takes longer is begun anew
GREET_S = 5.0  # who has not proved who it is by then is sent away
RETRY_S = 0.1
STRANGERS = 64  # connections that have not proved who they are
LONGEST_HELLO = 1 << 10
MOST_UNSENT = 16 << 20  # bytes to an agent that does not read
_NONCE, _PROOF, _MAC = 32, 32, 16
_HELLO = struct.Struct("<H")
_FRAME = struct.Struct(f"<IQ{_MAC}s")  # bytes of the message, its number, its MAC


@dataclass(frozen=True)
class Heard:
    agent: int
    message: Any


@dataclass(frozen=True)
class Refused:
    """Nobody listens at the agent's address any more: its process has ended."""

    agent: int


@dataclass(frozen=True)
class Pair:
    """Two workers of different hosts, by their ranks in an epoch; the agent of the lower one connects."""

    epoch: int
    low: int
    high: int


@dataclass(frozen=True)
class Linked:
    pair: Pair
    socket: socket.socket


@dataclass(frozen=True)
class NotLinked:
    """An attempt that has come to nothing."""

    pair: Pair


@dataclass(frozen=True)
class Differs:
    """The agent knows the token, and was started for another job."""

    agent: int


News = Heard | Refused | Linked | NotLinked | Differs


def address_of(text: str) -> tuple[str, int]:
    """From "host:port". Raises UserError."""
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--agents: {text!r} is no address: write host:port, as in 10.0.0.7:7700.")
    return host.strip("[]"), int(port)


@dataclass
class _Wire:
    """A connection and how far the proof has come: greeting, hello, answer, open."""

    socket: socket.socket
    state: str
    agent: int = -1
    pair: Pair | None = None
    begun_s: float = field(default_factory=time.monotonic)
    nonce: bytes = b""
    proof: bytes = b""  # that the other end has to give
    key: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    sent: int = 0
    received: int = 0

    def flush(self) -> None:
        """Raises OSError when the other end has gone."""
        with suppress(BlockingIOError, InterruptedError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]

    def fill(self, size: int) -> bool:
        """Whether so many bytes have come. Raises OSError, and EOFError when the other end has gone."""
        while len(self.data) < size:
            try:
                chunk = self.socket.recv(min(1 << 18, size - len(self.data)))
            except (BlockingIOError, InterruptedError):
                return False
            if not chunk:
                raise EOFError
            self.data += chunk
        return True

    def take(self, size: int) -> bytes:
        found = bytes(self.data[:size])
        del self.data[:size]
        return found


class Links:
    """``addresses`` of all agents, by number. Raises UserError when the own one cannot be listened at."""

    def __init__(self, number: int, addresses: Sequence[tuple[str, int]], token: bytes, job: str) -> None:
        """``job`` says what is trained, and how: agents that were started otherwise are not talked to."""
        self.number, self._token, self._job = number, token, job
        self._places = [self._resolved(*address) for address in addresses]
        family, place = self._places[number]
        self._door = socket.socket(family, socket.SOCK_STREAM)
        self._door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._door.bind(place)
            self._door.listen(STRANGERS)
        except OSError as error:
            self._door.close()
            raise UserError(f"agent {number} cannot listen at {place[0]}:{place[1]}: {error.strerror}.") from None
        self._door.setblocking(False)
        self._ways: dict[int, _Wire] = {}  # to each other agent
        self._retry_s = dict.fromkeys((n for n in range(len(addresses)) if n != number), 0.0)
        self._wires: list[_Wire] = []  # from others, and for workers

    @staticmethod
    def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UserError(f"--agents: {host!r} is not known here: {error.strerror}.") from None
        return family, place

    @property
    def sources(self) -> list[socket.socket]:
        """To be waited on; then call `turn`."""
        return [self._door, *(wire.socket for wire in (*self._ways.values(), *self._wires))]

    def close(self) -> None:
        for own in self.sources:
            own.close()

    # --- saying -----------------------------------------------------------------------------------------------

    def send(self, agent: int, message: Any) -> None:
        """What cannot be said now is lost, as on any network: who must be heard says it again."""
        wire = self._ways.get(agent)
        if wire is None or wire.state != "open" or len(wire.unsent) > MOST_UNSENT:
            return
        body = frames.encode(message)
        wire.sent += 1
        wire.unsent += _FRAME.pack(len(body), wire.sent, _mac(wire.key, wire.sent, body)) + body
        with suppress(OSError):  # `turn` finds out
            wire.flush()

    def dial(self, agent: int, pair: Pair) -> None:
        """Comes to `Linked` or `NotLinked`."""
        self._wires.append(self._connect(agent, pair))

    def _connect(self, agent: int, pair: Pair | None = None) -> _Wire:
        family, place = self._places[agent]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError, OSError):  # its first read says what has become of it
            made.connect(place)
        return _Wire(made, "greeting", agent, pair)

    # --- hearing ----------------------------------------------------------------------------------------------

    def turn(self) -> list[News]:
        """What has come since the last call; it never waits."""
        now = time.monotonic()
        news: list[News] = []
        for agent, retry in self._retry_s.items():
            if agent not in self._ways and now >= retry:
                self._ways[agent] = self._connect(agent)
                self._retry_s[agent] = now + RETRY_S
        self._accept()
        for agent, wire in list(self._ways.items()):
            if not self._go_on(wire, now, news):
                wire.socket.close()
                del self._ways[agent]
                if wire.state == "open":
                    self._retry_s[agent] = 0.0  # at once: whether it is refused tells whether the agent has ended
        kept = []
        for wire in self._wires:
            alive = self._go_on(wire, now, news)
            if wire.state == "handed":
                continue
            if alive:
                kept.append(wire)
                continue
            wire.socket.close()
            if wire.pair and wire.state != "hello":
                news.append(NotLinked(wire.pair))
        self._wires = kept
        return news

    def _accept(self) -> None:
        with suppress(BlockingIOError, OSError):
            while True:
                stranger, _ = self._door.accept()
                if sum(wire.state == "hello" for wire in self._wires) >= STRANGERS:
                    stranger.close()
                    continue
                stranger.setblocking(False)
                stranger.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nonce = secrets.token_bytes(_NONCE)
                self._wires.append(_Wire(stranger, "hello", nonce=nonce, unsent=bytearray(nonce)))

    def _go_on(self, wire: _Wire, now: float, news: list[News]) -> bool:
        """False when the connection is of no use any more."""
        try:
            wire.flush()
            match wire.state:
                case "greeting":
                    self._greet(wire)
                case "hello":
                    self._welcome(wire, news)
                case "answer":
                    self._believe(wire, news)
            if wire.state == "open":
                self._read(wire, news)
        except ConnectionRefusedError:
            if wire.pair is None:
                news.append(Refused(wire.agent))
            return False
        except (OSError, EOFError, frames.FrameError):
            return False
        limit = CONNECT_S if wire.state == "greeting" else GREET_S
        return wire.state in ("open", "handed") or now - wire.begun_s < limit

    def _greet(self, wire: _Wire) -> None:
        """The other end's challenge has come: who is there, and the proof."""
        if not wire.fill(_NONCE):
            return
        theirs, ours = wire.take(_NONCE), secrets.token_bytes(_NONCE)
        pair = wire.pair
        links = [pair.epoch, pair.low, pair.high] if pair else []
        hello = json.dumps([self.number, wire.agent, self._job, links]).encode()
        proof = _proof(self._token, b"who", theirs, ours, hello)
        wire.unsent += _HELLO.pack(len(hello)) + hello + ours + proof
        wire.proof, wire.key = _proof(self._token, b"so", ours, theirs), _proof(self._token, b"key", theirs, ours)
        wire.state = "answer"
        wire.flush()

    def _welcome(self, wire: _Wire, news: list[News]) -> None:
        if not wire.fill(_HELLO.size):
            return
        (size,) = _HELLO.unpack_from(wire.data)
        if size > LONGEST_HELLO:
            raise EOFError
        if not wire.fill(_HELLO.size + size + _NONCE + _PROOF):
            return
        wire.take(_HELLO.size)
        hello, theirs, proof = wire.take(size), wire.take(_NONCE), wire.take(_PROOF)
        if not hmac.compare_digest(proof, _proof(self._token, b"who", wire.nonce, theirs, hello)):
            raise EOFError
        origin, to, job, pair = _read_hello(hello)
        if to != self.number or origin not in self._retry_s:
            raise EOFError
        if job != self._job:
            news.append(Differs(origin))
            raise EOFError
        wire.agent, wire.key = origin, _proof(self._token, b"key", wire.nonce, theirs)
        wire.unsent += _proof(self._token, b"so", theirs, wire.nonce)
        wire.flush()
        wire.state = "open"
        if pair:
            self._hand(wire, Pair(*pair), news)

    def _believe(self, wire: _Wire, news: list[News]) -> None:
        if not wire.fill(_PROOF):
            return
        if not hmac.compare_digest(wire.take(_PROOF), wire.proof):
            raise EOFError
        wire.state = "open"
        if wire.pair:
            self._hand(wire, wire.pair, news)

    @staticmethod
    def _hand(wire: _Wire, pair: Pair, news: list[News]) -> None:
        wire.state = "handed"
        news.append(Linked(pair, wire.socket))

    def _read(self, wire: _Wire, news: list[News]) -> None:
        """Whole messages. What comes over a connection that this agent has made only says that it has ended."""
        while wire.fill(_FRAME.size):
            size, number, mac = _FRAME.unpack_from(wire.data)
            if size > frames.LARGEST or number != wire.received + 1:
                raise EOFError
            if not wire.fill(_FRAME.size + size):
                return
            wire.take(_FRAME.size)
            body = wire.take(size)
            if not hmac.compare_digest(mac, _mac(wire.key, number, body)):
                raise EOFError
            wire.received = number
            news.append(Heard(wire.agent, frames.decode(body)))


def _read_hello(raw: bytes) -> tuple[int, int, str, list[int]]:
    """Who speaks, to whom, of which job, and for which pair of workers. Raises EOFError for anything else."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        raise EOFError from None
    match said:
        case [int(origin), int(to), str(job), [] as pair]:
            return origin, to, job, pair
        case [int(origin), int(to), str(job), [int(), int(), int()] as pair]:
            return origin, to, job, pair
    raise EOFError


def _proof(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join(len(part).to_bytes(4, "little") + part for part in parts), hashlib.sha256)


def _mac(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "little") + body, hashlib.sha256)[:_MAC]
