"""The listener: raw requests, limits, drain, and what HTTP asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from osync.config import Settings
from osync.errors import ConfigError
from osync.gateway.http import HttpServer
from osync.types import ResponseHead
from tests.fakes.cluster import ScriptedNode, proxy


async def talk(port: int, data: bytes) -> bytes:
    """Send raw bytes, return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


class Held(ScriptedNode):
    """Answers when the test says so."""

    def __post_init__(self):
        self.go = asyncio.Event()
        self.began = asyncio.Event()

    async def answer(self, head, data, responder):
        self.began.set()
        await self.go.wait()
        await super().answer(head, data, responder)


async def test_greeting_and_head():
    async with proxy() as p:
        async with p.client.get("/") as r:
            assert (r.status, await r.text()) == (200, "Ollama is running")
            assert r.headers["Content-Type"] == "text/plain; charset=utf-8"
        async with p.client.head("/") as r:
            assert (r.status, await r.read()) == (200, b"")
        answer = await talk(p.port, b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n")
        assert b"Content-Length: 17" in answer


async def test_unknown_routes_go_to_a_node_and_without_one_are_ollamas():
    async with proxy() as p:
        async with p.client.get("/api/nothing") as r:
            assert (r.status, await r.text()) == (404, "404 page not found")
        async with p.client.get("/api/chat") as r:
            assert (r.status, await r.text()) == (405, "405 method not allowed")
    async with proxy(ScriptedNode("a")) as p, p.client.get("/api/new/%2Fthing?x=%20y") as r:
        assert (await r.json())["target"] == "/api/new/%2Fthing?x=%20y"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/metrics", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("PUT", "/readyz", "GET, HEAD"),
        ("DELETE", "/api/status", "GET, HEAD"),
        ("GET", "/api/nodes/a/drain", "POST"),
    ],
)
async def test_the_proxys_own_routes_say_which_methods_they_take(method: str, path: str, allow: str):
    async with proxy(ScriptedNode("a")) as p, p.client.request(method, path) as r:
        assert (r.status, await r.text(), r.headers["Allow"]) == (405, "405 method not allowed", allow)


async def test_other_methods_of_ollamas_routes_go_to_a_node():
    async with proxy(ScriptedNode("a")) as p, p.client.put("/api/tags") as r:
        assert (await r.json())["target"] == "/api/tags"
    async with proxy() as p, p.client.put("/api/tags") as r:
        assert (r.status, r.headers["Allow"]) == (405, "GET, HEAD")


async def test_bad_requests_have_ollamas_form():
    async with proxy(ScriptedNode("a")) as p:
        for body, text in ((b"", "missing request body"), (b"{", "unexpected EOF")):
            async with p.post("/api/chat", body) as r:
                assert (r.status, await r.json()) == (400, {"error": text})
        async with p.post("/v1/chat/completions", b"{") as r:
            assert (r.status, (await r.json())["error"]["type"]) == (400, "invalid_request_error")
        async with p.post("/v1/messages", b"{") as r:
            assert (await r.json())["type"] == "error"


async def test_body_limit():
    async with proxy(ScriptedNode("a"), settings=replace(Settings(), max_body=1000)) as p:
        async with p.post("/api/chat", b"x" * 1001) as r:
            assert r.status == 413
            assert "1000 bytes" in (await r.json())["error"]

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 100

        async with p.client.post("/v1/chat/completions", data=pieces()) as r:
            assert r.status == 413
            assert "message" in (await r.json())["error"]


async def test_large_body_arrives_whole():
    node = ScriptedNode("a")
    async with proxy(node) as p:
        body = b'{"model":"m","prompt":"' + b"x" * (3 << 20) + b'"}'
        async with p.post("/api/generate", body) as r:
            assert r.status == 200
        assert node.requests[0][1] == body


async def test_expect_continue():
    async with proxy(ScriptedNode("a")) as p:
        reader, writer = await asyncio.open_connection("127.0.0.1", p.port)
        writer.write(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 27\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"model":"m","messages":[]}')
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
        await writer.wait_closed()


