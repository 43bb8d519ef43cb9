"""The shard role: what it lends, the stages that it holds, and how it is."""

from __future__ import annotations

import asyncio
import json
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
from osync.engine.llama import threads_for
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
GIVE_BACK_S: Final = 2.0
"""How long a stage waits for memory of its pipeline's own, which a message under way gives back."""
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
        self._speed_file = state_dir / "speed.json"
        self._held: list[Held] = []
        self._promised: dict[int, int] = {}
        self._listeners: list[Callable[[], None]] = []
        self._state: ShardState | None = None
        self._draining = False
        self._ending = 0
        self._freed = asyncio.Event()
        """Set whenever a lease ended, or memory came back."""
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
        self._speed = await asyncio.to_thread(self._known_speed)
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
                memory_free=0 if self._draining else max(0, self._lends - self._used()),
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
        for held in [held for held in self._held if held.is_standby]:
            self._tasks.spawn("free", self._free(held, "the shard is leaving"))
        self._changed()

    @property
    def is_draining(self) -> bool:
        """True once it lends nothing more."""
        return self._draining

    async def idle(self) -> None:
        """Wait until no pipeline uses a stage of this shard."""
        while any(held.leases and held.state is not StageState.FAILED for held in self._held):
            self._freed.clear()
            await self._freed.wait()

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
        held.is_standby = held.is_standby and order.standby
        self._changed()
        try:
            async for report in held.reports():
                yield report
        finally:
            held.leases -= 1
            self._freed.set()
            if not held.leases and held in self._held:
                held.releases += 1
                self._tasks.spawn("retain", self._retain(held, held.releases))
                self._changed()

    def open(self, route: Route, down: Downstream) -> Door:
        """Connect a flow to the newest ready stage of its pipeline. Raises StageLost."""
        for held in reversed(self._held):
            is_it = held.order.pipeline == route.pipeline and held.leases and held.state is StageState.READY
            if is_it and route.layers in (None, (held.order.first, held.order.last)):
                return held.open(route, down)
        raise StageLost(f"this shard holds no such stage of pipeline {route.pipeline}")

    async def _retain(self, held: Held, releases: int) -> None:
        if held.state is StageState.READY:
            await asyncio.sleep(RETAIN_S)
        if not held.leases and held.releases == releases:
            await self._free(held)

    async def _free(self, held: Held, reason: str = "") -> None:
        """Free a stage; where somebody holds it, they hear the reason."""
        if held not in self._held:
            return
        self._held.remove(held)
        self._ending += 1
        if reason:
            held.give_up(reason)
        try:
            await held.close()
        finally:
            self._ending -= 1
            self._promised.pop(id(held), None)
            self._freed.set()
        log.info("stage_freed", model=held.order.model, first=held.order.first, last=held.order.last)
        self._changed()

    async def _reserve(self, held: Held, size: int) -> None:
        """Promise memory, taking it from stages that nobody holds, and from standbys. Raises CapacityError."""
        until = asyncio.get_running_loop().time() + GIVE_BACK_S
        while self._left() < size:
            others = [h for h in self._held if h is not held]
            yielding = [h for h in others if not h.leases]
            if not held.is_standby:
                yielding += [h for h in others if h.leases and h.is_standby]
            ours = [h for h in others if h.order.pipeline == held.order.pipeline]
            reach = self._left() + sum(self._promised.get(id(h), 0) for h in {*yielding, *ours})
            if self._draining or (reach < size and not self._ending):
                break  # nobody is to lose a stage for nothing
            if yielding and reach >= size:
                # Its end is not that of whoever waits for it.
                reason = "another stage needs the memory"
                await asyncio.wait({self._tasks.spawn("free", self._free(yielding[0], reason))})
                continue
            self._freed.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._freed.wait()
            except TimeoutError:
                break
        if self._draining or self._left() < size:
            raise CapacityError(
                f"the stage needs {gib(size)} and this shard has {gib(max(0, self._left()))} of {gib(self._lends)} left"
            )
        self._promised[id(held)] = size

    def _used(self) -> int:
        """Return what no new stage could have."""
        return sum(self._promised.get(id(h), 0) for h in self._held if h.leases and not h.is_standby)

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

    def _known_speed(self) -> Speed:
        """Return what stages took before the last end, else a first guess; blocking."""
        threads = threads_for(self._settings.threads)
        try:
            kept = json.loads(self._speed_file.read_text())
            if kept["threads"] == threads and 1e-13 < kept["s_per_byte"] < 1e-3:
                return Speed(kept["s_per_byte"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return Speed(measure(threads))

    def _keep_speed(self) -> None:
        threads = threads_for(self._settings.threads)
        text = json.dumps({"s_per_byte": self._speed.s_per_byte, "threads": threads})
        try:
            self._speed_file.write_text(text)
        except OSError as error:
            log.warning("speed_not_kept", error=str(error))

    async def _refresh(self) -> None:
        """Take the stages' times into the shard's speed, now and then."""
        while True:
            await asyncio.sleep(STATE_S)
            before = self._speed.s_per_byte
            for held in self._held:
                self._speed.learn(held.order.read_bytes, held.work.decode_s)
            if abs(self._speed.s_per_byte - before) > 0.05 * before:
                await asyncio.to_thread(self._keep_speed)
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
        state="retained" if not held.leases else "standby" if held.is_standby else held.state.name.lower(),
        progress=held.progress,
    )
