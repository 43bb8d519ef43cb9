"""The few fields of an inference request that routing needs, read from its body once.

Bodies go on as they came; only one that carries osync's own fields is written anew, without them.
Errors are in the words of the Go decoder, as far as they are known to clients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import zstandard

from osync.errors import BadRequest, FrameTooLarge
from osync.wire.options import parse_keep_alive

MAX_COMPRESSED = 20 << 20
"""Ollama's own bound for zstd bodies."""
MAX_DECOMPRESSED = 64 << 20
EXTENSIONS = ("distributed", "session_id", "quantize")

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
_MODEL_REQUIRED = frozenset(
    ("/api/chat", "/api/embeddings", "/v1/chat/completions", "/v1/responses", "/v1/messages",
     "/v1/audio/transcriptions")
)  # fmt: skip


@dataclass(slots=True)  # frozen would make it in three times the time, once per request
class Inference:
    """What the gateway routes by. Never changed once made."""

    model: str
    body: bytes
    """The bytes that go to a backend."""
    plain: bytes
    """The same as JSON: decompressed where the client compressed."""
    stream: bool = False
    is_load: bool = False
    """An empty request: it loads the model and says so."""
    is_unload: bool = False
    """An empty request with keep_alive 0."""
    is_rewritten: bool = False
    """True if `body` is not what the client sent: Content-Encoding no longer holds."""
    distributed: bool | None = None
    session_id: str = ""
    quantize: str = ""


def parse(path: str, body: bytes, header: Callable[[str], str], limit: int = MAX_DECOMPRESSED) -> Inference:
    """Read a request's routing fields. `header` gives a header's value by lower-case name.

    Raises BadRequest or FrameTooLarge.
    """
    if path == "/v1/audio/transcriptions":
        model = multipart_field(body, header("content-type"), "model")
        return Inference(_required(path, model), body, body)
    if not body:
        raise BadRequest("missing request body")
    plain, encoding = body, header("content-encoding")
    if encoding and encoding.strip().lower() == "zstd":
        plain = decompress(body, limit)
    value = parse_object(path, plain)
    fields = value if "".join(value).islower() else _folded(value)
    options = _field(fields, "options", dict, path, "map[string]interface {}")
    extensions = {name: options.pop(name) for name in EXTENSIONS if name in options} if options else {}
    is_rewritten = bool(extensions)
    if is_rewritten:
        body = plain = _dump(value)
    is_load = is_unload = False
    if path == "/api/chat":
        is_load = not _field(fields, "messages", list, path, "[]api.Message")
    elif path == "/api/generate":
        is_load = not _field(fields, "prompt", str, path, "string")
    if is_load:
        keep_alive = parse_keep_alive(value.get("keep_alive"))
        is_unload = keep_alive is not None and 0 <= keep_alive < 1
    stream = _field(fields, "stream", bool, path, "bool")
    if stream is None:
        stream = path.startswith("/api/") and not path.startswith("/api/embed")
    return Inference(
        model=_required(path, _field(fields, "model", str, path, "string") or ""),
        body=body,
        plain=plain,
        stream=stream,
        is_load=is_load,
        is_unload=is_unload,
        is_rewritten=is_rewritten,
        distributed=_extension(extensions, "distributed", bool),
        session_id=_extension(extensions, "session_id", str) or header("x-osync-session"),
        quantize=_extension(extensions, "quantize", str) or "",
    )


