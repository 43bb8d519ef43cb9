"""What models there are: /api/tags, ps, show, version, and /v1/models, over all nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

import structlog

from osync.core import merge
from osync.errors import BadRequest, ModelNotFound, OsyncError, UpstreamError
from osync.gateway.context import Call, Context
from osync.gateway.fetch import Answer, Result, fan_out, reason, relay_first
from osync.gateway.fields import read_fields
from osync.gateway.health import no_replica, why_unusable
from osync.gateway.relay import send_json, upstream_head
from osync.gateway.targets import designated_node, ollamas, read_head, readable, replicas
from osync.types import ModelInfo, NodeState, RequestHead
from osync.version import OLLAMA_API
from osync.wire import names

log = structlog.get_logger("osync.gateway")

PS_TIMEOUT_S = 6.0
"""An Ollama that unloads a model may hold /api/ps back for about 5 s."""

SHOW_TIMEOUT_S = 30.0
"""A show may read a model's header from a slow disk."""


async def tags(ctx: Context, call: Call) -> None:
    """GET, HEAD /api/tags: every model that any node has, once."""
    results = await fan_out(readable(ctx, call), read_head(call, "GET", "/api/tags"))
    await send_json(call, 200, {"models": merge.merge_tags(_rows(results, "models"), names.key)})


async def ps(ctx: Context, call: Call) -> None:
    """GET /api/ps: every model that any node has in memory, once."""
    head = read_head(call, "GET", "/api/ps")
    results = await fan_out(readable(ctx, call), head, timeout_s=PS_TIMEOUT_S)
    await send_json(call, 200, {"models": merge.merge_ps(_rows(results, "models"), names.key)})


async def version(ctx: Context, call: Call) -> None:
    """GET, HEAD /api/version: the lowest of the nodes' versions, osync's own level where there is none."""
    versions = [
        state.backend.version if state.backend.kind == "ollama" else OLLAMA_API for state, _ in ctx.view.usable()
    ]
    await send_json(call, 200, {"version": merge.lowest_version(versions) or OLLAMA_API})


async def show(ctx: Context, call: Call) -> None:
    """POST /api/show: of any node that has the model, the majority's digest first."""
    raw, fields = await read_fields(ctx, call, "ShowRequest")
    name = fields.model()
    if not name:
        raise BadRequest("model is required")
    shown = names.display(name)
    nodes = readable(ctx, call)
    # Nodes that do not list it are asked last: a model made a moment ago may not be in their state yet.
    having = replicas(nodes, name)
    rest = [node for node in ollamas(nodes) if node not in having]
    if names.is_cloud(name) and not having:
        rest = [designated_node(nodes)]
    head = upstream_head(call)
    if having and await relay_first(call, having, head, raw, head_timeout_s=SHOW_TIMEOUT_S):
        return
    results = await fan_out(rest, head, raw, timeout_s=SHOW_TIMEOUT_S)
    for state, _, outcome in results:
        if isinstance(outcome, Answer) and outcome.status != 404:
            await send_json(call, outcome.status, outcome.body, (("X-Osync-Node", state.node_id),))
            return
    if results and all(isinstance(outcome, OsyncError) for _, _, outcome in results):
        _raise_failure(results)
    if why := why_unusable(ctx, names.canonical(name)):
        raise no_replica(shown, why)
    raise ModelNotFound(f"model '{shown}' not found")


async def v1_models(ctx: Context, call: Call) -> None:
    """GET /v1/models: every model once, in OpenAI's form."""

    def head(state: NodeState) -> RequestHead:
        # An engine answers Ollama's native API only.
        return read_head(call, "GET", "/v1/models" if state.backend.kind == "ollama" else "/api/tags")

    results = await fan_out(readable(ctx, call), head)
    ours = [r for r in results if r[0].backend.kind == "ollama"]
    others = [r for r in results if r[0].backend.kind != "ollama"]
    rows = _rows(ours, "data", must=not others) + [
        [
            merge.v1_model(str(row.get("name", "")), str(row.get("modified_at", "")), _namespace(row.get("name")))
            for row in answer
        ]
        for answer in _rows(others, "models", must=not ours)
    ]
    await send_json(call, 200, {"object": "list", "data": merge.merge_v1_models(rows, names.key)})


async def v1_model(ctx: Context, call: Call) -> None:
    """GET /v1/models/{model}: in OpenAI's form, of a node that has it."""
    name = unquote(call.path.removeprefix("/v1/models/"))
    shown = names.display(name)
    nodes = readable(ctx, call)
    having = replicas(nodes, name)
    asked = ollamas(having) or ([] if having else ollamas(nodes))
    if asked and await relay_first(call, asked, upstream_head(call), b"", head_timeout_s=SHOW_TIMEOUT_S):
        return
    for state, _ in having:
        model = next((m for m in state.backend.models if names.same(m.name, name)), None)
        if model is not None and state.backend.kind == "engine":
            await send_json(call, 200, _v1_row(name, model), (("X-Osync-Node", state.node_id),))
            return
    raise ModelNotFound(f"model '{shown}' not found")


def _v1_row(name: str, model: ModelInfo) -> dict[str, Any]:
    return merge.v1_model(name, model.modified_at, _namespace(name))


def _namespace(name: object) -> str:
    try:
        return names.parse(str(name)).namespace
    except BadRequest:
        return names.DEFAULT_NAMESPACE


def _rows(results: Iterable[Result], field: str, *, must: bool = True) -> list[list[merge.Row]]:
    """Return the rows of every node that answered. `must`: raises the failure where none did."""
    results = list(results)
    answers: list[list[merge.Row]] = []
    answered = False
    for state, _, outcome in results:
        rows = _decoded(outcome, lambda value: value.get(field) or [])
        if rows is None:
            log.warning("node_left_out", node=state.node_id, field=field, error=reason(outcome))
            continue
        answered = True
        answers.append([row for row in rows if isinstance(row, dict)])
    if must and results and not answered:
        _raise_failure(results)
    return answers


def _decoded(outcome: Answer | OsyncError, take: Callable[[dict[str, Any]], Any]) -> list[Any] | None:
    if not isinstance(outcome, Answer) or outcome.status != 200:
        return None
    try:
        value = outcome.json()
    except UpstreamError:
        return None
    rows = take(value) if isinstance(value, dict) else None
    return rows if isinstance(rows, list) else None


def _raise_failure(results: Iterable[Result]) -> None:
    """Raise what kept every node from answering."""
    last: OsyncError | None = None
    texts = []
    for state, _, outcome in results:
        texts.append(f"{state.node_id}: {reason(outcome)}")
        last = outcome if isinstance(outcome, OsyncError) else last
    kind = type(last) if isinstance(last, UpstreamError) else UpstreamError
    raise kind("no node answered: " + "; ".join(texts))
