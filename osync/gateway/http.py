"""The HTTP listener: aiohttp's low-level server, adapted to one `Serve`.

No application, router or middleware: they would cost more than the relay itself. The request is
cancelled as soon as its client is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from osync.config import Settings
from osync.errors import BadRequest, ConfigError, FrameTooLarge, OsyncError
from osync.gateway.app import Gateway
from osync.types import RequestHead, ResponseHead

BACKLOG = 2048  # aiohttp's 128 costs a SYN retransmit (1 s) at 200 simultaneous connects
_KEEPALIVE_S = 3600.0
_LINGER_S = 5.0  # how long an unread body (413) is drained so that the client sees its answer
_CANCELLED_WAIT_S = 2.0
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class HttpServer:
    """Listens on the settings' host and port, for one gateway."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._settings = settings
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    async def start(self) -> int:
        """Listen, and return the port. Raises ConfigError where the address cannot be had."""
        server = web.Server(
            self._handle,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            logger=logging.getLogger("osync.http"),
        )
        runner = web.ServerRunner(server, shutdown_timeout=0.05)
        await runner.setup()
        host, port = self._settings.host, self._settings.port
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                text = f"port {port} on {host} is taken by another program; choose another with --port"
            else:
                text = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise ConfigError(text) from error
        self._runner, self._site = runner, site
        return site.port

    async def stop(self, drain_s: float) -> None:
        """Take no new connection, let requests run for `drain_s` seconds, then cancel them."""
        runner, self._runner = self._runner, None
        if runner is None or self._site is None:
            return
        self._stopping = True
        await self._site.stop()
        await asyncio.sleep(0)
        if runner.server is not None:
            runner.server.pre_shutdown()
        await self._wait_idle(drain_s)
        await runner.cleanup()
        await self._wait_idle(_CANCELLED_WAIT_S)

    async def _wait_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._active += 1
        self._idle.clear()
        responder = _Responder(request, self._stopping)
        try:
            await self._gateway.serve(_head(request), _Body(request), responder)
            await responder.finish()
        except ConnectionError:
            responder.cut()
        except OsyncError:
            responder.cut()
        except Exception:
            responder.cut()
            raise
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
        return _KEEP if responder.keeps_alive and not self._stopping else _CLOSE


def _head(request: web.BaseRequest) -> RequestHead:
    target = request.raw_path
    if not target.startswith("/"):  # absolute form, as clients of a forward proxy write it
        target = request.rel_url.raw_path_qs or "/"
    return RequestHead(request.method, target, tuple((k, _clean(v)) for k, v in request.headers.items()))


def _clean(value: str) -> str:
    """Return a header's value as text that every hop can carry; bytes over ASCII are read as Latin-1."""
    return value if value.isascii() else value.encode("utf-8", "surrogateescape").decode("latin-1")


class _Body:
    """A request's body, read from the socket as it comes."""

    __slots__ = ("_content", "_expected", "_request")

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._content = request.content
        self._expected = "Expect" in request.headers

    async def read(self) -> bytes:
        """Return the next piece."""
        if self._expected:
            await self._invite()
        try:
            return await self._content.readany()
        except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
            raise BadRequest("request body is malformed") from error

    async def read_all(self, limit: int) -> bytes:
        """Return what is left. Raises FrameTooLarge over `limit` bytes, as soon as that is known."""
        length = self._request.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > limit:
            raise FrameTooLarge(_too_large(limit))
        data = await self.read()
        if not data or self._content.at_eof():
            return _bounded(data, limit)
        pieces, size = [data], len(data)
        while data := await self.read():
            pieces.append(data)
            size += len(data)
            if size > limit:
                raise FrameTooLarge(_too_large(limit))
        return _bounded(b"".join(pieces), limit)

    async def _invite(self) -> None:
        """Answer `Expect: 100-continue`: the client holds its body back until then."""
        self._expected = False
        if self._request.headers["Expect"].lower() == "100-continue":
            writer: Any = self._request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FrameTooLarge(_too_large(limit))
    return data


def _too_large(limit: int) -> str:
    return f"request body is over {limit} bytes; --max-body raises the limit"


class _Responder:
    """Writes one answer; the head goes out with the first bytes, or on its own in the next loop turn."""

    __slots__ = ("_bodyless", "_left", "_request", "_writer", "keeps_alive", "started")

    def __init__(self, request: web.BaseRequest, stopping: bool) -> None:
        self._request = request
        self._writer: AbstractStreamWriter = request.writer
        self._left = -1
        self._bodyless = False
        self.started = False
        self.keeps_alive = request.keep_alive and not stopping

    async def start(self, head: ResponseHead) -> None:
        """Write the head."""
        self.started = True
        headers = CIMultiDict(head.headers)
        writer, version = self._writer, self._request.version
        self._bodyless = head.status in (204, 304) or self._request.method == "HEAD"
        length = headers.get("Content-Length")
        if length is not None:
            self._left = int(length)
        elif self._bodyless:
            pass
        elif version >= (1, 1):
            headers["Transfer-Encoding"] = "chunked"
            writer.enable_chunking()
        else:
            self.keeps_alive = False
        if "Date" not in headers:
            headers["Date"] = _date()
        if not self.keeps_alive:
            headers["Connection"] = "close"
        elif version < (1, 1):
            headers["Connection"] = "keep-alive"
        reason = _REASONS.get(head.status, "")
        await writer.write_headers(f"HTTP/{version[0]}.{version[1]} {head.status} {reason}", headers)
        asyncio.get_running_loop().call_soon(self._flush_head)

    async def write(self, data: bytes) -> None:
        """Write body bytes; waits where the client does not read."""
        if self._bodyless or not data:
            return
        if self._left >= 0:
            self._left -= len(data)
            if self._left < 0:
                raise ConnectionAbortedError("answer is longer than its Content-Length")
        await self._writer.write(data)

    async def finish(self) -> None:
        """End the answer. One that is shorter than announced is broken off."""
        if not self.started:
            raise ConnectionAbortedError("no answer was written")
        if self._left > 0 and not self._bodyless:
            self.cut()
            return
        await self._writer.write_eof()

    def cut(self) -> None:
        """Close the connection without a proper end, so that the client cannot take it for one."""
        self.keeps_alive = False
        transport = self._request.transport
        if transport is not None:
            if self._request.version < (1, 1) and self._left < 0:
                transport.abort()  # the close is what ends such a body: only a reset says otherwise
            else:
                transport.close()

    def _flush_head(self) -> None:
        try:
            self._writer.send_headers()
        except ConnectionError:
            pass  # the next write, or the cancellation, tells


class _Written(web.StreamResponse):
    """Tells aiohttp that the answer is out already, and whether the connection lives on."""

    def __init__(self, keeps_alive: bool) -> None:
        super().__init__()
        self._keeps_alive = keeps_alive

    @property
    def keep_alive(self) -> bool | None:
        """Return what `_Responder` decided."""
        return self._keeps_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Do nothing."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing."""


_KEEP = _Written(True)
_CLOSE = _Written(False)

_dated = (0, "")


def _date() -> str:
    """Return the Date header's value, made once a second."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = (now, formatdate(now, usegmt=True))
    return _dated[1]
