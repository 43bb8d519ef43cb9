"""`osync plan` and `osync dist` against a running proxy, and `dist` with servers that are no shards."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner, Result

from osync.cli.user import app
from osync.config import Settings
from osync.daemon.run import Daemon
from tests.fakes.architectures import write_model
from tests.fakes.cluster import proxy
from tests.fakes.ollama import FakeOllama
from tests.fakes.split import Shard, split
from tests.links import FakeNode, serving


async def osync(*arguments: str) -> Result:
    return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(arguments)))


async def test_plan_prints_the_table_and_why(tmp_path):
    (tmp_path / "models").mkdir()
    write_model(tmp_path / "models" / "big.gguf", "llama", 4, vocabulary="gpt2")
    settings = Settings(models_dir=(tmp_path / "models",), state_dir=tmp_path / "state", parallel=1)
    async with proxy(Shard("s1"), Shard("s2"), settings=settings) as running:
        made = await split(running, settings)
        try:
            told = await osync("plan", "big", "--stages", "2", "--url", running.url)
            assert told.exit_code == 0, told.output
            lines = told.stdout.splitlines()
            assert lines[0].split()[:3] == ["STAGE", "SHARD", "LAYERS"]
            assert {line.split()[1] for line in lines[1:3]} == {"s1:50051", "s2:50051"}
            assert lines[3].split()[:3] == ["all", "2", "shards"]
            assert lines[-1].startswith("big:latest is served split: no node has it; 2 stages")
            told = await osync("plan", "big", "--json", "--url", running.url, "--context", "64")
            assert json.loads(told.stdout)["plan"]["objective"] == "latency"
            told = await osync("plan", "big", "--shards", "x,y", "--url", running.url)
            assert told.exit_code == 1
            assert told.stdout.startswith("big:latest cannot be split: needs ")
            told = await osync("plan", "none", "--url", running.url)
            assert (told.exit_code, told.stderr) == (1, "Error: model 'none' not found\n")
        finally:
            await made.node.close()


async def test_dist_asks_a_running_proxy_for_a_split():
    async with FakeOllama(models=("a:latest",)) as fake:
        port = fake.url.rpartition(":")[2]
        told = await osync(
            "dist", "--port", port, "--model", "a", "--prompt", "hi", "--stages", "2", "--shards", "x,y",
            "-o", "num_predict=3",
        )  # fmt: skip
        assert told.exit_code == 0, told.output
        assert told.stdout.strip()
        (received,) = fake.received("/api/generate")
        assert json.loads(received.body)["options"] == {
            "num_predict": 3, "distributed": True, "stages": 2, "shards": ["x", "y"],
        }  # fmt: skip


async def test_dist_says_which_servers_are_no_shards(tmp_path, monkeypatch):
    async def answer(head, body, responder):
        raise AssertionError

    monkeypatch.setattr("osync.cli.temporary.FOUND_S", 0.5)
    # The stream that the runner catches is closed after it; other tests would write to it.
    monkeypatch.setattr("osync.cli.temporary.logging.setup", lambda *_: None)
    async with serving(FakeNode(answer)) as (port, _):
        servers = f"127.0.0.1:{port},127.0.0.1:1"
        told = await osync("dist", "--servers", servers, "--model", "m", "--prompt", "x", "--state-dir", str(tmp_path))
    assert told.exit_code == 1
    assert f"127.0.0.1:{port} is no shard" in told.stderr
    assert "127.0.0.1:1 is down" in told.stderr


@pytest.mark.parametrize("distributed", [True, False])
async def test_a_proxy_without_shards_has_no_pipelines_and_costs_nothing(tmp_path, distributed):
    settings = Settings(role=("proxy",), port=0, grpc_port=0, state_dir=tmp_path, distributed=distributed)
    daemon = Daemon(settings)
    try:
        await daemon.start()
        assert (daemon.distribution is not None) is distributed
    finally:
        await daemon.close()
