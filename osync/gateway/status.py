"""GET /api/status: Ollama's own `cloud` key, and what this proxy knows of its cluster."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from osync.cluster.view import Peer
from osync.core.window import Figures, Window
from osync.errors import OsyncError
from osync.gateway import relay, shards
from osync.gateway.context import Call, Context
from osync.gateway.fetch import fetch
from osync.gateway.pipelines import as_node
from osync.gateway.targets import Node
from osync.types import BackendState, HostLoad, ModelInfo, NodeId, NodeState, RequestHead
from osync.version import __version__
from osync.wire import names

REPORT_INTERVAL_S = 1.0
"""Nodes push their state at least this often (design section 2); silence of three is a failure."""
_CLOUD_TIMEOUT_S = 0.25
_CLOUD_NODES = 2
"""Ollamas that are asked, one after the other where one does not answer."""
_NO_CLOUD = {"disabled": True, "source": "none"}
_NEVER_SEEN = NodeState(NodeId(""), BackendState("ollama"), load=HostLoad(cpu_count=0))


async def status(ctx: Context, call: Call) -> None:
    """Answer with the state of everything."""
    cloud = await _cloud(ctx)
    await relay.send_json(call, 200, {"cloud": cloud, "osync": report(ctx, time.time())})


def report(ctx: Context, now: float) -> dict[str, Any]:
    """Return the `osync` object. `now` in Unix time."""
    nodes = [_node(ctx, peer, now) for peer in ctx.view.nodes]
    return {
        "version": __version__,
        "node_id": ctx.node_id,
        "proxies": [{"node_id": ctx.node_id, "host": ctx.settings.host, "port": ctx.settings.port, "online": True}],
        "nodes": nodes,
        "shards": shards.shards(ctx),
        "models": _models(ctx),
        "pipelines": shards.pipelines(ctx),
        "distributed": {
            "enabled": ctx.settings.distributed,
            "ready": bool(ctx.pipelines and ctx.pipelines.has_shards),
            "reason": "" if ctx.pipelines else ctx.no_pipelines,
        },
        "sessions": {"active": sum(ctx.in_flight[state.node_id] for state, _ in _serving(ctx))},
        "requests": {
            "total": ctx.traffic.requests,
            "errors": ctx.traffic.errors,
            "in_flight": sum(count for count in ctx.in_flight.values() if count > 0),
            **_figures(ctx.traffic.figures(monotonic())),
        },
    }


def _node(ctx: Context, peer: Peer, now: float) -> dict[str, Any]:
    online = peer.state is not None
    # A node that is down is shown as it last was, but for what ended with it.
    state = peer.state or peer.last or _NEVER_SEEN
    backend, load = state.backend if online else _ended(state.backend), state.load
    host, _, port = peer.link.address.rpartition(":")
    # The node in this process needs no heartbeat: what it says is always of now.
    seen = peer.last_seen or (now if online else 0.0)
    window = ctx.node_traffic.get(state.node_id) or Window()
    return {
        "node_id": state.node_id,
        "hostname": state.hostname,
        "host": host or state.hostname or peer.link.address,
        "port": state.grpc_port or (int(port) if port.isdigit() else 0),
        "address": peer.link.address,
        "online": online,
        "round_trip_s": round(peer.link.round_trip_s, 6) if online else None,
        "version": state.version,
        "roles": list(state.roles),
        "draining": state.draining or state.node_id in ctx.drained,
        "usable": peer.usable and state.node_id not in ctx.drained,
        "started_at": _rfc3339(state.started_at),
        "last_heartbeat": _rfc3339(seen),
        "health": {
            "interval_s": REPORT_INTERVAL_S,
            "consecutive_failures": peer.failures,
            "age_s": round(now - seen, 3) if seen else None,
            "error": peer.error,
        },
        "load": {
            "in_flight": ctx.in_flight[state.node_id],
            "active": backend.active,
            "queued": backend.queued,
            "slots": backend.slots,
        },
        "active_sessions": max(backend.active, ctx.in_flight[state.node_id]),
        "requests": {"total": window.requests, "errors": window.errors, **_figures(window.figures(monotonic()))},
        "backend": {
            "kind": backend.kind if state is not _NEVER_SEEN else "",
            "ok": backend.ok,
            "error": backend.error,
            "version": backend.version,
        },
        "engine": asdict(backend.engine) if backend.engine else None,
        "loaded_models": [
            {"name": m.name, "digest": m.digest, "size": m.size, "size_vram": m.size_vram,
             "context_length": m.context_length, "active": m.active, "queued": m.queued, "expires_at": m.expires_at}
            for m in backend.loaded
        ],
        "models": [m.name for m in backend.models],
        "cpu": {"percent": load.cpu_percent, "count": load.cpu_count, "load_1m": load.load_1m},
        "memory": {"total": load.memory_total, "free": load.memory_free},
        "gpus": [
            {"name": g.name, "memory_total": g.memory_total, "memory_free": g.memory_free} for g in load.gpus
        ],
    }  # fmt: skip


def _ended(backend: BackendState) -> BackendState:
    """Return what a node that is down leaves of its backend: the files."""
    return replace(backend, ok=False, error="", loaded=(), active=0, queued=0)


def _serving(ctx: Context) -> list[Node]:
    """Return the nodes that are up, and this proxy's pipelines as the last one."""
    split = as_node(ctx)
    return [*ctx.view.up(), split] if split else ctx.view.up()


