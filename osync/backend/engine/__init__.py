"""The backend that answers Ollama's API with llama.cpp inside the daemon: no Ollama needed."""

from __future__ import annotations

from osync.backend.engine.backend import EngineBackend

__all__ = ["EngineBackend"]
