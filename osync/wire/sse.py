"""Server-sent events, the sending side."""

from __future__ import annotations

from typing import Any

import orjson

CONTENT_TYPE = "text/event-stream"

DONE = b"data: [DONE]\n\n"
"""How OpenAI's streams say that they are complete."""


def frame(value: Any, event: str = "") -> bytes:
    """Return one event whose data is `value` as JSON (which never holds a raw newline)."""
    name = b"event: " + event.encode() + b"\n" if event else b""
    return name + b"data: " + orjson.dumps(value) + b"\n\n"
