"""One request and its answer, in HTTP's shape, as it crosses a link: the seam between roles.

The proxy side opens an `Exchange` on a `Link`; the node side is a `Serve` callable that reads a
`Body` and writes to a `Responder`. In one process both meet in memory; between hosts, over gRPC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from osync.types import NodeState, RequestHead, ResponseHead

WINDOW_BYTES = 1 << 20
"""Bytes of one direction of one exchange that may wait unread (design section 6)."""


class Body(Protocol):
    """A request's body as the serving side reads it."""

    async def read(self) -> bytes:
        """Return the next piece, whatever is there, and b"" at its end. Raises StreamBroken."""
        ...

    async def read_all(self, limit: int) -> bytes:
        """Return all that is left. Raises FrameTooLarge over `limit` bytes."""
        ...


class Responder(Protocol):
    """Where the serving side writes its answer. Returning from `Serve` is the clean end."""

    @property
    def started(self) -> bool:
        """True once the head is out: from then on an error can only break the stream."""
        ...

    async def start(self, head: ResponseHead) -> None:
        """Send the head; once, before any write."""
        ...

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while the reader holds WINDOW_BYTES unread."""
        ...


Serve = Callable[[RequestHead, Body, Responder], Awaitable[None]]
"""Answers one request. It is cancelled when the client is gone. What it raises before the head
reaches the other side as UpstreamUnavailable (or the OsyncError's own kind), after it as
StreamBroken."""


class Exchange(Protocol):
    """The proxy side's hold on one request. Always `close()` it: that cancels what still runs."""

    async def head(self) -> ResponseHead:
        """Wait for the answer's head. Raises UpstreamError (retryable where its class says so)."""
        ...

    async def read(self) -> bytes:
        """Return the next body bytes, whatever is there, b"" at the clean end. Raises StreamBroken."""
        ...

    async def send(self, data: bytes) -> None:
        """Send a piece of a streamed request body; waits for credit. Raises UpstreamError."""
        ...

    async def finish(self) -> None:
        """End a streamed request body."""
        ...

    def close(self) -> None:
        """Cancel the serving side's work unless it has ended. May be called twice."""
        ...


class Link(Protocol):
    """A proxy's connection to one node, in memory or over gRPC."""

    @property
    def address(self) -> str:
        """host:port as configured or discovered, or "local"."""
        ...

    @property
    def state(self) -> NodeState | None:
        """The newest state that the node pushed; None before the first and while it is down."""
        ...

    @property
    def round_trip_s(self) -> float:
        """Measured time to the node and back; 0.0 where it is not known, or the node is here."""
        ...

    def open(self, head: RequestHead, body: bytes | None) -> Exchange:
        """Start an exchange. `body` None: it follows by `send` and `finish`.

        Raises UpstreamUnavailable where the link is down.
        """
        ...
