"""One epoch of a pipeline: the coordinator's arrow into the first stage, and its ear at the last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

from osync.core.stages import Route
from osync.engine import frame_codec
from osync.engine.frame import Frame, Outcome
from osync.errors import ModelError, OsyncError, StageLost, WireError
from osync.net.arrow import Arrow
from osync.wire import activation


class Wiring:
    """Carries frames to the stages at `addresses` and outcomes back, in order, until something breaks.

    `broke` is called once, in the loop, with the reason; then every frame under way fails with StageLost.
    """

    def __init__(
        self,
        pipeline: str,
        epoch: int,
        addresses: Sequence[str],
        *,
        activation_dtype: str,
        depth: int,
        broke: Callable[[OsyncError], None],
    ) -> None:
        self.epoch = epoch
        self.sent_bytes = 0
        self.received_bytes = 0
        self._broke = broke
        self._number = 0
        self._flying: OrderedDict[int, asyncio.Future[Outcome]] = OrderedDict()
        self._error: StageLost | None = None
        self.progress = asyncio.Event()
        """Set by every outcome; whoever watches clears it."""
        route = Route(
            pipeline=pipeline,
            epoch=epoch,
            stage=0,
            addresses=tuple(addresses),
            activation_dtype=activation_dtype,
            in_flight=2 * depth,
        )
        last = Route(
            pipeline=pipeline,
            epoch=epoch,
            stage=len(addresses) - 1,
            addresses=tuple(addresses),
            wants_outcomes=True,
            in_flight=2 * depth,
        )
        self._inlet = Arrow(route, broke=self.fail)
        self._outlet = Arrow(last, broke=self.fail, outcome=self._arrived)

    @property
    def in_flight(self) -> int:
        """Frames whose outcome is still to come."""
        return len(self._flying)

    async def evaluate(self, frame: Frame) -> Outcome:
        """Send a frame and wait for its outcome. Raises StageLost, or what a stage failed of."""
        if self._error is not None:
            raise self._error
        self._number += 1
        number = self._number
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._flying[number] = future
        data = b"".join(activation.encode(frame_codec.to_wire(frame, self.epoch, number)))
        self.sent_bytes += len(data)
        await self._inlet.send(number, data)
        return await future

    def fail(self, error: OsyncError) -> None:
        """Take note that a stage, or the way to it, is gone."""
        if self._error is not None:
            return
        self._error = StageLost(str(error))
        flying, self._flying = self._flying, OrderedDict()
        for future in flying.values():
            if not future.done():
                future.set_exception(self._error)
                future.exception()  # also if nobody waits for it any more
        self._broke(error)

    async def close(self) -> None:
        """Cut both arrows."""
        if self._error is None:
            self._error = StageLost("the pipeline was closed")
        for future in self._flying.values():
            future.cancel()
        self._flying.clear()
        await asyncio.gather(self._inlet.close(), self._outlet.close())

    def _arrived(self, data: bytes) -> None:
        self.received_bytes += len(data)
        try:
            message = activation.decode(data)
        except WireError as error:
            self.fail(error)
            return
        if not isinstance(message, activation.Outcome) or message.epoch != self.epoch or not self._flying:
            self.fail(WireError("the last stage sent what is no outcome of this epoch"))
            return
        number, future = self._flying.popitem(last=False)
        if message.number != number:
            self.fail(WireError(f"the outcome of frame {message.number} came, not of {number}"))
            return
        self.progress.set()
        if future.done():
            return
        if message.error:
            future.set_exception(ModelError(message.error))
            future.exception()
        else:
            future.set_result(frame_codec.outcome_from_wire(message))
