"""Embedding requests for one model: batched over requests, in turn, with a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from osync.coordinator.generation import SERVER_BUSY, TOO_LONG
from osync.engine.embedding import Embeds, Vector
from osync.errors import BadRequest, CapacityError, ModelError, OsyncError
from osync.net.tasks import Tasks

log = structlog.get_logger("osync.coordinator")

_LONG_TEXT = 16 << 10
"""Characters from which texts are tokenized beside the event loop: some milliseconds' work."""


class Tokenizes(Protocol):
    """The part of a vocabulary that is needed here."""

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The answer to an embedding request."""

    vectors: tuple[Vector, ...]
    """In the order of the texts, each of length 1."""
    tokens: int
    """That were evaluated."""


class _Request:
    """Token sequences, and the vectors that are there already."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.next = 0
        """The first that is in no batch yet."""
        self.vectors: list[Vector | None] = [None] * len(sequences)
        self.missing = len(sequences)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: OsyncError) -> None:
        """Tell who waits."""
        if not self.done.done():
            self.done.set_exception(error)


_Batch = list[tuple[_Request, int]]


class Embedder:
    """Feeds one stage from all requests for it; each gets a place in turn, so that long ones hold up nobody."""

    def __init__(self, stage: Embeds, words: Tokenizes, *, max_queue: int = 512) -> None:
        self._stage = stage
        self._words = words
        self._limits = stage.limits
        self._max_queue = max_queue
        self._requests: set[_Request] = set()
        self._waiting: deque[_Request] = deque()
        self._flying: _Batch = []
        self._wake = asyncio.Event()
        self._closed = False
        self._suffix = _suffix(words)
        self._tasks = Tasks("coordinator")
        self._tasks.spawn("embedding", self._run())

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """Return an embedding of each text. Cancelled, what is not evaluated yet never is.

        Raises BadRequest for a text without tokens, or longer than the context unless `truncate`;
        CapacityError once the queue is full.
        """
        self._check_open()
        if sum(map(len, texts)) < _LONG_TEXT:
            sequences = self._tokenize(texts, truncate)
        else:
            sequences = await asyncio.to_thread(self._tokenize, texts, truncate)
        self._check_open()
        if not sequences:
            return Embeddings((), 0)
        request = _Request(sequences)
        self._requests.add(request)
        self._waiting.append(request)
        self._wake.set()
        try:
            await request.done
        finally:
            self._leave(request)
        vectors = tuple(vector for vector in request.vectors if vector is not None)
        return Embeddings(vectors, sum(map(len, sequences)))

    async def close(self) -> None:
        """Fail what is under way and end the loop; the stage stays to its owner."""
        self._closed = True
        self._stage.abort()
        await self._tasks.close()
        for request in self._requests:
            request.fail(ModelError("the model was unloaded"))

    def _check_open(self) -> None:
        if self._closed:
            raise ModelError("the model was unloaded")
        if len(self._requests) >= self._max_queue:
            raise CapacityError(SERVER_BUSY)

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        """Return each text's tokens, cut to the context as Ollama does: the special ones at the end stay."""
        longest = self._limits.context_length
        sequences = []
        for text in texts:
            tokens = self._words.tokenize(text)
            if not tokens:
                raise BadRequest("input cannot be an empty string")
            if len(tokens) > longest:
                if not truncate:
                    raise BadRequest(TOO_LONG)
                end = self._suffix[: longest - 1]
                tokens = tokens[: longest - len(end)] + end
            sequences.append(tokens)
        return sequences

    def _leave(self, request: _Request) -> None:
        self._requests.discard(request)
        if request in self._waiting:
            self._waiting.remove(request)
        if self._flying and not any(other in self._requests for other, _ in self._flying):
            self._stage.abort()

    async def _run(self) -> None:
        while True:
            self._flying = self._next_batch()
            if not self._flying:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await self._evaluate(self._flying)
            finally:
                self._flying = []

    def _next_batch(self) -> _Batch:
        """Take what fits into one evaluation, one text of each request in turn."""
        batch: _Batch = []
        tokens = 0
        while self._waiting and len(batch) < self._limits.sequences:
            request = self._waiting[0]
            if request.done.done():  # failed, and its owner has not heard of it yet
                self._waiting.popleft()
                continue
            length = len(request.sequences[request.next])
            if batch and tokens + length > self._limits.n_batch:
                break
            tokens += length
            batch.append((request, request.next))
            request.next += 1
            self._waiting.popleft()
            if request.next < len(request.sequences):
                self._waiting.append(request)
        return batch

    async def _evaluate(self, batch: _Batch) -> None:
        try:
            vectors = await self._stage.evaluate([request.sequences[index] for request, index in batch])
        except Exception as error:  # whatever it was, it concerns this batch's requests only
            log.error("embedding_failed", texts=len(batch), error=repr(error))
            failure = error if isinstance(error, OsyncError) else ModelError(f"the model broke: {error!r}")
            for request, _ in batch:
                request.fail(failure)
            return
        if vectors is None:  # aborted, because all had left
            for request, _ in batch:
                request.fail(ModelError("the evaluation was stopped"))
            return
        for (request, index), vector in zip(batch, vectors, strict=True):
            request.vectors[index] = vector
            request.missing -= 1
            if not request.missing and not request.done.done():
                request.done.set_result(None)


def _suffix(words: Tokenizes) -> list[int]:
    """Return the special tokens that the model wants behind a text, such as [SEP] or an end of sequence."""
    plain, whole = words.tokenize("a", False), words.tokenize("a")
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[at + len(plain) :]
    return []
