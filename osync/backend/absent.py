"""The backend of a daemon that is no node: it answers nothing."""

from __future__ import annotations

from collections.abc import Callable

from osync.errors import NoNodes
from osync.net.exchange import Body, Responder
from osync.types import BackendState, RequestHead


class NoBackend:
    """A `Backend` of kind "none"."""

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to close."""

    def state(self) -> BackendState:
        """Return that there is none."""
        return BackendState("none", error="this daemon has no node role")

    def on_change(self, notify: Callable[[], None]) -> None:
        """It never changes."""

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Refuse."""
        raise NoNodes("this daemon has no node role")
