"""One HTTP/1.1 connection, and the answer that comes in on it."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from osync.backend.http1 import AnswerParser, BadAnswer
from osync.net.exchange import WINDOW_BYTES
from osync.types import ResponseHead

_ONE_WRITE_BYTES = 64 << 10  # up to here, one copy costs less than a second write
_CUT_BYTES = 1 << 18


class BrokenOff(OSError):
    """The connection ended, or made no sense, before the answer's end."""


class Owner(Protocol):
    """What keeps the connections."""

    def joined(self, connection: Connection) -> None:
        """It is open."""
        ...

    def keep(self, connection: Connection) -> None:
        """It is free for a next request."""
        ...

    def lost(self, connection: Connection) -> None:
        """It is closed."""
        ...


class Answer:
    """One request's answer as it comes in. Always `close()` it: that breaks off what still runs."""

    __slots__ = ("_connection", "_error", "_is_paused", "_waiter", "parser", "upload")

    def __init__(self, connection: Connection, method: str) -> None:
        self.parser = AnswerParser(method)
        self.upload: asyncio.Task[None] | None = None
        self._connection: Connection | None = connection
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_paused = False

    async def head(self) -> ResponseHead:
        """Wait for the head. Raises BrokenOff, or why the request's body could not be read; closed then."""
        try:
            while self.parser.head is None:
                await self._more()
        except BaseException:
            self.close()
            raise
        return self.parser.head

    async def read(self) -> bytes:
        """Return the next body bytes, b"" at the clean end. Raises as `head()`, after all that came."""
        parser = self.parser
        while not parser.pieces:
            if parser.complete:
                return b""
            await self._more()
        data = parser.take()
        if self._is_paused:
            self._is_paused = False
            if self._connection is not None:
                self._connection.resume()
        return data

    def close(self) -> None:
        """Close the connection unless the answer has ended; stop sending the request's body."""
        self.fail(BrokenOff("it was closed on this side"))

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What follows is the connection's.

    def feed(self, data: bytes) -> None:
        """Take bytes that came."""
        parser = self.parser
        try:
            parser.feed(data)
        except BadAnswer as error:
            self.fail(BrokenOff(f"its answer is not sound: {error}"))
            return
        if parser.complete:
            self._end()
        elif parser.size > WINDOW_BYTES and not self._is_paused and self._connection is not None:
            self._is_paused = True
            self._connection.pause()
        self._wake()

    def feed_eof(self) -> None:
        """Nothing more will come."""
        self.parser.feed_eof()
        if self.parser.complete:
            self._end()
            self._wake()

    def fail(self, error: Exception) -> None:
        """Break off, unless the answer has ended."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._error = error
            self.parser.close()
            connection.drop()
            self._stop_upload()
            self._wake()

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._is_paused:
                connection.resume()
            connection.leave(self.parser.reusable and (self.upload is None or self.upload.done()))
            self._stop_upload()

    def _stop_upload(self) -> None:
        if self.upload is not None:
            self.upload.cancel()
            self.upload = None


class Connection(asyncio.Protocol):
    """One connection, with at most one answer on its way."""

    def __init__(self, owner: Owner) -> None:
        self.idle_since = 0.0
        self._owner = owner
        self._answer: Answer | None = None
        self._transport: asyncio.Transport
        self._full: asyncio.Event | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the owner's connections."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._owner.joined(self)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; without a request they are a reason to go."""
        if self._answer is None:
            self.drop()
        else:
            self._answer.feed(data)

    def eof_received(self) -> None:
        """Tell the answer; the transport closes itself."""
        if self._answer is not None:
            self._answer.feed_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the owner; break the answer off."""
        if self._answer is not None:
            self._answer.fail(BrokenOff("it closed the connection" if exc is None else why(exc)))
        self.resume_writing()
        self._owner.lost(self)

    def pause_writing(self) -> None:
        """Have an upload wait."""
        self._full = asyncio.Event()

    def resume_writing(self) -> None:
        """Have an upload go on."""
        if self._full is not None:
            self._full.set()
            self._full = None

    @property
    def is_open(self) -> bool:
        """Return True if a request may be sent."""
        return not self._transport.is_closing()

    def pause(self) -> None:
        """Read no more for now."""
        if self.is_open:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.is_open:
            self._transport.resume_reading()

    def send(self, method: str, head: bytes, data: bytes) -> Answer:
        """Send a request's head and the first of its body."""
        self._answer = answer = Answer(self, method)
        if len(data) <= _ONE_WRITE_BYTES:
            self._transport.write(head + data)
        else:
            self._transport.write(head)
            self._transport.write(data)
        return answer

    async def send_more(self, data: bytes, is_chunked: bool) -> None:
        """Send a piece of a body as soon as the server takes it."""
        for at in range(0, len(data), _CUT_BYTES):
            cut = data[at : at + _CUT_BYTES]
            self._transport.write(b"%x\r\n%b\r\n" % (len(cut), cut) if is_chunked else cut)
            while self._full is not None:
                await self._full.wait()

    def finish(self, is_chunked: bool) -> None:
        """End a body."""
        if is_chunked:
            self._transport.write(b"0\r\n\r\n")

    def leave(self, is_reusable: bool) -> None:
        """The answer has ended: be kept, or go."""
        self._answer = None
        if is_reusable and self.is_open and not self._transport.get_write_buffer_size():
            self._owner.keep(self)
        else:
            self._transport.abort()

    def drop(self) -> None:
        """Go at once, whatever is still unsent or unread."""
        self._answer = None
        self._transport.abort()

    def close(self) -> None:
        """Break off what runs, and go."""
        if self._answer is not None:
            self._answer.close()
        else:
            self.drop()


def why(error: Exception) -> str:
    """Return why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
