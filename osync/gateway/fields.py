"""Bodies of the routes that manage models, read in Ollama's words."""

from __future__ import annotations

from typing import Any

from osync.errors import BadRequest
from osync.gateway.context import Call, Context
from osync.wire.request import parse_object

Fields = dict[str, Any]

_KINDS = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}


async def read_fields(ctx: Context, call: Call) -> tuple[bytes, Fields]:
    """Return the body as it came, and decoded. Raises BadRequest."""
    raw = await call.body.read_all(ctx.settings.max_body)
    if not raw.strip():
        raise BadRequest("missing request body")
    return raw, parse_object(call.path, raw)


def text_of(fields: Fields, kind: str, *keys: str) -> str:
    """Return the first of `keys` that is not empty, "" for none. Raises BadRequest for what is no string."""
    found = ""
    for key in keys:
        value = fields.get(key)
        if value is not None and not isinstance(value, str):
            word = _KINDS[type(value)]
            raise BadRequest(f"json: cannot unmarshal {word} into Go struct field {kind}.{key} of type string")
        found = found or value or ""
    return found


def is_streamed(fields: Fields, kind: str) -> bool:
    """Return what `stream` says; true by default. Raises BadRequest for what is no bool."""
    value = fields.get("stream")
    if value is not None and not isinstance(value, bool):
        word = _KINDS[type(value)]
        raise BadRequest(f"json: cannot unmarshal {word} into Go struct field {kind}.stream of type bool")
    return value is not False
