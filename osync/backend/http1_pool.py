"""A lean HTTP/1.1 client for one server: kept connections, streamed both ways, closed at once on leaving."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from base64 import b64encode
from collections import deque

from yarl import URL

from osync.backend.http1 import encode_head
from osync.backend.http1_connection import Answer, BrokenOff, Connection, why
from osync.errors import StreamBroken, UpstreamUnavailable
from osync.net.exchange import Body
from osync.net.tasks import Tasks
from osync.types import Headers

CONNECT_TIMEOUT_S = 2.0
IDLE_LIMIT = 128  # connections kept for later
IDLE_S = 15.0  # what is older may be dead without a word
_CLOSE_S = 1.0
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


class Unreachable(OSError):
    """No connection came about."""


class Client:
    """Sends requests to the server at `url`, whose path is a prefix of every target."""

    def __init__(self, url: str) -> None:
        self._url = url
        base = URL(url)
        self._host, self._port = base.raw_host or "", base.port or 0
        self._prefix = base.raw_path.rstrip("/")
        self._first: Headers = (("Host", base.host_port_subcomponent or ""),)
        if base.user is not None or base.password is not None:
            credentials = f"{base.user or ''}:{base.password or ''}".encode()
            self._first += (("Authorization", f"Basic {b64encode(credentials).decode()}"),)
        self._ssl: ssl.SSLContext | None = None
        if base.scheme == "https":
            self._ssl = ssl.create_default_context()
            self._ssl.set_alpn_protocols(["http/1.1"])
        self._open: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._uploads = Tasks("http1")
        self._none_open = asyncio.Event()
        self._is_closed = False

    async def request(
        self, method: str, target: str, headers: Headers = (), data: bytes = b"", rest: Body | None = None,
        length: int | None = None,
    ) -> Answer:  # fmt: skip
        """Send a request and wait for its answer's head.

        The body is `data`, then `rest` if there is one, `length` bytes if that is known. Raises
        Unreachable, BrokenOff, BadRequest, what `rest` raises, UpstreamUnavailable once closed.
        """
        head = encode_head(method, self._prefix + target, self._first + headers + _framing(method, data, rest, length))
        if rest is None and (kept := self._kept()) is not None:
            answer = kept.send(method, head, data)
            try:
                await answer.head()
            except BrokenOff:
                # The server may have closed it just before this request came.
                if not answer.parser.untouched or self._is_closed:
                    raise
            else:
                return answer
        connection = await self._connect()
        answer = connection.send(method, head, data if rest is None else b"")
        if rest is not None:
            answer.upload = self._uploads.spawn("upload", _upload(connection, answer, data, rest, length))
        await answer.head()
        return answer

    async def close(self) -> None:
        """Close all connections; running answers break off."""
        self._is_closed = True
        for connection in list(self._open):
            connection.close()
        await self._uploads.close()
        if self._open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._none_open.wait()

    async def _connect(self) -> Connection:
        if self._is_closed:
            raise UpstreamUnavailable(f"the backend for Ollama at {self._url} is closing")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._ssl
                )
        except OSError as error:
            raise Unreachable(why(error)) from error
        if self._is_closed:
            connection.drop()
            raise UpstreamUnavailable(f"the backend for Ollama at {self._url} is closing")
        return connection

    def _kept(self) -> Connection | None:
        fresh = asyncio.get_running_loop().time() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > fresh:
                return connection
            connection.drop()
        return None

    # What follows is the connections'.

    def joined(self, connection: Connection) -> None:
        """It is open."""
        self._open.add(connection)

    def keep(self, connection: Connection) -> None:
        """It is free for a next request."""
        if self._is_closed or len(self._idle) >= IDLE_LIMIT:
            connection.drop()
            return
        now = connection.idle_since = asyncio.get_running_loop().time()
        while self._idle and self._idle[0].idle_since < now - IDLE_S:
            self._idle.popleft().drop()
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """It is closed."""
        self._open.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if self._is_closed and not self._open:
            self._none_open.set()


def _framing(method: str, data: bytes, rest: Body | None, length: int | None) -> Headers:
    if rest is not None:
        return (("Transfer-Encoding", "chunked"),) if length is None else (("Content-Length", str(length)),)
    return (("Content-Length", str(len(data))),) if data or method not in _BODILESS else ()


async def _upload(connection: Connection, answer: Answer, piece: bytes, rest: Body, length: int | None) -> None:
    """Send a body as fast as the server takes it; a body that fails breaks the answer off."""
    is_chunked = length is None
    left = length or 0
    try:
        while is_chunked or left:
            piece = piece or await rest.read()
            if not is_chunked and (not piece or len(piece) > left):
                raise StreamBroken("the request's body is not as long as it declares")
            if not piece:
                break
            left -= len(piece)
            await connection.send_more(piece, is_chunked)
            piece = b""
    except Exception as error:
        answer.fail(error)
        return
    connection.finish(is_chunked)
