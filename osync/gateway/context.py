"""What every handler of the gateway gets: the cluster, the settings, and the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from osync.cluster.view import ClusterView
from osync.config import Settings
from osync.core.window import Window
from osync.gateway.pipelines import NO_SHARD, TURNED_OFF, Pipelines, Plain
from osync.gateway.replicas import Replicas
from osync.net.exchange import Body, Responder
from osync.telemetry.metrics import Metrics
from osync.types import NodeId, RequestHead

if TYPE_CHECKING:
    from osync.gateway.progress import Progress


@dataclass(slots=True)
class Context:
    """Shared by all requests of one gateway. Only the event loop's thread touches it."""

    settings: Settings
    view: ClusterView
    node_id: NodeId
    in_flight: Counter[NodeId] = field(default_factory=Counter)
    """Requests that this proxy has open on each node, reserved at the pick."""
    drained: set[NodeId] = field(default_factory=set)
    """Nodes that this proxy was told not to pick."""
    replicas: Replicas = field(default_factory=Replicas)
    pipelines: Pipelines | None = None
    """Models over shards; None as long as there is no shard, and where they are turned off."""
    no_pipelines: str = ""
    """Why there are none, in words for a person."""
    plain: Plain = field(default_factory=Plain)
    metrics: Metrics = field(default_factory=Metrics)
    traffic: Window = field(default_factory=Window)
    """All requests that this proxy answered of late."""
    node_traffic: dict[NodeId, Window] = field(default_factory=dict)
    """The inference requests that each node answered of late."""
    pulls: dict[tuple[str, bool, str], Progress] = field(default_factory=dict)
    """Pulls that run, by canonical name, `insecure` and pinned node."""

    def __post_init__(self) -> None:
        """Say why there are no pipelines yet."""
        self.no_pipelines = self.no_pipelines or (NO_SHARD if self.settings.distributed else TURNED_OFF)


@dataclass(slots=True)
class Call:
    """One request as a handler sees it. `path` is decoded and without query."""

    head: RequestHead
    path: str
    query: str
    body: Body
    responder: Responder
    request_id: str
    fields: dict[str, str]
    """The first value of each header, by lower-case name."""

    def header(self, name: str) -> str:
        """Return the first value of a header, "" where absent. `name` in lower case."""
        return self.fields.get(name, "")


Handler = Callable[[Context, Call], Awaitable[None]]
