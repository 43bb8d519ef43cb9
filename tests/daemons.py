"""Real osyncd processes for tests: started on free ports, waited for, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Process:
    """A process of ours with its port and its output."""

    popen: subprocess.Popen[bytes]
    port: int
    log: Path
    grpc_port: int = 0
    name: str = ""

    @property
    def url(self) -> str:
        """Where it listens for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """End it without a word, as kill -9 does."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)


@dataclass(slots=True)
class Processes:
    """Starts processes; all that still run are killed at the end."""

    folder: Path
    running: list[Process] = field(default_factory=list)

    def start(self, command: list[str], port: int, name: str, env: dict[str, str] | None = None) -> Process:
        """Start a command with its output in a file."""
        log = self.folder / f"{name}-{len(self.running)}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**clean_env(), **(env or {})},
            )
        process = Process(popen, port, log, name=name)
        self.running.append(process)
        return process

    def osyncd(self, *flags: str, port: int = 0, grpc_port: int = 0, name: str = "osyncd") -> Process:
        """Start a daemon; ports of 0 are picked here, so that they are known."""
        port, grpc_port = port or free_port(), grpc_port or free_port()
        command = ["osync.cli.daemon", "--port", str(port), "--grpc-port", str(grpc_port), "--log-format", "json"]
        process = self.start([*command, "--state-dir", str(self.folder / "state"), *flags], port, name)
        process.grpc_port = grpc_port
        return process

    def fake(self, *flags: str, name: str = "fake") -> Process:
        """Start a fake Ollama in a process of its own."""
        port = free_port()
        process = self.start(["tests.fakes.ollama", "--port", str(port), *flags], port, name)
        wait_for(lambda: _answers(process, "/api/version"), process)
        return process

    def ready(self, process: Process) -> Process:
        """Wait until a proxy is ready for requests."""
        wait_for(lambda: _answers(process, "/readyz"), process)
        return process


def clean_env() -> dict[str, str]:
    """Return this environment without what would configure a daemon."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OSYNC_", "OLLAMA_", "OLOL_"))}


def wait_for(condition: Any, process: Process | None = None, seconds: float = 30) -> None:
    """Poll until the condition holds; fails early with the log where the process ended."""
    until = time.monotonic() + seconds
    while not condition():
        if process is not None and process.popen.poll() is not None:
            raise AssertionError(f"{process.name} ended with {process.popen.returncode}:\n{process.log.read_text()}")
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s\n" + (process.log.read_text() if process else ""))
        time.sleep(0.02)


def _answers(process: Process, path: str) -> bool:
    try:
        with urllib.request.urlopen(process.url + path, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Own processes for the length of a test."""
    owner = Processes(folder)
    try:
        yield owner
    finally:
        for process in owner.running:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in owner.running:
            try:
                process.popen.wait(5)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait(5)
