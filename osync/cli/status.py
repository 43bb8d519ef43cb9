"""`osync status`: the cluster in a few lines and a table of its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from osync.cli.tables import ago, print_table, size
from osync.client.answers import StatusResponse

_SHARD_HEADINGS = ("shard", "address", "state", "engine", "lends", "free", "round trip", "stages")
_PIPELINE_HEADINGS = ("pipeline", "model", "stage", "shard", "layers", "state", "memory", "ms/frame", "wire", "queue")
_HEADINGS = ("node", "address", "state", "backend", "load", "models", "in memory", "cpu", "free memory", "seen")


def print_status(cluster: StatusResponse) -> None:
    """Print a summary, and one row per node."""
    online = sum(1 for node in cluster.nodes if node.get("usable"))
    figures = cluster.requests
    typer.echo(
        f"osync {cluster.version}, proxy {cluster.node_id}: {online} of {_count(len(cluster.nodes), 'node')} usable, "
        f"{_count(len(cluster.models), 'model')}, {_count(int(figures.get('in_flight', 0)), 'request')} running, "
        f"{figures.get('errors', 0)} of {figures.get('total', 0)} failed so far"
    )
    if cluster.nodes:
        print_table(_HEADINGS, [_row(node) for node in cluster.nodes])
    elif not cluster.shards:
        typer.echo("No node: start one with `osyncd --role node`, and name it with --servers host:port.")
    if cluster.shards:
        print_table(_SHARD_HEADINGS, [_shard(shard) for shard in cluster.shards], title="Shards")
    for pipeline in cluster.pipelines:
        typer.echo(_pipeline(pipeline))
    if cluster.pipelines:
        print_table(_PIPELINE_HEADINGS, [row for p in cluster.pipelines for row in _stages(p)], title="Pipelines")
    for node in cluster.nodes:
        if error := _reason(node):
            typer.echo(f"{node.get('hostname') or node.get('address')}: {error}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _row(node: Mapping[str, Any]) -> tuple[str, ...]:
    load, backend = _table(node, "load"), _table(node, "backend")
    memory, cpu = _table(node, "memory"), _table(node, "cpu")
    loaded = [str(row.get("name")) for row in node.get("loaded_models") or ()]
    return (
        str(node.get("hostname") or node.get("host") or "-"),
        str(node.get("address") or "-"),
        _state(node),
        " ".join(str(backend[key]) for key in ("kind", "version") if backend.get(key)) or "-",
        f"{load.get('active', 0)}/{load.get('slots', 0)} +{load.get('queued', 0)}" if load else "-",
        str(len(node.get("models") or ())),
        ", ".join(loaded) or "-",
        f"{cpu['percent']:.0f}%" if "percent" in cpu else "-",
        f"{size(memory['free'])} of {size(memory['total'])}" if memory.get("total") else "-",
        ago(str(node.get("last_heartbeat") or "")),
    )


def _shard(shard: Mapping[str, Any]) -> tuple[str, ...]:
    memory = _table(shard, "memory")
    state = "down" if not shard.get("online") else "draining" if shard.get("draining") else "up"
    return (
        str(shard.get("hostname") or "-"),
        str(shard.get("address") or "-"),
        state,
        str(shard.get("engine") or "-"),
        size(memory.get("total") or 0),
        size(memory.get("free") or 0),
        _milliseconds(shard.get("round_trip_s")),
        str(len(shard.get("stages") or ())),
    )


def _pipeline(pipeline: Mapping[str, Any]) -> str:
    stages = _count(len(pipeline.get("stages") or ()), "stage")
    text = (
        f"pipeline {pipeline.get('name')}: {pipeline.get('model')} in {stages}, "
        f"{size(pipeline.get('size') or 0)}, {pipeline.get('tokens_per_s', 0):.1f} tokens/s, "
        f"{pipeline.get('active', 0)} running +{pipeline.get('queued', 0)}, "
        f"made anew {_count(int(pipeline.get('recoveries', 0)), 'time')}"
    )
    return f"{text}: {pipeline['error']}" if pipeline.get("error") else text


def _stages(pipeline: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(pipeline.get("name")),
            str(pipeline.get("model")),
            str(number),
            str(stage.get("hostname") or stage.get("address")),
            f"{stage.get('first', 0)}-{int(stage.get('last', 1)) - 1}",
            str(stage.get("state") or "-"),
            size((stage.get("weight_bytes") or 0) + (stage.get("kv_bytes") or 0)),
            _milliseconds(stage.get("frame_busy_s")),
            _milliseconds(stage.get("frame_wire_s")),
            str(stage.get("queued", "-")),
        )
        for number, stage in enumerate(pipeline.get("stages") or ())
    ]


def _milliseconds(seconds: object) -> str:
    return f"{seconds * 1000:.1f} ms" if isinstance(seconds, (int, float)) else "-"


def _state(node: Mapping[str, Any]) -> str:
    if not node.get("online"):
        return "down"
    if node.get("draining"):
        return "draining"
    return "up" if node.get("usable") else "not usable"


def _reason(node: Mapping[str, Any]) -> str:
    """Return why a node is not usable, "" if it is."""
    if node.get("usable"):
        return ""
    return str(_table(node, "health").get("error") or _table(node, "backend").get("error") or "")


def _table(node: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = node.get(name)
    return value if isinstance(value, Mapping) else {}
