"""A pipeline: the stages of one model on several shards, driven as one `Stage`, and made anew when one is lost."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from osync.coordinator.wiring import Wiring
from osync.core.stages import StageOrder, StageReport
from osync.engine.frame import Frame, Limits, Outcome
from osync.errors import ModelUnusable, OsyncError, StageLost, UpstreamUnavailable
from osync.net.lease import StageLease
from osync.net.tasks import Tasks

log = structlog.get_logger("osync.coordinator")

MAX_FRUITLESS: Final = 12
"""New epochs in a row without a single outcome in between, after which requests fail."""
BACKOFF_S: Final = (0.05, 1.0)
"""Before the third such epoch, and the longest wait."""
HINDSIGHT_S: Final = 0.15
"""How long after an arrow broke the lease of a dead shard may take to tell whose fault it was."""
BLAME_S: Final = 60.0
"""The same arrow breaking twice within this time, both shards being there, costs the later one its place."""
REPAIR_S: Final = 5.0
"""Between attempts to repair a pipeline that nobody uses."""
RECENT_S: Final = 10.0
_MOST_SAMPLED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Placed:
    """One stage and the shard that is to hold it."""

    address: str
    order: StageOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left of a pipeline that lost a stage."""

    held: tuple[Placed, ...] = ()
    standby: tuple[Placed, ...] = ()
    """Loaded, and not in use."""
    failed: frozenset[str] = frozenset()
    """Addresses of shards that were lost: to be tried again only where nobody else is left."""
    refused: frozenset[str] = frozenset()
    """Addresses of shards that said why they cannot hold a stage."""


Place = Callable[[Remains], Awaitable[Sequence[Placed]]]
"""Makes a plan, of what is left as far as that goes. Raises OsyncError."""


@dataclass(slots=True)
class _Faults:
    failed: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    arrow: tuple[str, str] | None = None
    """Both ends of the one that broke last."""
    breaks: dict[tuple[str, str], float] = field(default_factory=dict)
    """When arrows broke whose ends were both there."""


