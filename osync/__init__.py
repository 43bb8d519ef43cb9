"""osync turns several machines that run Ollama into one Ollama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osync.client.asynchronous import AsyncOllamaClient
    from osync.client.synchronous import OllamaClient

from osync.version import __version__

__all__ = ["AsyncOllamaClient", "OllamaClient", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a client when it is first asked for: the daemon and the commands need not pay for it."""
    if name == "AsyncOllamaClient":
        from osync.client.asynchronous import AsyncOllamaClient

        return AsyncOllamaClient
    if name == "OllamaClient":
        from osync.client.synchronous import OllamaClient

        return OllamaClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
