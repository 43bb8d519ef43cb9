"""Native answers as a backend writes them, and what a client reads from a translated stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from osync.types import ResponseHead
from osync.wire.translate import Translated, translate

STAMP = "2026-01-02T03:04:05.123456789Z"
NDJSON = ResponseHead(200, (("Content-Type", "application/x-ndjson"), ("X-Osync-Node", "n1")))
JSON = ResponseHead(200, (("Content-Type", "application/json; charset=utf-8"), ("Content-Length", "99")))

CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}

PIECES = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda t: {"content": t}),
        st.text(max_size=4, alphabet="abc \n").map(lambda t: {"content": "", "thinking": t}),
        st.just({"content": "", "tool_calls": [CALL]}),
    ),
    max_size=6,
)


def ask(path: str, stream: bool = False, **fields: Any) -> Translated:
    found = translate(path, orjson.dumps({"model": "smol", "stream": stream, **fields}))
    assert found is not None
    return found


def chat_lines(*messages: dict[str, Any], **end: Any) -> bytes:
    """An /api/chat stream of these messages; `end` goes into the last line."""
    common = {"model": "smol", "created_at": STAMP}
    lines: list[dict[str, Any]] = [
        {**common, "message": {"role": "assistant", **message}, "done": False} for message in messages
    ]
    last = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
    lines.append({**common, **last, "prompt_eval_count": 7, "eval_count": 3, **end})
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def chat_object(message: dict[str, Any], reason: str = "stop") -> bytes:
    value = {"model": "smol", "created_at": STAMP, "message": {"role": "assistant", **message}, "done": True}
    return orjson.dumps({**value, "done_reason": reason, "prompt_eval_count": 7, "eval_count": 3})


def run(translated: Translated, native: bytes, head: ResponseHead = NDJSON, cuts: tuple[int, ...] = ()) -> bytes:
    """Feed `native` cut at `cuts`; return the whole client side body."""
    answer = translated.answer
    answer.head(head)
    places = [0, *sorted(cut % (len(native) + 1) for cut in cuts), len(native)]
    out = b"".join(answer.feed(native[a:b]) for a, b in pairwise(places))
    return out + answer.finish()


def whole(translated: Translated, native: bytes) -> Any:
    return orjson.loads(run(translated, native, JSON))


def events(body: bytes) -> list[tuple[str | None, Any]]:
    """The (name, data) of each event, by OpenAI's own SSE reader; "[DONE]" stays text."""
    found = list(SSEDecoder().iter_bytes(iter([body])))
    return [(e.event, "[DONE]" if e.data == "[DONE]" else orjson.loads(e.data)) for e in found]
