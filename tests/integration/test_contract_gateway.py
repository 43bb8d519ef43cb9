"""What a client may count on from outside, where a node, a client or a request is at fault."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import zstandard
from aiohttp import web

from osync.backend.ollama import OllamaBackend
from osync.cluster.membership import Membership
from osync.config import Settings
from osync.errors import NotSupported, UpstreamUnavailable
from osync.net.exchange import Body, Responder
from osync.types import NodeId, RequestHead
from tests.fakes.cluster import Proxy, ScriptedNode, proxy, reply
from tests.links import node_process, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@dataclass
class Failing(ScriptedNode):
    """Answers with an error, or raises one."""

    status: int = 500
    text: str = "boom"
    error: Exception | None = None

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        if self.error is not None:
            raise self.error
        await reply(responder, self.status, {"error": self.text})


async def raw(p: Proxy, data: bytes, wanted: bytes) -> bytes:
    """Send bytes; return the answer as soon as it holds `wanted`, or all of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", p.port)
    try:
        writer.write(data)
        got = b""
        async with asyncio.timeout(5):
            while wanted not in got and (piece := await reader.read(1 << 16)):
                got += piece
        return got
    finally:
        writer.close()
        await writer.wait_closed()


async def nodes_of(p: Proxy) -> list[Any]:
    async with p.client.get("/api/status") as r:
        return list((await r.json())["osync"]["nodes"])


async def test_a_node_that_went_down_is_still_shown_with_its_name():
    a = ScriptedNode("a", models=("m:latest", "x:7b"), loaded=("m:latest",))
    async with proxy(a, ScriptedNode("b")) as p:
        peer = p.view.peers[0]
        peer.last, peer.last_seen = a.state(), 1_700_000_000.0
        peer.failures, peer.error = 3, "connection refused"
        a.up = False
        down, other = await nodes_of(p)
    assert (down["node_id"], down["hostname"], down["online"], down["usable"]) == ("a", "host-a", False, False)
    assert down["last_heartbeat"].startswith("2023-11-14T")
    assert down["health"]["consecutive_failures"] == 3
    assert down["models"] == ["m:latest", "x:7b"]
    assert (down["loaded_models"], down["active_sessions"], down["backend"]["ok"]) == ([], 0, False)
    assert other["online"] is True
    assert set(down) == set(other)


async def test_a_node_that_never_answered_has_all_fields():
    async with proxy(ScriptedNode("a"), ScriptedNode("never", up=False)) as p:
        up, never = await nodes_of(p)
    assert set(never) == set(up)
    assert (never["node_id"], never["host"], never["online"], never["last_heartbeat"]) == ("", "never", False, "")


async def test_membership_remembers_a_node_that_was_killed():
    async with node_process() as (port, process):
        membership = Membership(Settings(servers=(f"127.0.0.1:{port}",)), NodeId("proxy"), None)
        await membership.start()
        try:
            peer = membership.view.peers[0]
            await until(lambda: peer.usable)
            known = peer.state
            process.kill()
            await until(lambda: peer.failures >= 2)
            assert peer.state is None
            assert peer.last is not None and known is not None
            assert peer.last.node_id == known.node_id
        finally:
            await membership.close()


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
@pytest.mark.parametrize("raises", [False, True])
async def test_an_absent_model_is_404_though_some_node_lacks_the_feature(path: str, raises: bool):
    missing = 'model "nope" not found, try pulling it first'
    has_none = Failing("a", models=(), status=404, text=missing)
    error = NotSupported("no embeddings here") if raises else None
    lacks = Failing("b", models=(), kind="engine", status=501, text="no embeddings here", error=error)
    async with proxy(has_none, lacks) as p, p.post(path, {"model": "nope", "input": "x"}) as r:
        assert (r.status, await r.json()) == (404, {"error": missing})


async def test_a_feature_that_the_only_replica_lacks_is_501():
    lacks = Failing("a", kind="engine", status=501, text="no embeddings here")
    async with proxy(lacks, ScriptedNode("b", models=())) as p, p.post("/api/embed", {"model": "m", "input": "x"}) as r:
        assert (r.status, await r.json()) == (501, {"error": "no embeddings here"})


