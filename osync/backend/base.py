"""What a node fronts: one inference backend on its host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from osync.net.exchange import Body, Responder
from osync.types import BackendState, RequestHead


class Backend(Protocol):
    """An Ollama, or something that answers as one. An async context manager's worth of lifetime."""

    async def start(self) -> None:
        """Begin watching or loading; returns soon, ready or not. `state()` tells which."""
        ...

    async def close(self) -> None:
        """Cancel what runs and free everything; bounded to a few seconds."""
        ...

    def state(self) -> BackendState:
        """Return what it knows of itself, without waiting."""
        ...

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` in the loop whenever `state()` would answer something new."""
        ...

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request of Ollama's HTTP API (a `Serve`)."""
        ...
