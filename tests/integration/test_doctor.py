"""`osync doctor` on this host, with a fake Ollama and ports that are taken."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from osync.cli import doctor
from osync.cli.doctor import Finding, cache_findings, environment
from osync.cli.user import app
from osync.config import Settings
from osync.types import EngineReport
from tests.daemons import free_port
from tests.fakes.gguf import write
from tests.fakes.ollama import FakeOllama


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(lambda: CliRunner().invoke(app, ["doctor", *arguments]))


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a models directory, free ports, and no engine to be loaded."""
    for name in ("OLLAMA_HOST", "OLLAMA_MODELS", "OSYNC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    models = tmp_path / "models"
    models.mkdir()
    write(models / "tiny.Q4_0.gguf")
    monkeypatch.setenv("OSYNC_MODELS", str(models))
    monkeypatch.setenv("OSYNC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("OSYNC_PORT", str(free_port()))
    monkeypatch.setenv("OSYNC_GRPC_PORT", str(free_port()))
    monkeypatch.setenv("OSYNC_BACKEND", "ollama")
    return tmp_path


def by_what(result: Result) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}


async def test_a_host_that_is_well(monkeypatch):
    async with FakeOllama() as ollama:
        monkeypatch.setenv("OLLAMA_HOST", ollama.url)
        result = await run("--json")
        lines = (await run()).stdout.splitlines()
    assert result.exit_code == 0, result.output
    found = by_what(result)
    assert json.loads(result.stdout)["ok"] is True
    assert found["ollama"]["text"].startswith("Ollama 0.")
    assert found["models"]["text"].startswith("1 model in ")
    assert found["security"]["text"] == "loopback only: listens on 127.0.0.1"
    assert "is free" in found["ports"]["text"]
    assert len(lines) == len(json.loads(result.stdout)["findings"])
    assert all(line.split()[0] in {"ok", "warning", "problem"} for line in lines)


async def test_no_ollama_and_a_taken_port_are_problems_with_advice(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free_port()}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("OSYNC_GRPC_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
        result = await run("--json")
    assert result.exit_code == 1
    found = by_what(result)
    assert (found["ollama"]["level"], found["ports"]["level"]) == ("problem", "problem")
    assert "ollama serve" in found["ollama"]["advice"]
    assert found["ports"]["advice"] == "choose another with --grpc-port"


async def test_wrong_settings_are_a_finding(monkeypatch):
    monkeypatch.setenv("OSYNC_MEMORY", "lots")
    result = await run()
    assert result.exit_code == 1
    assert result.stdout.startswith("problem  settings  memory: 'lots' is no amount of memory")


async def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def check_moon(_: Settings):
        raise RuntimeError("new moon")
        yield Finding("ok", "moon", "full")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_security))
    result = await run()
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("problem  moon      cannot be looked at: RuntimeError('new moon')")
    assert second.startswith("ok       security")


def test_directories_that_are_missing_or_not_readable(tmp_path, monkeypatch):
    missing = Settings(models_dir=(tmp_path / "no",), state_dir=tmp_path)
    [finding] = doctor.check_models(missing)
    assert (finding.level, finding.advice) == ("warning", "put .gguf files there, or name another with --models-dir")
    monkeypatch.setattr("os.access", lambda *_: False)
    [finding] = doctor.check_models(Settings(models_dir=(tmp_path,)))
    assert (finding.level, finding.text) == ("problem", f"{tmp_path} cannot be read")
    [finding] = doctor.check_state(Settings(state_dir=tmp_path / "state"))
    assert (finding.level, finding.text) == ("problem", f"{tmp_path / 'state'} cannot be written")


def test_open_listeners_are_a_warning():
    [finding] = doctor.check_security(Settings(host="0.0.0.0", insecure=True))
    assert finding.level == "warning"
    assert "open to whoever reaches it" in finding.text


def test_a_cache_that_cannot_be_quantized_is_a_warning():
    report = EngineReport(kv_cache_keys="q8_0", kv_cache_values="f16")
    [finding] = cache_findings(Settings(kv_cache_type="q8_0", flash_attention="off"), report)
    assert (finding.level, finding.advice) == ("warning", "say OLLAMA_FLASH_ATTENTION=1")
    assert not list(cache_findings(Settings(), EngineReport(kv_cache_values="f16")))


@pytest.mark.parametrize(
    ("files", "where"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "container"),
        ({"run/.containerenv": ""}, "container"),
        ({"proc/1/cgroup": "0::/kubepods/besteffort/pod1"}, "container"),
        ({"proc/version": "Linux version 5.15.90.1-microsoft-standard-WSL2"}, "WSL"),
        ({"proc/1/cgroup": "0::/init.scope", "proc/version": "Linux version 6.1"}, ""),
    ],
)
def test_containers_and_wsl_are_recognized(tmp_path, files, where):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert environment(tmp_path) == where
