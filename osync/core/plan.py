"""What the planner is told and what it answers: models, shards, links, stages. Bytes and seconds throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

Objective = Literal["latency", "throughput"]
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model."""

    weight_bytes: int
    kv_bytes_per_token: int
    read_bytes: int | None = None
    """Weights that one token touches, where it is not all (mixture of experts)."""

    @property
    def work(self) -> int:
        """Bytes of weights that a token reads."""
        return self.weight_bytes if self.read_bytes is None else self.read_bytes


@dataclass(frozen=True)
class Shape:
    """A model as the planner sees it, from the header of its file."""

    layers: tuple[Layer, ...]
    embedding_bytes: int = 0
    """On the first stage; a look-up, no work."""
    output_bytes: int = 0
    """On the last stage, which reads it all for each sampled token."""
    tied: bool = False
    """Output and embedding are one tensor: a stage that is both holds it once."""
    cuts: frozenset[int] | None = None
    """Layers that a stage may begin with; None: any."""
    parameters: int = 0

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(layer.weight_bytes for layer in self.layers) + self.ends(True, True)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of a KV cache of so many tokens, all layers."""
        return sum(layer.kv_bytes_per_token for layer in self.layers) * tokens

    def ends(self, is_first: bool, is_last: bool) -> int:
        """Return the bytes that a stage holds for being at an end of the model."""
        if is_first and is_last and self.tied:
            return max(self.embedding_bytes, self.output_bytes)
        return self.embedding_bytes * is_first + self.output_bytes * is_last

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where stages may begin and end, 0 and the number of layers included."""
        end = len(self.layers)
        if self.cuts is None:
            return tuple(range(end + 1))
        return tuple(sorted({0, end} | {cut for cut in self.cuts if 0 < cut < end}))

    @cached_property
    def work_before(self) -> tuple[int, ...]:
        """Bytes that a token reads in all layers before each layer."""
        return tuple(accumulate((layer.work for layer in self.layers), initial=0))

    @cached_property
    def weights_before(self) -> tuple[int, ...]:
        """Bytes of weights of all layers before each layer."""
        return tuple(accumulate((layer.weight_bytes for layer in self.layers), initial=0))

    @cached_property
    def kv_before(self) -> tuple[int, ...]:
        """Bytes of KV cache for one token in all layers before each layer."""
        return tuple(accumulate((layer.kv_bytes_per_token for layer in self.layers), initial=0))


@dataclass(frozen=True, slots=True)
class Shard:
    """One host that lends memory and compute."""

    id: str
    memory_bytes: int
    s_per_byte: float
    """Measured: seconds a token for each byte of weights that it reads."""
    output_s_per_byte: float | None = None
    """The same for the output layer, where it was measured apart."""
    reserve_bytes: int = 0
    """What a stage takes beside weights and KV cache: compute buffers."""
    priority: int = 0
    """Lower ones are used only where all higher ones together do not suffice."""
    is_excluded: bool = False

    @property
    def room(self) -> int:
        """Bytes for weights and KV cache."""
        return max(0, self.memory_bytes - self.reserve_bytes)

    @property
    def output_rate(self) -> float:
        """Seconds a byte of the output layer."""
        return self.s_per_byte if self.output_s_per_byte is None else self.output_s_per_byte


@dataclass(frozen=True, slots=True)
class Link:
    """A measured way between two hosts."""

    round_trip_s: float = 0.0
    bytes_per_s: float = float("inf")

    def hop_s(self, size: int) -> float:
        """Return the time one way of a message of `size` bytes."""
        return self.round_trip_s / 2 + size / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Network:
    """Links by pairs of shard ids, in either order."""

    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default: Link = field(default_factory=Link)

    def link(self, one: str, other: str) -> Link:
        """Return the link between two shards; one to itself costs nothing."""
        if one == other:
            return Link()
        return self.links.get((one, other)) or self.links.get((other, one)) or self.default


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a pipeline."""

    context: int
    """Tokens of one sequence."""
    sequences: int = 1
    objective: Objective = "latency"
    """`latency`: least time a token for one stream. `throughput`: shortest slowest stage or link, then latency."""
    min_stages: int = 1
    max_stages: int | None = None
    shards: frozenset[str] | None = None
    """Only these; None: any."""
    activation_bytes: int = 0
    """Of one token between two stages."""
    overhead_s: float = 0.0
    """Of each stage for each token, whatever its layers: queue, callback, message."""
    relay: str | None = None
    """Set where tokens return to the first stage by a coordinator; its id in the network."""

    @property
    def tokens(self) -> int:
        """Tokens of KV cache."""
        return self.context * self.sequences


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [first, last) on one shard."""

    shard: str
    first: int
    last: int
    weight_bytes: int
    kv_bytes: int
    predicted_s: float
    """Compute and overhead for one token."""
    hop_s: float
    """One way to the next stage; from the last one back to the first."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """The best found with another number of stages."""

    stages: int
    token_s: float
    bottleneck_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in order, and what they promise."""

    stages: tuple[Stage, ...]
    objective: Objective
    token_s: float
    """One stream's time for a token."""
    bottleneck_s: float
    """The slowest stage or link: many streams get a token each so often."""
    reason: str
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Nothing holds the model; `reason` has the numbers and says what would help."""

    reason: str
    needed_bytes: int
    lent_bytes: int


def gib(size: float) -> str:
    """Return a size for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def milliseconds(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds * 1000:.1f} ms" if seconds >= 1e-4 or not seconds else f"{seconds * 1e6:.1f} µs"
