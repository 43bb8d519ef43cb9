"""Status, readiness and metrics."""

from __future__ import annotations

from datetime import UTC, datetime

from osync.types import ResponseHead
from tests.fakes.cluster import ScriptedNode, proxy, reply


class WithCloud(ScriptedNode):
    """An Ollama that says something of its cloud."""

    async def answer(self, head, data, responder):
        if head.target == "/api/status":
            await reply(responder, 200, {"cloud": {"disabled": False, "source": "env"}})
        else:
            await super().answer(head, data, responder)


async def test_status_tells_nodes_models_and_requests():
    a, b = WithCloud("a", models=("x:7b", "m:latest"), loaded=("m:latest",)), ScriptedNode("b")
    down = ScriptedNode("down", up=False)
    async with proxy(a, b, down) as p:
        p.view.peers[2].failures, p.view.peers[2].error = 4, "connection refused"
        p.view.peers[0].last_seen = 1_700_000_000.0
        async with p.post("/api/chat", {"model": "m"}) as r:
            assert r.status == 200
        async with p.client.get("/api/status") as r:
            status = await r.json()
    assert status["cloud"] == {"disabled": False, "source": "env"}
    osync = status["osync"]
    assert set(osync) >= {
        "version",
        "node_id",
        "proxies",
        "nodes",
        "shards",
        "models",
        "pipelines",
        "sessions",
        "requests",
    }
    first, _, last = osync["nodes"]
    assert (first["node_id"], first["host"], first["port"], first["online"]) == ("a", "a", 50051, True)
    assert first["loaded_models"][0]["name"] == "m:latest"
    assert first["last_heartbeat"].startswith("2023-11-14T")
    assert first["requests"]["total"] == 1
    assert set(first) >= {"load", "cpu", "memory", "gpus", "active_sessions", "health"}
    assert last["online"] is False
    assert last["health"]["consecutive_failures"] == 4
    assert last["health"]["error"] == "connection refused"
    models = {model["name"]: model for model in osync["models"]}
    assert [host["node_id"] for host in models["m:latest"]["hosts"]] == ["a", "b"]
    assert models["m:latest"]["loaded_on"] == ["a"]
    assert (models["x:7b"]["model"], models["x:7b"]["tag"], models["x:7b"]["family"]) == ("x", "7b", "llama")
    assert osync["requests"]["total"] == 1
    assert osync["requests"]["error_rate"] == 0


async def test_probes_are_no_traffic():
    node = ScriptedNode("a", ok=False)
    async with proxy(node) as p:
        for path, expected in (("/readyz", 503), ("/healthz", 200), ("/metrics", 200)):
            async with p.client.get(path) as r:
                assert r.status == expected
        async with p.client.get("/api/status") as r:
            osync = (await r.json())["osync"]
        assert (osync["requests"]["total"], osync["requests"]["errors"]) == (0, 0)
        assert b'osync_requests_total{route="/readyz",status="503"} 1.0' in p.gateway.context.metrics.text()


async def test_the_node_in_this_process_is_seen_now():
    async with proxy(ScriptedNode("a"), ScriptedNode("down", up=False)) as p:
        before = datetime.now(UTC)
        async with p.client.get("/api/status") as r:
            local, down = (await r.json())["osync"]["nodes"]
    assert datetime.fromisoformat(local["last_heartbeat"]) >= before
    assert local["health"]["age_s"] == 0
    assert (down["last_heartbeat"], down["health"]["age_s"]) == ("", None)


async def test_status_survives_a_node_that_does_not_tell_of_its_cloud():
    class Odd(ScriptedNode):
        async def answer(self, head, data, responder):
            await responder.start(ResponseHead(200, ()))
            await responder.write(b"[not json")

    async with proxy(Odd("a")) as p, p.client.get("/api/status") as r:
        assert (await r.json())["cloud"]["disabled"] is True


async def test_readiness_says_why_not():
    node = ScriptedNode("a")
    async with proxy(node) as p:
        async with p.client.get("/readyz") as r:
            assert r.status == 200
        node.ok = False
        async with p.client.get("/readyz") as r:
            assert r.status == 503
            assert "refused" in await r.text()
        node.up = False
        async with p.client.get("/readyz") as r:
            assert "a:50051 is down" in await r.text()
        async with p.client.get("/healthz") as r:
            assert r.status == 200
    async with proxy() as p, p.client.get("/readyz") as r:
        assert "--servers" in await r.text()


async def test_metrics():
    async with proxy(ScriptedNode("a"), ScriptedNode("b", up=False)) as p:
        async with p.post("/api/chat", {"model": "m"}) as r:
            assert r.status == 200
        for n in range(3):
            async with p.client.get(f"/made/up/{n}") as r:
                assert r.status == 200
        async with p.client.get("/metrics") as r:
            text = await r.text()
    assert 'osync_requests_total{route="/api/chat",status="200"} 1.0' in text
    assert 'osync_requests_total{route="other",status="200"} 3.0' in text
    assert 'osync_in_flight{node="a"} 0.0' in text
    assert 'osync_nodes{state="up"} 1.0' in text
    assert 'osync_nodes{state="down"} 1.0' in text
    assert 'osync_request_seconds_count{route="/api/chat"} 1.0' in text
    assert 'osync_first_byte_seconds_count{route="/api/chat"} 1.0' in text
