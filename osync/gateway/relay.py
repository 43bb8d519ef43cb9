"""Ways to answer a call: a value, an error in the surface's form, or a node's own answer."""

from __future__ import annotations

from typing import Any

import orjson

from osync.errors import CapacityError, FrameTooLarge, OsyncError
from osync.gateway.context import Call
from osync.net.exchange import Exchange
from osync.types import Headers, NodeState, RequestHead, ResponseHead
from osync.wire.errors import error_body, surface_of

JSON = "application/json; charset=utf-8"
TEXT = "text/plain; charset=utf-8"

# RFC 9110 section 7.6.1; Host is the backend's own, and Origin was dealt with here.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te",
     "trailer", "transfer-encoding", "upgrade")
)  # fmt: skip
_NOT_UPSTREAM = _HOP_BY_HOP | {
    "host", "origin", "content-length", "expect", "x-osync-node", "x-osync-session",
    "access-control-request-method", "access-control-request-headers",
}  # fmt: skip
_NOT_DOWNSTREAM = _HOP_BY_HOP | {"x-osync-node", "x-osync-request-id"}


class Whole:
    """A `Body` that is here already."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        """Return all of it, then b""."""
        data, self._data = self._data, b""
        return data

    async def read_all(self, limit: int) -> bytes:
        """Return what is left."""
        if len(self._data) > limit:
            raise FrameTooLarge(f"request body over {limit} bytes")
        return await self.read()


def upstream_head(call: Call, target: str = "", drop: frozenset[str] = frozenset()) -> RequestHead:
    """Return the head that a node gets: hop-by-hop headers, Host and Origin are gone."""
    head = call.head
    dropped = _NOT_UPSTREAM | drop if drop else _NOT_UPSTREAM
    headers = [pair for pair in head.headers if pair[0].lower() not in dropped]
    for name, value in head.headers:
        if len(name) == 10 and len(value) > 10 and name.lower() == "connection":  # more than keep-alive or close
            named = {word.strip() for word in value.lower().split(",")}
            headers = [pair for pair in headers if pair[0].lower() not in named]
    return RequestHead(head.method, target or head.target, tuple(headers))


def downstream_head(head: ResponseHead, node_id: str, extra: Headers = ()) -> ResponseHead:
    """Return the head that the client gets for a node's answer."""
    headers = [pair for pair in head.headers if pair[0].lower() not in _NOT_DOWNSTREAM]
    headers.append(("X-Osync-Node", node_id))
    return ResponseHead(head.status, (*headers, *extra))


async def send_bytes(call: Call, status: int, content_type: str, data: bytes, headers: Headers = ()) -> None:
    """Answer with `data` as it is."""
    head = (("Content-Type", content_type), ("Content-Length", str(len(data))), *headers)
    await call.responder.start(ResponseHead(status, head))
    if data:
        await call.responder.write(data)


async def send_json(call: Call, status: int, value: Any, headers: Headers = ()) -> None:
    """Answer with a value as JSON; bytes are JSON already."""
    data = value if isinstance(value, bytes) else orjson.dumps(value)
    await send_bytes(call, status, JSON, data, headers)


async def send_text(call: Call, status: int, text: str) -> None:
    """Answer with plain text."""
    await send_bytes(call, status, TEXT, text.encode())


async def send_empty(call: Call, status: int, headers: Headers = ()) -> None:
    """Answer without a body."""
    length: Headers = () if status == 204 else (("Content-Length", "0"),)
    await call.responder.start(ResponseHead(status, length + headers))


async def send_error(call: Call, error: OsyncError) -> None:
    """Answer with an error in the form of the surface that was called."""
    headers: Headers = ()
    if isinstance(error, CapacityError):
        headers = (("Retry-After", str(max(1, round(error.retry_after_s)))),)
    body = error_body(surface_of(call.path), error.status, str(error), call.request_id)
    await send_json(call, error.status, body, headers)


async def relay(call: Call, exchange: Exchange, state: NodeState, extra: Headers = ()) -> None:
    """Pass a node's answer on, byte for byte, and close the exchange."""
    try:
        head = await exchange.head()
        await call.responder.start(downstream_head(head, state.node_id, extra))
        while data := await exchange.read():
            await call.responder.write(data)
    finally:
        exchange.close()


async def collect(exchange: Exchange, limit: int) -> bytes:
    """Read what is left of an answer. Raises FrameTooLarge over `limit` bytes."""
    pieces: list[bytes] = []
    size = 0
    while data := await exchange.read():
        size += len(data)
        if size > limit:
            raise FrameTooLarge(f"a node's answer is over {limit} bytes")
        pieces.append(data)
    return b"".join(pieces)