async def test_a_feature_that_no_engine_has_is_told_in_the_surfaces_form():
    a, b = (Failing(name, kind="engine", status=501, text="no embeddings here") for name in "ab")
    async with proxy(a, b) as p, p.post("/v1/embeddings", {"model": "m", "input": "x"}) as r:
        assert (r.status, (await r.json())["error"]["message"]) == (501, "no embeddings here")
        assert int(r.headers.get("Content-Length", "0")) in (0, len(await r.read()))


async def test_503_says_why_the_only_replica_gets_no_requests():
    off = ScriptedNode("a", ok=False)
    async with proxy(off, ScriptedNode("b", models=("x:latest",))) as p, p.post("/api/chat", CHAT) as r:
        assert r.status == 503
        assert (await r.json())["error"].endswith("now: host-a: backend ollama does not answer (refused)")


async def test_an_absent_model_is_not_its_nodes_error():
    a = Failing("a", models=(), status=404, text="model 'nope' not found")
    b = Failing("b", models=(), status=404, text="model 'nope' not found")
    async with proxy(a, b) as p:
        async with p.post("/api/chat", {**CHAT, "model": "nope"}) as r:
            assert r.status == 404
        assert [node["requests"]["errors"] for node in await nodes_of(p)] == [0, 0]


async def test_headers_that_connection_names_stay_on_their_hop():
    node = ScriptedNode("a")
    body = orjson.dumps(CHAT)
    lines = (
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nX-Kept: 2\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    async with proxy(node) as p:
        assert (await raw(p, lines + body, b'"node"')).startswith(b"HTTP/1.1 200 ")
    names = {name.lower() for name, _ in node.requests[0][0].headers}
    assert "x-kept" in names
    assert not names & {"x-hop", "connection"}


async def test_a_refused_body_that_never_came_ends_the_connection():
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n"
    async with proxy(ScriptedNode("a")) as p:
        answer = await raw(p, head, b"}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"])
async def test_who_speaks_no_http_is_refused_without_a_traceback(junk: bytes, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "osync.http"):
        async with proxy(ScriptedNode("a")) as p:
            assert b" 400 " in await raw(p, junk, b"\r\n")
    assert not [record for record in caplog.records if record.exc_info]


async def test_unload_reaches_a_node_that_does_not_say_yet_that_it_loaded_the_model():
    nodes = [ScriptedNode("a", loaded=("m:latest",)), ScriptedNode("b"), ScriptedNode("c", models=("x:latest",))]
    async with proxy(*nodes) as p, p.post("/api/generate", {"model": "m", "keep_alive": 0}) as r:
        assert r.status == 200
        assert [len(node.requests) for node in nodes] == [1, 1, 0]


async def test_unload_succeeds_where_a_node_without_the_model_in_memory_cannot_be_asked():
    broken = Failing("b", error=UpstreamUnavailable("gone"))
    gone = Failing("c", status=404, text="model 'm' not found")
    unload = {"model": "m", "keep_alive": 0}
    loaded = ScriptedNode("a", loaded=("m:latest",))
    async with proxy(broken, gone, loaded) as p, p.post("/api/generate", unload) as r:
        assert (r.status, (await r.json())["node"]) == (200, "a")


async def test_unload_fails_where_the_node_that_has_it_in_memory_cannot_be_asked():
    broken = Failing("b", loaded=("m:latest",), error=UpstreamUnavailable("gone"))
    async with proxy(broken, ScriptedNode("a")) as p, p.post("/api/generate", {"model": "m", "keep_alive": 0}) as r:
        assert r.status == 502


