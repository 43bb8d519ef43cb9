"""The proxy's side of one connected link: exchanges that share its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from osync.errors import OsyncError, StreamBroken, UpstreamUnavailable, WireError
from osync.net.convert import error_from, response_head
from osync.net.credit import ReceiveCredit
from osync.net.outbox import Outbox, Outgoing
from osync.net.pipe import Pipe
from osync.pb import node_pb2 as pb
from osync.types import RequestHead, ResponseHead


class RemoteExchange:
    """One request on a link over gRPC (an `Exchange`)."""

    __slots__ = ("_credit", "_ended", "_error", "_head", "_number", "_pipe", "_session", "_waiter", "outgoing")

    def __init__(self, session: Session, number: int) -> None:
        self.outgoing = Outgoing(session.outbox, number)
        self._session = session
        self._number = number
        self._pipe = Pipe(self._consumed)
        self._credit: ReceiveCredit | None = None
        self._head: ResponseHead | None = None
        self._error: OsyncError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

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
        return await self._pipe.read()

    async def send(self, data: bytes) -> None:
        """Send a piece of the request's body; waits for credit. Dropped where the answer has already ended.

        Raises UpstreamError if the link broke.
        """
        await self.outgoing.write(data)
        if self._error is not None:
            raise self._error

    async def finish(self) -> None:
        """End the request's body."""
        self.outgoing.finish()

    def close(self) -> None:
        """Cancel the node's work unless it has ended."""
        if not self._ended:
            self.break_off("the request was cancelled")
        self._pipe.discard()

    def break_off(self, reason: str) -> None:
        """End it here, and cancel the node's work."""
        self.broke(reason)
        if self.outgoing.opened:
            self._session.outbox.cancel(self._number)

    def receive(self, frame: pb.Frame) -> None:
        """Take a frame from the node. Raises OsyncError where the node breaks the protocol."""
        if frame.status:
            if self._head is not None:
                raise WireError("an answer came with two heads")
            self._head = response_head(frame)
            self._wake()
        if data := frame.data:
            if self._head is None:
                raise WireError("an answer's body came before its head")
            if self._credit is None:
                self._credit = ReceiveCredit()
            self._credit.arrived(len(data))
            self._pipe.feed(data)
        if frame.end:
            self.end(error_from(frame))
        elif credit := frame.credit:
            self.outgoing.grant(credit)

    def end(self, error: OsyncError | None) -> None:
        """Take the end of the answer, clean or not; nothing is sent from here on."""
        if self._ended:
            return
        self._ended = True
        self._session.forget(self._number)
        self.outgoing.close()
        if error is not None and self._head is not None and not isinstance(error, StreamBroken):
            error = StreamBroken(str(error))
        elif error is None and self._head is None:
            error = UpstreamUnavailable(f"node {self._session.address} ended a request without an answer")
        self._error = error
        self._pipe.end(error)
        self._wake()

    def broke(self, reason: str) -> None:
        """Take the end of the link itself."""
        text = f"node {self._session.address} broke off: {reason}"
        self.end(UpstreamUnavailable(text) if self._head is None else StreamBroken(text))

    def _consumed(self, size: int) -> None:
        if self._ended or self._credit is None:
            return
        if grant := self._credit.consumed(size):
            self._session.outbox.grant(self._number, grant)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Session:
    """All exchanges of one connected stream. No I/O: frames in, frames out through the outbox."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.outbox = Outbox()
        self._exchanges: dict[int, RemoteExchange] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._exchanges)

    def open(self, head: RequestHead, body: bytes | None) -> RemoteExchange:
        """Start an exchange under a number of its own. Raises WireError if the head cannot be sent."""
        self._last += 1
        exchange = RemoteExchange(self, self._last)
        exchange.outgoing.open(head, body)
        self._exchanges[self._last] = exchange
        return exchange

    def forget(self, number: int) -> None:
        """Remove an exchange; frames that still come for it are dropped."""
        self._exchanges.pop(number, None)

    def receive(self, frames: Iterable[pb.Frame]) -> None:
        """Hand each frame to its exchange; one that breaks the protocol ends its exchange only."""
        exchanges = self._exchanges
        for frame in frames:
            exchange = exchanges.get(frame.exchange)
            if exchange is None:
                continue
            try:
                exchange.receive(frame)
            except OsyncError as error:
                exchange.break_off(str(error))

    def broke(self, reason: str) -> None:
        """End all exchanges, at once."""
        for exchange in list(self._exchanges.values()):
            exchange.broke(reason)
