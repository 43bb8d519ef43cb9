"""The Ollama backend: bytes go through untouched, broken answers are never clean ends, the watch is right."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from osync.backend.choose import choose
from osync.backend.ollama import OllamaBackend
from osync.config import Settings
from osync.errors import BadRequest, ConfigError, StreamBroken, UpstreamUnavailable
from osync.types import BackendState, Headers, RequestHead, ResponseHead
from tests.fakes.fault import Fault
from tests.fakes.ollama import FakeModel, FakeOllama, expected_text


class Pieces:
    """A `Body` of pieces; `failure` is raised after the last."""

    def __init__(self, *pieces: bytes, failure: Exception | None = None) -> None:
        self._pieces = list(pieces)
        self._failure = failure

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if self._pieces:
            return self._pieces.pop(0)
        if self._failure is not None:
            raise self._failure
        return b""

    async def read_all(self, limit: int) -> bytes:
        raise AssertionError("a relay never asks for all")


class Answer:
    """A `Responder` that keeps what it gets."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.pieces: list[bytes] = []
        self.wrote = asyncio.Event()

    @property
    def started(self) -> bool:
        return self.head is not None

    async def start(self, head: ResponseHead) -> None:
        assert self.head is None
        self.head = head

    async def write(self, data: bytes) -> None:
        assert data
        self.pieces.append(data)
        self.wrote.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def headers(self) -> dict[str, str]:
        assert self.head is not None
        return {k.lower(): v for k, v in self.head.headers}


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    async with FakeOllama(models=("a", FakeModel("b:7b", quantization="Q8_0"))) as fake:
        yield fake


@pytest.fixture
async def backend(fake: FakeOllama) -> AsyncIterator[OllamaBackend]:
    backend = OllamaBackend(fake.url)
    await backend.start()
    await until(backend, lambda s: s.ok)
    fake.requests.clear()
    yield backend
    await backend.close()


async def until(backend: OllamaBackend, condition: Callable[[BackendState], object], timeout_s: float = 5) -> None:
    """Wait for a state, woken by on_change."""
    changed = asyncio.Event()
    backend.on_change(changed.set)
    async with asyncio.timeout(timeout_s):
        while not condition(backend.state()):
            changed.clear()
            await changed.wait()


async def ask(backend: OllamaBackend, target: str, *body: bytes, method: str = "POST", headers: Headers = ()) -> Answer:
    answer = Answer()
    await backend.serve(RequestHead(method, target, headers), Pieces(*body), answer)
    return answer


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


async def test_request_arrives_byte_for_byte(fake: FakeOllama, backend: OllamaBackend) -> None:
    body = b'{ "model":"a","messages":[{"role":"user","content":"\\u00e9"}],"x_unknown": 1.50 ,"stream":false}'
    headers = (
        ("Host", "proxy.example:8000"), ("Origin", "https://page.example"), ("User-Agent", "it's me"),
        ("X-Twice", "1"), ("X-Twice", "2"), ("Connection", "keep-alive, X-Hop"), ("X-Hop", "gone"),
        ("TE", "trailers"), ("Content-Length", str(len(body))), ("Expect", "100-continue"),
    )  # fmt: skip
    answer = await ask(backend, "/api/chat?a=%2F&b=", body, headers=headers)
    (got,) = fake.received("/api/chat")
    assert got.body == body
    assert got.target == "/api/chat?a=%2F&b="
    assert [(k.decode(), v.decode()) for k, v in got.raw_headers] == [
        ("Host", f"127.0.0.1:{fake.port}"), ("User-Agent", "it's me"), ("X-Twice", "1"), ("X-Twice", "2"),
        ("Content-Length", str(len(body))),
    ]  # fmt: skip
    assert answer.head is not None and answer.head.status == 200
    assert answer.headers["content-length"] == str(len(answer.body))
    assert json.loads(answer.body)["message"]["content"] == expected_text(5)


async def test_stream_comes_as_it_is_and_without_hop_by_hop(fake: FakeOllama, backend: OllamaBackend) -> None:
    answer = await ask(backend, "/api/chat", chat())
    assert "transfer-encoding" not in answer.headers and "content-length" not in answer.headers
    assert answer.headers["content-type"] == "application/x-ndjson"
    text = "".join(json.loads(line)["message"]["content"] for line in answer.body.splitlines())
    assert text == expected_text(5)


