"""Frozen values that more than one package speaks of. No behaviour, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NewType

NodeId = NewType("NodeId", str)
Headers = tuple[tuple[str, str], ...]
BackendKind = Literal["ollama", "engine", "none"]


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's first part. `target` is the path with its query, as the client wrote it."""

    method: str
    target: str
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer's first part; its body follows."""

    status: int
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as one node has it on disk. Sizes in bytes, times as RFC 3339 text."""

    name: str
    """Display name: the shortest form, always with its tag."""
    digest: str = ""
    size: int = 0
    modified_at: str = ""
    format: str = "gguf"
    family: str = ""
    families: tuple[str, ...] = ()
    architecture: str = ""
    parameter_size: str = ""
    quantization: str = ""
    context_length: int = 0
    embedding_length: int = 0
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that one node has in memory."""

    name: str
    digest: str = ""
    size: int = 0
    size_vram: int = 0
    expires_at: str = ""
    context_length: int = 0
    active: int = 0
    """Requests that it works on now."""
    queued: int = 0
    """Requests that wait for it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator; memory in bytes, 0 where unknown."""

    name: str
    memory_total: int = 0
    memory_free: int = 0


@dataclass(frozen=True, slots=True)
class HostLoad:
    """What a host's operating system says of itself. Memory in bytes."""

    cpu_percent: float = 0.0
    cpu_count: int = 1
    load_1m: float = 0.0
    memory_total: int = 0
    memory_free: int = 0
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """Something that llama.cpp can compute on; memory in bytes."""

    name: str
    """llama.cpp's own, such as CUDA0."""
    description: str = ""
    kind: str = ""
    """cpu, gpu, igpu or accel."""
    backend: str = ""
    """The part of llama.cpp that drives it, such as CUDA."""
    memory_total: int = 0
    memory_free: int = 0
    used: bool = False
    """True if the settings let models go there."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the installed llama.cpp was built with, and how the settings use it."""

    version: str = ""
    commit: str = ""
    system_info: str = ""
    """llama.cpp's line of instruction sets and options."""
    gpu_offload: bool = False
    mmap: bool = False
    mlock: bool = False
    rpc: bool = False
    flash_attention: str = ""
    """auto, on or off."""
    kv_cache_keys: str = ""
    kv_cache_values: str = ""
    numa: str = ""
    threads: int = 0
    devices: tuple[EngineDevice, ...] = ()


@dataclass(frozen=True, slots=True)
class BackendState:
    """What a backend knows of itself."""

    kind: BackendKind
    ok: bool = False
    error: str = ""
    """Why it is not ok, in words for a person."""
    version: str = ""
    models: tuple[ModelInfo, ...] = ()
    loaded: tuple[LoadedModel, ...] = ()
    slots: int = 1
    """Requests per loaded model that run at once."""
    active: int = 0
    queued: int = 0
    engine: EngineReport | None = None
    """Of an engine, once llama.cpp is loaded."""


@dataclass(frozen=True, slots=True)
class HeldStage:
    """A stage that a shard holds for a coordinator. Sizes in bytes."""

    pipeline: str
    owner: str
    """Node id of the coordinator's daemon."""
    model: str
    first: int
    last: int
    layers: int
    size: int = 0
    state: str = ""
    """waiting, fetching, loading, ready, failed, retained or standby: the last two yield to who needs the memory."""
    progress: float = 0.0
    """Of fetching, 0 to 1."""


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a shard lends. Memory in bytes."""

    engine: str = ""
    """Version of llama.cpp: stages of one pipeline need the same."""
    memory: int = 0
    memory_free: int = 0
    """Not held by stages that are used."""
    s_per_byte: float = 0.0
    """Measured time that a byte of weights takes in the evaluation of one token."""
    digests: tuple[str, ...] = ()
    """Of the models on its disk: it needs no other host to load their stages."""
    stages: tuple[HeldStage, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node pushes to each proxy: at once when it changes, and every second."""

    node_id: NodeId
    backend: BackendState
    hostname: str = ""
    version: str = ""
    roles: tuple[str, ...] = ()
    grpc_port: int = 0
    load: HostLoad = field(default_factory=HostLoad)
    draining: bool = False
    started_at: float = 0.0
    """Unix time."""
    shard: ShardState | None = None
    """Set where the daemon has the role."""
