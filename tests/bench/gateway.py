"""What osync's gateway adds, beside a plain aiohttp relay, nginx and no proxy at all: make bench-gateway.

Every process is one of its own, all on loopback and on the same cores; targets take turns, and each
figure is the median over rounds. On a noisy machine only the ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from tests.bench.load import hold, run

ROOT = Path(__file__).resolve().parents[2]
NGINX = """worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {dir}; proxy_temp_path {dir};
  fastcgi_temp_path {dir}; uwsgi_temp_path {dir}; scgi_temp_path {dir};
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000; }}
  server {{ listen 127.0.0.1:{port} backlog=2048; location / {{
    proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }} }}
"""


@dataclass(slots=True)
class Target:
    """One way to the upstream: where it listens, and the processes that it costs."""

    name: str
    port: int
    processes: list[subprocess.Popen[bytes]]

    def rss(self) -> int:
        """Return the memory of its processes in bytes."""
        return sum(psutil.Process(p.pid).memory_info().rss for p in self.processes)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def targets() -> Iterator[list[Target]]:
    """Start upstream, relay, nginx where it is installed, and osync in two processes and in one."""
    ports = {name: free_port() for name in ("up", "relay", "nginx", "node", "proxy", "one", "one_grpc", "proxy_grpc")}
    url = f"http://127.0.0.1:{ports['up']}"
    python = [sys.executable, "-m"]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def start(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            return process

        def osyncd(role: str, grpc_port: int, *more: str) -> subprocess.Popen[bytes]:
            place = ("--role", role, "--grpc-port", str(grpc_port), "--state-dir", folder)
            quiet = ("--log-level", "WARNING", "--drain-timeout", "0")
            backend = ("--backend", "ollama", "--ollama-host", url)
            return start(*python, "osync.cli.daemon", *place, *backend, *quiet, *more)

        start(*python, "tests.bench.upstream", str(ports["up"]))
        relay = start(*python, "tests.bench.relay", str(ports["relay"]), url)
        node = osyncd("node", ports["node"])
        peer = ("--servers", f"127.0.0.1:{ports['node']}")
        proxy = osyncd("proxy", ports["proxy_grpc"], "--port", str(ports["proxy"]), *peer)
        one = osyncd("proxy,node", ports["one_grpc"], "--port", str(ports["one"]))
        made = [Target("direct", ports["up"], []), Target("relay", ports["relay"], [relay])]
        if nginx := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"):
            config = Path(folder) / "nginx.conf"
            config.write_text(NGINX.format(dir=folder, upstream=ports["up"], port=ports["nginx"]))
            made.append(Target("nginx", ports["nginx"], [start(nginx, "-c", str(config), "-e", f"{folder}/early.log")]))
        made += [Target("osync 2p", ports["proxy"], [proxy, node]), Target("osync 1p", ports["one"], [one])]
        for target in made:
            wait_ready(target)
        yield made


def wait_ready(target: Target) -> None:
    """Wait until it answers for the model."""
    path = "readyz" if target.name.startswith("osync") else "api/version"
    until = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{target.port}/{path}", timeout=2):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile of values, 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


async def requests_at(all_targets: list[Target], clients: int, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Measure non-streaming chats: requests/s, p50 and p99 in ms, failures."""
    rows: dict[str, list[list[float]]] = {t.name: [] for t in all_targets}
    for _ in range(rounds):
        for target in all_targets:
            await run(target.port, {"stream": False}, clients, 0.2)
            r = await run(target.port, {"stream": False}, clients, seconds)
            p50, p99 = quantile(r.latencies, 0.5) * 1e3, quantile(r.latencies, 0.99) * 1e3
            rows[target.name].append([len(r.latencies) / r.seconds, p50, p99, float(r.failed)])
    return {name: [statistics.median(column) for column in zip(*row, strict=True)] for name, row in rows.items()}


