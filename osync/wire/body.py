"""A request's JSON body, read as Ollama's Go decoder reads it: what it accepts, and its words where it does not."""

from __future__ import annotations

import json
from typing import Any

import orjson

from osync.errors import BadRequest

Object = dict[str, Any]

_TOO_DEEP = "json: exceeded max depth"
_STRUCTS = {
    "/api/generate": "GenerateRequest",
    "/api/chat": "ChatRequest",
    "/api/embed": "EmbedRequest",
    "/api/embeddings": "EmbeddingRequest",
    "/v1/chat/completions": "ChatCompletionRequest",
    "/v1/completions": "CompletionRequest",
    "/v1/embeddings": "EmbedRequest",
    "/v1/responses": "ResponsesRequest",
    "/v1/messages": "MessagesRequest",
}


def struct_of(path: str) -> str:
    """Return the name of the Go struct that a route decodes its body into."""
    return _STRUCTS.get(path, "Request")


def parse_object(body: bytes, struct: str) -> Object:
    """Return the object that `body` is; null is an empty one. Raises BadRequest in Go's words."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_leniently(body)
    if isinstance(value, dict):
        return value
    if value is None:
        return {}
    raise BadRequest(f"json: cannot unmarshal {kind_of(value)} into Go value of type api.{struct}")


def dump_object(value: Object) -> bytes:
    """Return `value` as JSON, also where only the lenient reader could read it. Raises BadRequest if too deep."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer over 64 bits, or nesting that only the lenient reader takes
        pass
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None


def folded(value: Object) -> Object:
    """Return an object's fields as Go finds them: in any case, the exact name first, null as if absent."""
    if "".join(value).islower():
        return value
    fields: Object = {}
    for key, item in value.items():
        name = key.lower()
        if item is not None and (key == name or name not in fields):
            fields[name] = item
    return fields


def wrong_type(value: object, field: str, go_type: str) -> BadRequest:
    """Return Go's error for a field (written Struct.field) of the wrong type."""
    return BadRequest(f"json: cannot unmarshal {kind_of(value)} into Go struct field {field} of type {go_type}")


def kind_of(value: object) -> str:
    """Return Go's word for the JSON type of a value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _parse_leniently(body: bytes) -> Any:
    """Accept what Go accepts and orjson does not: bad UTF-8, lone surrogates, text after the value."""
    text = body.decode("utf-8", "replace")
    start = len(text) - len(text.lstrip(" \t\r\n"))
    if start == len(text):
        raise BadRequest("missing request body")
    try:
        value, _ = _DECODER.raw_decode(text, start)
        return _without_surrogates(value)
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        rest = text[error.pos :].lstrip(" \t\r\n")
        if not rest or error.msg.startswith("Unterminated string"):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid character {_quoted(rest[0])} {_looking_for(error.msg)}") from None


def _reject_constant(name: str) -> Any:
    raise BadRequest(f"invalid character {_quoted(name.lstrip('-')[0])} looking for beginning of value")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise BadRequest(f"json: cannot unmarshal number {text[:100]} into Go value of type float64")
    return number


def _integer(text: str) -> int | float:
    # Python refuses to read more than some thousand digits; as a float they are infinite anyway.
    return int(text) if len(text) < 300 else _finite(text)


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite, parse_int=_integer)


def _without_surrogates(value: Any) -> Any:
    """Replace lone surrogates as Go does, so that the value can be written as UTF-8 again."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return value
    return json.loads(text.encode("utf-8", "replace"))


def _looking_for(message: str) -> str:
    if message.startswith("Expecting property name"):
        return "looking for beginning of object key string"
    if message.startswith("Expecting ':'"):
        return "after object key"
    if message.startswith("Expecting ','"):
        return "after object key:value pair"
    if message.startswith("Invalid control character"):
        return "in string literal"
    if "escape" in message:
        return "in string escape code"
    return "looking for beginning of value"


def _quoted(character: str) -> str:
    return {"'": "'\\''", '"': "'\"'"}.get(character, repr(character))
