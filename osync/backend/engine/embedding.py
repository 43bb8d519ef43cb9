"""/api/embed and /api/embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from osync.backend.engine.answers import dumps, respond
from osync.backend.engine.fields import Fields
from osync.backend.engine.table import Table
from osync.coordinator.embedding import Embeddings
from osync.engine.embedding import Vector, normalized
from osync.engine.store import StoredModel
from osync.errors import BadRequest, ModelUnusable
from osync.net.exchange import Responder
from osync.wire.options import ParsedOptions, parse_keep_alive, parse_options

Answer = Callable[[Fields, StoredModel, Table, Responder], Awaitable[None]]
"""One of the two routes."""

_VALUES = 1 << 15
"""Written as JSON between two turns of the event loop: a few milliseconds' work."""


async def embed(fields: Fields, model: StoredModel, table: Table, responder: Responder) -> None:
    """Answer /api/embed."""
    began_ns = time.monotonic_ns()
    texts = _texts(fields.raw("input"))
    truncate = fields.boolean("truncate", True)
    dimensions = fields.raw("dimensions") or 0
    if isinstance(dimensions, bool) or not isinstance(dimensions, int):
        raise fields.wrong("dimensions", dimensions, "int")
    options, keep_alive_s = _demands(fields, model)
    async with table.lease(model, options.runner, keep_alive_s) as (_, runner):
        load_ns = time.monotonic_ns() - began_ns
        found = await runner.embed(texts, truncate=truncate) if texts else Embeddings((), 0)
    vectors = await _write(found.vectors, dimensions)
    metrics = {
        "total_duration": time.monotonic_ns() - began_ns,
        "load_duration": load_ns,
        "prompt_eval_count": found.tokens,
    }
    if not texts:
        metrics = {}
    head = dumps({"model": fields.model()})[:-1]
    tail = b"".join(b',"%b":%d' % (key.encode(), value) for key, value in metrics.items() if value)
    await respond(responder, 200, b"%b,%b%b}" % (head, b'"embeddings":' + vectors, tail))


async def embeddings(fields: Fields, model: StoredModel, table: Table, responder: Responder) -> None:
    """Answer /api/embeddings, the older route for one text, which is always truncated."""
    text = fields.text("prompt")
    options, keep_alive_s = _demands(fields, model)
    async with table.lease(model, options.runner, keep_alive_s) as (_, runner):
        found = await runner.embed([text]) if text else Embeddings((), 0)
    vectors = await _write(found.vectors, 0)
    await respond(responder, 200, b'{"embedding":%b}' % (vectors[1:-1] or b"[]"))


def _texts(value: Any) -> list[str]:
    """Return the texts of a request; an empty one alone asks for nothing but the load, as in Ollama."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest("invalid input type")
    return value


def _demands(fields: Fields, model: StoredModel) -> tuple[ParsedOptions, float | None]:
    keep_alive_s = parse_keep_alive(fields.raw("keep_alive"))
    return parse_options({**model.parameters, **fields.object("options")}), keep_alive_s


async def _write(vectors: Sequence[Vector], dimensions: int) -> bytes:
    """Return vectors as JSON, of so many dimensions where they have more; long lists in several turns."""
    rows: list[bytes] = []
    values = 0
    for vector in vectors:
        row = normalized(vector[:dimensions]) if 0 < dimensions < len(vector) else vector
        rows.append(_row(row))
        values += len(vector)
        if values >= _VALUES:
            values = 0
            await asyncio.sleep(0)
    return b"[" + b",".join(rows) + b"]"


def _row(vector: Vector) -> bytes:
    """Write float32 with as many digits as it has, as Go does: half of what the same numbers take as float64."""
    try:
        import numpy  # llama.cpp's bindings need it, so it is there; without the engine nothing comes here
    except ModuleNotFoundError as error:
        raise ModelUnusable("numpy is missing; install it with: pip install 'osync[engine]'") from error
    return orjson.dumps(numpy.frombuffer(vector, dtype=numpy.float32), option=orjson.OPT_SERIALIZE_NUMPY)
