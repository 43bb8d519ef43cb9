"""/api/create: on every node that has what the new model is made of, at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from osync.errors import UpstreamError
from osync.gateway.blobs import is_digest
from osync.gateway.context import Call, Context
from osync.gateway.fetch import Answer, fan_out, locate, reason, relay_rest
from osync.gateway.fields import read_fields
from osync.gateway.progress import is_success, read_lines
from osync.gateway.relay import collect, downstream_head, send_json, upstream_head
from osync.gateway.targets import Node, designated_node, label, ollamas, read_head, usable
from osync.types import RequestHead, ResponseHead
from osync.wire import names, ndjson
from osync.wire.fields import Fields

_ERROR_BODY_LIMIT = 1 << 20


@dataclass(slots=True)
class _Outcome:
    """How a create ended on one node: `error` is "" where it succeeded."""

    node: Node
    error: str = ""
    head: ResponseHead | None = None
    body: bytes = b""


async def create(ctx: Context, call: Call) -> None:
    """POST /api/create: one progress stream, the first node's; success only after all succeeded."""
    raw, fields = await read_fields(ctx, call, "CreateRequest")
    fields.model()
    streamed = fields.boolean("stream", True)
    targets = await _targets(call, usable(ctx, call), fields)
    head = upstream_head(call)
    if len(targets) == 1:
        state, peer = targets[0]
        exchange = peer.link.open(head, raw)
        try:
            await relay_rest(call, state, exchange, await exchange.head())
        finally:
            exchange.close()
    elif streamed:
        await _streamed(call, targets, head, raw)
    else:
        await _whole(call, targets, head, raw)


async def _targets(call: Call, nodes: list[Node], fields: Fields) -> list[Node]:
    """Return the Ollamas with all blobs and the FROM model; one that can say what is wrong where none has."""
    able = ollamas(nodes)
    if not able:
        return [designated_node(nodes)]
    digests = _digests(fields)
    with_blobs = await _with_blobs(call, able, digests)
    base = fields.text("from")
    if not base or names.is_cloud(base) or fields.raw("remote_host"):
        return with_blobs if digests and with_blobs else [designated_node(with_blobs or able)]
    having = ollamas(await locate(able, base))
    both = [node for node in having if node in with_blobs]
    # Without a node that has both, one is asked: it fetches FROM from the registry, or says what it lacks.
    return both or [designated_node(with_blobs or having or able)]


def _digests(fields: Fields) -> list[str]:
    found: dict[str, None] = {}
    for key in ("files", "adapters", "draft_files"):
        files = fields.raw(key)
        if isinstance(files, dict):
            found.update((digest, None) for digest in files.values() if isinstance(digest, str))
    return list(found)


async def _with_blobs(call: Call, nodes: list[Node], digests: list[str]) -> list[Node]:
    if not all(is_digest(digest) for digest in digests):
        return []
    left = nodes
    for digest in digests:
        results = await fan_out(left, read_head(call, "HEAD", f"/api/blobs/{digest}"))
        left = [(s, p) for s, p, outcome in results if isinstance(outcome, Answer) and outcome.status == 200]
    return left


async def _whole(call: Call, targets: list[Node], head: RequestHead, body: bytes) -> None:
    results = await fan_out(targets, head, body, timeout_s=None)
    outcomes = []
    for state, peer, outcome in results:
        good = isinstance(outcome, Answer) and outcome.status == 200
        ended = _Outcome((state, peer), "" if good else reason(outcome))
        if isinstance(outcome, Answer):
            ended.head, ended.body = ResponseHead(outcome.status, outcome.headers), outcome.body
        outcomes.append(ended)
    if all(not outcome.error for outcome in outcomes):
        await send_json(call, 200, outcomes[0].body)
    else:
        await _refuse(call, outcomes)


async def _streamed(call: Call, targets: list[Node], head: RequestHead, body: bytes) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_drive(node, head, body), name=f"gateway.create[{node[0].node_id}]")
                for node in targets[1:]
            ]
            lead = await _drive(targets[0], head, body, call)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    outcomes = [lead, *(task.result() for task in tasks)]
    if all(not outcome.error for outcome in outcomes):
        await call.responder.write(lead.body + b"\n")
    elif call.responder.started:
        await call.responder.write(ndjson.format_line({"error": _text(outcomes)}))
    else:
        await _refuse(call, outcomes)


async def _drive(node: Node, head: RequestHead, body: bytes, call: Call | None = None) -> _Outcome:
    """Run the create on one node to its end, and show `call` its progress; its success is held back."""
    _, peer = node
    outcome = _Outcome(node, "it ended without success")
    try:
        exchange = peer.link.open(head, body)
        try:
            response = await exchange.head()
            if response.status != 200:
                outcome.head, outcome.body = response, await collect(exchange, _ERROR_BODY_LIMIT)
                outcome.error = reason(Answer(response.status, response.headers, outcome.body))
                return outcome
            if call is not None:
                await call.responder.start(ResponseHead(200, (("Content-Type", ndjson.CONTENT_TYPE),)))
            async for line in read_lines(exchange):
                if is_success(line):
                    outcome.error, outcome.body = "", line
                elif error := ndjson.error_of(line):
                    outcome.error = error
                elif call is not None:
                    await call.responder.write(line + b"\n")
        finally:
            exchange.close()
    except UpstreamError as error:
        outcome.error = str(error) or type(error).__name__
    return outcome


async def _refuse(call: Call, outcomes: list[_Outcome]) -> None:
    """Answer a create that failed before any progress was shown."""
    lead = outcomes[0]
    if all(outcome.error for outcome in outcomes) and lead.head is not None:
        await call.responder.start(downstream_head(lead.head, lead.node[0].node_id))
        await call.responder.write(lead.body)
        return
    raise UpstreamError(_text(outcomes))


def _text(outcomes: list[_Outcome]) -> str:
    failed = [outcome for outcome in outcomes if outcome.error]
    made = ", ".join(label(outcome.node[0]) for outcome in outcomes if not outcome.error) or "no node"
    return f"created on {made}; failed on " + "; ".join(f"{label(o.node[0])}: {o.error}" for o in failed)
