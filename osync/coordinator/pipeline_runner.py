"""A loaded model whose layers are on other hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from osync.coordinator.answering import Answering
from osync.coordinator.embedding import Embeddings
from osync.coordinator.generation import Generation
from osync.coordinator.pipeline import Pipeline
from osync.engine.llama import Model
from osync.engine.vocabulary import Vocabulary
from osync.errors import NotSupported


class PipelineRunner(Answering):
    """Answers requests over a pipeline; `closed` is called when it has given everything back."""

    def __init__(
        self,
        pipeline: Pipeline,
        vocabulary: Model,
        *,
        size_bytes: int,
        max_queue: int,
        deterministic: bool,
        drafts: bool,
        closed: Callable[[], None],
    ) -> None:
        words = Vocabulary(vocabulary)
        super().__init__(
            words, Generation(pipeline, words, max_queue=max_queue, deterministic=deterministic, drafts=drafts)
        )
        self.pipeline = pipeline
        self.context_length = pipeline.limits.context_length
        self.parallel = pipeline.limits.sequences
        self.size_bytes = size_bytes
        self.size_vram = 0
        self._model = vocabulary
        self._closed = closed

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """Refuse: embeddings need all layers in one place."""
        raise NotSupported("a model that is split over shards gives no embeddings; use a node that has it whole")

    async def close(self) -> None:
        """Fail what is under way and give all stages back."""
        self._closed()
        try:
            await self._generation.close()
        finally:
            await self.pipeline.close()
            await asyncio.to_thread(self._model.free)
