"""The one generation loop: continuous batching of requests over the stages of one model."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import structlog

from osync.coordinator.request import Request, Words
from osync.coordinator.schedule import Schedule, rows_of
from osync.engine.frame import Frame, Outcome
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import Stage
from osync.errors import BadRequest, CapacityError, ModelError, OsyncError, StageLost
from osync.net.tasks import Tasks

log = structlog.get_logger("osync.coordinator")

SERVER_BUSY = "server busy, please try again.  maximum pending requests exceeded"
TOO_LONG = "the input length exceeds the context length"
_WORTH_ABORTING = 8
"""Rows of a request that was given up, above which waiting for the evaluation would take too long."""


@runtime_checkable
class Recovers(Protocol):
    """A stage that can lose a part of itself and be made anew."""

    async def recover(self) -> None:
        """Make it anew after StageLost; all KV caches are empty then. Raises OsyncError where it cannot be."""


@runtime_checkable
class Submits(Protocol):
    """A stage that takes a frame at once, in the order of the calls: a task less for every token."""

    def submit(self, frame: Frame) -> asyncio.Future[Outcome]:
        """Begin what `evaluate` does. Raises OsyncError."""


@dataclass(slots=True, eq=False)
class _Flight:
    frame: Frame
    began_ns: int
    evaluation: asyncio.Future[Outcome | Exception] | asyncio.Future[Outcome]


class Generation:
    """Drives one stage (a pipeline of stages is one, too) with all requests for it."""

    def __init__(
        self, stage: Stage, words: Words, *, max_queue: int = 512, deterministic: bool = False, drafts: bool = True
    ) -> None:
        self._stage = stage
        self._submits = stage if isinstance(stage, Submits) else None
        self._words = words
        self._limits = stage.limits
        self._schedule = Schedule(self._limits, deterministic=deterministic, drafts=drafts)
        self._max_queue = max_queue
        self._waiting: deque[Request] = deque()
        self._flying: deque[_Flight] = deque()
        self._evaluating: Frame | None = None
        self._cancelled = False
        self._wake = asyncio.Event()
        self._closed = False
        self._tasks = Tasks("coordinator")
        self._tasks.spawn("generation", self._run() if self._limits.depth == 1 else self._run_ahead())

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._schedule.active

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def kept_tokens(self) -> int:
        """Tokens of ended answers that are kept aside for who goes on with them."""
        return self._schedule.kept.tokens

    def submit(self, prompt: Sequence[int], options: SamplingOptions) -> Request:
        """Queue a request. Raises BadRequest, and CapacityError once the queue is full."""
        if self._closed:
            raise ModelError("the model was unloaded")
        if not prompt:
            raise BadRequest("the prompt has no tokens")
        if len(prompt) > self._limits.context_length:
            raise BadRequest(TOO_LONG)
        if min(prompt) < 0 or max(prompt) >= self._limits.vocabulary_size:
            raise BadRequest(f"a token is not in the vocabulary of {self._limits.vocabulary_size}")
        free = self._limits.sequences - self._schedule.active
        if len(self._waiting) >= self._max_queue + free:
            raise CapacityError(SERVER_BUSY)
        request = Request(
            prompt,
            options,
            self._words,
            context_length=self._limits.context_length,
            now_ns=time.monotonic_ns(),
            on_cancel=self._cancel,
        )
        self._waiting.append(request)
        self._wake.set()
        return request

    async def close(self) -> None:
        """Fail what is under way and end the loop; the stage stays to its owner."""
        self._closed = True
        self._stage.abort()
        await self._tasks.close()
        self._fail_all(ModelError("the model was unloaded"))

    def _cancel(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
            return
        self._cancelled = True
        self._wake.set()
        frames = [flight.frame for flight in self._flying]
        if self._evaluating is not None:
            frames.append(self._evaluating)
        mine = [slot.id for slot in self._schedule.slots if slot.request is request]
        if any(rows_of(frame, mine) > _WORTH_ABORTING for frame in frames):
            self._stage.abort()

    async def _run(self) -> None:
        """Drive a stage that takes one frame at a time, with as few turns of the event loop as can be."""
        while True:
            frame = self._next()
            if frame is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._evaluating = frame
            before = time.monotonic_ns()
            try:
                outcome = await self._stage.evaluate(frame)
            except StageLost as error:
                await self._recover(error)
            except Exception as error:  # whatever it was, it concerns this frame's requests only
                self._failed(frame, error)
            else:
                self._done(frame, outcome, before)
            finally:
                self._evaluating = None

    async def _run_ahead(self) -> None:
        """Keep several frames in flight."""
        while True:
            self._wake.clear()
            while self._flying and self._flying[0].evaluation.done():
                await self._land(self._flying.popleft())
            while len(self._flying) < self._limits.depth and (frame := self._next()) is not None:
                evaluation = self._begin(frame)
                evaluation.add_done_callback(self._landed)
                self._flying.append(_Flight(frame, time.monotonic_ns(), evaluation))
            await self._wake.wait()

    def _begin(self, frame: Frame) -> asyncio.Future[Outcome | Exception] | asyncio.Future[Outcome]:
        if self._submits is not None:
            return self._submits.submit(frame)
        # Tasks start in the order in which they are made: so do the frames.
        return self._tasks.spawn("evaluation", self._evaluate(frame))

    def _landed(self, _: object) -> None:
        self._wake.set()

    async def _evaluate(self, frame: Frame) -> Outcome | Exception:
        try:
            return await self._stage.evaluate(frame)
        except Exception as error:  # it is told in its turn
            return error

    async def _land(self, flight: _Flight) -> None:
        evaluation = flight.evaluation
        outcome = evaluation.exception() or evaluation.result()
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, StageLost):
            await self._recover(outcome)
        elif isinstance(outcome, Exception):
            self._failed(flight.frame, outcome)
        else:
            self._done(flight.frame, outcome, flight.began_ns)

    def _next(self) -> Frame | None:
        if self._cancelled:
            self._cancelled = False
            for slot in self._schedule.slots:
                if slot.request is not None and slot.request.cancelled:
                    self._schedule.release(slot.request)
        while self._waiting and self._schedule.has_room:
            request = self._waiting.popleft()
            request.start(time.monotonic_ns(), self._schedule.admit(request))
        return self._schedule.frame()

    def _done(self, frame: Frame, outcome: Outcome, began_ns: int) -> None:
        now = time.monotonic_ns()
        for request in self._schedule.apply(frame, outcome, now - began_ns, now):
            self._schedule.release(request)

    def _failed(self, frame: Frame, error: Exception) -> None:
        log.error("evaluation_failed", sequences=[rows.sequence for rows in frame.rows], error=repr(error))
        failure = error if isinstance(error, OsyncError) else ModelError(f"the model broke: {error!r}")
        for request in self._schedule.forget(frame):
            request.fail(failure)
            self._schedule.release(request)

    async def _recover(self, error: StageLost) -> None:
        """Wait for a new pipeline and evaluate all histories again; without one everybody fails."""
        flying = [flight.evaluation for flight in self._flying]
        self._flying.clear()
        for evaluation in flying:
            evaluation.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        log.warning("stage_lost", error=str(error), active=self._schedule.active)
        failure: OsyncError = error
        try:
            if isinstance(self._stage, Recovers):
                await self._stage.recover()
                self._schedule.restart()
                return
        except OsyncError as final:
            failure = final
        self._schedule.restart()
        self._fail_all(failure)

    def _fail_all(self, error: OsyncError) -> None:
        for request in [*self._waiting, *(slot.request for slot in self._schedule.slots)]:
            if request is not None:
                request.fail(error)
                self._schedule.release(request)
        self._waiting.clear()
