"""HTTP/1.1 as the client side speaks it: a request's head as bytes, an answer's bytes parsed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from osync.errors import BadRequest
from osync.types import ResponseHead

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_NOT_TARGET = re.compile(r"[\x00-\x20\x7f]").search


class BadAnswer(ValueError):
    """What came is not an HTTP answer, or over a bound."""


def encode_head(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a request's head. Raises BadRequest where a part could pass for more than itself."""
    if not _TOKEN(method) or _NOT_TARGET(target):
        raise BadRequest("the request cannot be sent on: its method or its target is malformed")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in headers:
        if not _TOKEN(name):
            raise BadRequest(f"the request cannot be sent on: {name!r} is not a header's name")
        lines.append(f"{name}: {value}")
    lines.append("\r\n")
    text = "\r\n".join(lines)
    # As many line ends as were put in: then no value brought one of its own.
    ends = len(lines)
    if text.count("\r") != ends or text.count("\n") != ends or "\0" in text:
        raise BadRequest("the request cannot be sent on: a header holds a line end or a zero byte")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadRequest("the request cannot be sent on: it holds half a character") from error


class AnswerParser:
    """One answer: `feed` its bytes in any cut, then look at `head`, `pieces` and `complete`."""

    __slots__ = (
        "_headers", "_headers_size", "_is_head", "_is_interim", "_parser", "_quiet", "_until_eof",
        "complete", "head", "pieces", "reusable", "size",
        "untouched",
    )  # fmt: skip

    def __init__(self, method: str) -> None:
        self.head: ResponseHead | None = None
        self.pieces: list[bytes] = []
        """Body bytes that nobody took yet; `size` is their sum."""
        self.size = 0
        self.complete = False
        self.untouched = True
        """True until a byte came."""
        self.reusable = False
        """True if the connection is at the start of a next answer, as far as the bytes tell."""
        self._is_head = method == "HEAD"
        self._is_interim = self._until_eof = False
        self._headers: list[tuple[str, str]] = []
        self._headers_size = 0
        self._quiet = 0  # bytes since a head or a body's piece: a head, a trailer, a chunk's extension
        self._parser: HttpResponseParser | None = HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take bytes in. Raises BadAnswer; what was good before that stays to be read."""
        if self._parser is None:
            self.reusable = False
            return
        self.untouched = False
        had_head, had_size = self.head, self.size
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.reusable = False
            if not self.complete:
                cause = error.__context__ if isinstance(error.__context__, BadAnswer) else error
                self.close()
                raise BadAnswer(str(cause)) from error
        if self.complete:
            self.close()
        elif self.size == had_size and self.head is had_head:
            self._quiet += len(data)
            if self._quiet > MAX_HEAD_BYTES:
                self.close()
                raise BadAnswer(f"its headers are over {MAX_HEAD_BYTES} bytes")
        else:
            self._quiet = 0

    def feed_eof(self) -> None:
        """The peer said that nothing follows: the end of an answer that declares no length."""
        self.reusable = False
        if self._until_eof and self._parser is not None:
            self.complete = True
        self.close()

    def take(self) -> bytes:
        """Return the body bytes that are there; b"" if none."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.size = 0
        return data

    def close(self) -> None:
        """Take nothing in any more."""
        self._parser = None  # it refers back to this object

    # What follows is called by the parser; after the end that is for bytes nobody asked for.

    def on_message_begin(self) -> None:
        """Start an answer."""
        if self.complete:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer says nothing that anybody needs."""
        if self.head is not None:
            return
        self._headers_size += len(name) + len(value)
        if self._headers_size > MAX_HEAD_BYTES or len(self._headers) == MAX_HEADERS:
            raise BadAnswer(f"its headers are over {MAX_HEADERS} or over {MAX_HEAD_BYTES} bytes")
        self._headers.append(
            (name.decode("utf-8", "surrogateescape"), value.rstrip(b" \t").decode("utf-8", "surrogateescape"))
        )

    def on_headers_complete(self) -> None:
        """Note how the body is framed, or that this was only an interim answer."""
        if self.head is not None or self._parser is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            if status == 101 or status < 100:
                raise BadAnswer(f"it answers {status}, which nobody asked for")
            self._is_interim = True
            self._headers.clear()
            return
        self.reusable = self._parser.should_keep_alive()
        if not self.reusable:
            self._until_eof = not any(map(_is_framing, self._headers))
        self.head = ResponseHead(status, tuple(self._headers))
        if self._is_head:
            # The parser cannot be told that no body follows, whatever the headers say.
            self.complete, self.reusable = True, False

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if not self.complete and not self._is_interim:
            self.pieces.append(data)
            self.size += len(data)

    def on_message_complete(self) -> None:
        """End the answer."""
        if self._is_interim:
            self._is_interim = False
        else:
            self.complete = True


def _is_framing(header: tuple[str, str]) -> bool:
    name = header[0].lower()
    return name == "content-length" or (name == "transfer-encoding" and header[1].lower().endswith("chunked"))
