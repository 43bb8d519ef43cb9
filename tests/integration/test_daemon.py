"""osyncd as a process: starting, refusing to start, draining, ending."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.daemons import ROOT, clean_env, processes, wait_for


def osyncd(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "osync.cli.daemon", *flags]
    return subprocess.run(command, cwd=ROOT, env={**clean_env(), **env}, capture_output=True, text=True, timeout=30)


def test_print_config_shows_each_value_with_its_origin():
    done = osyncd("--print-config", "--port", "9000", OLLAMA_SERVERS="a:1,b:2")
    assert done.returncode == 0
    assert "port = 9000  (flag --port)" in done.stdout
    assert "servers = a:1,b:2  (environment OLLAMA_SERVERS)" in done.stdout
    assert "host = 127.0.0.1  (default)" in done.stdout


def test_a_wrong_setting_is_one_line_and_status_2():
    done = osyncd("--host", "0.0.0.0")
    assert done.returncode == 2
    assert done.stderr.startswith("osyncd: listening on 0.0.0.0 would open")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("which", ["port", "grpc_port"])
def test_a_taken_port_is_named(tmp_path: Path, which: str):
    with processes(tmp_path) as owner:
        fake = owner.fake()
        first = owner.osyncd("--backend", "ollama", "--ollama-host", fake.url)
        owner.ready(first)
        taken = getattr(first, which)
        second = owner.osyncd("--backend", "ollama", "--ollama-host", fake.url, **{which: taken})
        assert second.popen.wait(20) == 2
        text = second.log.read_text()
        assert str(taken) in text.splitlines()[-1]
        assert "Traceback" not in text


def test_sigterm_lets_a_running_answer_end(tmp_path: Path):
    with processes(tmp_path) as owner:
        fake = owner.fake("--models", "m", "--token-delay-ms", "20", "--tokens", "60")
        daemon = owner.ready(owner.osyncd("--backend", "ollama", "--ollama-host", fake.url))
        first, lines = threading.Event(), list[dict[str, object]]()

        def chat() -> None:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
            with urllib.request.urlopen(f"{daemon.url}/api/chat", body, timeout=30) as answer:
                for line in answer:
                    lines.append(json.loads(line))
                    first.set()

        reader = threading.Thread(target=chat)
        reader.start()
        assert first.wait(20)
        daemon.popen.send_signal(signal.SIGTERM)
        reader.join(20)
        assert lines[-1]["done"] is True
        assert daemon.popen.wait(20) == 0


def test_a_second_signal_ends_at_once(tmp_path: Path):
    with processes(tmp_path) as owner:
        fake = owner.fake("--models", "m", "--token-delay-ms", "1000", "--tokens", "600")
        daemon = owner.ready(owner.osyncd("--backend", "ollama", "--ollama-host", fake.url))
        body = json.dumps({"model": "m", "prompt": "hi"}).encode()
        with urllib.request.urlopen(f"{daemon.url}/api/generate", body, timeout=30) as answer:
            answer.readline()
            daemon.popen.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in daemon.log.read_text(), daemon)
            daemon.popen.send_signal(signal.SIGTERM)
            assert daemon.popen.wait(5) == 128 + signal.SIGTERM


def test_systemd_hears_when_it_is_ready(tmp_path: Path):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, processes(tmp_path) as owner:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(20)
        fake = owner.fake()
        flags = ["--role", "node", "--backend", "ollama", "--ollama-host", fake.url, "--grpc-port", "0"]
        owner.start(["osync.cli.daemon", *flags], 0, "node", env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert channel.recv(100) == b"READY=1"


def test_without_any_node_the_proxy_says_how_to_add_one(tmp_path: Path):
    with processes(tmp_path) as owner:
        proxy = owner.osyncd("--role", "proxy")
        wait_for(lambda: _up(proxy.url), proxy)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{proxy.url}/api/generate", b'{"model": "m"}', timeout=10)
        with caught.value as answer:
            assert answer.code == 503
            assert "--servers" in json.load(answer)["error"]


def _up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=2):
            return True
    except OSError:
        return False
