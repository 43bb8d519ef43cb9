"""The gateway: one `Serve` for everything that a proxy answers, whatever brought the request."""

from __future__ import annotations

import asyncio
import secrets
import socket
from itertools import count
from time import monotonic
from urllib.parse import unquote

import structlog

from osync.cluster.view import ClusterView
from osync.config import Settings
from osync.errors import OsyncError, StreamBroken
from osync.gateway import broken, health, passthrough, relay, routes, shards
from osync.gateway.answer import Answer
from osync.gateway.context import Call, Context
from osync.gateway.cors import Policy
from osync.net.exchange import Body, Responder
from osync.types import Headers, NodeId, RequestHead

log = structlog.get_logger("osync.gateway")

_PROBES = frozenset(("/healthz", "/readyz", "/metrics"))
"""Routes that only look at this daemon: no traffic of its users."""


class Gateway:
    """Answers Ollama's, OpenAI's and Anthropic's HTTP APIs from the nodes of a cluster view."""

    def __init__(self, settings: Settings, view: ClusterView, node_id: NodeId) -> None:
        self.context = Context(settings, view, node_id)
        self._policy = Policy(settings.origins, settings.is_loopback, socket.gethostname())
        self._prefix = secrets.token_hex(3)
        self._numbers = count(1)
        self.context.metrics.watch(self._in_flight, self._nodes, self._active, self._queued)
        self.context.metrics.watch_shards(lambda: shards.readings(self.context))

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request. Raises only where the answer must break off, or the client is gone."""
        began = monotonic()
        request_id = f"{self._prefix}{next(self._numbers):x}"
        fields = {name.lower(): value for name, value in reversed(head.headers)}
        verdict = self._policy.decide(head.method, fields.get("origin", ""), fields.get("host", ""))
        stamp: Headers = (("X-Osync-Request-Id", request_id), *verdict.headers)
        answer = Answer(responder, stamp)
        path, _, query = head.target.partition("?")
        call = Call(head, unquote(path) if "%" in path else path, query, body, answer, request_id, fields)
        route = routes.find(head.method, call.path)
        try:
            if verdict.status:
                await relay.send_empty(call, verdict.status)
            elif route is None:
                await self._unknown(call)
            else:
                await route[0](self.context, call)
        except (asyncio.CancelledError, ConnectionError):
            self.context.metrics.client_gone.inc()
            raise
        except OsyncError as error:
            await self._fail(call, answer, error)
        except Exception:
            log.exception("request_crashed", path=call.path, request_id=request_id)
            text = f"internal error of the proxy; its log tells more under request id {request_id}"
            await self._fail(call, answer, OsyncError(text))
        finally:
            self._account(answer, route[1] if route else "other", began)

    async def _unknown(self, call: Call) -> None:
        """Let a node answer what only it may know; without one, answer as Ollama would."""
        methods = routes.methods_of(call.path)
        if health.usable(self.context) and not (methods and routes.is_own(call.path)):
            await passthrough.designated(self.context, call)
        elif methods:
            allow = (("Allow", ", ".join(methods)),)
            await relay.send_bytes(call, 405, relay.TEXT, b"405 method not allowed", allow)
        else:
            await relay.send_text(call, 404, "404 page not found")

    async def _fail(self, call: Call, answer: Answer, error: OsyncError) -> None:
        """Tell the client, in the form that its surface and the state of the answer allow."""
        self.context.metrics.failed(type(error).__name__)
        log.info("request_failed", path=call.path, request_id=call.request_id, status=error.status,
                 kind=type(error).__name__, error=str(error), started=answer.started)  # fmt: skip
        if not answer.started:
            await relay.send_error(call, error)
            return
        last = broken.last_words(answer, call, error)
        if last is None:
            raise StreamBroken(str(error)) from error
        await answer.write(last)

    def _account(self, answer: Answer, route: str, began: float) -> None:
        if not answer.started:
            return
        now = monotonic()
        context, status = self.context, answer.status
        context.metrics.answered(route, status, answer.first_at - began, now - began, answer.sent)
        if route not in _PROBES:
            context.traffic.add(now, now - began, status >= 500 or answer.broke)

    def _in_flight(self) -> dict[str, int]:
        known = {state.node_id for state, _ in self.context.view.up()}
        return {node: self.context.in_flight[node] for node in known}

    def _active(self) -> dict[str, int]:
        return {state.node_id: state.backend.active for state, _ in self.context.view.up()}

    def _queued(self) -> dict[str, int]:
        return {state.node_id: state.backend.queued for state, _ in self.context.view.up()}

    def _nodes(self) -> dict[str, int]:
        states = {"up": 0, "draining": 0, "unusable": 0, "down": 0}
        for peer in self.context.view.nodes:
            state = peer.state
            if state is None:
                states["down"] += 1
            elif state.draining or state.node_id in self.context.drained:
                states["draining"] += 1
            else:
                states["up" if state.backend.ok else "unusable"] += 1
        return states
