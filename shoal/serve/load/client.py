"""A client process: sends requests over kept connections and writes down when each was due, sent and answered.

    python -m shoal.serve.load.client

One JSON object on stdin says what to send (`Order`); "ready" on stdout; then "go TIME" on stdin (CLOCK_MONOTONIC); at
the end one JSON object with a sample for each request. Requests of an open loop leave when they are due, whether or not
others have been answered: on an idle connection, on a new one, or, when ``connections`` are open, on the first that
becomes free. Their time is counted from when they were due, so that a server that stalls cannot hide it by holding up
the clients that would have noticed (coordinated omission: Tene, 2013)."""

import asyncio
import json
import os
import ssl
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import httptools

EVENT = b"data: "
DONE = b"[DONE]"


@dataclass
class Order:
    host: str
    port: int
    tls: bool
    path: str
    headers: dict[str, str]  # all but Content-Length
    bodies: list[str]
    arrivals: list[tuple[float, int]]  # of an open loop: (seconds since the begin, which body); of a closed one: none
    clients: int  # of a closed loop: each sends its next request when it has the answer to the last one
    first_body: int  # of a closed loop: where this process's clients begin among the bodies
    seconds: float  # no request is due, or begun, after these
    connections: int  # at the same time, at most
    patience_s: float  # what is not answered so long after the end of it all counts as not answered


@dataclass
class Sample:
    due: float  # seconds since the begin, as all of these
    sent: float = 0.0
    first: float = 0.0  # the first event of a stream; 0.0: there was none
    end: float = 0.0
    status: int = 0  # 0: the connection broke, or no answer came in time
    told_when: bool = False  # a Retry-After came with it
    tokens: int = 0  # of a stream: as its usage says, or its events
    body: int = 0  # which of the order's


