"""The OpenAPI description of the two endpoints, made from the types that read their bodies."""

from typing import Any

import msgspec

from shoal.serve.generation.bodies import ChatBody, CompletionBody


def _operation(body: type[msgspec.Struct], summary: str, example: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "security": [{}, {"key": []}],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _inlined(body), "example": example}},
            },
            "responses": {
                "200": {
                    "description": 'the answer; with "stream": true, its pieces as server-sent events',
                    "content": {
                        "application/json": {"schema": _ANSWER},
                        "text/event-stream": {},
                    },
                },
                "default": {
                    "description": "one line says why: 400 what is asked for, 429 too much at a time, 503 not ready",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
    }


_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"choices": {"type": "array", "items": {"type": "object"}}, "usage": {"type": "object"}},
}


def _inlined(body: type[msgspec.Struct]) -> Any:
    """The body's schema without references: it stands alone wherever it is put."""
    schema = msgspec.json.schema(body)
    parts = schema.pop("$defs")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(parts[node["$ref"].rpartition("/")[2]])
            return {name: inline(value) for name, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    return inline(schema)


PATHS = {
    "/v1/completions": _operation(
        CompletionBody, "Text that goes on from a prompt, as OpenAI's", {"prompt": "Once upon a time", "max_tokens": 16}
    ),
    "/v1/chat/completions": _operation(
        ChatBody, "A conversation goes on, as OpenAI's", {"messages": [{"role": "user", "content": "Hello"}]}
    ),
}
