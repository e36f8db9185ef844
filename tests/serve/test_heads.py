"""Heads that are known are not parsed again, and that changes nothing: however the bytes of requests come, the same
requests are answered, in order. The server behind the connection is made up."""

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.http import heads
from shoal.serve.http.connection import MOST_AHEAD, Connection
from shoal.serve.http.heads import Heads
from shoal.serve.http.messages import HttpError, HttpRequest, HttpResponse


class MadeUp:
    """Writes down what it is asked, and answers with it: at once, or when the test says so."""

    def __init__(self, at_once: bool = True) -> None:
        self.heads, self.body_bytes, self.closing, self.extra_headers = Heads(), 1000, False, {}
        self.withdrawn: list[int] = []
        self.service = SimpleNamespace(enter=self.enter, leave=self.leave, withdraw=self.withdrawn.append)
        self.asked: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.waiting: list[tuple[Connection, HttpResponse]] = []
        self.at_once = at_once
        self.held = 0
        self.counted = lambda *told: None

    def enter(self, connection: Any = None) -> Any:
        self.held += connection is None
        return True

    def leave(self, held: Any) -> None:
        self.held -= held is True

    def begin(self, request: HttpRequest, held: Any, to: Connection) -> Any:
        self.asked.append((request.method, request.path, request.body, dict(request.headers)))
        if request.path == "/refused":
            raise HttpError(429, "later", retry_after_s=1)
        answer = HttpResponse(200, request.body)
        if self.at_once:
            return answer
        self.waiting.append((to, answer))
        return len(self.asked)


class Socket:
    def __init__(self) -> None:
        self.written, self.reads, self.is_closed = b"", True, False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1)

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def close(self) -> None:
        self.is_closed = True


def opened(server: MadeUp) -> tuple[Connection, Socket]:
    connection, socket = Connection(server), Socket()  # type: ignore[arg-type]
    connection.connection_made(socket)  # type: ignore[arg-type]
    return connection, socket


def written(path: str, body: bytes, chunked: bool = False) -> bytes:
    if chunked:
        pieces = b"".join(b"%x\r\n%b\r\n" % (1, bytes([b])) for b in body)
        return f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + pieces + b"0\r\n\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["/a", "/b", "/refused"]), st.sampled_from([b"", b"one", b"two", b"\r\n\r\n"]), st.booleans()
    ),
    min_size=1,
    max_size=6,
)


@given(REQUESTS, st.lists(st.integers(0, 400), max_size=6))
def test_however_the_bytes_come_the_same_requests_are_answered(
    requests: list[tuple[str, bytes, bool]], cuts: list[int]
) -> None:
    async def play() -> None:
        server = MadeUp()
        told = []
        data = b"".join(written(*one) for one in requests)
        for places in ([], cuts):  # the second time all heads are known
            (connection, socket), first = opened(server), len(server.asked)
            ends = sorted({0, len(data), *(place % len(data) for place in places)})
            if not places:  # each by itself
                ends = [0]
                for one in requests:
                    ends.append(ends[-1] + len(written(*one)))
            for start, end in pairwise(ends):
                connection.data_received(data[start:end])
            told.append((server.asked[first:], [line for line in socket.written.split(b"\r\n") if b"Date" not in line]))
            assert server.held == 0
        assert told[0] == told[1]
        assert [(path, body) for _, path, body, _ in told[0][0]] == [(path, body) for path, body, _ in requests]

    asyncio.run(play())


def test_a_head_that_is_known_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        server = MadeUp()
        for number in range(3):
            connection, socket = opened(server)
            if number:
                connection._parser = None  # type: ignore[assignment]  # any use of it fails
            connection.data_received(written("/a", b"%d" % number))
            assert socket.written.endswith(b"%d" % number)
        monkeypatch.setattr(heads, "MOST_HEADS", 2)
        for number in range(5):
            opened(server)[0].data_received(written(f"/{number}", b""))
            assert len(server.heads._known) <= 2
        opened(server)[0].data_received(written("/" + "a" * heads.LONGEST, b""))
        opened(server)[0].data_received(written("/chunked", b"abc", chunked=True))
        assert not [head for head in server.heads._known if b"aaaa" in head or b"chunked" in head]

    asyncio.run(play())


def test_who_sends_ahead_and_does_not_read_makes_nothing_grow() -> None:
    async def play() -> None:
        server = MadeUp(at_once=False)
        connection, socket = opened(server)
        one = written("/a", b"x")
        for _ in range(3 * MOST_AHEAD):
            if socket.reads:
                connection.data_received(one)
        assert (len(server.asked), socket.reads) == (1, False)
        connection.pause_writing()  # its answers are not read
        for to, answer in server.waiting:
            to.answered(answer)
        assert len(server.asked) == 1, "the next one waits until there is room for its answer"
        connection.resume_writing()
        assert len(server.asked) == 2
        connection.connection_lost(None)
        assert server.withdrawn[-1:] == [2], "who leaves takes the request along"
        assert server.held == 0

    asyncio.run(play())
