"""Streamed answers as their reader sees them: when each line came, at next to no cost while they come."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import orjson


@dataclass(slots=True)
class Answer:
    """One answer: when it was asked for, when each piece of text came, and its last line."""

    sent: float
    times: list[float]
    text: str
    last: dict[str, Any]
    tokens: int

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent


class _Reader(asyncio.Protocol):
    def __init__(self, data: bytes, done: asyncio.Future[None]) -> None:
        self.data, self.done = data, done
        self.sent = 0.0
        self.times: list[float] = []
        self.parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.sent = time.perf_counter()
        self.transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.parts.append(data)
        if data.endswith(b"0\r\n\r\n") or (len(self.parts) == 1 and not data.startswith(b"HTTP/1.1 200")):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def ask(port: int, path: str, body: dict[str, Any], timeout_s: float = 300) -> Answer:
    """POST a body that asks for a stream, and read it. Raises RuntimeError where it is no answer."""
    data = orjson.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    request = head.encode() + b"\r\n\r\n" + data
    _, reader = await loop.create_connection(lambda: _Reader(request, done), "127.0.0.1", port)
    await asyncio.wait_for(done, timeout_s)
    return _parse(reader)


def _parse(reader: _Reader) -> Answer:
    raw = b"".join(reader.parts)
    if not raw.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(raw[-500:].decode(errors="replace"))
    ends = list(accumulate(map(len, reader.parts)))
    at = raw.index(b"\r\n\r\n") + 4
    body, came = bytearray(), list[tuple[int, float]]()  # length of the body by then, and when
    while True:
        line_end = raw.index(b"\r\n", at)
        size = int(raw[at:line_end], 16)
        if not size:
            break
        at = line_end + 2 + size
        body += raw[line_end + 2 : at]
        came.append((len(body), reader.times[bisect_left(ends, at)]))
        at += 2
    return _lines(bytes(body), came, reader.sent)


def _lines(body: bytes, came: list[tuple[int, float]], sent: float) -> Answer:
    lengths = [length for length, _ in came]
    times: list[float] = []
    text: list[str] = []
    last: dict[str, Any] = {}
    at = 0
    for line in body.splitlines(keepends=True):
        at += len(line)
        data = line.strip().removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        last = orjson.loads(data)
        if "error" in last:
            raise RuntimeError(str(last))
        piece = _text(last)
        if piece or (last.get("done") and not times):  # its first token may be the one that ends it
            text.append(piece)
            times.append(came[bisect_left(lengths, at)][1])
    if not times:
        raise RuntimeError(f"an answer without text: {body[-300:]!r}")
    return Answer(sent, times, "".join(text), last, int(last.get("eval_count", len(times))))


def _text(line: dict[str, Any]) -> str:
    if "choices" in line:
        return "".join(choice.get("text", "") for choice in line["choices"])
    return str(line.get("response", "") or line.get("message", {}).get("content", ""))


def rate(answers: list[Answer]) -> float:
    """Return the tokens/s of all together while all of them ran: from the last first token to the first last one."""
    start, end = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    if end <= start:
        raise RuntimeError("the streams did not run side by side: some ended before others began")
    # A line may carry more than one token: its share counts.
    came = sum(sum(start < t <= end for t in a.times) * a.tokens / len(a.times) for a in answers)
    return came / (end - start)
