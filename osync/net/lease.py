"""A coordinator's lease of one stage on a shard: what it reports, for as long as the lease lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
import structlog

from osync.core.stages import StageOrder, StageReport, StageState
from osync.errors import ModelUnusable, OsyncError, StageLost, UpstreamUnavailable, WireError
from osync.net.channel import open_channel
from osync.net.guard import rpc_guard
from osync.net.options import describe
from osync.net.stages import order_to, report_from
from osync.net.tasks import Tasks
from osync.pb import shard_pb2_grpc

log = structlog.get_logger("osync.net")

SILENCE_S: Final = 3.0
"""A shard reports every second; one that is silent this long is taken for dead."""


class StageLease:
    """Holds a stage on the shard at `address`. `lost` is called once, in the loop, if it ends before `close`;
    `changed` whenever a report came, and at the end."""

    def __init__(
        self,
        address: str,
        order: StageOrder,
        lost: Callable[[OsyncError], None],
        *,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self.order = order
        self.report: StageReport | None = None
        """The newest one."""
        self.error: OsyncError | None = None
        """Why it ended."""
        self.changed_at = time.monotonic()
        """When the report last told of progress in loading."""
        self._lost = lost
        self._changed = changed
        self._ready = asyncio.Event()
        self._closed = False
        self._tasks = Tasks(f"lease.{address}")
        self._tasks.spawn("run", self._run())

    @property
    def is_ready(self) -> bool:
        """True while the stage takes frames."""
        return self.error is None and self.report is not None and self.report.state is StageState.READY

    async def ready(self) -> StageReport:
        """Wait until the stage is loaded. Raises what ended the lease."""
        await self._ready.wait()
        if self.error is not None:
            raise self.error
        assert self.report is not None
        return self.report

    async def close(self) -> None:
        """Give the stage back."""
        self._closed = True
        self.error = self.error or StageLost("the stage was given back")
        self._ready.set()
        self._changed()
        await self._tasks.close()

    async def _run(self) -> None:
        error: OsyncError
        try:
            error = await self._hold()
        except grpc.RpcError as failure:
            error = self._unavailable(describe(failure))
        except TimeoutError:
            error = self._unavailable(f"no sign of life for {SILENCE_S:.0f} s")
        except (grpc.aio.BaseError, asyncio.InvalidStateError, WireError) as failure:
            error = self._unavailable(str(failure))
        except Exception as failure:  # whatever it was, who waits for the stage has to hear of it
            log.error("lease_failed", address=self.address, exc_info=failure)
            error = self._unavailable(repr(failure))
        if not self._closed:
            self.error = error
            self._ready.set()
            log.warning("stage_lost", address=self.address, pipeline=self.order.pipeline, error=str(error))
            self._lost(error)
            self._changed()

    async def _hold(self) -> OsyncError:
        async with open_channel(self.address) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            hold: Any = stub.Hold(order_to(self.order))
            async with rpc_guard(hold) as call:
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        message = await call.read()
                    if message is grpc.aio.EOF:
                        code, details = await call.code(), await call.details()
                        return self._unavailable(str(details or code.name))
                    before, self.report = self.report, report_from(message)
                    report = self.report
                    if before is None or (before.state, before.bytes_done) != (report.state, report.bytes_done):
                        self.changed_at = time.monotonic()
                    if report.state is StageState.FAILED:
                        return ModelUnusable(f"shard {self.address}: {report.error}")
                    if report.state is StageState.READY:
                        self._ready.set()
                    self._changed()

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(f"shard {self.address}: {reason}")
