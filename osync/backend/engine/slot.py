"""One model file in memory, or on its way there, and what it takes of the host's memory."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from osync.backend.engine.runner import EngineRunner
from osync.coordinator.runner import OVERHEAD, RunnerSettings
from osync.core.residency import Footprint
from osync.engine.embedding import is_encoder
from osync.engine.llama import KV_TYPES
from osync.engine.store import StoredModel
from osync.engine.template import ChatTemplate

_FAR_S = 200 * 365 * 86400.0  # how "forever" is written as a date


@dataclass(eq=False, slots=True)
class Slot:
    """One file in memory, or on its way there."""

    model: StoredModel
    """By the name that loaded it; aliases of the same file share it."""
    settings: RunnerSettings
    keep_alive_s: float
    ready: asyncio.Future[EngineRunner]
    file: tuple[int, int] | Path
    """What is mapped: two names of one file on disk share its pages."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is gone, or stays after all: who waits for its end looks again."""
    runner: EngineRunner | None = None
    templates: dict[str, ChatTemplate] = field(default_factory=dict)
    users: int = 0
    """Requests that hold it, also those that wait for its load."""
    last_used: float = 0.0
    timer: asyncio.TimerHandle | None = None
    is_closing: bool = False
    """Goes as soon as nobody uses it; new requests wait until it is gone."""
    is_unloading: bool = False

    def expires_at(self, now: float) -> float:
        """When it will be unloaded, as Unix time, if nobody asks for it any more."""
        if self.keep_alive_s == math.inf:
            return now + _FAR_S
        idle_s = time.monotonic() - self.last_used if self.users == 0 else 0.0
        return now + max(0.0, self.keep_alive_s - idle_s)

    def footprint(self) -> Footprint:
        """What it takes of the host's memory, once it is loaded."""
        if self.runner is None:
            return needed(self)
        total = max(0, self.runner.size_bytes - self.runner.size_vram)
        weights = min(total, sum(t.size_bytes for t in self.model.header.tensors))
        if self.runner.size_vram:  # the host keeps what was not offloaded, as a part of the whole
            weights = weights * total // max(1, self.runner.size_bytes)
        return Footprint(weights, total - weights, 0, self.file if self.settings.use_mmap else None)

    @property
    def active(self) -> int:
        """Requests that it works on."""
        return min(self.users, self.runner.parallel) if self.runner is not None else 0

    @property
    def queued(self) -> int:
        """Requests that wait for its load, or for one of its places."""
        return self.users - self.active


def needed(slot: Slot) -> Footprint:
    """Estimate what a model takes at least: its weights, one sequence's cache, and an evaluation's buffers."""
    header, settings = slot.model.header, slot.settings
    cells = 0 if is_encoder(header.architecture) else settings.context_length
    kv = int(header.kv_bytes_per_token() * KV_TYPES[settings.kv_type][1] / KV_TYPES["f16"][1]) * cells
    compute = OVERHEAD + 4 * settings.n_batch * cells
    return Footprint(slot.model.info.size, kv, compute, slot.file if settings.use_mmap else None)


def identity(path: Path) -> tuple[int, int] | Path:
    """Return what two names of one file have in common."""
    try:
        stat = path.stat()
    except OSError:  # the load will say so
        return path
    return stat.st_dev, stat.st_ino
