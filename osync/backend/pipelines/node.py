"""A proxy's pipelines as one more node: linked in memory, asked before the others where a model may be split."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from osync.backend.engine.runner import EngineLibrary
from osync.backend.pipelines.backend import Coordinates, PipelineBackend
from osync.backend.pipelines.peers import Shards
from osync.backend.pipelines.store import ClusterStore
from osync.cluster.view import ClusterView, Peer
from osync.config import Settings, default_state_dir, parse_count
from osync.coordinator.coordinator import Coordinator, PipelineStatus
from osync.coordinator.placement import ShardPeer, shape
from osync.core.plan import NoPlan, Plan, Wish
from osync.core.planner import Decision, when_to_split
from osync.core.splitting import Holder, as_hosts, is_beyond
from osync.core.stages import StageSettings
from osync.engine.store import ModelStore
from osync.errors import ModelUnusable, NotSupported, OsyncError
from osync.net.memory import MemoryLink
from osync.types import ModelInfo, NodeId, NodeState
from osync.version import __version__
from osync.wire import names
from osync.wire.options import RunnerOptions

log = structlog.get_logger("osync.backend.pipelines")

FRESH_S: Final = 5.0
"""How long a decision holds while the shards are the same ones: a plan over many shards takes a third of a second."""
MOST_KEPT: Final = 256

Make = Callable[[Settings, NodeId, Callable[[], Sequence[ShardPeer]]], Coordinates]
_Key = tuple[str, bool | None, RunnerOptions]
_Signature = tuple[tuple[NodeId, bool], ...]


@dataclass(slots=True)
class _Kept:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    signature: _Signature = ()
    until: float = 0.0
    outcome: Decision | OsyncError | None = None


class PipelineNode:
    """The coordinator with an Ollama API before it, and the decision who gets a request."""

    def __init__(
        self,
        settings: Settings,
        node_id: NodeId,
        view: ClusterView,
        *,
        own_address: str = "",
        store: ModelStore | None = None,
        make: Make = Coordinator,
        probe: Callable[[], EngineLibrary] | None = None,
    ) -> None:
        """`store`: this host's models, where another role of the daemon watches them. `probe`: finds llama.cpp."""
        state_dir = settings.state_dir or default_state_dir()
        self._settings = settings
        self._threshold = parse_count(settings.distributed_threshold)
        self._shards = Shards(view, node_id, own_address)
        local = store or ModelStore(settings.model_dirs, state_dir)
        self._models = ClusterStore(local, view, self._shards, state_dir / "pipelines", own_address)
        self._coordinator = make(settings, node_id, self._shards.up)
        self._planner = make(settings, node_id, self._shards.lendable)
        self._backend = PipelineBackend(
            settings,
            self._models,
            self._shards,
            self._coordinator,
            self._planner,
            owns_store=store is None,
            probe=probe,
        )
        self.node_id = NodeId(f"{node_id}-pipelines")
        self._started_at = time.time()
        self._known: NodeState | None = None
        self._backend.on_change(self._changed)
        self._link = MemoryLink(self._backend.serve, self.state, "pipelines")
        self.peer = Peer(self._link)
        self._kept: dict[_Key, _Kept] = {}

    @property
    def store(self) -> ModelStore:
        """This host's models."""
        return self._models.local

    async def start(self) -> None:
        """Begin to look at this host's models, and load llama.cpp for vocabularies."""
        await self._backend.start()

    async def close(self) -> None:
        """End what runs, and give all stages back."""
        await self._link.close()
        await self._backend.close()
        await self._coordinator.close()
        await self._planner.close()

    def state(self) -> NodeState:
        """Return what it is as a node; made anew only when something changed."""
        if self._known is None:
            self._known = NodeState(
                node_id=self.node_id,
                backend=self._backend.state(),
                hostname=socket.gethostname(),
                version=__version__,
                roles=("proxy",),
                started_at=self._started_at,
            )
        return self._known

    def _changed(self) -> None:
        self._known = None

    @property
    def has_shards(self) -> bool:
        """True if at least one shard takes stages."""
        return any(not shard.state.draining for shard in self._shards.up())

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All that are open."""
        return self._coordinator.pipelines

    def info(self, name: str) -> ModelInfo | None:
        """Return what is known of a model without reading anything; None where nobody has it."""
        return self._models.info(name)

    async def decide(
        self, name: str, requested: bool | None, options: RunnerOptions, holders: Sequence[Holder]
    ) -> Decision:
        """Say whether a request goes over the shards. `holders` are the usable nodes that have the model.

        Raises ModelUnusable where nothing holds it, with the numbers; and where a split was asked for, whatever
        keeps it from being made.
        """
        key = (names.canonical(name), requested, options)
        kept = self._kept.get(key)
        if kept is None:
            while len(self._kept) >= MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            kept = self._kept[key] = _Kept()
        async with kept.lock:
            signature = tuple((shard.state.node_id, shard.state.draining) for shard in self._shards.up())
            if kept.outcome is None or kept.signature != signature or time.monotonic() >= kept.until:
                try:
                    kept.outcome = await self._decide(name, requested, options, holders)
                except OsyncError as error:
                    kept.outcome = error
                kept.signature, kept.until = signature, time.monotonic() + FRESH_S
            outcome = kept.outcome
        if isinstance(outcome, OsyncError):
            raise type(outcome)(*outcome.args)
        return outcome

    async def _decide(
        self, name: str, requested: bool | None, options: RunnerOptions, holders: Sequence[Holder]
    ) -> Decision:
        try:
            plan, decision = await self.explain(name, requested, options, holders)
        except NotSupported as error:  # it cannot be cut: whole, where somebody has it
            if not holders:
                raise
            return Decision(False, str(error), holders[0].id)
        except OsyncError as error:
            if requested or not holders:
                raise
            log.warning("split_not_decided", model=name, error=str(error))
            return Decision(False, str(error), holders[0].id)
        if isinstance(plan, NoPlan) and not decision.is_split:
            if requested:
                raise ModelUnusable(f"model '{name}' cannot be split: {plan.reason}")
            info = self._models.info(name)
            if not holders or (info is not None and is_beyond(info.size, holders)):
                raise ModelUnusable(f"model '{name}' fits no node, and not all shards together: {plan.reason}")
        log.info("split_decided", model=name, split=decision.is_split, reason=decision.reason)
        return decision

    async def explain(
        self, name: str, requested: bool | None, options: RunnerOptions, holders: Sequence[Holder]
    ) -> tuple[Plan | NoPlan, Decision]:
        """Plan a model and decide. Raises ModelNotFound, ModelUnusable, NotSupported, UpstreamError."""
        model = await self._models.find(name)
        settings = self._backend.runner_settings(model, options)
        if settings.embeds:
            raise NotSupported(f"{model.info.name} gives embeddings, which need all layers in one place")
        source = self._models.source(model)
        plan = await asyncio.to_thread(self._planner.plan, source, settings)
        if requested is None and self._backend.holds(model, options):
            return plan, Decision(True, "it is loaded so")
        speeds = [shard.lends.s_per_byte for shard in self._shards.up()]
        decision = when_to_split(
            shape(source, StageSettings(context_length=settings.context_length, kv_type=settings.kv_type)),
            as_hosts(holders, speeds),
            plan,
            # A node that is short of memory answers fewer requests at once, not none.
            Wish(context=settings.context_length, sequences=1),
            requested=requested,
            threshold=self._threshold,
        )
        if decision.is_split and not requested and not holders and isinstance(plan, Plan):
            decision = Decision(True, f"no node has it; {plan.reason}")
        return plan, decision
