"""A stage of a model: takes frames, evaluates them in order, samples if it is the last."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from osync.engine.context import AHEAD, ContextStage
from osync.engine.devices import LoadSettings, load_model
from osync.engine.frame import Frame, Limits, Outcome, Rows
from osync.engine.llama import ContextSettings, Model
from osync.engine.thread import EngineThread

S = TypeVar("S", bound=ContextStage)


class Stage(Protocol):
    """Layers of a model, on this host or another; a pipeline of stages is one, too."""

    @property
    def limits(self) -> Limits:
        """What it takes at most."""

    async def evaluate(self, frame: Frame) -> Outcome:
        """Apply the frame's operations, evaluate its rows, sample. Raises OsyncError; then the KV
        caches of the frame's sequences hold nothing that can be relied on but Truncate to 0."""

    def abort(self) -> None:
        """End the evaluation under way soon; its rows are undone. Without one: nothing."""

    async def close(self) -> None:
        """Give all memory back."""


class LocalStage(ContextStage):
    """All layers of a model in this process; takes the next frame while it evaluates one."""

    def __init__(self, thread: EngineThread, model: Model, settings: ContextSettings) -> None:
        """Make the context; runs in `thread`."""
        super().__init__(thread, model, settings)
        # A token's row waits in the thread for the token: no turn of the event loop comes between two evaluations.
        self.limits = replace(self.limits, depth=2, runs_ahead=True)

    @classmethod
    async def load(
        cls,
        path: Path,
        plan: Callable[[Model], ContextSettings],
        *,
        settings: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
        progress: Callable[[float], None] | None = None,
    ) -> LocalStage:
        """Load a file and make the context that `plan` asks for. Cancelled, it ends and frees all."""
        return await load_stage(
            path, lambda thread, model: cls(thread, model, plan(model)), settings=settings, progress=progress
        )

    def _evaluate(self, frame: Frame) -> Outcome:
        tokens = None if frame.operations else self._next_tokens(frame.rows)
        return super()._evaluate(frame) if tokens is None else self._step(frame.rows, tokens)

    def _next_tokens(self, all_rows: tuple[Rows, ...]) -> list[int] | None:
        """Return the rows' tokens if they are the next ones of just the sequences that the last frame sampled.

        Most frames are so, and have been checked with the frame before: between two evaluations every line of
        Python counts, since the weights have just gone through the processor's caches.
        """
        order, newest, lengths = self._batch.order, self._newest, self._lengths
        if not order or len(order) != len(all_rows) or not self._context:
            return None
        tokens = []
        for rows, sequence in zip(all_rows, order, strict=True):
            if (
                rows.sequence != sequence
                or rows.tokens != AHEAD
                or rows.sample != 1
                or rows.position != lengths[sequence]
                or rows.position >= self.limits.context_length
                or sequence not in self._samplers
                or (token := newest.get(sequence)) is None
            ):
                return None
            tokens.append(token)
        return tokens

    def _step(self, all_rows: tuple[Rows, ...], tokens: list[int]) -> Outcome:
        code = self._api.llama_decode(self._context, self._batch.step(tokens))
        if code:
            self._batch.order = ()
            for rows in all_rows:
                del self._newest[rows.sequence]
            return self._undo(all_rows, code)
        sampled = {}
        for index, rows in enumerate(all_rows):
            sequence = rows.sequence
            self._lengths[sequence] += 1
            self._newest[sequence] = token = self._samplers[sequence].sample(self._context, index)
            sampled[sequence] = (token,)
        return Outcome(sampled)

    async def evaluate(self, frame: Frame) -> Outcome:
        """Apply operations, evaluate rows, sample."""
        return await self.submit(frame)

    def submit(self, frame: Frame) -> asyncio.Future[Outcome]:
        """Begin what `evaluate` does."""
        return self._begin(lambda: self._evaluate(frame))


async def load_stage(
    path: Path,
    make: Callable[[EngineThread, Model], S],
    *,
    settings: LoadSettings,
    progress: Callable[[float], None] | None = None,
) -> S:
    """Load a file in a thread of its own and make a stage of it. Cancelled, it ends and frees all."""
    thread = EngineThread(f"osync-engine-{path.stem}"[:48])
    cancelled = threading.Event()
    loaded: list[S] = []

    def load() -> S:
        model = load_model(path, settings, cancelled=cancelled, progress=progress)
        try:
            stage = make(thread, model)
        except BaseException:
            model.free()
            raise
        loaded.append(stage)
        return stage

    def discard() -> None:
        for stage in loaded:
            stage.free()

    try:
        return await thread.run(load)
    except BaseException:
        cancelled.set()
        thread.post(discard)
        thread.close()
        raise
