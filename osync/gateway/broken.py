"""What a client gets as the last bytes of an answer that cannot be completed."""

from __future__ import annotations

from osync.errors import OsyncError, StreamBroken
from osync.gateway.answer import Answer
from osync.gateway.context import Call
from osync.wire.errors import stream_error, surface_of


class SaidSo(StreamBroken):
    """A stream broke, and who wrote it knows how its surface says so."""

    def __init__(self, text: str, last_words: bytes) -> None:
        super().__init__(text)
        self.last_words = last_words


def last_words(answer: Answer, call: Call, error: OsyncError) -> bytes | None:
    """Return a final line or event that says the stream broke; None: only breaking off can say it.

    Ollama ends a native stream like that itself, and clients know it. An answer of known length, or
    of one JSON object, must not get more bytes: it is cut.
    """
    answer.broke = True
    if isinstance(error, SaidSo):
        return error.last_words
    if answer.has_length or answer.status >= 400:
        return None
    sse = answer.content_type.startswith("text/event-stream")
    if not sse and not answer.content_type.startswith("application/x-ndjson"):
        return None
    end = b"\n\n" if sse else b"\n"
    midline = bool(answer.sent) and not answer.tail.endswith(end)
    return stream_error(surface_of(call.path), str(error), sse, midline=midline)
