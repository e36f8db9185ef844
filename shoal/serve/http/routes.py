"""Every address that the server answers, and what stands behind it."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from shoal.serve.http.description import describe
from shoal.serve.http.keys import digests, matching
from shoal.serve.http.messages import HTML, TEXT, HttpError, HttpRequest, HttpResponse, HttpStream, Route, json_response
from shoal.serve.http.predict import Predict, read_json
from shoal.serve.intake.task import Intake

if TYPE_CHECKING:
    from shoal.serve.service import Service

RELOAD = "/v1/reload"  # has keys of its own
OPEN_PATHS = {
    "/",
    "/docs",
    "/health/live",
    "/health/ready",
    RELOAD,
    f"{RELOAD}/promote",
    f"{RELOAD}/rollback",
}  # without an API key: they tell nothing of the model


async def live(service: "Service", request: HttpRequest) -> HttpResponse:
    """The process answers. It stays so while the model is loaded or busy: restarting it would not help."""
    return HttpResponse(200, b"live\n", TEXT)


async def ready(service: "Service", request: HttpRequest) -> HttpResponse:
    """A model process is there to work, and the server is not about to leave."""
    if not service.is_ready:
        raise HttpError(503, "draining" if service.draining else "no model process is ready", retry_after_s=1)
    return HttpResponse(200, b"ready\n", TEXT)


async def metrics(service: "Service", request: HttpRequest) -> HttpResponse:
    text = service.metrics.text(service.gauges())
    return HttpResponse(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")


def _entry(service: "Service") -> dict[str, Any]:
    model = service.model
    entry = {"id": model.name, "object": "model", "created": model.created, "owned_by": "shoal"}
    known = ("task", "kind", "parameters", "dtype", "precision", "labels", "shape", "columns", "context", "vocab")
    facts = {name: model.facts[name] for name in known if name in model.facts}
    return {**entry, **facts, "versions": service.versions()}


async def models(service: "Service", request: HttpRequest) -> HttpResponse:
    return json_response({"object": "list", "data": [_entry(service)]})


async def one_model(service: "Service", request: HttpRequest) -> HttpResponse:
    return json_response(_entry(service))


async def reload(service: "Service", request: HttpRequest) -> HttpResponse:
    """{} for what the target has become, {"target": path} for another one: an earlier checkpoint, for example. With a
    "share" below 1 it is a canary: it answers so large a share of the requests, until it is promoted or rolled back."""
    body = read_json(request.body or b"{}")
    target, share = body.get("target", ""), body.get("share", 1.0)
    if not isinstance(target, str):
        raise HttpError(400, "'target' must be a text", param="target")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise HttpError(400, "'share' must be a number above 0, and at most 1", param="share")
    return json_response(await service.reload(target, float(share)))


async def promote(service: "Service", request: HttpRequest) -> HttpResponse:
    return json_response(await service.promote())


async def roll_back(service: "Service", request: HttpRequest) -> HttpResponse:
    return json_response(await service.roll_back())


ADMIN: Mapping[str, Route] = {RELOAD: reload, f"{RELOAD}/promote": promote, f"{RELOAD}/rollback": roll_back}


def _for_admins(route: Route, keys: Sequence[bytes]) -> Route:
    async def checked(service: "Service", request: HttpRequest) -> HttpResponse | HttpStream:
        if not matching(request, keys):
            raise HttpError(401, "no valid admin key: send it as 'Authorization: Bearer KEY'")
        return await route(service, request)

    return checked


def _page(name: str) -> Route:
    text = (files("shoal.serve.http") / name).read_bytes()
    policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
    headers = {"Content-Security-Policy": policy + "; frame-ancestors 'none'"}

    async def page(service: "Service", request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, text, HTML, headers)

    return page


def open_routes(service: "Service", intake: Intake | None) -> Mapping[tuple[str, str], Route]:
    """The routes of the task that is served, and those that every server has."""
    routes: dict[tuple[str, str], Route] = {
        ("GET", "/health/live"): live,
        ("GET", "/health/ready"): ready,
        ("GET", "/metrics"): metrics,
        ("GET", "/v1/models"): models,
        ("GET", f"/v1/models/{quote(service.model.name, safe='')}"): one_model,
        ("GET", "/"): _page("try.html"),
        ("GET", "/docs"): _page("docs.html"),
    }
    if intake is not None:
        predict = Predict(service, intake)
        routes["POST", "/predict"] = predict.predict
        if service.model.task == "embeddings":
            routes["POST", "/v1/embeddings"] = predict.embeddings
    else:
        routes |= import_module("shoal.serve.generation.routes").ROUTES
    if service.options.admin_keys:
        keys = digests(service.options.admin_keys)
        routes |= {("POST", path): _for_admins(route, keys) for path, route in ADMIN.items()}
    description = msgspec.json.encode(describe(service.model, intake, {path for _, path in routes}))

    async def openapi(service: "Service", request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, description)

    routes["GET", "/openapi.json"] = openapi
    return routes
