"""Inference routes: pick a replica, relay its answer, try another while nothing was sent."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import lru_cache
from time import monotonic

import structlog

from osync.cluster.view import Peer
from osync.core.balancer import Choice, Miss, ask_around, pick
from osync.core.window import Window
from osync.errors import (
    BadRequest,
    ModelError,
    ModelNotFound,
    NoNodes,
    NotSupported,
    OsyncError,
    StreamBroken,
    UpstreamUnavailable,
)
from osync.gateway import passthrough, pipelines, relay
from osync.gateway.broken import SaidSo
from osync.gateway.context import Call, Context
from osync.gateway.health import down_with, no_replica, why_no_node, why_not_ready, why_unusable
from osync.gateway.unload import unload
from osync.net.exchange import Exchange
from osync.types import NodeId, NodeState, RequestHead, ResponseHead
from osync.wire import names
from osync.wire.request import Inference, parse, with_options
from osync.wire.translate import Translated, translate

log = structlog.get_logger("osync.gateway")

ATTEMPTS = 3
OFFLOAD_BYTES = 1 << 20
"""Bodies over this are parsed in a thread: a megabyte of JSON takes milliseconds."""
_NAME_BYTES = 512
"""Names over this are no names; the cache of names must not keep them."""
_MAX_ERROR = 256 << 10
_RNG = random.Random()  # noqa: S311 (spreads load, guards nothing)
_ELSEWHERE = frozenset((404, 500, 501, 503))
"""A node's errors that another one may not have: not here, could not load, cannot do it, busy."""
_NOT_HERE = (NotSupported, ModelError)
"""The same, from a node that raises instead of answering."""
_EMBED = frozenset(("/api/embed", "/api/embeddings", "/v1/embeddings"))
_ENCODING = frozenset(("content-encoding",))
_BODY_HEADERS = frozenset(("content-encoding", "content-type", "accept"))


class Refused(UpstreamUnavailable):
    """A node answered with an error that another node may not have."""

    def __init__(self, state: NodeState, head: ResponseHead, body: bytes) -> None:
        super().__init__(f"node {state.hostname or state.node_id} answered {head.status}")
        self.state = state
        self.head = head
        self.body = body


async def infer(ctx: Context, call: Call) -> None:
    """Answer one request that names a model."""
    body = await call.body.read_all(ctx.settings.max_body)
    if len(body) > OFFLOAD_BYTES:
        request = await asyncio.to_thread(parse, call.path, body, call.header)
    else:
        request = parse(call.path, body, call.header)
    is_cloud, model = _known(request.model) if len(request.model) <= _NAME_BYTES else _named(request.model)
    if is_cloud:
        call.body = relay.Whole(body)
        await passthrough.designated(ctx, call)
        return
    pin = call.header("x-osync-node")
    if request.is_unload and not pin and await unload(ctx, call, request, model):
        return
    await _serve(ctx, call, request, model, pin)


def _named(model: str) -> tuple[bool, str]:
    """Return whether a name asks for the cloud, and else its form to compare by. Raises BadRequest."""
    if names.is_cloud(model):
        return True, ""
    return False, names.canonical(model) if model else ""


_known = lru_cache(maxsize=1024)(_named)


