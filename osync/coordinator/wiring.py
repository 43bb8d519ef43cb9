"""One epoch of a pipeline: the coordinator's arrow into the first stage, and its ear at the last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from osync.core.stages import Route, StageOrder
from osync.engine import frame_codec
from osync.engine.frame import Frame, Outcome
from osync.errors import ModelError, OsyncError, StageLost, WireError
from osync.net.arrow import Arrow
from osync.wire import activation


class Wiring:
    """Carries frames to the stages at `addresses` and outcomes back, in order, until something breaks.

    `broke` is called once, in the loop, with the reason and the stage that is out of reach or refused, where an
    arrow says so; every frame under way fails with StageLost then.
    """

    def __init__(
        self,
        pipeline: str,
        epoch: int,
        stages: Sequence[tuple[str, StageOrder]],
        *,
        activation_dtype: str,
        depth: int,
        broke: Callable[[OsyncError, int | None], None],
    ) -> None:
        """`stages` are addresses with what each holds, in order."""
        self.epoch = epoch
        self.sent_bytes = 0
        self.received_bytes = 0
        self.arrivals = 0
        """Outcomes so far."""
        self.submitted = 0
        """Number of the newest frame."""
        self.error: StageLost | None = None
        """Why it is of no use any more."""
        self._broke = broke
        self._flying: OrderedDict[int, asyncio.Future[Outcome]] = OrderedDict()
        first = Route(
            pipeline=pipeline,
            epoch=epoch,
            stage=0,
            addresses=tuple(address for address, _ in stages),
            activation_dtype=activation_dtype,
            in_flight=2 * depth,
            cuts=(*(order.first for _, order in stages), stages[-1][1].last),
        )
        last = replace(first, stage=len(stages) - 1, wants_outcomes=True)
        self._inlet = Arrow(first, broke=self.fail)
        self._outlet = Arrow(last, broke=self.fail, outcome=self._arrived)

    @property
    def in_flight(self) -> int:
        """Frames whose outcome is still to come."""
        return len(self._flying)

    async def evaluate(self, frame: Frame) -> Outcome:
        """Send a frame and wait for its outcome. Raises StageLost, or what a stage failed of."""
        if self.error is not None:
            raise self.error
        self.submitted += 1
        number = self.submitted
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._flying[number] = future
        data = b"".join(activation.encode(frame_codec.to_wire(frame, self.epoch, number)))
        self.sent_bytes += len(data)
        try:
            await self._inlet.send(number, data)
        except asyncio.CancelledError:
            self.fail(StageLost("a frame was given up before it was sent"))  # the stages would wait for its number
            raise
        return await future

    def fail(self, error: OsyncError, stage: int | None = None) -> None:
        """Take note that a stage, or the way to it, is gone."""
        if self.error is None:
            self._end(StageLost(str(error)))
            self._broke(error, stage)

    async def close(self) -> None:
        """Cut both arrows."""
        if self.error is None:
            self._end(StageLost("the pipeline was closed"))
        await asyncio.gather(self._inlet.close(), self._outlet.close())

    def _end(self, error: StageLost) -> None:
        self.error = error
        self._inlet.drop()
        flying, self._flying = self._flying, OrderedDict()
        for future in flying.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # also if nobody waits for it any more

    def _arrived(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self.error is not None:
            return
        try:
            message = activation.decode(data)
        except WireError as error:
            self.fail(error)
            return
        if not isinstance(message, activation.Outcome) or message.epoch != self.epoch or not self._flying:
            self.fail(WireError("the last stage sent what is no outcome of this epoch"))
            return
        number = next(iter(self._flying))
        if message.number != number:
            self.fail(WireError(f"the outcome of frame {message.number} came, not of {number}"))
            return
        future = self._flying.pop(number)
        self.arrivals += 1
        if future.done():
            return
        if message.error:
            future.set_exception(ModelError(message.error))
            future.exception()
        else:
            future.set_result(frame_codec.outcome_from_wire(message))
