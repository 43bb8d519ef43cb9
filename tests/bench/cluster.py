"""The processes that the engine's benchmark compares: osync's proxy and node, the bare loop, another server."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from osync.telemetry.lag import BOUNDS_S, quantile
from tests.daemons import ROOT, Process, Processes, free_port, wait_for


@dataclass(slots=True)
class Window:
    """What a daemon counted during some measurements."""

    lag: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    lag_most_s: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    spent_ns: dict[str, int] = field(default_factory=dict)

    def add(self, seen: dict[str, Any]) -> None:
        """Add a report."""
        self.lag = [a + b for a, b in zip(self.lag, seen["lag"], strict=True)]
        self.lag_most_s = max(self.lag_most_s, seen["lag_most_s"])
        for mine, theirs in ((self.calls, seen["calls"]), (self.spent_ns, seen["spent_ns"])):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0) + value

    def lag_s(self, q: float) -> float:
        """Return the q-quantile of the event loop's lateness."""
        return min(quantile(self.lag, q), self.lag_most_s)


@dataclass(slots=True)
class Osync:
    """A proxy and a node, in one process or in two, with one model."""

    proxy: Process
    node: Process
    model: str

    @property
    def port(self) -> int:
        """The proxy's HTTP port."""
        return self.proxy.port

    @property
    def daemons(self) -> dict[str, Process]:
        """The processes by what they are."""
        if self.proxy is self.node:
            return {"daemon": self.node}
        return {"proxy": self.proxy, "node": self.node}

    def probe(self, process: Process) -> dict[str, Any]:
        """Return what a daemon counted since the last time."""
        file = process.log.with_suffix(".probe")
        file.unlink(missing_ok=True)
        process.popen.send_signal(signal.SIGUSR1)
        wait_for(file.exists, process)
        seen: dict[str, Any] = json.loads(file.read_text())
        return seen

    def cpu_ns(self) -> dict[str, int]:
        """Return the CPU time so far of the proxy, and of the node's event loop alone: the thread it started with."""
        node = self.node.popen.pid
        spent = {"node loop": _ran_ns(Path(f"/proc/{node}/task/{node}"))}
        if self.proxy is not self.node:
            spent["proxy"] = sum(map(_ran_ns, Path(f"/proc/{self.proxy.popen.pid}/task").iterdir()))
        return spent

    def memory(self, file: Path) -> tuple[int, int]:
        """Return the node's resident bytes, and how many of them are the model file's pages."""
        process = psutil.Process(self.node.popen.pid)
        mapped = sum(m.rss for m in process.memory_maps(grouped=True) if Path(m.path).name == file.name)
        return process.memory_info().rss, mapped


def _ran_ns(thread: Path) -> int:
    return int((thread / "schedstat").read_text().split()[0])


@contextlib.contextmanager
def osync(owner: Processes, folder: Path, threads: int, parallel: int, apart: bool) -> Iterator[Osync]:
    """Run proxy and node, `apart` in a process each, with every setting but these at its default."""

    def daemon(role: str, *flags: str) -> Process:
        port, grpc_port = free_port(), free_port()
        place = (
            *(f"--role={one}" for one in role.split("+")),
            "--port",
            str(port),
            "--grpc-port",
            str(grpc_port),
            "--state-dir",
            str(folder),
        )
        common = ("--log-format", "json", "--drain-timeout", "0")
        probe = folder / f"{role}-{len(owner.running)}.probe"
        process = owner.start(
            ["tests.bench.daemon", *place, *common, *flags], port, role, env={"BENCH_PROBE": str(probe)}
        )
        process.grpc_port = grpc_port
        assert process.log.with_suffix(".probe") == probe
        return process

    engine = ("--backend", "engine", "--models-dir", str(folder / "models"), "--keep-alive", "-1")
    node = daemon("node" if apart else "proxy+node", *engine, "--threads", str(threads), "--parallel", str(parallel))
    proxy = daemon("proxy", "--servers", f"127.0.0.1:{node.grpc_port}") if apart else node
    try:
        owner.ready(proxy)
        wait_for(lambda: proxy.get("/api/tags")["models"], proxy)
        yield Osync(proxy, node, proxy.get("/api/tags")["models"][0]["name"])
    finally:
        for process in {proxy.popen.pid: proxy, node.popen.pid: node}.values():
            process.popen.terminate()
            process.popen.wait(20)


class Bare:
    """The bare loop in its process."""

    def __init__(self, model: Path, threads: int, context_length: int, sequences: int, env: dict[str, str]) -> None:
        shape = ["--threads", threads, "--context-length", context_length, "--sequences", sequences]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare", str(model), *map(str, shape)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, command: str, **arguments: Any) -> Any:
        """Run one command, and return its answer; blocks."""
        assert self.popen.stdin and self.popen.stdout
        print(json.dumps({"do": command, **arguments}), file=self.popen.stdin, flush=True)
        return json.loads(self.popen.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self.popen.stdin and self.popen.stdout
        self.popen.stdin.close()
        self.popen.wait(20)
        self.popen.stdout.close()


def llama_cpp_server(owner: Processes, model: Path, threads: int, context_length: int, env: dict[str, str]) -> Process:
    """Start llama-cpp-python's own server, told what makes it faster than its defaults do."""
    port = free_port()
    shape = {
        "model": model, "port": port, "host": "127.0.0.1", "n_ctx": context_length, "n_batch": 512,
        "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads, "flash_attn": True,
        "logits_all": False, "interrupt_requests": False, "verbose": False,
    }  # fmt: skip
    flags = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    process = owner.start(["llama_cpp.server", *flags], port, "llama-cpp-server", env=env)
    began = time.monotonic()

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(process.get("/v1/models"))
        return False

    wait_for(answers, process, 60)
    print(f"llama-cpp-python's server is up after {time.monotonic() - began:.1f} s", flush=True)
    return process
