"""What is waited for: answers to requests, and which of several things comes first."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from shoal.errors import ShoalError
from shoal.serve.http.messages import HttpError

T = TypeVar("T")


@dataclass(slots=True)
class Held:
    """A request of a client, from its first byte to the last one of its answer."""

    late: bool  # it came when the server was about to leave
    since: float  # when it came
    version: int | None = None  # of the weights, once a model process has been asked


now_held: ContextVar[Held | None] = ContextVar("held", default=None)


class Asker(Protocol):
    """Where the answers to one request go."""

    def item(self, payload: msgspec.Raw) -> bool:
        """A piece of a stream; False when it is not one of those who ask for pieces."""

    def result(self, payload: msgspec.Raw) -> None: ...

    def failed(self, error: HttpError) -> None: ...


class Waiter:
    """A task that waits for the answers."""

    __slots__ = ("answer", "items")

    def __init__(self, loop: asyncio.AbstractEventLoop, streams: bool) -> None:
        self.answer: asyncio.Future[msgspec.Raw] = loop.create_future()
        self.items: asyncio.Queue[msgspec.Raw | None] | None = asyncio.Queue() if streams else None

    def item(self, payload: msgspec.Raw) -> bool:
        if self.items is not None:
            self.items.put_nowait(payload)
        return self.items is not None

    def result(self, payload: msgspec.Raw) -> None:
        if not self.answer.done():
            self.answer.set_result(payload)
            self._end()

    def failed(self, error: HttpError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self._end()

    def _end(self) -> None:
        if self.items is not None:
            self.items.put_nowait(None)


async def first(*futures: "asyncio.Future[Any]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def unless(broken: "asyncio.Future[ShoalError]", waited: "asyncio.Future[T]") -> T:
    """What is waited for. Raises what ``broken`` says if that comes before, or with it."""
    await first(waited, broken)
    if broken.done():
        raise broken.result()
    return waited.result()
