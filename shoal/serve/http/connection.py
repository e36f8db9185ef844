"""One HTTP/1.1 connection: bytes to requests, answers to bytes, and nothing that a slow or broken client can hold.

The parser is llhttp's (``httptools``); a head that it has read before, to the byte, is not read again (`Heads`). Most
requests are answered without a task of their own (`messages.Direct`). Requests of a connection are answered one after
the other, in order; those that are sent ahead wait, a few of them, then the socket is no longer read. All that is
limited: the head, the body, the time from the first byte of a request to its last, the time between two requests, and
how long written bytes may lie unread.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, cast

import httptools

from shoal.serve.http.heads import Head, head_of
from shoal.serve.http.messages import HttpError, HttpRequest, HttpResponse, HttpStream
from shoal.serve.waiting import Held, now_held

if TYPE_CHECKING:
    from shoal.serve.http.server import HttpServer

MOST_HEAD_BYTES = 32 << 10
MOST_AHEAD = 8  # requests that wait while one is answered
UNREAD_S = 30.0  # that an answer may lie in the socket's buffer before the client counts as gone


class Connection(asyncio.Protocol):
    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._peer = ""
        self._reset()
        self._ahead: deque[tuple[HttpRequest, bool]] = deque()
        self._request: HttpRequest | None = None  # that is being answered
        self._keep = True  # the connection, after its answer
        self._begun = 0.0
        self._held: Held | None = None
        self._waits = -1  # the number of what a model process has been asked, without a task
        self._task: asyncio.Task[None] | None = None  # what answers otherwise
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
        self._whole: Head | None = None  # of the request that the parser has just read to its end

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
            self._task.add_done_callback(lambda _: self._let_go())
            self._task.cancel()
        elif self._waits >= 0:
            self._server.service.withdraw(self._waits)
            self._let_go()
        self._request = None

    def data_received(self, data: bytes) -> None:
        if self._broken is not None:
            return
        end = data.find(b"\r\n\r\n") + 4
        if not self._partial:
            self._since = time.monotonic()
            if end > 3 and self._is_free():
                head = self._server.heads.get(data[:end])
                if head is not None and head.length == len(data) - end:
                    self._begin(HttpRequest(head.method, head.path, head.headers, data[end:], self._peer), head.keep)
                    return
            self._partial = True
            self._whole = None
        else:
            end = 0  # of a head that began before
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(HttpError(400, "no other protocol than HTTP/1.1 is spoken here"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, HttpError) else HttpError(400, "the request cannot be read"))
        except httptools.HttpParserError:
            self._fail(HttpError(400, "this is not HTTP/1.1"))
        else:
            if end > 3 and self._whole is not None and self._whole.length == len(data) - end:
                self._server.heads.add(data[:end], self._whole)

    def eof_received(self) -> None:
        return  # closes: who leaves before the answer does not want it

    def pause_writing(self) -> None:
        self._stalled = time.monotonic()
        self._writable.clear()

    def resume_writing(self) -> None:
        self._stalled = 0.0
        self._writable.set()
        if self._request is None and self._ahead:
            self._next()

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
        if expects and self._request is None and self._transport is not None:
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
        whole = head_of(request, keep)
        self._reset()
        self._whole = whole
        if self._is_free():
            self._begin(request, keep)
            return
        self._ahead.append((request, keep))
        if len(self._ahead) >= MOST_AHEAD and self._reading and self._transport is not None:
            self._transport.pause_reading()
            self._reading = False

    def _is_free(self) -> bool:
        """Whether the next request can be begun: the last one has been answered, and its answer is being read."""
        return self._request is None and not self._ahead and self._writable.is_set()

    # answering

    def _begin(self, request: HttpRequest, keep: bool) -> None:
        if self._transport is None:
            return
        self._request, self._keep, self._begun = request, keep, time.monotonic()
        self._held = self._server.service.enter()
        try:
            began = self._server.begin(request, self._held, self)
        except HttpError as error:
            self.answered(error.response())
            return
        if isinstance(began, int):
            self._waits = began
        elif isinstance(began, HttpResponse):
            self.answered(began)
        else:
            self._task = self._loop.create_task(self._answer(request, began))

    def answered(self, answer: HttpResponse) -> None:
        """The whole answer to the request at hand."""
        request = self._request
        if request is None or self._transport is None:
            self._let_go()
            return
        self._keep = self._keep and not self._server.closing
        self._write(answer, self._keep, self._server.extra_headers, head_only=request.method == "HEAD")
        self._end(request, answer.status)

    def broke(self, error: Exception) -> None:
        self.answered(self._server.failed(error).response())

    async def _answer(self, request: HttpRequest, began: Awaitable[HttpResponse | HttpStream]) -> None:
        """What takes a while, or comes in pieces."""
        now_held.set(self._held)
        try:
            answer = await self._server.respond(began)
        except HttpError as error:
            answer = error.response()
        if isinstance(answer, HttpResponse):
            self._task = None
            self.answered(answer)
            return
        self._keep = self._keep and not self._server.closing
        self._keep = await self._stream(answer, self._keep, self._server.extra_headers)
        self._task = None
        self._end(request, answer.status)

    def _end(self, request: HttpRequest, status: int) -> None:
        """It has been answered: the next one, if that is there."""
        held = self._held
        if held is not None:
            self._server.counted(request, status, time.monotonic() - self._begun, held)
        self._let_go()
        self._request = None
        if self._transport is None:
            return
        self._since = time.monotonic()
        if not self._keep or (self._broken is not None and not self._ahead):
            if self._broken is not None and self._keep:
                self._write(self._broken.response(), keep=False)
            self._transport.close()
        elif self._ahead and self._writable.is_set():
            self._next()

    def _next(self) -> None:
        request, keep = self._ahead.popleft()
        if not self._reading and self._transport is not None:
            self._transport.resume_reading()
            self._reading = True
        self._begin(request, keep)

    def _let_go(self) -> None:
        held, self._held, self._waits = self._held, None, -1
        if held is not None:
            self._server.service.leave(held)

    def _gone(self) -> bool:
        """Whether the client has left; it may leave at every ``await``."""
        return self._transport is None

    def _fail(self, error: HttpError) -> None:
        """The rest of the connection cannot be understood: answer what was, then say so and close."""
        self._broken = error
        if self._request is None and not self._ahead and self._transport is not None:
            self._write(error.response(), keep=False)
            self._transport.close()

    def _write(
        self, answer: HttpResponse, keep: bool, headers: Mapping[str, str] | None = None, head_only: bool = False
    ) -> None:
        if self._transport is None:
            return
        head = self._server.heads.written(answer, b"Content-Length: %d\r\n" % len(answer.body), keep, headers)
        self._transport.write(head if head_only else head + answer.body)

    async def _stream(self, answer: HttpStream, keep: bool, headers: Mapping[str, str]) -> bool:
        """Whether the connection can be kept: a stream that broke off cannot be told from a whole one otherwise."""
        if self._transport is None:
            return False
        self._transport.write(self._server.heads.written(answer, b"Transfer-Encoding: chunked\r\n", keep, headers))
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
        return self._request is None and not self._partial and not self._ahead

    def overdue(self, now: float) -> bool:
        """Whether it has kept the server waiting for too long."""
        if self._stalled:
            return now - self._stalled > UNREAD_S
        if self._request is not None:
            return False
        limit = self._server.read_timeout_s if self._partial else self._server.idle_timeout_s
        return now - self._since > limit

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            if self._partial and self._request is None:
                self._write(HttpError(408, "the request did not come to its end in time").response(), keep=False)
            self._transport.abort() if self._stalled else self._transport.close()
