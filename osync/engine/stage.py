"""A stage of a model: takes frames, evaluates them in order, samples if it is the last."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from osync.engine.frame import Close, Copy, Frame, Open, Operation, Outcome, Rows, Truncate
from osync.engine.llama import MAX_SAMPLED, ContextSettings, Model, reason, take_errors
from osync.engine.sampling import Sampler
from osync.engine.thread import EngineThread
from osync.errors import BadRequest, ModelError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stage takes at most."""

    sequences: int
    context_length: int
    n_batch: int
    sampled: int
    vocabulary_size: int


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


class LocalStage:
    """All layers of a model in this process, with one context and one thread of its own."""

    def __init__(self, thread: EngineThread, model: Model, settings: ContextSettings) -> None:
        """Make the context; runs in `thread`, as does all that touches llama.cpp."""
        self._thread = thread
        self.model = model
        api = self._api = model.api
        self._context = model.new_context(settings)
        self._memory = api.llama_get_memory(self._context)
        self.limits = Limits(
            sequences=settings.sequences,
            context_length=min(settings.context_length, api.llama_n_ctx_seq(self._context)),
            n_batch=min(settings.n_batch, api.llama_n_batch(self._context)),
            sampled=max(settings.sequences, min(MAX_SAMPLED, settings.n_batch)),
            vocabulary_size=model.vocabulary_size,
        )
        self._closed = False
        self._samplers: dict[int, Sampler] = {}
        self._lengths = [0] * settings.sequences
        self._batch = _Batch(api, self.limits)
        # llama.cpp asks "stop?" before each node of the graph. strlen answers without taking the GIL:
        # not 0 once the first byte is set.
        self._stop = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._stop_callback = api.ggml_abort_callback(strlen)
        api.llama_set_abort_callback(self._context, self._stop_callback, ctypes.cast(self._stop, ctypes.c_void_p))

    @classmethod
    async def load(
        cls,
        path: Path,
        plan: Callable[[Model], ContextSettings],
        *,
        gpu_layers: int = -1,
        use_mmap: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> LocalStage:
        """Load a file and make the context that `plan` asks for. Cancelled, it ends and frees all."""
        thread = EngineThread(f"osync-engine-{path.stem}"[:48])
        cancelled = threading.Event()
        loaded: list[LocalStage] = []

        def load() -> LocalStage:
            model = Model.load(path, gpu_layers=gpu_layers, use_mmap=use_mmap, cancelled=cancelled, progress=progress)
            try:
                stage = cls(thread, model, plan(model))
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

    async def evaluate(self, frame: Frame) -> Outcome:
        """Apply operations, evaluate rows, sample."""
        if self._closed:
            raise ModelError("the model was unloaded")
        self._stop[0] = b"\0"
        return await self._thread.run(lambda: self._evaluate(frame))

    def abort(self) -> None:
        """End the evaluation under way at its next graph node."""
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
        context, self._context = self._context, None
        if context:
            self._api.llama_free(context)
        self.model.free()

    def _evaluate(self, frame: Frame) -> Outcome:
        if not self._context:
            raise ModelError("the model was unloaded")
        self._check(frame)
        whole = True
        for operation in frame.operations:
            whole &= self._apply(operation)
        if not whole:
            return Outcome({}, {rows.sequence: self._lengths[rows.sequence] for rows in frame.rows})
        for rows in frame.rows:
            if rows.position != self._lengths[rows.sequence]:
                raise BadRequest(
                    f"sequence {rows.sequence} has {self._lengths[rows.sequence]} tokens, not {rows.position}"
                )
            if rows.sample and rows.sequence not in self._samplers:
                raise BadRequest(f"sequence {rows.sequence} is not open")
        if not frame.rows:
            return Outcome({})
        code = self._api.llama_decode(self._context, self._batch.fill(frame.rows))
        if code != 0:
            errors = take_errors()
            lengths = {rows.sequence: self._cut(rows.sequence, rows.position) for rows in frame.rows}
            if code == 2:
                return Outcome({}, lengths)
            why = "its KV cache is full" if code == 1 else f"{reason(errors)} (code {code})"
            raise ModelError(f"the model could not evaluate {self._batch.count} tokens: {why}")
        for rows in frame.rows:
            self._lengths[rows.sequence] += len(rows.tokens)
        return Outcome(self._sample(frame.rows))

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
            case Open(sequence, sampling, history):
                self._close(sequence)
                self._samplers[sequence] = Sampler(
                    self._api,
                    sampling,
                    vocabulary_size=self.limits.vocabulary_size,
                    context_length=self.limits.context_length,
                    history=history,
                )
            case Close(sequence):
                self._close(sequence)
            case Truncate(sequence, length):
                if length < self._lengths[sequence] or length == 0:
                    return self._cut(sequence, length) == length
                return length == self._lengths[sequence]
            case Copy(source, target, length):
                self._cut(target, 0)
                if length > self._lengths[source]:
                    return False
                self._api.llama_memory_seq_cp(self._memory, source, target, 0, -1)
                self._lengths[target] = self._lengths[source]
                return self._cut(target, length) == length
        return True

    def _close(self, sequence: int) -> None:
        sampler = self._samplers.pop(sequence, None)
        if sampler is not None:
            sampler.free()

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
    match operation:
        case Copy(source, target, length):
            sequences = (source, target)
            if source == target:
                raise BadRequest("a sequence cannot be copied onto itself")
        case Truncate(sequence, length):
            sequences = (sequence,)
        case Open(sequence, _, history):
            sequences, length = (sequence,), 0
            if history and (min(history) < 0 or max(history) >= limits.vocabulary_size):
                raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary_size}")
        case Close(sequence):
            sequences, length = (sequence,), 0
    if not all(0 <= sequence < limits.sequences for sequence in sequences):
        raise BadRequest(f"a sequence is none of {limits.sequences}")
    if not 0 <= length <= limits.context_length:
        raise BadRequest(f"length {length} exceeds the context length")


class _Batch:
    """llama_batch over arrays that are made once."""

    def __init__(self, api: Any, limits: Limits) -> None:
        size = limits.n_batch
        self.count = 0
        self._tokens = (ctypes.c_int32 * size)()
        self._positions = (ctypes.c_int32 * size)()
        self._logits = (ctypes.c_int8 * size)()
        self._one = (ctypes.c_int32 * size)(*[1] * size)
        self._ids = [(ctypes.c_int32 * 1)(sequence) for sequence in range(limits.sequences)]
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._id_pointers = [ctypes.cast(array, pointer) for array in self._ids]
        self._sequences = (pointer * size)()
        self._batch = api.llama_batch(
            n_tokens=0,
            token=ctypes.cast(self._tokens, pointer),
            embd=None,
            pos=ctypes.cast(self._positions, pointer),
            n_seq_id=ctypes.cast(self._one, pointer),
            seq_id=ctypes.cast(self._sequences, ctypes.POINTER(pointer)),
            logits=ctypes.cast(self._logits, ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, all_rows: tuple[Rows, ...]) -> Any:
        """Write checked rows into the batch and return it."""
        start = 0
        for rows in all_rows:
            count = len(rows.tokens)
            end = start + count
            self._tokens[start:end] = list(rows.tokens)
            self._positions[start:end] = list(range(rows.position, rows.position + count))
            self._logits[start:end] = list(bytes(count - rows.sample) + b"\1" * rows.sample)
            identity = self._id_pointers[rows.sequence]
            for index in range(start, end):
                self._sequences[index] = identity
            start = end
        self.count = self._batch.n_tokens = start
        return self._batch
