"""The bodies that Ollama answers with, key for key."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from osync.backend.engine.slot import Slot
from osync.coordinator.request import Final
from osync.engine.gguf import GGUFArray, GGUFHeader, read_array
from osync.engine.store import StoredModel
from osync.net.exchange import Responder
from osync.types import ModelInfo, ResponseHead

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"
TEXT = "text/plain; charset=utf-8"
_PIECE = 256 << 10  # of a long body at a time: the reader's window is 1 MiB
_LONG_ARRAY = 5
_SLICE = 4096  # strings of a vocabulary: about 1 ms


def dumps(value: object) -> bytes:
    """Serialize as Go does, which also escapes what HTML gives a meaning to."""
    data = orjson.dumps(value)
    if b"<" in data or b">" in data or b"&" in data:  # in JSON these are found in strings only
        data = data.replace(b"<", rb"\u003c").replace(b">", rb"\u003e").replace(b"&", rb"\u0026")
    return data


async def respond(
    responder: Responder, status: int, body: bytes, kind: str = JSON, *, is_head: bool = False, retry_after: str = ""
) -> None:
    """Send a whole answer."""
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    if retry_after:
        headers.append(("Retry-After", retry_after))
    await responder.start(ResponseHead(status, tuple(headers)))
    if not is_head:
        for at in range(0, len(body), _PIECE):
            await responder.write(body[at : at + _PIECE])


def now_text(ns: int | None = None) -> str:
    """Return a time as RFC 3339 with nanoseconds, trailing zeros left out as Go does."""
    second, rest = divmod(time.time_ns() if ns is None else ns, 10**9)
    fraction = f".{rest:09d}".rstrip("0").rstrip(".")
    return f"{_second_text(second)}{fraction}Z"


@lru_cache(maxsize=16)
def _second_text(second: int) -> str:
    """Return a whole second's part: many tokens come in one."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def details(info: ModelInfo) -> dict[str, Any]:
    """Return a model's `details` object."""
    return {
        "parent_model": "",
        "format": info.format,
        "family": info.family,
        "families": list(info.families),
        "parameter_size": info.parameter_size,
        "quantization_level": info.quantization,
    }


def tag(info: ModelInfo) -> dict[str, Any]:
    """Return one model of /api/tags."""
    return {
        "name": info.name,
        "model": info.name,
        "modified_at": info.modified_at,
        "size": info.size,
        "digest": info.digest,
        "details": {
            **details(info),
            "context_length": info.context_length,
            "embedding_length": info.embedding_length,
        },
        "capabilities": list(info.capabilities),
    }


def running(slot: Slot, now: float) -> dict[str, Any]:
    """Return one model of /api/ps."""
    info, runner = slot.model.info, slot.runner
    assert runner is not None
    return {
        "name": info.name,
        "model": info.name,
        "size": runner.size_bytes,
        "digest": info.digest,
        "details": details(info),
        "expires_at": now_text(int(slot.expires_at(now) * 1e9)),
        "size_vram": runner.size_vram,
        "context_length": runner.context_length,
    }


def metrics(final: Final, *, total_ns: int, load_ns: int) -> dict[str, int]:
    """Return an answer's counts and durations; what is zero is left out, as Go's omitempty does."""
    values = {
        "total_duration": total_ns,
        "load_duration": load_ns,
        "prompt_eval_count": final.prompt_tokens,
        "prompt_eval_duration": final.prompt_ns,
        "eval_count": final.output_tokens,
        "eval_duration": final.output_ns,
    }
    return {key: value for key, value in values.items() if value}


def show(model: StoredModel, *, verbose: bool, system: str = "") -> bytes:
    """Return the body of /api/show. Reads the vocabulary from the file if `verbose`: blocking."""
    info, header = model.info, model.header
    system = system or model.system
    template = model.template or header.chat_template
    parameters = _parameters(model.parameters)
    body: dict[str, Any] = {}
    licenses = "\n".join(model.licenses) or header.text("general.license")
    if licenses:
        body["license"] = licenses
    body["modelfile"] = _modelfile(model, template, system)
    if parameters:
        body["parameters"] = parameters
    if template:
        body["template"] = template
    if system:
        body["system"] = system
    body["details"] = details(info)
    if model.messages:
        body["messages"] = list(model.messages)
    body["model_info"] = _model_info(model, verbose)
    if verbose:
        body["tensors"] = [{"name": t.name, "type": t.type, "shape": t.shape} for t in header.tensors]
    body["capabilities"] = list(info.capabilities)
    body["modified_at"] = info.modified_at
    return dumps(body)


def _model_info(model: StoredModel, verbose: bool) -> dict[str, Any]:
    header: GGUFHeader = model.header
    values: dict[str, Any] = {}
    for key, value in header.metadata.items():
        if key in {"general.name", "tokenizer.chat_template"}:
            continue
        if isinstance(value, GGUFArray):
            values[key] = _sliced(read_array(model.path, value)) if verbose else []
        elif isinstance(value, tuple):
            values[key] = value if verbose or len(value) <= _LONG_ARRAY else []
        else:
            values[key] = value
    values.setdefault("general.parameter_count", header.parameter_count)
    return dict(sorted(values.items()))


def _sliced(items: Sequence[Any]) -> orjson.Fragment:
    """Serialize a vocabulary's array in slices: the serializer holds the interpreter, and with it the event loop."""
    pieces = [dumps(items[at : at + _SLICE])[1:-1] for at in range(0, len(items), _SLICE)]
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


def _parameters(parameters: Mapping[str, Any]) -> str:
    lines = []
    for key, value in sorted(parameters.items()):
        lines += [f"{key:<30} {_go(item)}" for item in (value if isinstance(value, list) else [value])]
    return "\n".join(lines)


def _go(value: object) -> str:
    return orjson.dumps(value).decode()


def _modelfile(model: StoredModel, template: str, system: str) -> str:
    lines = [
        '# Modelfile generated by "osync"',
        f"# To build a new model from this one, replace FROM with: FROM {model.info.name}",
        "",
        f"FROM {model.path}",
    ]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    for key, value in sorted(model.parameters.items()):
        lines += [f"PARAMETER {key} {_go(v)}" for v in (value if isinstance(value, list) else [value])]
    lines += [f'LICENSE """{text}"""' for text in model.licenses]
    return "\n".join(lines) + "\n"
