"""A llama.cpp context that takes frames: operations on its KV cache, rows to evaluate, tokens to sample."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from osync.engine.batch import Batch
from osync.engine.frame import SAMPLED, Close, Copy, Frame, Limits, Open, Operation, Outcome, Rows, Truncate
from osync.engine.llama import MAX_SAMPLED, ContextSettings, Model, reason, take_errors
from osync.engine.parked import Parked
from osync.engine.sampling import Sampler
from osync.engine.tap import Tap
from osync.engine.thread import EngineThread
from osync.errors import BadRequest, ModelError

T = TypeVar("T")

AHEAD = (SAMPLED,)
KEPT = 64
"""Prefixes that are kept aside at most; their tokens are what bounds them."""


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
        asked = frame
        frame, whole = self._resolve(frame)
        self._check(frame)
        for operation in frame.operations:
            whole &= self._apply(operation)
        if not whole or any(rows.position != self._lengths[rows.sequence] for rows in frame.rows):
            changed = asked.sequences(self.limits.sequences)
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
        if any(run.tokens[:1] == AHEAD for run in rows):
            if any(run.tokens[:1] == AHEAD and run.sequence not in self._newest for run in rows):
                rows = ()
            else:
                rows = tuple(
                    [
                        replace(run, tokens=(self._newest[run.sequence], *run.tokens[1:]))
                        if run.tokens[:1] == AHEAD
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
