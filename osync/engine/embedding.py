"""Texts to vectors: a context that embeds token sequences, several in one evaluation."""

from __future__ import annotations

import ctypes
import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import psutil

from osync.engine.batch import Batch
from osync.engine.devices import LoadSettings, load_model
from osync.engine.frame import Rows
from osync.engine.gguf import GGUFHeader, read_header
from osync.engine.llama import ContextSettings, Model, reason, take_errors
from osync.engine.thread import EngineThread
from osync.errors import BadRequest, ModelError, ModelUnusable, NotSupported

Vector: TypeAlias = "array[float]"
"""An embedding in float32, of length 1 unless it is all zeros."""

UNSPECIFIED, NONE, MEAN, LAST, RANK = -1, 0, 1, 3, 4  # enum llama_pooling_type in llama.h
MAX_SEQUENCES = 64
"""Of one evaluation."""
_BATCH = 512
"""Tokens of one evaluation, unless one sequence alone is longer and must be evaluated at once."""
_RECURRENT_SEQUENCES = 4
"""Where each sequence has a state of its own of a fixed size."""
_F32 = "F32"


def normalized(values: Sequence[float]) -> Vector:
    """Return the vector of length 1 in the same direction; zeros stay. Raises ModelError on NaN and infinity."""
    norm = math.sqrt(sum(value * value for value in values))
    if not math.isfinite(norm):
        raise ModelError("the model gave an embedding with values that are no numbers")
    scale = 1.0 / norm if norm else 0.0
    return array("f", [value * scale for value in values])


@dataclass(frozen=True, slots=True)
class EmbeddingLimits:
    """What one evaluation takes at most; lengths in tokens."""

    context_length: int
    """Of one sequence."""
    sequences: int
    n_batch: int
    """Of all sequences together; one alone may be longer."""
    vocabulary_size: int


class Embeds(Protocol):
    """What turns token sequences into vectors."""

    @property
    def limits(self) -> EmbeddingLimits:
        """What it takes at most."""

    async def evaluate(self, sequences: Sequence[Sequence[int]]) -> list[Vector] | None:
        """Return a vector for each sequence, in order; None if it was aborted. Raises OsyncError."""

    def abort(self) -> None:
        """End the evaluation under way soon."""

    async def close(self) -> None:
        """Give all memory back."""


