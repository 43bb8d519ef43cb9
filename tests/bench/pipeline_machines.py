"""The machines of the pipeline's benchmark: osync's shards, llama.cpp's RPC workers, and who drives them.

Host 0 drives (osync's coordinator, llama.cpp's client, the unsplit model), hosts 1 to 5 work, the last one stores the
model and lends next to nothing. Every process is a machine's only busy one at a time, with a share of a core.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from osync.coordinator.placement import RESERVE
from osync.engine.cutting import layer_costs
from osync.engine.gguf import read_header
from osync.engine.llama import KV_TYPES
from tests.bench import pipeline_rpc
from tests.bench.pipeline_driver import SHARD_CONTEXT
from tests.bench.pipeline_rpc import SEQUENCES
from tests.daemons import ROOT, clean_env
from tests.net.lan import Host, Lan

SHARE = 0.4
"""Cores of each machine."""
GRPC, RPC = 50051, 50052
VALUE_BYTES = KV_TYPES["f16"][1]
WORKERS = 5
"""Four that work, and one spare."""


class Machine:
    """One process on a host, with its log."""

    def __init__(self, lan: Lan, host: Host, argv: list[str], log: Path, share: float, *, talks: bool = False) -> None:
        self.lan = lan
        self.log = log
        pipe = subprocess.PIPE if talks else subprocess.DEVNULL
        with log.open("ab") as errors:
            # Started without a limit: importing is not what is measured.
            self.popen = host.popen(
                [sys.executable, "-m", *argv], stdin=pipe, stdout=pipe if talks else errors, stderr=errors,
                cwd=ROOT, env=clean_env() | {"OMP_NUM_THREADS": "1"}, text=True,
            )  # fmt: skip
        self.limit(share)

    def limit(self, share: float) -> None:
        """Give the process so many cores from now on; 0: all."""
        for line in Path(f"/proc/{self.popen.pid}/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if "cpu" in controllers.split(",") or (number == "0" and not controllers):
                group = self.lan.groups.path / Path(name).name
                if (group / "cpu.cfs_quota_us").exists():
                    (group / "cpu.cfs_period_us").write_text("2500")
                    (group / "cpu.cfs_quota_us").write_text(str(round(2500 * share) if share else -1))
                    return
                if (group / "cpu.max").exists():
                    (group / "cpu.max").write_text(f"{round(2500 * share) if share else 'max'} 2500")
                    return
        raise RuntimeError("the process has no control group")

    def cpu_s(self) -> float:
        """Return the CPU time that the process took so far."""
        return sum(
            int((thread / "schedstat").read_text().split()[0]) / 1e9
            for thread in Path(f"/proc/{self.popen.pid}/task").iterdir()
        )

    def kill(self) -> None:
        """End it without a word, as kill -9 does."""
        self.popen.kill()
        self.popen.wait(10)


class Talker(Machine):
    """A process that takes commands."""

    def send(self, command: str, **arguments: Any) -> None:
        """Give a command; `answer` has its answer."""
        assert self.popen.stdin
        print(json.dumps({"do": command, **arguments}), file=self.popen.stdin, flush=True)

    def answer(self) -> Any:
        """Wait for the next line."""
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.name}: ended\n{self.log.read_text()[-9000:]}")
        return json.loads(line)

    def do(self, command: str, **arguments: Any) -> Any:
        """Run a command; blocks."""
        self.send(command, **arguments)
        return self.answer()


class Machines:
    """All of them; `Lan` ends them."""

    def __init__(self, lan: Lan, folder: Path, model: Path, share: float = SHARE) -> None:
        self.lan, self.folder, self.model, self.share = lan, folder, model, share
        self.header = read_header(model)
        self.rpc: dict[int, Machine] = {}
        self._talkers: list[Talker] = []
        self.workers = list(range(1, WORKERS + 1))
        self.storage = WORKERS + 1
        (folder / "models").mkdir()
        (folder / "empty").mkdir()
        (folder / "models" / model.name).symlink_to(model)
        self.shards = {host: self.shard(host) for host in [*self.workers, self.storage]}
        self.driver = self._talker("tests.bench.pipeline_driver", *map(self.address, self.shards))
        self.driver.do("up", addresses=[self.address(host) for host in self.shards])
        for machine in self.shards.values():
            machine.limit(share)

    def address(self, host: int) -> str:
        """Return where the host's shard listens."""
        return f"{self.lan.host(host).address}:{GRPC}"

    def memory(self, stages: int) -> int:
        """Return what a shard must lend so that equal stages, so many, are all that fits."""
        costs, layers = layer_costs(self.header), self.header.block_count
        cuts = [layers * number // stages for number in range(stages + 1)]
        tokens = SHARD_CONTEXT * SEQUENCES
        need = max(costs.stage_bytes(first, last, tokens, VALUE_BYTES) for first, last in pairwise(cuts))
        return need + (RESERVE if need > 4 * RESERVE else 0)

    def shard(self, host: int, stages: int = 4) -> Machine:
        """Start the host's shard; it keeps its state over restarts."""
        has_model = host == self.storage
        lends = 1 << 20 if has_model else self.memory(stages)
        flags = {
            "role": "shard", "threads": 1, "device": "cpu", "log-format": "json", "drain-timeout": 0,
            "host": self.lan.host(host).address, "grpc-port": GRPC, "memory": lends,
            "state-dir": self.folder / f"state-{host}",
            "models-dir": self.folder / ("models" if has_model else "empty"),
        }  # fmt: skip
        argv = ["osync.cli.daemon", "--insecure", *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]
        log = self.folder / f"shard-{host}.log"
        before = _lends(log)
        machine = Machine(self.lan, self.lan.host(host), argv, log, 0)
        until = time.monotonic() + 30
        while _lends(log) == before:  # one after the other: several at once would measure each other's speed
            if machine.popen.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the shard of host {host} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        return machine

    def restart(self, hosts: list[int], stages: int = 4) -> float:
        """Start shards again that were killed; return the seconds until they are linked and know their speed."""
        began = time.monotonic()
        for host in hosts:
            if self.shards[host].popen.poll() is None:
                self.shards[host].kill()
        # The driver has to see that they are gone, else the old state would pass for the new one.
        self.driver.do("down", addresses=[self.address(host) for host in hosts])
        for host in hosts:
            self.shards[host] = self.shard(host, stages)
        self.driver.do("up", addresses=[self.address(host) for host in hosts])
        for host in hosts:
            self.shards[host].limit(self.share)
        return time.monotonic() - began

    def client(self, split: list[int], ubatch: int) -> Talker:
        """Start llama.cpp's client over as many fresh RPC workers as the split has parts; none: it has all layers."""
        for host in self.workers[: len(split)]:
            if old := self.rpc.pop(host, None):
                old.kill()
            argv = ["tests.bench.pipeline_rpc", "serve", f"{self.lan.host(host).address}:{RPC}", "1"]
            self.rpc[host] = Machine(self.lan, self.lan.host(host), argv, self.folder / f"rpc-{host}.log", 0)
        ends = [f"{self.lan.host(host).address}:{RPC}" for host in self.workers[: len(split)]]
        for end in ends:
            self._listens(end)
        client = self._talker("tests.bench.pipeline_rpc", "client", str(self.model), ",".join(ends),
                              ",".join(map(str, split)), str(ubatch))  # fmt: skip
        client.answer()
        client.limit(self.share)
        for machine in self.rpc.values():
            machine.limit(self.share)
        return client

    def limit(self, share: float) -> None:
        """Give every machine so many cores; 0: a whole one."""
        self.share = share
        for machine in [*self.shards.values(), *self.rpc.values(), *self._talkers]:
            if machine.popen.poll() is None:
                machine.limit(share)

    def _talker(self, *argv: str) -> Talker:
        log = self.folder / f"talker-{len(self._talkers)}.log"
        talker = Talker(self.lan, self.lan.host(0), list(argv), log, 0, talks=True)
        self._talkers.append(talker)
        return talker

    def _listens(self, endpoint: str) -> None:
        """Wait for an RPC worker without connecting to it: it serves its first client only."""
        port = f":{int(endpoint.rpartition(':')[2]):04X} "
        machine = self.rpc[next(h for h in self.rpc if self.lan.host(h).address == endpoint.rpartition(":")[0])]
        until = time.monotonic() + 30
        sockets = Path(f"/proc/{machine.popen.pid}/net/tcp")
        while True:
            with contextlib.suppress(OSError):  # it has ended: the next line says why
                if port in sockets.read_text():
                    return
            if machine.popen.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no RPC worker at {endpoint}: {machine.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def wire(self, hosts: list[int]) -> int:
        """Return the bytes that host 0 and these hosts have sent each other so far, headers and all."""
        return sum(self.lan.bytes_sent(0, host) + self.lan.bytes_sent(host, 0) for host in hosts)


def _lends(log: Path) -> int:
    return log.read_text().count('"shard_lends"') if log.exists() else 0


def ready() -> str:
    """Compile what is missing; return where llama.cpp's RPC backend is."""
    return str(pipeline_rpc.build())
