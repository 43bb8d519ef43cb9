"""The original's commands start the daemon with its settings, and nothing heavy before that."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

import osync.cli.daemon
from osync.cli import legacy
from osync.cli.user import app
from osync.config import load


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    flags: list[dict[str, Any]] = []

    def run(given: dict[str, Any]) -> int:
        flags.append(given)
        return 7

    monkeypatch.setattr(osync.cli.daemon, "run", run)
    return flags


def test_server_is_a_node(started):
    result = CliRunner().invoke(app, ["server", "--port", "50099", "--ollama-host", "http://gpu:11434"])
    assert result.exit_code == 7
    settings = load(started[0], env={}).settings
    assert (settings.role, settings.grpc_port, settings.ollama_host) == (("node",), 50099, "http://gpu:11434")
    assert settings.host == "127.0.0.1"


def test_proxy_is_a_proxy(started):
    result = CliRunner().invoke(app, ["proxy", "--port", "8001", "--servers", "a:1,b:2", "--servers", "c:3"])
    assert result.exit_code == 7
    settings = load(started[0], env={}).settings
    assert (settings.role, settings.port, settings.servers) == (("proxy",), 8001, ("a:1", "b:2", "c:3"))


def test_what_is_not_given_is_left_to_the_environment(started):
    CliRunner().invoke(app, ["server"])
    CliRunner().invoke(app, ["proxy"])
    env = {"OLLAMA_HOST": "http://gpu:1", "OLLAMA_SERVERS": "a:1", "OSYNC_INSECURE": "1", "OSYNC_HOST": "10.0.0.1"}
    assert load(started[0], env=env).settings.ollama_host == "http://gpu:1"
    settings = load(started[1], env=env).settings
    assert (settings.servers, settings.host, settings.insecure) == (("a:1",), "10.0.0.1", True)


@pytest.mark.parametrize("name", ["server", "proxy", "client"])
def test_scripts_have_the_options_of_the_command(name, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", [f"osync-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(legacy, name)()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    expected = {
        "server": ("--host", "--port", "--ollama-host"),
        "proxy": ("--host", "--port", "--servers"),
        "client": ("--host", "--port", "--model", "--prompt", "--async"),
    }[name]
    assert all(option in shown for option in expected)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom osync.cli.user import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'grpc', 'aiohttp', 'osync.daemon', 'osync.cli.daemon', 'llama_cpp', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
