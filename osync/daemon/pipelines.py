"""Distributed inference in a daemon with the proxy role: made once there is a shard, so that others pay nothing."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from osync.backend.base import Backend
from osync.cluster.membership import Membership
from osync.config import Settings
from osync.errors import NotSupported
from osync.gateway.context import Context
from osync.net.tasks import Tasks
from osync.shard.role import ShardRole
from osync.types import NodeId

if TYPE_CHECKING:
    from osync.backend.pipelines import PipelineNode
    from osync.engine.store import ModelStore

log = structlog.get_logger("osync.daemon")

NO_ENGINE = "this proxy cannot split models: llama.cpp is not installed; run: pip install 'osync[engine]'"


class Distribution:
    """Watches the view for shards; with the first one the gateway gets its pipelines."""

    def __init__(self, settings: Settings, node_id: NodeId, membership: Membership, context: Context) -> None:
        self._settings = settings
        self._node_id = node_id
        self._membership = membership
        self._context = context
        self._store: ModelStore | None = None
        self._node: PipelineNode | None = None
        self._grpc_port = 0
        self._is_begun = False
        self._is_ready = asyncio.Event()
        self._tasks = Tasks("distribution")
        membership.on_change(self._look)

    async def start(self, grpc_port: int, backend: Backend | None, shard: ShardRole | None) -> None:
        """Begin to watch. Models of this host are those of its engine or shard, where it is one too."""
        self._grpc_port = grpc_port
        self._store = getattr(backend, "store", None) or (shard.store if shard else None)
        if importlib.util.find_spec("llama_cpp") is None:
            self._context.no_pipelines = NO_ENGINE
            return
        self._look()

    async def close(self) -> None:
        """Give all stages back."""
        await self._tasks.close()
        self._context.pipelines = None
        if self._node is not None:
            await self._node.close()

    async def ready(self) -> None:
        """Wait until the gateway has its pipelines. Raises NotSupported where it never will."""
        if self._context.no_pipelines == NO_ENGINE:
            raise NotSupported(NO_ENGINE)
        await self._is_ready.wait()

    def find_blob(self, digest: str) -> Path | None:
        """Return the file of a model on this host by its digest."""
        return self._node.store.find_blob(digest) if self._node is not None else None

    def _look(self) -> None:
        if not self._is_begun and self._grpc_port and self._context.no_pipelines != NO_ENGINE:
            if not self._membership.view.shards():
                return
            self._is_begun = True
            self._tasks.spawn("begin", self._begin())

    async def _begin(self) -> None:
        # Only here, and beside the loop: the coordinator's imports take a good part of a second.
        package = await asyncio.to_thread(importlib.import_module, "osync.backend.pipelines")
        peers = await asyncio.to_thread(importlib.import_module, "osync.backend.pipelines.peers")
        address = await asyncio.to_thread(peers.own_address, self._settings, self._grpc_port)
        self._node = node = package.PipelineNode(
            self._settings, self._node_id, self._membership.view, own_address=address, store=self._store
        )
        await node.start()
        self._context.pipelines = node
        self._is_ready.set()
        log.info("pipelines_ready", node=node.node_id, shards=len(self._membership.view.shards()), address=address)
