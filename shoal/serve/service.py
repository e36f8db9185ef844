"""The service: asks the model processes on behalf of whoever asks it, over HTTP or in process."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache

import msgspec

from shoal.serve.engine import Begun, Cancel, Failed, Figures, FromEngine, Item, Kind, Request, Result
from shoal.serve.fleets import Fleets
from shoal.serve.http.messages import HttpError, HttpResponse
from shoal.serve.metrics import Metrics
from shoal.serve.model import Model
from shoal.serve.options import ServeOptions
from shoal.serve.replicas import Replicas
from shoal.serve.routing import Instruction, Limits, Refuse, Router, Send, Withdraw, full
from shoal.serve.scaling import Bounds, Scaler
from shoal.serve.waiting import Asker, Held, Waiter, now_held, unless

_encode = msgspec.msgpack.Encoder().encode
STREAMS = 64  # generations that one model process may have, at least
TICK_S = 0.5  # how often deadlines and stuck processes are looked at while requests are open, at least


@lru_cache(64)
def _refusal(wait_s: int) -> HttpResponse:
    return HttpError(429, full(wait_s), retry_after_s=wait_s).response()


class Service:
    """Lives in one event loop. ``start`` it, ask it, ``close`` it."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.draining = False
        self.seconds: dict[str, float] = {}  # of the parts of the start
        self.weights_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._begun = time.monotonic()
        self._router = Router(
            Limits(window=2 * options.at_once, waiting=options.queue, within_s=options.within_ms / 1000)
        )
        self._askers: dict[int, Asker] = {}
        self._next = 0
        self._tick: asyncio.TimerHandle | None = None
        self._first_up: asyncio.Future[None] = self._loop.create_future()
        self._turn = 0.0
        self._inside = 0  # requests of clients that have begun and not ended
        self._none_held = asyncio.Event()
        self._none_held.set()
        self._scaler: Scaler | None = None
        self._asleep_since_asked = 0.0  # when the first request came to a server without model processes
        self._scale_timer: asyncio.TimerHandle | None = None
        if options.least < options.most:
            bounds = Bounds(least=options.least, most=options.most, each=options.at_once, calm_s=options.calm_s)
            self._scaler = Scaler(bounds, options.replicas, time.monotonic())
        self._fleets = Fleets(
            options,
            self._hear,
            self._lost,
            self._router.leaving,
            self._router.replicas.__contains__,
            self._ended,
            self._changed,
        )
        self._versions = self._fleets.versions
        self.broken = self._fleets.broken  # why no model process can be kept alive
        self.reload, self.promote, self.roll_back = self._fleets.reload, self._fleets.promote, self._fleets.roll_back
        self.versions = self._fleets.answering

    @property
    def model(self) -> Model:
        """Raises HttpError 503 while it is being loaded."""
        if self._fleets.model is None:
            raise HttpError(503, "the model is being loaded", retry_after_s=1)
        return self._fleets.model

    @property
    def replicas(self) -> Replicas:
        """The model processes that answer requests that come now, but for a canary's."""
        return self._fleets.current

    @property
    def has_canary(self) -> bool:
        return self._fleets.has_canary

    @property
    def is_ready(self) -> bool:
        """Whether a request would be worked on: a model process is there, or all sleep until one is asked for."""
        awake = bool(self._router.replicas) or self.replicas.wanted == 0
        return awake and self._fleets.model is not None and not self.draining and not self.broken.done()

    async def start(self) -> None:
        """Until the first model process can work. Raises the ShoalError that says why none can."""
        self.seconds, self.weights_bytes = await self._fleets.start()
        if self.model.task == "text-generation":  # a step takes all that run, not one batch
            window = max(STREAMS, self._router.limits.window)
            self._router.limits = replace(self._router.limits, window=window)
        await unless(self.broken, self._first_up)
        self.seconds["all"] = time.monotonic() - self._begun
        self._scale()

    def enter(self) -> Held:
        """A request of a client begins: every part of it is answered by one version of the weights, and it is answered
        though the server begins to drain meanwhile. `leave` must follow."""
        if not self._inside:
            self._none_held.clear()
        self._inside += 1
        return Held(self.draining, self._turned())

    def _turned(self) -> float:
        """Since when the event loop has been at what it found in its sockets: a request that it reads now has lain
        there for so long, at least."""
        if not self._turn:
            self._turn = time.monotonic()
            self._loop.call_soon(self._end_turn)
        return self._turn

    def _end_turn(self) -> None:
        self._turn = 0.0

    def leave(self, held: Held) -> None:
        if held.version is not None:
            self._versions.end(held.version)
            self._fleets.retire_old()
        self._inside -= 1
        if not self._inside:
            self._none_held.set()

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """`enter` and `leave`, around all that a task does for one request."""
        held = self.enter()
        token = now_held.set(held)
        try:
            yield held
        finally:
            now_held.reset(token)
            self.leave(held)

    def _changed(self) -> None:
        """Other weights answer from now on."""
        self.options = self._fleets.options
        self.metrics.reloads += 1
        self._scale()

    def _ended(self, version: int) -> None:
        """The model processes of a version get no more requests: whoever still waits for one is refused."""
        numbers = [n for n, replica in self._router.replicas.items() if replica.version == version]
        for number in numbers:
            self._router.leave(number)
        for number in numbers:
            self.metrics.engines.pop(number, None)
            self._carry_out(self._router.lost(number, time.monotonic()))
        self._carry_out(self._router.forget(version))

    def counted(self, route: str, status: int, seconds: float, held: Held) -> None:
        """A request of a client has been answered."""
        self.metrics.request(route, status, seconds, held.version)

    async def ask(
        self, kind: Kind, payload: msgspec.Struct, *, cost: int = 1, client: str = "", priority: int = 0
    ) -> msgspec.Raw:
        """The one answer to a request. Raises HttpError: refused, too late, or failed. Cancelling it withdraws it."""
        waiter = Waiter(self._loop, streams=False)
        id = self.submit(kind, payload, waiter, now_held.get(), cost, client, priority)
        try:
            return await waiter.answer
        finally:
            self._forget(id, waiter)

    async def stream(
        self, kind: Kind, payload: msgspec.Struct, *, cost: int = 1, client: str = "", priority: int = 0
    ) -> AsyncGenerator[tuple[bool, msgspec.Raw]]:
        """(False, payload) of every item, at last (True, payload) of the result. Closing it withdraws the request."""
        waiter = Waiter(self._loop, streams=True)
        id = self.submit(kind, payload, waiter, now_held.get(), cost, client, priority)
        assert waiter.items is not None
        try:
            while (item := await waiter.items.get()) is not None:
                yield False, item
            yield True, await waiter.answer
        finally:
            self._forget(id, waiter)

    def submit(
        self,
        kind: Kind,
        payload: msgspec.Struct,
        asker: Asker,
        held: Held | None,
        cost: int = 1,
        client: str = "",
        priority: int = 0,
    ) -> int:
        """``asker`` will be told, but not before this returns. Raises HttpError when it is refused at once.

        The number is for `withdraw`."""
        if held is None:
            held = Held(self.draining, time.monotonic(), self._versions.current)
        if held.late:
            raise HttpError(503, "the server is shutting down", retry_after_s=1)
        if held.version is None:
            held.version = self._versions.begin()
        now = time.monotonic()
        id, self._next = self._next, self._next + 1
        deadline = self._router.deadline(held.since, self.options.timeout_s)
        request = Request(id, kind, msgspec.Raw(_encode(payload)), cost, held.since, deadline, priority, client)
        if self._scaler is not None:
            self._scale(coming=1)
        instructions = self._router.arrive(request, now, held.version)
        for one in instructions:
            if isinstance(one, Refuse) and one.id == id:
                raise HttpError(one.status, one.why, retry_after_s=one.retry_after_s)
        self._askers[id] = asker
        self._carry_out(instructions)
        if self._tick is None:
            self._look_later(now)
        return id

    def refusal(self, client: str, held: Held) -> HttpResponse | None:
        """The answer to a request that would be refused whatever it asks: it need not be read then."""
        router, versions = self._router, self._versions
        if versions.canary is not None:
            return None
        if not router.turned_away(versions.current, client, held.since, time.monotonic()):
            return None
        return _refusal(max(1, round(router.wait_s())))

    def withdraw(self, id: int) -> None:
        """Nobody waits for it any more."""
        if self._askers.pop(id, None) is not None:
            self.metrics.cancelled += 1
            self._carry_out(self._router.cancel(id, time.monotonic()))

    def _forget(self, id: int, waiter: Waiter) -> None:
        if not waiter.answer.done() or waiter.answer.cancelled():  # whoever waited was cancelled, and it with him
            waiter.answer.cancel()
            self.withdraw(id)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for one in instructions:
            if isinstance(one, Send):
                self._fleet_of(one.replica).send(one.replica, one.request)
            elif isinstance(one, Withdraw):
                self._fleet_of(one.replica).send(one.replica, Cancel(one.id))
            else:
                self._refuse(one)

    def _refuse(self, one: Refuse) -> None:
        self._fail(one.id, HttpError(one.status, one.why, retry_after_s=one.retry_after_s))

    def _fleet_of(self, number: int) -> Replicas:
        return self._fleets.of(self._router.replicas[number].version)

    def _fail(self, id: int, error: HttpError) -> None:
        asker = self._askers.pop(id, None)
        if asker is not None:
            asker.failed(error)

    def _hear(self, version: int, number: int, messages: list[FromEngine]) -> None:
        if version not in self._fleets:
            return  # it has been ended
        now = time.monotonic()
        if number not in self._router.replicas:  # its first words
            self._woken(now)
            self._carry_out(self._router.up(number, now, version))
            self._fleets.came_up()
            if not self._first_up.done():
                self._first_up.set_result(None)
        self._router.heard(number, now)
        answered = [message.id for message in messages if isinstance(message, Result | Failed)]
        if answered:  # the next ones are on their way before these are written
            self._carry_out(self._router.answered(number, answered, now))
        for message in messages:
            if isinstance(message, Result):
                asker = self._askers.pop(message.id, None)
                if asker is not None:
                    asker.result(message.payload)
            elif isinstance(message, Item):
                streams = self._askers.get(message.id)
                if streams is not None and streams.item(message.payload):
                    self._router.reached(message.id, message.payload)
            elif isinstance(message, Failed):
                if message.status == 504 and self.options.within_ms:
                    self._refuse(self._router.too_late(message.id))
                else:
                    self._fail(message.id, HttpError(message.status, message.why))
            elif isinstance(message, Begun):
                self._router.begun(number, message.ids, message.at)
            elif isinstance(message, Figures):
                self.metrics.engines[number] = message.values
        if answered:
            self._scale()

    def _woken(self, now: float) -> None:
        if self._asleep_since_asked:
            self.seconds["wake"] = now - self._asleep_since_asked
            self._asleep_since_asked = 0.0

    def _scale(self, coming: int = 0) -> None:
        """``coming``: requests that are not in line yet, and may find no room there."""
        if self._scaler is None or self._fleets.model is None:
            return
        now = time.monotonic()
        wanted = self._scaler.look(len(self._router) + coming, now)
        if wanted and not self.replicas.wanted:
            self._asleep_since_asked = now
        known = self._router.replicas.items()
        staying = [n for n, replica in known if not replica.leaving and replica.version == self._versions.current]
        if wanted != self.replicas.wanted:
            for number in sorted(staying, key=self._router.load)[: max(0, len(staying) - wanted)]:
                self._router.leave(number)
            self.replicas.scale(wanted)
        for number in self._router.left():
            fleet = self._fleet_of(number)
            self._router.lost(number, now)
            self.metrics.engines.pop(number, None)
            fleet.retire(number)
        at = self._scaler.next_at()
        if at is not None and self._scale_timer is None:
            self._scale_timer = self._loop.call_later(max(0.0, at - now), self._rescale)

    def _rescale(self) -> None:
        self._scale_timer = None
        self._scale()

    def _lost(self, number: int) -> None:
        self.metrics.replicas_lost += 1
        self.metrics.engines.pop(number, None)
        self._carry_out(self._router.lost(number, time.monotonic()))

    def _look(self) -> None:
        now = time.monotonic()
        self._carry_out(self._router.expire(now))
        for number in list(self._router.stuck(now, self.options.hang_s)):
            self._fleet_of(number).kill(number)
        self._tick = None
        if len(self._router):
            self._look_later(now)

    def _look_later(self, now: float) -> None:
        self._tick = self._loop.call_later(max(0.0, min(TICK_S, self._router.next_deadline() - now)), self._look)

    def gauges(self) -> dict[str, float]:
        """What /metrics shows of this moment."""
        return {
            "requests_open": len(self._router),
            "requests_waiting": self._router.waiting,
            "replicas": len(self._router.replicas),
            "replicas_wanted": self.replicas.wanted,
            **{f"mesh_{axis}": size for axis, size in self.options.mesh.items()},
            "ready": float(self.is_ready),
            "weights_bytes": self.weights_bytes,
            **{f"start_{part}_seconds": seconds for part, seconds in self.seconds.items()},
        }

    async def drain(self, within_s: float) -> bool:
        """Takes no more requests, and waits for those that have begun; False when some were left after so long."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none_held.wait(), within_s)
        return not self._inside

    def close(self) -> None:
        """Ends the model processes; whoever still waits gets 503."""
        for timer in (self._tick, self._scale_timer):
            if timer is not None:
                timer.cancel()
        self._tick = self._scale_timer = None
        for id in list(self._askers):
            self._fail(id, HttpError(503, "the server is shutting down", retry_after_s=1))
        self._fleets.close()