def parse_object(path: str, body: bytes) -> dict[str, Any]:
    """Read a JSON object as Go would. Raises BadRequest in Go's words."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_leniently(body)
    if not isinstance(value, dict):
        if value is None:
            return {}
        struct = _STRUCTS.get(path, "Request")
        raise BadRequest(f"json: cannot unmarshal {_go_kind(value)} into Go value of type api.{struct}")
    return value


def decompress(body: bytes, limit: int = MAX_DECOMPRESSED) -> bytes:
    """Undo zstd, within bounds on both sides. Raises BadRequest or FrameTooLarge."""
    if len(body) > MAX_COMPRESSED:
        raise FrameTooLarge(f"compressed request body is over {MAX_COMPRESSED} bytes")
    pieces: list[bytes] = []
    size = 0
    try:
        for piece in zstandard.ZstdDecompressor(max_window_size=1 << 27).read_to_iter(body, write_size=1 << 20):
            size += len(piece)
            if size > limit:
                raise FrameTooLarge(f"request body is over {limit} bytes once decompressed")
            pieces.append(piece)
    except zstandard.ZstdError as error:
        raise BadRequest("request body is not valid zstd") from error
    return b"".join(pieces)


def multipart_field(body: bytes, content_type: str, name: str) -> str:
    """Return a text field of a multipart/form-data body, "" where absent. Raises BadRequest."""
    boundary = ""
    for parameter in content_type.split(";")[1:]:
        key, _, value = parameter.strip().partition("=")
        if key.lower() == "boundary":
            boundary = value.strip('"')
    if not content_type.lower().startswith("multipart/form-data") or not 0 < len(boundary) <= 70:
        raise BadRequest("request Content-Type isn't multipart/form-data")
    mark = b"--" + boundary.encode("latin-1", "replace")
    at = body.find(mark)
    while at >= 0:
        head_at = at + len(mark)
        head_end = body.find(b"\r\n\r\n", head_at, head_at + 8192)
        following = body.find(b"\r\n" + mark, head_at)
        if head_end < 0 or following < 0:
            break
        head = body[head_at:head_end].decode("utf-8", "replace").lower()
        if f'name="{name}"' in head and "filename=" not in head:
            return body[head_end + 4 : following].decode("utf-8", "replace").strip()
        at = following + 2
    return ""


def _parse_leniently(body: bytes) -> Any:
    """Accept what Go accepts and orjson does not: bad UTF-8, lone surrogates, text after the value."""
    text = body.decode("utf-8", "replace")
    start = len(text) - len(text.lstrip(" \t\r\n"))
    if start == len(text):
        raise BadRequest("EOF")
    try:
        value, _ = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise BadRequest("json: exceeded max depth") from None
    except json.JSONDecodeError as error:
        rest = text[error.pos :].lstrip(" \t\r\n")
        if not rest or error.msg.startswith("Unterminated string"):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid character {_quoted(rest[0])} {_looking_for(error.msg)}") from None
    return _without_surrogates(value)


def _dump(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer over 64 bits, or nesting that only the lenient reader takes
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _reject_constant(name: str) -> Any:
    raise BadRequest(f"invalid character {_quoted(name.lstrip('-')[0])} looking for beginning of value")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


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


def _go_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _folded(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object's fields as Go finds them: in any case, the exact name first, null as if absent."""
    fields: dict[str, Any] = {}
    for key, item in value.items():
        name = key.lower()
        if item is not None and (key == name or name not in fields):
            fields[name] = item
    return fields


def _field(fields: dict[str, Any], name: str, kind: type, path: str, go_type: str) -> Any:
    """Return a field of the given type; None where absent or null."""
    found = fields.get(name)
    if found is not None and not isinstance(found, kind):
        raise BadRequest(
            f"json: cannot unmarshal {_go_kind(found)} into Go struct field "
            f"{_STRUCTS.get(path, 'Request')}.{name} of type {go_type}"
        )
    return found


def _extension(extensions: dict[str, Any], name: str, kind: type) -> Any:
    value = extensions.get(name) if extensions else None
    if value is not None and not isinstance(value, kind):
        raise BadRequest(f'option "{name}" must be a {"boolean" if kind is bool else "string"}')
    return value


def _required(path: str, model: str) -> str:
    if not model and path in _MODEL_REQUIRED:
        raise BadRequest("model is required")
    return model
