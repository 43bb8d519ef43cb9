"""The backend that fronts a real Ollama over HTTP: bytes go through as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from typing import Any

import aiohttp
from aiohttp import ClientConnectorError, ClientError, ClientResponse, ClientTimeout, ConnectionTimeoutError
from yarl import URL

from osync.backend.ollama_state import answered_model
from osync.backend.ollama_watch import Watch, describe
from osync.errors import BadRequest, OsyncError, StreamBroken, UpstreamUnavailable
from osync.net.exchange import WINDOW_BYTES, Body, Responder
from osync.types import BackendState, Headers, RequestHead, ResponseHead

_HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
    "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
# Host becomes the backend's, the gateway answers for Origin, Expect was met there, the length is known anew.
_REQUEST_DROPS = _HOP_BY_HOP | {"host", "origin", "expect", "content-length"}
_NO_AUTO_HEADERS = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_CHANGES_DISK = frozenset({"/api/pull", "/api/create", "/api/copy", "/api/delete", "/api/push"})
_INFERENCE = frozenset({
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions",
    "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
})  # fmt: skip
_CONNECT_TIMEOUT_S = 2.0
_WRITE_BYTES = 1 << 18  # pieces of a large body: each is one turn of the loop at most

_is_fresh: ContextVar[bool] = ContextVar("is_fresh", default=False)


class _Connector(aiohttp.TCPConnector):
    """Notes whether the running request got a new connection or one from the pool."""

    async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
        _is_fresh.set(True)
        return await super()._create_connection(*args, **kwargs)


class OllamaBackend:
    """One Ollama at `url`; a path in it is a prefix of every target. A `Backend`."""

    def __init__(self, url: str, *, hint: str = "") -> None:
        base = URL(url)
        if base.scheme not in {"http", "https"} or not base.host:
            raise BadRequest(f"Ollama's address {url!r} is not http://host:port")
        self._url = url.rstrip("/")
        self._hint = hint
        self._slots = _slots()
        self._active = 0
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._watch: Watch | None = None
        self._notify: list[Callable[[], None]] = []

    async def start(self) -> None:
        """Open the connection pool and begin watching."""
        self._session = _session(_Connector(limit=0, limit_per_host=0))
        # For bodies that cannot be sent twice, and for the second try: never a connection from the pool.
        self._fresh = _session(_Connector(limit=0, force_close=True))
        self._watch = Watch(self._session, self._url, lambda: self._active > 0, self._changed)
        self._watch.start()

    async def close(self) -> None:
        """Stop watching; break off what runs."""
        if self._watch is not None:
            await self._watch.close()
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()
        self._session = self._fresh = None

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` when the state differs in more than its count of active requests."""
        self._notify.append(notify)

    def state(self) -> BackendState:
        """Return the last look, with the requests of this moment."""
        watch = self._watch
        if watch is None:
            return BackendState(kind="ollama", error=f"the watch on Ollama at {self._url} has not begun")
        return BackendState(
            kind="ollama",
            ok=watch.ok,
            error=watch.error + (self._hint if watch.error else ""),
            version=watch.version,
            models=watch.models,
            loaded=watch.loaded,
            slots=self._slots,
            active=self._active,
            queued=max(0, self._active - self._slots * max(1, len(watch.loaded))),
        )

    def _changed(self) -> None:
        for notify in self._notify:
            notify()

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Send one request on and its answer back. Raises UpstreamUnavailable before the head."""
        watch = self._watch
        if watch is None or self._session is None:
            raise UpstreamUnavailable(f"the backend for Ollama at {self._url} is not running")
        path = head.target.partition("?")[0]
        is_inference = path in _INFERENCE
        self._active += is_inference
        try:
            response = await self._send(head, body)
            try:
                if response.status == 404:
                    watch.tags_soon()
                await self._relay(response, responder, watch if is_inference else None)
            finally:
                # Closes the socket unless the answer was read to its end: that stops Ollama's work.
                response.close()
        finally:
            self._active -= is_inference
            if path in _CHANGES_DISK:
                watch.tags_soon()

    async def _relay(self, response: ClientResponse, responder: Responder, watch: Watch | None) -> None:
        await responder.start(ResponseHead(response.status, _without(response.headers.items(), _HOP_BY_HOP)))
        read = response.content.readany
        while True:
            try:
                data = await read()
            except (ClientError, OSError) as error:
                if self._watch is not None:
                    self._watch.check_soon()
                raise StreamBroken(f"Ollama at {self._url} broke off in the middle of an answer") from error
            if not data:
                return
            if watch is not None:
                _look_soon(watch, data)
                watch = None
            await responder.write(data)

    async def _send(self, head: RequestHead, body: Body) -> ClientResponse:
        """Return the answer as soon as its head is there."""
        if not head.target.startswith("/"):
            raise BadRequest("the request's target is not a path")
        url = URL(self._url + head.target, encoded=True)
        headers = list(_without(head.headers, _REQUEST_DROPS))
        declared = _declared_length(head.headers)
        upload: _Upload | None = None
        data: bytes | None = None
        if head.method not in _BODILESS or declared:
            data, is_whole = await _gather(body, declared)
            if not is_whole:
                upload = _Upload(data, body)
                if declared is not None:
                    headers.append(("Content-Length", str(declared)))
        session = self._fresh if upload else self._session
        _is_fresh.set(False)
        try:
            return await self._request(session, head.method, url, headers, upload or data)
        except (ClientError, OSError) as error:
            if upload is not None and upload.error is not None:
                raise upload.error from error
            # Ollama may have closed a pooled connection just before this request used it.
            if upload is not None or _is_fresh.get():
                raise self._unavailable(error) from error
        try:
            return await self._request(self._fresh, head.method, url, headers, data)
        except (ClientError, OSError) as error:
            raise self._unavailable(error) from error

    async def _request(
        self, session: aiohttp.ClientSession | None, method: str, url: URL, headers: list[tuple[str, str]],
        data: bytes | _Upload | None,
    ) -> ClientResponse:  # fmt: skip
        if session is None or session.closed:
            raise UpstreamUnavailable(f"the backend for Ollama at {self._url} is closing")
        if isinstance(data, bytes) and len(data) > _WRITE_BYTES:
            headers = [*headers, ("Content-Length", str(len(data)))]
            payload: object = _slices(data)
        else:
            payload = data or None
        try:
            return await session.request(method, url, headers=headers, data=payload, allow_redirects=False)
        except ValueError as error:
            if isinstance(error, ClientError):
                raise
            raise BadRequest(f"the request cannot be sent on: {error}") from error

    def _unavailable(self, error: Exception) -> UpstreamUnavailable:
        if self._watch is not None:
            self._watch.check_soon()
        if isinstance(error, (ClientConnectorError, ConnectionTimeoutError)):
            return UpstreamUnavailable(f"cannot reach Ollama at {self._url}: {describe(error)}")
        return UpstreamUnavailable(f"Ollama at {self._url} broke off before it answered: {describe(error)}")


class _Upload:
    """The rest of a request's body, read as fast as Ollama takes it; keeps why reading failed."""

    def __init__(self, first: bytes, body: Body) -> None:
        self.error: OsyncError | None = None
        self._first, self._body = first, body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in _cut(self._first):
            yield piece
        self._first = b""
        try:
            while piece := await self._body.read():
                yield piece
        except OsyncError as error:
            self.error = error
            raise


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        # No limit on silence: Ollama says nothing while it loads, queues and reads the prompt.
        timeout=ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=_NO_AUTO_HEADERS,
    )


