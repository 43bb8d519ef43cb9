"""Stages without an engine: shards over real gRPC whose model samples the weighted sum of all tokens so far."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from osync.core.stages import Route, StageOrder, StageReport, StageSettings, StageState
from osync.engine.frame import Copy, Frame, Limits, Outcome, Truncate
from osync.engine.layers import Part
from osync.errors import ModelError, StageLost
from osync.net.server import RpcServer
from osync.net.shard_service import Downstream, add_shard_service
from osync.shard.epoch import Door, Epoch, Work

VOCABULARY = 1000
LIMITS = Limits(sequences=4, context_length=256, n_batch=64, sampled=4, vocabulary_size=VOCABULARY, depth=4,
                runs_ahead=True)  # fmt: skip


def next_token(tokens: Sequence[int]) -> int:
    """Return what the model samples after these."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % VOCABULARY


class SumStage:
    """An evaluator: an activation is the token itself, so that every stage knows what the first one does."""

    def __init__(self, part: Part, limits: Limits = LIMITS) -> None:
        self.part = part
        self.limits = limits
        self.frames: list[Frame] = []
        self.cells: dict[int, list[int]] = {}
        self.fails: Callable[[Frame], bool] = lambda frame: False
        self.gate = asyncio.Event()
        """Cleared, it holds evaluations up."""
        self.gate.set()

    async def evaluate(self, frame: Frame, activations: memoryview | None) -> tuple[Outcome | None, memoryview | None]:
        """Append the rows' tokens; sample in the last stage."""
        await self.gate.wait()
        self.frames.append(frame)
        if self.fails(frame):
            raise ModelError("the stage was told to fail")
        for operation in frame.operations:
            if isinstance(operation, Truncate):
                self.cells[operation.sequence] = self._of(operation.sequence)[: operation.length]
            elif isinstance(operation, Copy):
                self.cells[operation.target] = self._of(operation.source)[: operation.length]
        if any(rows.position != len(self._of(rows.sequence)) for rows in frame.rows):
            return Outcome({}, {s: len(self._of(s)) for s in frame.sequences(self.limits.sequences)}), None
        count = sum(len(rows.tokens) for rows in frame.rows)
        given = struct.unpack(f"<{count}f", activations) if activations is not None else None
        tokens = [round(x) for x in given] if given else [token for rows in frame.rows for token in rows.tokens]
        sampled, at = {}, 0
        for rows in frame.rows:
            cells = self._of(rows.sequence)
            cells.extend(tokens[at : at + len(rows.tokens)])
            at += len(rows.tokens)
            if rows.sample:
                sampled[rows.sequence] = (next_token(cells),)
        if self.part.is_last:
            return Outcome(sampled), None
        return None, memoryview(struct.pack(f"<{count}f", *tokens))

    def _of(self, sequence: int) -> list[int]:
        return self.cells.setdefault(sequence, [])


def order(first: int, last: int, layers: int, pipeline: str = "p") -> StageOrder:
    """Return an order for layers of the model."""
    return StageOrder(
        pipeline=pipeline, owner="n1", model="sums", digest="a" * 64, size=1, first=first, last=last, layers=layers,
        settings=StageSettings(context_length=256, sequences=4),
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Stage:
    order: StageOrder
    evaluator: SumStage
    work: Work = field(default_factory=Work)
    epoch: Epoch | None = None


class SumShard:
    """Holds stages of the model (a `Shard`): at once, unless told otherwise."""

    def __init__(self) -> None:
        self.address = ""
        self.held: list[_Stage] = []
        self.orders: list[StageOrder] = []
        self.over: list[Epoch] = []
        self.refusal = ""
        """Why it holds nothing."""
        self.loads = asyncio.Event()
        """Cleared, it never gets ready."""
        self.loads.set()
        self.engine = "1"
        self.report_s = 0.2
        self.server = RpcServer("127.0.0.1", 0)

    async def start(self) -> None:
        """Listen on a free port."""
        add_shard_service(self.server, self)
        self.address = f"127.0.0.1:{await self.server.start()}"

    async def stop(self) -> None:
        """Be gone, as if the process had been killed."""
        await self.server.stop(0)
        for epoch in [*self.over, *(stage.epoch for stage in self.held if stage.epoch is not None)]:
            await epoch.close()

    async def hold(self, order: StageOrder) -> AsyncGenerator[StageReport, None]:
        """Hold a stage."""
        self.orders.append(order)
        if self.refusal:
            yield StageReport(state=StageState.FAILED, error=self.refusal)
            return
        while not self.loads.is_set():
            yield StageReport(state=StageState.LOADING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.report_s):
                    await self.loads.wait()
        stage = _Stage(order, SumStage(Part(order.first, order.last, order.layers, 1)))
        self.held.append(stage)
        try:
            while True:
                work = stage.work
                yield StageReport(
                    state=StageState.READY, engine=self.engine, vocabulary_size=VOCABULARY, taken=work.taken,
                    done=work.done, frames=work.frames,
                )  # fmt: skip
                await asyncio.sleep(self.report_s)
        finally:
            self.held.remove(stage)
            if stage.epoch is not None:
                await stage.epoch.close()

    def open(self, route: Route, down: Downstream) -> Door:
        """Connect a flow as a shard does."""
        for stage in self.held:
            if route.layers in (None, (stage.order.first, stage.order.last)):
                if stage.epoch is not None and stage.epoch.number < route.epoch:
                    stage.epoch.fail(StageLost("a new epoch has begun"))
                    self.over.append(stage.epoch)
                    stage.epoch = None
                if stage.epoch is None:
                    stage.epoch = Epoch(route, stage.evaluator, stage.work)
                return stage.epoch.open(route, down)
        raise StageLost("no such stage")


@contextlib.asynccontextmanager
async def sum_shards(count: int) -> AsyncIterator[list[SumShard]]:
    """Run shards for the length of a test."""
    shards: list[SumShard] = []
    try:
        for _ in range(count):
            shard = SumShard()
            shards.append(shard)
            await shard.start()
        yield shards
    finally:
        for shard in shards:
            await shard.stop()