async def streams_at(
    all_targets: list[Target], streams: int, delay_ms: float, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Measure streamed chats: chunks/s, token gap p50 and p99 in ms, failures."""
    rows: dict[str, list[list[float]]] = {t.name: [] for t in all_targets}
    tokens = max(8, int(seconds * 1e3 / max(delay_ms, 0.5)))
    body = {"stream": True, "options": {"num_predict": tokens, "delay_ms": delay_ms}}
    for _ in range(rounds):
        for target in all_targets:
            r = await run(target.port, body, streams, seconds * 4, 1)
            p50, p99 = quantile(r.gaps, 0.5) * 1e3, quantile(r.gaps, 0.99) * 1e3
            rows[target.name].append([r.chunks / r.seconds, p50, p99, float(r.failed)])
    return {name: [statistics.median(column) for column in zip(*row, strict=True)] for name, row in rows.items()}


async def memory_at(all_targets: list[Target], streams: int) -> dict[str, list[float]]:
    """Measure KiB that one idle stream costs, over all processes of a target."""
    rows = {}
    body = {"stream": True, "options": {"num_predict": 10, "delay_ms": 60_000}}
    for target in all_targets:
        if not target.processes:
            continue
        few = await hold(target.port, body, 10)  # what the first streams set up is not theirs alone
        before = target.rss()
        held = await hold(target.port, body, streams)
        rows[target.name] = [(target.rss() - before) / streams / 1024]
        for transport in few + held:
            transport.abort()
        await asyncio.sleep(0.5)
    return rows


def table(title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    """Print one table, with the ratio of the first column to the relay's."""
    print(f"\n{title}\n  {'':10}" + "".join(f"{c:>16}" for c in columns) + f"{'of relay':>12}")
    base = rows.get("relay", [0.0])[0]
    for name, values in rows.items():
        ratio = f"{values[0] / base:11.2f}x" if base else ""
        print(f"  {name:10}" + "".join(f"{v:16.2f}" for v in values) + ratio, flush=True)


def verdict(name: str, value: float, bound: float, at_most: bool) -> bool:
    """Print one expectation beside what was measured."""
    good = value <= bound if at_most else value >= bound
    print(f"  {'ok  ' if good else 'MISS'} {name}: {value:.2f} ({'at most' if at_most else 'at least'} {bound:.2f})")
    return good


async def main(seconds: float, rounds: int) -> int:
    """Run everything; returns 1 if an expectation was missed."""
    with targets() as all_targets:
        memory = await memory_at(all_targets, 200)  # first: later, freed memory would serve again unseen
        table("memory of an idle stream", ["KiB"], memory)
        c1 = await requests_at(all_targets, 1, seconds, rounds)
        table("one request at a time, not streamed", ["requests/s", "p50 ms", "p99 ms", "failed"], c1)
        direct = c1["direct"]
        added = {n: [v[1] - direct[1], v[2] - direct[2]] for n, v in c1.items() if n != "direct"}
        table("added latency", ["p50 ms", "p99 ms"], added)
        c16 = await requests_at(all_targets, 16, seconds, rounds)
        table("16 clients, not streamed", ["requests/s", "p50 ms", "p99 ms", "failed"], c16)
        columns = ["chunks/s", "gap p50 ms", "gap p99 ms", "failed"]
        for streams in (1, 32):
            table(
                f"{streams} streams x 50 tokens/s",
                columns,
                await streams_at(all_targets, streams, 20, seconds, rounds),
            )
        s200 = await streams_at(all_targets, 200, 20, seconds, rounds)
        table("200 streams x 50 tokens/s", columns, s200)
        faster = await streams_at(all_targets, 200, 10, seconds, rounds)
        table("200 streams x 100 tokens/s", columns, faster)
    print("\nexpected")
    relay, two = c16["relay"], "osync 2p"
    failed = sum(row[3] for rows in (c1, c16, s200) for name, row in rows.items() if "osync" in name)
    checks = [
        verdict("2 processes: added p50, of the relay's", added[two][0] / added["relay"][0], 2.0, True),
        verdict("1 process: added p50, of the relay's", added["osync 1p"][0] / added["relay"][0], 1.2, True),
        verdict("requests/s at 16 clients, of the relay's", c16[two][0] / relay[0], 1200 / 1800, False),
        verdict("chunks/s at 200 streams, of the relay's", s200[two][0] / s200["relay"][0], 0.99, False),
        verdict("p99 token gap at 200 streams, of the relay's", s200[two][2] / s200["relay"][2], 1.5, True),
        verdict("KiB per idle stream", memory[two][0], 100, True),
        verdict("failed requests", failed, 0, True),
    ]
    return 0 if all(checks) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per figure; the median counts")
    arguments = parser.parse_args()
    sys.exit(uvloop.run(main(arguments.seconds, arguments.rounds)))
