"""The HTTP server: who may connect, who may ask, which route answers, what is counted."""

import asyncio
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Awaitable, Mapping

from shoal.errors import UserError
from shoal.serve.http.connection import Connection
from shoal.serve.http.heads import Heads
from shoal.serve.http.keys import digests, matching
from shoal.serve.http.messages import Answered, Direct, HttpError, HttpRequest, HttpResponse, HttpStream, Route
from shoal.serve.options import ServeOptions, is_loopback
from shoal.serve.service import Service
from shoal.serve.waiting import Held

SWEEP_S = 1.0  # how often slow connections are looked for, while there are any
BACKLOG = 1024
MOST_HOSTS = 64  # spellings of it that are remembered


def _direct(route: object) -> tuple[Direct, ...]:
    return (route,) if isinstance(route, Direct) else ()


def _extra(options: ServeOptions) -> Mapping[str, str]:
    """Headers of every answer."""
    if not options.allow_origin:
        return {"X-Content-Type-Options": "nosniff"}
    return {
        "X-Content-Type-Options": "nosniff",
        "Access-Control-Allow-Origin": options.allow_origin,
        "Access-Control-Allow-Headers": "authorization, content-type, x-api-key",
        "Access-Control-Allow-Methods": "GET, POST",
    }


class HttpServer:
    def __init__(
        self, service: Service, options: ServeOptions, routes: Mapping[tuple[str, str], Route], open_paths: set[str]
    ) -> None:
        """``routes`` maps (method, path) to what answers; ``open_paths`` need no API key."""
        self.service = service
        self.body_bytes = options.body_bytes
        self.read_timeout_s = options.read_timeout_s
        self.idle_timeout_s = options.idle_timeout_s
        self.closing = False
        self._options = options
        self._routes = routes
        self._paths = {path for _, path in routes}
        self._open_paths = open_paths
        self._direct = {route: direct.begin for route in routes.values() for direct in _direct(route)}
        self._keys = digests(options.api_keys)
        self._loopback: set[str] = set()  # values of Host that were looked at, and name this machine
        self.heads = Heads()
        self.extra_headers = _extra(options)
        self._connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._listener: asyncio.Server | None = None
        self.port = 0

    async def listen(self) -> None:
        """Raises UserError when the address cannot be bound or the TLS files cannot be used."""
        options = self._options
        try:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            sock = socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise UserError(
                f"cannot listen on {options.host}:{options.port}: {error.strerror or error}: choose another --port."
            ) from None
        self.port = sock.getsockname()[1]
        tls = self._tls()
        self._listener = await self._loop.create_server(
            lambda: Connection(self), sock=sock, ssl=tls, ssl_handshake_timeout=self.read_timeout_s if tls else None
        )

    def _tls(self) -> ssl.SSLContext | None:
        if not self._options.tls_cert:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._options.tls_cert, self._options.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"cannot use the TLS files {self._options.tls_cert!r}: {error}.") from None
        return context

    # what connections call

    def enter(self, connection: Connection) -> bool:
        """False when there are too many."""
        self._connections.add(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return len(self._connections) <= self._options.connections and not self.closing

    def leave(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._connections if c.overdue(now)]:
            connection.abort()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep) if self._connections else None

    def begin(
        self, request: HttpRequest, held: Held, to: Answered
    ) -> int | HttpResponse | Awaitable[HttpResponse | HttpStream]:
        """As `Direct.begin`, of whatever route it is. Raises HttpError; all else that a route raises is reported on
        stderr and becomes one, without its text."""
        try:
            route = self._route(request)
            if isinstance(route, HttpResponse):
                return route
            begin = self._direct.get(route)
            return route(self.service, request) if begin is None else begin(request, held, to)
        except Exception as error:
            raise self._told(error) from None

    async def respond(self, begun: Awaitable[HttpResponse | HttpStream]) -> HttpResponse | HttpStream:
        """What comes of it. Raises as `begin` does."""
        try:
            return await begun
        except Exception as error:
            raise self._told(error) from None

    def _told(self, error: Exception) -> HttpError:
        """What a client hears of what a route has raised."""
        match error:
            case HttpError():
                return error
            case RecursionError():
                return HttpError(400, "the body is nested too deeply")
        return self.failed(error)

    async def answer(self, request: HttpRequest) -> HttpResponse | HttpStream:
        """For those who ask within a task that holds (``Service.hold``). Raises as `begin` does."""
        route = self._route(request)
        return route if isinstance(route, HttpResponse) else await self.respond(route(self.service, request))

    def _route(self, request: HttpRequest) -> Route | HttpResponse:
        """What answers it, or the answer. Raises HttpError for who may not ask, and what cannot be asked."""
        self._check_origin(request)
        method = "GET" if request.method == "HEAD" else request.method
        if method == "OPTIONS" and self._options.allow_origin:
            return HttpResponse(204)
        if request.path not in self._open_paths:
            self._check_key(request)
        route = self._routes.get((method, request.path))
        if route is not None:
            return route
        if request.path not in self._paths:
            raise HttpError(404, "no such address: see /docs")
        allowed = ", ".join(sorted(m for m, path in self._routes if path == request.path))
        answer = HttpError(405, f"this address takes {allowed}").response()
        answer.headers = {"Allow": allowed}
        return answer

    def failed(self, error: BaseException) -> HttpError:
        self.report(error)
        return HttpError(500, "the server failed on this request")

    def _check_key(self, request: HttpRequest) -> None:
        if not self._keys:
            return
        name = matching(request, self._keys)
        if not name:
            raise HttpError(401, "no valid API key: send it as 'Authorization: Bearer KEY'")
        request.client = name

    def _check_origin(self, request: HttpRequest) -> None:
        """Pages of other origins that run in a browser on this machine must not reach a server that asks for no key."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is None and (host in self._loopback or self._keys):
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if host and not self._keys and not is_loopback(name.strip("[]")):
            raise HttpError(403, f"this server answers to loopback names only, not to {name[:80]!r}")
        if origin is None and len(self._loopback) < MOST_HOSTS:
            self._loopback.add(host)
        if origin is None or origin.partition("://")[2] == host or self._options.allow_origin in ("*", origin):
            return
        raise HttpError(403, "pages of other origins may not ask: see --allow-origin")

    def counted(self, request: HttpRequest, status: int, seconds: float, held: Held) -> None:
        route = request.path if request.path in self._paths else "other"
        self.service.counted(route, status, seconds, held)

    def report(self, error: BaseException) -> None:
        """Where in the code it happened and of what kind it was: an error's text may hold a piece of a request."""
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
        print(f"shoal: a request failed inside of the server: {type(error).__name__} at {where}", file=sys.stderr)

    # the end

    async def close(self, drain_s: float) -> None:
        """Listens no more, lets open requests end for so long, then closes every connection."""
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            if connection.is_idle:
                connection.close()
        await self.service.drain(drain_s)
        end = time.monotonic() + min(1.0, drain_s)  # the last answers leave
        while any(not c.is_idle for c in self._connections) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
