"""What this proxy shows of shards and pipelines: in /api/status and in the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from time import time
from typing import TYPE_CHECKING, Any

from osync.gateway.context import Context
from osync.telemetry.metrics import ShardReading
from osync.types import NodeState, ShardState

if TYPE_CHECKING:
    from osync.cluster.view import Peer
    from osync.coordinator.coordinator import PipelineStatus, StageStatus


def shards(ctx: Context) -> list[dict[str, Any]]:
    """Return a row for each known shard, also for one that is down."""
    return [_shard(state, peer) for state, peer in _known(ctx)]


def _known(ctx: Context) -> Iterator[tuple[NodeState, Peer]]:
    for peer in ctx.view.peers:
        state = peer.state or peer.last
        if state is not None and (state.shard is not None or "shard" in state.roles):
            yield state, peer


def _shard(state: NodeState, peer: Peer) -> dict[str, Any]:
    online = peer.state is not None
    lends = state.shard or ShardState()
    return {
        "node_id": state.node_id,
        "hostname": state.hostname,
        "address": peer.link.address,
        "port": state.grpc_port,
        "online": online,
        "draining": state.draining,
        "version": state.version,
        "roles": list(state.roles),
        "round_trip_s": round(peer.link.round_trip_s, 6) if online else None,
        "last_heartbeat_age_s": round(time() - peer.last_seen, 3) if peer.last_seen else None,
        "error": peer.error,
        "engine": lends.engine,
        "memory": {"total": lends.memory, "free": lends.memory_free if online else 0},
        "s_per_byte": lends.s_per_byte,
        "models": len(lends.digests),
        "cpu": {"percent": state.load.cpu_percent, "count": state.load.cpu_count},
        "stages": [
            {"pipeline": s.pipeline, "owner": s.owner, "model": s.model, "first": s.first, "last": s.last,
             "layers": s.layers, "size": s.size, "state": s.state, "progress": round(s.progress, 4)}
            for s in (lends.stages if online else ())
        ],
    }  # fmt: skip


def pipelines(ctx: Context) -> list[dict[str, Any]]:
    """Return a row for each open pipeline of this proxy."""
    return [_pipeline(status) for status in (ctx.pipelines.pipelines if ctx.pipelines else ())]


def _pipeline(status: PipelineStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "model": status.model,
        "epoch": status.epoch,
        "size": status.size_bytes,
        "tokens_per_s": round(status.tokens_per_s, 3),
        "active": status.active,
        "queued": status.queued,
        "recoveries": status.recoveries,
        "error": status.error,
        "sent_bytes": status.sent_bytes,
        "received_bytes": status.received_bytes,
        "stages": [_stage(stage) for stage in status.stages],
    }


def _stage(stage: StageStatus) -> dict[str, Any]:
    row: dict[str, Any] = {
        "address": stage.address,
        "node_id": stage.node_id,
        "hostname": stage.hostname,
        "first": stage.first,
        "last": stage.last,
    }
    report = stage.report
    if report is None:
        return {**row, "state": "waiting"}
    frames = max(1, report.frames)
    return {
        **row,
        "state": report.state.name.lower(),
        "error": report.error,
        "weight_bytes": report.weight_bytes,
        "kv_bytes": report.kv_bytes,
        "bytes_done": report.bytes_done,
        "bytes_total": report.bytes_total,
        "bytes_fetched": report.bytes_fetched,
        "frames": report.frames,
        "rows": report.rows,
        "busy_s": round(report.busy_s, 6),
        "wire_s": round(report.wire_s, 6),
        "frame_busy_s": round(report.busy_s / frames, 6),
        "frame_wire_s": round(report.wire_s / frames, 6),
        "queued": report.queued,
        "engine": report.engine,
    }


def readings(ctx: Context) -> Iterator[ShardReading]:
    """Yield what the metrics say of shards and pipelines."""
    for state, peer in _known(ctx):
        if peer.state is None:
            continue
        lends, labels = state.shard or ShardState(), (state.node_id,)
        yield ShardReading("shard_memory_bytes", labels, lends.memory)
        yield ShardReading("shard_memory_free_bytes", labels, lends.memory_free)
        yield ShardReading("shard_stages", labels, len(lends.stages))
        yield ShardReading("shard_round_trip_seconds", labels, peer.link.round_trip_s)
    for status in ctx.pipelines.pipelines if ctx.pipelines else ():
        names = (status.name, status.model)
        yield ShardReading("pipeline_stages", names, len(status.stages))
        yield ShardReading("pipeline_size_bytes", names, status.size_bytes)
        yield ShardReading("pipeline_tokens_per_second", names, status.tokens_per_s)
        yield ShardReading("pipeline_active", names, status.active)
        yield ShardReading("pipeline_queued", names, status.queued)
        yield ShardReading("pipeline_recoveries", names, status.recoveries)
        for number, stage in enumerate(status.stages):
            if report := stage.report:
                place = (*names, str(number), stage.node_id or stage.address)
                yield ShardReading("pipeline_stage_rows", place, report.rows)
                yield ShardReading("pipeline_stage_busy_seconds", place, report.busy_s)
                yield ShardReading("pipeline_stage_wire_seconds", place, report.wire_s)
                yield ShardReading("pipeline_stage_queued", place, report.queued)
