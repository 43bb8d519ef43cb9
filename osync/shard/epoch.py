"""One epoch of a pipeline at one of its stages: frames in, evaluated strictly in order, and on to the next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, cast

import structlog

from osync.core.stages import Route
from osync.engine import frame_codec
from osync.engine.frame import SAMPLED, Frame, Limits, Outcome, Rows, Truncate
from osync.engine.layers import Part
from osync.errors import CapacityError, OsyncError, StageLost, WireError
from osync.net.arrow import Arrow
from osync.net.shard_service import Downstream
from osync.net.tasks import Tasks
from osync.wire import activation
from osync.wire.activation_dtype import Dtype, pack, unpack

log = structlog.get_logger("osync.shard")

EARLY_OUTCOMES: Final = 256
"""Outcomes that are kept for a coordinator whose ear is not connected yet."""


class Evaluator(Protocol):
    """Layers of a model on this host; `osync.engine.stage.LayerStage` is one."""

    limits: Limits

    @property
    def part(self) -> Part:
        """Which layers it has, and how wide a row of activations is."""
        ...

    async def evaluate(self, frame: Frame, activations: memoryview | None) -> tuple[Outcome | None, memoryview | None]:
        """Return the outcome at the last stage, else the activations of all rows, valid until the next call."""
        ...


@dataclass(slots=True)
class Work:
    """What a stage has done since it was loaded; times in seconds."""

    frames: int = 0
    rows: int = 0
    busy_s: float = 0.0
    decode_s: float = 0.0
    """Running mean of an evaluation of one row."""
    taken: int = 0
    done: int = 0


class Epoch:
    """`open` connects flows, in whatever order they come; `close` cuts them all."""

    def __init__(self, route: Route, evaluator: Evaluator, work: Work) -> None:
        self.number = route.epoch
        self._route = route
        self._evaluator = evaluator
        self._work = work
        self._queue: deque[activation.Frame] = deque()
        self._wake = asyncio.Event()
        self._expected = 1
        self._source: Downstream | None = None
        self._returns: Downstream | None = None
        self._ear: Downstream | None = None
        self._early: deque[bytes] = deque()
        self._next: Arrow | None = None
        self._sampled: dict[int, tuple[int, int]] = {}
        """First stage: the newest sampled token of each sequence, with the number of its frame."""
        self._awaited: dict[int, int] = {}
        """First stage: the number of the newest frame that samples each sequence."""
        self._returned = 0
        self._failed: OsyncError | None = None
        self._tasks = Tasks(f"epoch.{route.pipeline}.{route.epoch}")
        work.taken = work.done = 0

    @property
    def queued(self) -> int:
        """Frames that wait."""
        return len(self._queue)

    def open(self, route: Route, down: Downstream) -> Door:
        """Connect a flow. Raises StageLost where the epoch has failed already."""
        if self._failed is not None:
            raise StageLost(str(self._failed))
        if route.addresses != self._route.addresses:
            raise WireError("two routes of one epoch differ")
        if route.wants_outcomes:
            self._ear = down
            while self._early:
                down.outcome(self._early.popleft())
            return Door(self, down, None)
        if route.returns_tokens:
            self._returns = down
            return Door(self, down, self._take_outcome)
        if self._source is not None:
            raise WireError("a stage is fed by one flow only")
        self._source = down
        self._connect(route)
        self._tasks.spawn("evaluate", self._run())
        return Door(self, down, self._take_frame)

    def _connect(self, route: Route) -> None:
        stages = len(route.addresses)
        onward: Route | None = None
        if not route.is_last:
            onward = replace(route, stage=route.stage + 1)
        elif stages > 1:
            onward = replace(route, stage=0, returns_tokens=True)
        if onward is not None:
            self._next = Arrow(onward, broke=self.fail)

    def fail(self, error: OsyncError, stage: int | None = None) -> None:
        """End the epoch here, and tell everybody who is connected: `stage` is to blame, this one by default."""
        if self._failed is not None:
            return
        self._failed = error
        self._queue.clear()
        for down in (self._source, self._returns, self._ear):
            if down is not None:
                down.fail(error, stage)
        if self._next is not None:
            self._tasks.spawn("cut", self._next.close())
        self._wake.set()

    async def close(self) -> None:
        """Cut all flows and stop working."""
        self.fail(StageLost("the epoch is over"))
        await self._tasks.close()
        if self._next is not None:
            await self._next.close()

    # What comes in.

    def _take_frame(self, data: bytes) -> None:
        frame = activation.decode(data)
        if not isinstance(frame, activation.Frame) or frame.epoch != self.number:
            raise WireError("a frame of another epoch came")
        if frame.number != self._expected:
            raise WireError(f"frame {frame.number} came, not {self._expected}")
        if len(self._queue) >= self._route.in_flight:
            raise CapacityError("more frames came than may be in flight")
        if self._failed is not None:
            return
        self._expected += 1
        self._work.taken = frame.number
        self._queue.append(frame)
        self._wake.set()

    def _take_outcome(self, data: bytes) -> None:
        outcome = activation.decode(data)
        if not isinstance(outcome, activation.Outcome) or outcome.epoch != self.number:
            raise WireError("a token of another epoch came back")
        self._note(outcome)
        if self._returns is not None:
            self._returns.taken(outcome.number)

    def _note(self, outcome: activation.Outcome) -> None:
        self._returned = outcome.number
        for sequence, tokens in outcome.sampled.items():
            if tokens:
                self._sampled[sequence] = (outcome.number, tokens[-1])
        self._wake.set()

    # What happens to it.

    async def _run(self) -> None:
        try:
            # What the epoch before left in the KV caches is of no use to anybody.
            sequences = self._evaluator.limits.sequences
            await self._evaluator.evaluate(Frame((), tuple(Truncate(s, 0) for s in range(sequences))), None)
            while self._failed is None:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                frame = self._queue[0]
                if self._route.stage == 0:
                    resolved = await self._resolve(frame)
                    if resolved is None:
                        return
                    frame = resolved
                self._queue.popleft()
                await self._evaluate(frame)
                if self._failed is None:
                    self._work.done = frame.number
                if self._source is not None:
                    self._source.taken(frame.number)
        except OsyncError as error:
            self.fail(error)
        except Exception as error:  # whatever it was, the neighbours have to hear of it
            log.error("epoch_failed", pipeline=self._route.pipeline, stage=self._route.stage, exc_info=error)
            self.fail(StageLost(f"stage {self._route.stage} broke: {error!r}"))

    async def _resolve(self, frame: activation.Frame) -> activation.Frame | None:
        """Put the tokens that were sampled last where the frame asks for them; None once the epoch has failed.

        A token that never was, because the frame before failed or was undone, undoes this one: 0 is always true of
        what the sequences have.
        """
        while self._failed is None:
            missing = lost = False
            rows: list[activation.Rows] = []
            for run in frame.rows:
                if run.tokens[0] != SAMPLED:
                    rows.append(run)
                    continue
                number, token = self._sampled.get(run.sequence, (0, 0))
                awaited = self._awaited.get(run.sequence, 0)
                if number == awaited and awaited:
                    rows.append(replace(run, tokens=(token, *run.tokens[1:])))
                elif self._returned >= awaited:
                    lost = True
                else:
                    missing = True
            if missing and not lost:
                self._wake.clear()
                await self._wake.wait()
                continue
            for run in frame.rows:
                if run.sample:
                    self._awaited[run.sequence] = frame.number
            if lost:
                changed = frame_codec.from_wire(frame).sequences(self._evaluator.limits.sequences)
                return replace(frame, undone=dict.fromkeys(changed, 0))
            return replace(frame, rows=tuple(rows))
        return None

    async def _evaluate(self, message: activation.Frame) -> None:
        if message.error:
            await self._pass_on(message)
            return
        inputs = message.activations
        began = time.monotonic()
        try:
            frame = frame_codec.from_wire(message)
            if message.undone is not None:
                frame = Frame((), frame.operations)
            data = memoryview(unpack(inputs)).cast("B") if inputs is not None else None
            outcome, outputs = await self._evaluator.evaluate(frame, data)
        except OsyncError as error:
            log.warning("frame_failed", pipeline=self._route.pipeline, stage=self._route.stage, error=str(error))
            await self._pass_on(replace(message, activations=None, undone=None, error=str(error) or repr(error)))
            return
        self._count(frame.rows, time.monotonic() - began)
        undone = message.undone
        if outcome is not None and outcome.undone is not None:
            # Every stage has at least what it kept, so that the coordinator cuts all to the least.
            known = dict(undone or {})
            undone = known | {s: min(n, known.get(s, n)) for s, n in outcome.undone.items()}
        if undone is not None:
            await self._pass_on(replace(message, activations=None, undone=undone))
        elif outcome is not None:
            await self._give(frame_codec.outcome_to_wire(outcome, self.number, message.number))
        else:
            dtype = cast(Dtype, self._route.activation_dtype)  # the route was checked
            packed = pack(outputs, self._evaluator.part.width, dtype) if outputs is not None and frame.rows else None
            await self._pass_on(replace(message, activations=packed))

    def _count(self, rows: tuple[Rows, ...], took_s: float) -> None:
        work, count = self._work, sum(len(run.tokens) for run in rows)
        work.frames += 1
        work.rows += count
        work.busy_s += took_s
        if count == 1:
            work.decode_s = took_s if not work.decode_s else 0.9 * work.decode_s + 0.1 * took_s

    async def _pass_on(self, message: activation.Frame) -> None:
        if self._route.is_last:
            await self._give(activation.Outcome(self.number, message.number, {}, message.undone, message.error))
        elif self._next is not None:
            await self._next.send(message.number, b"".join(activation.encode(message)))

    async def _give(self, outcome: activation.Outcome) -> None:
        """The token goes to the first stage and to the coordinator at once."""
        data = b"".join(activation.encode(outcome))
        if self._next is not None:
            await self._next.send(outcome.number, data)
        else:
            self._note(outcome)
        if self._ear is not None:
            self._ear.outcome(data)
        elif len(self._early) < EARLY_OUTCOMES:
            self._early.append(data)
        else:
            raise CapacityError("nobody takes the outcomes")


class Door:
    """One flow's entrance to an epoch (a `FlowDoor`)."""

    def __init__(self, epoch: Epoch, down: Downstream, take: Callable[[bytes], None] | None) -> None:
        self._epoch = epoch
        self._down = down
        self._take = take

    def take(self, frame: bytes) -> None:
        """Take a whole encoded frame."""
        if self._take is None:
            raise WireError("nothing goes up on a flow of outcomes")
        self._take(frame)

    def closed(self) -> None:
        """The flow has ended: so has the epoch."""
        self._epoch.fail(StageLost("a neighbour of the pipeline is gone"))
