"""A cluster with shards in memory: a coordinator that plans as the real one and loads runners without llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from osync.backend.engine.runner import EngineLibrary
from osync.backend.pipelines import PipelineNode
from osync.config import Settings
from osync.coordinator.coordinator import Coordinator, PipelineStatus, StageStatus
from osync.coordinator.placement import ModelSource, ShardPeer
from osync.coordinator.runner import RunnerSettings
from osync.core.plan import NoPlan, Plan
from osync.core.stages import StageReport, StageState
from osync.errors import ModelUnusable, OsyncError
from osync.types import BackendState, HostLoad, ModelInfo, NodeId, NodeState, ShardState
from tests.fakes.cluster import Proxy, ScriptedNode
from tests.integration.test_engine_backend import FakeEngine, FakeRunner

GIB = 1 << 30


@dataclass
class Shard(ScriptedNode):
    """A daemon with the shard role only."""

    memory: int = GIB
    digests: tuple[str, ...] = ()

    def state(self) -> NodeState | None:
        if not self.up:
            return None
        lends = ShardState("llama 1", self.memory, self.memory, 1e-9, self.digests)
        backend = BackendState("none", error="this daemon has no node role")
        return NodeState(NodeId(self.name), backend, f"host-{self.name}", roles=("shard",), shard=lends)


@dataclass
class Sized(ScriptedNode):
    """A node that says how large its models and its memory are."""

    size: int = 1000
    parameters: str = "135M"
    memory: int = 0

    def state(self) -> NodeState | None:
        state = super().state()
        if state is None:
            return None
        models = tuple(
            ModelInfo(name, digest="d" * 64, size=self.size, parameter_size=self.parameters) for name in self.models
        )
        load = HostLoad(memory_total=self.memory, memory_free=self.memory)
        return replace(state, backend=replace(state.backend, models=models), load=load)


class FakeCoordinator:
    """Plans for real; what it loads answers without any shard."""

    def __init__(self, settings: Settings, node_id: NodeId, shards: Callable[[], Sequence[ShardPeer]]) -> None:
        self.real = Coordinator(settings, node_id, shards)
        self.engine = FakeEngine()
        self.loaded: list[tuple[ModelSource, RunnerSettings, FakeRunner]] = []
        self.error: OsyncError | None = None
        self.holds_one = False
        self.plans = 0

    def plan(self, model: ModelSource, settings: RunnerSettings) -> Plan | NoPlan:
        self.plans += 1
        return self.real.plan(model, settings)

    async def load(self, model: ModelSource, settings: RunnerSettings) -> FakeRunner:
        if self.error:
            raise self.error
        if self.holds_one and any(not runner.closed for _, _, runner in self.loaded):
            raise ModelUnusable("there is no room beside the other pipeline")
        runner = await self.engine.load(model.vocabulary, settings)
        self.loaded.append((model, settings, runner))
        return runner

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        report = StageReport(state=StageState.READY, weight_bytes=10, kv_bytes=5, frames=4, rows=8, busy_s=0.4,
                             wire_s=0.02, queued=1)  # fmt: skip
        return tuple(
            PipelineStatus(
                name=f"p{number}", model=model.name, epoch=1, tokens_per_s=2.5, active=1, queued=3, recoveries=2,
                error="", sent_bytes=7, received_bytes=9, size_bytes=1000,
                stages=(StageStatus("s1:1", "s1", "host-s1", 0, 2, report), StageStatus("s2:1", "s2", "h", 2, 4, None)),
            )
            for number, (model, _, runner) in enumerate(self.loaded) if not runner.closed
        )  # fmt: skip

    async def close(self) -> None:
        await self.real.close()


@dataclass
class Split:
    """A proxy with shards and pipelines."""

    proxy: Proxy
    node: PipelineNode
    coordinator: FakeCoordinator
    planner: FakeCoordinator


async def split(proxy: Proxy, settings: Settings) -> Split:
    """Give a proxy pipelines over its view; close the node at the end."""
    made: list[FakeCoordinator] = []

    def make(settings: Settings, node_id: NodeId, shards: Callable[[], Sequence[ShardPeer]]) -> FakeCoordinator:
        made.append(FakeCoordinator(settings, node_id, shards))
        return made[-1]

    node = PipelineNode(
        settings, NodeId("proxy"), proxy.view, own_address="me:1", make=make, probe=lambda: EngineLibrary("fake 1")
    )
    node.store.scan()
    await node.start()
    proxy.gateway.context.pipelines = node
    coordinator, planner = made
    return Split(proxy, node, coordinator, planner)
