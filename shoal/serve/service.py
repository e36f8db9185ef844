"""The service: asks the model processes on behalf of whoever asks it, over HTTP or in process."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import msgspec

from shoal.errors import ShoalError
from shoal.serve.engine import Begun, Cancel, Failed, Figures, FromEngine, Item, Kind, Request, Result
from shoal.serve.http.messages import HttpError
from shoal.serve.metrics import Metrics
from shoal.serve.model import Model
from shoal.serve.options import ServeOptions
from shoal.serve.replicas import Replicas
from shoal.serve.routing import Instruction, Limits, Refuse, Router, Send, Withdraw
from shoal.serve.scaling import Bounds, Scaler
from shoal.serve.versions import Versions
from shoal.serve.waiting import Asker, Held, T, now_held, unless

_encode = msgspec.msgpack.Encoder().encode
STREAMS = 64  # generations that one model process may have, at least
_MAY_DIFFER = {"name", "source", "dtype", "precision"}  # facts that a newer model may have otherwise
TICK_S = 0.5  # how often deadlines and stuck processes are looked at while requests are open


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
        self._router = Router(Limits(window=2 * options.at_once, waiting=options.queue))
        self._askers: dict[int, Asker] = {}
        self._next = 0
        self._tick: asyncio.TimerHandle | None = None
        self._first_up: asyncio.Future[None] = self._loop.create_future()
        self._model: Model | None = None
        self.broken: asyncio.Future[ShoalError] = self._loop.create_future()  # why no model process can be kept alive
        self._numbers = count()
        self._versions = Versions()  # of the weights
        self._fleets: dict[int, Replicas] = {}  # by version: that one, a newer one that is not ready, old ones at work
        self._inside = 0  # requests of clients that have begun and not ended
        self._none_held = asyncio.Event()
        self._none_held.set()
        self._came_up = asyncio.Event()
        self._sources: dict[int, str] = {}  # of the versions that answer
        self._open_fleet(0, options)
        self._scaler: Scaler | None = None
        self._asleep_since_asked = 0.0  # when the first request came to a server without model processes
        self._scale_timer: asyncio.TimerHandle | None = None
        if options.least < options.most:
            bounds = Bounds(least=options.least, most=options.most, each=options.at_once, calm_s=options.calm_s)
            self._scaler = Scaler(bounds, options.replicas, time.monotonic())

    @property
    def model(self) -> Model:
        """Raises HttpError 503 while it is being loaded."""
        if self._model is None:
            raise HttpError(503, "the model is being loaded", retry_after_s=1)
        return self._model

    @property
    def replicas(self) -> Replicas:
        """The model processes that answer requests that come now, but for a canary's."""
        return self._fleets[self._versions.current]

    def _open_fleet(self, version: int, options: ServeOptions) -> Replicas:
        fleet = self._fleets[version] = Replicas(
            options, partial(self._hear, version), self._lost, self._router.leaving, self._numbers
        )

        def told(broken: "asyncio.Future[ShoalError]") -> None:
            if broken.cancelled() or version not in self._fleets:
                return
            if version == self._versions.current and not self.broken.done():
                self.broken.set_result(broken.result())
            elif version == self._versions.canary:
                self._versions.withdraw()
                print(f"shoal: the canary is withdrawn: {broken.result()}", file=sys.stderr, flush=True)
                self._end_fleet(version)

        fleet.broken.add_done_callback(told)
        return fleet

    @property
    def is_ready(self) -> bool:
        """Whether a request would be worked on: a model process is there, or all sleep until one is asked for."""
        awake = bool(self._router.replicas) or self.replicas.wanted == 0
        return awake and self._model is not None and not self.draining and not self.broken.done()

    async def start(self) -> None:
        """Until the first model process can work. Raises the ShoalError that says why none can."""
        self.replicas.start()
        ready = await unless(self.broken, self.replicas.ready)
        self._model = Model(ready.facts)
        self._sources[0] = str(ready.facts["source"])
        if self._model.task == "text-generation":  # a step takes all that run, not one batch
            window = max(STREAMS, self._router.limits.window)
            self._router.limits = Limits(window=window, waiting=self.options.queue)
        self.seconds = dict(ready.seconds)
        self.weights_bytes = ready.weights_bytes
        await unless(self.broken, self._first_up)
        self.seconds["all"] = time.monotonic() - self._begun
        self._scale()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Around all that is done for one request of a client: every part of it is answered by one version of the
        weights, and it is answered though the server begins to drain meanwhile."""
        held = Held(self.draining)
        self._inside += 1
        self._none_held.clear()
        token = now_held.set(held)
        try:
            yield
        finally:
            now_held.reset(token)
            if held.version is not None:
                self._versions.end(held.version)
                self._retire_old()
            self._inside -= 1
            if not self._inside:
                self._none_held.set()

    async def reload(self, target: str = "", share: float = 1.0) -> dict[str, Any]:
        """Serve another target, or what the same one has become: from the next request on, or, with a share below 1,
        that share of the requests, until `promote` or `roll_back`.

        The new model is loaded beside the old one, which answers until it is there; those who began with the old one
        end with it. Raises HttpError: 409 while another reload or canary is going on, or when the new model takes or
        gives something else; 422 when it cannot be loaded. The old one goes on then."""
        if self._versions.loading:
            raise HttpError(409, "another reload is going on")
        if self.has_canary:
            raise HttpError(409, "a canary is being tried out: promote it or roll it back first")
        version = max(self._fleets) + 1
        self._versions.load(version)
        options = replace(self.options, target=target or self.options.target)
        fleet = self._open_fleet(version, options)
        fleet.wanted = max(1, round(share * self.replicas.wanted))
        fleet.start()
        try:
            facts, old = (await self._or_422(fleet, fleet.ready)).facts, self.model.facts
            differs = [k for k in {*facts, *old} - _MAY_DIFFER if facts.get(k) != old.get(k)]
            if differs:
                raise HttpError(409, f"the new model has another {sorted(differs)[0]}: it needs a server of its own")
            await self._until_up(fleet)
        except BaseException:
            self._end_fleet(version)
            raise
        finally:
            self._versions.loaded()
        self._sources[version] = str(facts["source"])
        if share < 1.0:
            self._versions.try_out(version, share)
        else:
            self._serve_only(version)
        return self._told(version)

    async def _until_up(self, fleet: Replicas) -> None:
        """All the processes that it wants. Raises HttpError 422 when they cannot be kept alive."""
        up = asyncio.ensure_future(self._up(fleet, fleet.wanted))
        try:
            await self._or_422(fleet, up)
        finally:
            up.cancel()

    async def _or_422(self, fleet: Replicas, waited: "asyncio.Future[T]") -> T:
        try:
            return await unless(fleet.broken, waited)
        except ShoalError as error:
            raise HttpError(422, str(error)) from None

    @property
    def has_canary(self) -> bool:
        return self._versions.canary is not None

    async def promote(self) -> dict[str, Any]:
        """The canary answers all requests from now on. Raises HttpError 409 without one."""
        version = self._canary()
        fleet = self._fleets[version]
        if fleet.wanted < self.replicas.wanted:
            fleet.scale(self.replicas.wanted)
            await self._until_up(fleet)
        if self._versions.canary != version:
            raise HttpError(409, "the canary has been rolled back meanwhile")
        self._serve_only(version)
        return self._told(version)

    async def roll_back(self) -> dict[str, Any]:
        """The canary gets no more requests, and ends with those that it has. Raises HttpError 409 without one."""
        self._canary()
        self._versions.withdraw()
        self._retire_old()
        return self._told(self._versions.current)

    def _canary(self) -> int:
        if self._versions.canary is None:
            raise HttpError(409, "there is no canary: serve an earlier checkpoint as the target, to go back to it")
        return self._versions.canary

    def _serve_only(self, version: int) -> None:
        self.options = self._fleets[version].options
        self._model = Model({**self.model.facts, "source": self._sources[version]})
        self._versions.replace(version)
        self.metrics.reloads += 1
        self._retire_old()
        self._scale()

    def _told(self, version: int) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "source": self._sources[version],
            "version": version,
            "versions": self.versions(),
        }

    def versions(self) -> list[dict[str, Any]]:
        """Those that answer: {"version", "source", "share"}."""
        canary, share = self._versions.canary, self._versions.share
        shares = {self._versions.current: 1.0 - share} | ({} if canary is None else {canary: share})
        return [{"version": v, "source": self._sources[v], "share": s} for v, s in shares.items() if v in self._sources]

    def counted(self, route: str, status: int, seconds: float) -> None:
        """A request of a client has been answered."""
        held = now_held.get()
        self.metrics.request(route, status, seconds, None if held is None else held.version)

    async def _up(self, fleet: Replicas, wanted: int) -> None:
        while sum(number in self._router.replicas for number in fleet.links) < wanted:
            self._came_up.clear()
            await self._came_up.wait()

    def _retire_old(self) -> None:
        """Ends the fleets of old versions that nobody holds any more."""
        for version in self._versions.done(self._fleets):
            self._end_fleet(version)

    def _end_fleet(self, version: int) -> None:
        numbers = [n for n, replica in self._router.replicas.items() if replica.version == version]
        for number in numbers:
            self._router.leave(number)
        for number in numbers:
            self.metrics.engines.pop(number, None)
            self._carry_out(self._router.lost(number, time.monotonic()))
        fleet = self._fleets.pop(version)
        self._sources.pop(version, None)
        self._carry_out(self._router.forget(version))
        fleet.end()
        self._loop.run_in_executor(None, fleet.wait)

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
    ) -> tuple[int, Asker]:
        held = now_held.get() or Held(self.draining, self._versions.current)
        if held.late:
            raise HttpError(503, "the server is shutting down", retry_after_s=1)
        if held.version is None:
            held.version = self._versions.begin()
        now = time.monotonic()
        id, self._next = self._next, self._next + 1
        request = Request(
            id, kind, msgspec.Raw(_encode(payload)), cost, now, now + self.options.timeout_s, priority, client
        )
        asker = self._askers[id] = Asker(self._loop, streams)
        self._scale(coming=1)
        self._carry_out(self._router.arrive(request, now, held.version))
        if self._tick is None:
            self._tick = self._loop.call_later(TICK_S, self._look)
        return id, asker

    def _forget(self, id: int, asker: Asker) -> None:
        self._askers.pop(id, None)
        if not asker.answer.done() or asker.answer.cancelled():  # whoever waited for it was cancelled, and it with him
            asker.answer.cancel()
            self.metrics.cancelled += 1
            self._carry_out(self._router.cancel(id, time.monotonic()))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._fleet_of(instruction.replica).send(instruction.replica, instruction.request)
                case Withdraw():
                    self._fleet_of(instruction.replica).send(instruction.replica, Cancel(instruction.id))
                case Refuse():
                    self._fail(
                        instruction.id,
                        HttpError(instruction.status, instruction.why, retry_after_s=instruction.retry_after_s),
                    )

    def _fleet_of(self, number: int) -> Replicas:
        return self._fleets[self._router.replicas[number].version]

    def _fail(self, id: int, error: HttpError) -> None:
        asker = self._askers.get(id)
        if asker is not None and not asker.answer.done():
            asker.answer.set_exception(error)
            if asker.items is not None:
                asker.items.put_nowait(None)

    def _hear(self, version: int, number: int, messages: list[FromEngine]) -> None:
        if version not in self._fleets:
            return  # it has been ended
        now = time.monotonic()
        if number not in self._router.replicas:  # its first words
            self._woken(now)
            self._carry_out(self._router.up(number, now, version))
            self._came_up.set()
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
        self._tick = self._loop.call_later(TICK_S, self._look) if len(self._router) else None

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
        for fleet in self._fleets.values():
            fleet.end()
        for fleet in self._fleets.values():
            fleet.wait()
