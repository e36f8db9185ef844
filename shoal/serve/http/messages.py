"""What a route gets and what it gives back."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from shoal.serve.service import Service
    from shoal.serve.waiting import Held

JSON, TEXT, HTML, EVENTS, BYTES = (
    "application/json",
    "text/plain; charset=utf-8",
    "text/html; charset=utf-8",
    "text/event-stream",
    "application/octet-stream",
)


class HttpRequest:
    """One whole request: the body has been read, and its size was within the limit."""

    __slots__ = ("body", "client", "headers", "method", "path")

    def __init__(self, method: str, path: str, headers: Mapping[str, str], body: bytes, client: str) -> None:
        self.method = method
        self.path = path  # without the query
        self.headers = headers  # names in lower case
        self.body = body
        self.client = client  # who asks: the hash of the API key, or the address

    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(slots=True)
class HttpResponse:
    status: int
    body: bytes = b""
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class HttpStream:
    """A body that is written as it comes. When the client leaves, the iterator is closed (``aclose``)."""

    chunks: AsyncIterator[bytes]
    status: int = 200
    media_type: str = EVENTS
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """Ends a route with this status and one line. ``param`` names the field that is wrong, if it is one."""

    def __init__(self, status: int, why: str, *, retry_after_s: float = 0.0, param: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.why = " ".join(why.split())
        self.retry_after_s = retry_after_s
        self.param = param

    def response(self) -> HttpResponse:
        """The shape of OpenAI's errors: {"error": {"message", "type", "param", "code"}}."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.why, "type": kind, "param": self.param or None, "code": self.status}
        headers = {"Retry-After": str(max(1, round(self.retry_after_s)))} if self.retry_after_s else {}
        return HttpResponse(self.status, msgspec.json.encode({"error": error}), JSON, headers)


Route = Callable[["Service", HttpRequest], Awaitable[HttpResponse | HttpStream]]


class Answered(Protocol):
    """Who is told the answer to a request that a `Direct` route has begun."""

    def answered(self, answer: HttpResponse) -> None: ...

    def broke(self, error: Exception) -> None:
        """A fault of the server kept it from an answer."""


@runtime_checkable
class Direct(Protocol):
    """A route that needs no task of its own for most requests."""

    def begin(self, request: HttpRequest, held: "Held", to: Answered) -> int | HttpResponse | Awaitable[HttpResponse]:
        """A number when ``to`` will be told (``Service.withdraw`` takes it back), else the answer, now or later.

        Raises HttpError."""


def json_response(value: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(status, msgspec.json.encode(value))
