"""`shoal serve --engine ray`: the same application, a copy of it in each replica of a Ray Serve deployment.

Ray places replicas on the machines of its cluster, scales them between ``--min-replicas`` and ``--max-replicas``, and
carries HTTP to them. In each, a request takes the same way as on one host: keys, tokens, batches, a model process."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from shoal.errors import ShoalError, UserError
from shoal.serve.options import ServeOptions

AHEAD = 16  # pieces of a stream that wait for their client
MISSING = "--engine ray needs Ray: pip install 'shoal[ray]'"


class Application:
    """What a replica is: a service with its routes, in the replica's own event loop."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._server: Any = None
        self._starting: asyncio.Lock = asyncio.Lock()

    async def _started(self) -> Any:
        async with self._starting:
            if self._server is None:
                from shoal.serve.http.routes import OPEN_PATHS, open_routes
                from shoal.serve.http.server import HttpServer
                from shoal.serve.intake.registry import open_intake
                from shoal.serve.service import Service

                service = Service(self._options)
                await service.start()
                intake = open_intake(service.model.facts, self._options.batch)
                self._server = HttpServer(service, self._options, open_routes(service, intake), OPEN_PATHS)
        return self._server

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        server = await self._started()
        if server.service.broken.done():
            raise server.service.broken.result()

    async def __call__(self, asked: Any) -> Any:
        """From and to Starlette's requests and responses, which Ray Serve speaks."""
        from starlette.responses import Response, StreamingResponse

        from shoal.serve.http.messages import HttpError, HttpRequest, HttpStream

        server = await self._started()
        if int(asked.headers.get("content-length", "0")) > server.body_bytes:
            answer = HttpError(413, f"the body is larger than {server.body_bytes} bytes").response()
            return Response(answer.body, answer.status, dict(answer.headers), answer.media_type)
        client = asked.client.host if asked.client else ""
        request = HttpRequest(asked.method, asked.url.path, dict(asked.headers), await asked.body(), client)
        told: asyncio.Queue[Any] = asyncio.Queue(AHEAD)
        task = asyncio.create_task(_answer(server, request, told))
        try:
            answer = await told.get()
        except asyncio.CancelledError:  # the client has left
            task.cancel()
            raise
        headers = dict(answer.headers)
        if isinstance(answer, HttpStream):
            return StreamingResponse(_chunks(told, task), answer.status, headers, answer.media_type)
        return Response(answer.body, answer.status, headers, answer.media_type)


async def _answer(server: Any, request: Any, told: "asyncio.Queue[Any]") -> None:
    """The answer, and the pieces of a stream after it: all of a request in one task, which holds one version."""
    from shoal.serve.http.messages import HttpError, HttpStream

    with server.service.hold():
        try:
            answer = await server.answer(request)
        except HttpError as error:
            answer = error.response()
        await told.put(answer)
        if not isinstance(answer, HttpStream):
            return
        try:
            async for chunk in answer.chunks:
                await told.put(chunk)
        finally:
            close = getattr(answer.chunks, "aclose", None)
            if close is not None:
                await close()
        await told.put(None)


async def _chunks(told: "asyncio.Queue[Any]", task: "asyncio.Task[None]") -> AsyncIterator[bytes]:
    """Closed when the client leaves: the request is withdrawn then."""
    try:
        while True:
            waited = asyncio.ensure_future(told.get())
            await asyncio.wait([waited, task], return_when=asyncio.FIRST_COMPLETED)
            if not waited.done() and told.empty():
                waited.cancel()
                task.result()  # raises what broke it off
                return
            chunk = await waited
            if chunk is None:
                return
            yield chunk
    finally:
        task.cancel()


def run(options: ServeOptions, ready: Callable[[dict[str, Any]], None]) -> int:
    """Until SIGTERM or SIGINT. Raises UserError when Ray is not installed, or for what Ray does in its own way."""
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError(f"{MISSING}.") from None
    for name, given in (("--follow", options.follow), ("--tls-cert", options.tls_cert), ("--mesh", options.mesh)):
        if given:
            raise UserError(f"{name} is not for --engine ray: use the local engine, or what stands before Ray.")
    leave = threading.Event()
    code = 0

    def stop(number: int, frame: object) -> None:
        nonlocal code
        code = 130 if number == signal.SIGINT else 0
        leave.set()

    target = options.target if ":" in options.target else os.path.abspath(options.target)
    each = replace(options, target=target, replicas=1, min_replicas=-1, max_replicas=0)
    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        least, most = options.least, options.most
        scale = {"min_replicas": least, "initial_replicas": options.replicas, "max_replicas": most}
        deployed = serve.deployment(Application).options(
            name=options.name or "shoal",
            autoscaling_config={**scale, "target_ongoing_requests": options.batch},
            max_ongoing_requests=2 * options.batch + options.queue,
            graceful_shutdown_timeout_s=options.drain_s,
            ray_actor_options={"num_cpus": options.threads},
        )
        serve.run(deployed.bind(each), name="shoal", route_prefix="/")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        ready({"url": f"http://{options.host}:{options.port}", "target": options.target, "engine": "ray"})
        leave.wait()
    except RuntimeError as error:
        raise ShoalError(f"Ray Serve cannot deploy this: {error}") from None
    finally:
        serve.shutdown()
        ray.shutdown()
    return code
