"""The backend that fronts a real Ollama over HTTP: bytes go through as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from yarl import URL

from osync.backend.http1_connection import Answer
from osync.backend.http1_pool import Client, Unreachable
from osync.backend.ollama_state import answered_model
from osync.backend.ollama_watch import Watch
from osync.errors import BadRequest, StreamBroken, UpstreamUnavailable
from osync.net.exchange import WINDOW_BYTES, Body, Responder
from osync.types import BackendState, Headers, RequestHead, ResponseHead

_HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
    "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
# Host becomes the backend's, the gateway answers for Origin, Expect was met there, the length is known anew.
_REQUEST_DROPS = _HOP_BY_HOP | {"host", "origin", "expect", "content-length"}
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_CHANGES_DISK = frozenset({"/api/pull", "/api/create", "/api/copy", "/api/delete", "/api/push"})
_INFERENCE = frozenset({
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions",
    "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
})  # fmt: skip


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
        self._client: Client | None = None
        self._watch: Watch | None = None
        self._notify: list[Callable[[], None]] = []

    async def start(self) -> None:
        """Open the connection pool and begin watching."""
        self._client = Client(self._url)
        self._watch = Watch(self._client, self._url, lambda: self._active > 0, self._changed)
        self._watch.start()

    async def close(self) -> None:
        """Stop watching; break off what runs."""
        if self._watch is not None:
            await self._watch.close()
        if self._client is not None:
            await self._client.close()
            self._client = None

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
        watch, client = self._watch, self._client
        if watch is None or client is None:
            raise UpstreamUnavailable(f"the backend for Ollama at {self._url} is not running")
        path = head.target.partition("?")[0]
        is_inference = path in _INFERENCE
        self._active += is_inference
        try:
            answer = await self._send(client, head, body)
            try:
                await self._relay(answer, responder, watch, is_inference)
            finally:
                # Closes the socket unless the answer was there to its end: that stops Ollama's work.
                answer.close()
        finally:
            self._active -= is_inference
            if path in _CHANGES_DISK:
                watch.tags_soon()

    async def _relay(self, answer: Answer, responder: Responder, watch: Watch, is_inference: bool) -> None:
        head = await answer.head()
        if head.status == 404:
            watch.tags_soon()
        await responder.start(ResponseHead(head.status, _without(head.headers, _HOP_BY_HOP)))
        is_first = is_inference
        while True:
            try:
                data = await answer.read()
            except OSError as error:
                watch.check_soon()
                raise StreamBroken(f"Ollama at {self._url} broke off in the middle of an answer") from error
            if not data:
                return
            if is_first:
                _look_soon(watch, data)
                is_first = False
            await responder.write(data)

    async def _send(self, client: Client, head: RequestHead, body: Body) -> Answer:
        """Return the answer as soon as its head is there."""
        if not head.target.startswith("/"):
            raise BadRequest("the request's target is not a path")
        headers = _without(head.headers, _REQUEST_DROPS)
        declared = _declared_length(head.headers)
        data, is_whole = b"", True
        if head.method not in _BODILESS or declared:
            data, is_whole = await _gather(body, declared)
        try:
            return await client.request(head.method, head.target, headers, data, None if is_whole else body, declared)
        except OSError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> UpstreamUnavailable:
        if self._watch is not None:
            self._watch.check_soon()
        if isinstance(error, Unreachable):
            return UpstreamUnavailable(f"cannot reach Ollama at {self._url}: {error}")
        return UpstreamUnavailable(f"Ollama at {self._url} broke off before it answered: {error}")


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


def _slots() -> int:
    """Return the requests per model that Ollama runs at once, where its environment is ours."""
    with contextlib.suppress(ValueError):
        return max(1, int(os.environ.get("OLLAMA_NUM_PARALLEL", "1").strip(" \"'")))
    return 1
