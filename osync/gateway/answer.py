"""The responder that handlers write to: it stamps the head and keeps account of what went out."""

from __future__ import annotations

from collections.abc import Coroutine
from time import monotonic
from typing import Any

from osync.net.exchange import Responder
from osync.types import Headers, ResponseHead


class Answer:
    """A `Responder` around another one. `status` is 0 until the head is out."""

    __slots__ = ("_headers", "_out", "_stamp", "broke", "first_at", "sent", "status", "tail")

    def __init__(self, out: Responder, stamp: Headers) -> None:
        self._out = out
        self._stamp = stamp
        self._headers: Headers = ()
        self.status = 0
        self.broke = False
        """True if the answer ended with an error after its head."""
        self.first_at = 0.0
        self.sent = 0
        self.tail = b""

    @property
    def started(self) -> bool:
        """True once the head is out."""
        return self.status != 0

    @property
    def content_type(self) -> str:
        """Its Content-Type, "" where there is none."""
        return next((value for name, value in self._headers if name.lower() == "content-type"), "")

    @property
    def has_length(self) -> bool:
        """True if its head announced how long it is."""
        return any(name.lower() == "content-length" for name, _ in self._headers)

    def stamp(self, headers: Headers) -> None:
        """Add headers to the head that is to come."""
        self._stamp += headers

    def start(self, head: ResponseHead) -> Coroutine[Any, Any, None]:
        """Send the head with this gateway's own headers."""
        self.status = head.status
        self.first_at = monotonic()
        self._headers = head.headers
        return self._out.start(ResponseHead(head.status, head.headers + self._stamp))

    def write(self, data: bytes) -> Coroutine[Any, Any, None]:
        """Send body bytes."""  # no coroutine of its own: this is once per token
        self.sent += len(data)
        self.tail = data
        return self._out.write(data)
