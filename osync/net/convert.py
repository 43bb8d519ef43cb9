"""Between the messages of osync.v1.Node and the values of osync.types. Pure; what comes in is checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Final, cast

from osync import errors
from osync.errors import CapacityError, OsyncError, UpstreamUnavailable, WireError
from osync.pb import node_pb2 as pb
from osync.types import (
    BackendKind,
    BackendState,
    EngineDevice,
    EngineReport,
    Gpu,
    Headers,
    HeldStage,
    HostLoad,
    LoadedModel,
    ModelInfo,
    NodeId,
    NodeState,
    RequestHead,
    ResponseHead,
    ShardState,
)

PROTOCOL: Final = 1
_BACKENDS: Final = ("ollama", "engine", "none")
_UINT32: Final = 0xFFFF_FFFF
_KINDS: Final = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, OsyncError)
}
_MODEL: Final = (
    "name", "digest", "size", "modified_at", "format", "family", "architecture",
    "parameter_size", "quantization", "context_length", "embedding_length",
)  # fmt: skip
_STAGE: Final = ("pipeline", "owner", "model", "first", "last", "layers", "size", "state", "progress")
_SHARD: Final = ("engine", "memory", "memory_free", "s_per_byte")
_LOADED: Final = ("name", "digest", "size", "size_vram", "expires_at", "context_length", "active", "queued")

_ENGINE: Final = (
    "version", "commit", "system_info", "gpu_offload", "mmap", "mlock", "rpc",
    "flash_attention", "kv_cache_keys", "kv_cache_values", "numa", "threads",
)  # fmt: skip
_DEVICE: Final = ("name", "description", "kind", "backend", "memory_total", "memory_free", "used")


def join_headers(headers: Headers) -> bytes:
    """Return headers as the bytes that they came as. Raises WireError if one holds a line feed."""
    if not headers:
        return b""
    text = "\n".join(chain.from_iterable(headers))
    if text.count("\n") != 2 * len(headers) - 1:
        raise WireError("a header holds a line feed")
    return text.encode("utf-8", "surrogateescape")


def split_headers(data: bytes) -> Headers:
    """Return headers as text; bytes that are no UTF-8 survive as surrogates. Raises WireError if one lacks a value."""
    if not data:
        return ()
    parts = data.decode("utf-8", "surrogateescape").split("\n")
    if len(parts) % 2:
        raise WireError("a header has no value")
    names = iter(parts)
    return tuple(zip(names, names, strict=True))


def request_head(source: pb.Frame) -> RequestHead:
    """Read a request's head. Raises WireError."""
    return RequestHead(source.method, source.target.decode("utf-8", "surrogateescape"), split_headers(source.headers))


def response_head(source: pb.Frame) -> ResponseHead:
    """Read an answer's head. Raises WireError, also if the status is none of HTTP's."""
    status = source.status
    if not 100 <= status <= 599:
        raise WireError(f"status {status} does not exist")
    return ResponseHead(status, split_headers(source.headers))


def fill_end(target: pb.Frame, error: OsyncError | None) -> None:
    """Write how a direction ended."""
    target.end = True
    if error is not None:
        failure = target.failure
        failure.error = str(error) or "unknown error"
        failure.error_kind = type(error).__name__
        if isinstance(error, CapacityError):
            failure.retry_after_s = error.retry_after_s


def error_from(source: pb.Frame) -> OsyncError | None:
    """Read how a direction ended; a kind that this version does not know is UpstreamUnavailable."""
    if not source.HasField("failure"):
        return None
    failure = source.failure
    kind = _KINDS.get(failure.error_kind, UpstreamUnavailable)
    if issubclass(kind, CapacityError):
        return kind(failure.error, failure.retry_after_s or 1.0)
    return kind(failure.error)


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
    if source.engine is not None:
        backend.engine.SetInParent()
        backend.engine.MergeFrom(pb.EngineReport(**_pick(source.engine, _ENGINE)))
        for device in source.engine.devices:
            backend.engine.devices.add(**_pick(device, _DEVICE))
    if state.shard is not None:
        target.shard.SetInParent()
        target.shard.MergeFrom(pb.ShardState(digests=state.shard.digests, **_pick(state.shard, _SHARD)))
        for stage in state.shard.stages:
            target.shard.stages.add(**_pick(stage, _STAGE))
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
            engine=_engine(backend.engine) if backend.HasField("engine") else None,
        ),
        load=HostLoad(
            cpu_percent=source.load.cpu_percent,
            cpu_count=source.load.cpu_count,
            load_1m=source.load.load_1m,
            memory_total=source.load.memory_total,
            memory_free=source.load.memory_free,
            gpus=tuple(Gpu(gpu.name, gpu.memory_total, gpu.memory_free) for gpu in source.load.gpus),
        ),
        shard=_shard(source.shard) if source.HasField("shard") else None,
    )


def _shard(source: pb.ShardState) -> ShardState:
    stages = tuple(HeldStage(**_pick(stage, _STAGE)) for stage in source.stages)
    return ShardState(digests=tuple(source.digests), stages=stages, **_pick(source, _SHARD))


def _models(source: Iterable[pb.ModelInfo]) -> Iterator[ModelInfo]:
    for model in source:
        yield ModelInfo(families=tuple(model.families), capabilities=tuple(model.capabilities), **_pick(model, _MODEL))


def _engine(source: pb.EngineReport) -> EngineReport:
    devices = tuple(EngineDevice(**_pick(device, _DEVICE)) for device in source.devices)
    return EngineReport(devices=devices, **_pick(source, _ENGINE))
