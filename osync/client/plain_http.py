"""One HTTP request on the standard library, with streamed reading and a deadline over all of it."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from osync.client import decoding
from osync.client.calls import Call
from osync.client.servers import CONNECT_TIMEOUT_S

BROKEN = (http.client.HTTPException, OSError)
_PIECE = 64 << 10  # more than any line of tokens; less than what a socket buffers


class Response:
    """One answer on a connection of its own, which ends with it."""

    def __init__(self, url: str, timeout_s: float | None) -> None:
        parts = urlsplit(url)
        self.url = url
        self._prefix = parts.path
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        assert parts.hostname is not None
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S)
        self._response: http.client.HTTPResponse | None = None
        self._headers: http.client.HTTPMessage | None = None
        self._socket: socket.socket | None = None
        self.status = 0

    def connect(self) -> None:
        """Connect within the bound that all connecting has."""
        self._connection.connect()
        self._socket = self._connection.sock

    def send(self, call: Call, fields: Mapping[str, str]) -> None:
        """Send the request and wait for the answer's head."""
        self._arm()
        given = {**fields, "Connection": "close"}
        self._connection.request(call.method, self._prefix + call.path, call.body, given)
        self._response = self._connection.getresponse()
        self.status, self._headers = self._response.status, self._response.headers

    def header(self, name: str) -> str:
        """Return a header of the answer, "" where absent."""
        return self._headers.get(name, "") if self._headers else ""

    def read(self, *, complete: bool = False) -> bytes:
        """Return the next bytes, b"" at the clean end. `complete`: a break is an end too.

        Raises StreamBroken and UpstreamTimeout.
        """
        response = self._response
        if response is None or response.isclosed():  # http.client closes it at the end of the body
            return b""
        try:
            self._arm()
            if response.chunked or response.length is None:
                return response.read1(_PIECE)
            return response.read(min(response.length, _PIECE)) if response.length else b""
        except TimeoutError as error:
            raise decoding.timed_out(self.url, self._timeout_s) from error
        except (*BROKEN, ValueError, AttributeError) as error:  # the last two: closed by another thread
            if complete:
                return b""
            raise decoding.broken(self.url, error) from error

    def body(self) -> bytes:
        """Return all that is left, and close."""
        parts, size = [], 0
        try:
            while part := self.read():
                size += len(part)
                if size > decoding.MAX_OBJECT:
                    raise decoding.broken(self.url, f"it is over {decoding.MAX_OBJECT} bytes")
                parts.append(part)
        finally:
            self.close()
        return b"".join(parts)

    def close(self) -> None:
        """Close the connection, which ends the work at its other end. May be called twice."""
        response, self._response = self._response, None
        if self._socket is not None:
            try:  # the response has a reference of its own to the socket
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self._socket = None
        if response is not None:
            response.close()
        self._connection.close()

    def _arm(self) -> None:
        """Let the next wait last no longer than what is left of the client's timeout."""
        if self._socket is None:
            return
        if self._deadline is None:
            self._socket.settimeout(None)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
