"""The coordinator of a proxy: makes pipelines of the cluster's shards, and knows how they are."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from osync.config import Settings
from osync.coordinator.pipeline import Pipeline, Placed, Remains
from osync.coordinator.pipeline_runner import PipelineRunner
from osync.coordinator.placement import Demand, ModelSource, ShardPeer, place, plan, standbys
from osync.coordinator.runner import DEFAULT_CONTEXT, MAX_BATCH, RunnerSettings
from osync.core.plan import NoPlan, Plan
from osync.core.stages import StageReport, StageSettings, StageState
from osync.engine.cutting import layer_costs
from osync.engine.frame import Limits
from osync.engine.llama import KV_TYPES, MAX_SAMPLED, Model
from osync.errors import ModelUnusable, OsyncError, UpstreamUnavailable
from osync.net.tasks import Tasks
from osync.types import NodeId
from osync.wire.options import parse_lifetime

log = structlog.get_logger("osync.coordinator")

COMEBACK_S: Final = 10.0
"""How long recovery waits for a shard to come back where those that are left cannot hold the model."""
TEND_S: Final = 0.25
"""Between looks at the shards, for standbys and for those that leave."""
STANDBY_AGAIN_S: Final = 30.0
"""Before a shard that could not hold a standby is asked again."""
MOVE_S: Final = 5.0
"""Between attempts to move a pipeline's stages away from shards that leave."""
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
        self._runners: dict[str, tuple[Demand, PipelineRunner]] = {}
        self._opening: set[Pipeline] = set()
        self._not_before: dict[str, float] = {}
        """When a shard may be asked for a standby again, by its address."""
        self._move_after: dict[str, float] = {}
        """When stages of a pipeline may be moved again, by its name."""
        self._closed = False
        self._tending = False
        self._tasks = Tasks("coordinator")
        self._stage_timeout_s = parse_lifetime(settings.stage_timeout)

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All that are open."""
        peers = {peer.address: peer.state for peer in self._shards()}
        return tuple(self._status(demand.model, runner, peers) for demand, runner in self._runners.values())

    def plan(self, model: ModelSource, settings: RunnerSettings) -> Plan | NoPlan:
        """Say how the model would be cut now. Raises NotSupported where it cannot be."""
        return plan(self._demand(model, settings), self._shards())

    async def load(self, model: ModelSource, settings: RunnerSettings) -> PipelineRunner:
        """Open a pipeline. Raises OsyncError."""
        demand = self._demand(model, settings)
        name = f"{secrets.token_hex(4)}"

        async def placing(remains: Remains) -> Sequence[Placed]:
            return await self._place(demand, name, remains)

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
        if self._closed:
            raise UpstreamUnavailable("this daemon is stopping")
        loading = self._tasks.spawn("vocabulary", asyncio.to_thread(Model.load_vocabulary, model.vocabulary))
        self._opening.add(pipeline)
        try:
            await asyncio.wait({loading})
            vocabulary = loading.result()
            await pipeline.open()
        except BaseException:
            # The thread cannot be ended: what it gives is freed whenever that is.
            loading.add_done_callback(_free_vocabulary)
            raise
        finally:
            self._opening.discard(pipeline)
        runner = PipelineRunner(
            pipeline,
            vocabulary,
            size_bytes=size,
            max_queue=settings.max_queue,
            deterministic=settings.deterministic,
            drafts=settings.drafts and self._settings.drafts,
            closed=lambda: self._forget(name),
        )
        self._runners[name] = (demand, runner)
        if not self._tending:
            self._tending = True
            self._tasks.spawn("tend", self._tend())
        return runner

    async def close(self) -> None:
        """Close all pipelines, also those that are being opened."""
        self._closed = True
        await asyncio.gather(
            *(pipeline.close() for pipeline in list(self._opening)),
            *(runner.close() for _, runner in list(self._runners.values())),
        )
        await self._tasks.close()

    async def _place(
        self, demand: Demand, name: str, remains: Remains
    ) -> Sequence[Placed]:  # fmt: skip
        """Place the stages; a shard that failed, or is about to leave, is used only where nobody else can be."""
        until = asyncio.get_running_loop().time() + (COMEBACK_S if remains.failed else 0.0)
        while True:
            peers = self._shards()
            leaving = frozenset(peer.address for peer in peers if peer.state.draining)
            bad = remains.failed | remains.refused
            reason: ModelUnusable | None = None
            for without in dict.fromkeys((bad | leaving, bad, remains.refused | leaving, remains.refused)):
                try:
                    # Beside the loop: an exact plan over ten shards takes seconds.
                    return await asyncio.to_thread(
                        place, demand, peers, remains, pipeline=name, owner=self._node_id, without=without
                    )
                except ModelUnusable as error:
                    reason = reason or error
            if reason is not None and asyncio.get_running_loop().time() >= until:
                raise reason
            await asyncio.sleep(_AGAIN_S)

    def _forget(self, name: str) -> None:
        self._runners.pop(name, None)
        self._move_after.pop(name, None)

    async def _tend(self) -> None:
        """Keep standbys, and move stages away from shards that leave."""
        while True:
            await asyncio.sleep(TEND_S)
            for demand, runner in list(self._runners.values()):
                if runner.pipeline.is_connected:
                    try:
                        await self._look_after(demand, runner.pipeline)
                    except OsyncError as error:
                        log.warning("tending_failed", pipeline=runner.pipeline.name, error=str(error))

    async def _look_after(self, demand: Demand, pipeline: Pipeline) -> None:
        now, peers = asyncio.get_running_loop().time(), self._shards()
        self._not_before = {address: at for address, at in self._not_before.items() if at > now}
        stages = [Placed(address, order) for order, address, _ in pipeline.stages]
        standby = [Placed(address, order) for order, address, _ in pipeline.standbys]
        wanted = standbys(demand, peers, stages, standby, without=self._not_before)
        for address in await pipeline.stand_by(wanted):
            self._not_before[address] = now + STANDBY_AGAIN_S
        leaving = frozenset(peer.address for peer in peers if peer.state.draining)
        moving = {stage.order for stage in stages if stage.address in leaving}
        if not moving or now < self._move_after.get(pipeline.name, 0.0):
            return
        ready = {order for order, _, report in pipeline.standbys if report and report.state is StageState.READY}
        if moving & {stage.order for stage in wanted} - ready:
            return  # they are loading
        remains = Remains(held=tuple(stages), standby=tuple(standby))
        try:
            place(demand, peers, remains, pipeline=pipeline.name, owner=self._node_id, without=leaving)
        except ModelUnusable:
            return  # better there, as long as that lasts, than nowhere
        self._move_after[pipeline.name] = now + MOVE_S
        pipeline.renew(f"shard {', '.join(sorted(leaving))} is leaving")

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


def _free_vocabulary(loading: asyncio.Task[Model]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().free()


def _vocabulary_size(model: ModelSource) -> int:
    return next((t.shape[1] for t in model.header.tensors if t.name == "token_embd.weight"), 0)
