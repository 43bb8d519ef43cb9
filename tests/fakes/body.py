"""The bodies that the fake Ollama reads, as strictly as the real one: Go's types, and Go's words for what is not so."""

from __future__ import annotations

import json
from typing import Any

import orjson
import zstandard

Object = dict[str, Any]
MAX_COMPRESSED = 20 << 20
COMPRESSIBLE = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"}

_INTEGER_OPTIONS = {
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
    "num_thread", "draft_num_predict",
}  # fmt: skip
_FLOAT_OPTIONS = {
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty",
}  # fmt: skip

_NATIVE = {"model": "string", "stream": "bool", "options": "map[string]interface {}", "truncate": "bool"}
_OPENAI = {"model": "string", "stream": "bool", "max_tokens": "int", "seed": "int", "temperature": "float64",
           "top_p": "float64", "frequency_penalty": "float64", "presence_penalty": "float64"}  # fmt: skip
_MANAGE = {"model": "string", "name": "string", "stream": "bool", "insecure": "bool"}
_STRUCTS: dict[str, tuple[str, dict[str, str]]] = {
    "/api/generate": ("GenerateRequest", {
        **_NATIVE, "prompt": "string", "suffix": "string", "system": "string", "template": "string", "raw": "bool",
        "context": "[]int", "images": "[]api.ImageData",
    }),
    "/api/chat": ("ChatRequest", {**_NATIVE, "messages": "[]api.Message", "tools": "api.Tools"}),
    "/api/embed": ("EmbedRequest", {**_NATIVE, "dimensions": "int"}),
    "/api/embeddings": ("EmbeddingRequest", {**_NATIVE, "prompt": "string"}),
    "/v1/chat/completions": ("ChatCompletionRequest", {
        **_OPENAI, "messages": "[]openai.Message", "tools": "[]api.Tool",
    }),
    "/v1/completions": ("CompletionRequest", {**_OPENAI, "prompt": "string", "suffix": "string"}),
    "/v1/embeddings": ("EmbedRequest", {"model": "string", "dimensions": "int", "encoding_format": "string"}),
    "/v1/responses": ("ResponsesRequest", {
        "model": "string", "stream": "bool", "instructions": "string", "max_output_tokens": "int",
        "temperature": "float64", "top_p": "float64",
    }),
    "/v1/messages": ("MessagesRequest", {
        "model": "string", "stream": "bool", "max_tokens": "int", "messages": "[]anthropic.MessageParam",
        "temperature": "float64", "top_p": "float64", "top_k": "int", "stop_sequences": "[]string",
    }),
    "/api/show": ("ShowRequest", {**_MANAGE, "verbose": "bool", "system": "string", "template": "string"}),
    "/api/copy": ("CopyRequest", {"source": "string", "destination": "string"}),
    "/api/delete": ("DeleteRequest", _MANAGE),
    "/api/pull": ("PullRequest", _MANAGE),
    "/api/push": ("PushRequest", _MANAGE),
    "/api/create": ("CreateRequest", {
        **_MANAGE, "from": "string", "files": "map[string]string", "adapters": "map[string]string",
        "parameters": "map[string]interface {}", "quantize": "string", "system": "string", "template": "string",
    }),
}  # fmt: skip


class Refused(Exception):
    """An error before the first byte."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def decode(path: str, body: bytes, encoding: str = "") -> Object:
    """Return the request's object, its fields of the types that the route's struct has. Raises Refused."""
    if encoding == "zstd" and path in COMPRESSIBLE:
        body = _decompress(body)
    if not body.strip():
        raise Refused(400, "missing request body")
    struct, fields = _STRUCTS.get(path, ("Request", {}))
    value = _loads(body)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(400, f"json: cannot unmarshal {_kind(value)} into Go value of type api.{struct}")
    for name, go in fields.items():
        _check(value.get(name), f"{struct}.{name}", go)
    return {name: item for name, item in value.items() if item is not None}


def check_options(options: Object) -> Object:
    """Return the options that are set, once their types are right. Raises Refused with Ollama's 500."""
    for name, value in options.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = ""
        if value is None:
            continue
        if name in _INTEGER_OPTIONS and not is_number:
            wrong = "of type integer"
        elif name in _FLOAT_OPTIONS and not is_number:
            wrong = "of type float32"
        elif name == "use_mmap" and not isinstance(value, bool):
            wrong = "of type boolean"
        elif name == "stop" and not isinstance(value, list):
            wrong = "of type array"
        elif name == "stop" and not all(isinstance(item, str) for item in value):
            wrong = "of an array of strings"
        if wrong:
            raise Refused(500, f'option "{name}" must be {wrong}')
    return {name: value for name, value in options.items() if value is not None}


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    text = body.decode("utf-8", "replace")
    try:
        value = json.JSONDecoder().raw_decode(text.lstrip())[0]  # Go reads one value, and no further
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))  # no lone surrogates
    except json.JSONDecodeError as error:
        rest = text.lstrip()[error.pos :].lstrip()
        if not rest or error.msg.startswith("Unterminated"):
            raise Refused(400, "unexpected EOF") from None
        raise Refused(400, f"invalid character {rest[0]!r} looking for beginning of value") from None
    except (RecursionError, ValueError):
        raise Refused(400, "json: exceeded max depth") from None


def _check(value: Any, field: str, go: str) -> None:
    if value is None:
        return
    kind = _kind(value)
    if go == "int" and isinstance(value, float):
        raise Refused(400, f"json: cannot unmarshal number {value!r} into Go struct field {field} of type int")
    wanted = {"string": "string", "bool": "bool", "int": "number", "float64": "number"}.get(go)
    if wanted is None:
        wanted = "object" if go.startswith("map[") else "array"
    if kind != wanted:
        raise Refused(400, f"json: cannot unmarshal {kind} into Go struct field {field} of type {go}")
    if go == "map[string]string":
        for item in value.values():
            _check(item, field, "string")
    elif go == "[]int":
        for item in value:
            _check(item, field, "int")
    elif go == "[]string":
        for item in value:
            _check(item, field, "string")
    elif go.endswith(("Message", "MessageParam")):
        for item in value:
            _check_message(item, field, go)


def _check_message(item: Any, field: str, go: str) -> None:
    if item is None:
        return
    if not isinstance(item, dict):
        raise Refused(400, f"json: cannot unmarshal {_kind(item)} into Go struct field {field} of type {go[2:]}")
    _check(item.get("role"), f"{field}.role", "string")
    content = item.get("content")
    if go == "[]api.Message":
        _check(content, f"{field}.content", "string")
    elif not isinstance(content, (str, list, type(None))):
        raise Refused(400, f"invalid message format: {_kind(content)}")


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _decompress(body: bytes) -> bytes:
    if len(body) > MAX_COMPRESSED:
        raise Refused(413, "request body too large")
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(body)
    except zstandard.ZstdError:
        raise Refused(400, "failed to read request body") from None
