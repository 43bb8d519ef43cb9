"""The one generation loop: continuous batching of requests over the stages of one model."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import structlog

from osync.coordinator.request import Request, Words
from osync.coordinator.schedule import Schedule, rows_of
from osync.engine.frame import Frame
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import Stage
from osync.errors import BadRequest, CapacityError, ModelError, OsyncError
from osync.net.tasks import Tasks

log = structlog.get_logger("osync.coordinator")

SERVER_BUSY = "server busy, please try again.  maximum pending requests exceeded"
TOO_LONG = "the input length exceeds the context length"
_WORTH_ABORTING = 8
"""Rows of a request that was given up, above which waiting for the evaluation would take too long."""


class Generation:
    """Drives one stage (a pipeline of stages is one, too) with all requests for it."""

    def __init__(self, stage: Stage, words: Words, *, max_queue: int = 512, deterministic: bool = False) -> None:
        self._stage = stage
        self._words = words
        self._limits = stage.limits
        self._schedule = Schedule(self._limits.sequences, self._limits.n_batch, deterministic=deterministic)
        self._max_queue = max_queue
        self._waiting: deque[Request] = deque()
        self._flying: Frame | None = None
        self._wake = asyncio.Event()
        self._closed = False
        self._tasks = Tasks("coordinator")
        self._tasks.spawn("generation", self._run())

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._schedule.active

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

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
        error = ModelError("the model was unloaded")
        for request in [*self._waiting, *(slot.request for slot in self._schedule.slots)]:
            if request is not None:
                request.fail(error)
        self._waiting.clear()

    def _cancel(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
            return
        self._wake.set()
        if self._flying is not None:
            mine = [slot.id for slot in self._schedule.slots if slot.request is request]
            if rows_of(self._flying, mine) > _WORTH_ABORTING:
                self._stage.abort()

    async def _run(self) -> None:
        while True:
            self._release_cancelled()
            while self._waiting and self._schedule.has_room:
                request = self._waiting.popleft()
                request.start(time.monotonic_ns(), self._schedule.admit(request))
            frame = self._schedule.frame()
            if not frame.rows and not frame.operations:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._evaluate(frame)

    async def _evaluate(self, frame: Frame) -> None:
        self._flying = frame
        before = time.monotonic_ns()
        try:
            outcome = await self._stage.evaluate(frame)
        except Exception as error:  # whatever it was, it concerns this frame's requests only
            log.error("evaluation_failed", sequences=[rows.sequence for rows in frame.rows], error=repr(error))
            failure = error if isinstance(error, OsyncError) else ModelError(f"the model broke: {error!r}")
            for request in self._schedule.forget(frame):
                request.fail(failure)
                self._schedule.release(request)
        else:
            now = time.monotonic_ns()
            for request in self._schedule.apply(frame, outcome, now - before, now):
                self._schedule.release(request)
        finally:
            self._flying = None

    def _release_cancelled(self) -> None:
        for slot in self._schedule.slots:
            if slot.request is not None and slot.request.cancelled:
                self._schedule.release(slot.request)
