"""Typed access to the fields of a JSON request body. Wrong types raise BadRequest; null is absent."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import orjson

from osync.errors import BadRequest

Object = dict[str, Any]


def parse_object(body: bytes) -> Object:
    """Return the JSON object that `body` is."""
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("invalid JSON: the request body must be an object")
    return value


def dump_object(value: Object) -> bytes:
    """Return `value` as JSON; BadRequest where it nests deeper than the codec goes."""
    try:
        return orjson.dumps(value)
    except TypeError:
        raise BadRequest("the request body is nested too deeply") from None


def model_of(request: Object) -> str:
    """Return the model's name, as the client wrote it."""
    name = text(request, "model")
    if not name:
        raise BadRequest("model is required")
    return name


def text(holder: Object, key: str, default: str = "") -> str:
    """Return a string field."""
    value = holder.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong_type(key, "a string")
    return value


def flag(holder: Object, key: str) -> bool:
    """Return a boolean field, False where it is absent."""
    value = holder.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong_type(key, "a boolean")
    return value


def number(holder: Object, key: str) -> float | None:
    """Return a number field."""
    value = holder.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(key, "a number")
    return value


def integer(holder: Object, key: str) -> int | None:
    """Return a whole-number field; 3.0 counts as one."""
    value = number(holder, key)
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value):
        raise wrong_type(key, "an integer")
    return int(value)


def member(holder: Object, key: str) -> Object | None:
    """Return an object field."""
    value = holder.get(key)
    if value is not None and not isinstance(value, dict):
        raise wrong_type(key, "an object")
    return value


def objects(holder: Object, key: str) -> list[Object]:
    """Return a field that is a list of objects, empty where it is absent."""
    value = holder.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise wrong_type(key, "a list of objects")
    return value


def strings(holder: Object, key: str) -> list[str]:
    """Return a field that is a string or a list of strings as a list."""
    value = holder.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong_type(key, "a string or a list of strings")
    return value


def wrong_type(key: str, wanted: str) -> BadRequest:
    """Return the error for a field of the wrong type."""
    return BadRequest(f"invalid type for '{key}': expected {wanted}")


def tool_arguments(value: Any) -> Object:
    """Return a tool call's arguments, which OpenAI's surfaces write as JSON in a string."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else {}
        except orjson.JSONDecodeError:
            raise BadRequest("invalid tool call arguments") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest("invalid tool call arguments")
    return value


def image_of_url(url: str) -> str:
    """Return the base64 of a data URI. Remote images are not fetched, as Ollama does not either."""
    prefix, comma, data = url.partition(",")
    if not comma or not prefix.startswith(("data:image/", "data:;")) or not prefix.endswith(";base64"):
        raise BadRequest("invalid image input: only base64 data URIs (data:image/png;base64,…) are supported")
    return image_data(data)


def image_data(data: str) -> str:
    """Return `data`, checked to be base64."""
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("invalid image input: not base64") from None
    return data
