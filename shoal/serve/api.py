"""``shoal.serve(...)``: a server that runs until it is told to leave, or beside the program inside a block."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shoal.errors import ShoalError, UserError, unknown_name
from shoal.serve.groups.mesh import check_ranks, several_hosts
from shoal.serve.options import ServeOptions

GARBAGE = 20_000  # new containers, between two looks for garbage: a request leaves none
MISSING = "serving needs httptools and msgspec: pip install 'shoal[serve]'"


def _needed() -> None:
    try:
        import httptools  # noqa: F401
        import msgspec  # noqa: F401
    except ImportError:
        raise UserError(MISSING) from None


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it is not made for every system
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Serving:
    """The server and its service, made and run in one event loop."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.leave = asyncio.Event()
        self.now = asyncio.Event()  # leave at once
        self.predict: Any = None
        self.service: Any = None

    async def run(self, ready: Callable[[dict[str, Any]], None], http: bool = True) -> None:
        """Until ``leave`` is set. Raises the ShoalError that keeps it from serving."""
        from shoal.serve.following import follow, newest_name
        from shoal.serve.http.predict import Predict
        from shoal.serve.http.routes import OPEN_PATHS, open_routes
        from shoal.serve.http.server import HttpServer
        from shoal.serve.intake.registry import open_intake
        from shoal.serve.service import Service

        service = self.service = Service(self.options)
        server: HttpServer | None = None
        following: asyncio.Future[None] | None = None
        try:
            await service.start()
            intake = open_intake(service.model.facts, self.options.batch)
            self.predict = None if intake is None else Predict(service, intake)
            if http:
                server = HttpServer(service, self.options, open_routes(service, intake), OPEN_PATHS)
                await server.listen()
            if self.options.follow:
                run_path = Path("runs/latest" if self.options.target == "latest" else self.options.target).resolve()
                newest_name(run_path)
                following = asyncio.ensure_future(follow(service, run_path))
            ready(self._told(service, server))
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self.leave.wait()), service.broken]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if service.broken.done():
                raise service.broken.result()
            drain_s = 0.0 if self.now.is_set() else self.options.drain_s
            closing = asyncio.ensure_future(server.close(drain_s) if server else service.drain(drain_s))
            hurry = asyncio.ensure_future(self.now.wait())
            await asyncio.wait([closing, hurry], return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        finally:
            if following is not None:
                following.cancel()
            service.close()

    def _told(self, service: Any, server: Any) -> dict[str, Any]:
        scheme = "https" if self.options.tls_cert else "http"
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return {
            "url": f"{scheme}://{host}:{server.port}" if server else "",
            "model": service.model.name,
            "task": service.model.task,
            "parameters": service.model.facts["parameters"],
            "dtype": service.model.facts["dtype"],
            "precision": service.model.facts.get("precision"),
            "replicas": self.options.replicas,
            "mesh": dict(self.options.mesh),
            "seconds": service.seconds,
            "pid": os.getpid(),
        }


def run(options: ServeOptions, ready: Callable[[dict[str, Any]], None]) -> int:
    """Serve until SIGTERM or SIGINT; a second one cuts the draining short. ``ready`` is told the address.

    Returns 0 after SIGTERM, and 130 after SIGINT. Raises UserError when there is nothing to serve, and RunFailed when
    the model processes cannot be kept alive."""
    _needed()
    if several_hosts():
        check_ranks(options.mesh)
        if os.environ["RANK"] != "0":
            from shoal.serve.groups.host import run_host

            return run_host(options)
    code = 0

    def started(facts: dict[str, Any]) -> None:
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be gone through again and again
        ready(facts)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:

        async def main() -> None:
            serving = _Serving(options)

            def stop(number: int) -> None:
                nonlocal code
                code = 130 if number == signal.SIGINT else code
                (serving.now if serving.leave.is_set() else serving.leave).set()

            gc.set_threshold(GARBAGE)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop, number)
            await _unless_stopped(serving, started)

        runner.run(main())
    return code


async def _unless_stopped(serving: _Serving, ready: Callable[[dict[str, Any]], None]) -> None:
    """A signal ends the loading of the model too."""
    started = asyncio.Event()

    def told(facts: dict[str, Any]) -> None:
        started.set()
        ready(facts)

    task = asyncio.ensure_future(serving.run(told))
    leave = asyncio.ensure_future(serving.leave.wait())
    await asyncio.wait([task, leave], return_when=asyncio.FIRST_COMPLETED)
    leave.cancel()
    if not started.is_set() and not task.done():
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return
    await task


class Server:
    """A served model beside the running program: ``with shoal.serve(TARGET) as server: server.predict(...)``.

    HTTP, unless it is told not to, at ``server.url``; and the same answers without it. Its loop runs in a thread, the
    models in processes; all are gone when the block is left."""

    def __init__(self, options: ServeOptions, http: bool) -> None:
        _needed()
        self.url = ""
        self.facts: Mapping[str, Any] = {}
        self._options = options
        self._http = http
        self._ready: Future[dict[str, Any]] = Future()
        self._ended: Future[None] = Future()
        self._loop = new_event_loop()
        self._serving: _Serving | None = None
        self._thread = threading.Thread(target=self._main, name="shoal-serve", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.facts = self._ready.result()
        except BaseException:
            self._stop()
            raise
        self.url = self.facts["url"]
        return self

    def _main(self) -> None:
        async def main() -> None:
            self._serving = _Serving(self._options)
            await self._serving.run(self._ready.set_result, self._http)

        try:
            self._loop.run_until_complete(main())
            self._ended.set_result(None)
        except Exception as error:
            (self._ended if self._ready.done() else self._ready).set_exception(error)
        finally:
            self._loop.close()

    def predict(self, **body: Any) -> list[Any]:
        """The predictions for the fields of a /predict body: ``server.predict(text=["one", "two"])``.

        Raises UserError for what the task cannot use, and ShoalError when the model failed or too many wait."""
        from shoal.serve.http.messages import HttpError

        if self._serving is None or self._serving.predict is None:
            raise UserError("this model answers to no predict: see its routes.")
        try:
            answer: list[Any] = asyncio.run_coroutine_threadsafe(
                self._serving.predict.answer(body), self._loop
            ).result()
        except HttpError as error:
            raise (UserError if error.status < 429 else ShoalError)(f"{error.why}.") from None
        return answer

    def embed(self, texts: str | list[str]) -> list[list[float]]:
        """The vector of each text, from an embedding model."""
        return self.predict(text=texts)

    def _stop(self) -> None:
        if self._serving is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._serving.leave.set)
        self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if kind is None and self._ended.done():
            self._ended.result()


def serve(target: str = "latest", *, http: bool = True, **options: Any) -> Server:
    """A block that serves a run, a checkpoint, a Hugging Face folder or module:factory (``ServeOptions`` has the rest;
    the port is any free one unless it is named).

    Raises UserError for unknown options and unusable targets."""
    known = {name for name in ServeOptions.__dataclass_fields__ if name != "target"}
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known, "shoal.serve")
    if several_hosts():
        raise UserError("serve: several hosts are served by the verb `shoal serve`, on each of them.")
    return Server(ServeOptions(target=str(target), **{"port": 0, **options}), http)
