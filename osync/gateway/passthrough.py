"""Routes that only one node may answer, or that this version does not know."""

from __future__ import annotations

import asyncio

from osync.errors import UpstreamError
from osync.gateway.context import Call, Context
from osync.gateway.fetch import relay_rest
from osync.gateway.relay import upstream_head
from osync.gateway.targets import Node, designated_node, usable
from osync.net.exchange import Body, Exchange

_READS = frozenset(("GET", "HEAD"))


async def designated(ctx: Context, call: Call) -> None:
    """Pass the request to the designated node as it comes, and its answer back untouched.

    A read whose node breaks before it answers goes to the next one.
    """
    nodes = list(usable(ctx, call))
    first = await call.body.read()
    while True:
        node = designated_node(nodes)
        try:
            await _pass(call, node, first)
        except UpstreamError as error:
            nodes.remove(node)
            again = error.retryable and nodes and not first and call.head.method in _READS
            if call.responder.started or not again:
                raise
        else:
            return


async def _pass(call: Call, node: Node, first: bytes) -> None:
    state, peer = node
    # Whether a body follows is known only by reading: a request without one must not go out as chunked.
    exchange = peer.link.open(upstream_head(call), None if first else b"")
    try:
        async with asyncio.TaskGroup() as group:
            pump = (
                group.create_task(_pump(call.body, first, exchange), name="gateway.passthrough.body") if first else None
            )
            response = await exchange.head()
            await relay_rest(call, state, exchange, response)
            # An answer that is complete before its request is: the rest of the request is of no use.
            if pump is not None:
                pump.cancel()
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        exchange.close()


async def _pump(body: Body, first: bytes, exchange: Exchange) -> None:
    piece = first
    try:
        while piece:
            await exchange.send(piece)
            piece = await body.read()
        await exchange.finish()
    except UpstreamError:
        # The node takes no more: its head, or its failure to give one, says why.
        return
