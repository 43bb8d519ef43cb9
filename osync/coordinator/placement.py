"""From what shards report to the stages that they are asked to hold. Pure, but for the clock of who calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from osync.coordinator.pipeline import Placed, Remains
from osync.core.plan import Layer, Link, Network, NoPlan, Plan, Shape, Shard, Wish
from osync.core.planner import make_plan
from osync.core.stages import StageOrder, StageSettings
from osync.engine.cutting import cut_rules, layer_costs
from osync.engine.gguf import GGUFHeader
from osync.engine.llama import KV_TYPES
from osync.engine.slice import plan_slice
from osync.errors import ModelUnusable, NotSupported
from osync.types import NodeState, ShardState

RESERVE = 64 << 20
"""Bytes of compute buffers that a stage takes beside weights and KV cache, roughly."""
ABOUT_AS_FAST = 1.03
SAMPLED_SHARE = 1 / 6
"""Of all rows that are evaluated, those that are sampled, and so go through the output layer: prompts are longer than
answers."""
OVERHEAD_S = 0.001
"""Of each stage for each token: queue, callback, message."""
YIELDING = ("retained", "standby")
"""States of held stages whose memory is free for whoever needs it."""


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
    """Cut a model over the shards that are left; `mine` is the pipeline whose own stages may be given up for it.

    Only shards with the same version of llama.cpp serve together.
    """
    usable = [peer for peer in peers if peer.address not in without and _lends(demand, peer)]
    engines = sorted({peer.lends.engine for peer in usable})
    groups = [[peer for peer in usable if peer.lends.engine == engine] for engine in engines] or [[]]
    found = [_plan(demand, group, mine) for group in groups]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    if plans:
        return min(plans, key=lambda plan: plan.bottleneck_s if plan.objective == "throughput" else plan.token_s)
    best = max((plan for plan in found if isinstance(plan, NoPlan)), key=lambda plan: plan.lent_bytes)
    if len(engines) == 1 or not engines:
        return best
    versions = ", ".join(engines)
    return replace(
        best,
        reason=f"{best.reason}; shards with different versions of llama.cpp ({versions}) cannot serve together: "
        "install the same version on all",
    )


def _lends(demand: Demand, peer: ShardPeer) -> bool:
    is_wanted = not demand.shards or peer.is_called(demand.shards)
    return is_wanted and not peer.state.draining and bool(peer.lends.engine)


def _rounded(s_per_byte: float, fastest: float) -> float:
    """Return a shard's speed by halves of the fastest's: equal hosts are measured a little different each time, and
    should get the same layers after every start, which lie on their disks."""
    return fastest * max(1.0, round(2 * s_per_byte / fastest) / 2)


def _plan(demand: Demand, peers: Sequence[ShardPeer], mine: str) -> Plan | NoPlan:
    fastest = min((peer.lends.s_per_byte for peer in peers if peer.lends.s_per_byte > 0), default=1e-9)
    shards = [
        Shard(
            peer.address,
            peer.lends.memory_free + _given_up(peer, mine),
            _rounded(peer.lends.s_per_byte, fastest),
            output_s_per_byte=_rounded(peer.lends.s_per_byte, fastest) * SAMPLED_SHARE,
            reserve_bytes=RESERVE if peer.lends.memory > 4 * RESERVE else 0,
        )
        for peer in peers
    ]
    trips = {peer.address: peer.round_trip_s for peer in peers}
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
    whole, network = shape(demand.model, settings), Network(links)
    found = make_plan(whole, shards, network, wish)
    if isinstance(found, NoPlan) or wish.objective == "throughput":
        return found
    # Equal hosts give one stream the same time however they share the layers; several streams want equal shares.
    count = len(found.stages)
    even = make_plan(whole, shards, network, replace(wish, objective="throughput", min_stages=count, max_stages=count))
    if isinstance(even, Plan) and even.token_s <= found.token_s * ABOUT_AS_FAST:
        return replace(even, objective=found.objective, reason=found.reason, alternatives=found.alternatives)
    return found


def _given_up(peer: ShardPeer, pipeline: str) -> int:
    """Return the bytes that a shard has for the pipeline once its stages are given up, beside what is free anyway."""
    if not pipeline:
        return 0
    return sum(s.size for s in peer.lends.stages if s.pipeline == pipeline and s.state not in YIELDING)


def place(
    demand: Demand,
    peers: Sequence[ShardPeer],
    remains: Remains,
    *,
    pipeline: str,
    owner: str,
    without: Collection[str] = (),
) -> list[Placed]:
    """Return the stages and their shards: those still held, with standbys and spare shards for the rest where that
    is possible, else a new plan. Raises ModelUnusable with the numbers."""
    kept = [stage for stage in remains.held if stage.address not in without]
    standby = [stage for stage in remains.standby if stage.address not in without]
    if kept and (filled := _fill(demand, peers, kept, standby, pipeline=pipeline, owner=owner, without=without)):
        return filled
    found = plan(demand, peers, without=without, mine=pipeline)
    if isinstance(found, NoPlan):
        raise ModelUnusable(f"{demand.model.name} {found.reason}")
    return [
        Placed(stage.shard, order(demand, peers, pipeline, owner, stage.first, stage.last)) for stage in found.stages
    ]


def _fill(
    demand: Demand, peers: Sequence[ShardPeer], kept: Sequence[Placed], standby: Sequence[Placed], *, pipeline: str,
    owner: str, without: Collection[str],
) -> list[Placed]:  # fmt: skip
    """Give what is between kept stages to standbys, and what then is left to spare shards, the fastest that has
    room; [] where there is none."""
    spare = _spare(demand, peers, kept, without)
    stages: list[Placed] = []
    at, layers = 0, demand.model.header.block_count
    for stage in (*sorted(kept, key=lambda stage: stage.order.first), None):
        end = stage.order.first if stage else layers
        while at < end:
            ready = next((s for s in standby if s.order.first == at and s.order.last <= end), None)
            if ready is not None:
                stages.append(Placed(ready.address, replace(ready.order, standby=False)))
                at = ready.order.last
                continue
            last = min((s.order.first for s in standby if at < s.order.first and s.order.last <= end), default=end)
            need = stage_bytes(demand, at, last)
            taken = {s.address for s in stages}
            peer = next((p for p in spare if p.lends.memory_free >= need and p.address not in taken), None)
            if peer is None:
                return []
            stages.append(Placed(peer.address, order(demand, peers, pipeline, owner, at, last)))
            at = last
        if stage is not None:
            stages.append(stage)
            at = stage.order.last
    return stages


def _spare(
    demand: Demand, peers: Sequence[ShardPeer], stages: Sequence[Placed], without: Collection[str]
) -> list[ShardPeer]:
    """Return the shards that hold none of the stages and fit to them, the fastest first."""
    busy = {stage.address for stage in stages}
    engines = {peer.lends.engine for peer in peers if peer.address in busy}
    return sorted(
        (
            p
            for p in peers
            if p.address not in busy
            and p.address not in without
            and _lends(demand, p)
            and (not engines or p.lends.engine in engines)
        ),
        key=lambda peer: peer.lends.s_per_byte,
    )


def standbys(
    demand: Demand,
    peers: Sequence[ShardPeer],
    stages: Sequence[Placed],
    standby: Sequence[Placed],
    *,
    without: Collection[str] = (),
) -> list[Placed]:
    """Return the stages that spare shards should hold in reserve, one for each stage as far as memory is free: those
    that they do already, then the largest first, where most is left. Stages of shards that leave come before all."""
    spare = {peer.address: peer for peer in _spare(demand, peers, stages, without)}
    leaving = {peer.address for peer in peers if peer.state.draining}
    room = {
        address: peer.lends.memory_free - sum(s.size for s in peer.lends.stages if s.state == "standby")
        for address, peer in spare.items()
    }
    orders = {stage.order for stage in stages}
    chosen = [stage for stage in standby if stage.address in spare and stage.order in orders]
    covered = {stage.order for stage in chosen}
    wanted = [(stage, stage_bytes(demand, stage.order.first, stage.order.last) + RESERVE) for stage in stages]
    for stage, need in sorted(wanted, key=lambda entry: (entry[0].address not in leaving, -entry[1])):
        address = max(room, key=lambda address: room[address], default="")
        if stage.order not in covered and address and room[address] >= need:
            room[address] -= need
            chosen.append(Placed(address, replace(stage.order, standby=True)))
    return chosen


def stage_bytes(demand: Demand, first: int, last: int) -> int:
    """Return the memory that layers [first, last) take, with their KV cache."""
    tokens = demand.settings.context_length * demand.settings.sequences
    return layer_costs(demand.model.header).stage_bytes(first, last, tokens, KV_TYPES[demand.settings.kv_type][1])


def order(
    demand: Demand, peers: Sequence[ShardPeer], pipeline: str, owner: str, first: int, last: int
) -> StageOrder:  # fmt: skip
    """Return the order for layers [first, last)."""
    model, settings = demand.model, demand.settings
    costs = layer_costs(model.header)
    weights = costs.stage_bytes(first, last)
    tokens = settings.context_length * settings.sequences
    there = [peer.address for peer in peers if model.digest in peer.lends.digests]
    return StageOrder(
        pipeline=pipeline,
        owner=owner,
        model=model.name,
        digest=model.digest,
        size=model.size,
        first=first,
        last=last,
        layers=model.header.block_count,
        settings=settings,
        sources=tuple(dict.fromkeys((*there, *model.sources))),
        pieces=plan_slice(model.header, first, last).pieces,
        weight_bytes=weights,
        kv_bytes=costs.stage_bytes(first, last, tokens, KV_TYPES[settings.kv_type][1]) - weights,
    )