@dataclass
class Silent(ScriptedNode):
    """Takes requests and says nothing, until it breaks."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    broken: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        self.asked.set()
        await self.broken.wait()
        raise UpstreamUnavailable("no sign of life")


async def test_status_does_not_wait_for_a_node_that_says_nothing():
    silent, other = Silent("a"), WithCloud("b")
    async with proxy(silent, other) as p:
        async with asyncio.timeout(1.5), p.client.get("/api/status") as r:
            assert (await r.json())["cloud"] == {"disabled": False, "source": "config"}
        assert silent.asked.is_set()


class WithCloud(ScriptedNode):
    """Says something of its cloud."""

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        await reply(responder, 200, {"cloud": {"disabled": False, "source": "config"}})


async def test_an_unknown_read_goes_to_another_node_where_the_first_breaks():
    silent, other = Silent("a"), ScriptedNode("b")
    async with proxy(silent, other) as p:
        asked = asyncio.create_task(p.client.get("/api/new").__aenter__())
        await silent.asked.wait()
        silent.broken.set()
        response = await asked
        assert (response.status, (await response.json())["node"]) == (200, "b")


async def test_an_unknown_write_is_not_repeated_on_another_node():
    silent, other = Silent("a"), ScriptedNode("b")
    silent.broken.set()
    async with proxy(silent, other) as p, p.post("/api/new", {"x": 1}) as r:
        assert r.status == 502
        assert other.requests == []


async def test_a_pull_goes_to_another_node_where_the_first_breaks_before_it_answers():
    silent, other = Silent("a"), ScriptedNode("b", models=())
    async with proxy(silent, other) as p:
        asked = asyncio.create_task(p.post("/api/pull", {"model": "m", "stream": False}).__aenter__())
        await silent.asked.wait()
        silent.broken.set()
        response = await asked
        assert (response.status, response.headers["X-Osync-Node"]) == (200, "b")
        assert (await response.json())["node"] == "b"
        assert p.gateway.context.pulls == {}


async def test_a_pull_that_all_nodes_break_names_the_last():
    nodes = Failing("a", error=UpstreamUnavailable("gone")), Failing("b", error=UpstreamUnavailable("gone too"))
    async with proxy(*nodes) as p, p.post("/api/pull", {"model": "m"}) as r:
        assert (r.status, await r.json()) == (502, {"error": "node host-b (b): gone too"})


@pytest.mark.parametrize("path", ["/metrics", "/api/status"])
async def test_head_of_the_proxys_own_routes_is_answered_by_itself(path: str):
    node = Failing("a", kind="engine", status=404)
    async with proxy(node) as p, p.client.head(path) as r:
        assert r.status == 200
        assert node.requests == []


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[str, list[tuple[list[tuple[str, str]], bytes]]]]:
    """Run an HTTP server that keeps the bytes of what it gets, and yield its address."""
    got: list[tuple[list[tuple[str, str]], bytes]] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.method == "POST":
            got.append(([(k.decode(), v.decode()) for k, v in request.raw_headers], body))
        return web.json_response({"version": "0.33.0", "models": []})

    runner = web.ServerRunner(web.Server(answer, auto_decompress=False))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site.port}", got
    finally:
        await runner.cleanup()


class Fronting(ScriptedNode):
    """A node in front of a real backend."""

    backend: OllamaBackend

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        await self.backend.serve(head, body, responder)


async def test_compressed_bodies_and_header_names_arrive_as_they_were_sent():
    packed = zstandard.compress(orjson.dumps({"model": "m", "input": "hi"}))
    head = (
        b"POST /v1/responses?a=%%20b HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: zstd\r\nX-CaSe: 1\r\nX-Dup: a\r\n"
        b"X-Dup: b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(packed)
    )
    async with recording() as (url, got):
        backend = OllamaBackend(url)
        await backend.start()
        node = Fronting("a")
        node.backend = backend
        try:
            async with proxy(node) as p:
                assert (await raw(p, head + packed, b"models")).startswith(b"HTTP/1.1 200 ")
        finally:
            await backend.close()
    headers, body = got[0]
    assert body == packed
    assert ("Content-Encoding", "zstd") in headers
    assert [pair for pair in headers if pair[0].lower().startswith("x-")] == [
        ("X-CaSe", "1"),
        ("X-Dup", "a"),
        ("X-Dup", "b"),
    ]
