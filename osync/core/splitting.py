"""Which requests need no plan at all: what is known of a model and of the nodes that have it decides at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from osync.config import parse_count
from osync.core.plan import Shard
from osync.errors import ConfigError
from osync.types import NodeState

_SMALLEST: Final = 2
"""Parameters per byte of the weights at most (four bits each), where their number is not told."""
_UNKNOWN: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Holder:
    """A node that has a model on disk. Bytes; 0: unknown."""

    id: str
    is_loaded: bool = False
    room: int = 0
    """For models: what is free, and what other models take that it may unload."""
    total: int = 0
    """All memory of the host and its GPUs."""
    s_per_byte: float = 0.0
    """Measured, where the daemon is a shard too; 0.0: unknown."""

    def may_hold(self, size: int) -> bool:
        """False only where it is known to be too small now."""
        return self.is_loaded or not self.room or size <= self.room

    def could_hold(self, size: int) -> bool:
        """False only where it would be too small even if it were empty."""
        return self.is_loaded or not self.total or size <= self.total


def holder(state: NodeState, *, is_loaded: bool) -> Holder:
    """Return what a node says of its memory."""
    load, gpus = state.load, state.load.gpus
    taken = sum(model.size for model in state.backend.loaded)
    known = load.memory_total > 0
    return Holder(
        state.node_id,
        is_loaded,
        load.memory_free + sum(gpu.memory_free for gpu in gpus) + taken if known else 0,
        load.memory_total + sum(gpu.memory_total for gpu in gpus) if known else 0,
        state.shard.s_per_byte if state.shard else 0.0,
    )


def parameters_of(text: str, size: int) -> int:
    """Return a model's number of parameters as its node writes it (7.6B); where it says none, the most that the
    bytes of its weights can be."""
    try:
        return parse_count(text)
    except ConfigError:
        return size * _SMALLEST


def is_plainly_whole(size: int, parameters: int, holders: Iterable[Holder], threshold: int) -> bool:
    """True if a node serves the model whole for sure: it is small, and one has it loaded or has room for it."""
    return parameters < threshold and any(one.may_hold(size) for one in holders)


def is_beyond(size: int, holders: Sequence[Holder]) -> bool:
    """True if not one of the nodes could ever hold it."""
    return not any(one.could_hold(size) for one in holders)


def as_hosts(holders: Iterable[Holder], speeds: Iterable[float]) -> list[Shard]:
    """Return nodes as the planner compares them. One whose speed nobody measured is taken to be as fast as the
    fastest shard: a model is split for speed only where that surely pays."""
    fastest = min((speed for speed in speeds if speed), default=1e-9)
    return [
        Shard(one.id, _UNKNOWN if one.is_loaded or not one.room else one.room, one.s_per_byte or fastest)
        for one in holders
    ]
