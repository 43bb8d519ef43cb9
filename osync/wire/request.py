"""The few fields of an inference request that routing needs, read from its body once.

Bodies go on as they came; only one that carries osync's own fields is written anew, without them.
Errors are in the words of the Go decoder, as far as they are known to clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zstandard

from osync.errors import BadRequest, FrameTooLarge
from osync.wire.body import dump_object, folded, parse_object, struct_of, wrong_type
from osync.wire.options import parse_keep_alive

MAX_COMPRESSED = 20 << 20
"""Ollama's own bound for zstd bodies."""
MAX_DECOMPRESSED = 64 << 20
EXTENSIONS = ("distributed", "session_id", "quantize")
PIPELINE_OPTIONS = ("stages", "shards", "activation_dtype")
"""Options of the runner that only a pipeline understands; like EXTENSIONS they reach no other backend."""
_OWN = frozenset((*EXTENSIONS, *PIPELINE_OPTIONS))

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
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    """Those of PIPELINE_OPTIONS that were given."""
    num_ctx: object = None
    """The option as it came: how long a context the model is loaded with decides how much memory it takes."""


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
    value = parse_object(plain, struct_of(path))
    fields = folded(value)
    options = _field(fields, "options", dict, path, "map[string]interface {}")
    extensions = {name: options.pop(name) for name in _OWN.intersection(options)} if options else {}
    is_rewritten = bool(extensions)
    if is_rewritten:
        body = plain = dump_object(value)
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
        pipeline_options={name: extensions[name] for name in PIPELINE_OPTIONS if extensions.get(name) is not None},
        num_ctx=options.get("num_ctx") if options else None,
    )


def with_options(body: bytes, options: Mapping[str, Any]) -> bytes:
    """Return a native request with these options added to its own."""
    value = parse_object(body, "Request")
    own = folded(value).get("options")
    value = {name: item for name, item in value.items() if name.lower() != "options"}
    return dump_object({**value, "options": {**(own if isinstance(own, dict) else {}), **options}})


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


def _field(fields: dict[str, Any], name: str, kind: type, path: str, go_type: str) -> Any:
    """Return a field of the given type; None where absent or null."""
    found = fields.get(name)
    if found is not None and not isinstance(found, kind):
        raise wrong_type(found, f"{struct_of(path)}.{name}", go_type)
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
