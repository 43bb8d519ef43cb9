"""Shards and a coordinator in one process, over real gRPC: what a pipeline needs, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from osync.config import Settings
from osync.coordinator.coordinator import Coordinator
from osync.coordinator.placement import ModelSource, ShardPeer
from osync.engine.devices import LoadSettings
from osync.engine.gguf import read_header
from osync.engine.store import ModelStore
from osync.net.blob import add_blob_service
from osync.net.server import RpcServer
from osync.net.shard_service import add_shard_service
from osync.shard.role import ShardRole
from osync.types import BackendState, NodeId, NodeState


@dataclass(slots=True)
class RunningShard:
    """One shard with its server."""

    address: str
    role: ShardRole
    server: RpcServer
    is_up: bool = True

    def peer(self) -> ShardPeer:
        """Return it as a coordinator sees it."""
        state = NodeState(
            NodeId(f"node-{self.address}"), BackendState("none"), roles=("shard",), draining=self.role.is_draining
        )
        return ShardPeer(self.address, replace(state, shard=self.role.state()))

    async def stop(self) -> None:
        """End it, as if its process had ended."""
        if self.is_up:
            self.is_up = False
            await self.server.stop(0)
            await self.role.close()


@dataclass(slots=True)
class Group:
    """Some shards and a coordinator of theirs."""

    shards: list[RunningShard]
    coordinator: Coordinator

    def up(self) -> Sequence[ShardPeer]:
        """Return those that are up."""
        return [shard.peer() for shard in self.shards if shard.is_up]


async def start_shard(folder: Path, models: tuple[Path, ...] = (), memory: str = "4GiB") -> RunningShard:
    """Start a shard on a free port; `models` are its directories."""
    folder.mkdir(exist_ok=True)
    settings = Settings(role=("shard",), state_dir=folder, models_dir=models, memory=memory, grpc_port=0, threads=1)
    store = ModelStore(models, folder)
    role = ShardRole(settings, store, watches=True, engine="test", load=LoadSettings())
    server = RpcServer("127.0.0.1", 0)
    add_shard_service(server, role)
    add_blob_service(server, role.find)
    await role.start()
    await _digested(role, store)
    port = await server.start()
    return RunningShard(f"127.0.0.1:{port}", role, server)


async def _digested(role: ShardRole, store: ModelStore) -> None:
    """Wait until the final digests of all models are known."""
    changed = asyncio.Event()
    role.on_change(changed.set)
    async with asyncio.timeout(30):
        while not all(model.is_digest_final for model in store.models):
            changed.clear()
            await changed.wait()


@contextlib.asynccontextmanager
async def group(folder: Path, count: int, models: tuple[Path, ...], memory: str = "4GiB") -> AsyncIterator[Group]:
    """Run `count` shards that all have the models, and a coordinator."""
    shards: list[RunningShard] = []
    try:
        for number in range(count):
            shard = await start_shard(folder / f"shard{number}", models, memory)
            shards.append(shard)
        found: list[Group] = []
        coordinator = Coordinator(Settings(state_dir=folder), NodeId("proxy"), lambda: found[0].up())
        found.append(Group(shards, coordinator))
        try:
            yield found[0]
        finally:
            await coordinator.close()
    finally:
        for shard in shards:
            await shard.stop()


def source_of(path: Path, group: Group | None = None) -> ModelSource:
    """Return a model for the coordinator, as the shards' stores know it."""
    digest = "0" * 64
    if group is not None:
        (digest,) = {d for shard in group.shards for d in shard.role.state().digests}
    return ModelSource(
        name=path.stem,
        digest=digest,
        size=path.stat().st_size,
        header=read_header(path),
        vocabulary=path,
        sources=tuple(shard.address for shard in group.shards) if group else (),
    )
