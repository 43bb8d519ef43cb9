"""The responder that handlers write to: it stamps the head and keeps account of what went out."""

from __future__ import annotations

from time import perf_counter

from osync.net.exchange import Responder
from osync.types import Headers, ResponseHead


class Answer:
    """A `Responder` around another one. `status` is 0 until the head is out."""

    __slots__ = ("_out", "_stamp", "broke", "content_type", "first_at", "has_length", "sent", "status", "tail")

    def __init__(self, out: Responder, stamp: Headers) -> None:
        self._out = out
        self._stamp = stamp
        self.status = 0
        self.broke = False
        """True if the answer ended with an error after its head."""
        self.content_type = ""
        self.has_length = False
        self.first_at = 0.0
        self.sent = 0
        self.tail = b""

    @property
    def started(self) -> bool:
        """True once the head is out."""
        return self.status != 0

    @property
    def ends_line(self) -> bool:
        """True if what went out so far ends a line, or nothing did."""
        return not self.sent or self.tail.endswith(b"\n")

    def stamp(self, headers: Headers) -> None:
        """Add headers to the head that is to come."""
        self._stamp += headers

    async def start(self, head: ResponseHead) -> None:
        """Send the head with this gateway's own headers."""
        self.status = head.status
        self.first_at = perf_counter()
        for name, value in head.headers:
            lower = name.lower()
            if lower == "content-type":
                self.content_type = value
            elif lower == "content-length":
                self.has_length = True
        await self._out.start(ResponseHead(head.status, head.headers + self._stamp))

    async def write(self, data: bytes) -> None:
        """Send body bytes."""
        self.sent += len(data)
        self.tail = data
        await self._out.write(data)