class EmbeddingStage:
    """A context with embeddings on, over a model of its own or one that another stage owns.

    A causal model that takes its last token's state reads a sequence in pieces, as generation does, and computes
    outputs for the last tokens only. Every other one must see a whole sequence in one evaluation.
    """

    def __init__(
        self, thread: EngineThread, model: Model, settings: ContextSettings, *, owns: bool, memory: int = 0
    ) -> None:
        """Make the context; runs in `thread`, as does all that touches llama.cpp.

        `memory` is what model and context may take together in bytes; 0: what the host has.
        """
        self._memory_bytes = memory
        self._thread = thread
        self._owns = owns
        self.model = model
        self._api = model.api
        self._settings = settings
        self._context: Any = None
        self._closed = False
        self._pooling = _pooling_of(model)
        self._reads_pieces = self._pooling == LAST and _is_causal(model)
        # llama.cpp asks "stop?" before each node of the graph. strlen answers without taking the GIL.
        self._stop = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._stop_callback = self._api.ggml_abort_callback(strlen)
        trained = model.train_context_length or settings.context_length
        n_batch = max(1, min(settings.n_batch, _BATCH))
        self.limits = EmbeddingLimits(
            context_length=max(1, min(settings.context_length, trained)),
            # More than tokens of a batch, and llama.cpp ends the process.
            sequences=max(1, min(settings.sequences, MAX_SEQUENCES, n_batch)),
            n_batch=n_batch,
            vocabulary_size=model.vocabulary_size,
        )
        with model.borrow() as pointer:
            self.dimensions: int = self._api.llama_model_n_embd_out(pointer)
        self._token_bytes = model.kv_bytes_per_token(settings.kv_type, settings.flash_attention)
        self._room = 0
        self._memory: Any = None
        self._batch: Batch
        self._make_context(self.limits.n_batch)

    @classmethod
    async def load(
        cls,
        path: Path,
        plan: Callable[[Model], ContextSettings],
        *,
        settings: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
        memory: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> EmbeddingStage:
        """Load an embedding model. Cancelled, it ends and frees all."""
        thread = EngineThread(f"osync-embed-{path.stem}"[:48])
        cancelled = threading.Event()
        loaded: list[EmbeddingStage] = []

        def load() -> EmbeddingStage:
            _check_types(path, read_header(path))
            model = load_model(path, settings, cancelled=cancelled, progress=progress)
            try:
                stage = cls(thread, model, plan(model), owns=True, memory=memory)
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

    @classmethod
    async def over(
        cls, thread: EngineThread, model: Model, settings: ContextSettings, *, memory: int = 0
    ) -> EmbeddingStage:
        """Make an embedding context beside the one that `thread` evaluates; close it before the model."""
        made: list[EmbeddingStage] = []

        def make() -> EmbeddingStage:
            made.append(cls(thread, model, settings, owns=False, memory=memory))
            return made[0]

        def discard() -> None:
            for stage in made:
                stage.free()

        try:
            return await thread.run(make)
        except BaseException:
            thread.post(discard)
            raise

    @property
    def context_bytes(self) -> int:
        """About what the context takes beside the model: KV cache, activations, attention mask, outputs."""
        return self._bytes_for(self._room)

    def _bytes_for(self, room: int) -> int:
        cells = self.limits.context_length if self._reads_pieces else room
        outputs = self.limits.sequences if self._reads_pieces else room
        kv = self._token_bytes * cells if self._memory or not self._room else 0
        return kv + room * (2 * cells + 64 * self.dimensions) + 4 * outputs * self.dimensions

    def _make_context(self, room: int) -> None:
        """Make the context for `room` tokens at once, in place of the one that there is."""
        need = self._bytes_for(room) - (self.context_bytes if self._context else 0)
        available = int(psutil.virtual_memory().available)
        if self._memory_bytes:
            available = min(available, max(0, self._memory_bytes - self.model.size_bytes))
        if self.model.gpu_layers == 0 and need > available:
            raise ModelUnusable(
                f"embedding {room} tokens at once with {self.model.path.name} requires more system memory "
                f"({need / (1 << 30):.1f} GiB) than is available ({available / (1 << 30):.1f} GiB)"
            )
        self._free_context()
        outputs = self.limits.sequences if self._reads_pieces else room
        self._context = self.model.new_embedding_context(
            self._settings,
            sequences=self.limits.sequences,
            n_batch=room,
            n_ctx=max(room, self.limits.context_length) if self._reads_pieces else room,
            pooling=self._pooling,
            outputs=outputs,
        )
        self._memory = self._api.llama_get_memory(self._context)
        self._room = room
        self._batch = Batch(self._api, size=room, sequences=self.limits.sequences)
        self._api.llama_set_abort_callback(self._context, self._stop_callback, ctypes.cast(self._stop, ctypes.c_void_p))

    async def evaluate(self, sequences: Sequence[Sequence[int]]) -> list[Vector] | None:
        """Return a vector for each sequence, in order; None if it was aborted."""
        if self._closed:
            raise ModelError("the model was unloaded")
        self._stop[0] = b"\0"
        return await self._thread.run(lambda: self._evaluate(sequences))

    def abort(self) -> None:
        """End the evaluation under way at its next graph node."""
        self._stop[0] = b"\1"

    async def close(self) -> None:
        """Free the context, and model and thread if they are its own."""
        if self._closed:
            return
        self._closed = True
        self.abort()
        self._thread.post(self.free)  # also if nobody waits for it
        try:
            await self._thread.run(lambda: None)
        finally:
            if self._owns:
                self._thread.close()

    def free(self) -> None:
        """Free the context, and the model if it is its own; runs in the thread."""
        self._free_context()
        if self._owns:
            self.model.free()

    def _free_context(self) -> None:
        context, self._context = self._context, None
        if context:
            self._api.llama_free(context)

    def _evaluate(self, sequences: Sequence[Sequence[int]]) -> list[Vector] | None:
        count = self._check(sequences)
        if not self._context:
            if self._closed:
                raise ModelError("the model was unloaded")
            self._make_context(self.limits.n_batch)
        if count > self._room and not self._reads_pieces:
            # Rare: a long text. Twice the room each time, so that few lengths make a new context.
            longest = max(self.limits.context_length, self.limits.n_batch)
            self._make_context(min(longest, max(count, 1 << (count - 1).bit_length())))
        if self._memory:
            self._api.llama_memory_clear(self._memory, False)
        if self._reads_pieces and not self._read_all_but_last(sequences):
            return None
        rows = [
            Rows(index, first, tuple(tokens[first:]))
            for index, tokens in enumerate(sequences)
            for first in (len(tokens) - 1 if self._reads_pieces else 0,)
        ]
        if not self._compute(self._batch.fill(rows, every_output=True)):
            return None
        return [self._vector(index) for index in range(len(sequences))]

    def _check(self, sequences: Sequence[Sequence[int]]) -> int:
        """Refuse what llama.cpp would answer with an abort of the process; return the number of tokens."""
        limits = self.limits
        if not 1 <= len(sequences) <= limits.sequences:
            raise BadRequest(f"{len(sequences)} sequences are none, or more than {limits.sequences}")
        for tokens in sequences:
            if not 1 <= len(tokens) <= limits.context_length:
                raise BadRequest(f"a sequence of {len(tokens)} tokens is empty, or exceeds the context length")
            if min(tokens) < 0 or max(tokens) >= limits.vocabulary_size:
                raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary_size}")
        count = sum(map(len, sequences))
        if len(sequences) > 1 and count > limits.n_batch:
            raise BadRequest(f"{count} tokens of several sequences are too many for one evaluation")
        return count

    def _read_all_but_last(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Fill the KV cache without computing outputs."""
        self._api.llama_set_embeddings(self._context, False)
        try:
            return all(self._compute(self._batch.fill(rows)) for rows in _pieces(sequences, self._room))
        finally:
            self._api.llama_set_embeddings(self._context, True)

    def _compute(self, batch: Any) -> bool:
        """Evaluate a batch; False if it was aborted."""
        take_errors()
        run = self._api.llama_decode if self._memory else self._api.llama_encode
        code = run(self._context, batch)
        if code and self._stop[0] != b"\0":
            return False
        if code:
            raise ModelError(
                f"the model could not evaluate {self._batch.count} tokens: {reason(take_errors())} (code {code})"
            )
        return True

    def _vector(self, index: int) -> Vector:
        values = self._api.llama_get_embeddings_seq(self._context, index)
        if not values:
            raise ModelError(f"{self.model.path.name} gave no embedding")
        return normalized(values[: self.dimensions])


def _pieces(sequences: Sequence[Sequence[int]], room: int) -> Iterator[list[Rows]]:
    """Yield batches of `room` tokens at most that hold all but the last of each sequence."""
    batch: list[Rows] = []
    free = room
    for index, tokens in enumerate(sequences):
        at = 0
        while at < len(tokens) - 1:
            end = min(len(tokens) - 1, at + free)
            batch.append(Rows(index, at, tuple(tokens[at:end])))
            free -= end - at
            at = end
            if not free:
                yield batch
                batch, free = [], room
    if batch:
        yield batch


def _pooling_of(model: Model) -> int:
    """Return how the model makes one vector of a sequence: as its file says; else the last token's state,
    which saw all others, and the mean where tokens see each other both ways."""
    text = model.metadata(f"{model.metadata('general.architecture')}.pooling_type")
    pooling = int(text) if text.isdigit() else NONE
    if pooling == RANK:
        raise NotSupported(f"cannot embed with {model.path.name}: it is a reranking model")
    if pooling > RANK:
        raise ModelUnusable(f"cannot embed with {model.path.name}: its pooling type {pooling} is not known")
    if pooling == NONE:
        return LAST if _is_causal(model) else MEAN
    return pooling


def texts_at_once(model: Model, *, deterministic: bool) -> int:
    """Return how many sequences are worth one evaluation; one where bits must not depend on neighbours."""
    if deterministic:
        return 1
    return MAX_SEQUENCES if model.can_truncate else _RECURRENT_SEQUENCES


def _is_causal(model: Model) -> bool:
    """Tell whether tokens see only those before them. Not every encoder's file says that it is one."""
    architecture = model.metadata("general.architecture")
    return not is_encoder(architecture) and model.metadata(f"{architecture}.attention.causal") != "false"


_ENCODERS = frozenset(("gemma-embedding", "modern-bert", "eurobert"))


def is_encoder(architecture: str) -> bool:
    """Tell whether models of an architecture only embed, without a KV cache."""
    return architecture in _ENCODERS or "bert" in architecture


def only_embeds(header: GGUFHeader) -> bool:
    """Tell whether a model is for embedding, not for text: it says how to pool, as in Ollama, or is an encoder."""
    return f"{header.architecture}.pooling_type" in header.metadata or is_encoder(header.architecture)


def _check_types(path: Path, header: GGUFHeader) -> None:
    """Refuse vectors in a type that llama.cpp cannot add: it aborts the process on them."""
    for tensor in header.tensors:
        is_vector = len(tensor.shape) == 1 or tensor.name == "token_types.weight"
        if is_vector and tensor.type != _F32 and tensor.name.endswith((".weight", ".bias")):
            raise ModelUnusable(f"cannot load {path.name}: its tensor {tensor.name} is {tensor.type} instead of {_F32}")
