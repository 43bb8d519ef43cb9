"""A shard's door: the servicer of osync.v1.Shard."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, Protocol

import grpc
import structlog

from osync.core.stages import Route, StageOrder, StageReport
from osync.errors import OsyncError, UpstreamUnavailable, WireError
from osync.net.server import RpcServer
from osync.net.stages import failure_to, order_from, report_to, route_from
from osync.net.tasks import Tasks
from osync.pb import shard_pb2 as pb
from osync.pb import shard_pb2_grpc
from osync.wire.activation import Assembler

log = structlog.get_logger("osync.net")

ROUTE_S: Final = 5.0
"""How long a flow may take to say what it is for."""
FULL_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Shard"].full_name


class Downstream:
    """What goes back on one flow: acknowledgements, outcomes, and at last why it ends. Bounded by its frames."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._messages: deque[pb.FlowDown] = deque()
        self._acknowledged = 0
        self._taken = 0
        self._ended = False
        self._wake = asyncio.Event()

    def taken(self, number: int) -> None:
        """Acknowledge all frames up to `number`; the message goes out for every half of what may be in flight."""
        self._taken = number
        if number - self._acknowledged >= max(1, self.route.in_flight // 2):
            self._acknowledged = number
            self._put(pb.FlowDown(taken=number))

    def outcome(self, data: bytes) -> None:
        """Send an encoded outcome."""
        self._put(pb.FlowDown(outcome=data))

    def fail(self, error: OsyncError, stage: int | None = None) -> None:
        """End the flow: `stage` is out of reach or refused, this one by default."""
        if not self._ended:
            self._put(failure_to(self.route.stage if stage is None else stage, error))
            self._ended = True

    def end(self) -> None:
        """End the flow without a word."""
        self._ended = True
        self._wake.set()

    async def messages(self) -> AsyncGenerator[pb.FlowDown, None]:
        """Yield what there is to send, until the end."""
        while True:
            while self._messages:
                yield self._messages.popleft()
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def _put(self, message: pb.FlowDown) -> None:
        if not self._ended:
            self._messages.append(message)
            self._wake.set()


class FlowDoor(Protocol):
    """Where a flow's frames go."""

    def take(self, frame: bytes) -> None:
        """Take a whole encoded frame. Raises OsyncError: then the flow ends with it."""
        ...

    def closed(self) -> None:
        """Hear that the flow has ended."""
        ...


class Shard(Protocol):
    """What the shard role offers to its door."""

    def hold(self, order: StageOrder) -> AsyncGenerator[StageReport, None]:
        """Load and hold a stage; yields reports. Closing it frees the stage, at once or a little later."""
        ...

    def open(self, route: Route, down: Downstream) -> FlowDoor:
        """Connect a flow to a held stage. Raises OsyncError."""
        ...


def add_shard_service(server: RpcServer, shard: Shard) -> ShardService:
    """Open the shard's door on a server, which closes it when it stops."""
    service = ShardService(shard)
    server.add_service(shard_pb2_grpc.add_ShardServicer_to_server, service, FULL_NAME)
    server.on_stop(service.close)
    return service


class ShardService(shard_pb2_grpc.ShardServicer):
    """Serves coordinators and neighbouring shards."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._closing = asyncio.Event()

    async def close(self, grace_s: float = 0.0) -> None:
        """End all flows and holds."""
        self._closing.set()

    async def Hold(self, request: pb.HoldRequest, context: Any) -> AsyncIterator[pb.StageReport]:
        """Hold a stage until the coordinator ends the call."""
        order = order_from(request)
        log.info("hold", pipeline=order.pipeline, model=order.model, first=order.first, last=order.last)
        async with aclosing(self._shard.hold(order)) as reports:
            async for report in reports:
                yield report_to(report)
                if self._closing.is_set():
                    raise UpstreamUnavailable("the shard is stopping")

    async def Flow(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Carry frames until either side ends it."""
        route = await self._route(context)
        down = Downstream(route)
        door = self._shard.open(route, down)
        tasks = Tasks("flow")
        writer = tasks.spawn("write", self._write(context, down))
        reader = tasks.spawn("read", self._read(context, door, down))
        closing = tasks.spawn("closing", self._closing.wait())
        try:
            done, _ = await asyncio.wait({writer, reader, closing}, return_when=asyncio.FIRST_COMPLETED)
            if writer not in done:
                if closing in done:
                    down.fail(UpstreamUnavailable("the shard is stopping"))
                await asyncio.wait({writer}, timeout=1.0)  # what ended the reading is to be said
        finally:
            door.closed()
            await tasks.close()

    async def _route(self, context: Any) -> Route:
        try:
            async with asyncio.timeout(ROUTE_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no route came")
        if first is grpc.aio.EOF:
            raise WireError("a flow ended before its route")
        return route_from(first)

    async def _read(self, context: Any, door: FlowDoor, down: Downstream) -> None:
        assembler = Assembler()
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                frame = assembler.add(message.frame, message.end)
                if frame is not None:
                    door.take(frame)
        except OsyncError as error:
            log.warning("flow_refused", pipeline=down.route.pipeline, stage=down.route.stage, error=str(error))
            down.fail(error)
            return
        down.end()

    async def _write(self, context: Any, down: Downstream) -> None:
        try:
            async for message in down.messages():
                await context.write(message)
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            return  # its client is gone
