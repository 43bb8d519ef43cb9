"""A loaded model that answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import structlog

from osync.coordinator.answering import Answering
from osync.coordinator.embedding import Embedder, Embeddings
from osync.coordinator.generation import Generation
from osync.coordinator.request import Final, Piece
from osync.engine.devices import Accelerators, LoadSettings
from osync.engine.embedding import EmbeddingStage, texts_at_once
from osync.engine.llama import KV_TYPES, ContextSettings, Model
from osync.engine.stage import LocalStage
from osync.engine.vocabulary import Vocabulary
from osync.errors import ModelError, ModelUnusable, NotSupported

log = structlog.get_logger("osync.coordinator")

DEFAULT_CONTEXT = 8192
"""Of a model that was trained for more, where nobody asks for a length."""
MAX_BATCH = 512
"""Rows of one evaluation."""
OVERHEAD = 128 << 20
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
    memory_lock: bool = False
    memory: int = 0
    """Bytes that it may take; 0: what is available."""
    gpu_layers: int = -1
    """-1: as many as fit."""
    accelerators: Accelerators = field(default_factory=Accelerators)
    max_queue: int = 512
    load_timeout_s: float = 300.0
    deterministic: bool = False
    embeds: bool = False
    """An embedding model: it generates nothing."""
    stages: int = 0
    """Over shards: at most so many stages; 0: any number."""
    shards: tuple[str, ...] = ()
    """Over shards: only these, by address, node id or host name; none: all."""
    activation_dtype: str = ""
    """Over shards: what stages send each other; "": the daemon's setting."""
    drafts: bool = True
    """Over shards: verify drafts by prompt look-up where that pays."""


class Runner(Answering):
    """One loaded model on this host."""

    def __init__(self, stage: LocalStage, settings: RunnerSettings) -> None:
        model = stage.model
        self._stage = stage
        self._settings = settings
        words = Vocabulary(model)
        super().__init__(
            words,
            # Drafts here would change the shape of evaluations, and with it what a seed promises.
            Generation(stage, words, max_queue=settings.max_queue, deterministic=settings.deterministic, drafts=False),
        )
        self.context_length = stage.limits.context_length
        self.parallel = stage.limits.sequences
        self.train_context_length = model.train_context_length
        token = model.kv_bytes_per_token(settings.kv_type, _flash_attention(settings))
        size = model.size_bytes + token * self.context_length * self.parallel + model.compute_bytes
        self.size_bytes = size + token * stage.limits.kept_tokens
        self.size_vram = size * model.gpu_layers // (model.layers + 1)
        self._embedding: tuple[EmbeddingStage, Embedder] | None = None
        self._embedding_lock = asyncio.Lock()
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
                    lambda model: plan_context(model, settings, available_memory(settings)),
                    settings=LoadSettings(
                        accelerators=settings.accelerators,
                        gpu_layers=settings.gpu_layers,
                        kv_tokens=(settings.context_length or DEFAULT_CONTEXT) * settings.parallel,
                        kv_type=settings.kv_type,
                        flash_attention=_flash_attention(settings),
                        use_mmap=settings.use_mmap,
                        memory_lock=settings.memory_lock,
                    ),
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

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """Return an embedding of each text, in a context of its own; cancelling gives the request up.

        Raises as `Embedder.embed`, and ModelUnusable where there is no memory for the context.
        """
        async with self._embedding_lock:
            if self._closed:
                raise ModelError("the model was unloaded")
            if self._embedding is None:
                self._embedding = await self._make_embedding()
        return await self._embedding[1].embed(texts, truncate=truncate)

    async def _make_embedding(self) -> tuple[EmbeddingStage, Embedder]:
        settings, model = self._settings, self._stage.model
        context = ContextSettings(
            context_length=self.context_length,
            sequences=texts_at_once(model, deterministic=settings.deterministic),
            n_batch=settings.n_batch,
            threads=settings.threads,
            flash_attention=_flash_attention(settings),
            kv_type=settings.kv_type,
        )
        memory = max(1, settings.memory - (self.size_bytes - model.size_bytes)) if settings.memory else 0
        # In the same thread: two evaluations at once would fight for the cores.
        stage = await EmbeddingStage.over(self._stage.thread, model, context, memory=memory)
        self.size_bytes += stage.context_bytes
        self.size_vram = self.size_bytes * model.gpu_layers // (model.layers + 1)
        return stage, Embedder(stage, self.vocabulary, max_queue=settings.max_queue + settings.parallel)

    async def close(self) -> None:
        """Fail what is under way and give all memory back."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._generation.close()
        finally:
            try:
                await self._close_embedding()
            finally:
                await self._stage.close()

    async def _close_embedding(self) -> None:
        async with self._embedding_lock:  # one that is being made must go before the model does
            if self._embedding is None:
                return
            stage, embedder = self._embedding
            try:
                await embedder.close()
            finally:
                await stage.close()


def available_memory(settings: RunnerSettings) -> int:
    """Return the bytes that a model may take now."""
    available = int(psutil.virtual_memory().available)
    return min(available, settings.memory) if settings.memory else available


def too_large(need: int, available: int) -> str:
    """Say in Ollama's words that a model does not fit; in bytes."""
    return (
        f"model requires more system memory ({need / (1 << 30):.1f} GiB) than is available "
        f"({available / (1 << 30):.1f} GiB)"
    )


def _flash_attention(settings: RunnerSettings) -> str:
    return "off" if settings.deterministic else settings.flash_attention


def plan_context(model: Model, settings: RunnerSettings, available: int) -> ContextSettings:
    """Fit the context into the memory that is there: fewer sequences at once before none at all."""
    trained = model.train_context_length or DEFAULT_CONTEXT
    length = max(4, min(settings.context_length or DEFAULT_CONTEXT, trained))
    token = model.kv_bytes_per_token(settings.kv_type, _flash_attention(settings))
    # A cell costs its KV cache, and its column in the attention mask of a batch.
    cell = token + 4 * settings.n_batch
    room = (available - model.size_bytes - OVERHEAD) // (cell * length)
    on_host = model.gpu_layers == 0
    parallel = max(1, min(settings.parallel, room)) if on_host else settings.parallel
    need = model.size_bytes + OVERHEAD + cell * length * parallel
    if on_host and room < 1:
        raise ModelUnusable(too_large(need, available))
    if parallel < settings.parallel:
        log.warning("fewer_sequences", file=model.path.name, wanted=settings.parallel, parallel=parallel)
    rest = available - (need if on_host else OVERHEAD)
    return ContextSettings(
        context_length=length,
        sequences=parallel,
        # Each sequence needs a row in every evaluation.
        n_batch=max(parallel, min(settings.n_batch, MAX_BATCH)),
        threads=settings.threads,
        flash_attention=_flash_attention(settings),
        kv_type=settings.kv_type,
        # As much as another sequence, where that leaves half of the memory that nobody needs.
        kept_tokens=max(0, min(length, rest // 2 // token)),
        unified=not settings.deterministic,
    )


__all__ = ["DEFAULT_CONTEXT", "Final", "Piece", "Runner", "RunnerSettings"]
