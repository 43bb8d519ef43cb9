"""Newline-delimited JSON: lines out of arbitrary cuts, and lines to send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from osync.errors import FrameTooLarge

MAX_LINE = 8 << 20
"""Ollama's own clients read lines of at most 8 MiB."""

CONTENT_TYPE = "application/x-ndjson"


class LineSplitter:
    """Cuts a byte stream into lines, whatever pieces it comes in."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each line that `data` completes, without its end. Blank lines are left out.

        Raises FrameTooLarge once a line is over the bound.
        """
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._hold(piece)
            line = self._take()
            if line:
                yield line
        self._hold(rest)

    def finish(self) -> bytes:
        """Return the last line where the stream ended without a newline, else b""."""
        return self._take()

    def _hold(self, piece: bytes) -> None:
        self._held += len(piece)
        if self._held > self._limit:
            self._pieces.clear()
            raise FrameTooLarge(f"line is over {self._limit} bytes")
        if piece:
            self._pieces.append(piece)

    def _take(self) -> bytes:
        line = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        return line.strip(b" \t\r")


def format_line(value: Any) -> bytes:
    """Return `value` as one line with its end."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def error_of(line: bytes) -> str:
    """Return the text of an `{"error": …}` line, "" for any other."""
    if b'"error"' not in line:
        return ""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return ""
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, str) else ""