def _models(ctx: Context) -> list[dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for state, peer in _serving(ctx):
        is_split = ctx.pipelines is not None and peer is ctx.pipelines.peer
        loaded = {names.key(model.name) for model in state.backend.loaded}
        for model in state.backend.models:
            key = names.key(model.name)
            entry = merged.get(key)
            if entry is None:
                entry = merged[key] = {**_model(model), "hosts": [], "loaded_on": []}
            host = {"node_id": state.node_id, "hostname": state.hostname, "digest": model.digest}
            if not (is_split and entry["hosts"]):  # files of this host, which a node may have listed already
                entry["hosts"].append(host)
            if key in loaded:
                entry["loaded_on"].append(state.node_id)
    return [merged[key] for key in sorted(merged)]


def _model(model: ModelInfo) -> dict[str, Any]:
    name, _, tag = model.name.rpartition(":")
    return {
        "name": model.name,
        "model": name or model.name,
        "tag": tag if name else "latest",
        "family": model.family,
        "families": list(model.families),
        "size": model.size,
        "digest": model.digest,
        "parameters": model.parameter_size,
        "quantization": model.quantization,
        "architecture": model.architecture,
        "format": model.format,
        "context_length": model.context_length,
        "capabilities": list(model.capabilities),
    }


def _figures(figures: Figures) -> dict[str, float]:
    return {
        "requests_per_s": round(figures.requests_per_s, 3),
        "error_rate": round(figures.error_rate, 4),
        "response_time_mean_s": round(figures.mean_s, 6),
        "response_time_p50_s": round(figures.p50_s, 6),
        "response_time_p99_s": round(figures.p99_s, 6),
    }


def _rfc3339(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z") if unix else ""


async def _cloud(ctx: Context) -> Any:
    """Return what an Ollama among the nodes says of its cloud; an engine has none."""
    ollamas = [(state, peer) for state, peer in ctx.view.usable() if state.backend.kind == "ollama"]
    for _, peer in ollamas[:_CLOUD_NODES]:
        try:
            answer = await fetch(
                peer, RequestHead("GET", "/api/status"), b"", timeout_s=_CLOUD_TIMEOUT_S, limit=64 << 10
            )
            said = answer.json() if answer.status == 200 else {}
        except OsyncError:
            continue  # it may have stopped a moment ago: the status must not wait for it
        if isinstance(said, dict) and "cloud" in said:
            return said["cloud"]
    return _NO_CLOUD
