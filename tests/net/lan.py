"""Machines for tests and benchmarks: hosts with chosen round trips between them, and processes with a share of a core.

    with Lan(hosts=4, round_trip_ms=20) as lan:
        worker = lan.host(0).popen(["osyncd", "--host", lan.host(0).address], cpu=0.4)

A host is a network namespace without a name, joined to the others by a switch in user space (switch.c): it lives no
longer than its processes and the switch. Processes are found again by their control groups. The switch sees this
process end, however it ends, and kills them; what a killed switch leaves, the next Lan clears away. Needs root, cc.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
PREFIX = "osync-lan-"
MAX_HOSTS = 32
_PATIENCE_S = 10.0
_serials = itertools.count()


class Lan:
    """Up to 32 hosts, all joined. Delays, rates and cuts may change at any time; close() removes everything."""

    def __init__(self, hosts: int, round_trip_ms: float = 0.0, rate_mbps: float = 0.0, mtu: int = 9000) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"{hosts} hosts; 1 to {MAX_HOSTS} are possible")
        program = build()
        clear_stale()
        self.groups = Groups()
        command = [str(program), "run", str(hosts), str(mtu), str(self.groups.path)]
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[Any]] = []
        self._switch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert self._switch.stdout is not None
            word, *descriptors = self._switch.stdout.readline().split() or [""]
            if word != "up":
                raise RuntimeError("the switch did not start; it says why on stderr")
            namespaces = [f"/proc/{self._switch.pid}/fd/{descriptor}" for descriptor in descriptors]
            self.hosts = tuple(Host(self, program, index, path) for index, path in enumerate(namespaces))
            self.set_round_trip(round_trip_ms)
            self.set_rate(rate_mbps)
        except BaseException:
            self.close()
            raise

    def host(self, index: int) -> Host:
        """Return one host, by number from 0."""
        return self.hosts[index]

    @property
    def switch_pid(self) -> int:
        """The process id of the switch."""
        return self._switch.pid

    def set_round_trip(self, milliseconds: float, a: int | None = None, b: int | None = None) -> None:
        """Set the round trip between hosts `a` and `b`, without `b` between `a` and all, without both everywhere."""
        for one, other in itertools.permutations(range(len(self.hosts)), 2):
            if {a, b} - {None} <= {one, other}:
                self._ask(f"delay {one} {other} {milliseconds * 500}")

    def set_rate(self, mbps: float, host: int | None = None) -> None:
        """Limit what a host, or each host, sends; 0 is no limit. More than 200 ms of it in its buffer is dropped."""
        for index in range(len(self.hosts)) if host is None else (host,):
            self._ask(f"rate {index} {mbps}")

    def cut(self, a: int, b: int) -> None:
        """Lose everything between two hosts, in silence, what is on its way included."""
        self._ask(f"cut {a} {b} 1")
        self._ask(f"cut {b} {a} 1")

    def heal(self, a: int, b: int) -> None:
        """Undo a cut."""
        self._ask(f"cut {a} {b} 0")
        self._ask(f"cut {b} {a} 0")

    def isolate(self, host: int) -> None:
        """Cut a host off from all others."""
        for other in set(range(len(self.hosts))) - {host}:
            self.cut(host, other)

    def rejoin(self, host: int) -> None:
        """Undo every cut of a host."""
        for other in set(range(len(self.hosts))) - {host}:
            self.heal(host, other)

    def bytes_sent(self, a: int, b: int) -> int:
        """Return how many bytes of frames host `a` has sent to `b` so far, Ethernet headers included."""
        return int(self._ask(f"bytes {a} {b}"))

    def close(self) -> None:
        """Kill all processes, remove all hosts. May be called again."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(_PATIENCE_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue  # what was not yet written to a dead process
        self._processes.clear()
        for pipe in (self._switch.stdin, self._switch.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self._switch.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._switch.kill()
            self._switch.wait(_PATIENCE_S)
        _remove(self.groups.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, command: str) -> str:
        assert self._switch.stdin is not None
        assert self._switch.stdout is not None
        with self._lock:
            self._switch.stdin.write(command + "\n")
            self._switch.stdin.flush()
            answer = self._switch.stdout.readline().strip()
        if not answer or answer == "error":
            raise RuntimeError(f"the switch refused {command!r}" if answer else "the switch is dead")
        return answer

    def own(self, process: subprocess.Popen[Any]) -> None:
        """End this process with the network."""
        self._processes.append(process)


class Host:
    """One machine of a Lan."""

    def __init__(self, lan: Lan, program: Path, index: int, namespace: str) -> None:
        self.index = index
        self.address = f"10.99.0.{index + 1}"
        self._lan = lan
        self._program = program
        self._namespace = namespace

    def command(self, argv: Sequence[str], cpu: float | None = None) -> list[str]:
        """Return the command that runs `argv` here, with `cpu` cores at most; for asyncio's subprocesses."""
        group = self._lan.groups.add(cpu)
        return [str(self._program), "exec", self._namespace, str(group), "--", *argv]

    def popen(self, argv: Sequence[str], cpu: float | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a process here; its pid is that of `argv` itself. It ends with the Lan."""
        process = subprocess.Popen(self.command(argv, cpu), **options)
        self._lan.own(process)
        return process

    def round_trips_ms(self, other: Host, count: int = 10, timeout_s: float = 1.0) -> list[float]:
        """Ping another host `count` times; lost ones are left out."""
        argv = [sys.executable, str(HERE / "ping.py"), other.address, str(count), str(timeout_s)]
        done = subprocess.run(
            self.command(argv), check=True, capture_output=True, text=True, timeout=_PATIENCE_S + count * timeout_s
        )
        return [float(line) for line in done.stdout.split()]


class Groups:
    """The control groups of one Lan, one for each process and what it starts."""

    def __init__(self) -> None:
        self._mount, self._is_v2 = _hierarchy()
        self.path = self._mount / f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{next(_serials)}"
        self.path.mkdir()
        self._count = itertools.count()
        if self._is_v2:
            try:
                (self._mount / "cgroup.subtree_control").write_text("+cpu")
                (self.path / "cgroup.subtree_control").write_text("+cpu")
            except OSError:
                self.path.rmdir()
                raise

    def add(self, cpu: float | None) -> Path:
        """Make a group with `cpu` cores, None: all. Periods are short, so that a process stalls briefly, if often."""
        group = self.path / str(next(self._count))
        group.mkdir()
        if cpu is not None:
            # 1 ms is the least that the kernel takes for either.
            period = max(2500, round(1000 / cpu))
            quota = round(period * cpu)
            if self._is_v2:
                (group / "cpu.max").write_text(f"{quota} {period}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
        return group


def unavailable() -> str:
    """Return why there can be no Lan here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if shutil.which("cc") is None:
        return "needs cc"
    try:
        _hierarchy()
    except RuntimeError as error:
        return str(error)
    return ""


def build() -> Path:
    """Compile the switch, once for each version of it, and return where it is."""
    source = HERE / "switch.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = HERE / "__pycache__" / f"switch-{digest}"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(fresh), str(source)], check=True)
        fresh.replace(target)
    return target


def groups_of(pid: int | None = None) -> list[Path]:
    """Return the control groups of all Lans, or of those that process `pid` made."""
    return sorted(_hierarchy()[0].glob(f"{PREFIX}*" if pid is None else f"{PREFIX}{pid}-*"))


def clear_stale() -> None:
    """Kill and remove what Lans of dead processes left behind."""
    for group in groups_of():
        pid, started, _ = group.name.removeprefix(PREFIX).split("-")
        if _started(int(pid)) != started:
            _remove(group)


def _remove(group: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while group.exists():
        for directory in [*sorted(group.glob("*/")), group]:
            try:
                for pid in (directory / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                directory.rmdir()
            except (FileNotFoundError, ProcessLookupError):
                continue
            except OSError as error:  # busy until the killed ones are gone
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{directory} does not go") from error
        time.sleep(0.005)


def _hierarchy() -> tuple[Path, bool]:
    """Return where CPU quotas are set, and whether that is cgroup v2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(mount), False
        if kind == "cgroup2" and "cpu" in (Path(mount) / "cgroup.controllers").read_text().split():
            return Path(mount), True
    raise RuntimeError("needs the cpu controller of cgroups")


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot: with its id, a name that no other has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""
