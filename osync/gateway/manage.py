"""Making and removing models: pull, push, create, copy, delete, on the nodes that it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import orjson

from osync.errors import BadRequest, ModelNotFound, OsyncError, UpstreamError
from osync.gateway.context import Call, Context
from osync.gateway.create import create
from osync.gateway.fetch import Answer, Result, fan_out, locate, reason, relay_rest
from osync.gateway.fields import read_fields
from osync.gateway.progress import Progress
from osync.gateway.relay import JSON, downstream_head, send_bytes, send_empty, send_json, upstream_head
from osync.gateway.targets import Node, designated_node, label, ollamas, replicas, usable
from osync.types import NodeState, ResponseHead
from osync.wire import names, ndjson

__all__ = ["copy", "create", "delete", "pull", "push"]

CHANGE_TIMEOUT_S = 60.0
"""Copies and deletions are work on a node's disk: a manifest, or files of many gigabytes to unlink."""

_PULL_ATTEMPTS = 3
"""Nodes that one pull may be tried on."""


async def pull(ctx: Context, call: Call) -> None:
    """POST /api/pull: on one node; clients that pull the same at the same time share its progress."""
    _, fields = await read_fields(ctx, call, "PullRequest")
    name = fields.model()
    key = names.canonical(name)
    streamed = fields.boolean("stream", True)
    insecure = fields.boolean("insecure", False)
    shared = (key, insecure, call.header("x-osync-node"))
    progress = ctx.pulls.get(shared)
    if progress is None:
        nodes = _pullers(usable(ctx, call), name)
        head = upstream_head(call)
        body = orjson.dumps({**fields.data, "stream": True})

        def ended(which: Progress) -> None:
            if ctx.pulls.get(shared) is which:
                del ctx.pulls[shared]

        progress = Progress([(state, partial(peer.link.open, head, body)) for state, peer in nodes], ended)
        ctx.pulls[shared] = progress
    await _follow(call, progress, streamed)


async def push(ctx: Context, call: Call) -> None:
    """POST /api/push: from one node that has the model."""
    raw, fields = await read_fields(ctx, call, "PushRequest")
    name = fields.model()
    if not name:
        raise BadRequest("model is required")
    nodes = usable(ctx, call)
    having = await locate(nodes, name)
    # Where none has it, Ollama says so in its own words.
    state, peer = (ollamas(having) or having or [designated_node(nodes)])[0]
    exchange = peer.link.open(upstream_head(call), raw)
    try:
        await relay_rest(call, state, exchange, await exchange.head())
    finally:
        exchange.close()


async def copy(ctx: Context, call: Call) -> None:
    """POST /api/copy: on every node that has the source."""
    raw, fields = await read_fields(ctx, call, "CopyRequest")
    source = fields.text("source")
    destination = fields.text("destination")
    for what, name in (("source", source), ("destination", destination)):
        try:
            names.parse(name)
        except BadRequest as error:
            raise BadRequest(f'{what} "{name}" is invalid') from error
    results = await _change(ctx, call, source, raw)
    await _conclude(call, results, f'model "{source}" not found', f'model "{source}" copied')


async def delete(ctx: Context, call: Call) -> None:
    """DELETE /api/delete: on every node that has the model."""
    raw, fields = await read_fields(ctx, call, "DeleteRequest")
    name = fields.model()
    try:
        names.parse(name)
    except BadRequest as error:
        raise BadRequest(f'name "{name}" is invalid') from error
    results = await _change(ctx, call, name, raw)
    await _conclude(call, results, f"model '{name}' not found", f"model '{name}' deleted")


def _pullers(nodes: Sequence[Node], name: str) -> list[Node]:
    """Return whom to ask, in turn: Ollamas that have the model already, then those with the most free memory."""
    able = ollamas(nodes) or list(nodes)
    having = replicas(able, name)
    rest = sorted((node for node in able if node not in having), key=_room, reverse=True)
    return [*having, *rest][:_PULL_ATTEMPTS]


def _room(node: Node) -> tuple[int, str]:
    load = node[0].load
    return load.memory_free + sum(gpu.memory_free for gpu in load.gpus), node[0].node_id


async def _follow(call: Call, progress: Progress, streamed: bool) -> None:
    with progress.reader() as reader:
        try:
            head = await progress.wait_head()
        except UpstreamError as error:
            raise _named(progress.state, error) from error
        state = progress.state
        if head.status != 200:
            await call.responder.start(downstream_head(head, state.node_id))
            await call.responder.write(progress.body)
            return
        if streamed:
            plain = tuple(pair for pair in head.headers if pair[0].lower() != "content-length")
            await call.responder.start(downstream_head(ResponseHead(200, plain), state.node_id))
        last = b"{}"
        async for line in reader.lines():
            last = line
            if streamed:
                await call.responder.write(line + b"\n")
        failure = progress.error
    if failure is not None:
        raise _named(state, failure)
    if streamed:
        return
    told = (("X-Osync-Node", state.node_id),)
    if text := ndjson.error_of(last):
        await send_json(call, 500, {"error": text}, told)
    else:
        await send_bytes(call, 200, JSON, last, told)


def _named(state: NodeState, error: OsyncError) -> OsyncError:
    """Return the same error, saying on which node."""
    return type(error)(f"node {label(state)}: {error}")


async def _change(ctx: Context, call: Call, name: str, raw: bytes) -> list[Result]:
    """Ask every Ollama, as each knows best what it has, and of the others those that list the model."""
    nodes = usable(ctx, call)
    listed = replicas(nodes, name)
    asked = [node for node in nodes if node[0].backend.kind == "ollama" or node in listed]
    results = await fan_out(asked, upstream_head(call), raw, timeout_s=CHANGE_TIMEOUT_S)
    known = {state.node_id for state, _ in listed}
    told = [r for r in results if r[0].node_id in known or isinstance(r[2], Answer)]
    # A node that does not list the model and cannot be asked is nobody's failure.
    return told or results


async def _conclude(call: Call, results: Iterable[Result], missing: str, done_text: str) -> None:
    """Answer 200 if every node that has the model did it, 404 if none has it, else who did and who did not."""
    results = list(results)
    done = [r for r in results if isinstance(r[2], Answer) and r[2].status == 200]
    failed = [r for r in results if not isinstance(r[2], Answer) or r[2].status not in {200, 404}]
    if not failed:
        if not done:
            raise ModelNotFound(missing)
        await send_empty(call, 200)
        return
    answer = failed[0][2]
    if len(failed) == 1 and not done:
        if isinstance(answer, OsyncError):
            raise answer
        await send_json(call, answer.status, answer.body, (("X-Osync-Node", failed[0][0].node_id),))
        return
    why = "; ".join(f"{label(state)}: {reason(outcome)}" for state, _, outcome in failed)
    on = ", ".join(label(state) for state, _, _ in done) or "no node"
    raise UpstreamError(f"{done_text} on {on}; failed on {why}")
