"""What every handler of the gateway gets: the cluster, the settings, and the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from osync.cluster.view import ClusterView
from osync.config import Settings
from osync.core.window import Window
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
    metrics: Metrics = field(default_factory=Metrics)
    traffic: Window = field(default_factory=Window)
    """All requests that this proxy answered of late."""
    node_traffic: dict[NodeId, Window] = field(default_factory=dict)
    """The inference requests that each node answered of late."""
    pulls: dict[tuple[str, bool, str], Progress] = field(default_factory=dict)
    """Pulls that run, by canonical name, `insecure` and pinned node."""


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