async def test_http_1_0_and_duplicate_headers():
    class Chunky(ScriptedNode):
        async def answer(self, head, data, responder):
            headers = (("Content-Type", "application/x-ndjson"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
            await responder.start(ResponseHead(200, headers))
            await responder.write(b"{}\n")

    node = Chunky("a")
    body = b'{"model":"m","messages":[]}'
    length = b"Content-Length: %d\r\n" % len(body)
    async with proxy(node) as p:
        old = await talk(p.port, b"POST /api/chat HTTP/1.0\r\n" + length + b"\r\n" + body)
        assert old.startswith(b"HTTP/1.0 200 OK\r\n")
        assert old.endswith(b"\r\n\r\n{}\n")
        assert old.count(b"Set-Cookie") == 2
        raw = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\nX-A: 2\r\nX-B: \xff\r\nConnection: close\r\n"
        new = await talk(p.port, raw + length + b"\r\n" + body)
        assert new.endswith(b"\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n")
        sent = [pair for pair in node.requests[1][0].headers if pair[0].startswith("X-")]
        assert sent == [("X-A", "1"), ("X-A", "2"), ("X-B", "\xff")]


async def test_garbage_does_not_disturb():
    async with proxy(ScriptedNode("a")) as p:
        assert b"400" in await talk(p.port, b"\x16\x03\x01 nonsense\r\n\r\n")
        async with p.client.get("/healthz") as r:
            assert r.status == 200


@pytest.mark.parametrize("value", ["a\r\nX-Forged: 1", "a\nb", "a\0b"])
async def test_control_characters_in_a_nodes_headers_go_nowhere(value: str) -> None:
    class Forging(ScriptedNode):
        async def answer(self, head, data, responder):
            await responder.start(ResponseHead(200, (("Content-Type", "application/x-ndjson"), ("X-A", value))))
            await responder.write(b"{}\n")

    async with proxy(Forging("a")) as p:
        reader, writer = await asyncio.open_connection("127.0.0.1", p.port)
        writer.write(b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{"model":"m"}')
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert p.in_flight == 0


async def test_origin_and_host_checks():
    async with proxy(ScriptedNode("a")) as p:
        async with p.post("/api/chat", b"{}", Origin="http://evil.example") as r:
            assert (r.status, await r.read()) == (403, b"")
        async with p.post("/api/chat", b"{}", Host="evil.example") as r:
            assert r.status == 403
        async with p.client.options("/api/chat", headers={"Origin": "http://localhost:3000"}) as r:
            assert (r.status, await r.read()) == (204, b"")
            assert r.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"


async def test_taken_port_is_named():
    async with proxy() as p:
        settings = replace(p.settings, port=p.port)
        with pytest.raises(ConfigError, match=str(p.port)):
            await HttpServer(p.gateway, settings).start()


async def test_stop_lets_running_requests_end():
    node = Held("a")
    async with proxy(node) as p:
        request = asyncio.create_task(p.client.post("/api/chat", data=b'{"model":"m"}'))
        await node.began.wait()
        stopping = asyncio.create_task(p.server.stop(10))
        with pytest.raises(aiohttp.ClientConnectorError):
            while True:  # until the listener is closed
                async with aiohttp.ClientSession() as other, other.get(p.url):
                    pass
        node.go.set()
        response = await request
        assert (await response.json())["node"] == "a"
        await stopping


async def test_stop_cancels_what_outlasts_the_drain():
    node = Held("a")
    async with proxy(node) as p:
        request = asyncio.create_task(p.client.post("/api/chat", data=b'{"model":"m"}'))
        await node.began.wait()
        async with asyncio.timeout(2):
            await p.server.stop(0.01)
        with pytest.raises(aiohttp.ClientError):
            await request
        assert p.in_flight == 0


async def test_slow_client_holds_back_the_node():
    class Endless(ScriptedNode):
        sent = 0

        async def answer(self, head, data, responder):
            await responder.start(ResponseHead(200, (("Content-Type", "application/x-ndjson"),)))
            while self.sent < 64 << 20:
                await responder.write(b"x" * 65536)
                self.sent += 65536
                await asyncio.sleep(0)

    node = Endless("a")
    async with proxy(node) as p:
        _, writer = await asyncio.open_connection("127.0.0.1", p.port, limit=1)
        writer.write(b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{"model":"m"}')
        seen = -1
        while seen != node.sent or not node.sent:
            seen = node.sent
            await asyncio.sleep(0.05)
        assert node.sent < 32 << 20
        writer.close()
        while p.in_flight:
            await asyncio.sleep(0.001)
