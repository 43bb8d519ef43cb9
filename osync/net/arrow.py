"""The sending side of an arrow of a pipeline: frames to a stage on another host, and what comes back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import structlog

from osync.core.stages import Route
from osync.errors import OsyncError, UpstreamUnavailable, WireError
from osync.net.channel import open_channel
from osync.net.guard import rpc_guard
from osync.net.options import describe
from osync.net.stages import failure_from, route_to
from osync.net.tasks import Tasks
from osync.pb import shard_pb2 as pb
from osync.pb import shard_pb2_grpc
from osync.wire.activation import pieces

log = structlog.get_logger("osync.net")


class Arrow:
    """One stream to a stage. `send` keeps at most `route.in_flight` frames unacknowledged.

    `broke` is called once, in the loop, when the arrow is of no use any more, whatever ended it but `close`: with
    the reason, and the stage that is out of reach or refused, which may be a later one.
    """

    def __init__(
        self,
        route: Route,
        *,
        broke: Callable[[OsyncError, int], None],
        outcome: Callable[[bytes], None] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self.route = route
        self.address = route.addresses[route.stage]
        self._broke = broke
        self._outcome = outcome
        self._sent = sent
        self._ready: deque[tuple[int, bytes]] = deque()
        self._last = 0
        self._taken = 0
        self._closed = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks = Tasks(f"arrow.{self.address}")
        self._tasks.spawn("run", self._run())

    async def send(self, number: int, frame: bytes) -> None:
        """Send an encoded frame; waits while too many are unacknowledged. Dropped once the arrow has broken."""
        while number - self._taken > self.route.in_flight and not self._closed:
            self._room.clear()
            await self._room.wait()
        if not self._closed:
            self._last = number
            self._ready.append((number, frame))
            self._wake.set()

    def drop(self) -> None:
        """Send nothing more, and let go who waits to; nobody is told. `close` is still to be called."""
        self._end()

    async def close(self) -> None:
        """End it; nobody is told."""
        self._end()
        await self._tasks.close()

    def _end(self) -> None:
        self._closed = True
        self._ready.clear()
        self._room.set()

    async def _run(self) -> None:
        error: OsyncError
        stage = self.route.stage
        try:
            error, stage = await self._connected()
        except grpc.RpcError as failure:
            error = self._unavailable(describe(failure))
        except (grpc.aio.BaseError, asyncio.InvalidStateError, WireError) as failure:
            error = self._unavailable(str(failure))
        except Exception as failure:  # whatever it was, who sends has to hear of it
            log.error("arrow_failed", address=self.address, exc_info=failure)
            error = self._unavailable(repr(failure))
        if not self._closed:
            self._end()
            self._broke(error, stage)

    async def _connected(self) -> tuple[OsyncError, int]:
        async with open_channel(self.address) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            async with rpc_guard(stub.Flow()) as call:
                tasks = Tasks(f"arrow.{self.address}")
                try:
                    await call.write(route_to(self.route))
                    reader = tasks.spawn("read", self._read(call))
                    writer = tasks.spawn("write", self._write(call))
                    await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                    if not reader.done():  # a write fails when the stream has ended, and the reader knows why
                        await asyncio.wait({reader}, timeout=1.0)
                    if reader.done():
                        result: tuple[OsyncError, int] = reader.result()
                        return result
                    return self._unavailable("connection closed"), self.route.stage
                finally:
                    await tasks.close()

    async def _read(self, call: Any) -> tuple[OsyncError, int]:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.HasField("failure"):
                    return failure_from(message.failure)
                if message.taken:
                    self._acknowledged(message.taken)
                elif self._outcome is not None:
                    self._outcome(message.outcome)
        except grpc.RpcError as error:
            return self._unavailable(describe(error)), self.route.stage
        code, details = await call.code(), await call.details()
        reason = "it ended the stream" if code is grpc.StatusCode.OK else str(details or code)
        return self._unavailable(reason), self.route.stage

    async def _write(self, call: Any) -> None:
        try:
            while True:
                while self._ready:
                    _, frame = self._ready.popleft()
                    for message in messages(frame):
                        await call.write(message)
                    if self._sent is not None:
                        self._sent()
                self._wake.clear()
                await self._wake.wait()
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            return  # the stream has ended; the reader says why

    def _acknowledged(self, taken: int) -> None:
        if taken > self._last:
            raise WireError(f"the stage at {self.address} took frame {taken} before it was sent")
        self._taken = max(self._taken, taken)
        self._room.set()

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(f"stage {self.route.stage} at {self.address}: {reason}")


def messages(frame: bytes) -> Iterator[pb.FlowUp]:
    """Cut a frame into messages of PIECE bytes at most; the last one says so."""
    end = 0
    for piece in pieces((frame,)):
        end += len(piece)
        yield pb.FlowUp(frame=piece, end=end == len(frame))
