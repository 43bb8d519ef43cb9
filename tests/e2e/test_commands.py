"""osync's own clients and commands against engine nodes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from osync import AsyncOllamaClient, OllamaClient
from tests.daemons import ROOT, Process, clean_env
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine


def osync(engine: Process, *arguments: str) -> str:
    command = [sys.executable, "-m", "osync", *arguments, "--url", engine.url]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_both_clients_give_the_same_answer(engine: Process):
    question = [{"role": "user", "content": "What color is the sky?"}]
    async with AsyncOllamaClient(base_urls=[engine.url]) as client:
        parts = [part async for part in client.chat(MODEL, question, temperature=0, num_predict=12)]
    with OllamaClient("127.0.0.1", engine.port) as plain:
        whole = plain.chat(MODEL, question, stream=False, temperature=0, num_predict=12)
    assert "".join(p.message.content for p in parts) == whole.message.content
    assert parts[-1].done and parts[-1].eval_count == whole.eval_count
    assert whole.node


def test_models_names_the_hosts(engine: Process):
    assert socket.gethostname() in osync(engine, "models")
    row = next(r for r in json.loads(osync(engine, "models", "--json"))["models"] if r["name"] == MODEL)
    assert row["hosts"] == [socket.gethostname()]


def test_run_prints_the_answer(engine: Process):
    text = osync(engine, "run", MODEL, "What color is the sky?", "-o", "temperature=0", "-o", "num_predict=12")
    assert "blue" in text


def test_status_shows_the_node(engine: Process):
    assert "engine" in osync(engine, "status")
