"""The node role: fronts one backend, counts what it works on, and says how it is."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from osync.backend.base import Backend
from osync.config import Settings
from osync.errors import CapacityError
from osync.net.exchange import Body, Responder
from osync.node.host import HostSampler
from osync.types import NodeId, NodeState, RequestHead, ShardState
from osync.version import __version__

log = structlog.get_logger("osync.node")


class Lends(Protocol):
    """The shard role of the same daemon, whose state travels with the node's."""

    def state(self) -> ShardState:
        """Return what it lends now."""
        ...

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever `state()` would answer something new."""
        ...


class NodeRole:
    """Owns the backend. `serve` is a `Serve`."""

    def __init__(
        self, settings: Settings, backend: Backend, node_id: NodeId, grpc_port: int = 0, shard: Lends | None = None
    ) -> None:
        self._shard = shard
        if shard is not None:
            shard.on_change(self._changed)
        self._grpc_port = grpc_port
        self._backend = backend
        self._node_id = node_id
        self._roles = settings.role
        self._hostname = socket.gethostname()
        self._host = HostSampler(self._changed)
        self._started_at = 0.0
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._known: NodeState | None = None
        self._listeners: list[Callable[[], None]] = []
        backend.on_change(self._changed)

    @property
    def active(self) -> int:
        """Requests that it works on now."""
        return self._active

    async def start(self, grpc_port: int = 0) -> None:
        """Start the backend and the sampling of the host's load; the port may be known only now."""
        self._grpc_port = grpc_port or self._grpc_port
        self._started_at = time.time()
        self._host.start()
        await self._backend.start()
        self._changed()

    async def close(self) -> None:
        """Close the backend; requests that still run end with it."""
        await self._host.close()
        await self._backend.close()

    def state(self) -> NodeState:
        """Return what it would tell a proxy now; made anew only when something changed."""
        if self._known is None:
            self._known = NodeState(
                node_id=self._node_id,
                backend=self._backend.state(),
                hostname=self._hostname,
                version=__version__,
                roles=self._roles,
                grpc_port=self._grpc_port,
                load=self._host.load,
                draining=self._draining,
                started_at=self._started_at,
                shard=self._shard.state() if self._shard else None,
            )
        return self._known

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` in the loop whenever `state()` would answer something new."""
        self._listeners.append(notify)

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request by the backend. Raises CapacityError while draining."""
        if self._draining:
            raise CapacityError("this node is draining", retry_after_s=5.0)
        self._active += 1
        self._idle.clear()
        try:
            await self._backend.serve(head, body, responder)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        self._set_draining(True)

    def undrain(self) -> None:
        """Take requests again."""
        self._set_draining(False)

    async def idle(self) -> None:
        """Wait until no request is active."""
        await self._idle.wait()

    def _set_draining(self, draining: bool) -> None:
        if draining != self._draining:
            self._draining = draining
            log.info("node_draining" if draining else "node_undrained", active=self._active)
            self._changed()

    def _changed(self) -> None:
        self._known = None
        for notify in self._listeners:
            notify()
