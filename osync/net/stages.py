"""Between the messages of osync.v1.Shard and the values of osync.core.stages. Pure; what comes in is checked."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, Final

from osync import errors
from osync.core.stages import Route, SlicePiece, StageOrder, StageReport, StageSettings, StageState
from osync.errors import OsyncError, UpstreamUnavailable, WireError
from osync.pb import shard_pb2 as pb

MAX_STAGES: Final = 64
MAX_IN_FLIGHT: Final = 256
MADE_UP_BYTES: Final = 64 << 20
"""Of a slice that no tensor of the model is: padding, and the vocabulary of a stage that has none."""
_DTYPES: Final = ("f32", "f16", "q8")
_ORDER: Final = (
    "pipeline",
    "owner",
    "model",
    "digest",
    "size",
    "first",
    "last",
    "layers",
    "standby",
    "weight_bytes",
    "kv_bytes",
)
_SETTINGS: Final = tuple(field.name for field in dataclasses.fields(StageSettings))
_REPORT: Final = tuple(field.name for field in dataclasses.fields(StageReport) if field.name != "state")
_ROUTE: Final = tuple(field.name for field in dataclasses.fields(Route) if field.name not in ("addresses", "cuts"))


def _pick(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def order_to(order: StageOrder) -> pb.HoldRequest:
    """Write an order."""
    settings = pb.StageSettings(**_pick(order.settings, _SETTINGS))
    pieces = [pb.SlicePiece(size=p.size, source=p.source, data=p.data, tensor=p.tensor) for p in order.pieces]
    return pb.HoldRequest(settings=settings, sources=order.sources, pieces=pieces, **_pick(order, _ORDER))


def order_from(source: pb.HoldRequest) -> StageOrder:
    """Read an order. Raises WireError where it makes no sense."""
    settings = StageSettings(**_pick(source.settings, _SETTINGS))
    pieces = tuple(
        SlicePiece(p.size, p.source if p.HasField("source") else None, p.data, p.tensor) for p in source.pieces
    )
    order = StageOrder(settings=settings, sources=tuple(source.sources), pieces=pieces, **_pick(source, _ORDER))
    digest = order.digest.removeprefix("sha256:")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise WireError("the digest of a stage's model is no SHA-256")
    if not 0 <= order.first < order.last <= order.layers <= 10_000:
        raise WireError(f"layers {order.first} to {order.last} of {order.layers} do not exist")
    if any((p.source is not None and p.source + p.size > order.size) or len(p.data) not in (0, p.size) for p in pieces):
        raise WireError("a piece of a slice is not within the model's file, or not as long as it says")
    if sum(p.size for p in pieces) > 2 * order.size + MADE_UP_BYTES:
        raise WireError("a slice is larger than its model")
    if not (order.pipeline and settings.context_length and settings.sequences and settings.n_batch):
        raise WireError("a stage's order lacks its pipeline, context length, sequences or batch")
    return order


def report_to(report: StageReport) -> pb.StageReport:
    """Write a report."""
    return pb.StageReport(state=report.state.value, **_pick(report, _REPORT))  # type: ignore[arg-type]


def report_from(source: pb.StageReport) -> StageReport:
    """Read a report. Raises WireError if its state is unknown."""
    try:
        state = StageState(source.state)
    except ValueError:
        raise WireError(f"a stage cannot be in state {source.state}") from None
    return StageReport(state=state, **_pick(source, _REPORT))


def route_to(route: Route) -> pb.FlowUp:
    """Write a route as the first message of a flow."""
    return pb.FlowUp(route=pb.Route(addresses=route.addresses, cuts=route.cuts, **_pick(route, _ROUTE)))


def route_from(message: pb.FlowUp) -> Route:
    """Read a route. Raises WireError."""
    if not message.HasField("route"):
        raise WireError("the first message of a flow must be its route")
    addresses, cuts = tuple(message.route.addresses), tuple(message.route.cuts)
    route = Route(addresses=addresses, cuts=cuts, **_pick(message.route, _ROUTE))
    if not route.pipeline or not 0 < len(route.addresses) <= MAX_STAGES or route.stage >= len(route.addresses):
        raise WireError("a route lacks its pipeline, or stages")
    if cuts and (len(cuts) != len(addresses) + 1 or any(a >= b for a, b in pairwise(cuts))):
        raise WireError("a route's cuts are not those of its stages")
    if route.activation_dtype not in _DTYPES or not 0 < route.in_flight <= MAX_IN_FLIGHT:
        raise WireError("a route's activation type or number of frames in flight is unknown")
    return route


def failure_to(stage: int, error: OsyncError) -> pb.FlowDown:
    """Write why an arrow is of no use any more; `stage` is out of reach, or refused."""
    failure = pb.FlowFailure(stage=stage, error=str(error) or "unknown error", error_kind=type(error).__name__)
    return pb.FlowDown(failure=failure)


def failure_from(source: pb.FlowFailure) -> tuple[OsyncError, int]:
    """Read why an arrow broke, and at which stage; a kind that this version does not know is UpstreamUnavailable."""
    kind = getattr(errors, source.error_kind, None)
    if not (isinstance(kind, type) and issubclass(kind, OsyncError)):
        kind = UpstreamUnavailable
    return kind(source.error), source.stage
