"""Request bodies, read as Ollama's Go decoder reads them: same demands, same words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from osync.errors import BadRequest, NotSupported

_MISSING: Any = object()


class Fields:
    """A JSON object with typed access. Every accessor raises BadRequest on a wrong type."""

    def __init__(self, data: Mapping[str, Any], struct: str) -> None:
        self._data = data
        self._struct = struct

    @classmethod
    def decode(cls, body: bytes, struct: str) -> Fields:
        """Parse a body. Raises BadRequest."""
        if not body.strip():
            raise BadRequest("missing request body")
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise BadRequest(_syntax(body)) from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise BadRequest(f"json: cannot unmarshal {_kind(data)} into Go value of type api.{struct}")
        return cls(data, struct)

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self._data.get(name) is not None

    def raw(self, name: str) -> Any:
        """Return a field of any type, None where absent."""
        return self._data.get(name)

    def _typed(self, name: str, kinds: type | tuple[type, ...], go: str, default: Any) -> Any:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self.wrong(name, value, go)
        return value

    def wrong(self, name: str, value: Any, go: str) -> BadRequest:
        """Return the error for a field of the wrong type."""
        return BadRequest(
            f"json: cannot unmarshal {_kind(value)} into Go struct field {self._struct}.{name} of type {go}"
        )

    def text(self, name: str) -> str:
        """Return a string, "" where absent."""
        return str(self._typed(name, str, "string", ""))

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        return bool(self._typed(name, bool, "bool", default))

    def object(self, name: str) -> dict[str, Any]:
        """Return an object, empty where absent."""
        value: dict[str, Any] = self._typed(name, dict, "map[string]interface {}", {})
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
        return self.text("model") or self.text("name")

    def messages(self) -> list[dict[str, str]]:
        """Return a conversation: role and content of each message. Raises NotSupported for more."""
        messages: list[dict[str, str]] = []
        for item in self.array("messages", "[]api.Message"):
            if not isinstance(item, dict):
                raise self.wrong("messages", item, "api.Message")
            fields = Fields(item, f"{self._struct}.messages")
            for name in ("images", "tool_calls"):
                if item.get(name):
                    raise not_supported(f"messages.{name}")
            messages.append({"role": fields.text("role").lower(), "content": fields.text("content")})
        return messages

    def refuse(self, *names: str) -> None:
        """Raise NotSupported if one of these fields asks for something."""
        for name in names:
            if self._data.get(name):
                raise not_supported(name)


def not_supported(name: str) -> NotSupported:
    """Return the error for a field that the engine cannot honour yet."""
    return NotSupported(
        f'the engine backend does not support "{name}" yet; leave it out, or use a node whose backend is ollama'
    )


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _syntax(body: bytes) -> str:
    """Say what is wrong with a body that is no JSON, much as Go's decoder would."""
    text = body[: 1 << 20].decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            return "unexpected EOF"
        found = text[error.pos]
        where = {
            "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
            "Expecting ':' delimiter": "after object key",
            "Expecting ',' delimiter": "after object key:value pair",
            "Extra data": "after top-level value",
        }.get(error.msg.partition(":")[0], "looking for beginning of value")
        return f"invalid character '{found}' {where}"
    except (ValueError, RecursionError):
        pass
    return "invalid JSON"
