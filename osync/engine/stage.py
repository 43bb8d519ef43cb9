"""A stage of a model: takes frames, evaluates them in order, samples if it is the last."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from osync.engine.batch import Batch
from osync.engine.devices import LoadSettings, load_model
from osync.engine.frame import SAMPLED, Close, Copy, Frame, Open, Operation, Outcome, Rows, Truncate
from osync.engine.llama import MAX_SAMPLED, ContextSettings, Model, reason, take_errors
from osync.engine.parked import Parked
from osync.engine.sampling import Sampler
from osync.engine.tap import Tap
from osync.engine.thread import EngineThread
from osync.errors import BadRequest, ModelError

T = TypeVar("T")
S = TypeVar("S", bound="ContextStage")

_AHEAD = (SAMPLED,)
KEPT = 64
"""Prefixes that are kept aside at most; their tokens are what bounds them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stage takes at most."""

    sequences: int
    context_length: int
    n_batch: int
    sampled: int
    vocabulary_size: int
    depth: int = 1
    """Frames in flight: as many as can be worked on at once."""
    kept: int = 0
    """Sequences with the next numbers that are never evaluated, only copied to and from, and dropped by Truncate."""
    kept_tokens: int = 0
    """What these may hold together; whoever sends frames sees to it."""
    cuts: bool = True
    """False where a KV cache is kept whole or not at all."""
    runs_ahead: bool = False
    """True if rows may begin with `SAMPLED`."""


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


class ContextStage:
    """A model or some of its layers in this process, with one context and one thread of its own."""

    def __init__(
        self,
        thread: EngineThread,
        model: Model,
        settings: ContextSettings,
        *,
        tap: Tap | None = None,
        width: int = 0,
        vocabulary_size: int | None = None,
    ) -> None:
        """Make the context; runs in `thread`, as does all that touches llama.cpp.

        With a `tap`, nothing is sampled; with a `width`, rows are so many f32 that the subclass puts into the batch.
        """
        self._thread = thread
        self.model = model
        self._tap = tap
        self._is_apart = not settings.unified and (tap is not None or width > 0)
        api = self._api = model.api
        self._context = model.new_context(settings, tap)
        self._memory = api.llama_get_memory(self._context)
        self.limits = Limits(
            sequences=settings.sequences,
            context_length=min(settings.context_length, api.llama_n_ctx_seq(self._context)),
            n_batch=min(settings.n_batch, api.llama_n_batch(self._context)),
            sampled=max(settings.sequences, min(MAX_SAMPLED, settings.n_batch)),
            vocabulary_size=model.vocabulary_size if vocabulary_size is None else vocabulary_size,
            kept=KEPT if settings.kept_tokens else 0,
            kept_tokens=settings.kept_tokens,
            cuts=model.can_truncate,
        )
        self._parked = Parked(api, self._context)
        self._closed = False
        self._number = self._aborted = 0
        self._newest: dict[int, int] = {}
        """The token that each sequence's last evaluation sampled, where all of its rows counted."""
        self._samplers: dict[int, Sampler] = {}
        self._lengths = [0] * settings.sequences
        self._batch = Batch(api, size=self.limits.n_batch, sequences=settings.sequences, width=width)
        # llama.cpp asks "stop?" before each node of the graph. strlen answers without taking the GIL:
        # not 0 once the first byte is set.
        self._stop = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._stop_callback = api.ggml_abort_callback(strlen)
        api.llama_set_abort_callback(self._context, self._stop_callback, ctypes.cast(self._stop, ctypes.c_void_p))

    @property
    def thread(self) -> EngineThread:
        """The thread that evaluates; it ends with the stage."""
        return self._thread

    def _begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        if self._closed:
            raise ModelError("the model was unloaded")
        self._number += 1
        number = self._number

        def run() -> T:
            self._stop[0] = b"\0"
            if number <= self._aborted:
                self._stop[0] = b"\1"
            return work()

        return self._thread.begin(run)

    def abort(self) -> None:
        """End the evaluation under way at its next graph node, and what waits behind it before it begins."""
        self._aborted = self._number
        self._stop[0] = b"\1"

    async def close(self) -> None:
        """Free context and model, and end the thread."""
        if self._closed:
            return
        self._closed = True
        self.abort()
        self._thread.post(self.free)  # also if nobody waits for it
        try:
            await self._thread.run(lambda: None)
        finally:
            self._thread.close()

    def free(self) -> None:
        """Free context and model; runs in the thread."""
        for sampler in self._samplers.values():
            sampler.free()
        self._samplers.clear()
        self._free_context()
        self.model.free()

    def _free_context(self) -> None:
        self._parked.clear()
        context, self._context = self._context, None
        if context:
            self._api.llama_free(context)

    def _evaluate(self, frame: Frame) -> Outcome:
        if not self._context:
            raise ModelError("the model was unloaded")
        changed = frame.sequences(self.limits.sequences)
        frame, whole = self._resolve(frame)
        self._check(frame)
        for operation in frame.operations:
            whole &= self._apply(operation)
        if not whole or any(rows.position != self._lengths[rows.sequence] for rows in frame.rows):
            return Outcome({}, {sequence: self._lengths[sequence] for sequence in changed})
        for rows in frame.rows:
            if rows.sample and self._tap is None and rows.sequence not in self._samplers:
                raise BadRequest(f"sequence {rows.sequence} is not open")
        sampled: dict[int, tuple[int, ...]] = {}
        # With a KV buffer for each sequence llama.cpp may sort the rows of a batch: what is not its own to sample
        # goes one sequence after the other.
        runs = [frame.rows[i : i + 1] for i in range(len(frame.rows))] if self._is_apart else [frame.rows]
        for run in runs if frame.rows else ():
            code = self._decode(run)
            if code:
                return self._undo(frame.rows, code)
            for rows in run:
                self._lengths[rows.sequence] += len(rows.tokens)
            if self._tap is None:
                sampled |= self._sample(run)
        return Outcome(sampled)

    def _resolve(self, frame: Frame) -> tuple[Frame, bool]:
        """Put the newest tokens where the frame asks for them; without rows, and False, if one never was sampled."""
        rows = frame.rows
        if any(run.tokens[:1] == _AHEAD for run in rows):
            if any(run.tokens[:1] == _AHEAD and run.sequence not in self._newest for run in rows):
                rows = ()
            else:
                rows = tuple(
                    [
                        replace(run, tokens=(self._newest[run.sequence], *run.tokens[1:]))
                        if run.tokens[:1] == _AHEAD
                        else run
                        for run in rows
                    ]
                )
        for run in frame.rows:
            self._newest.pop(run.sequence, None)
        if rows is frame.rows:
            return frame, True
        return Frame(rows, frame.operations), bool(rows)

    def _decode(self, rows: tuple[Rows, ...]) -> int:
        """Evaluate rows in one batch; returns llama.cpp's code, 0 where it went well."""
        code: int = self._api.llama_decode(self._context, self._batch.fill(rows, self._tap is not None))
        return code

    def _undo(self, all_rows: tuple[Rows, ...], code: int) -> Outcome:
        errors = take_errors()
        lengths = {rows.sequence: self._cut(rows.sequence, rows.position) for rows in all_rows}
        if code == 2:
            return Outcome({}, lengths)
        why = "its KV cache is full" if code == 1 else f"{reason(errors)} (code {code})"
        raise ModelError(f"the model could not evaluate {self._batch.count} tokens: {why}")

    def _sample(self, all_rows: tuple[Rows, ...]) -> dict[int, tuple[int, ...]]:
        sampled: dict[int, tuple[int, ...]] = {}
        end = 0
        for rows in all_rows:
            end += len(rows.tokens)
            tokens: list[int] = []
            for back in range(rows.sample, 0, -1):
                token = self._samplers[rows.sequence].sample(self._context, end - back)
                tokens.append(token)
                if back > 1 and token != rows.tokens[1 - back]:
                    break
            if tokens:
                sampled[rows.sequence] = tuple(tokens)
                if len(tokens) == rows.sample:
                    self._newest[rows.sequence] = tokens[-1]
        return sampled

    def _check(self, frame: Frame) -> None:
        """Refuse what llama.cpp would answer with an abort of the process."""
        limits = self.limits
        seen: set[int] = set()
        count = sampled = 0
        for operation in frame.operations:
            _check_operation(operation, limits)
        for rows in frame.rows:
            if not 0 <= rows.sequence < limits.sequences or rows.sequence in seen:
                raise BadRequest(f"sequence {rows.sequence} is none of {limits.sequences}, or twice in a frame")
            seen.add(rows.sequence)
            count += len(rows.tokens)
            sampled += rows.sample
            if not rows.tokens or not 0 <= rows.sample <= len(rows.tokens):
                raise BadRequest("a sequence's rows are empty, or more of them are to be sampled than there are")
            if rows.position < 0 or rows.position + len(rows.tokens) > limits.context_length:
                raise BadRequest(f"position {rows.position} + {len(rows.tokens)} exceeds the context length")
            if min(rows.tokens) < 0 or max(rows.tokens) >= limits.vocabulary_size:
                raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary_size}")
        if count > limits.n_batch or sampled > limits.sampled:
            raise BadRequest(f"{count} rows, {sampled} of them to sample, are too many for one evaluation")

    def _apply(self, operation: Operation) -> bool:
        match operation:
            case Open(sequence, sampling, history, drawn) if self._tap is None:
                self._close(sequence)
                self._samplers[sequence] = Sampler(
                    self._api,
                    sampling,
                    vocabulary_size=self.limits.vocabulary_size,
                    context_length=self.limits.context_length,
                    history=history,
                    drawn=drawn,
                )
            case Close(sequence):
                self._close(sequence)
            case Truncate(sequence) if sequence >= self.limits.sequences:
                self._parked.drop(sequence)
            case Copy(source, target, length) if target >= self.limits.sequences:
                if length and length == self._lengths[source]:
                    self._parked.save(source, target, length)
                else:
                    self._parked.drop(target)
            case Copy(source, target, length) if source >= self.limits.sequences:
                self._cut(target, 0)
                self._lengths[target] = self._parked.load(source, target)
                return self._shorten(target, length)
            case Truncate(sequence, length):
                return self._shorten(sequence, length)
            case Copy(source, target, length):
                self._cut(target, 0)
                if length > self._lengths[source]:
                    return False
                self._api.llama_memory_seq_cp(self._memory, source, target, 0, -1)
                self._lengths[target] = self._lengths[source]
                return self._shorten(target, length)
        return True

    def _close(self, sequence: int) -> None:
        sampler = self._samplers.pop(sequence, None)
        if sampler is not None:
            sampler.free()

    def _shorten(self, sequence: int, length: int) -> bool:
        """Keep the first `length` tokens; return whether they are there."""
        if length == self._lengths[sequence] != 0:  # also where it cannot be cut
            return True
        return length <= self._lengths[sequence] and self._cut(sequence, length) == length

    def _cut(self, sequence: int, length: int) -> int:
        """Keep the first `length` tokens, or none where the cache cannot be cut; return how many are left."""
        if not (
            length and self.model.can_truncate and self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
        ):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            length = 0
        self._lengths[sequence] = length
        return length


def _check_operation(operation: Operation, limits: Limits) -> None:
    sequences: tuple[int, ...]
    most = limits.sequences + limits.kept
    match operation:
        case Copy(source, target, length):
            sequences = (source, target)
            if source == target or min(source, target) >= limits.sequences:
                raise BadRequest("a sequence cannot be copied onto itself, nor one that is kept onto another")
        case Truncate(sequence, length):
            sequences = (sequence,)
        case Open(sequence, _, history):
            sequences, length, most = (sequence,), 0, limits.sequences
            if history and (min(history) < 0 or max(history) >= limits.vocabulary_size):
                raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary_size}")
        case Close(sequence):
            sequences, length, most = (sequence,), 0, limits.sequences
    if not all(0 <= sequence < most for sequence in sequences):
        raise BadRequest(f"a sequence is none of {most}")
    if not 0 <= length <= limits.context_length:
        raise BadRequest(f"length {length} exceeds the context length")


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
