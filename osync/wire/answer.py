"""The answering side of a translation: native bytes in, at any cuts, a surface's bytes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, ClassVar

import orjson

from osync.errors import FrameTooLarge, StreamBroken
from osync.types import Headers, ResponseHead
from osync.wire import sse
from osync.wire.body import Object
from osync.wire.errors import Surface, error_body, stream_error
from osync.wire.ndjson import LineSplitter

MAX_WHOLE = 256 << 20
"""Bound of one object that is not streamed: many long embeddings in one answer."""

_TOO_DEEP = "the backend's answer is nested too deeply"
_REPLACED = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding"})


class Ids:
    """Ids that differ between requests and repeat for the same bytes: no clock, no entropy."""

    def __init__(self, seed: str, body: bytes) -> None:
        self._root = blake2b(body, digest_size=16, key=seed.encode()[:64]).digest()
        self._stamp = ""
        self._count = 0

    def stamp(self, created_at: str) -> None:
        """Mix in the time of the first native object, which sets equal requests apart."""
        self._stamp = self._stamp or created_at

    def make(self, prefix: str) -> str:
        """Return the next id."""
        self._count += 1
        text = f"{self._stamp}/{self._count}".encode()
        return prefix + blake2b(text, digest_size=12, key=self._root).hexdigest()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A native tool call; `id` is empty where the backend gave none."""

    id: str
    name: str
    arguments: Object

    @property
    def arguments_json(self) -> str:
        """Return the arguments as OpenAI writes them."""
        return orjson.dumps(self.arguments).decode()


@dataclass(frozen=True, slots=True)
class Reply:
    """What one native object of /api/chat or /api/generate says."""

    created_at: str
    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[Object, ...]
    done: bool
    reason: str
    prompt_tokens: int
    output_tokens: int

    @property
    def created(self) -> int:
        """Return the creation time in Unix seconds, 0 where it cannot be read."""
        try:
            return int(datetime.fromisoformat(self.created_at).timestamp())
        except ValueError:
            return 0


def read_reply(native: Object) -> Reply:
    """Read a native object; fields that are missing or not of their type count as empty."""
    message = _typed(native.get("message"), dict, {})
    calls = _typed(message.get("tool_calls"), list, [])
    return Reply(
        created_at=_typed(native.get("created_at"), str, ""),
        text=_typed(message.get("content"), str, "") or _typed(native.get("response"), str, ""),
        thinking=_typed(message.get("thinking"), str, "") or _typed(native.get("thinking"), str, ""),
        tool_calls=tuple(_tool_call(call) for call in calls if isinstance(call, dict)),
        logprobs=tuple(item for item in _typed(native.get("logprobs"), list, []) if isinstance(item, dict)),
        done=native.get("done") is True,
        reason=_typed(native.get("done_reason"), str, ""),
        prompt_tokens=_typed(native.get("prompt_eval_count"), int, 0),
        output_tokens=_typed(native.get("eval_count"), int, 0),
    )


def _tool_call(call: Object) -> ToolCall:
    function = _typed(call.get("function"), dict, {})
    name, arguments = _typed(function.get("name"), str, ""), _typed(function.get("arguments"), dict, {})
    return ToolCall(_typed(call.get("id"), str, ""), name, arguments)


def _typed(value: Any, kind: type, default: Any) -> Any:
    return value if isinstance(value, kind) else default


class Codec(ABC):
    """How one route of a surface writes what the backend says. One per request."""

    surface: ClassVar[Surface] = "openai"

    @abstractmethod
    def whole(self, native: Object) -> Object:
        """Return the surface's object for an answer that is not streamed."""

    def step(self, native: Object) -> bytes:
        """Return the events for one native line, with the stream's end where it is done."""
        return sse.frame(self.whole(native))

    def error(self, text: str) -> bytes:
        """Return the event that says that the stream broke."""
        return stream_error(self.surface, text)


class SurfaceAnswer:
    """One answer's way from native bytes to a surface's. Call head, then feed…, then finish or fail."""

    def __init__(self, codec: Codec, streaming: bool, request_id: str = "") -> None:
        self._codec = codec
        self._wants_stream = streaming
        self._request_id = request_id
        self._status = 200
        self._lines = LineSplitter()
        self._pieces: list[bytes] = []
        self._held = 0
        self._ended = False
        self.streaming = streaming
        """False: nothing is written before finish(), so the gateway may hold the head back till then."""

    def head(self, native: ResponseHead) -> ResponseHead:
        """Return the surface's head for the native one."""
        self._status = native.status
        self.streaming = self._wants_stream and native.status == 200
        kind = sse.CONTENT_TYPE if self.streaming else "application/json"
        kept: Headers = tuple(pair for pair in native.headers if pair[0].lower() not in _REPLACED)
        return ResponseHead(native.status, (("Content-Type", kind), *kept))

    def feed(self, data: bytes) -> bytes:
        """Take native body bytes, return what the client gets for them. Raises FrameTooLarge."""
        if self._ended:
            return b""
        if self.streaming:
            return b"".join(self._step(line) for line in self._lines.feed(data))
        self._held += len(data)
        if self._held > MAX_WHOLE:
            raise FrameTooLarge(f"the answer is over {MAX_WHOLE} bytes")
        self._pieces.append(data)
        return b""

    def finish(self) -> bytes:
        """Take the native body's clean end.

        Raises StreamBroken where an answer of status 200 that is not streamed is no usable object:
        nothing went out for it, so the gateway can still answer with an error status.
        """
        if self._ended:
            return b""
        if self.streaming:
            last = self._lines.finish()
            return (self._step(last) if last else b"") + self.fail("the answer ended before it was done")
        self._ended = True
        return self._whole(b"".join(self._pieces))

    def fail(self, text: str) -> bytes:
        """Take a native body that broke: an error event, or an error object where nothing went out."""
        if self._ended:
            return b""
        self._ended = True
        return self._codec.error(text) if self.streaming else self._error(text, max(self._status, 502))

    def _step(self, line: bytes) -> bytes:
        if self._ended:
            return b""
        native = _object_of(line)
        error = _error_text(native) if native is not None else "the backend sent a line that is not an object"
        if native is None or error:
            return self.fail(error)
        try:
            out = self._codec.step(native)
        except orjson.JSONEncodeError:
            return self.fail(_TOO_DEEP)
        self._ended = native.get("done") is True
        return out

    def _whole(self, body: bytes) -> bytes:
        native = _object_of(body)
        error = _error_text(native) if native is not None else ""
        if self._status != 200:
            return self._error(error or body.decode(errors="replace").strip() or "no text", self._status)
        if native is None or error:
            raise StreamBroken(error or "the backend's answer is not a JSON object")
        try:
            return orjson.dumps(self._codec.whole(native))
        except orjson.JSONEncodeError:
            raise StreamBroken(_TOO_DEEP) from None

    def _error(self, text: str, status: int) -> bytes:
        return error_body(self._codec.surface, status, text, self._request_id)


def _object_of(data: bytes) -> Object | None:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _error_text(native: Object) -> str:
    error = native.get("error")
    if isinstance(error, dict):
        error = error.get("message") or orjson.dumps(error).decode()
    return error if isinstance(error, str) else ""
