"""A loaded embedding model that answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import structlog

from osync.coordinator.embedding import Embedder, Embeddings
from osync.coordinator.request import Final, Piece
from osync.coordinator.runner import DEFAULT_CONTEXT, RunnerSettings
from osync.engine.devices import LoadSettings
from osync.engine.embedding import EmbeddingStage, texts_at_once
from osync.engine.llama import ContextSettings, Model
from osync.engine.sampling import SamplingOptions
from osync.engine.vocabulary import Vocabulary
from osync.errors import ModelUnusable, NotSupported

log = structlog.get_logger("osync.coordinator")


class EmbeddingRunner:
    """One loaded embedding model: it embeds, and generates nothing."""

    def __init__(self, stage: EmbeddingStage, settings: RunnerSettings) -> None:
        self._stage = stage
        self._closed = False
        self.vocabulary = Vocabulary(stage.model)
        self.context_length = stage.limits.context_length
        self.parallel = settings.parallel
        self.size_bytes = self.size_vram = 0
        self._count_memory()
        self._embedder = Embedder(stage, self.vocabulary, max_queue=settings.max_queue + settings.parallel)

    @classmethod
    async def load(
        cls, path: Path, settings: RunnerSettings, progress: Callable[[float], None] | None = None
    ) -> EmbeddingRunner:
        """Load a GGUF file. Raises ModelUnusable or NotSupported; `progress` is called in another thread."""
        try:
            async with asyncio.timeout(settings.load_timeout_s):
                stage = await EmbeddingStage.load(
                    path,
                    lambda model: plan_embedding(model, settings),
                    settings=LoadSettings(
                        accelerators=settings.accelerators,
                        gpu_layers=settings.gpu_layers,
                        kv_type=settings.kv_type,
                        flash_attention=settings.flash_attention,
                        use_mmap=settings.use_mmap,
                        memory_lock=settings.memory_lock,
                    ),
                    memory=settings.memory,
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
            "embedding_model_loaded",
            file=path.name,
            context_length=runner.context_length,
            dimensions=stage.dimensions,
            size_bytes=runner.size_bytes,
        )
        return runner

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """Return an embedding of each text; cancelling gives the request up. Raises as `Embedder.embed`."""
        try:
            return await self._embedder.embed(texts, truncate=truncate)
        finally:
            self._count_memory()

    async def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Final, None]:
        """Raise NotSupported: an embedding model writes no text."""
        raise NotSupported(f"cannot generate text with {self._stage.model.path.name}: it is an embedding model")
        yield

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens."""
        return await asyncio.to_thread(self.vocabulary.tokenize, text, add_special, parse_special)

    async def close(self) -> None:
        """Fail what is under way and give all memory back."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._embedder.close()
        finally:
            await self._stage.close()

    def _count_memory(self) -> None:
        model = self._stage.model
        self.size_bytes = model.size_bytes + self._stage.context_bytes
        self.size_vram = self.size_bytes * model.gpu_layers // (model.layers + 1)


def plan_embedding(model: Model, settings: RunnerSettings) -> ContextSettings:
    """Choose the context that an embedding model gets."""
    trained = model.train_context_length or DEFAULT_CONTEXT
    return ContextSettings(
        context_length=max(1, min(settings.context_length or DEFAULT_CONTEXT, trained)),
        sequences=texts_at_once(model, deterministic=settings.deterministic),
        n_batch=settings.n_batch,
        threads=settings.threads,
        flash_attention="off" if settings.deterministic else settings.flash_attention,
        kv_type=settings.kv_type,
    )
