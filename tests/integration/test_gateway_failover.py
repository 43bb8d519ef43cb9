"""Inference through the listener and real backends, to Ollamas that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import orjson
import pytest

from osync.config import Settings
from osync.gateway.http import HttpServer
from tests.fakes.cluster import ScriptedNode, proxy
from tests.fakes.fault import Fault
from tests.fakes.ollama import FakeOllama, expected_text
from tests.integration.rig import Rig, rig

PROMPT = orjson.dumps({"model": "a", "prompt": "hi"})
CHAT = orjson.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True})


@asynccontextmanager
async def cluster(*fakes: FakeOllama) -> AsyncIterator[tuple[Rig, aiohttp.ClientSession]]:
    """A gateway over fakes, and a client of its listener."""
    settings = replace(Settings(), port=0)
    async with rig(*fakes) as running:
        server = HttpServer(running.gateway, settings)
        port = await server.start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                yield running, client
        finally:
            await server.stop(0.1)


def lines(body: bytes) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in body.splitlines()]


async def test_stream_is_the_nodes_own_bytes():
    async with cluster(FakeOllama(models=("a",), tokens=20)) as (running, client):
        async with client.post("/api/generate", data=PROMPT) as r:
            assert r.headers["Content-Type"] == "application/x-ndjson"
            assert r.headers["X-Osync-Node"] == "n0"
            answer = lines(await r.read())
        assert "".join(str(line["response"]) for line in answer) == expected_text(20)
        assert answer[-1]["done"] is True
        received = running.fakes[0].received("/api/generate")[0]
        assert received.body == PROMPT
        assert received.headers.get("Host", received.headers.get("host")) == running.fakes[0].url.removeprefix(
            "http://"
        )


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 500}, {"reset_after": 0}, {"refuse_load": True}], ids=str
)
async def test_faults_before_the_first_byte_are_nobodys_business(fault):
    async with cluster(FakeOllama(models=("a",)), FakeOllama(models=("a",)), FakeOllama(models=("a",))) as (
        running,
        client,
    ):
        for fake in running.fakes[:2]:
            fake.fault(**fault, times=0)
        for _ in range(12):
            async with client.post("/api/chat", data=CHAT) as r:
                assert r.status == 200
                assert lines(await r.read())[-1]["done"] is True
                assert r.headers["X-Osync-Node"] == "n2"


async def test_a_killed_ollama_fails_no_request():
    async with cluster(FakeOllama(models=("a",)), FakeOllama(models=("a",))) as (running, client):

        async def ask() -> int:
            async with client.post("/api/generate", data=PROMPT) as r:
                assert lines(await r.read())[-1].get("done") is True
                return r.status

        running.fakes[0].hold()
        asking = [asyncio.create_task(ask()) for _ in range(16)]
        await running.fakes[0].changes.until(lambda: running.fakes[0].received("/api/generate"))
        await running.fakes[0].close()
        assert set(await asyncio.gather(*asking)) == {200}
        assert sum(running.gateway.context.in_flight.values()) == 0


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("fault", ["reset_after", "eof_after"])
async def test_broken_stream_never_looks_whole(path, fault):
    async with cluster(FakeOllama(models=("a",), tokens=10), FakeOllama(models=("a",), tokens=10)) as (running, client):
        for fake in running.fakes:
            fake.fault(Fault.of({fault: 3}))
        body = orjson.dumps({**orjson.loads(CHAT), "max_tokens": 10})
        async with client.post(path, data=body) as r:
            assert r.status == 200
            text = (await r.read()).decode()
        assert text.rstrip().splitlines()[-1].removeprefix("data: ").startswith(('{"error":', '{"type":"error"'))
        assert "[DONE]" not in text
        assert "message_stop" not in text
        assert "node n" in text


async def test_client_that_leaves_frees_ollama_within_100_ms():
    async with cluster(FakeOllama(models=("a",))) as (running, client):
        fake = running.fakes[0]
        for first in (0, 1):
            fake.hold()
            before = fake.cancelled
            task = asyncio.create_task(client.post("/api/generate", data=PROMPT))
            await fake.changes.until(lambda: fake.running)
            if first:
                fake.release(1)
                (await task).close()
            else:
                task.cancel()
            await fake.changes.until(lambda: fake.cancelled > before, timeout_s=0.1)  # noqa: B023
        assert sum(running.gateway.context.in_flight.values()) == 0
        assert running.gateway.context.traffic.errors == 0


async def test_load_spreads_over_loaded_replicas():
    async with cluster(FakeOllama(models=("a",)), FakeOllama(models=("a",))) as (running, client):
        for index in (0, 1):
            async with client.post("/api/generate", data=PROMPT, headers={"X-Osync-Node": f"n{index}"}) as r:
                assert r.status == 200
                await r.read()
        await running.settled(lambda: all(state.backend.loaded for state, _ in running.view.up()))
        for fake in running.fakes:
            fake.hold()
        tasks = [asyncio.create_task(client.post("/api/generate", data=PROMPT)) for _ in range(8)]
        a, b = running.fakes
        await a.changes.until(lambda: len(a.received("/api/generate")) == 5)
        await b.changes.until(lambda: len(b.received("/api/generate")) == 5)
        for fake in running.fakes:
            fake.release()
        for task in tasks:
            async with await task as r:
                await r.read()


async def test_unload_empties_every_node():
    async with cluster(FakeOllama(models=("a",)), FakeOllama(models=("a",))) as (running, client):
        for index in (0, 1):
            async with client.post("/api/generate", data=PROMPT, headers={"X-Osync-Node": f"n{index}"}) as r:
                await r.read()
        await running.settled(lambda: all(state.backend.loaded for state, _ in running.view.up()))
        async with client.post("/api/chat", data=b'{"model":"A:latest","messages":[],"keep_alive":0}') as r:
            assert (await r.json())["done_reason"] == "unload"
        await running.settled(lambda: not any(state.backend.loaded for state, _ in running.view.up()))


async def test_a_model_whose_only_node_is_down_is_503_and_names_it():
    gone = ScriptedNode("a", models=("m:latest",))
    async with proxy(gone, ScriptedNode("b", models=("other:latest",), kind="engine")) as p:
        p.view.peers[0].last = gone.state()
        gone.up = False
        for path in ("/api/chat", "/api/show"):
            async with p.post(path, {"model": "m"}) as r:
                assert r.status == 503, path
                assert "a:50051 is down" in (await r.json())["error"]