async def test_each_token_is_passed_on_at_once(fake: FakeOllama, backend: OllamaBackend) -> None:
    fake.hold()
    answer = Answer()
    task = asyncio.create_task(backend.serve(RequestHead("POST", "/api/chat"), Pieces(chat()), answer))
    await fake.changes.until(lambda: fake.running)
    assert answer.head is None
    for count in (1, 2, 3):
        answer.wrote.clear()
        fake.release(1)
        await asyncio.wait_for(answer.wrote.wait(), 5)
        assert answer.body.count(b"\n") == count
    assert backend.state().active == 1
    fake.release()
    await task
    assert backend.state().active == 0


@pytest.mark.parametrize("tokens", [0, 1])
async def test_leaving_client_stops_ollama_within_100_ms(fake: FakeOllama, backend: OllamaBackend, tokens: int) -> None:
    fake.hold()
    answer = Answer()
    task = asyncio.create_task(backend.serve(RequestHead("POST", "/api/chat"), Pieces(chat()), answer))
    await fake.changes.until(lambda: fake.running)
    if tokens:
        fake.release(tokens)
        await asyncio.wait_for(answer.wrote.wait(), 5)
    left = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fake.changes.until(lambda: fake.cancelled == 1 and not fake.running)
    assert fake.cancelled_at - left < 0.1
    assert backend.state().active == 0


@pytest.mark.parametrize("fault", [Fault(reset_after=2), Fault(eof_after=2)])
async def test_broken_stream_is_never_a_clean_end(fake: FakeOllama, backend: OllamaBackend, fault: Fault) -> None:
    fake.fault(fault)
    answer = Answer()
    with pytest.raises(StreamBroken):
        await backend.serve(RequestHead("POST", "/api/chat"), Pieces(chat()), answer)
    assert answer.started and b'"done":true' not in answer.body


async def test_death_before_the_head_is_retryable(fake: FakeOllama, backend: OllamaBackend) -> None:
    fake.fault(reset_after=0, times=2)
    with pytest.raises(UpstreamUnavailable, match="broke off before it answered"):
        await ask(backend, "/api/chat", chat())


@pytest.mark.parametrize("header", [("X", "a\r\nX-Evil: 1"), ("X: a\r\nX-Evil", "1"), ("X", "a\0"), ("", "a")])
async def test_header_that_would_become_two_is_refused(
    fake: FakeOllama, backend: OllamaBackend, header: tuple[str, str]
) -> None:
    with pytest.raises(BadRequest, match="cannot be sent on"):
        await ask(backend, "/api/chat", chat(), headers=(header,))
    with pytest.raises(BadRequest, match="cannot be sent on"):
        await ask(backend, "/api/chat HTTP/1.1\r\nX-Evil: 1", chat())
    assert not fake.received("/api/chat")
    await ask(backend, "/api/chat", chat())


async def test_mid_stream_error_line_is_passed_on(fake: FakeOllama, backend: OllamaBackend) -> None:
    fake.fault(error_after=1, text="boom")
    answer = await ask(backend, "/api/chat", chat())
    assert json.loads(answer.body.splitlines()[-1]) == {"error": "boom"}


async def test_connection_refused_says_what_to_do_and_marks_it_down(fake: FakeOllama, backend: OllamaBackend) -> None:
    await fake.close()
    with pytest.raises(UpstreamUnavailable, match="cannot reach Ollama at") as caught:
        await ask(backend, "/api/chat", chat())
    assert caught.value.retryable
    await until(backend, lambda s: not s.ok, timeout_s=1.5)
    assert "ollama serve" in backend.state().error and not backend.state().loaded
    await fake.start()
    await until(backend, lambda s: s.ok and s.models, timeout_s=3)


