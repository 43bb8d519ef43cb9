"""What waits to be sent on a link: frames of all exchanges gather here until the next message.

Nothing here awaits the network. One task per link takes what has gathered, sends it in one message, and
meanwhile the next gathers: so messages grow with the load, and a single token still goes out at once.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from osync.errors import OsyncError
from osync.net.convert import fill_end, join_headers
from osync.net.credit import SendCredit
from osync.pb import node_pb2 as pb
from osync.types import RequestHead, ResponseHead

FRAME_BYTES: Final = 256 << 10
"""Body bytes in one frame, so that a large transfer leaves room for others in each message."""
MESSAGE_BYTES: Final = 1 << 20
"""Body bytes in one message, give or take a frame."""


class Frames(Protocol):
    """The repeated field of the message under construction; adding in place saves a copy per frame."""

    def add(self, *, exchange: int = ..., credit: int = ..., cancel: bool = ...) -> pb.Frame:
        """Append a frame."""
        ...


class Outgoing:
    """One direction of one exchange, on its sending side."""

    __slots__ = (
        "_box", "_chunks", "_closed", "_credit", "_end", "_error", "_head", "_headers", "_offset", "_size", "_waiter",
        "exchange", "opened",
    )  # fmt: skip

    def __init__(self, box: Outbox, exchange: int) -> None:
        self.exchange = exchange
        self.opened = False
        """True once its first frame is on its way."""
        self._box = box
        self._head: RequestHead | ResponseHead | None = None
        self._headers = b""
        self._chunks: list[bytes] = []
        self._offset = 0
        self._size = 0
        self._credit = SendCredit()
        self._end = False
        self._error: OsyncError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def open(self, head: RequestHead, body: bytes | None) -> None:
        """Send a request's head, and its body where it is known. Raises WireError if the head cannot be sent."""
        self.head(head)
        if body is not None:
            if body:
                self._chunks.append(body)
                self._size = len(body)
            self._end = True

    def head(self, head: RequestHead | ResponseHead) -> None:
        """Send a head. Dropped once closed. Raises WireError if it cannot be sent."""
        if self._closed:
            return
        self._headers = join_headers(head.headers)
        self._head = head
        self._box.ready(self)

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while more is on hand than there is credit for. Dropped once closed."""
        if self._closed or not data:
            return
        self._chunks.append(data)
        self._size += len(data)
        self._box.ready(self)
        while self._size > self._credit.left and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def finish(self, error: OsyncError | None = None) -> None:
        """End this direction, after all that was written; an error does not wait for credit."""
        if not self._closed and not self._end:
            self._end = True
            self._error = error
            self._box.ready(self)

    def grant(self, size: int) -> None:
        """Take the other side's credit."""
        self._credit.grant(size)
        if self._size:
            self._box.ready(self)
        if self._size <= self._credit.left:
            self._wake()

    def close(self) -> None:
        """Drop what waits; nothing more is sent, and no writer waits any more."""
        if self._closed:
            return  # all is sent
        self._closed = True
        self._chunks.clear()
        self._size = 0
        self._box.drop(self)
        self._wake()

    def fill(self, frames: Frames) -> int:
        """Add a frame of what may go now, FRAME_BYTES at most; return the bytes of body in it."""
        self.opened = True
        size = self._credit.take(min(self._size, FRAME_BYTES)) if self._size else 0
        ends = self._end and (self._size == size or (self._error is not None and not self._credit.left))
        head = self._head
        if head is None and not size and not ends:
            return 0  # no credit
        frame = frames.add()
        frame.exchange = self.exchange
        if head is not None:
            self._head = None
            if isinstance(head, RequestHead):
                frame.method = head.method
                frame.target = head.target.encode("utf-8", "surrogateescape")
            else:
                frame.status = head.status
            frame.headers = self._headers
        if size:
            frame.data = self._take(size)
        if ends:
            self._closed = True
            if self._error is None:
                frame.end = True
            else:
                fill_end(frame, self._error)
                self._chunks.clear()
                self._size = 0
        elif self._size and self._credit.left:
            self._box.ready(self)
        return size

    def _take(self, size: int) -> bytes:
        self._size -= size
        chunks = self._chunks
        if not self._offset and not self._size:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            return data
        parts: list[memoryview] = []
        used = 0
        while size:
            chunk = chunks[used]
            part = memoryview(chunk)[self._offset : self._offset + size]
            size -= len(part)
            self._offset += len(part)
            parts.append(part)
            if self._offset == len(chunk):
                used += 1
                self._offset = 0
        del chunks[:used]
        return b"".join(parts)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Outbox:
    """All that one side of a link has to send."""

    def __init__(self) -> None:
        self._ready: dict[int, Outgoing] = {}
        self._control: list[tuple[int, int]] = []
        self._woken = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """True once it is closed and empty."""
        return self._closed and not self._ready and not self._control

    def close(self) -> None:
        """Say that no more comes: what is there still goes out."""
        self._closed = True
        self.wake()

    def ready(self, outgoing: Outgoing) -> None:
        """Note that an exchange has something to send."""
        self._ready[outgoing.exchange] = outgoing
        if not self._woken:
            self.wake()

    def drop(self, outgoing: Outgoing) -> None:
        """Forget an exchange's frames that have not gone out."""
        self._ready.pop(outgoing.exchange, None)

    def grant(self, exchange: int, size: int) -> None:
        """Send credit."""
        self._control.append((exchange, size))
        self.wake()

    def cancel(self, exchange: int) -> None:
        """Send a cancel."""
        self._control.append((exchange, 0))
        self.wake()

    def wake(self) -> None:
        """Let `wait` return."""
        self._woken = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until something may be there to send."""
        while not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._woken = False

    def fill(self, frames: Frames) -> None:
        """Move what is ready into a message; what does not fit goes first into the next one."""
        if self._control:
            control, self._control = self._control, []
            for exchange, credit in control:
                if credit:
                    frames.add(exchange=exchange, credit=credit)
                else:
                    frames.add(exchange=exchange, cancel=True)
        ready, self._ready = self._ready, {}
        if len(ready) == 1:  # most often
            next(iter(ready.values())).fill(frames)
            return
        budget = MESSAGE_BYTES
        while ready and budget > 0:
            exchange = next(iter(ready))
            budget -= ready.pop(exchange).fill(frames)
        if ready:
            self._ready = ready | self._ready
            self.wake()
