"""Small answers of the proxy itself: the greeting, liveness, readiness, metrics."""

from __future__ import annotations

from osync.cluster.view import Peer
from osync.errors import NoNodes
from osync.gateway import relay
from osync.gateway.context import Call, Context
from osync.telemetry.metrics import CONTENT_TYPE
from osync.wire import names

ADD_A_NODE = "no node is known: start this daemon with --servers host:port, or run `osyncd --role node` on a host"


async def root(ctx: Context, call: Call) -> None:
    """Answer as Ollama does, for clients that look whether one is there."""
    await relay.send_text(call, 200, "Ollama is running")


async def healthz(ctx: Context, call: Call) -> None:
    """Say that the loop turns."""
    await relay.send_text(call, 200, "ok\n")


async def readyz(ctx: Context, call: Call) -> None:
    """Say whether a request could be served now, and if not, why."""
    reason = why_not_ready(ctx)
    await relay.send_text(call, 503 if reason else 200, f"{reason}\n" if reason else "ready\n")


async def metrics(ctx: Context, call: Call) -> None:
    """Answer Prometheus."""
    await relay.send_bytes(call, 200, CONTENT_TYPE, ctx.metrics.text())


def usable(ctx: Context) -> bool:
    """Return True if at least one node may get requests."""
    return any(state.node_id not in ctx.drained for state, _ in ctx.view.usable())


def _serves_shards(ctx: Context) -> bool:
    """True if pipelines can be made, whether there is a node or not."""
    return ctx.pipelines is not None and ctx.pipelines.has_shards


def why_not_ready(ctx: Context) -> str:
    """Return "" if a node, or a pipeline of shards, may get requests, else the reason in words for a person."""
    return "" if _serves_shards(ctx) else why_no_node(ctx)


def why_no_node(ctx: Context) -> str:
    """Return "" if a node may get requests, else the reason in words for a person."""
    if usable(ctx):
        return ""
    reasons = [_reason(ctx, peer) for peer in ctx.view.nodes]
    return "no usable node: " + "; ".join(filter(None, reasons)) if any(reasons) else ADD_A_NODE


def why_unusable(ctx: Context, model: str) -> str:
    """Return why no node that has the model, by canonical name, gets requests, in words for a person."""
    having = {candidate.node_id for candidate in ctx.replicas.of(ctx.view, ctx.drained) if model in candidate.present}
    up = [peer for state, peer in ctx.view.up() if state.node_id in having]
    return "; ".join(filter(None, (_reason(ctx, peer) for peer in up + down_with(ctx, model))))


def no_replica(model: str, why: str) -> NoNodes:
    """Return the error of a model, by the name to show, that nodes have and none can serve now."""
    return NoNodes(f"no node that has model '{model}' takes requests now: {why}")


def down_with(ctx: Context, model: str) -> list[Peer]:
    """Return the peers that are down and had the model, by canonical name, when they were last heard of."""
    return [
        peer
        for peer in ctx.view.peers
        if peer.state is None
        and peer.last is not None
        and any(names.key(known.name) == model for known in peer.last.backend.models)
    ]


def _reason(ctx: Context, peer: Peer) -> str:
    """Return why one node gets no requests, "" if it does."""
    state = peer.state
    if state is None:
        return f"{peer.link.address} is down" + (f" ({peer.error})" if peer.error else "")
    name = state.hostname or state.node_id
    if state.draining or state.node_id in ctx.drained:
        return f"{name} is draining"
    if not state.backend.ok:
        why = f" ({state.backend.error})" if state.backend.error else ""
        return f"{name}: backend {state.backend.kind} does not answer{why}"
    return ""
