"""A loaded model that answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from osync.coordinator.generation import Generation
from osync.coordinator.request import Final, Piece
from osync.engine.llama import KV_TYPES, ContextSettings, Model
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import LocalStage
from osync.engine.vocabulary import Vocabulary
from osync.errors import ModelUnusable, NotSupported

log = structlog.get_logger("osync.coordinator")

DEFAULT_CONTEXT = 8192
"""Of a model that was trained for more, where nobody asks for a length."""
MAX_BATCH = 512
"""Rows of one evaluation."""
_LONG_TEXT = 16 << 10
"""Characters from which a text is tokenized beside the event loop: some milliseconds' work."""
_OVERHEAD = 128 << 20
"""Bytes of compute buffers and the like, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """How a model is loaded. Changing any of it means loading it again."""

    context_length: int = 0
    """Of each sequence; 0: the model's, 8192 at most. Never more than the model was trained for."""
    parallel: int = 4
    threads: int = 0
    """0: as many as cores."""
    n_batch: int = 512
    flash_attention: str = "auto"
    kv_type: str = "f16"
    use_mmap: bool = True
    gpu_layers: int = -1
    """-1: all."""
    max_queue: int = 512
    load_timeout_s: float = 300.0
    deterministic: bool = False


class Runner:
    """One loaded model: `generate` for as many requests at once as it has slots, the rest waits."""

    def __init__(self, stage: LocalStage, settings: RunnerSettings) -> None:
        model = stage.model
        self._stage = stage
        self._settings = settings
        self.vocabulary = Vocabulary(model)
        self.context_length = stage.limits.context_length
        self.parallel = stage.limits.sequences
        self.train_context_length = model.train_context_length
        kv = model.kv_bytes_per_token(settings.kv_type) * self.context_length * self.parallel
        self.size_bytes = model.size_bytes + kv
        self.size_vram = self.size_bytes * model.gpu_layers // (model.layers + 1)
        self._generation = Generation(
            stage, self.vocabulary, max_queue=settings.max_queue, deterministic=settings.deterministic
        )
        self._closed = False

    @classmethod
    async def load(
        cls, path: Path, settings: RunnerSettings, progress: Callable[[float], None] | None = None
    ) -> Runner:
        """Load a GGUF file. Raises ModelUnusable or NotSupported; `progress` is called in another thread."""
        if settings.kv_type not in KV_TYPES:
            raise NotSupported(f"KV cache type {settings.kv_type!r} is not one of {', '.join(KV_TYPES)}")
        try:
            async with asyncio.timeout(settings.load_timeout_s):
                stage = await LocalStage.load(
                    path,
                    lambda model: plan_context(model, settings, psutil.virtual_memory().available),
                    gpu_layers=settings.gpu_layers,
                    use_mmap=settings.use_mmap,
                    progress=progress,
                )
        except TimeoutError as error:
            raise ModelUnusable(f"timed out loading {path.name} after {settings.load_timeout_s:g} s") from error
        try:
            runner = cls(stage, settings)
        except BaseException:
            await stage.close()
            raise
        log.info(
            "model_loaded",
            file=path.name,
            context_length=runner.context_length,
            parallel=runner.parallel,
            size_bytes=runner.size_bytes,
        )
        return runner

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._generation.active

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._generation.queued

    async def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Final, None]:
        """Yield pieces of an answer, at last a Final. Closing the iterator cancels the request."""
        request = self._generation.submit(prompt, options)
        try:
            async with aclosing(request.events()) as events:
                async for event in events:
                    yield event
        finally:
            request.cancel()

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens; a long text does not hold the event loop up."""
        if len(text) < _LONG_TEXT:
            return self.vocabulary.tokenize(text, add_special, parse_special)
        return await asyncio.to_thread(self.vocabulary.tokenize, text, add_special, parse_special)

    async def close(self) -> None:
        """Fail what is under way and give all memory back."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._generation.close()
        finally:
            await self._stage.close()


def too_large(need: int, available: int) -> str:
    """Say in Ollama's words that a model does not fit; in bytes."""
    return (
        f"model requires more system memory ({need / (1 << 30):.1f} GiB) than is available "
        f"({available / (1 << 30):.1f} GiB)"
    )


def plan_context(model: Model, settings: RunnerSettings, available: int) -> ContextSettings:
    """Fit the context into the memory that is there: fewer sequences at once before none at all."""
    trained = model.train_context_length or DEFAULT_CONTEXT
    length = max(4, min(settings.context_length or DEFAULT_CONTEXT, trained))
    token = model.kv_bytes_per_token(settings.kv_type)
    # A cell costs its KV cache, and its column in the attention mask of a batch.
    cell = token + 4 * settings.n_batch
    room = (available - model.size_bytes - _OVERHEAD) // (cell * length)
    on_host = model.gpu_layers == 0
    parallel = max(1, min(settings.parallel, room)) if on_host else settings.parallel
    need = model.size_bytes + _OVERHEAD + cell * length * parallel
    if on_host and room < 1:
        raise ModelUnusable(too_large(need, available))
    if parallel < settings.parallel:
        log.warning("fewer_sequences", file=model.path.name, wanted=settings.parallel, parallel=parallel)
    return ContextSettings(
        context_length=length,
        sequences=parallel,
        # Each sequence needs a row in every evaluation.
        n_batch=max(parallel, min(settings.n_batch, MAX_BATCH)),
        threads=settings.threads,
        flash_attention="off" if settings.deterministic else settings.flash_attention,
        kv_type=settings.kv_type,
        unified=not settings.deterministic,
    )


__all__ = ["DEFAULT_CONTEXT", "Final", "Piece", "Runner", "RunnerSettings"]
