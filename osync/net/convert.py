"""Between the messages of osync.v1.Node and the values of osync.types. Pure; what comes in is checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol, cast

from osync import errors
from osync.errors import CapacityError, OsyncError, UpstreamUnavailable, WireError
from osync.pb import node_pb2 as pb
from osync.types import (
    BackendKind,
    BackendState,
    Gpu,
    Headers,
    HostLoad,
    LoadedModel,
    ModelInfo,
    NodeId,
    NodeState,
    RequestHead,
    ResponseHead,
)

PROTOCOL: Final = 1
_BACKENDS: Final = ("ollama", "engine")
_UINT32: Final = 0xFFFF_FFFF
_KINDS: Final = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, OsyncError)
}
_MODEL: Final = (
    "name", "digest", "size", "modified_at", "format", "family", "architecture",
    "parameter_size", "quantization", "context_length", "embedding_length",
)  # fmt: skip
_LOADED: Final = ("name", "digest", "size", "size_vram", "expires_at", "context_length", "active")


class _Headers(Protocol):
    def add(self, *, name: bytes, value: bytes) -> object: ...


def fill_headers(target: _Headers, headers: Headers) -> None:
    """Append headers to a repeated field; text that stands for raw bytes becomes those bytes again."""
    for name, value in headers:
        target.add(name=name.encode("utf-8", "surrogateescape"), value=value.encode("utf-8", "surrogateescape"))


def headers_from(source: Iterable[pb.Header]) -> Headers:
    """Return headers as text; bytes that are no UTF-8 survive as surrogates."""
    return tuple(
        (h.name.decode("utf-8", "surrogateescape"), h.value.decode("utf-8", "surrogateescape")) for h in source
    )


def fill_open(target: pb.Open, head: RequestHead, body: bytes, more: bool) -> None:
    """Write a request's head, and its body where it is known."""
    target.method = head.method
    target.target = head.target.encode("utf-8", "surrogateescape")
    fill_headers(target.headers, head.headers)
    target.body = body
    target.more = more


def request_head(source: pb.Open) -> RequestHead:
    """Read a request's head."""
    target = source.target.decode("utf-8", "surrogateescape")
    return RequestHead(source.method, target, headers_from(source.headers))


def fill_head(target: pb.Head, head: ResponseHead) -> None:
    """Write an answer's head."""
    target.status = head.status
    fill_headers(target.headers, head.headers)


def response_head(source: pb.Head) -> ResponseHead:
    """Read an answer's head. Raises WireError if the status is none of HTTP's."""
    if not 100 <= source.status <= 599:
        raise WireError(f"status {source.status} does not exist")
    return ResponseHead(source.status, headers_from(source.headers))


def fill_end(target: pb.End, error: OsyncError | None) -> None:
    """Write how a direction ended."""
    target.SetInParent()
    if error is not None:
        target.error = str(error) or "unknown error"
        target.error_kind = type(error).__name__
        if isinstance(error, CapacityError):
            target.retry_after_s = error.retry_after_s


def error_from(source: pb.End) -> OsyncError | None:
    """Read how a direction ended; a kind that this version does not know is UpstreamUnavailable."""
    if not source.error and not source.error_kind:
        return None
    kind = _KINDS.get(source.error_kind, UpstreamUnavailable)
    if issubclass(kind, CapacityError):
        return kind(source.error, source.retry_after_s or 1.0)
    return kind(source.error)


def _pick(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def fill_state(target: pb.NodeState, state: NodeState) -> None:
    """Write a node's state."""
    target.node_id = state.node_id
    target.hostname = state.hostname
    target.version = state.version
    target.roles.extend(state.roles)
    target.grpc_port = state.grpc_port
    target.draining = state.draining
    target.started_at = state.started_at
    backend, source = target.backend, state.backend
    backend.kind = source.kind
    backend.ok = source.ok
    backend.error = source.error
    backend.version = source.version
    backend.slots = min(source.slots, _UINT32)
    backend.active = min(source.active, _UINT32)
    backend.queued = min(source.queued, _UINT32)
    for model in source.models:
        fields = _pick(model, _MODEL)
        backend.models.add(families=model.families, capabilities=model.capabilities, **fields)
    for loaded in source.loaded:
        backend.loaded.add(**_pick(loaded, _LOADED))
    load = state.load
    target.load.cpu_percent = load.cpu_percent
    target.load.cpu_count = load.cpu_count
    target.load.load_1m = load.load_1m
    target.load.memory_total = load.memory_total
    target.load.memory_free = load.memory_free
    for gpu in load.gpus:
        target.load.gpus.add(name=gpu.name, memory_total=gpu.memory_total, memory_free=gpu.memory_free)


def state_from(source: pb.NodeState) -> NodeState:
    """Read a node's state. Raises WireError if it has no id or a backend of an unknown kind."""
    backend = source.backend
    if not source.node_id:
        raise WireError("the node's state has no node id")
    if backend.kind not in _BACKENDS:
        raise WireError(f"the node's backend is of an unknown kind {backend.kind!r}")
    return NodeState(
        node_id=NodeId(source.node_id),
        hostname=source.hostname,
        version=source.version,
        roles=tuple(source.roles),
        grpc_port=source.grpc_port,
        draining=source.draining,
        started_at=source.started_at,
        backend=BackendState(
            kind=cast(BackendKind, backend.kind),
            ok=backend.ok,
            error=backend.error,
            version=backend.version,
            models=tuple(_models(backend.models)),
            loaded=tuple(LoadedModel(**_pick(loaded, _LOADED)) for loaded in backend.loaded),
            slots=backend.slots,
            active=backend.active,
            queued=backend.queued,
        ),
        load=HostLoad(
            cpu_percent=source.load.cpu_percent,
            cpu_count=source.load.cpu_count,
            load_1m=source.load.load_1m,
            memory_total=source.load.memory_total,
            memory_free=source.load.memory_free,
            gpus=tuple(Gpu(gpu.name, gpu.memory_total, gpu.memory_free) for gpu in source.load.gpus),
        ),
    )


def _models(source: Iterable[pb.ModelInfo]) -> Iterator[ModelInfo]:
    for model in source:
        yield ModelInfo(families=tuple(model.families), capabilities=tuple(model.capabilities), **_pick(model, _MODEL))
