"""How an error looks on each HTTP surface: Ollama's own routes, OpenAI's and Anthropic's."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from osync.wire import sse as events

Surface = Literal["native", "openai", "anthropic"]

_OPENAI_TYPES = {404: "not_found_error", 408: "api_error", 429: "api_error", 499: "api_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def surface_of(path: str) -> Surface:
    """Return the surface that a request path (a query may follow) belongs to."""
    bare = path.partition("?")[0]
    if bare == "/v1/messages" or bare.startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if bare.startswith("/v1/") else "native"


def error_value(surface: Surface, status: int, text: str, request_id: str = "") -> dict[str, Any]:
    """Return the JSON object that says `text` on `surface`."""
    if surface == "native":
        return {"error": text}
    kind = "invalid_request_error" if 400 <= status < 500 else "api_error"
    if surface == "openai":
        kind = _OPENAI_TYPES.get(status, kind)
        return {"error": {"message": text, "type": kind, "param": None, "code": None}}
    kind = _ANTHROPIC_TYPES.get(status, kind)
    value: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": text}}
    if request_id:
        value["request_id"] = request_id
    return value


def error_body(surface: Surface, status: int, text: str, request_id: str = "") -> bytes:
    """Return the whole body (application/json) of an answer with an error `status`."""
    return orjson.dumps(error_value(surface, status, text, request_id))


def stream_error(surface: Surface, text: str, sse: bool = True, *, midline: bool = False) -> bytes:
    """Return what to append to a stream that broke after its head.

    Native streams are NDJSON whatever `sse` says; on the others `sse` False gives one JSON line.
    `midline`: the bytes sent so far do not end with a newline, so end their line first.
    """
    value = error_value(surface, 500, text)
    if surface == "native" or not sse:
        return (b"\n" if midline else b"") + orjson.dumps(value) + b"\n"
    return (b"\n\n" if midline else b"") + events.frame(value, "error" if surface == "anthropic" else "")
