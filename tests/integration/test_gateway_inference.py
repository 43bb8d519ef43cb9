"""Routing, retries, cancellation and broken streams, through a real listener."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson
import pytest

from osync.errors import CapacityError, ModelUnusable, NotSupported, StreamBroken, UpstreamUnavailable
from osync.net.exchange import Responder
from osync.types import Headers, NodeId, RequestHead, ResponseHead
from tests.fakes.cluster import ScriptedNode, proxy, reply

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
NDJSON = (("Content-Type", "application/x-ndjson"),)
SSE = (("Content-Type", "text/event-stream"),)


class Failing(ScriptedNode):
    """Fails each request in the way that `failure` says."""

    failure: Exception | tuple[int, str] | str = "after head"

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        if isinstance(self.failure, Exception):
            raise self.failure
        if isinstance(self.failure, tuple):
            await reply(responder, self.failure[0], {"error": self.failure[1]})
            return
        await responder.start(ResponseHead(200, NDJSON))
        raise StreamBroken("gone")


def failing(name: str, failure: Exception | tuple[int, str] | str) -> Failing:
    node = Failing(name, loaded=("m:latest",))
    node.failure = failure
    return node


class Streaming(ScriptedNode):
    """Streams lines as the test lets them, and breaks or ends."""

    def __post_init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.cancelled = asyncio.Event()
        self.headers: Headers = NDJSON

    async def answer(self, head, data, responder):
        try:
            await responder.start(ResponseHead(200, self.headers))
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                await responder.write(piece)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def test_answer_passes_through_byte_for_byte():
    node = ScriptedNode("a")
    async with proxy(node) as p:
        body = b'{"model":"M:latest", "messages":[], "x":1.0}'
        async with p.post(
            "/api/chat?ts=1", body, Origin="http://localhost", Authorization="k", X_Osync_Session="s"
        ) as r:
            assert await r.json() == {"node": "a", "target": "/api/chat?ts=1"}
            assert r.headers["X-Osync-Node"] == "a"
            assert r.headers["X-Osync-Request-Id"]
            assert r.headers["Access-Control-Allow-Origin"] == "http://localhost"
            assert "Transfer-Encoding" not in r.headers
        head, sent = node.requests[0]
        assert sent == body
        names = {name.lower() for name, _ in head.headers}
        assert "authorization" in names
        assert names.isdisjoint({"host", "origin", "connection", "content-length", "x-osync-session"})
        assert p.in_flight == 0


async def test_loaded_replica_first_then_fewest_in_flight():
    slow = Streaming("slow", loaded=("m:latest",))
    fast = ScriptedNode("fast", loaded=("m:latest",))
    cold = ScriptedNode("cold")
    async with proxy(cold, slow, fast) as p:
        p.gateway.context.in_flight[NodeId("fast")] = 1
        first = asyncio.create_task(p.client.post("/api/chat", data=orjson.dumps(CHAT)))
        slow.pieces.put_nowait(b'{"done":false}\n')
        response = await first
        assert response.headers["X-Osync-Node"] == "slow"
        p.gateway.context.in_flight[NodeId("fast")] = 0
        for _ in range(3):
            async with p.post("/api/chat", CHAT) as r:
                assert r.headers["X-Osync-Node"] == "fast"
        slow.pieces.put_nowait(None)
        assert await response.read() == b'{"done":false}\n'
        assert not cold.requests
        assert p.in_flight == 0


@pytest.mark.parametrize(
    "failure",
    [
        UpstreamUnavailable("refused"),
        CapacityError("full"),
        NotSupported("not here"),
        ModelUnusable("too large"),
        RuntimeError("crash"),
        "after head",
        (503, "server busy, please try again.  maximum pending requests exceeded"),
        (404, "model 'm' not found"),
        (500, "could not load"),
    ],
)
async def test_failure_before_the_first_byte_goes_to_another_replica(failure):
    bad, good = failing("bad", failure), ScriptedNode("good")
    async with proxy(bad, good) as p:
        async with p.post("/api/chat", CHAT) as r:
            assert r.status == 200
            assert (await r.json())["node"] == "good"
        assert len(bad.requests) == 1
        assert b"osync_retries_total 1.0" in p.gateway.context.metrics.text()
        assert p.in_flight == 0


async def test_at_most_three_attempts_each_on_another_node():
    nodes = [failing(f"n{i}", UpstreamUnavailable("refused")) for i in range(5)]
    async with proxy(*nodes) as p, p.post("/api/chat", CHAT) as r:
        assert r.status == 502
        error = (await r.json())["error"]
        assert "host-n" in error
        assert "refused" in error
        assert sorted(len(node.requests) for node in nodes) == [0, 0, 1, 1, 1]


async def test_last_failure_is_the_nodes_own_answer():
    nodes = failing("a", (500, "first")), failing("b", (500, "second"))
    async with proxy(*nodes) as p, p.post("/api/chat", CHAT) as r:
        assert r.status == 500
        assert (await r.json())["error"] in {"first", "second"}


async def test_client_errors_are_not_retried():
    bad, good = failing("bad", (400, "no")), ScriptedNode("good")
    async with proxy(bad, good) as p, p.post("/api/chat", CHAT) as r:
        assert (r.status, await r.json()) == (400, {"error": "no"})
        assert not good.requests


async def test_full_node_says_when_to_come_again():
    async with proxy(failing("a", CapacityError("full", 3))) as p, p.post("/api/chat", CHAT) as r:
        assert (r.status, r.headers["Retry-After"]) == (503, "3")


class Without(ScriptedNode):
    """Says, as Ollama does, that it does not have what it is asked for."""

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        name = orjson.loads(data)["model"]
        if head.target == "/api/embed":
            await reply(responder, 404, {"error": f'model "{name}" not found, try pulling it first'})
        elif head.target == "/v1/messages":
            error: object = {"type": "not_found_error", "message": f"model '{name}' not found"}
            await reply(responder, 404, {"type": "error", "error": error})
        elif head.target.startswith("/v1/"):
            error = {"message": f"model '{name}' not found", "type": "not_found_error", "param": None, "code": None}
            await reply(responder, 404, {"error": error})
        else:
            await reply(responder, 404, {"error": f"model '{name}' not found"})


async def test_model_that_no_node_has():
    nodes = [Without(name) for name in "abcd"]
    async with proxy(*nodes) as p:
        async with p.post("/api/chat", {"model": "x", "messages": []}) as r:
            assert (r.status, await r.json()) == (404, {"error": "model 'x' not found"})
        async with p.post("/api/embed", {"model": "x"}) as r:
            assert (await r.json())["error"] == 'model "x" not found, try pulling it first'
        async with p.post("/v1/chat/completions", {"model": "x"}) as r:
            assert r.status == 404
            assert (await r.json())["error"]["type"] == "not_found_error"
        async with p.post("/v1/messages", {"model": "x"}) as r:
            assert (await r.json())["error"]["type"] == "not_found_error"
        async with p.post("/api/generate", {"prompt": "x"}) as r:
            assert (r.status, await r.json()) == (404, {"error": "model '' not found"})
        async with p.post("/api/generate", {"model": "b@d"}) as r:
            assert (r.status, await r.json()) == (400, {"error": "invalid model name"})
        assert p.in_flight == 0
    # Three are asked each time, and none where the request names no model that could be there.
    assert [len(node.requests) for node in nodes] == [4, 4, 4, 0]


async def test_model_that_appeared_a_moment_ago():
    old, new = Without("a"), ScriptedNode("b")
    async with proxy(old, new) as p, p.post("/api/chat", {"model": "made-just-now", "messages": []}) as r:
        assert (r.status, (await r.json())["node"], r.headers["X-Osync-Node"]) == (200, "b", "b")
    assert (len(old.requests), len(new.requests)) == (1, 1)


async def test_no_node_says_how_to_add_one():
    async with proxy() as p, p.post("/api/chat", CHAT) as r:
        assert r.status == 503
        assert "--servers host:port" in (await r.json())["error"]
    async with proxy(ScriptedNode("a", ok=False)) as p, p.post("/api/chat", CHAT) as r:
        assert r.status == 503
        assert "refused" in (await r.json())["error"]


async def test_pin_and_drain():
    a, b = ScriptedNode("a"), ScriptedNode("b")
    async with proxy(a, b) as p:
        for _ in range(4):
            async with p.post("/api/chat", CHAT, X_Osync_Node="host-b") as r:
                assert (await r.json())["node"] == "b"
        async with p.post("/api/chat", CHAT, X_Osync_Node="nobody") as r:
            assert r.status == 503
        async with p.client.post("/api/nodes/b/drain") as r:
            assert (await r.json())["scope"] == "proxy"
        for _ in range(4):
            async with p.post("/api/chat", CHAT) as r:
                assert (await r.json())["node"] == "a"
        async with p.client.post("/api/nodes/b/undrain") as r:
            assert not (await r.json())["draining"]
        async with p.client.post("/api/nodes/zz/drain") as r:
            assert r.status == 404


@pytest.mark.parametrize("when", ["before the first byte", "in mid-stream"])
async def test_client_that_leaves_cancels_the_work_at_once(when):
    node = Streaming("a")
    async with proxy(node, ScriptedNode("b", models=())) as p:
        async with aiohttp.ClientSession(p.url) as client:
            if when == "in mid-stream":
                node.pieces.put_nowait(b'{"done":false}\n')
                response = await client.post("/api/chat", data=orjson.dumps(CHAT))
                await response.content.readany()
                response.close()
            else:
                task = asyncio.create_task(client.post("/api/chat", data=orjson.dumps(CHAT)))
                while not node.requests:
                    await asyncio.sleep(0)
                task.cancel()
        async with asyncio.timeout(0.1):
            await node.cancelled.wait()
        assert p.in_flight == 0
        text = p.gateway.context.metrics.text()
        assert b"osync_client_gone_total 1.0" in text
        assert b"osync_errors_total{" not in text


@pytest.mark.parametrize(
    ("path", "headers", "piece", "tail"),
    [
        ("/api/chat", NDJSON, b'{"done":false}\n', b'{"error":"'),
        ("/api/chat", NDJSON, b'{"don', b'\n{"error":"'),
        ("/v1/chat/completions", SSE, b"data: {}\n\n", b'data: {"error":{"message":"'),
        ("/v1/chat/completions", SSE, b"data: {", b'\n\ndata: {"error":{"message":"'),
        ("/v1/messages", SSE, b"event: x\ndata: {}\n\n", b'event: error\ndata: {"type":"error"'),
    ],
)
async def test_stream_that_breaks_says_so(path, headers, piece, tail):
    node = Streaming("a")
    node.headers = headers
    async with proxy(node) as p:
        node.pieces.put_nowait(piece)
        response = await p.client.post(path, data=orjson.dumps(CHAT))
        assert await response.content.readany() == piece
        node.pieces.put_nowait(StreamBroken("backend died"))
        rest = await response.content.read()
        assert rest.startswith(tail)
        assert b"host-a" in rest
        assert b"backend died" in rest


@pytest.mark.parametrize("length", [(), (("Content-Length", "100"),)])
async def test_object_that_breaks_breaks_the_connection(length):
    node = Streaming("a")
    node.headers = (("Content-Type", "application/json"), *length)
    async with proxy(node) as p:
        node.pieces.put_nowait(b'{"respon')
        response = await p.client.post("/api/generate", data=b'{"model":"m","prompt":"x","stream":false}')
        assert await response.content.readany() == b'{"respon'
        node.pieces.put_nowait(StreamBroken("backend died"))
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_answer_shorter_than_announced_is_no_clean_end():
    node = Streaming("a")
    node.headers = (("Content-Type", "application/json"), ("Content-Length", "100"))
    async with proxy(node) as p:
        node.pieces.put_nowait(b"{}")
        node.pieces.put_nowait(None)
        response = await p.client.post("/api/generate", data=b'{"model":"m","prompt":"x"}')
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_unload_goes_to_every_node_that_has_it():
    a = ScriptedNode("a", loaded=("m:latest",))
    b = ScriptedNode("b", loaded=("m:latest",))
    c = ScriptedNode("c")
    async with proxy(a, b, c) as p:
        async with p.post("/api/generate", {"model": "m", "keep_alive": 0}) as r:
            assert r.status == 200
        assert (len(a.requests), len(b.requests), len(c.requests)) == (1, 1, 1)
        async with p.post("/api/generate", {"model": "m", "keep_alive": 0, "prompt": "x"}) as r:
            assert r.status == 200
        assert len(a.requests) + len(b.requests) == 3


async def test_cloud_models_go_to_the_designated_node():
    node = ScriptedNode("a")
    async with proxy(node) as p, p.post("/api/chat", {"model": "big:cloud", "messages": []}) as r:
        assert (await r.json())["node"] == "a"
        assert orjson.loads(node.requests[0][1])["model"] == "big:cloud"


async def test_extensions_do_not_reach_a_backend():
    node = ScriptedNode("a")
    async with proxy(node) as p:
        body = {**CHAT, "options": {"seed": 1, "session_id": "s", "distributed": False}}
        async with p.post("/api/chat", body) as r:
            assert r.status == 200
        assert orjson.loads(node.requests[0][1])["options"] == {"seed": 1}


class Engine(ScriptedNode):
    """Speaks only the native API."""

    async def answer(self, head, data, responder):
        assert head.target == "/api/chat"
        request = orjson.loads(data)
        done = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": "stop",
                "prompt_eval_count": 3, "eval_count": 1, "message": {"role": "assistant", "content": ""}}  # fmt: skip
        if not request["stream"]:
            await reply(responder, 200, {**done, "message": {"role": "assistant", "content": "hello"}})
            return
        await responder.start(ResponseHead(200, NDJSON))
        piece = {**done, "done": False, "message": {"role": "assistant", "content": "hello"}}
        await responder.write(orjson.dumps(piece) + b"\n")
        if self.ok_stream:
            await responder.write(orjson.dumps(done) + b"\n")
        else:
            raise StreamBroken("stage lost")

    ok_stream = True


async def test_openai_on_an_engine_node_is_translated():
    async with proxy(Engine("a", kind="engine")) as p:
        async with p.post("/v1/chat/completions", CHAT) as r:
            assert r.headers["X-Osync-Node"] == "a"
            assert (await r.json())["choices"][0]["message"]["content"] == "hello"
        async with p.post("/v1/chat/completions", {**CHAT, "stream": True}) as r:
            assert r.headers["Content-Type"].startswith("text/event-stream")
            text = await r.text()
            assert "hello" in text
            assert text.endswith("data: [DONE]\n\n")
        async with p.post("/v1/audio/transcriptions", b"x") as r:
            assert r.status == 400


async def test_translated_stream_that_breaks_says_so():
    node = Engine("a", kind="engine")
    node.ok_stream = False
    async with proxy(node) as p, p.post("/v1/chat/completions", {**CHAT, "stream": True}) as r:
        text = await r.text()
        assert "hello" in text
        assert "[DONE]" not in text
        assert '"error"' in text
        assert "stage lost" in text
