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

from osync.config import Settings
from osync.errors import BadRequest, ConfigError, FrameTooLarge, OsyncError
from osync.gateway.app import Gateway
from osync.types import RequestHead, ResponseHead

BACKLOG = 2048  # aiohttp's 128 costs a SYN retransmit (1 s) at 200 simultaneous connects
_KEEPALIVE_S = 3600.0
_LINGER_S = 5.0  # how long an unread body (413) is drained so that the client sees its answer
_CANCELLED_WAIT_S = 2.0
_MAX_LINE = 64 << 10  # of the request line, and of a header; aiohttp's 8 KiB is less than cookies and tokens take
_DRAIN_BYTES = 1 << 16  # written before the next look whether the client keeps up
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_OWN_FRAMING = frozenset(("connection", "transfer-encoding"))
_CONTROLS = bytes(byte for byte in (*range(32), 127) if byte != 9)


class HttpServer:
    """Listens on the settings' host and port, for one gateway."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._settings = settings
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._stopping = False

    async def start(self) -> int:
        """Listen, and return the port. Raises ConfigError where the address cannot be had."""
        server = web.Server(
            self._handle,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            logger=_logger(),
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
        if not self._active:
            return
        self._idle.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._active += 1
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
            if self._stopping and not self._active:
                self._idle.set()
        return _KEEP if responder.keeps_alive and not self._stopping else _CLOSE


def _logger() -> logging.Logger:
    """Return aiohttp's logger here; that a client speaks no HTTP is its own fault, and no error of the proxy."""
    logger = logging.getLogger("osync.http")
    logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _head(request: web.BaseRequest) -> RequestHead:
    target = request.raw_path
    if not target.startswith("/"):  # absolute form, as clients of a forward proxy write it
        target = request.rel_url.raw_path_qs or "/"
    headers = tuple(request.headers.items())
    for _, value in headers:
        if not value.isascii():
            headers = tuple((k, _clean(v)) for k, v in headers)
            break
    return RequestHead(request.method, target, headers)


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
        content = self._content
        if content.is_eof() and not self._expected:  # all of it came with the head
            try:
                return _bounded(content.read_nowait(), limit)
            except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
                raise BadRequest("request body is malformed") from error
        length = self._request.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > limit:
            raise FrameTooLarge(_too_large(limit))
        data = await self.read()
        if not data or content.at_eof():
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
    """Writes one answer; the head goes out with the first bytes, or on its own in the next loop turn.

    Straight to the transport: aiohttp's writer would copy the headers and await three times per piece.
    """

    __slots__ = (
        "_bodyless", "_chunked", "_left", "_request", "_undrained", "_unsent", "keeps_alive", "started",
    )  # fmt: skip

    def __init__(self, request: web.BaseRequest, stopping: bool) -> None:
        self._request = request
        self._left = -1
        self._bodyless = False
        self._chunked = False
        self._unsent = b""
        self._undrained = 0
        self.started = False
        self.keeps_alive = request.keep_alive and not stopping

    async def start(self, head: ResponseHead) -> None:
        """Write the head. Raises ConnectionAbortedError where a header has control characters."""
        self.started = True
        request, status = self._request, head.status
        version = request.version
        lines = [f"HTTP/{version[0]}.{version[1]} {status} {_REASONS.get(status, '')}"]
        is_dated = False
        for name, value in head.headers:
            lower = name.lower()
            if lower == "content-length":
                self._left = int(value)
            elif lower == "date":
                is_dated = True
            elif lower in _OWN_FRAMING:
                continue
            lines.append(f"{name}: {value}")
        if not is_dated:
            lines.append(_date())
        self._bodyless = status in (204, 304) or request.method == "HEAD"
        if self._left < 0 and not self._bodyless:
            if version >= (1, 1):
                self._chunked = True
                lines.append("Transfer-Encoding: chunked")
            else:
                self.keeps_alive = False
        if not request.content.is_eof() and (status == 413 or "Expect" in request.headers):
            self.keeps_alive = False  # a client that holds its body back would have its next request read as that
        if not self.keeps_alive:
            lines.append("Connection: close")
        elif version < (1, 1):
            lines.append("Connection: keep-alive")
        lines.append("\r\n")
        data = "\r\n".join(lines).encode("utf-8", "ignore")
        if len(data) - len(data.translate(None, _CONTROLS)) != 2 * len(lines):
            raise ConnectionAbortedError("control character in a header of the answer")
        self._unsent = data
        if not 0 <= self._left <= _DRAIN_BYTES:  # a small answer is here as a whole: one write for all
            asyncio.get_running_loop().call_soon(self._flush_head)

    async def write(self, data: bytes) -> None:
        """Write body bytes; waits where the client does not read."""
        if self._bodyless or not data:
            return
        if self._chunked:
            self._send(b"%b%x\r\n%b\r\n" % (self._unsent, len(data), data))
        else:
            if self._left >= 0:
                self._left -= len(data)
                if self._left < 0:
                    raise ConnectionAbortedError("answer is longer than its Content-Length")
            self._send(self._unsent + data if self._unsent else data)
        if self._undrained > _DRAIN_BYTES:
            self._undrained = 0
            await self._request.writer.drain()

    async def finish(self) -> None:
        """End the answer. One that is shorter than announced is broken off."""
        if not self.started:
            raise ConnectionAbortedError("no answer was written")
        if self._left > 0 and not self._bodyless:
            self.cut()
            return
        if self._chunked:
            self._send(self._unsent + b"0\r\n\r\n")
        elif self._unsent:
            self._send(self._unsent)
        transport = self._request.transport
        if transport is not None and transport.get_write_buffer_size():
            await self._request.writer.drain()

    def _send(self, data: bytes) -> None:
        """Hand bytes, the head's before all, to the transport. Raises ConnectionResetError."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self._unsent = b""
        size = len(data)
        self._undrained += size
        self._request.writer.output_size += size  # tells aiohttp that no error page may follow
        transport.write(data)

    def cut(self) -> None:
        """Close the connection without a proper end, so that the client cannot take it for one."""
        self.keeps_alive = False
        self._flush_head()
        transport = self._request.transport
        if transport is not None:
            if self._request.version < (1, 1) and self._left < 0:
                transport.abort()  # the close is what ends such a body: only a reset says otherwise
            else:
                transport.close()

    def _flush_head(self) -> None:
        if self._unsent:
            try:
                self._send(self._unsent)
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
    """Return the Date header, made once a second."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = (now, f"Date: {formatdate(now, usegmt=True)}")
    return _dated[1]
