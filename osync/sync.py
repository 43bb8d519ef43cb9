"""The client for plain code."""

from __future__ import annotations

from osync.client.synchronous import OllamaClient

__all__ = ["OllamaClient"]
