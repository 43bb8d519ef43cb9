"""A pipeline: the stages of one model on several shards, driven as one `Stage`, and made anew when one is lost."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from osync.coordinator.wiring import Wiring
from osync.core.stages import StageOrder, StageReport
from osync.engine.frame import Frame, Outcome
from osync.engine.stage import Limits
from osync.errors import ModelUnusable, OsyncError, StageLost, UpstreamUnavailable
from osync.net.lease import StageLease
from osync.net.tasks import Tasks

log = structlog.get_logger("osync.coordinator")

MAX_RECOVERIES: Final = 8
"""New plans in a row without a single outcome in between, after which the pipeline is given up."""
RECENT_S: Final = 10.0
_MOST_SAMPLED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Placed:
    """One stage and the shard that is to hold it."""

    address: str
    order: StageOrder


Place = Callable[[Collection[str], Sequence[Placed]], Awaitable[Sequence[Placed]]]
"""Makes a plan: given addresses that failed, and the stages that are still held. Raises OsyncError."""


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
        self._wiring: Wiring | None = None
        self._failed: set[str] = set()
        self._fruitless = 0
        self._sampled: deque[tuple[float, int]] = deque()
        self._closed = False
        self._tasks = Tasks(f"pipeline.{name}")

    @property
    def stages(self) -> list[tuple[StageOrder, str, StageReport | None]]:
        """Order, address and newest report of each stage."""
        return [(lease.order, lease.address, lease.report) for lease in self._leases]

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that this coordinator sent and received in this epoch."""
        return (self._wiring.sent_bytes, self._wiring.received_bytes) if self._wiring else (0, 0)

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
            await self._make()
        except BaseException:
            await self.close()
            raise
        self._tasks.spawn("watch", self._watch())

    async def evaluate(self, frame: Frame) -> Outcome:
        """Send a frame down the pipeline. Raises StageLost: then `recover` before anything else."""
        if self._wiring is None:
            raise StageLost(self.error or "the pipeline is not connected")
        outcome = await self._wiring.evaluate(frame)
        if count := sum(map(len, outcome.sampled.values())):
            self._sampled.append((time.monotonic(), count))
            if len(self._sampled) > _MOST_SAMPLED:
                self._sampled.popleft()
        return outcome

    def abort(self) -> None:
        """Nothing: what is under way on other hosts ends sooner than a message about it would arrive."""

    async def recover(self) -> None:
        """Make the pipeline anew from the shards that are left; all KV caches are empty then. Raises OsyncError."""
        while True:
            self.recoveries += 1
            self._fruitless += 1
            if self._closed or self._fruitless > MAX_RECOVERIES:
                raise UpstreamUnavailable(f"pipeline {self.name} was given up: {self.error}")
            began = time.monotonic()
            try:
                await self._make()
            except StageLost:
                continue
            log.info("pipeline_recovered", pipeline=self.name, epoch=self.epoch, reason=self.error,
                     seconds=round(time.monotonic() - began, 3))  # fmt: skip
            self.error = ""
            return

    async def close(self) -> None:
        """Give all stages back."""
        self._closed = True
        await self._tasks.close()
        wiring, self._wiring = self._wiring, None
        if wiring is not None:
            await wiring.close()
        leases, self._leases = self._leases, []
        await asyncio.gather(*(lease.close() for lease in leases))

    async def _make(self) -> None:
        """One epoch: a plan that keeps what is still held, leases for the rest, arrows between them."""
        wiring, self._wiring = self._wiring, None
        if wiring is not None:
            await wiring.close()
        held = {lease.order: lease for lease in self._leases if lease.error is None}
        await asyncio.gather(*(lease.close() for lease in self._leases if lease.error is not None))
        placed = await self._place(self._failed, [Placed(lease.address, order) for order, lease in held.items()])
        kept = {(stage.address, stage.order) for stage in placed}
        # What is not needed goes first: the same shards may need its memory.
        gone = [lease for order, lease in held.items() if (lease.address, order) not in kept]
        await asyncio.gather(*(lease.close() for lease in gone))
        leases = []
        for stage in placed:
            lease = held.get(stage.order)
            if lease is None or lease.address != stage.address:
                lease = StageLease(stage.address, stage.order, self._lost)
            leases.append(lease)
        self._leases = leases
        reports = await self._loaded(leases)
        self._check(reports)
        self.epoch += 1
        self._wiring = Wiring(
            self.name,
            self.epoch,
            [lease.address for lease in leases],
            activation_dtype=self.activation_dtype,
            depth=self.limits.depth,
            broke=self._lost,
        )
        log.info("pipeline_connected", pipeline=self.name, epoch=self.epoch, stages=[
            f"{lease.address} layers {lease.order.first} to {lease.order.last}" for lease in leases
        ])  # fmt: skip

    async def _loaded(self, leases: Sequence[StageLease]) -> list[StageReport]:
        """Wait until all are ready; the shards that fail are left out of the next plan."""
        results: list[StageReport | BaseException] = []
        try:
            async with asyncio.timeout(self._load_timeout_s):
                results = await asyncio.gather(*(lease.ready() for lease in leases), return_exceptions=True)
        except TimeoutError:
            raise ModelUnusable(f"timed out loading the stages after {self._load_timeout_s:g} s") from None
        errors = [(lease, r) for lease, r in zip(leases, results, strict=True) if isinstance(r, BaseException)]
        for lease, error in errors:
            self._failed.add(lease.address)
            self.error = str(error)
        if errors:
            first = errors[0][1]
            if isinstance(first, ModelUnusable) and len(errors) == len(leases):
                raise first
            raise StageLost(self.error)
        return [r for r in results if not isinstance(r, BaseException)]

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

    def _lost(self, error: OsyncError) -> None:
        """A lease ended, or an arrow broke: end the epoch. Whoever waits for an outcome hears StageLost."""
        if self._closed:
            return
        self.error = self.error or str(error)
        for lease in self._leases:
            if lease.error is not None:
                self._failed.add(lease.address)
        if self._wiring is not None:
            self._wiring.fail(error)

    async def _watch(self) -> None:
        """End an epoch in which frames are under way and nothing comes back for the stage timeout."""
        while True:
            wiring = self._wiring
            if wiring is None or not wiring.in_flight:
                await asyncio.sleep(min(0.5, self._stage_timeout_s / 4))
                continue
            wiring.progress.clear()
            try:
                async with asyncio.timeout(self._stage_timeout_s):
                    await wiring.progress.wait()
                self._fruitless = 0
                self._failed.clear()
            except TimeoutError:
                if wiring is self._wiring and wiring.in_flight:
                    self._hangs()

    def _hangs(self) -> None:
        """Blame the first stage that took frames and passes none on; its lease ends."""
        stuck = next((lease for lease in self._leases if lease.report and lease.report.done < lease.report.taken), None)
        where = stuck.address if stuck else "an unknown stage"
        if stuck is not None:
            self._failed.add(stuck.address)
        self._lost(UpstreamUnavailable(f"{where} made no progress for {self._stage_timeout_s:g} s"))
