"""The client for asyncio (`osync.async` cannot exist: async is a keyword)."""

from __future__ import annotations

from osync.client.asynchronous import AsyncOllamaClient

__all__ = ["AsyncOllamaClient"]
