"""The queue of an engine is seen from outside: in its proxy's status and metrics, for places and for loads."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.daemons import Process, processes
from tests.fakes.tiny import tiny

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A proxy linked to an engine node that works on one request of one model at a time, and lets two wait."""
    folder = tmp_path_factory.mktemp("queue")
    models = folder / "models"
    models.mkdir()
    model = tiny()
    model.metadata["llama.context_length"] = ("u32", 1 << 16)
    (models / "one.gguf").write_bytes(model.data())
    (models / "two.gguf").write_bytes(model.data())
    with processes(folder) as owner:
        node = owner.osyncd(
            "--role", "node", "--backend", "engine", "--models-dir", str(models), "--context-window", "65536",
            "--parallel", "1", "--max-queue", "2", "--max-loaded-models", "1", name="node",
        )  # fmt: skip
        yield owner.ready(owner.osyncd("--role", "proxy", "--servers", f"127.0.0.1:{node.grpc_port}", name="proxy"))


def seen(daemon: Process) -> dict[str, Any]:
    """Return what the status says of the node's load, and of each loaded model."""
    (node,) = daemon.get("/api/status")["osync"]["nodes"]
    return {
        **{key: node["load"][key] for key in ("active", "queued", "slots")},
        "models": {m["name"]: (m["active"], m["queued"]) for m in node["loaded_models"]},
    }


async def until(daemon: Process, **wanted: Any) -> None:
    """Wait until the status says what is wanted."""
    end = time.monotonic() + 20
    while True:
        now = await asyncio.to_thread(seen, daemon)
        if all(now[key] == value for key, value in wanted.items()):
            return
        assert time.monotonic() < end, (now, wanted)
        await asyncio.sleep(0.02)


def endless(model: str) -> dict[str, Any]:
    options = {"temperature": 0, "num_predict": 60000}
    return {"model": model, "prompt": "hi", "raw": True, "stream": False, "options": options}


async def test_what_waits_is_shown_and_bounded_and_gone_when_it_leaves(daemon: Process):
    async with aiohttp.ClientSession(daemon.url) as http:

        async def ask(model: str) -> tuple[int, Any]:
            async with http.post("/api/generate", json=endless(model)) as answer:
                return answer.status, await answer.json()

        clients = [asyncio.create_task(ask("one"))]
        await until(daemon, active=1, queued=0, slots=1, models={"one:latest": (1, 0)})
        clients += [asyncio.create_task(ask("one")) for _ in range(2)]
        await until(daemon, active=1, queued=2, models={"one:latest": (1, 2)})
        status, body = await ask("one")
        assert status == 503
        assert body == {"error": "server busy, please try again.  maximum pending requests exceeded"}
        clients += [asyncio.create_task(ask("two")) for _ in range(3)]
        await until(daemon, active=1, queued=5, models={"one:latest": (1, 2)})
        with urllib.request.urlopen(f"{daemon.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        assert [line.rpartition(" ")[2] for line in lines if line.startswith("osync_node_active{")] == ["1.0"]
        assert [line.rpartition(" ")[2] for line in lines if line.startswith("osync_node_queued{")] == ["5.0"]
        assert (await ask("two"))[0] == 503
        assert not any(client.done() for client in clients)
        for client in clients[:3]:
            client.cancel()
        await until(daemon, active=1, queued=2, models={"two:latest": (1, 2)})
        for client in clients[3:]:
            client.cancel()
        await until(daemon, active=0, queued=0)
        await asyncio.gather(*clients, return_exceptions=True)
