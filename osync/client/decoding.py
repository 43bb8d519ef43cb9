"""Answer bytes to typed values and errors, without I/O: both clients read by these."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import orjson

from osync.client.answers import Answer, Progress, Timed
from osync.errors import (
    BadRequest,
    CapacityError,
    Forbidden,
    FrameTooLarge,
    ModelNotFound,
    NoNodes,
    NotSupported,
    OsyncError,
    StreamBroken,
    Unauthenticated,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from osync.wire.ndjson import LineSplitter

T = TypeVar("T", bound=Answer)

MAX_OBJECT = 256 << 20  # /api/show with verbose lists every token of a vocabulary

_BY_STATUS: dict[int, type[OsyncError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: ModelNotFound,
    413: FrameTooLarge,
    501: NotSupported,
    502: UpstreamUnavailable,
    504: UpstreamTimeout,
}


def error_of(status: int, retry_after: str, body: bytes, url: str) -> OsyncError:
    """Return the error that an answer with an error status stands for."""
    text = _error_text(body) or f"{url} answered with HTTP status {status} and no reason"
    if status == 503:
        if "no node" in text.lower():
            return NoNodes(text)
        return CapacityError(text, _seconds(retry_after))
    kind = _BY_STATUS.get(status) or (BadRequest if status < 500 else UpstreamError)
    return kind(text)


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 1.0


def _error_text(body: bytes) -> str:
    """Return the reason in an error body of any surface, or the start of what is no JSON."""
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip()
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)


def unreachable(url: str, reason: object) -> UpstreamUnavailable:
    """Return the error for a proxy that cannot be connected to; it says what to do."""
    reason = getattr(reason, "strerror", None) or reason
    return UpstreamUnavailable(
        f"cannot reach osync at {url} ({reason}): start it with `osyncd`, or name another server by "
        "host and port, base_urls, --url or OSYNC_URL"
    )


def timed_out(url: str, timeout_s: float | None) -> UpstreamTimeout:
    """Return the error for an answer that took longer than the client's own limit."""
    return UpstreamTimeout(f"{url} did not answer within the client's timeout of {timeout_s} s")


def broken(url: str, reason: object = "the connection closed before the last line") -> StreamBroken:
    """Return the error for an answer that stopped before its end."""
    return StreamBroken(f"the answer from {url} broke off: {reason}")


def decode(body: bytes, url: str) -> dict[str, Any]:
    """Return the object of an answer that is not streamed. Raises StreamBroken if it is none."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise broken(url, f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise broken(url, "a JSON object was expected")
    return value


class Decoder(Generic[T]):
    """Cuts a streamed answer into lines and types them; bytes may come at arbitrary cuts."""

    def __init__(self, build: Callable[[dict[str, Any]], T], url: str) -> None:
        self._build = build
        self._url = url
        self._lines: deque[bytes] = deque()
        self._splitter = LineSplitter()
        self._ended = False
        self.complete = False
        """True once the line that ends an answer was seen."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises FrameTooLarge when a line is over its bound."""
        self._lines.extend(self._splitter.feed(data))

    def end(self) -> None:
        """Say that no more bytes come."""
        self._ended = True
        self._lines.append(self._splitter.finish())

    def pop(self) -> T | None:
        """Return the next value, None if there is none yet or, after `end`, none any more.

        Raises StreamBroken for an error line and for an end without the line that ends an answer.
        """
        while self._lines:
            line = self._lines.popleft()
            if not line:
                continue
            value = decode(line, self._url)
            if error := value.get("error"):
                raise StreamBroken(str(error))
            item = self._build(value)
            self.complete = self.complete or is_last(item)
            return item
        if self._ended and not self.complete:
            raise broken(self._url)
        return None


def is_last(item: Answer) -> bool:
    """Return whether an item ends its stream cleanly."""
    if isinstance(item, Timed):
        return item.done
    return isinstance(item, Progress) and item.status == "success"


def with_node(build: Callable[..., T], node: str) -> Callable[[dict[str, Any]], T]:
    """Return `build`, filling in the node's name where the answer type has one."""
    kind = getattr(build, "__self__", None)
    if node and "node" in getattr(kind, "__dataclass_fields__", {}):
        return lambda value: build(value, node=node)
    return build
