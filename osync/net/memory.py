"""The link of a proxy to the node in its own process: the same interface, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from osync.errors import OsyncError, StreamBroken
from osync.net.body import BytesBody, PipeBody
from osync.net.exchange import Body, Serve
from osync.net.pipe import Pipe
from osync.net.serving import answer
from osync.net.tasks import Tasks
from osync.types import NodeState, RequestHead, ResponseHead


class MemoryLink:
    """Passes requests to `serve`, each in a task of its own, and its bytes through bounded windows."""

    def __init__(self, serve: Serve, state: Callable[[], NodeState | None], address: str = "local") -> None:
        self._serve = serve
        self._state = state
        self._address = address
        self._tasks = Tasks("memory_link")

    @property
    def address(self) -> str:
        """Its name in logs and status, "local"."""
        return self._address

    @property
    def state(self) -> NodeState | None:
        """What the node says of itself now."""
        return self._state()

    @property
    def round_trip_s(self) -> float:
        """Nothing: the node is in this process."""
        return 0.0

    def open(self, head: RequestHead, body: bytes | None) -> MemoryExchange:
        """Start an exchange. `body` None: it follows by `send` and `finish`."""
        return MemoryExchange(self._serve, self._tasks, head, body)

    async def close(self) -> None:
        """Cancel what still runs and wait for it."""
        await self._tasks.close()


class MemoryExchange:
    """Both ends of one exchange: an `Exchange` to the proxy, a `Responder` to the node."""

    __slots__ = ("_error", "_head", "_incoming", "_outgoing", "_task", "_waiter")

    def __init__(self, serve: Serve, tasks: Tasks, head: RequestHead, body: bytes | None) -> None:
        self._incoming = Pipe() if body is None else None
        self._outgoing = Pipe()
        self._head: ResponseHead | None = None
        self._error: OsyncError | None = None
        self._waiter: asyncio.Future[None] | None = None
        source: Body = BytesBody(body or b"") if self._incoming is None else PipeBody(self._incoming)
        self._task = tasks.spawn("serve", self._run(serve, head, source))

    async def _run(self, serve: Serve, head: RequestHead, body: Body) -> None:
        error: OsyncError | None = StreamBroken("the request was cancelled")
        try:
            error = await answer(serve, head, body, self)
        finally:  # also where the task is cancelled
            self._error = error
            self._outgoing.end(error)
            if self._incoming is not None:
                self._incoming.discard()
            self._wake()

    @property
    def started(self) -> bool:
        """True once the head is out."""
        return self._head is not None

    async def start(self, head: ResponseHead) -> None:
        """Send the head; once, before any write."""
        if self._head is not None:
            raise RuntimeError("an answer has one head")
        self._head = head
        self._wake()

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while the reader holds a window unread."""
        if self._head is None:
            raise RuntimeError("an answer's head comes before its body")
        await self._outgoing.put(data)

    async def head(self) -> ResponseHead:
        """Wait for the answer's head. Raises the error that came instead of it."""
        while self._head is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._head

    async def read(self) -> bytes:
        """Return the next body bytes, b"" at the clean end. Raises StreamBroken."""
        return await self._outgoing.read()

    async def send(self, data: bytes) -> None:
        """Send a piece of the request's body; dropped where the answer has already ended."""
        if self._incoming is not None:
            await self._incoming.put(data)

    async def finish(self) -> None:
        """End the request's body."""
        if self._incoming is not None:
            self._incoming.end()

    def close(self) -> None:
        """Cancel the serving task unless it has ended."""
        if not self._task.done():
            self._task.cancel()
            self._error = StreamBroken("the request was cancelled")
            self._outgoing.discard(self._error)
            if self._incoming is not None:
                self._incoming.discard(self._error)
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
