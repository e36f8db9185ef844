"""The service: asks the model processes on behalf of whoever asks it, over HTTP or in process."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from shoal.errors import ShoalError
from shoal.serve.engine import Begun, Cancel, Failed, Figures, FromEngine, Item, Kind, Request, Result
from shoal.serve.http.messages import HttpError
from shoal.serve.metrics import Metrics
from shoal.serve.options import ServeOptions
from shoal.serve.replicas import Replicas
from shoal.serve.routing import Instruction, Limits, Refuse, Router, Send, Withdraw
from shoal.serve.scaling import Bounds, Scaler

_encode = msgspec.msgpack.Encoder().encode
STREAMS = 64  # generations that one model process may have, at least
TICK_S = 0.5  # how often deadlines and stuck processes are looked at while requests are open


class Model:
    """What is known of the model on this side: ``facts`` as shoal.serve.target tells them."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.name = str(facts["name"])
        self.task = str(facts["task"])
        self.created = int(time.time())


class _Asker:
    """Where the answers to one request go."""

    __slots__ = ("answer", "items")

    def __init__(self, loop: asyncio.AbstractEventLoop, streams: bool) -> None:
        self.answer: asyncio.Future[msgspec.Raw] = loop.create_future()
        self.items: asyncio.Queue[msgspec.Raw | None] | None = asyncio.Queue() if streams else None


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
        self._router = Router(Limits(window=2 * options.batch, waiting=options.queue))
        self._askers: dict[int, _Asker] = {}
        self._next = 0
        self._tick: asyncio.TimerHandle | None = None
        self._first_up: asyncio.Future[None] = self._loop.create_future()
        self._model: Model | None = None
        self.replicas = Replicas(options, self._hear, self._lost, self._router.leaving)
        self._scaler: Scaler | None = None
        self._asleep_since_asked = 0.0  # when the first request came to a server without model processes
        self._scale_timer: asyncio.TimerHandle | None = None
        if options.least < options.most:
            bounds = Bounds(least=options.least, most=options.most, each=options.batch, calm_s=options.calm_s)
            self._scaler = Scaler(bounds, options.replicas, time.monotonic())

    @property
    def model(self) -> Model:
        """Raises HttpError 503 while it is being loaded."""
        if self._model is None:
            raise HttpError(503, "the model is being loaded", retry_after_s=1)
        return self._model

    @property
    def broken(self) -> "asyncio.Future[ShoalError]":
        """Done, with the reason, when no model process can be kept alive."""
        return self.replicas.broken

    @property
    def is_ready(self) -> bool:
        """Whether a request would be worked on: a model process is there, or all sleep until one is asked for."""
        awake = bool(self._router.replicas) or self.replicas.wanted == 0
        return awake and self._model is not None and not self.draining and not self.broken.done()

    async def start(self) -> None:
        """Until the first model process can work. Raises the ShoalError that says why none can."""
        self.replicas.start()
        for waited in (self.replicas.ready, self._first_up):
            await asyncio.wait([waited, self.broken], return_when=asyncio.FIRST_COMPLETED)
            if self.broken.done():
                self.replicas.close()
                raise self.broken.result()
            if waited is self.replicas.ready:
                ready = self.replicas.ready.result()
                self._model = Model(ready.facts)
                if self._model.task == "text-generation":  # a step takes all that run, not one batch
                    window = max(STREAMS, self._router.limits.window)
                    self._router.limits = Limits(window=window, waiting=self.options.queue)
                self.seconds = dict(ready.seconds)
                self.weights_bytes = ready.weights_bytes
        self.seconds["all"] = time.monotonic() - self._begun
        self._scale()

    async def ask(
        self, kind: Kind, payload: msgspec.Struct, *, cost: int = 1, client: str = "", priority: int = 0
    ) -> msgspec.Raw:
        """The one answer to a request. Raises HttpError: refused, too late, or failed. Cancelling it withdraws it."""
        id, asker = self._submit(kind, payload, cost, client, priority, streams=False)
        try:
            return await asker.answer
        finally:
            self._forget(id, asker)

    async def stream(
        self, kind: Kind, payload: msgspec.Struct, *, cost: int = 1, client: str = "", priority: int = 0
    ) -> AsyncGenerator[tuple[bool, msgspec.Raw]]:
        """(False, payload) of every item, at last (True, payload) of the result. Closing it withdraws the request."""
        id, asker = self._submit(kind, payload, cost, client, priority, streams=True)
        assert asker.items is not None
        try:
            while (item := await asker.items.get()) is not None:
                yield False, item
            yield True, await asker.answer
        finally:
            self._forget(id, asker)

    def _submit(
        self, kind: Kind, payload: msgspec.Struct, cost: int, client: str, priority: int, streams: bool
    ) -> tuple[int, _Asker]:
        if self.draining:
            raise HttpError(503, "the server is shutting down", retry_after_s=1)
        now = time.monotonic()
        id, self._next = self._next, self._next + 1
        request = Request(
            id, kind, msgspec.Raw(_encode(payload)), cost, now, now + self.options.timeout_s, priority, client
        )
        asker = self._askers[id] = _Asker(self._loop, streams)
        self._scale(coming=1)
        self._carry_out(self._router.arrive(request, now))
        if self._tick is None:
            self._tick = self._loop.call_later(TICK_S, self._look)
        return id, asker

    def _forget(self, id: int, asker: _Asker) -> None:
        self._askers.pop(id, None)
        if not asker.answer.done() or asker.answer.cancelled():  # whoever waited for it was cancelled, and it with him
            asker.answer.cancel()
            self.metrics.cancelled += 1
            self._carry_out(self._router.cancel(id, time.monotonic()))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self.replicas.send(instruction.replica, instruction.request)
                case Withdraw():
                    self.replicas.send(instruction.replica, Cancel(instruction.id))
                case Refuse():
                    self._fail(
                        instruction.id,
                        HttpError(instruction.status, instruction.why, retry_after_s=instruction.retry_after_s),
                    )

    def _fail(self, id: int, error: HttpError) -> None:
        asker = self._askers.get(id)
        if asker is not None and not asker.answer.done():
            asker.answer.set_exception(error)
            if asker.items is not None:
                asker.items.put_nowait(None)

    def _hear(self, number: int, messages: list[FromEngine]) -> None:
        now = time.monotonic()
        if number not in self._router.replicas:  # its first words
            self._woken(now)
            self._carry_out(self._router.up(number, now))
            if not self._first_up.done():
                self._first_up.set_result(None)
        self._router.heard(number, now)
        for message in messages:
            match message:
                case Result():
                    self._answered(number, message.id, now)
                    asker = self._askers.get(message.id)
                    if asker is not None and not asker.answer.done():
                        asker.answer.set_result(message.payload)
                        if asker.items is not None:
                            asker.items.put_nowait(None)
                case Item():
                    asker = self._askers.get(message.id)
                    if asker is not None and asker.items is not None:
                        asker.items.put_nowait(message.payload)
                        self._router.reached(message.id, message.payload)
                case Failed():
                    self._answered(number, message.id, now)
                    self._fail(message.id, HttpError(message.status, message.why))
                case Begun():
                    self._router.begun(number, message.ids)
                case Figures():
                    self.metrics.engines[number] = message.values

    def _answered(self, number: int, id: int, now: float) -> None:
        self._carry_out(self._router.answered(number, id, now))
        self._scale()

    def _woken(self, now: float) -> None:
        if self._asleep_since_asked:
            self.seconds["wake"] = now - self._asleep_since_asked
            self._asleep_since_asked = 0.0

    def _scale(self, coming: int = 0) -> None:
        """``coming``: requests that are not in line yet, and may find no room there."""
        if self._scaler is None or self._model is None:
            return
        now = time.monotonic()
        wanted = self._scaler.look(len(self._router) + coming, now)
        if wanted and not self.replicas.wanted:
            self._asleep_since_asked = now
        staying = [n for n, replica in self._router.replicas.items() if not replica.leaving]
        if wanted != self.replicas.wanted:
            for number in sorted(staying, key=self._router.load)[: max(0, len(staying) - wanted)]:
                self._router.leave(number)
            self.replicas.scale(wanted)
        for number in self._router.left():
            self._router.lost(number, now)
            self.metrics.engines.pop(number, None)
            self.replicas.retire(number)
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
            self.replicas.kill(number)
        self._tick = self._loop.call_later(TICK_S, self._look) if len(self._router) else None

    def gauges(self) -> dict[str, float]:
        """What /metrics shows of this moment."""
        return {
            "requests_open": len(self._router),
            "requests_waiting": len(self._router.line),
            "replicas": len(self._router.replicas),
            "replicas_wanted": self.replicas.wanted,
            "ready": float(self.is_ready),
            "weights_bytes": self.weights_bytes,
            **{f"start_{part}_seconds": seconds for part, seconds in self.seconds.items()},
        }

    async def drain(self, within_s: float) -> bool:
        """Takes no more requests, and waits for the open ones; False when some were left after so long."""
        self.draining = True
        end = time.monotonic() + within_s
        while self._askers and time.monotonic() < end:
            waited = [asker.answer for asker in self._askers.values()]
            await asyncio.wait(waited, timeout=end - time.monotonic(), return_when=asyncio.ALL_COMPLETED)
            await asyncio.sleep(0)
        return not self._askers

    def close(self) -> None:
        """Ends the model processes; whoever still waits gets 503."""
        for timer in (self._tick, self._scale_timer):
            if timer is not None:
                timer.cancel()
        self._tick = self._scale_timer = None
        for id in list(self._askers):
            self._fail(id, HttpError(503, "the server is shutting down", retry_after_s=1))
        self.replicas.close()
