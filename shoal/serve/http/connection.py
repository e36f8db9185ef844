"""One HTTP/1.1 connection: bytes to requests, answers to bytes, and nothing that a slow or broken client can hold.

The parser is llhttp's (``httptools``). Requests of a connection are answered one after the other, in order; those that
are sent ahead wait, a few of them, then the socket is no longer read. All that is limited: the head, the body, the time
from the first byte of a request to its last, the time between two requests, and how long written bytes may lie unread.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import httptools

from shoal.serve.http.messages import HttpError, HttpRequest, HttpResponse, HttpStream

if TYPE_CHECKING:
    from shoal.serve.http.server import HttpServer

MOST_HEAD_BYTES = 32 << 10
MOST_AHEAD = 8  # requests that wait while one is answered
UNREAD_S = 30.0  # that an answer may lie in the socket's buffer before the client counts as gone
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Connection(asyncio.Protocol):
    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._peer = ""
        self._reset()
        self._ahead: deque[tuple[HttpRequest, bool]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._broken: HttpError | None = None  # answered after the open requests, then the connection closes
        self._reading = True
        self._writable = asyncio.Event()
        self._writable.set()
        self._since = time.monotonic()  # begin of what is being waited for
        self._stalled = 0.0  # since when the client does not read; 0.0: it does

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._partial = False  # bytes of a request have come

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        if not self._server.enter(self):
            self._write(HttpError(503, "too many connections", retry_after_s=1).response(), keep=False)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server.leave(self)
        self._ahead.clear()
        self._writable.set()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._broken is not None:
            return
        if not self._partial:
            self._partial = True
            self._since = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(HttpError(400, "no other protocol than HTTP/1.1 is spoken here"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, HttpError) else HttpError(400, "the request cannot be read"))
        except httptools.HttpParserError:
            self._fail(HttpError(400, "this is not HTTP/1.1"))

    def eof_received(self) -> None:
        return  # closes: who leaves before the answer does not want it

    def pause_writing(self) -> None:
        self._stalled = time.monotonic()
        self._writable.clear()

    def resume_writing(self) -> None:
        self._stalled = 0.0
        self._writable.set()

    # what the parser calls

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._count_head(len(name) + len(value))

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            raise HttpError(431, f"the request's head is longer than {MOST_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        length = self._headers.get("content-length", "0")
        if int(length) > self._server.body_bytes:
            raise self._too_large()
        expects = self._headers.get("expect", "").lower() == "100-continue"
        if expects and self._task is None and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._server.body_bytes:
            raise self._too_large()
        self._body.append(body)

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body is larger than {self._server.body_bytes} bytes")

    def on_message_complete(self) -> None:
        try:
            path = httptools.parse_url(self._url).path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
            raise HttpError(400, "the request's address cannot be read") from None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        method = self._parser.get_method().decode("ascii")
        request = HttpRequest(method, path, self._headers, body, self._peer)
        keep = self._parser.should_keep_alive()
        self._reset()
        if self._task is None:
            self._task = self._loop.create_task(self._answer(request, keep))
            return
        self._ahead.append((request, keep))
        if len(self._ahead) >= MOST_AHEAD and self._reading and self._transport is not None:
            self._transport.pause_reading()
            self._reading = False

    # answering

    async def _answer(self, request: HttpRequest, keep: bool) -> None:
        while not self._gone():
            with self._server.service.hold():
                keep = await self._answer_one(request, keep)
            if not keep or self._gone():
                break
            self._since = time.monotonic()
            if not self._ahead:
                self._task = None
                if self._broken is None:
                    return
                break
            request, keep = self._ahead.popleft()
            if not self._reading and self._transport is not None:
                self._transport.resume_reading()
                self._reading = True
        if self._transport is not None:
            if self._broken is not None and keep:
                self._write(self._broken.response(), keep=False)
            self._transport.close()

    async def _answer_one(self, request: HttpRequest, keep: bool) -> bool:
        """Whether the connection is kept."""
        begun = time.monotonic()
        try:
            answer: HttpResponse | HttpStream = await self._server.respond(request)
        except HttpError as error:
            answer = error.response()
        headers = self._server.extra_headers(request)
        keep = keep and not self._server.closing
        if isinstance(answer, HttpStream):
            keep = await self._stream(answer, keep, headers)
        else:
            self._write(answer, keep, headers, head_only=request.method == "HEAD")
            if not self._writable.is_set():
                await self._writable.wait()
        self._server.counted(request, answer.status, time.monotonic() - begun)
        return keep

    def _gone(self) -> bool:
        """Whether the client has left; it may leave at every ``await``."""
        return self._transport is None

    def _fail(self, error: HttpError) -> None:
        """The rest of the connection cannot be understood: answer what was, then say so and close."""
        self._broken = error
        if self._task is None and self._transport is not None:
            self._write(error.response(), keep=False)
            self._transport.close()

    def _write(
        self, answer: HttpResponse, keep: bool, headers: Mapping[str, str] | None = None, head_only: bool = False
    ) -> None:
        if self._transport is None:
            return
        length = f"Content-Length: {len(answer.body)}\r\n"
        head = self._head(answer, length, keep, headers)
        self._transport.write(head if head_only else head + answer.body)

    def _head(
        self, answer: HttpResponse | HttpStream, framing: str, keep: bool, headers: Mapping[str, str] | None
    ) -> bytes:
        more = "".join(f"{name}: {value}\r\n" for name, value in {**answer.headers, **(headers or {})}.items())
        closing = "" if keep else "Connection: close\r\n"
        text = f"Date: {_date()}\r\nContent-Type: {answer.media_type}\r\n{framing}{closing}{more}\r\n"
        return _STATUS_LINES[answer.status] + text.encode("latin-1", "replace")

    async def _stream(self, answer: HttpStream, keep: bool, headers: Mapping[str, str]) -> bool:
        """Whether the connection can be kept: a stream that broke off cannot be told from a whole one otherwise."""
        if self._transport is None:
            return False
        self._transport.write(self._head(answer, "Transfer-Encoding: chunked\r\n", keep, headers))
        whole = False
        try:
            async for chunk in answer.chunks:
                if self._gone():
                    break
                if chunk:
                    self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                if not self._writable.is_set():
                    await self._writable.wait()
            else:
                whole = True
        except Exception as error:  # its head has left already: all that can be done is to break off
            self._server.report(error)
        finally:
            close = getattr(answer.chunks, "aclose", None)
            if close is not None:
                await close()
        if whole and not self._gone():
            self._transport.write(b"0\r\n\r\n")
        return whole and keep

    # what the server calls

    @property
    def is_idle(self) -> bool:
        return self._task is None and not self._partial

    def overdue(self, now: float) -> bool:
        """Whether it has kept the server waiting for too long."""
        if self._stalled:
            return now - self._stalled > UNREAD_S
        if self._task is not None:
            return False
        limit = self._server.read_timeout_s if self._partial else self._server.idle_timeout_s
        return now - self._since > limit

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            if self._partial and self._task is None:
                self._write(HttpError(408, "the request did not come to its end in time").response(), keep=False)
            self._transport.abort() if self._stalled else self._transport.close()


_now: tuple[int, str] = (0, "")


def _date() -> str:
    """As HTTP writes it, made once a second."""
    global _now
    second = int(time.time())
    if _now[0] != second:
        _now = second, formatdate(second, usegmt=True)
    return _now[1]
