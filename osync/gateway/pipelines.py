"""Requests for models that may be split over shards: who decides, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from osync.cluster.view import Peer
from osync.config import parse_count
from osync.core.balancer import Candidate
from osync.core.planner import Decision
from osync.core.splitting import Holder, holder, is_plainly_whole, parameters_of
from osync.errors import NotSupported
from osync.types import ModelInfo, NodeId, NodeState
from osync.wire import names
from osync.wire.options import RunnerOptions, parse_options

if TYPE_CHECKING:
    from osync.coordinator.coordinator import PipelineStatus
    from osync.core.plan import NoPlan, Plan
    from osync.gateway.context import Context
    from osync.wire.request import Inference

NO_SHARD = "no shard is known: run `osyncd --role shard` on a host, and name it with --servers host:port"
TURNED_OFF = "distributed inference is turned off on this proxy (--no-distributed)"
PLAIN_S: Final = 5.0
PIN = "pipelines"
"""What X-Osync-Node may say for them, beside the node id."""


class Pipelines(Protocol):
    """This proxy's pipelines: one more node, and the decision who gets a request."""

    peer: Peer
    node_id: NodeId

    @property
    def has_shards(self) -> bool:
        """True if at least one shard takes stages."""
        ...

    @property
    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All that are open."""
        ...

    def info(self, name: str) -> ModelInfo | None:
        """Return what is known of a model; None where nobody has it."""
        ...

    async def decide(
        self, name: str, requested: bool | None, options: RunnerOptions, holders: Sequence[Holder]
    ) -> Decision:
        """Say whether a request goes over the shards. Raises OsyncError where it can be served in no way."""
        ...

    async def explain(
        self, name: str, requested: bool | None, options: RunnerOptions, holders: Sequence[Holder]
    ) -> tuple[Plan | NoPlan, Decision]:
        """Plan a model and decide."""
        ...


class Plain:
    """Remembers which models are plainly whole, as long as no node's models change: most requests end here."""

    def __init__(self) -> None:
        self._of: Sequence[Candidate] = ()
        self._known: dict[str, bool] = {}
        self._until = 0.0

    def find(self, candidates: Sequence[Candidate], model: str, now: float) -> bool | None:
        """Return what is remembered for these candidates, None for nothing. `now` in monotonic seconds."""
        if candidates is not self._of:
            # A candidate stays the same object as long as its node has the same models, on disk and in memory.
            if len(candidates) != len(self._of) or not all(map(is_, candidates, self._of)):
                self._known = {}
            self._of = candidates
        if now >= self._until:  # memory that others take is seen late, not never
            self._known, self._until = {}, now + PLAIN_S
        return self._known.get(model)

    def keep(self, model: str, is_whole: bool) -> None:
        """Remember it for the candidates of the last `find`."""
        if len(self._known) < 1024:
            self._known[model] = is_whole


async def choose(ctx: Context, request: Inference, model: str, pin: str, *, embeds: bool) -> bool:
    """Return True if a request goes to the pipelines. `model` is its canonical name; the pin is a node or "".

    Raises OsyncError where a split was asked for and cannot be had, or where nothing at all holds the model.
    """
    pipelines, asked = ctx.pipelines, request.distributed
    if not asked and not pin and (asked is False or not model or embeds):
        return False
    is_whole = None if asked else ctx.plain.find(ctx.replicas.of(ctx.view, ctx.drained), model, monotonic())
    if is_whole and not pin:
        return False
    if pipelines is None or not pipelines.has_shards:
        if asked:
            raise NotSupported(ctx.no_pipelines if pipelines is None else NO_SHARD)
        return False
    if pin:
        return pin in (PIN, pipelines.node_id)
    info = pipelines.info(model)
    if info is None:
        return False  # nobody says that they have it: nodes are asked, and say it best
    held = holders(ctx, model)
    if not asked and is_whole is None:
        is_whole = stays_whole(ctx, info, held)
        ctx.plain.keep(model, is_whole)
        if is_whole:
            return False
    options = parse_options({**request.pipeline_options, "num_ctx": request.num_ctx}).runner
    return (await pipelines.decide(request.model, asked, options, held)).is_split


def stays_whole(ctx: Context, info: ModelInfo, held: Sequence[Holder]) -> bool:
    """True if no plan is needed to know that a node serves the model."""
    threshold = parse_count(ctx.settings.distributed_threshold)
    return is_plainly_whole(info.size, parameters_of(info.parameter_size, info.size), held, threshold)


def holders(ctx: Context, model: str) -> list[Holder]:
    """Return the usable nodes that have a model, by canonical name."""
    found: list[Holder] = []
    for candidate in ctx.replicas.of(ctx.view, ctx.drained):
        node = ctx.replicas.find(candidate.node_id) if candidate.usable and model in candidate.present else None
        if node is not None:
            found.append(holder(node[0], is_loaded=model in candidate.loaded))
    return found


def as_node(ctx: Context) -> tuple[NodeState, Peer] | None:
    """Return the pipelines as one more node; None where there is no shard, and none is open."""
    pipelines = ctx.pipelines
    if pipelines is None:
        return None
    state = pipelines.peer.state
    if state is None or not (pipelines.has_shards or state.backend.loaded):
        return None
    return state, pipelines.peer


def has_loaded(state: NodeState, model: str) -> bool:
    """True if the model, by canonical name, is in memory there."""
    return any(names.key(loaded.name) == model for loaded in state.backend.loaded)
