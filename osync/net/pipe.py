"""Bytes on their way from one task to another in the same loop: a list and a future, no queue, no task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from osync.net.exchange import WINDOW_BYTES


class Pipe:
    """One writer, one reader. `put` keeps at most a window unread; `feed` leaves that to credit."""

    __slots__ = ("_chunks", "_discards", "_ended", "_error", "_on_read", "_reader", "_writer", "unread")

    def __init__(self, on_read: Callable[[int], None] | None = None) -> None:
        self.unread = 0
        self._chunks: list[bytes] = []
        self._on_read = on_read
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._ended = False
        self._discards = False
        self._error: Exception | None = None

    def feed(self, data: bytes) -> None:
        """Add bytes without waiting; bytes that come after the end are dropped."""
        if self._ended or not data:
            return
        self._chunks.append(data)
        self.unread += len(data)
        self._wake_reader()

    async def put(self, data: bytes) -> None:
        """Add bytes; waits while the reader holds a window unread."""
        if len(data) <= WINDOW_BYTES - self.unread:
            self.feed(data)
            return
        rest = memoryview(data)
        while rest and not self._discards:
            room = WINDOW_BYTES - self.unread
            if room > 0:
                self.feed(bytes(rest[:room]))
                rest = rest[room:]
            else:
                self._writer = asyncio.get_running_loop().create_future()
                await self._writer

    def end(self, error: Exception | None = None) -> None:
        """End it: the reader gets what is there, then b"" or `error`. Only the first end counts."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._on_read = None  # nothing more comes, so nothing to grant; and no cycle is left to collect
            self._wake_reader()

    def discard(self, error: Exception | None = None) -> None:
        """End it where nobody reads on: drops what is there, and no writer waits any more."""
        self._discards = True
        self._chunks.clear()
        self.unread = 0
        self.end(error)
        self._wake_writer()

    async def read(self) -> bytes:
        """Return all that is there, waiting for the first byte; b"" at the end. Raises the end's error."""
        while not self._chunks:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if len(self._chunks) == 1:
            data = self._chunks[0]
        else:
            data = b"".join(self._chunks)
        self._chunks.clear()
        self.unread = 0
        self._wake_writer()
        if self._on_read is not None:
            self._on_read(len(data))
        return data

    def _wake_reader(self) -> None:
        waiter, self._reader = self._reader, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake_writer(self) -> None:
        waiter, self._writer = self._writer, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