async def _serve(ctx: Context, call: Call, request: Inference, model: str, pin: str) -> None:
    tried: list[NodeId] = []
    trouble: OsyncError | None = None
    if (ctx.pipelines is not None or request.distributed) and await pipelines.choose(
        ctx, request, model, pin, embeds=call.path in _EMBED
    ):
        trouble = await _split(ctx, call, request, model, pin)
        if trouble is None:
            return
    for _ in range(ATTEMPTS):
        choice = _pick(ctx, model, pin, tried)
        if isinstance(choice, Miss):
            break
        found = ctx.replicas.find(choice.node_id)
        if found is None:
            break
        if tried:
            ctx.metrics.retries.inc()
            log.info("request_retried", request_id=call.request_id, node=choice.node_id, error=str(trouble))
        tried.append(choice.node_id)
        ctx.in_flight[choice.node_id] += 1
        try:
            await _Attempt(ctx, call, request, *found).run(
                lambda: len(tried) < ATTEMPTS and isinstance(_pick(ctx, model, pin, tried), Choice),
                knows_more=trouble is not None,
            )
        except OsyncError as error:
            if trouble is None or not (isinstance(error, NotSupported) or _lacks_feature(error)):
                trouble = error
            if call.responder.started or not (error.retryable or isinstance(error, _NOT_HERE)):
                raise
        else:
            return
        finally:
            ctx.in_flight[choice.node_id] -= 1
    if isinstance(trouble, Refused):  # the replica that was there a moment ago is gone
        head = relay.downstream_head(trouble.head, trouble.state.node_id)
        await call.responder.start(head)
        await call.responder.write(trouble.body)
    else:
        raise trouble or _refusal(ctx, call, request, model, _pick(ctx, model, pin, ()), pin)


async def _split(ctx: Context, call: Call, request: Inference, model: str, pin: str) -> OsyncError | None:
    """Answer over the pipelines; returns what went wrong where a node can answer instead."""
    assert ctx.pipelines is not None
    peer, node_id = ctx.pipelines.peer, ctx.pipelines.node_id
    state = peer.state
    assert state is not None, "a link in memory is up"

    def has_spare() -> bool:
        return not (pin or request.distributed) and bool(pipelines.holders(ctx, model))

    ctx.in_flight[node_id] += 1
    try:
        await _Attempt(ctx, call, request, state, peer).run(has_spare, knows_more=False)
    except OsyncError as error:
        if call.responder.started or not has_spare() or not (error.retryable or isinstance(error, _NOT_HERE)):
            raise
        ctx.metrics.retries.inc()
        log.info("request_not_split", request_id=call.request_id, error=str(error))
        return error
    finally:
        ctx.in_flight[node_id] -= 1
    return None


def _pick(ctx: Context, model: str, pin: str, tried: list[NodeId] | tuple[()]) -> Choice | Miss:
    candidates = ctx.replicas.of(ctx.view, ctx.drained)
    choice = pick(candidates, model, ctx.in_flight, excluded=tried, pin=pin, rng=_RNG)
    if model and isinstance(choice, Miss) and choice.why == "no_model":
        # A 404 would have `ollama run` pull what is there, on a host that is down.
        return Miss("unusable") if down_with(ctx, model) else ask_around(candidates, tried)
    return choice


def _refusal(ctx: Context, call: Call, request: Inference, model: str, missed: Choice | Miss, pin: str) -> OsyncError:
    why = missed.why if isinstance(missed, Miss) else "no_nodes"
    if why == "no_such_node":
        return NoNodes(f"node {pin!r}, which X-Osync-Node asks for, is not up")
    if why == "no_model" or (why == "no_nodes" and not why_not_ready(ctx)):
        if call.path in _EMBED:
            return ModelNotFound(f'model "{request.model}" not found, try pulling it first')
        return ModelNotFound(f"model '{request.model}' not found")
    if why == "unusable":
        return no_replica(request.model, why_unusable(ctx, model))
    return NoNodes(why_no_node(ctx) or "the node went down")