def _look_soon(watch: Watch, first: bytes) -> None:
    """Have the memory looked at if an answer's first bytes hint at a model loaded or unloaded."""
    name = answered_model(first)
    if not watch.is_loaded(name) or (len(first) < 1024 and b'"unload"' in first):
        watch.ps_soon()


def _without(headers: Iterable[tuple[str, str]], drops: frozenset[str]) -> Headers:
    kept = []
    named = ""
    for item in headers:
        name = item[0].lower()
        if name not in drops:
            kept.append(item)
        elif name == "connection":
            named += "," + item[1].lower()
    if named and (also := {word.strip() for word in named.split(",")} - drops - {"close"}):
        return tuple(item for item in kept if item[0].lower() not in also)
    return tuple(kept)


def _declared_length(headers: Headers) -> int | None:
    for name, value in headers:
        if len(name) == 14 and name.lower() == "content-length":
            return int(value) if value.isdecimal() else None
    return None


async def _gather(body: Body, declared: int | None) -> tuple[bytes, bool]:
    """Return the body and True, or what fits in one window and False: then more follows."""
    first = await body.read()
    if not first or len(first) == declared:
        return first, True
    pieces, size = [first], len(first)
    while size <= WINDOW_BYTES:
        piece = await body.read()
        pieces.append(piece)
        size += len(piece)
        if not piece or size == declared:
            return b"".join(pieces), True
    return b"".join(pieces), False


def _cut(data: bytes) -> Iterable[bytes]:
    return (data[at : at + _WRITE_BYTES] for at in range(0, len(data), _WRITE_BYTES))


async def _slices(data: bytes) -> AsyncIterator[bytes]:
    for piece in _cut(data):
        yield piece


def _slots() -> int:
    """Return the requests per model that Ollama runs at once, where its environment is ours."""
    with contextlib.suppress(ValueError):
        return max(1, int(os.environ.get("OLLAMA_NUM_PARALLEL", "1").strip(" \"'")))
    return 1
