"""The load: closed-loop clients on asyncio's protocol, which cost little beside what they measure."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

import orjson


def request(body: dict[str, object]) -> bytes:
    """Return the bytes of one POST /api/chat."""
    data = orjson.dumps({"model": "bench", "messages": [{"role": "user", "content": "hello"}], **body})
    return (
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
    )


@dataclass(slots=True)
class Result:
    """What one run saw: seconds per request, seconds between chunks, and how long it all took."""

    latencies: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    chunks: int = 0
    seconds: float = 0.0
    failed: int = 0


class Client(asyncio.Protocol):
    """One connection that sends the next request when an answer is complete."""

    def __init__(self, data: bytes, result: Result, until: float, requests: int, done: asyncio.Future[None]) -> None:
        self.data, self.result, self.until, self.left, self.done = data, result, until, requests, done
        self.tail = b""
        self.transport: asyncio.Transport
        self.sent = self.last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.send()

    def send(self) -> None:
        """Send the next request, or end."""
        if self.left == 0 or time.perf_counter() > self.until:
            self.transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self.left -= 1
        self.sent, self.last, self.tail = time.perf_counter(), 0.0, b""
        self.transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        """Count chunks; an answer is complete with its `"done":true` and what ends the body."""
        now = time.perf_counter()
        lines = data.count(b'"done":')
        self.result.chunks += lines
        if lines and self.last:
            self.result.gaps.append(now - self.last)
        if lines:
            self.last = now
        self.tail = (self.tail + data)[-400:]
        if b'"done":true' in self.tail and (self.tail.endswith((b"0\r\n\r\n", b"}"))):
            self.result.latencies.append(now - self.sent)
            self.send()
        elif b" 50" in data[:20] and data.startswith(b"HTTP/1.1 5"):
            self.result.failed += 1
            self.left = 0
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; before the answer was complete that is a failure."""
        if not self.done.done():
            self.result.failed += 1
            self.done.set_result(None)


async def run(port: int, body: dict[str, object], clients: int, seconds: float, requests: int = -1) -> Result:
    """Drive `clients` connections for `seconds`, or `requests` each."""
    result, loop, data = Result(), asyncio.get_running_loop(), request(body)
    began = time.perf_counter()
    ends: list[asyncio.Future[None]] = []
    for _ in range(clients):
        ends.append(loop.create_future())
        done = ends[-1]
        await loop.create_connection(
            lambda done=done: Client(data, result, began + seconds, requests, done),  # type: ignore[misc]
            "127.0.0.1", port,
        )  # fmt: skip
    await asyncio.wait_for(asyncio.gather(*ends), seconds + 60)
    result.seconds = time.perf_counter() - began
    return result


async def hold(port: int, body: dict[str, object], streams: int) -> list[asyncio.Transport]:
    """Open streams, wait for the first chunk of each, and keep them open."""
    result, loop, transports, data = (
        Result(),
        asyncio.get_running_loop(),
        list[asyncio.Transport](),
        request(body),
    )
    for _ in range(streams):
        transport, _client = await loop.create_connection(
            lambda: Client(data, result, time.perf_counter() + 600, 1, loop.create_future()),
            "127.0.0.1",
            port,
        )
        transports.append(transport)
    async with asyncio.timeout(30):
        while result.chunks < streams:
            await asyncio.sleep(0.02)
    return transports