class Pipeline:
    """A `Stage` over leases of remote stages. `open` makes it; `recover` replaces what is lost."""

    def __init__(self, name: str, place: Place, *, limits: Limits, activation_dtype: str, stage_timeout_s: float,
                 load_timeout_s: float) -> None:  # fmt: skip
        self.name = name
        self.limits = limits
        self.activation_dtype = activation_dtype
        self.epoch = 0
        self.recoveries = 0
        self.error = ""
        """Why it is being made anew, or was given up."""
        self._place = place
        self._stage_timeout_s = stage_timeout_s
        self._load_timeout_s = load_timeout_s
        self._leases: list[StageLease] = []
        self._standby: list[StageLease] = []
        self._wiring: Wiring | None = None
        self._faults = _Faults()
        self._fruitless = 0
        self._making = asyncio.Lock()
        self._is_unheard = False
        """True if it was made anew, and who drives it does not know."""
        self._news = asyncio.Event()
        self._traffic = (0, 0)
        self._sampled: deque[tuple[float, int]] = deque()
        self._closed = False
        self._tasks = Tasks(f"pipeline.{name}")

    @property
    def stages(self) -> list[tuple[StageOrder, str, StageReport | None]]:
        """Order, address and newest report of each stage."""
        return [(lease.order, lease.address, lease.report) for lease in self._leases]

    @property
    def standbys(self) -> list[tuple[StageOrder, str, StageReport | None]]:
        """The same of the stages that are held in reserve."""
        return [(lease.order, lease.address, lease.report) for lease in self._standby if lease.error is None]

    @property
    def is_connected(self) -> bool:
        """True while it takes frames."""
        return self._wiring is not None and self._wiring.error is None

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that this coordinator sent and received."""
        sent, received = self._traffic
        wiring = self._wiring
        return (sent + wiring.sent_bytes, received + wiring.received_bytes) if wiring else (sent, received)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all sequences together got of late."""
        now = time.monotonic()
        while self._sampled and self._sampled[0][0] < now - RECENT_S:
            self._sampled.popleft()
        return sum(count for _, count in self._sampled) / RECENT_S

    async def open(self) -> None:
        """Plan, load all stages and connect them. Raises OsyncError; then nothing is held."""
        try:
            async with self._making:
                await self._connect()
        except BaseException:
            await self.close()
            raise
        self.error = ""
        self._is_unheard = False
        self._tasks.spawn("watch", self._watch())

    async def evaluate(self, frame: Frame) -> Outcome:
        """Send a frame down the pipeline. Raises StageLost: then `recover` before anything else."""
        wiring = self._wiring
        if wiring is None or self._is_unheard:
            raise StageLost(self.error or "the pipeline was made anew")
        outcome = await wiring.evaluate(frame)
        if self._fruitless:
            self._fruitless = 0
            self._faults.failed.clear()
            self._faults.refused.clear()
        if count := sum(map(len, outcome.sampled.values())):
            self._sampled.append((time.monotonic(), count))
            if len(self._sampled) > _MOST_SAMPLED:
                self._sampled.popleft()
        return outcome

    def abort(self) -> None:
        """Nothing: what is under way on other hosts ends sooner than a message about it would arrive."""

    async def recover(self) -> None:
        """Have it made anew from the shards that are left; all KV caches are empty then. Raises OsyncError."""
        async with self._making:
            if not (self._is_unheard and self.is_connected):
                await self._renew()
            self._is_unheard = False

    def renew(self, reason: str) -> None:
        """Have it made anew between two frames, as where a shard is about to leave."""
        if self._wiring is not None:
            self._wiring.fail(StageLost(reason))

    async def stand_by(self, wanted: Sequence[Placed]) -> list[str]:
        """Hold these stages in reserve and no others; return the addresses of those that could not be held."""
        keys = {(stage.address, stage.order) for stage in wanted}
        broken = [lease.address for lease in self._standby if lease.error is not None]
        gone = [lease for lease in self._standby if lease.error is not None or (lease.address, lease.order) not in keys]
        self._standby = [lease for lease in self._standby if lease not in gone]
        known = {(lease.address, lease.order) for lease in self._standby}
        if not self._closed:
            for stage in wanted:
                if (stage.address, stage.order) not in known and stage.address not in broken:
                    self._standby.append(self._lease(Placed(stage.address, replace(stage.order, standby=True))))
        await asyncio.gather(*(lease.close() for lease in gone))
        return broken

    async def close(self) -> None:
        """Give all stages back."""
        self._closed = True
        await self._tasks.close()
        wiring, self._wiring = self._wiring, None
        if wiring is not None:
            await wiring.close()
        leases, self._leases, self._standby = [*self._leases, *self._standby], [], []
        await asyncio.gather(*(lease.close() for lease in leases))
        self._news.set()

    async def _renew(self) -> None:
        began = time.monotonic()
        await self._connect()
        self.recoveries += 1
        log.info("pipeline_recovered", pipeline=self.name, epoch=self.epoch, reason=self.error,
                 seconds=round(time.monotonic() - began, 3))  # fmt: skip
        self.error = ""

    async def _connect(self) -> None:
        """Make epochs until one holds. Raises OsyncError where there is no plan, or too many came to nothing."""
        while True:
            if self._fruitless >= MAX_FRUITLESS:
                self._fruitless = 0
                raise UpstreamUnavailable(f"pipeline {self.name} was given up: {self.error}")
            if self._fruitless > 1:
                first, longest = BACKOFF_S
                await asyncio.sleep(min(longest, first * 2 ** (self._fruitless - 2)))
            if self._closed:
                raise UpstreamUnavailable(f"pipeline {self.name} was closed")
            self._fruitless += 1
            try:
                await self._make()
                return
            except StageLost as error:
                self.error = str(error)
            except ModelUnusable as error:
                raise ModelUnusable(f"{error}; {self.error}" if self.error else str(error)) from None

    async def _make(self) -> None:
        """One epoch: a plan that keeps what is still held, leases for the rest, arrows between them."""
        wiring, self._wiring = self._wiring, None
        if wiring is not None:
            sent, received = self._traffic
            self._traffic = (sent + wiring.sent_bytes, received + wiring.received_bytes)
            await wiring.close()
        await self._find_fault()
        await asyncio.gather(*(lease.close() for lease in self._leases if lease.error is not None))
        placed = await self._place(
            Remains(
                held=tuple(Placed(lease.address, lease.order) for lease in self._leases if lease.error is None),
                standby=tuple(Placed(lease.address, lease.order) for lease in self._standby if lease.is_ready),
                failed=frozenset(self._faults.failed),
                refused=frozenset(self._faults.refused),
            )
        )
        if self._closed:
            raise StageLost("the pipeline was closed")
        known = {(lease.address, lease.order): lease for lease in (*self._standby, *self._leases) if not lease.error}
        leases = [known.get((stage.address, stage.order)) or self._lease(stage) for stage in placed]
        gone = [lease for lease in self._leases if lease not in leases]
        self._leases = leases
        self._standby = [lease for lease in self._standby if lease not in leases]
        await asyncio.gather(*(lease.close() for lease in gone))
        self._check(await self._loaded(leases))
        self.epoch += 1
        self._wiring = Wiring(
            self.name,
            self.epoch,
            [(lease.address, lease.order) for lease in leases],
            activation_dtype=self.activation_dtype,
            depth=self.limits.depth,
            broke=self._arrow_broke,
        )
        self._is_unheard = True
        log.info("pipeline_connected", pipeline=self.name, epoch=self.epoch, stages=[
            f"{lease.address} layers {lease.order.first} to {lease.order.last}" for lease in leases
        ])  # fmt: skip

    def _lease(self, stage: Placed) -> StageLease:
        return StageLease(stage.address, stage.order, self._lease_ended, changed=self._news.set)

    async def _loaded(self, leases: Sequence[StageLease]) -> list[StageReport]:
        """Wait until all are ready. Raises StageLost with the first that fails, or makes no progress: the others
        go on loading for the next plan."""
        while True:
            self._news.clear()
            for lease in leases:
                if lease.error is not None:
                    self._note(lease)
                    raise StageLost(str(lease.error))
                if not lease.is_ready and time.monotonic() - lease.changed_at > self._load_timeout_s:
                    self._faults.refused.add(lease.address)
                    await lease.close()
                    raise StageLost(f"shard {lease.address} was {self._load_timeout_s:g} s without progress in loading")
            reports = [lease.report for lease in leases if lease.is_ready and lease.report]
            if len(reports) == len(leases):
                return reports
            try:
                async with asyncio.timeout(min(1.0, self._load_timeout_s / 4)):
                    await self._news.wait()
            except TimeoutError:
                pass

    def _check(self, reports: Sequence[StageReport]) -> None:
        engines = {report.engine for report in reports}
        if len(engines) > 1:
            raise ModelUnusable(
                f"the shards run different versions of llama.cpp ({', '.join(sorted(engines))}), whose results "
                "do not fit together: install the same version on all"
            )
        vocabulary = reports[0].vocabulary_size
        if vocabulary:
            self.limits = replace(self.limits, vocabulary_size=vocabulary)

    # What goes wrong.

    def _note(self, lease: StageLease) -> None:
        faults = self._faults
        (faults.refused if isinstance(lease.error, ModelUnusable) else faults.failed).add(lease.address)

    def _lease_ended(self, error: OsyncError) -> None:
        """End the epoch where the stage is in use; whoever waits for an outcome hears StageLost."""
        lost = [lease for lease in self._leases if lease.error is not None]
        for lease in lost:
            self._note(lease)
        if lost and not self._closed:
            self.error = self.error or str(error)
            if self._wiring is not None:
                self._wiring.fail(error)

    def _arrow_broke(self, error: OsyncError, stage: int | None) -> None:
        """Take note of where, if an arrow says so."""
        self.error = self.error or str(error)
        addresses = [lease.address for lease in self._leases]
        if stage is not None and stage < len(addresses):
            self._faults.arrow = (addresses[stage - 1], addresses[stage])

    async def _find_fault(self) -> None:
        """Tell an arrow that broke because a shard is gone from one between two that are there."""
        arrow, self._faults.arrow = self._faults.arrow, None
        if arrow is None:
            return
        until = time.monotonic() + HINDSIGHT_S
        while not any(lease.error for lease in self._leases) and (left := until - time.monotonic()) > 0:
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                pass
        if any(lease.error for lease in self._leases):
            return
        now, breaks = time.monotonic(), self._faults.breaks
        for pair in [pair for pair, at in breaks.items() if at < now - BLAME_S]:
            del breaks[pair]
        if arrow in breaks:
            self._faults.failed.add(arrow[1])
            log.warning("arrow_broke_again", pipeline=self.name, source=arrow[0], target=arrow[1])
        breaks[arrow] = now

    async def _watch(self) -> None:
        """End an epoch in which frames are under way and nothing moves for the stage timeout; repair what nobody
        else does."""
        seen: object = None
        since = repair_at = time.monotonic()
        while True:
            await asyncio.sleep(min(0.25, self._stage_timeout_s / 8))
            now, wiring = time.monotonic(), self._wiring
            if not self.is_connected or wiring is None:
                if not self._making.locked() and now >= repair_at:
                    repair_at = now if await self._repair() else time.monotonic() + REPAIR_S
                continue
            moves = (wiring.epoch, wiring.arrivals, [lease.report and lease.report.done for lease in self._leases])
            if not wiring.in_flight or moves != seen:
                seen, since = moves, now
            elif now - since > self._stage_timeout_s:
                stage = stuck(wiring.submitted, [lease.report for lease in self._leases])
                address = self._leases[stage].address
                self._faults.failed.add(address)
                self.error = f"shard {address} made no progress for {self._stage_timeout_s:g} s"
                wiring.fail(UpstreamUnavailable(self.error))

    async def _repair(self) -> bool:
        """Make it anew while nobody asks for it; False where it cannot be."""
        async with self._making:
            if self.is_connected or self._closed:
                return True
            try:
                await self._renew()
            except OsyncError as error:
                self.error = str(error)
                log.warning("pipeline_broken", pipeline=self.name, error=self.error)
                return False
            return True


def stuck(submitted: int, reports: Sequence[StageReport | None]) -> int:
    """Return the stage to blame for a standstill: the last one that has frames it does not pass on, or does not get
    those that were passed on to it. One before it may only be waiting: for room, or for the token that is sampled."""
    for number in reversed(range(len(reports))):
        report = reports[number]
        before = reports[number - 1] if number else None
        given = submitted if not number else before.done if before else 0
        if report is None or report.done < report.taken or report.taken < given:
            return number
    return len(reports) - 1
