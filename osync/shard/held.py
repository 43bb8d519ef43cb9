"""One stage that a shard holds: loaded from here or from elsewhere, fed by flows, reported on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from osync.core.plan import gib
from osync.core.stages import Route, StageOrder, StageReport, StageState
from osync.engine.devices import LoadSettings
from osync.engine.gguf import TENSOR_TYPES, GGUFHeader, read_header
from osync.engine.layers import LayerStage, Part
from osync.engine.llama import ContextSettings, Model
from osync.engine.slice import SlicePlan
from osync.engine.slice_file import Read, file_reader
from osync.engine.slices import SliceCache
from osync.errors import ModelUnusable, OsyncError, StageLost
from osync.net.blob import BlobReader
from osync.net.shard_service import Downstream
from osync.net.tasks import Tasks
from osync.shard.epoch import Door, Epoch, Work

log = structlog.get_logger("osync.shard")

REPORT_S: Final = 1.0
PROGRESS_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Host:
    """What stages need of the shard that holds them."""

    find: Callable[[str], Path | None]
    """The whole model's file on this host, by its digest's 64 hexadecimal digits."""
    slices: SliceCache
    reserve: Callable[[Held, int], Awaitable[None]]
    """Promise memory to a stage, in bytes, once it is there. Raises CapacityError."""
    load: LoadSettings
    threads: int
    engine: str
    changed: Callable[[], None]


class Held:
    """A stage from its order to its end. `close` frees all that it has."""

    def __init__(self, order: StageOrder, host: Host) -> None:
        self.order = order
        self.state = StageState.WAITING
        self.size_bytes = 0
        self.progress = 0.0
        self.leases = 0
        """Calls that hold it; without one it is kept a little for the next epoch."""
        self.releases = 0
        """How often the last lease ended."""
        self.is_standby = order.standby
        """True until a pipeline uses it: its memory is for whoever needs it more."""
        self.work = Work()
        self._host = host
        self._error = ""
        self._bytes = (0, 0)
        self._fetched = 0
        self._weights = self._kv = 0
        self._stage: LayerStage | None = None
        self._epoch: Epoch | None = None
        self._news = asyncio.Event()
        self._over = asyncio.Event()
        self._tasks = Tasks(f"stage.{order.model}.{order.first}-{order.last}")
        self._tasks.spawn("hold", self._hold())

    async def reports(self) -> AsyncGenerator[StageReport, None]:
        """Yield how it is: at every change, and every second; ends after FAILED."""
        while True:
            self._news.clear()
            report = self.report()
            yield report
            if report.state is StageState.FAILED:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._news.wait()

    def report(self) -> StageReport:
        """Return how it is now."""
        work, stage = self.work, self._stage
        return StageReport(
            state=self.state,
            error=self._error,
            bytes_done=self._bytes[0],
            bytes_total=self._bytes[1],
            bytes_fetched=self._fetched,
            weight_bytes=self._weights,
            kv_bytes=self._kv,
            frames=work.frames,
            rows=work.rows,
            busy_s=work.busy_s,
            queued=self._epoch.queued if self._epoch else 0,
            taken=work.taken,
            done=work.done,
            engine=self._host.engine,
            embedding_length=stage.part.width if stage else 0,
            vocabulary_size=stage.limits.vocabulary_size if stage and self.order.is_first else 0,
        )

    def open(self, route: Route, down: Downstream) -> Door:
        """Connect a flow. Raises StageLost where the stage is not ready, or the epoch is over."""
        stage = self._stage
        if stage is None or self.state is not StageState.READY:
            raise StageLost("the stage is not loaded")
        epoch = self._epoch
        if epoch is not None and route.epoch < epoch.number:
            raise StageLost(f"epoch {route.epoch} of the pipeline is over: {epoch.number} has begun")
        if epoch is None or route.epoch > epoch.number:
            if epoch is not None:
                epoch.fail(StageLost(f"epoch {route.epoch} of the pipeline has begun"))
                self._tasks.spawn("close_epoch", epoch.close())
            epoch = self._epoch = Epoch(route, stage, self.work)
            if self.is_standby:
                self.is_standby = False
                self._host.changed()
        return epoch.open(route, down)

    def give_up(self, reason: str) -> None:
        """Tell whoever holds it that it is no more; `close` follows."""
        self._error = reason
        self._change(StageState.FAILED)

    async def close(self) -> None:
        """Free everything."""
        self._over.set()
        if self._epoch is not None:  # first: it evaluates
            await self._epoch.close()
        await self._tasks.close()

    async def _hold(self) -> None:
        """Load the stage, and free it at the end, whatever ends it."""
        try:
            async with self._slice() as path:
                self._change(StageState.LOADING)
                stage = await LayerStage.load(path, self._context, settings=self._host.load)
                try:
                    self._stage = stage
                    self._change(StageState.READY)
                    log.info("stage_ready", model=self.order.model, first=self.order.first, last=self.order.last,
                             size_bytes=self.size_bytes, bytes_fetched=self._fetched)  # fmt: skip
                    await self._over.wait()
                finally:
                    self._stage = None
                    await stage.close()
        except Exception as error:  # whatever it was, whoever holds it has to hear of it
            self._error = str(error) if isinstance(error, OsyncError) else repr(error)
            log.warning("stage_failed", model=self.order.model, first=self.order.first, last=self.order.last,
                        error=self._error, exc_info=None if isinstance(error, OsyncError) else error)  # fmt: skip
            self._change(StageState.FAILED)

    def _change(self, state: StageState) -> None:
        self.state = state
        self._news.set()
        self._host.changed()

    @contextlib.asynccontextmanager
    async def _slice(self) -> AsyncIterator[Path]:
        """Yield the file to load: this host's own if the stage is all of it, else a slice of it or of another's."""
        order, host = self.order, self._host
        await self._promise(order.weight_bytes, order.kv_bytes)
        digest = order.digest.removeprefix("sha256:")
        own = host.find(digest)
        if own is not None and (order.first, order.last) == (0, order.layers):
            yield own
            return
        kept = await asyncio.to_thread(host.slices.find, digest, order.first, order.last)
        if kept is not None and await asyncio.to_thread(_whole_header, kept.path) is None:
            log.warning("slice_damaged", file=kept.path.name)
            await host.slices.discard(kept)
        if own is not None:
            async with self._cached(digest, file_reader(own)) as path:
                yield path
            return
        if kept is None and not order.sources:
            raise ModelUnusable(f"{order.model} is not on this host, and no daemon that has it was named")
        async with BlobReader(order.digest, order.sources) as reader:

            async def read(offset: int, length: int) -> bytes:
                data = await reader.read(offset, length)
                self._fetched = reader.fetched
                return data

            async with self._cached(digest, read) as path:
                yield path

    @contextlib.asynccontextmanager
    async def _cached(self, digest: str, read: Read) -> AsyncIterator[Path]:
        order = self.order
        plan = SlicePlan(order.first, order.last, order.layers, order.pieces, ())
        self._change(StageState.FETCHING)
        said = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal said
            self._bytes, self.progress = (done, total), done / max(1, total)
            if (now := time.monotonic()) - said > PROGRESS_S:
                said = now
                self._news.set()
                log.info("slice_progress", model=order.model, done=gib(done), total=gib(total))

        async with self._host.slices.use(digest, plan, read, progress=progress) as path:
            yield path

    async def _promise(self, weights: int, kv: int) -> None:
        self._weights, self._kv = weights, kv
        self.size_bytes = weights + kv
        await self._host.reserve(self, self.size_bytes)

    def _context(self, model: Model, part: Part) -> ContextSettings:
        """Return what the order asks for. Raises ModelUnusable if the file is not the ordered part."""
        order, wanted = self.order, self.order.settings
        if (part.first, part.last, part.layers) != (order.first, order.last, order.layers):
            raise ModelUnusable(f"the slice has layers {part.first} to {part.last} of {part.layers}")
        return ContextSettings(
            context_length=wanted.context_length,
            sequences=wanted.sequences,
            n_batch=wanted.n_batch,
            threads=wanted.threads or self._host.threads,
            flash_attention="off" if wanted.deterministic else wanted.flash_attention,
            kv_type=wanted.kv_type,
            unified=wanted.unified,
        )


def _whole_header(path: Path) -> GGUFHeader | None:
    """Return a slice's header; None where it is damaged, or the file ends before its tensors do; blocking."""
    try:
        header = read_header(path)
        end = max((tensor.offset + tensor.size_bytes for tensor in header.tensors), default=0)
        kind, rows, offset = (header.integer(f"osync.embedding.{name}", 0) for name in ("type", "rows", "offset"))
        if rows:  # of the first stage, which has it beside its tensors
            _, block, size = TENSOR_TYPES[kind]
            end = max(end, offset + rows * header.embedding_length // block * size)
        return header if end <= path.stat().st_size else None
    except (ModelUnusable, OSError, LookupError):
        return None
