"""Unload requests (empty, keep_alive 0): they go to every node that has the model in memory."""

from __future__ import annotations

import asyncio

from osync.cluster.view import Peer
from osync.errors import OsyncError
from osync.gateway import pipelines, relay
from osync.gateway.context import Call, Context
from osync.types import NodeState, ResponseHead
from osync.wire.request import Inference

_MAX_ANSWER = 256 << 10

_Outcome = tuple[NodeState, ResponseHead, bytes] | OsyncError


async def unload(ctx: Context, call: Call, request: Inference, model: str) -> bool:
    """Unload everywhere and pass one answer on; False if no node says it has the model (any may answer then).

    Nodes that have it on disk are asked too: what they said of their memory may be a moment old, and where
    it is not loaded, unloading does nothing.
    """
    having = {c.node_id: model in c.loaded for c in ctx.replicas.of(ctx.view, ctx.drained) if model in c.present}
    nodes = [(state, peer) for state, peer in ctx.view.up() if state.node_id in having and state.backend.ok]
    if (split := pipelines.as_node(ctx)) and pipelines.has_loaded(split[0], model):
        having[split[0].node_id] = True
        nodes.append(split)
    if not nodes:
        return False
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_one(ctx, call, request, *node), name="gateway.unload") for node in nodes]
    outcomes = [task.result() for task in tasks]
    answers = [outcome for outcome in outcomes if not isinstance(outcome, OsyncError)]
    # A node that does not have it loaded and cannot be asked is nobody's failure, as long as one could.
    pairs = zip(nodes, outcomes, strict=True)
    failed = [o for (s, _), o in pairs if isinstance(o, OsyncError) and (having[s.node_id] or not answers)]
    refused = [a for a in answers if a[1].status >= 400 and (having[a[0].node_id] or a[1].status != 404)]
    if failed and not refused:
        raise failed[0]
    unloaded = [answer for answer in answers if answer[1].status < 400]
    state, head, body = (refused or unloaded or answers)[0]
    await call.responder.start(relay.downstream_head(head, state.node_id))
    if body:
        await call.responder.write(body)
    return True


async def _one(ctx: Context, call: Call, request: Inference, state: NodeState, peer: Peer) -> _Outcome:
    ctx.in_flight[state.node_id] += 1
    drop = frozenset(("content-encoding",)) if request.is_rewritten else frozenset[str]()
    try:
        exchange = peer.link.open(relay.upstream_head(call, drop=drop), request.body)
        try:
            return state, await exchange.head(), await relay.collect(exchange, _MAX_ANSWER)
        finally:
            exchange.close()
    except OsyncError as error:
        return error
    finally:
        ctx.in_flight[state.node_id] -= 1