class Load:
    """All connections of this process, and what they have seen."""

    def __init__(self, order: Order, begun: float) -> None:
        self.order = order
        self.begun = begun
        self.samples: list[Sample] = []
        self.gaps: list[float] = []
        self.loop = asyncio.get_running_loop()
        self.tls = ssl.create_default_context() if order.tls else None
        self._idle: list[Connection] = []
        self._open = 0
        self._waiting: deque[tuple[Sample, int]] = deque()
        self._left = 0
        self._sent_all = False
        self._ended = asyncio.Event()
        self._busy: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_body = order.first_body
        head = "".join(f"{name}: {value}\r\n" for name, value in order.headers.items())
        start = f"POST {order.path} HTTP/1.1\r\n{head}"
        made = [body.encode() for body in order.bodies]
        self.requests = [f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in made]

    def now(self) -> float:
        return time.monotonic() - self.begun

    async def run(self) -> None:
        if self.order.clients:
            for _ in range(self.order.clients):
                self._begin(self._next())
        else:
            await self._arrivals()
        self._sent_all = True
        if self._left:
            limit = self.order.seconds + self.order.patience_s - self.now()
            try:
                await asyncio.wait_for(self._ended.wait(), max(0.0, limit))
            except TimeoutError:
                self._give_up()
        for connection in self._idle:
            connection.close()

    async def _arrivals(self) -> None:
        for at, body in self.order.arrivals:
            wait = at - self.now()
            if wait > 0:
                await asyncio.sleep(wait)
            self._begin((Sample(at, body=body), body))

    def _next(self) -> tuple[Sample, int]:
        body, self._next_body = self._next_body, (self._next_body + 1) % len(self.requests)
        return Sample(self.now(), body=body), body

    def _begin(self, request: tuple[Sample, int]) -> None:
        self.samples.append(request[0])
        self._left += 1
        self._dispatch(request)

    def _dispatch(self, request: tuple[Sample, int]) -> None:
        if self._idle:
            self._send(self._idle.pop(), request)
        elif self._open < self.order.connections:
            self._open += 1
            task = self.loop.create_task(self._connect(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting.append(request)

    async def _connect(self, request: tuple[Sample, int]) -> None:
        try:
            _, connection = await self.loop.create_connection(
                lambda: Connection(self), self.order.host, self.order.port, ssl=self.tls
            )
        except OSError:
            self._open -= 1
            request[0].sent = request[0].end = self.now()
            await asyncio.sleep(0.05)  # nobody listens: a closed loop must not spin
            self._answered()
            return
        self._send(connection, request)

    def _send(self, connection: "Connection", request: tuple[Sample, int]) -> None:
        self._busy.add(connection)
        connection.send(request[0], self.requests[request[1]])

    def _answered(self) -> None:
        self._left -= 1
        if self.order.clients and self.now() < self.order.seconds:
            self._begin(self._next())
        if self._sent_all and not self._left:
            self._ended.set()

    def free(self, connection: "Connection", kept: bool) -> None:
        """It has had its answer, or has broken."""
        self._busy.discard(connection)
        if kept and self._waiting:
            self._send(connection, self._waiting.popleft())
        elif kept:
            self._idle.append(connection)
        else:
            self._open -= 1
            if self._waiting:
                self._dispatch(self._waiting.popleft())
        self._answered()

    def lost(self, connection: "Connection") -> None:
        """The server closed an idle connection."""
        if connection in self._idle:
            self._idle.remove(connection)
            self._open -= 1

    def _give_up(self) -> None:
        """Whatever is not answered now took at least so long."""
        now = self.now()
        for sample in self.samples:
            if not sample.end:
                sample.end = now
                sample.sent = sample.sent or now
        for connection in self._busy:
            connection.abort()


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sample: Sample | None = None
        self._is_stream = False
        self._keep = True
        self._events = b""
        self._last = 0.0
        self._usage = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, sample: Sample, request: bytes) -> None:
        self._sample = sample
        sample.sent = self._load.now()
        self._is_stream, self._keep, self._events, self._last, self._usage = False, True, b"", 0.0, 0
        assert self._transport is not None
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        low = name.lower()
        if low == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")
        elif low == b"retry-after" and self._sample is not None:
            self._sample.told_when = True
        elif low == b"connection":
            self._keep = value.lower() != b"close"

    def on_body(self, body: bytes) -> None:
        if not self._is_stream or self._sample is None:
            return
        now = self._load.now()
        *lines, self._events = (self._events + body).split(b"\n")
        for line in lines:
            if line.startswith(EVENT):
                self._event(line[len(EVENT) :].strip(), now, self._sample)

    def _event(self, text: bytes, now: float, sample: Sample) -> None:
        if text == DONE:
            return
        if b'"usage":{' in text or b'"usage": {' in text:
            self._usage = _completion_tokens(text)
            if b'"choices":[]' in text or b'"choices": []' in text:
                return
        if text.startswith(b'{"error"'):
            self._keep = False
            sample.status = -1
            return
        sample.tokens += 1
        if sample.first:
            self._load.gaps.append(now - self._last)
        else:
            sample.first = now
        self._last = now

    def on_message_complete(self) -> None:
        sample, self._sample = self._sample, None
        if sample is None:
            return
        sample.end = self._load.now()
        broke_off = sample.status == -1
        sample.status = 500 if broke_off else self._parser.get_status_code()
        sample.tokens = self._usage or sample.tokens
        keep = self._keep and self._parser.should_keep_alive()
        if not keep:
            self.close()
        self._load.free(self, keep)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._sample is None:
            self._load.lost(self)
            return
        sample, self._sample = self._sample, None
        if not sample.end:
            sample.end, sample.status = self._load.now(), 0
        self._load.free(self, kept=False)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _completion_tokens(text: bytes) -> int:
    try:
        return int(json.loads(text)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return 0


def main() -> None:
    order = Order(**json.loads(sys.stdin.readline()))
    _say("ready")
    begun = float(sys.stdin.readline().split()[1])

    async def run() -> Load:
        await asyncio.sleep(max(0.0, begun - time.monotonic()))
        load = Load(order, begun)
        await load.run()
        return load

    try:
        import uvloop
    except ImportError:  # it is not made for every system
        load = asyncio.run(run())
    else:
        load = uvloop.run(run())
    samples = [[s.due, s.sent, s.first, s.end, s.status, s.told_when, s.tokens, s.body] for s in load.samples]
    _say(json.dumps({"samples": samples, "gaps": load.gaps, "cpu_s": time.process_time()}))


def _say(line: str) -> None:
    """All of it: an unbuffered ``sys.stdout`` drops what a pipe does not take at once."""
    left = memoryview(line.encode() + b"\n")
    while left:
        left = left[os.write(1, left) :]


if __name__ == "__main__":
    main()
