"""Requests that the gateway itself makes of nodes: of one, of all at once, or of one after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from osync.cluster.view import Peer
from osync.errors import OsyncError, StreamBroken, UpstreamError, UpstreamTimeout
from osync.gateway.context import Call
from osync.gateway.relay import collect, downstream_head
from osync.gateway.targets import Node, label, ollamas, replicas
from osync.net.exchange import Exchange
from osync.types import Headers, NodeState, RequestHead, ResponseHead
from osync.wire import ndjson

READ_TIMEOUT_S = 5.0
"""For control reads: nodes answer them from memory, a slow one must not hold the others."""

LIMIT = 16 << 20
"""Largest answer that is read whole: some thousand models' rows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A node's answer, read to its end."""

    status: int
    headers: Headers
    body: bytes

    def json(self) -> Any:
        """Return the decoded body. Raises UpstreamError where it is no JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise UpstreamError("a node answered with what is no JSON") from error

    @property
    def error(self) -> str:
        """The error that it tells, or its status."""
        return ndjson.error_of(self.body) or f"status {self.status}"


Result = tuple[NodeState, Peer, Answer | OsyncError]


def reason(outcome: Answer | OsyncError) -> str:
    """Return why a node did not do what it should."""
    return outcome.error if isinstance(outcome, Answer) else str(outcome) or type(outcome).__name__


async def fetch(
    peer: Peer,
    head: RequestHead,
    body: bytes | None,
    *,
    timeout_s: float | None = READ_TIMEOUT_S,
    limit: int = LIMIT,
) -> Answer:
    """Ask one node and read its answer whole. Raises UpstreamError, FrameTooLarge."""
    try:
        async with asyncio.timeout(timeout_s):
            exchange = peer.link.open(head, body or b"")
            try:
                response = await exchange.head()
                return Answer(response.status, response.headers, await collect(exchange, limit))
            finally:
                exchange.close()
    except TimeoutError as error:
        raise UpstreamTimeout(f"no answer from {peer.link.address} within {timeout_s:g} s") from error


async def fan_out(
    nodes: Iterable[Node],
    head: RequestHead | Callable[[NodeState], RequestHead],
    body: bytes | None = None,
    *,
    timeout_s: float | None = READ_TIMEOUT_S,
    limit: int = LIMIT,
) -> list[Result]:
    """Ask all nodes at once, each with its own deadline; results in the nodes' order. Never raises for one."""

    async def ask(state: NodeState, peer: Peer) -> Result:
        try:
            wanted = head(state) if callable(head) else head
            return state, peer, await fetch(peer, wanted, body, timeout_s=timeout_s, limit=limit)
        except OsyncError as error:
            return state, peer, error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(*node), name=f"gateway.fan_out[{node[0].node_id}]") for node in nodes]
    return [task.result() for task in tasks]


async def relay_first(
    call: Call, nodes: Iterable[Node], head: RequestHead, body: bytes, *, head_timeout_s: float
) -> bool:
    """Relay the answer of the first node that neither breaks before it nor says 404; False if all said 404.

    Raises the last UpstreamError where a node broke and none answered.
    """
    failure: OsyncError | None = None
    for state, peer in nodes:
        exchange = None
        try:
            async with asyncio.timeout(head_timeout_s):
                exchange = peer.link.open(head, body)
                response = await exchange.head()
            if response.status != 404:
                await relay_rest(call, state, exchange, response)
                return True
        except TimeoutError:
            if call.responder.started:
                raise
            failure = UpstreamTimeout(f"node {label(state)} did not answer within {head_timeout_s:g} s")
        except UpstreamError as error:
            if call.responder.started or not error.retryable:
                raise
            failure = error
        finally:
            if exchange is not None:
                exchange.close()
    if failure is not None:
        raise failure
    return False


async def relay_rest(call: Call, state: NodeState, exchange: Exchange, response: ResponseHead) -> None:
    """Relay an answer whose head is here, untouched and as it comes. Raises StreamBroken, naming the node."""
    await call.responder.start(downstream_head(response, state.node_id))
    try:
        while data := await exchange.read():
            await call.responder.write(data)
    except StreamBroken as error:
        raise StreamBroken(f"node {label(state)}: {error}") from error


async def locate(nodes: Sequence[Node], name: str) -> list[Node]:
    """Return the nodes that have the model; asks them where none says so: it may be a moment old."""
    found = replicas(nodes, name)
    if found or not name:
        return found
    body = orjson.dumps({"model": name})
    head = RequestHead("POST", "/api/show", (("Content-Type", "application/json"),))
    results = await fan_out(ollamas(nodes), head, body)
    return [(s, p) for s, p, outcome in results if isinstance(outcome, Answer) and outcome.status == 200]