class _Attempt:
    """One request on one node."""

    __slots__ = ("_call", "_ctx", "_peer", "_request", "_state")

    def __init__(self, ctx: Context, call: Call, request: Inference, state: NodeState, peer: Peer) -> None:
        self._ctx = ctx
        self._call = call
        self._request = request
        self._state = state
        self._peer = peer

    async def run(self, has_spare: Callable[[], bool], knows_more: bool) -> None:
        """Relay the node's answer. Raises a retryable error only while nothing was sent.

        `knows_more`: another node answered already, and that this one lacks a feature would tell less.
        """
        began = monotonic()
        translated = self._translated() if self._state.backend.kind == "engine" else None
        is_error = True
        try:
            exchange = self._peer.link.open(*self._request_for(translated))
            try:
                head = await exchange.head()
                if (
                    head.status in _ELSEWHERE
                    and _is_json(head)
                    and (has_spare() or (knows_more and head.status == 501))
                ):
                    body = await relay.collect(exchange, _MAX_ERROR)
                    if translated is not None:
                        head, answer = translated.answer.head(head), translated.answer
                        body = answer.feed(body) + answer.finish()
                    raise Refused(self._state, head, body)
                is_error = head.status >= 500
                if translated is None:
                    await self._relay(exchange, head)
                else:
                    await self._translate(exchange, head, translated)
            finally:
                exchange.close()
        except (asyncio.CancelledError, ConnectionError):
            raise  # the client left: nobody's failure
        except OsyncError as error:
            self._account(began, not isinstance(error, Refused) or error.head.status >= 500)
            raise self._named(error) from error
        self._account(began, is_error)

    def _translated(self) -> Translated | None:
        """Return the native form of the request, which is all that an engine speaks."""
        path = self._call.path
        if not path.startswith("/v1/"):
            return None
        translated = translate(path, self._request.plain, self._call.request_id)
        if translated is None:
            raise NotSupported(f"{path} cannot be served by an engine node; it needs one that runs Ollama")
        return translated

    def _request_for(self, translated: Translated | None) -> tuple[RequestHead, bytes]:
        if translated is not None:
            head = relay.upstream_head(self._call, translated.target, _BODY_HEADERS)
            json = (("Content-Type", "application/json"),)
            return RequestHead("POST", head.target, head.headers + json), self._for_pipelines(translated.body)
        drop = _ENCODING if self._request.is_rewritten else frozenset[str]()
        return relay.upstream_head(self._call, drop=drop), self._for_pipelines(self._request.body)

    def _for_pipelines(self, body: bytes) -> bytes:
        """Give them the options that only they understand; nodes get what everybody gets."""
        found, options = self._ctx.pipelines, self._request.pipeline_options
        return with_options(body, options) if options and found and self._peer is found.peer else body

    async def _relay(self, exchange: Exchange, head: ResponseHead) -> None:
        """Pass on the answer byte for byte; its head waits for the first bytes, when a retry ends."""
        try:
            data = await exchange.read()
        except StreamBroken as error:
            raise UpstreamUnavailable(str(error)) from error
        responder = self._call.responder
        await responder.start(relay.downstream_head(head, self._state.node_id))
        while data:
            await responder.write(data)
            data = await exchange.read()

    async def _translate(self, exchange: Exchange, head: ResponseHead, translated: Translated) -> None:
        answer, responder = translated.answer, self._call.responder
        outer = relay.downstream_head(answer.head(head), self._state.node_id)
        try:
            data = await exchange.read()
            while data:
                if out := answer.feed(data):
                    if not responder.started:
                        await responder.start(outer)
                    await responder.write(out)
                data = await exchange.read()
        except StreamBroken as error:
            if responder.started:
                text = self._with_name(str(error))
                raise SaidSo(text, answer.fail(text)) from error
            raise UpstreamUnavailable(str(error)) from error
        out = answer.finish()
        if not responder.started:
            await responder.start(outer)
        if out:
            await responder.write(out)

    def _named(self, error: OsyncError) -> OsyncError:
        """Say which node it was, in errors that do not say it yet."""
        if isinstance(error, (BadRequest, NotSupported, ModelError, Refused, SaidSo)):
            return error
        error.args = (self._with_name(str(error)),)
        return error

    def _with_name(self, text: str) -> str:
        name = self._state.hostname or self._state.node_id
        return text if name in text else f"node {name} ({self._peer.link.address}): {text}"

    def _account(self, began: float, is_error: bool) -> None:
        window = self._ctx.node_traffic.get(self._state.node_id)
        if window is None:
            window = self._ctx.node_traffic[self._state.node_id] = Window()
        now = monotonic()
        window.add(now, now - began, is_error)


def _lacks_feature(error: OsyncError) -> bool:
    return isinstance(error, Refused) and error.head.status == 501


def _is_json(head: ResponseHead) -> bool:
    return any(k.lower() == "content-type" and v.startswith("application/json") for k, v in head.headers)