async def test_stale_pooled_connection_is_retried_once(backend: OllamaBackend, fake: FakeOllama) -> None:
    """A server that closes a kept connection as soon as the next request comes in on it."""
    served: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = True
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
            body = await reader.readexactly(size)
            if not first and b"/api/chat" in head:
                break
            if b"/api/chat" in head:
                served.append(body)
                first = False
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    stale = OllamaBackend(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await stale.start()
    try:
        for _ in range(3):
            assert (await ask(stale, "/api/chat", chat())).body == b"{}"
        assert served == [chat()] * 3
    finally:
        await stale.close()
        server.close()


async def test_upload_is_streamed_and_its_failure_is_the_clients(fake: FakeOllama, backend: OllamaBackend) -> None:
    pieces = [bytes([i]) * 300_000 for i in range(12)]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    answer = await ask(backend, f"/api/blobs/sha256:{digest}", *pieces)
    assert answer.head is not None and answer.head.status == 201
    assert fake.store.blobs[f"sha256:{digest}"] == 3_600_000
    assert fake.requests[-1].headers["transfer-encoding"] == "chunked"
    answer = await ask(backend, f"/api/blobs/sha256:{digest}", *pieces)
    assert answer.head is not None and answer.head.status == 200  # answered before the body was read
    length = (("Content-Length", "3600000"),)
    answer = Answer()
    with pytest.raises(StreamBroken, match="client"):
        await backend.serve(
            RequestHead("POST", f"/api/blobs/sha256:{'0' * 64}", length),
            Pieces(*pieces[:8], failure=StreamBroken("the client left")),
            answer,
        )
    assert len(fake.store.blobs) == 1
    large = chat(stream=False, pad="x" * 3_000_000)
    await ask(backend, "/api/chat", large, headers=(("Content-Length", str(len(large))),))
    assert fake.received("/api/chat")[-1].body == large


async def test_reads_and_refusals_pass_through(fake: FakeOllama, backend: OllamaBackend) -> None:
    for method, target, status, body in (
        ("GET", "/", 200, b"Ollama is running"),
        ("HEAD", "/", 200, b""),
        ("GET", "/api/new", 404, b"404 page not found"),
        ("GET", "/api/tags/", 301, b""),
    ):
        answer = await ask(backend, target, method=method)
        assert answer.head is not None
        assert (answer.head.status, answer.body) == (status, body)
    assert (await ask(backend, "/api/delete", b'{"model":"zzz"}', method="DELETE")).body


async def test_state_follows_disk_and_memory(fake: FakeOllama, backend: OllamaBackend) -> None:
    state = backend.state()
    assert {m.name: m.quantization for m in state.models} == {"a:latest": "Q4_1", "b:7b": "Q8_0"}
    assert (state.version, state.slots, state.models[0].context_length) == ("0.33.0", 1, 8192)
    assert not state.loaded
    await ask(backend, "/api/chat", chat())
    await until(backend, lambda s: [m.name for m in s.loaded] == ["a:latest"], timeout_s=1.5)
    await ask(backend, "/api/delete", b'{"model":"b:7b"}', method="DELETE")
    await until(backend, lambda s: len(s.models) == 1, timeout_s=1.5)


async def test_slow_ps_does_not_mark_it_down(
    fake: FakeOllama, backend: OllamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osync.backend.ollama_watch.IDLE_INTERVAL_S", 0.05)
    fake.ps_delay_s = 30.0
    await ask(backend, "/api/chat", chat())
    await fake.changes.until(lambda: fake.received("/api/ps") and len(fake.received("/api/version")) >= 4)
    assert backend.state().ok


async def test_prefix_of_the_address_is_kept_and_close_breaks_off(fake: FakeOllama) -> None:
    backend = OllamaBackend(fake.url + "/v1/")
    await backend.start()
    assert json.loads((await ask(backend, "/models", method="GET")).body)["object"] == "list"
    await backend.close()
    backend = OllamaBackend(fake.url)
    await backend.start()
    fake.hold()
    task = asyncio.create_task(ask(backend, "/api/chat", chat()))
    await fake.changes.until(lambda: fake.running)
    await backend.close()
    with pytest.raises(UpstreamUnavailable):
        await task
    with pytest.raises(UpstreamUnavailable, match="not running"):
        await ask(backend, "/api/chat", chat())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_auto_takes_an_ollama_that_answers(fake: FakeOllama) -> None:
    assert isinstance(await choose(Settings(ollama_host=fake.url)), OllamaBackend)


async def test_without_ollama_and_engine_the_error_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osync.backend.choose._has_engine", lambda: False)
    backend = await choose(Settings(ollama_host=f"http://127.0.0.1:{free_port()}"))
    assert isinstance(backend, OllamaBackend)
    await backend.start()
    await until(backend, lambda s: "ollama serve" in s.error)
    assert "osync[engine]" in backend.state().error
    await backend.close()
    with pytest.raises(ConfigError, match="engine"):
        await choose(Settings(backend="engine"))


@pytest.mark.parametrize(
    ("host", "ollama"),
    [
        ("127.0.0.1", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("10.9.9.9", "http://10.9.9.9:8000"),
    ],
)
async def test_own_address_is_refused(host: str, ollama: str) -> None:
    with pytest.raises(ConfigError, match="this very proxy"):
        await choose(Settings(host=host, ollama_host=ollama, insecure=True))
    other = Settings(host=host, port=8001, ollama_host=ollama, backend="ollama")
    closing: Callable[[], Awaitable[None]] = (await choose(other)).close
    await closing()
