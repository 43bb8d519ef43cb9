"""From what shards report to the stages that they are asked to hold. Pure, but for the clock of who calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from osync.coordinator.pipeline import Placed
from osync.core.plan import Layer, Link, Network, NoPlan, Plan, Shape, Shard, Wish
from osync.core.planner import make_plan
from osync.core.stages import StageOrder, StageSettings
from osync.engine.cutting import cut_rules, layer_costs
from osync.engine.gguf import GGUFHeader
from osync.engine.llama import KV_TYPES
from osync.errors import ModelUnusable, NotSupported
from osync.types import NodeState, ShardState

RESERVE = 64 << 20
"""Bytes of compute buffers that a stage takes beside weights and KV cache, roughly."""
OVERHEAD_S = 0.001
"""Of each stage for each token: queue, callback, message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that may be cut."""

    name: str
    digest: str
    """Of the file, or of the Ollama manifest whose weights it is."""
    size: int
    """Of the weights' file, in bytes."""
    header: GGUFHeader
    vocabulary: Path
    """A GGUF whose vocabulary llama.cpp can load: the file itself, or only its header."""
    sources: tuple[str, ...] = ()
    """host:port of daemons that have the file."""


@dataclass(frozen=True, slots=True)
class ShardPeer:
    """A shard as a coordinator sees it."""

    address: str
    state: NodeState
    round_trip_s: float = 0.0

    @property
    def lends(self) -> ShardState:
        """What it says as a shard."""
        return self.state.shard or ShardState()

    def is_called(self, names: Collection[str]) -> bool:
        """True if one of the names is its address, node id or host name."""
        return not {self.address, self.state.node_id, self.state.hostname}.isdisjoint(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a pipeline is to be."""

    model: ModelSource
    settings: StageSettings
    stages: int = 0
    """At most so many; 0: any number."""
    shards: tuple[str, ...] = ()
    """Only these, by address, node id or host name; none: all."""


def shape(model: ModelSource, settings: StageSettings) -> Shape:
    """Return what the planner needs to know of a model. Raises NotSupported where it cannot be cut."""
    rules = cut_rules(model.header)
    if rules.is_whole:
        raise NotSupported(f"{model.name} cannot be split over shards: {rules.reason}")
    costs = layer_costs(model.header)
    value_bytes = KV_TYPES[settings.kv_type][1]
    layers = tuple(
        Layer(weights, costs.cache_bytes(number, 1, value_bytes)) for number, weights in enumerate(costs.layers)
    )
    output = any(tensor.name == "output.weight" for tensor in model.header.tensors)
    return Shape(
        layers,
        embedding_bytes=costs.embedding,
        output_bytes=costs.output,
        tied=not output,
        cuts=frozenset(rules.points),
        parameters=model.header.parameter_count,
    )


def plan(demand: Demand, peers: Sequence[ShardPeer], *, without: Collection[str] = (), mine: str = "") -> Plan | NoPlan:
    """Cut a model over the shards that are left; `mine` is the pipeline whose own stages may be given up for it."""
    usable = [peer for peer in peers if peer.address not in without and not peer.state.draining and peer.lends.engine]
    if demand.shards:
        usable = [peer for peer in usable if peer.is_called(demand.shards)]
    shards = [
        Shard(
            peer.address,
            peer.lends.memory_free + sum(s.size for s in peer.lends.stages if mine and s.pipeline == mine),
            peer.lends.s_per_byte or 1e-9,
            reserve_bytes=RESERVE if peer.lends.memory > 4 * RESERVE else 0,
        )
        for peer in usable
    ]
    trips = {peer.address: peer.round_trip_s for peer in usable}
    # Between two shards: no round trip is measured, and it is about that to the farther one.
    links = {(a, b): Link(max(trips[a], trips[b])) for a in trips for b in trips if a < b}
    settings = demand.settings
    width = demand.model.header.embedding_length
    wish = Wish(
        context=settings.context_length,
        sequences=settings.sequences,
        objective="throughput" if demand.stages > 1 else "latency",
        min_stages=1 if demand.stages == 1 or len(shards) < 2 else 2,
        max_stages=demand.stages or None,
        activation_bytes=width * 4,
        overhead_s=OVERHEAD_S,
    )
    return make_plan(shape(demand.model, settings), shards, Network(links), wish)


def place(
    demand: Demand,
    peers: Sequence[ShardPeer],
    *,
    pipeline: str,
    owner: str,
    failed: Collection[str] = (),
    held: Sequence[Placed] = (),
) -> list[Placed]:
    """Return the stages and their shards: those still held and spare shards for the rest where that is possible,
    else a new plan. Raises ModelUnusable with the numbers."""
    kept = [stage for stage in held if stage.address not in failed]
    if kept and (filled := _fill(demand, peers, kept, pipeline=pipeline, owner=owner, failed=failed)):
        return filled
    found = plan(demand, peers, without=failed, mine=pipeline)
    if isinstance(found, NoPlan):
        raise ModelUnusable(f"{demand.model.name} {found.reason}")
    return [
        Placed(stage.shard, order(demand, pipeline, owner, stage.first, stage.last)) for stage in found.stages
    ]  # fmt: skip


def _fill(
    demand: Demand, peers: Sequence[ShardPeer], kept: Sequence[Placed], *, pipeline: str, owner: str,
    failed: Collection[str],
) -> list[Placed]:  # fmt: skip
    """Give each gap between kept stages to a spare shard, the fastest that has room; [] where one has none."""
    layers = demand.model.header.block_count
    costs = layer_costs(demand.model.header)
    value_bytes = KV_TYPES[demand.settings.kv_type][1]
    tokens = demand.settings.context_length * demand.settings.sequences
    busy = {stage.address for stage in kept}
    spare = sorted(
        (p for p in peers if p.address not in failed and p.address not in busy and not p.state.draining
         and p.lends.engine and (not demand.shards or p.is_called(demand.shards))),
        key=lambda peer: peer.lends.s_per_byte,
    )  # fmt: skip
    stages: list[Placed] = []
    at = 0
    for stage in sorted(kept, key=lambda stage: stage.order.first):
        gap, at = (at, stage.order.first), stage.order.last
        if gap[0] < gap[1]:
            stages.append(Placed("", order(demand, pipeline, owner, *gap)))
        stages.append(stage)
    if at < layers:
        stages.append(Placed("", order(demand, pipeline, owner, at, layers)))
    filled: list[Placed] = []
    for stage in stages:
        if not stage.address:
            need = costs.stage_bytes(stage.order.first, stage.order.last, tokens, value_bytes)
            peer = next((p for p in spare if p.lends.memory_free >= need), None)
            if peer is None:
                return []
            spare.remove(peer)
            stage = Placed(peer.address, stage.order)
        filled.append(stage)
    return filled


def order(demand: Demand, pipeline: str, owner: str, first: int, last: int) -> StageOrder:
    """Return the order for layers [first, last)."""
    model = demand.model
    return StageOrder(
        pipeline=pipeline,
        owner=owner,
        model=model.name,
        digest=model.digest,
        size=model.size,
        first=first,
        last=last,
        layers=model.header.block_count,
        settings=demand.settings,
        sources=model.sources,
    )
