"""The coordinator of a proxy: makes pipelines of the cluster's shards, and knows how they are."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from osync.config import Settings
from osync.coordinator.pipeline import Pipeline, Placed
from osync.coordinator.pipeline_runner import PipelineRunner
from osync.coordinator.placement import Demand, ModelSource, ShardPeer, place, plan
from osync.coordinator.runner import DEFAULT_CONTEXT, MAX_BATCH, RunnerSettings
from osync.core.plan import NoPlan, Plan
from osync.core.stages import StageReport, StageSettings
from osync.engine.cutting import layer_costs
from osync.engine.llama import KV_TYPES, MAX_SAMPLED, Model
from osync.engine.stage import Limits
from osync.errors import ModelUnusable
from osync.types import NodeId
from osync.wire.options import parse_lifetime

log = structlog.get_logger("osync.coordinator")

COMEBACK_S: Final = 3.0
"""How long recovery waits for a shard to come back where those that are left cannot hold the model."""
_AGAIN_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage of a pipeline as it is now."""

    address: str
    node_id: str
    hostname: str
    first: int
    last: int
    report: StageReport | None


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """One pipeline as it is now."""

    name: str
    model: str
    epoch: int
    stages: tuple[StageStatus, ...]
    tokens_per_s: float
    active: int
    queued: int
    recoveries: int
    error: str
    sent_bytes: int
    received_bytes: int
    size_bytes: int


class Coordinator:
    """Plans, opens and lists pipelines."""

    def __init__(self, settings: Settings, node_id: NodeId, shards: Callable[[], Sequence[ShardPeer]]) -> None:
        self._settings = settings
        self._node_id = node_id
        self._shards = shards
        self._runners: dict[str, tuple[ModelSource, PipelineRunner]] = {}
        self._stage_timeout_s = parse_lifetime(settings.stage_timeout)

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All that are open."""
        peers = {peer.address: peer.state for peer in self._shards()}
        return tuple(self._status(model, runner, peers) for model, runner in self._runners.values())

    def plan(self, model: ModelSource, settings: RunnerSettings) -> Plan | NoPlan:
        """Say how the model would be cut now. Raises NotSupported where it cannot be."""
        return plan(self._demand(model, settings), self._shards())

    async def load(self, model: ModelSource, settings: RunnerSettings) -> PipelineRunner:
        """Open a pipeline. Raises OsyncError."""
        demand = self._demand(model, settings)
        name = f"{secrets.token_hex(4)}"

        async def placing(failed: Collection[str], held: Sequence[Placed]) -> Sequence[Placed]:
            return await self._place(demand, name, failed, held)

        wanted = demand.settings
        costs = layer_costs(model.header)
        tokens = wanted.context_length * wanted.sequences
        size = costs.stage_bytes(0, model.header.block_count, tokens, KV_TYPES[wanted.kv_type][1])
        pipeline = Pipeline(
            name,
            placing,
            limits=self._limits(demand),
            activation_dtype=settings.activation_dtype or self._settings.activation_dtype,
            stage_timeout_s=self._stage_timeout_s,
            load_timeout_s=settings.load_timeout_s,
        )
        vocabulary = await asyncio.to_thread(Model.load_vocabulary, model.vocabulary)
        try:
            await pipeline.open()
        except BaseException:
            await asyncio.to_thread(vocabulary.free)
            raise
        runner = PipelineRunner(
            pipeline,
            vocabulary,
            size_bytes=size,
            max_queue=settings.max_queue,
            deterministic=settings.deterministic,
            drafts=settings.drafts,
            closed=lambda: self._runners.pop(name, None) and None,
        )
        self._runners[name] = (model, runner)
        return runner

    async def close(self) -> None:
        """Close all pipelines."""
        await asyncio.gather(*(runner.close() for _, runner in list(self._runners.values())))

    async def _place(
        self, demand: Demand, name: str, failed: Collection[str], held: Sequence[Placed]
    ) -> Sequence[Placed]:
        """Place the stages; a shard that failed may be tried again once nobody else is left."""
        until = asyncio.get_running_loop().time() + (COMEBACK_S if failed else 0.0)
        while True:
            try:
                return place(demand, self._shards(), pipeline=name, owner=self._node_id, failed=failed, held=held)
            except ModelUnusable:
                if asyncio.get_running_loop().time() >= until:
                    raise
            alive = {peer.address for peer in self._shards()}
            if alive & set(failed):
                try:
                    return place(demand, self._shards(), pipeline=name, owner=self._node_id, held=held)
                except ModelUnusable:
                    pass
            await asyncio.sleep(_AGAIN_S)

    def _demand(self, model: ModelSource, settings: RunnerSettings) -> Demand:
        trained = model.header.context_length or DEFAULT_CONTEXT
        return Demand(
            model=model,
            settings=StageSettings(
                context_length=max(4, min(settings.context_length or DEFAULT_CONTEXT, trained)),
                sequences=settings.parallel,
                n_batch=max(settings.parallel, min(settings.n_batch, MAX_BATCH)),
                flash_attention="off" if settings.deterministic else settings.flash_attention,
                kv_type=settings.kv_type,
                unified=not settings.deterministic,
                deterministic=settings.deterministic,
            ),
            stages=settings.stages,
            shards=settings.shards,
        )

    def _limits(self, demand: Demand) -> Limits:
        wanted = demand.settings
        stages = demand.stages or len(self._shards()) or 1
        return Limits(
            sequences=wanted.sequences,
            context_length=wanted.context_length,
            n_batch=wanted.n_batch,
            sampled=max(wanted.sequences, min(MAX_SAMPLED, wanted.n_batch)),
            vocabulary_size=_vocabulary_size(demand.model),
            depth=2 * stages,
            runs_ahead=True,
        )

    def _status(self, model: ModelSource, runner: PipelineRunner, peers: Mapping[str, object]) -> PipelineStatus:
        pipeline = runner.pipeline
        stages = []
        for stage, address, report in pipeline.stages:
            state = peers.get(address)
            stages.append(
                StageStatus(
                    address,
                    str(getattr(state, "node_id", "")),
                    str(getattr(state, "hostname", "")),
                    stage.first,
                    stage.last,
                    report,
                )
            )
        sent, received = pipeline.traffic
        return PipelineStatus(
            name=pipeline.name,
            model=model.name,
            epoch=pipeline.epoch,
            stages=tuple(stages),
            tokens_per_s=pipeline.tokens_per_s,
            active=runner.active,
            queued=runner.queued,
            recoveries=pipeline.recoveries,
            error=pipeline.error,
            sent_bytes=sent,
            received_bytes=received,
            size_bytes=runner.size_bytes,
        )


def _vocabulary_size(model: ModelSource) -> int:
    return next((t.shape[1] for t in model.header.tensors if t.name == "token_embd.weight"), 0)
