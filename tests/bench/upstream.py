"""A lean Ollama for load tests: python -m tests.bench.upstream PORT.

Straight on asyncio's protocol, so that it takes as little as it can of the CPU that it shares with
what is measured. /api/chat answers `options.num_predict` tokens, one each `options.delay_ms`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import orjson
import uvloop

MODEL = "bench:latest"
DETAILS = {
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "1B",
    "quantization_level": "Q4_0",
}
ROW = {"name": MODEL, "model": MODEL, "size": 1 << 30, "digest": "b" * 64, "details": DETAILS}
STATIC = {
    b"/api/version": {"version": "0.33.0"},
    b"/api/tags": {"models": [{**ROW, "modified_at": "2026-01-01T00:00:00Z"}]},
    b"/api/ps": {"models": [{**ROW, "expires_at": "2126-01-01T00:00:00Z", "size_vram": 0, "context_length": 4096}]},
}
HEAD = b'{"model":"bench","created_at":"2026-01-01T00:00:00.0Z","message":{"role":"assistant","content":"'
TOKEN = HEAD + b'word "},"done":false}\n'
LAST = (
    HEAD + b'"},"done":true,"done_reason":"stop","total_duration":1,"load_duration":1,"prompt_eval_count":5,'
    b'"prompt_eval_duration":1,"eval_count":8,"eval_duration":1}'
)


def chunk(data: bytes) -> bytes:
    """Frame one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(value: object) -> bytes:
    """Return a whole HTTP answer with a JSON body."""
    body = value if isinstance(value, bytes) else orjson.dumps(value)
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = answer(LAST)
TOKEN_CHUNK, LAST_CHUNK = chunk(TOKEN), chunk(LAST + b"\n") + b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection; requests one after the other."""

    def __init__(self) -> None:
        self.buffer = b""
        self.transport: asyncio.Transport
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the running answer."""
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            lower = head.lower()
            at = lower.find(b"content-length:")
            length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(rest) < length:
                return
            body, self.buffer = rest[:length], rest[length:]
            self.respond(head.split(b" ", 2)[1], body)

    def respond(self, path: bytes, body: bytes) -> None:
        """Answer one request."""
        if path in STATIC:
            self.transport.write(answer(STATIC[path]))
            return
        request = orjson.loads(body or b"{}")
        if not request.get("stream", True):
            self.transport.write(WHOLE)
            return
        options = request.get("options") or {}
        self.transport.write(STREAM_HEAD + TOKEN_CHUNK)
        loop = asyncio.get_running_loop()
        self.tick(loop, loop.time(), options.get("delay_ms", 0) / 1e3, options.get("num_predict", 8) - 1)

    def tick(self, loop: asyncio.AbstractEventLoop, due: float, delay_s: float, left: int) -> None:
        """Write the next token, on a schedule that does not drift."""
        if left < 0 or self.transport.is_closing():
            return
        if left == 0:
            self.transport.write(LAST_CHUNK)
            return
        due += delay_s
        self.timer = loop.call_at(due, self.token, loop, due, delay_s, left)

    def token(self, loop: asyncio.AbstractEventLoop, due: float, delay_s: float, left: int) -> None:
        """One token, then the next."""
        self.transport.write(TOKEN_CHUNK)
        self.tick(loop, due, delay_s, left - 1)


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=2048)
    print(f"listening http://127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
