"""`osync status`: the cluster in a few lines and a table of its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from osync.cli.tables import ago, print_table, size
from osync.client.answers import StatusResponse

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
    if not cluster.nodes:
        typer.echo("No node: start one with `osyncd --role node`, and name it with --servers host:port.")
        return
    print_table(_HEADINGS, [_row(node) for node in cluster.nodes])
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
