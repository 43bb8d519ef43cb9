"""The command `osync` against a fake Ollama and a small fake of the proxy's status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from osync.cli import chat
from osync.cli.user import app
from osync.client.synchronous import OllamaClient
from tests.fakes.model import FakeModel
from tests.fakes.ollama import FakeOllama


@pytest.fixture
async def ollama(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(models=("a:latest",)) as fake:
        monkeypatch.setenv("OSYNC_URL", fake.url)
        yield fake


async def osync(*arguments: str, stdin: str | None = None) -> Result:
    return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(arguments), input=stdin))


async def test_models_as_columns_and_as_json(ollama):
    result = await osync("models")
    assert result.exit_code == 0, result.output
    heading, row = result.stdout.splitlines()
    assert heading.split() == ["NAME", "ID", "SIZE", "PARAMETERS", "QUANTIZATION", "HOSTS", "MODIFIED"]
    assert row.split()[0] == "a:latest"
    assert "91.7 MB" in row
    assert json.loads((await osync("models", "--json")).stdout)["models"][0]["name"] == "a:latest"


async def test_ps_show_cp_rm(ollama):
    await osync("run", "a", "hi")
    assert "a:latest" in (await osync("ps")).stdout
    assert "quantization" in (await osync("show", "a")).stdout
    assert json.loads((await osync("show", "a", "--json")).stdout)["details"]["family"] == "llama"
    assert (await osync("cp", "a", "b")).exit_code == 0
    assert "deleted 'a'" in (await osync("rm", "a")).stdout
    result = await osync("rm", "a", "b")
    assert result.exit_code == 1
    assert "not found" in result.stderr
    assert "deleted 'b'" in result.stdout


async def test_pull_prints_each_step_once(ollama):
    ollama.store.registry["new:latest"] = FakeModel("new:latest")
    result = await osync("pull", "new")
    assert result.exit_code == 0
    steps = result.stdout.splitlines()
    assert steps[0] == "pulling manifest"
    assert steps[-1] == "success"
    assert len(steps) == len(set(steps))
    lines = (await osync("pull", "new", "--json")).stdout.splitlines()
    assert json.loads(lines[-1])["status"] == "success"
    result = await osync("pull", "nope")
    assert result.exit_code == 1
    assert result.stderr == "Error: pull model manifest: file does not exist\n"


async def test_run_answers_what_is_given_or_piped(ollama):
    given = await osync("run", "a", "why", "not", "-o", "num_predict=3", stdin="")
    assert given.exit_code == 0
    assert given.stdout.strip()
    await osync("run", "a", "sum up:", stdin="a text")
    first, second = (json.loads(r.body) for r in ollama.received("/api/generate"))
    assert (first["prompt"], first["options"]) == ("why not", {"num_predict": 3})
    assert second["prompt"] == "sum up:\n\na text"
    nothing = await osync("run", "a", stdin="")
    assert nothing.exit_code == 1
    assert "no prompt" in nothing.stderr


async def test_errors_are_one_line_that_says_what_to_do(ollama):
    result = await osync("run", "nope", "hi")
    assert (result.exit_code, result.stderr) == (1, "Error: model 'nope' not found\n")
    await ollama.close()
    result = await osync("models")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "osyncd" in result.stderr


async def test_version_with_and_without_a_server(ollama):
    assert json.loads((await osync("version", "--json")).stdout)["api"] == ollama.version
    await ollama.close()
    result = await osync("version")
    assert result.exit_code == 0
    assert "no server" in result.stdout


async def test_status_needs_a_proxy(ollama):
    result = await osync("status")
    assert result.exit_code == 1
    assert "no osync proxy" in result.stderr


async def test_status_of_a_proxy():
    async def status(request: web.Request) -> web.Response:
        return web.json_response({"cloud": {}, "osync": {"version": "9", "node_id": "p", "nodes": []}})

    application = web.Application()
    application.router.add_get("/api/status", status)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = str(runner.addresses[0][1])
    try:
        assert "osync 9, proxy p" in (await osync("status", "--port", port)).stdout
        assert json.loads((await osync("status", "--port", port, "--json")).stdout)["version"] == "9"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("flags", [(), ("--async",)])
async def test_client_of_the_original(ollama, flags):
    result = await osync(
        "client", "--host", "127.0.0.1", "--port", str(ollama.port), "--model", "a", "--prompt", "hi", *flags
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    result = await osync("client", "--port", str(ollama.port), "--model", "x", "--prompt", "hi", *flags)
    assert (result.exit_code, result.stderr) == (1, "Error: model 'x' not found\n")


async def test_a_chat_keeps_its_history(ollama, monkeypatch, capsys):
    said: list[Any] = ["one", "/help", '"""two', 'lines"""', "", KeyboardInterrupt, "/clear", "three", EOFError]

    def answer(prompt: str = "") -> str:
        text = said.pop(0)
        if isinstance(text, type):
            raise text
        return str(text)

    monkeypatch.setattr("builtins.input", answer)
    with OllamaClient(base_urls=[ollama.url]) as client:
        await asyncio.to_thread(chat.converse, client, "a", {"seed": 1})
    bodies = [json.loads(request.body) for request in ollama.received("/api/chat")]
    contents = [[m["content"] for m in body["messages"]] for body in bodies]
    assert contents[0] == []
    assert contents[1] == ["one"]
    assert contents[2][0] == "one"
    assert contents[2][2] == "two\nlines"
    assert contents[3] == ["three"]
    assert "/bye" in capsys.readouterr().out


async def test_as_a_process_ctrl_c_ends_it(ollama):
    ollama.hold()
    process = await asyncio.create_subprocess_exec(
        # Who starts the tests in the background may have SIGINT ignored, and children inherit that.
        sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from osync.cli.user import main; main()", "run", "a", "hi",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OSYNC_URL": ollama.url},
    )  # fmt: skip
    await ollama.changes.until(lambda: ollama.running == 1, timeout_s=20)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130
    assert b"Traceback" not in out + err
    await ollama.changes.until(lambda: ollama.cancelled == 1)
