"""The OpenAPI 3.1 description of what is served, made from the task at hand."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from shoal import __version__
from shoal.serve.intake.task import Intake
from shoal.serve.intake.tensors import NPY, SAFETENSORS
from shoal.serve.model import Model

_SCORES = {
    "type": "object",
    "required": ["label", "score", "scores"],
    "properties": {
        "label": {"type": "string"},
        "score": {"type": "number"},
        "scores": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_PREDICTIONS: Mapping[str, Any] = {
    "image-classification": _SCORES,
    "sequence-classification": _SCORES,
    "classification": _SCORES,
    "question-answering": {
        "type": "object",
        "required": ["answer", "score", "start", "end"],
        "properties": {
            "answer": {"type": "string", "description": "a piece of the context; empty: there is no answer"},
            "score": {"type": ["number", "null"], "description": "null with an empty answer"},
            "start": {"type": "integer", "description": "first character of the context"},
            "end": {"type": "integer", "description": "one past the last"},
        },
    },
    "embeddings": {"type": "array", "items": {"type": "number"}},
    "tensors": {"type": "object"},
}
_ERRORS = {
    "400": "the request cannot be used: one line says why",
    "401": "no valid API key",
    "403": "another origin or host name",
    "404": "no such address or model",
    "408": "the request did not come to its end in time",
    "409": "another reload is going on, or the new model is of another kind",
    "413": "too large",
    "422": "the new model cannot be loaded",
    "429": "too many requests wait: come back after Retry-After seconds",
    "500": "the model failed on this input",
    "503": "not ready, or about to leave",
    "504": "not answered within the time limit",
}


def describe(model: Model, intake: Intake | None, paths: set[str]) -> dict[str, Any]:
    named = {"enum": [model.name, None]}  # null: as if it were left out
    described: dict[str, Any] = {
        "/health/live": _get("The process answers", "text/plain"),
        "/health/ready": _get("A model process is ready to work", "text/plain"),
        "/metrics": _get("Figures in Prometheus' text format", "text/plain"),
        "/v1/models": _get("The model that is served", "application/json"),
    }
    if intake is not None:
        body = {
            "type": "object",
            "properties": {**intake.fields, "model": named},
            "oneOf": [{"required": list(names)} for names in intake.alternatives],
            "example": dict(intake.example),
        }
        answer = {
            "type": "object",
            "required": ["model", "predictions"],
            "properties": {
                "model": {"type": "string"},
                "predictions": {"type": "array", "items": _PREDICTIONS[model.task]},
            },
        }
        content = {"application/json": {"schema": body}}
        content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (NPY[0], SAFETENSORS[0])}
        described["/predict"] = _post(f"Predict: {model.task}", content, answer)
    if "/v1/embeddings" in paths:
        described["/v1/embeddings"] = _post(
            "Embeddings, as OpenAI's", _embeddings(intake.fields["input"] if intake else {}, named), {"type": "object"}
        )
    if intake is None:
        described |= import_module("shoal.serve.generation.routes").PATHS
    if "/v1/reload" in paths:
        properties = {"target": {"type": "string"}, "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}
        content = {"application/json": {"schema": {"type": "object", "properties": properties}}}
        answer = {"type": "object"}
        described["/v1/reload"] = _post("Serve newer weights, or other ones (admin key)", content, answer, needed=False)
        for verb, what in (("promote", "The canary answers everything"), ("rollback", "The canary is withdrawn")):
            described[f"/v1/reload/{verb}"] = _post(f"{what} (admin key)", content, answer, needed=False)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Shoal: {model.name}", "version": __version__, "description": f"Task: {model.task}."},
        "paths": described,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type"],
                            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
                        }
                    },
                }
            },
        },
    }


def _embeddings(given: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        "input": given,
        "model": named,
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": {"type": "null", "description": "this model's vectors have one size"},
        "user": {"description": "not looked at"},
    }
    return {"application/json": {"schema": {"type": "object", "required": ["input"], "properties": properties}}}


def _responses(success: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {status: {"description": why, "content": schema} for status, why in _ERRORS.items()}
    return {"200": {"description": "done", "content": success}, **errors}


def _get(summary: str, media: str) -> dict[str, Any]:
    kind = "object" if media == "application/json" else "string"
    return {"get": {"summary": summary, "responses": _responses({media: {"schema": {"type": kind}}})}}


def _post(summary: str, content: Mapping[str, Any], answer: Mapping[str, Any], needed: bool = True) -> dict[str, Any]:
    """``needed``: whether there must be a body."""
    body = {"required": needed, "content": content}
    success = {"application/json": {"schema": answer}}
    return {
        "post": {
            "summary": summary,
            "security": [{}, {"key": []}],
            "requestBody": body,
            "responses": _responses(success),
        }
    }
