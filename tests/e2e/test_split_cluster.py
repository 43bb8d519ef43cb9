"""A proxy, an engine node and two shards in processes of their own: models over shards, as clients see them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import ROOT, Process, clean_env, processes, wait_for
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine

PROMPT = "What color is the sky over the sea?"


@dataclass(slots=True)
class Cluster:
    """The processes."""

    proxy: Process
    node: Process
    shards: list[Process]

    @property
    def servers(self) -> str:
        """What --servers says: all of them."""
        return ",".join(f"127.0.0.1:{p.grpc_port}" for p in (self.node, *self.shards))

    def ask(self, path: str = "/api/generate", **body: Any) -> tuple[dict[str, Any], str]:
        """POST, and return the answer and the node that it came from."""
        data = json.dumps({"model": MODEL, "prompt": PROMPT, "stream": False, **body}).encode()
        request = urllib.request.Request(self.proxy.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer), answer.headers["X-Osync-Node"]


@pytest.fixture(scope="module")
def cluster(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The proxy has no models of its own: headers and slices come from the node."""
    folder = tmp_path_factory.mktemp("split")
    with processes(folder) as owner:
        common = ("--deterministic", "--context-window", "1024", "--parallel", "2", "--threads", "1")
        nowhere = ("--models-dir", str(folder / "none"))
        node = owner.osyncd(
            "--role", "node", "--backend", "engine", "--models-dir", str(models_dir), *common, name="node"
        )
        shards = [
            owner.osyncd("--role", "shard", "--memory", "1GiB", "--state-dir", str(folder / f"shard{i}"), *nowhere,
                         "--threads", "1", name=f"shard{i}")
            for i in (1, 2)
        ]  # fmt: skip
        servers = ",".join(f"127.0.0.1:{p.grpc_port}" for p in (node, *shards))
        proxy = owner.osyncd(
            "--role",
            "proxy",
            "--servers",
            servers,
            "--state-dir",
            str(folder / "proxy"),
            *nowhere,
            *common,
            name="proxy",
        )

        owner.ready(proxy)

        def complete() -> bool:
            osync = proxy.get("/api/status")["osync"]
            models = {m["name"]: m["hosts"][0]["digest"] for m in osync["models"]}
            return len(osync["shards"]) == 2 and osync["distributed"]["ready"] and bool(models.get(MODEL))

        wait_for(complete, proxy, 60)
        yield Cluster(proxy, node, shards)


def test_the_split_model_says_what_the_whole_one_says(cluster: Cluster):
    options = {"num_predict": 24, "temperature": 0}
    whole, where = cluster.ask(options={**options, "distributed": False})
    assert not where.endswith("-pipelines")
    split, where = cluster.ask(options={**options, "distributed": True, "stages": 2})
    assert where.endswith("-pipelines")
    assert split["response"] == whole["response"]
    assert split["context"] == whole["context"]
    osync = cluster.proxy.get("/api/status")["osync"]
    (pipeline,) = osync["pipelines"]
    assert [(s["first"], s["last"]) for s in pipeline["stages"]][-1][1] == 30
    assert len(pipeline["stages"]) == 2
    assert all(s["state"] == "ready" for s in pipeline["stages"])
    assert all(shard["round_trip_s"] > 0 for shard in osync["shards"])
    rows = [row for row in cluster.proxy.get("/api/ps")["models"] if row["name"] == MODEL]
    assert len(rows) == 1


def test_a_chat_uses_the_template_of_the_node(cluster: Cluster):
    chat = {"messages": [{"role": "user", "content": PROMPT}], "prompt": None}
    options = {"num_predict": 8, "temperature": 0}
    whole, _ = cluster.ask("/api/chat", **chat, options={**options, "distributed": False})
    split, where = cluster.ask("/api/chat", **chat, options={**options, "distributed": True})
    assert where.endswith("-pipelines")
    assert split["message"] == whole["message"]
    assert split["prompt_eval_count"] == whole["prompt_eval_count"]


def osync(*arguments: str) -> str:
    command = [sys.executable, "-m", "osync", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands(cluster: Cluster, tmp_path: Path):
    told = osync("plan", MODEL, "--stages", "2", "--url", cluster.proxy.url)
    assert "2 stages" in told
    assert f"127.0.0.1:{cluster.shards[0].grpc_port}" in told
    assert "Shards" in osync("status", "--url", cluster.proxy.url) or "SHARD" in osync(
        "status", "--url", cluster.proxy.url
    )
    asked = ("--model", MODEL, "--prompt", PROMPT, "-o", "num_predict=8", "-o", "temperature=0")
    by_proxy = osync("dist", "--port", str(cluster.proxy.port), *asked)
    assert by_proxy.strip()
    alone = osync("dist", "--servers", cluster.servers, "--state-dir", str(tmp_path), "--stages", "2", *asked)
    assert alone.split()[:2] == by_proxy.split()[:2]
