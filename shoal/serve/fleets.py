"""The model processes of each version of the weights: a newer one is loaded beside the old one, tried out, promoted or
taken away, and an old one ends with the last request that began with it."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from shoal.errors import ShoalError
from shoal.serve.engine import FromEngine
from shoal.serve.http.messages import HttpError
from shoal.serve.model import Model
from shoal.serve.options import ServeOptions
from shoal.serve.replicas import Replicas
from shoal.serve.versions import Versions
from shoal.serve.waiting import T, unless

_MAY_DIFFER = {"name", "source", "dtype", "precision"}  # facts that a newer model may have otherwise


class Fleets:
    """``hear`` gets what a model process of a version says, ``lost`` the number of one that died, ``leaving`` names
    those that get no more requests, ``is_up`` says whether one can work. ``ended`` is told the version of a fleet whose
    processes have just been ended, and ``changed`` is called when other weights answer all requests."""

    def __init__(
        self,
        options: ServeOptions,
        hear: Callable[[int, int, list[FromEngine]], None],
        lost: Callable[[int], None],
        leaving: Callable[[], set[int]],
        is_up: Callable[[int], bool],
        ended: Callable[[int], None],
        changed: Callable[[], None],
    ) -> None:
        self.versions = Versions()
        self.model: Model | None = None
        self.broken: asyncio.Future[ShoalError] = asyncio.get_running_loop().create_future()
        self._hear, self._lost, self._leaving = hear, lost, leaving
        self._is_up, self._ended, self._changed = is_up, ended, changed
        self._numbers = count()  # of processes
        self._next = count()  # of versions: one that is gone leaves its number behind in what was counted
        self._fleets: dict[int, Replicas] = {}  # the one that answers, a newer one that is not ready, old ones at work
        self._sources: dict[int, str] = {}  # of the versions that answer
        self._news = asyncio.Event()  # a process came up, or a version is wanted no more
        self._open(options)

    @property
    def current(self) -> Replicas:
        """The model processes that answer requests that come now, but for a canary's."""
        return self._fleets[self.versions.current]

    @property
    def options(self) -> ServeOptions:
        return self.current.options

    def of(self, version: int) -> Replicas:
        return self._fleets[version]

    def __contains__(self, version: int) -> bool:
        return version in self._fleets

    async def start(self) -> tuple[dict[str, float], int]:
        """Until the model is loaded: seconds of the parts of that, and the bytes of its weights. Raises the ShoalError
        that says why it cannot be."""
        self.current.start()
        ready = await unless(self.broken, self.current.ready)
        self.model = Model(ready.facts)
        self._sources[self.versions.current] = str(ready.facts["source"])
        return dict(ready.seconds), ready.weights_bytes

    def _open(self, options: ServeOptions) -> tuple[int, Replicas]:
        version = next(self._next)
        fleet = Replicas(options, partial(self._hear, version), self._lost, self._leaving, self._numbers)
        self._fleets[version] = fleet

        def told(broken: "asyncio.Future[ShoalError]") -> None:
            if broken.cancelled() or version not in self._fleets:
                return
            if version == self.versions.current and not self.broken.done():
                self.broken.set_result(broken.result())
            elif version == self.versions.canary:
                self.versions.withdraw()
                print(f"shoal: the canary is withdrawn: {broken.result()}", file=sys.stderr, flush=True)
                self._end(version)

        fleet.broken.add_done_callback(told)
        return version, fleet

    async def reload(self, target: str = "", share: float = 1.0) -> dict[str, Any]:
        """Serve another target, or what the same one has become: from the next request on, or, with a share below 1,
        that share of the requests, until `promote` or `roll_back`.

        The new model is loaded beside the old one, which answers until it is there; those who began with the old one
        end with it. Raises HttpError: 409 while another reload or canary is going on, or when the new model takes or
        gives something else; 422 when it cannot be loaded. The old one goes on then."""
        if self.versions.loading:
            raise HttpError(409, "another reload is going on")
        if self.has_canary:
            raise HttpError(409, "a canary is being tried out: promote it or roll it back first")
        assert self.model is not None
        version, fleet = self._open(replace(self.options, target=target or self.options.target))
        self.versions.load(version)
        fleet.wanted = max(1, round(share * self.current.wanted))
        fleet.start()
        try:
            facts, old = (await self._or_422(fleet, fleet.ready)).facts, self.model.facts
            differs = [k for k in {*facts, *old} - _MAY_DIFFER if facts.get(k) != old.get(k)]
            if differs:
                raise HttpError(409, f"the new model has another {sorted(differs)[0]}: it needs a server of its own")
            await self._until_up(version, lambda: True)
        except BaseException:
            self._end(version)
            raise
        finally:
            self.versions.loaded()
        self._sources[version] = str(facts["source"])
        if share < 1.0:
            self.versions.try_out(version, share)
        else:
            self._serve_only(version)
        return self._told(version)

    async def _until_up(self, version: int, needed: Callable[[], bool]) -> None:
        """All the processes that it wants, or until they are not needed any more. Raises HttpError 422 when they cannot
        be kept alive."""
        fleet = self._fleets[version]

        async def up() -> None:
            while needed() and sum(map(self._is_up, fleet.links)) < fleet.wanted:
                self._news.clear()
                await self._news.wait()

        waited = asyncio.ensure_future(up())
        try:
            await self._or_422(fleet, waited)
        finally:
            waited.cancel()

    def came_up(self) -> None:
        """A model process has said its first words."""
        self._news.set()

    async def _or_422(self, fleet: Replicas, waited: "asyncio.Future[T]") -> T:
        try:
            return await unless(fleet.broken, waited)
        except ShoalError as error:
            raise HttpError(422, str(error)) from None

    @property
    def has_canary(self) -> bool:
        return self.versions.canary is not None

    async def promote(self) -> dict[str, Any]:
        """The canary answers all requests from now on. Raises HttpError 409 without one, or when it is rolled back
        while its processes come up, and 422 when they cannot be kept alive."""
        version = self._canary()
        fleet = self._fleets[version]
        if fleet.wanted < self.current.wanted:
            fleet.scale(self.current.wanted)
            await self._until_up(version, lambda: self.versions.canary == version)
        if self.versions.canary == version:
            self._serve_only(version)
        elif self.versions.current != version:  # who asked for it twice is told twice
            raise HttpError(409, "the canary has been rolled back meanwhile")
        return self._told(version)

    async def roll_back(self) -> dict[str, Any]:
        """The canary gets no more requests, and ends with those that it has. Raises HttpError 409 without one."""
        self._canary()
        self.versions.withdraw()
        self._news.set()
        self.retire_old()
        return self._told(self.versions.current)

    def _canary(self) -> int:
        if self.versions.canary is None:
            raise HttpError(409, "there is no canary: serve an earlier checkpoint as the target, to go back to it")
        return self.versions.canary

    def _serve_only(self, version: int) -> None:
        assert self.model is not None
        self.model = Model({**self.model.facts, "source": self._sources[version]})
        self.versions.replace(version)
        self._news.set()
        self.retire_old()
        self._changed()

    def _told(self, version: int) -> dict[str, Any]:
        assert self.model is not None
        return {
            "model": self.model.name,
            "source": self._sources[version],
            "version": version,
            "versions": self.answering(),
        }

    def answering(self) -> list[dict[str, Any]]:
        """Those that answer: {"version", "source", "share"}."""
        canary, share = self.versions.canary, self.versions.share
        shares = {self.versions.current: 1.0 - share} | ({} if canary is None else {canary: share})
        return [{"version": v, "source": self._sources[v], "share": s} for v, s in shares.items() if v in self._sources]

    def retire_old(self) -> None:
        """Ends the fleets of old versions that nobody holds any more."""
        if len(self._fleets) > 1:
            for version in self.versions.done(self._fleets):
                self._end(version)

    def _end(self, version: int) -> None:
        fleet = self._fleets.pop(version)
        self._sources.pop(version, None)
        self._ended(version)
        fleet.end()
        asyncio.get_running_loop().run_in_executor(None, fleet.wait)

    def close(self) -> None:
        """Ends all model processes, and waits until they are gone."""
        for fleet in self._fleets.values():
            fleet.end()
        for fleet in self._fleets.values():
            fleet.wait()
