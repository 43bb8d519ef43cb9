"""The node's side of one connected link: requests that came in on it, each served by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from osync.errors import CapacityError, OsyncError, StreamBroken, UpstreamUnavailable, WireError
from osync.net.body import BytesBody, PipeBody
from osync.net.convert import request_head
from osync.net.credit import ReceiveCredit
from osync.net.exchange import Body, Serve
from osync.net.outbox import Outbox, Outgoing
from osync.net.pipe import Pipe
from osync.net.serving import answer
from osync.net.tasks import Tasks
from osync.pb import node_pb2 as pb
from osync.types import RequestHead, ResponseHead

MAX_EXCHANGES: Final = 1024
"""Requests that one proxy may have open on a node."""


class ServedExchange:
    """One request from a proxy; the `Responder` that its serving task writes to."""

    __slots__ = ("_credit", "_incoming", "_number", "_outbox", "_started", "body", "outgoing", "task")

    def __init__(self, outbox: Outbox, number: int, opened: pb.Frame) -> None:
        self.outgoing = Outgoing(outbox, number)
        self.task: asyncio.Task[None] | None = None
        self._incoming: Pipe | None = None
        self._credit: ReceiveCredit | None = None
        self.body: Body
        if opened.end:
            self.body = BytesBody(opened.data)
        else:
            self._credit = ReceiveCredit()
            self._incoming = Pipe(self._consumed)
            self.body = PipeBody(self._incoming)
        self._number = number
        self._outbox = outbox
        self._started = False

    @property
    def started(self) -> bool:
        """True once the head is out."""
        return self._started

    async def start(self, head: ResponseHead) -> None:
        """Send the head; once, before any write."""
        if self._started:
            raise RuntimeError("an answer has one head")
        self.outgoing.head(head)
        self._started = True

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while the reader holds a window unread."""
        if not self._started:
            raise RuntimeError("an answer's head comes before its body")
        await self.outgoing.write(data)

    def arrived(self, data: bytes) -> None:
        """Take body bytes from the proxy. Raises OsyncError where it breaks the protocol."""
        if self._incoming is None or self._credit is None:
            raise WireError("a body came after the whole body")
        self._credit.arrived(len(data))
        self._incoming.feed(data)

    def complete(self, error: str) -> None:
        """Take the end of the request's body, clean where `error` is empty."""
        if self._incoming is not None:
            self._incoming.end(StreamBroken(error) if error else None)

    def cancel(self) -> None:
        """Stop the work; nothing more is sent."""
        self.outgoing.close()
        if self.task is not None:
            self.task.cancel()

    def _consumed(self, size: int) -> None:
        if self._credit is not None and (grant := self._credit.consumed(size)):
            self._outbox.grant(self._number, grant)


class ServingSession:
    """All requests of one connected proxy. No I/O but what `serve` does."""

    def __init__(self, serve: Serve, proxy_id: str) -> None:
        self.outbox = Outbox()
        self._serve = serve
        self._tasks = Tasks(f"link.{proxy_id}")
        self._exchanges: dict[int, ServedExchange] = {}
        self._last = 0
        self._refuses = False

    def __len__(self) -> int:
        return len(self._exchanges)

    def receive(self, frames: Iterable[pb.Frame]) -> None:
        """Handle each frame. Raises WireError where exchanges are misnumbered: then nothing is certain."""
        exchanges = self._exchanges
        for frame in frames:
            if frame.method:
                self._open(frame)
                continue
            number = frame.exchange
            exchange = exchanges.get(number)
            if exchange is None:
                continue
            if frame.cancel:
                self._forget(number).cancel()
                continue
            if credit := frame.credit:
                exchange.outgoing.grant(credit)
            if data := frame.data:
                self._data(number, exchange, data)
            if frame.end:
                exchange.complete(frame.failure.error)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait that long for those that run."""
        self._refuses = True
        if running := [exchange.task for exchange in self._exchanges.values() if exchange.task is not None]:
            await asyncio.wait(running, timeout=timeout_s)

    async def close(self) -> None:
        """Cancel all requests and wait for them."""
        for exchange in self._exchanges.values():
            exchange.cancel()
        await self._tasks.close()

    def _open(self, opened: pb.Frame) -> None:
        number = opened.exchange
        if number <= self._last:
            raise WireError(f"exchange {number} was opened after {self._last}")
        self._last = number
        exchange = ServedExchange(self.outbox, number, opened)
        if self._refuses:
            exchange.outgoing.finish(UpstreamUnavailable("the node is stopping"))
            return
        if len(self._tasks) >= MAX_EXCHANGES:
            exchange.outgoing.finish(CapacityError(f"{MAX_EXCHANGES} requests are open on this link"))
            return
        head = request_head(opened)
        self._exchanges[number] = exchange
        exchange.task = self._tasks.spawn("serve", self._answer(number, exchange, head))
        if not opened.end and (data := opened.data):
            self._data(number, exchange, data)

    async def _answer(self, number: int, exchange: ServedExchange, head: RequestHead) -> None:
        error = await answer(self._serve, head, exchange.body, exchange)
        # All that was written is within credit by now, or the request failed: no frame is needed any more.
        self._exchanges.pop(number, None)
        exchange.outgoing.finish(error)

    def _data(self, number: int, exchange: ServedExchange, data: bytes) -> None:
        try:
            exchange.arrived(data)
        except OsyncError as error:
            self._forget(number)
            if exchange.task is not None:
                exchange.task.cancel()
            exchange.outgoing.finish(error)

    def _forget(self, number: int) -> ServedExchange:
        return self._exchanges.pop(number)
