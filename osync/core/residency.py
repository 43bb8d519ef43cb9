"""Which models stay in memory, and what each takes there. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model takes of a host's memory, in bytes."""

    weights: int = 0
    kv: int = 0
    compute: int = 0
    """Buffers of an evaluation."""
    file: Hashable = None
    """What is mapped: who maps the same file shares its weights. None: a copy of its own."""

    @property
    def own(self) -> int:
        """What nobody else could share, and unloading gives back."""
        return self.kv + self.compute + (self.weights if self.file is None else 0)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory, or on its way out."""

    key: Hashable
    footprint: Footprint
    users: int = 0
    last_used: float = 0.0
    is_leaving: bool = False


@dataclass(frozen=True, slots=True)
class Fits:
    """Load now; `room` is what the newcomer may take, in bytes."""

    room: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Let this one go as soon as nobody uses it, then ask again."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again when one of those that leave is gone."""


@dataclass(frozen=True, slots=True)
class Never:
    """It does not fit even alone; in bytes."""

    need: int
    limit: int


def together(footprints: Iterable[Footprint]) -> int:
    """Add up; a mapped file counts once, however many map it."""
    total = 0
    mapped: dict[Hashable, int] = {}
    for one in footprints:
        total += one.own
        if one.file is not None:
            mapped[one.file] = max(mapped.get(one.file, 0), one.weights)
    return total + sum(mapped.values())


def make_room(others: Sequence[Resident], newcomer: Footprint, limit: int, most: int) -> Fits | Unload | Wait | Never:
    """Decide what a model that is to be loaded needs first: the least recently used idle one goes first.

    `limit` is for all models together, `most` is how many there may be, at least 1. Where none is idle, the
    one that is used least recently goes when its requests have ended: who waits is never overtaken for ever.
    """
    if newcomer.total > limit:
        return Never(newcomer.total, limit)
    if _has_room(others, newcomer, limit, most):
        return Fits(limit - together(r.footprint for r in others))
    staying = [r for r in others if not r.is_leaving]
    if _has_room(staying, newcomer, limit, most):
        return Wait()
    return Unload(min(staying, key=lambda r: (r.users > 0, r.last_used)).key)


def _has_room(others: Sequence[Resident], newcomer: Footprint, limit: int, most: int) -> bool:
    return len(others) < most and together([*(r.footprint for r in others), newcomer]) <= limit
