"""Calls a `Serve` as a link would: a body to read, an answer to collect."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from osync.errors import FrameTooLarge
from osync.net.exchange import Serve
from osync.types import RequestHead, ResponseHead


class Given:
    """A `Body` that is there already."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        data, self._data = self._data, b""
        return data

    async def read_all(self, limit: int) -> bytes:
        if len(self._data) > limit:
            raise FrameTooLarge(f"the body is over {limit} bytes")
        return await self.read()


class Answer:
    """A `Responder` that keeps what it gets."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.writes: list[bytes] = []
        self.first_byte = asyncio.Event()

    @property
    def started(self) -> bool:
        return self.head is not None

    async def start(self, head: ResponseHead) -> None:
        assert self.head is None
        self.head = head

    async def write(self, data: bytes) -> None:
        assert self.head is not None
        self.writes.append(data)
        self.first_byte.set()
        await asyncio.sleep(0)

    @property
    def status(self) -> int:
        assert self.head is not None
        return self.head.status

    @property
    def headers(self) -> dict[str, str]:
        assert self.head is not None
        return dict(self.head.headers)

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    def json(self) -> Any:
        return orjson.loads(self.body)

    def lines(self) -> list[Any]:
        return [orjson.loads(line) for line in self.body.splitlines()]


async def call(serve: Serve, method: str, target: str, body: object = b"", answer: Answer | None = None) -> Answer:
    """Make one request; a body that is not bytes is sent as JSON."""
    answer = answer or Answer()
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    await serve(RequestHead(method, target), Given(data), answer)
    return answer
