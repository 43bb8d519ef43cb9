"""Ollama's API over pipelines: the engine's, with the cluster's models and the coordinator's way to load them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from osync.backend.engine import EngineBackend
from osync.backend.engine.runner import EngineLibrary, EngineRunner, probe_library
from osync.backend.pipelines.peers import Shards
from osync.backend.pipelines.store import ClusterStore
from osync.config import Settings
from osync.coordinator.coordinator import PipelineStatus
from osync.coordinator.placement import ModelSource
from osync.coordinator.runner import RunnerSettings
from osync.core.plan import NoPlan, Plan
from osync.engine.store import StoredModel
from osync.errors import ModelNotFound, ModelUnusable, NotSupported
from osync.wire.options import RunnerOptions

ROOM_S: Final = 8.0
"""How long a load waits for memory that pipelines which have just ended give back: shards keep stages some
seconds for the next epoch."""
_AGAIN_S: Final = 0.25
_SLACK: Final = 1 << 30
"""The table's estimate is for one host: whether a model fits, the plan decides, shard by shard."""


class Coordinates(Protocol):
    """What is needed of a coordinator; `osync.coordinator.coordinator.Coordinator` is one."""

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All that are open."""
        ...

    def plan(self, model: ModelSource, settings: RunnerSettings) -> Plan | NoPlan:
        """Say how the model would be cut now. Raises NotSupported where it cannot be."""
        ...

    async def load(self, model: ModelSource, settings: RunnerSettings) -> EngineRunner:
        """Open a pipeline. Raises OsyncError."""
        ...

    async def close(self) -> None:
        """Close all pipelines."""
        ...


class PipelineBackend(EngineBackend):
    """Answers from models that are split. Models of this host come first, then those of the nodes."""

    def __init__(
        self,
        settings: Settings,
        models: ClusterStore,
        shards: Shards,
        coordinator: Coordinates,
        planner: Coordinates,
        *,
        owns_store: bool,
        probe: Callable[[], EngineLibrary] | None = None,
    ) -> None:
        """`planner` plans as if this proxy's own pipelines were closed: those in use are waited for, idle ones
        are put away."""
        # All memory is the shards': what there is of it bounds what may be loaded at once.
        own = replace(settings, memory="100%", quantize="", device="cpu")
        super().__init__(
            own,
            load=self._open,
            probe=probe or partial(_probe, settings),
            available_memory=lambda: _SLACK + sum(shard.lends.memory_free for shard in shards.up()),
            store=models.local,
        )
        self._owns_store = owns_store
        self._models = models
        self._coordinator = coordinator
        self._planner = planner

    def holds(self, model: StoredModel, options: RunnerOptions) -> bool:
        """True if the model is loaded as a request asks for it."""
        return self._table.suiting(model, options)

    def runner_settings(self, model: StoredModel, options: RunnerOptions) -> RunnerSettings:
        """Return how a model would be loaded."""
        return self._table.runner_settings(model, options)

    def _paths(self) -> set[Path]:
        return super()._paths() | self._models.paths

    async def _find(self, name: str) -> StoredModel:
        try:
            return await super()._find(name)
        except ModelNotFound:
            return await self._models.find(name)

    async def _open(self, path: Path, settings: RunnerSettings) -> EngineRunner:
        model = self._models.at(path)
        if settings.embeds:
            raise NotSupported(f"{model.info.name} gives embeddings, which need all layers in one place")
        until = time.monotonic() + ROOM_S
        while True:
            source = self._models.source(model)
            try:
                return await self._coordinator.load(source, settings)
            except ModelUnusable:
                if time.monotonic() >= until or isinstance(self._planner.plan(source, settings), NoPlan):
                    raise
            self._table.put_away_idle()
            await asyncio.sleep(_AGAIN_S)


def _probe(settings: Settings) -> EngineLibrary:
    """See that llama.cpp is there for vocabularies; what it computes on matters on the shards only."""
    return replace(probe_library(replace(settings, device="cpu")), has_gpu=False)
