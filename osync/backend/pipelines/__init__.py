"""Models that are split over shards, answering Ollama's API as one more node of a proxy."""

from __future__ import annotations

from osync.backend.pipelines.node import PipelineNode

__all__ = ["PipelineNode"]
