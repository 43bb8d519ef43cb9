"""Requests of the API, built without I/O: both clients send exactly these."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import orjson

from osync.client.answers import Message
from osync.errors import BadRequest

TOP_LEVEL = frozenset(
    {
        "context", "dimensions", "format", "images", "keep_alive", "logprobs", "raw", "shift", "suffix", "system",
        "template", "think", "tools", "top_logprobs", "truncate",
    }
)  # fmt: skip
"""Fields of Ollama's requests beside `options`; every other keyword is an option."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, without the server that it goes to."""

    method: str
    path: str
    body: bytes | None = None
    repeatable: bool = True
    """False: it changes something, so it goes to another proxy only if the first surely did not do it."""


def generate(model: str, prompt: str, stream: bool, options: Mapping[str, Any]) -> Call:
    """Build /api/generate."""
    return _post("/api/generate", {"model": model, "prompt": prompt, "stream": stream, **split(options)})


def chat(model: str, messages: Sequence[Mapping[str, Any] | Message], stream: bool, options: Mapping[str, Any]) -> Call:
    """Build /api/chat."""
    rows = [_message(message) for message in messages]
    return _post("/api/chat", {"model": model, "messages": rows, "stream": stream, **split(options)})


def embed(model: str, text: str | Sequence[str], options: Mapping[str, Any]) -> Call:
    """Build /api/embed."""
    value = text if isinstance(text, str) else list(text)
    return _post("/api/embed", {"model": model, "input": value, **split(options)})


def show(model: str, verbose: bool) -> Call:
    """Build /api/show."""
    return _post("/api/show", {"model": model, "verbose": verbose})


def pull(model: str, stream: bool, insecure: bool) -> Call:
    """Build /api/pull."""
    return _post("/api/pull", {"model": model, "stream": stream, "insecure": insecure})


def push(model: str, stream: bool, insecure: bool) -> Call:
    """Build /api/push."""
    return _post("/api/push", {"model": model, "stream": stream, "insecure": insecure}, repeatable=False)


def create(model: str, stream: bool, fields: Mapping[str, Any]) -> Call:
    """Build /api/create; `from_` stands for the field "from"."""
    given = {("from" if name == "from_" else name): v for name, v in fields.items() if v is not None}
    return _post("/api/create", {"model": model, "stream": stream, **given}, repeatable=False)


def copy(source: str, destination: str) -> Call:
    """Build /api/copy."""
    return _post("/api/copy", {"source": source, "destination": destination}, repeatable=False)


def delete(model: str) -> Call:
    """Build /api/delete."""
    return Call("DELETE", "/api/delete", _dump({"model": model}), repeatable=False)


def get(path: str) -> Call:
    """Build a request without a body."""
    return Call("GET", path)


def plan(model: str, stages: int | None, shards: Sequence[str], context: int | None) -> Call:
    """Build /api/plan."""
    given = {"model": model, "stages": stages, "shards": ",".join(shards) or None, "context": context}
    return get("/api/plan?" + urlencode({name: value for name, value in given.items() if value is not None}))


def split(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sort keywords into top-level fields and `options`; None means not given."""
    fields = {name: value for name, value in given.items() if name in TOP_LEVEL and value is not None}
    if "images" in fields:
        fields["images"] = _images(fields["images"])
    explicit = given.get("options") or {}
    if not isinstance(explicit, Mapping):
        raise BadRequest(f"options must be a mapping of option names to values, not {type(explicit).__name__}")
    options = dict(explicit) | {
        name: value
        for name, value in given.items()
        if name not in TOP_LEVEL and name != "options" and value is not None
    }
    return fields | {"options": options} if options else fields


def _images(images: Sequence[str | bytes]) -> list[str]:
    """Return each image in base64; text is taken as base64 already."""
    return [image if isinstance(image, str) else base64.b64encode(image).decode() for image in images]


def _message(message: Mapping[str, Any] | Message) -> dict[str, Any]:
    row = message.as_json() if isinstance(message, Message) else dict(message)
    if row.get("images"):
        row["images"] = _images(row["images"])
    return row


def _post(path: str, body: Mapping[str, Any], *, repeatable: bool = True) -> Call:
    return Call("POST", path, _dump(body), repeatable)


def _dump(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise BadRequest(f"the request cannot be written as JSON: {error}") from error
