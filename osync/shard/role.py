"""The shard role: what it lends, the stages that it holds, and how it is."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil
import structlog

from osync.config import Settings, default_state_dir
from osync.core.memory import budget
from osync.core.plan import gib
from osync.core.stages import Route, StageOrder, StageReport, StageState
from osync.engine.devices import LoadSettings
from osync.engine.slices import SliceCache
from osync.engine.store import ModelStore
from osync.errors import CapacityError, StageLost
from osync.net.shard_service import Downstream
from osync.net.tasks import Tasks
from osync.shard.epoch import Door
from osync.shard.held import Held, Host
from osync.shard.speed import Speed, measure
from osync.types import HeldStage, ShardState

log = structlog.get_logger("osync.shard")

RETAIN_S: Final = 5.0
"""How long a stage without a lease is kept for the pipeline's next epoch."""
STATE_S: Final = 1.0
SCAN_S: Final = 2.0


def _disk_bytes(folder: Path) -> int:
    """Return the size of the disk that a folder is on, or will be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).total


class ShardRole:
    """Holds stages for coordinators (a `Shard` of net.shard_service)."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        *,
        watches: bool,
        engine: str,
        load: LoadSettings,
        available_memory: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
    ) -> None:
        state_dir = settings.state_dir or default_state_dir()
        self._settings = settings
        self._store = store
        self._watches = watches
        self._stop = threading.Event()
        self._engine = engine
        self._lends = budget(settings.memory, available_memory())
        self._speed = Speed(0.0)
        self._held: list[Held] = []
        self._promised: dict[int, int] = {}
        self._listeners: list[Callable[[], None]] = []
        self._state: ShardState | None = None
        self._draining = False
        self._tasks = Tasks("shard")
        self._host = Host(
            find=self.find,
            slices=SliceCache(state_dir / "slices", budget(settings.slice_cache, _disk_bytes(state_dir))),
            reserve=self._reserve,
            load=replace(load),
            threads=settings.threads,
            engine=engine,
            changed=self._changed,
        )
        self.hostname = socket.gethostname()

    @property
    def store(self) -> ModelStore:
        """The models on this host."""
        return self._store

    async def start(self) -> None:
        """Measure, and begin to report."""
        self._speed = Speed(await asyncio.to_thread(measure))
        await self._host.slices.trim()
        self._tasks.spawn("refresh", self._refresh())
        if self._watches:
            await asyncio.to_thread(self._store.scan)
            self._tasks.spawn("watch", self._watch())
        log.info("shard_lends", memory=gib(self._lends), engine=self._engine,
                 gb_per_s=round(1e-9 / self._speed.s_per_byte, 2))  # fmt: skip
        self._changed()

    async def close(self) -> None:
        """Free all stages."""
        self._draining = True
        self._stop.set()
        await self._tasks.close()
        held, self._held = self._held, []
        await asyncio.gather(*(stage.close() for stage in held))

    def state(self) -> ShardState:
        """Return what it tells coordinators."""
        if self._state is None:
            self._state = ShardState(
                engine=self._engine,
                memory=self._lends,
                memory_free=0 if self._draining else max(0, self._lends - sum(self._promised.values())),
                s_per_byte=self._speed.s_per_byte,
                digests=tuple(sorted({model.info.digest for model in self._store.models})),
                stages=tuple(_shown(held) for held in self._held),
            )
        return self._state

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever `state()` would answer something new."""
        self._listeners.append(notify)

    def drain(self) -> None:
        """Lend nothing more; coordinators move their stages away."""
        self._draining = True
        self._changed()

    def find(self, digest: str) -> Path | None:
        """Return the file of a model by its digest, or by that of its weights in an Ollama store."""
        return self._store.find_blob(digest)

    async def hold(self, order: StageOrder) -> AsyncGenerator[StageReport, None]:
        """Load and hold a stage; one that is still here from an epoch before is taken as it is."""
        held = next((h for h in self._held if h.order == order and h.state is not StageState.FAILED), None)
        if held is None:
            held = Held(order, self._host)
            self._held.append(held)
        held.leases += 1
        self._changed()
        try:
            async for report in held.reports():
                yield report
        finally:
            held.leases -= 1
            if not held.leases:
                self._tasks.spawn("retain", self._retain(held))

    def open(self, route: Route, down: Downstream) -> Door:
        """Connect a flow to the newest ready stage of its pipeline. Raises StageLost."""
        for held in reversed(self._held):
            if held.order.pipeline == route.pipeline and held.state is StageState.READY:
                return held.open(route, down)
        raise StageLost(f"this shard holds no stage of pipeline {route.pipeline}")

    async def _retain(self, held: Held) -> None:
        if held.state is StageState.READY:
            await asyncio.sleep(RETAIN_S)
        if not held.leases and held in self._held:
            await self._free(held)

    async def _free(self, held: Held) -> None:
        self._held.remove(held)
        await held.close()
        self._promised.pop(id(held), None)
        log.info("stage_freed", model=held.order.model, first=held.order.first, last=held.order.last)
        self._changed()

    def _reserve(self, held: Held, size: int) -> None:
        """Promise memory, taking it from stages that nobody holds any more. Raises CapacityError."""
        for other in [h for h in self._held if not h.leases and h is not held]:
            if self._left() < size:
                self._promised.pop(id(other), None)
                self._tasks.spawn("free", self._free(other))
        if self._draining or self._left() < size:
            raise CapacityError(
                f"the stage needs {gib(size)} and this shard has {gib(max(0, self._left()))} of {gib(self._lends)} left"
            )
        self._promised[id(held)] = size

    def _left(self) -> int:
        return self._lends - sum(self._promised.values())

    async def _watch(self) -> None:
        """See models come and go in the directories, where no engine of this daemon does."""
        while True:
            try:
                for path in self._store.pending_digests():
                    await asyncio.to_thread(self._store.digest_file, path, self._stop)
                if await asyncio.to_thread(self._store.scan):
                    self._changed()
            except Exception as error:  # a directory that misbehaves must not end the watch
                log.error("scan_failed", exc_info=error)
            await asyncio.sleep(SCAN_S)

    async def _refresh(self) -> None:
        """Take the stages' times into the shard's speed, now and then."""
        while True:
            await asyncio.sleep(STATE_S)
            before = self._speed.s_per_byte
            for held in self._held:
                self._speed.learn(held.report().weight_bytes, held.work.decode_s)
            if abs(self._speed.s_per_byte - before) > 0.05 * before:
                self._changed()

    def _changed(self) -> None:
        self._state = None
        for notify in self._listeners:
            notify()


def _shown(held: Held) -> HeldStage:
    order = held.order
    return HeldStage(
        pipeline=order.pipeline,
        owner=order.owner,
        model=order.model,
        first=order.first,
        last=order.last,
        layers=order.layers,
        size=held.size_bytes,
        state=held.state.name.lower() if held.leases else "retained",
        progress=held.progress,
    )
