"""Typed access to the fields of a JSON request body. Wrong types raise BadRequest; null is absent.

`Fields` speaks in the words of Ollama's Go decoder; the functions below, in those of the translated surfaces.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any, Self

import orjson

from osync.errors import BadRequest
from osync.wire.body import Object, folded, parse_object
from osync.wire.body import wrong_type as go_wrong_type


class Fields:
    """A JSON object of Ollama's API with typed access. Every accessor raises BadRequest on a wrong type."""

    def __init__(self, data: Mapping[str, Any], struct: str) -> None:
        self.data = dict(data)
        """The object as it came; the accessors find its fields in any case, as Go does."""
        self._fields = folded(self.data)
        self._struct = struct

    @classmethod
    def decode(cls, body: bytes, struct: str) -> Self:
        """Parse a body. Raises BadRequest."""
        return cls(parse_object(body, struct), struct)

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self._fields.get(name) is not None

    def raw(self, name: str) -> Any:
        """Return a field of any type, None where absent."""
        return self._fields.get(name)

    def _typed(self, name: str, kind: type, go: str, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.wrong(name, value, go)
        return value

    def wrong(self, name: str, value: Any, go: str) -> BadRequest:
        """Return the error for a field of the wrong type."""
        return go_wrong_type(value, f"{self._struct}.{name}", go)

    def text(self, name: str) -> str:
        """Return a string, "" where absent."""
        return str(self._typed(name, str, "string", ""))

    def first_text(self, *names: str) -> str:
        """Return the first string of these that is not empty, "" for none; all must be strings."""
        texts = [self.text(name) for name in names]
        return next(filter(None, texts), "")

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        return bool(self._typed(name, bool, "bool", default))

    def object(self, name: str) -> Object:
        """Return an object, empty where absent."""
        value: Object = self._typed(name, dict, "map[string]interface {}", {})
        return value

    def array(self, name: str, go: str) -> list[Any]:
        """Return an array, empty where absent."""
        value: list[Any] = self._typed(name, list, go, [])
        return value

    def integers(self, name: str) -> list[int]:
        """Return an array of integers."""
        values = self.array(name, "[]int")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.wrong(name, value, "int")
        return values

    def model(self) -> str:
        """Return the model's name; `name` is its old field."""
        return self.first_text("model", "name")


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
