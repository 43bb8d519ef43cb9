"""The door of a shard: leases of stages, and frames in and out, without an engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from osync.core.stages import Route, SlicePiece, StageOrder, StageReport, StageSettings, StageState
from osync.errors import ModelUnusable, OsyncError, UpstreamUnavailable, WireError
from osync.net import lease as leases
from osync.net.arrow import Arrow
from osync.net.lease import StageLease
from osync.net.server import RpcServer
from osync.net.shard_service import Downstream, add_shard_service
from osync.wire import activation
from osync.wire.activation_dtype import Activations

ORDER = StageOrder(
    pipeline="p1", owner="n1", model="m:latest", digest="a" * 64, size=10, first=0, last=2, layers=4,
    settings=StageSettings(context_length=64, sequences=2), sources=("127.0.0.1:1",),
    pieces=(SlicePiece(4, data=b"GGUF"), SlicePiece(3, source=0, tensor="t"), SlicePiece(9)),
    weight_bytes=7, kv_bytes=8,
)  # fmt: skip
READY = StageReport(state=StageState.READY, weight_bytes=5, kv_bytes=6, busy_s=0.5)


class Door:
    def __init__(self, down: Downstream, frames: list[bytes]) -> None:
        self.down = down
        self.frames = frames
        self.count = 0
        self.has_closed = asyncio.Event()

    def take(self, frame: bytes) -> None:
        if frame == b"bad":
            raise WireError("a bad frame")
        self.count += 1
        self.frames.append(frame)
        self.down.taken(self.count)
        self.down.outcome(b"outcome of " + frame[:8])

    def closed(self) -> None:
        self.has_closed.set()


class Shard:
    def __init__(self, reports: list[StageReport]) -> None:
        self.reports = reports
        self.orders: list[StageOrder] = []
        self.freed = asyncio.Event()
        self.more = asyncio.Event()
        self.frames: list[bytes] = []
        self.doors: list[Door] = []

    async def hold(self, order: StageOrder) -> AsyncGenerator[StageReport, None]:
        self.orders.append(order)
        try:
            for report in self.reports:
                yield report
            await self.more.wait()
            yield READY
        finally:
            self.freed.set()

    def open(self, route: Route, down: Downstream) -> Door:
        if route.pipeline != "p1":
            raise UpstreamUnavailable("this shard has no such stage")
        door = Door(down, self.frames)
        self.doors.append(door)
        return door


@asynccontextmanager
async def serving(shard: Shard) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1", 0)
    add_shard_service(server, shard)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.2)


def heard() -> tuple[asyncio.Future[OsyncError], Callable[..., None]]:
    future: asyncio.Future[OsyncError] = asyncio.get_running_loop().create_future()
    return future, lambda error, stage=0: future.set_result(error)


async def test_a_lease_holds_a_stage_until_it_is_closed() -> None:
    loading = StageReport(state=StageState.FETCHING, bytes_done=1, bytes_total=2)
    shard = Shard([loading, READY])
    async with serving(shard) as address:
        lost, hear = heard()
        lease = StageLease(address, ORDER, hear)
        assert await lease.ready() == READY
        assert shard.orders == [ORDER]
        assert lease.is_ready
        assert not shard.freed.is_set()
        await lease.close()
        async with asyncio.timeout(5):
            await shard.freed.wait()
        assert not lost.done()


async def test_a_failed_load_says_why() -> None:
    async with serving(Shard([StageReport(state=StageState.FAILED, error="it does not fit")])) as address:
        lost, hear = heard()
        lease = StageLease(address, ORDER, hear)
        with pytest.raises(ModelUnusable, match="it does not fit"):
            await lease.ready()
        assert isinstance(await lost, ModelUnusable)
        await lease.close()


async def test_a_shard_that_stops_is_lost() -> None:
    lost, hear = heard()
    async with serving(Shard([READY])) as address:
        lease = StageLease(address, ORDER, hear)
        await lease.ready()
    async with asyncio.timeout(5):
        assert address in str(await lost)
    assert not lease.is_ready
    await lease.close()


async def test_a_silent_shard_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENCE_S", 0.05)
    shard = Shard([])
    async with serving(shard) as address:
        lost, hear = heard()
        lease = StageLease(address, ORDER, hear)
        async with asyncio.timeout(5):
            assert "no sign of life" in str(await lost)
            await shard.freed.wait()
        await lease.close()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"first": 3, "last": 3}, "layers 3 to 3"),
        ({"pieces": (SlicePiece(5, source=6),)}, "not within the model"),
        ({"pieces": (SlicePiece(5, data=b"four"),)}, "not as long as it says"),
        ({"pieces": (SlicePiece(1 << 40),)}, "larger than its model"),
    ],
)
async def test_an_order_without_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    async with serving(Shard([READY])) as address:
        lost, hear = heard()
        lease = StageLease(address, replace(ORDER, **fields), hear)
        with pytest.raises(UpstreamUnavailable, match=says):
            await lease.ready()
        await lost
        await lease.close()


def route(address: str, **fields: object) -> Route:
    return replace(Route(pipeline="p1", epoch=1, stage=0, addresses=(address,), in_flight=4), **fields)  # type: ignore[arg-type]


async def test_frames_arrive_whole_and_in_order_and_outcomes_come_back() -> None:
    shard = Shard([])
    async with serving(shard) as address:
        outcomes: asyncio.Queue[bytes] = asyncio.Queue()
        broke, hear = heard()
        arrow = Arrow(route(address), broke=hear, outcome=outcomes.put_nowait)
        large = activation.Frame(1, 1, (activation.Rows(0, 0, (7,) * 1000),),
                                 activations=Activations("f32", 700, bytes(1000 * 700 * 4)))  # fmt: skip
        frames = [b"frame one", b"".join(activation.encode(large)), b"", *(b"%d" % i for i in range(20))]
        async with asyncio.timeout(10):
            for number, frame in enumerate(frames, 1):
                await arrow.send(number, frame)
            for frame in frames:
                assert await outcomes.get() == b"outcome of " + frame[:8]
        assert shard.frames == frames
        await arrow.close()
        async with asyncio.timeout(5):
            await shard.doors[0].has_closed.wait()
        assert not broke.done()


async def test_a_sender_waits_for_acknowledgements() -> None:
    shard = Shard([])
    async with serving(shard) as address:
        broke, hear = heard()
        arrow = Arrow(route(address), broke=hear)
        held: list[int] = []
        original = Downstream.taken
        Downstream.taken = lambda self, number: held.append(number)  # type: ignore[method-assign]
        try:
            async with asyncio.timeout(5):
                for number in range(1, 5):
                    await arrow.send(number, b"x")
            fifth = asyncio.create_task(arrow.send(5, b"x"))
            await asyncio.wait({fifth}, timeout=0.05)
            assert not fifth.done()
            original(shard.doors[0].down, 4)
            async with asyncio.timeout(5):
                await fifth
        finally:
            Downstream.taken = original  # type: ignore[method-assign]
        await arrow.close()
        assert not broke.done()


async def test_a_refused_frame_ends_the_arrow_with_the_reason() -> None:
    async with serving(Shard([])) as address:
        broke, hear = heard()
        arrow = Arrow(route(address), broke=hear)
        await arrow.send(1, b"bad")
        async with asyncio.timeout(5):
            error = await broke
        assert isinstance(error, WireError)
        assert str(error) == "a bad frame"
        await arrow.send(2, b"dropped")
        await arrow.close()


async def test_a_stage_that_is_not_there() -> None:
    async with serving(Shard([])) as address:
        broke, hear = heard()
        arrow = Arrow(route(address, pipeline="other"), broke=hear)
        async with asyncio.timeout(5):
            assert "no such stage" in str(await broke)
        await arrow.close()


async def test_a_shard_that_stops_breaks_the_arrow() -> None:
    broke, hear = heard()
    shard = Shard([])
    async with serving(shard) as address:
        outcomes: asyncio.Queue[bytes] = asyncio.Queue()
        arrow = Arrow(route(address), broke=hear, outcome=outcomes.put_nowait)
        await arrow.send(1, b"x")
        await outcomes.get()
    async with asyncio.timeout(5):
        assert "stopping" in str(await broke)
    await arrow.close()
