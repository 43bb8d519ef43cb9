"""kill -9 of a node under load: nothing that had no byte yet fails."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import ollama

from tests.daemons import processes, wait_for


async def test_three_nodes_one_killed_before_first_byte_no_failed_request(tmp_path: Path):
    with processes(tmp_path) as owner:
        fakes = [
            owner.fake("--models", "m", "--first-token-ms", "150", "--tokens", "4", "--parallel", "64")
            for _ in range(3)
        ]
        nodes = [
            owner.osyncd("--role", "node", "--backend", "ollama", "--ollama-host", f.url, name=f"node{i}")
            for i, f in enumerate(fakes)
        ]
        servers = ",".join(f"127.0.0.1:{n.grpc_port}" for n in nodes)
        proxy = owner.ready(owner.osyncd("--role", "proxy", "--servers", servers, name="proxy"))
        wait_for(lambda: sum(n["online"] for n in proxy.get("/api/status")["osync"]["nodes"]) == 3, proxy)
        client = ollama.AsyncClient(host=proxy.url)
        answered: list[str] = []
        killed = asyncio.Event()

        async def ask() -> None:
            for _ in range(6):
                answer = await client.chat("m", [{"role": "user", "content": "hi"}])
                assert answer.done
                answered.append(answer.message.content or "")
                if len(answered) > 30:
                    killed.set()

        async def kill() -> None:
            await killed.wait()
            nodes[1].kill()

        async with client, asyncio.TaskGroup() as group:
            group.create_task(kill())
            for _ in range(20):
                group.create_task(ask())
        assert len(answered) == 120
        assert len(set(answered)) == 1
        status = proxy.get("/api/status")["osync"]["nodes"]
        assert sum(n["online"] for n in status) == 2


async def test_a_node_killed_in_mid_stream_is_never_a_clean_end(tmp_path: Path):
    with processes(tmp_path) as owner:
        fake = owner.fake("--models", "m", "--token-delay-ms", "20", "--tokens", "1000")
        node = owner.osyncd("--role", "node", "--backend", "ollama", "--ollama-host", fake.url, name="node")
        servers = f"127.0.0.1:{node.grpc_port}"
        proxy = owner.ready(owner.osyncd("--role", "proxy", "--servers", servers, name="proxy"))
        lines: list[dict[str, object]] = []
        async with aiohttp.ClientSession() as session:
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            async with session.post(f"{proxy.url}/api/chat", json=body) as answer:
                try:
                    async for line in answer.content:
                        lines.append(json.loads(line))
                        if len(lines) == 5:
                            node.kill()
                except aiohttp.ClientPayloadError:
                    pass
        assert not any(line.get("done") for line in lines)
        assert "error" in lines[-1]
