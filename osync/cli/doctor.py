"""`osync doctor`: looks at this host as a daemon with these settings would find it; one line per finding."""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import structlog
import typer

from osync import config
from osync.cli.tables import print_json
from osync.config import Settings
from osync.errors import ConfigError, OsyncError
from osync.types import EngineReport

Level = Literal["ok", "warning", "problem"]

_TIMEOUT_S: Final = 2.0
_LIMIT: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    text: str
    advice: str = ""
    """What to do; empty where there is nothing to do."""


Check = Callable[[Settings], Iterator[Finding]]


def check_security(settings: Settings) -> Iterator[Finding]:
    """Look at who can reach the listeners."""
    if settings.is_loopback:
        yield Finding("ok", "security", f"loopback only: listens on {settings.host}")
    else:
        yield Finding(
            "warning",
            "security",
            f"insecure: listens on {settings.host}, plaintext and open to whoever reaches it",
            "use it on a trusted network only, or listen on 127.0.0.1",
        )


def check_host(_: Settings) -> Iterator[Finding]:
    """Look at what kind of machine it is."""
    where = environment()
    text = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if where == "container":
        advice = "publish the ports, and let it listen beyond the container's own loopback"
        yield Finding("ok", "host", f"{text}, in a container", advice)
    elif where == "WSL":
        advice = "others reach it through Windows only: forward the ports, or use WSL's mirrored networking"
        yield Finding("warning", "host", f"{text}, in WSL", advice)
    else:
        yield Finding("ok", "host", text)


def environment(root: Path = Path("/")) -> str:
    """Return `container`, `WSL`, or "" for a host of its own."""
    if any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv", "run/systemd/container")):
        return "container"
    if any(word in _text(root / "proc/1/cgroup") for word in ("docker", "kubepods", "containerd", "lxc")):
        return "container"
    return "WSL" if "microsoft" in _text(root / "proc/version").lower() else ""


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(64 << 10).decode("utf-8", "replace")
    except OSError:
        return ""


def check_ollama(settings: Settings) -> Iterator[Finding]:
    """Look for the node's Ollama."""
    if "node" not in settings.role or settings.backend == "engine":
        return
    answer = ask(settings.ollama_host, "/api/version")
    version = answer.get("version") if answer else None
    if isinstance(version, str):
        yield Finding("ok", "ollama", f"Ollama {version} answers at {settings.ollama_host}")
    elif settings.backend == "ollama":
        advice = "start it (ollama serve), or name it with OLLAMA_HOST, or use the engine: OSYNC_BACKEND=engine"
        yield Finding("problem", "ollama", f"no Ollama answers at {settings.ollama_host}", advice)
    elif has_engine():
        yield Finding("ok", "ollama", f"no Ollama answers at {settings.ollama_host}: the engine serves instead")
    else:
        advice = "start it (ollama serve), or install the engine: pip install 'osync[engine]'"
        yield Finding("problem", "ollama", f"no Ollama answers at {settings.ollama_host}, and no engine", advice)


def has_engine() -> bool:
    """Return True if llama.cpp is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_engine(settings: Settings) -> Iterator[Finding]:
    """Look at llama.cpp: its build, its devices, and whether the settings fit."""
    if "node" not in settings.role or settings.backend == "ollama":
        return
    if not has_engine():
        level: Level = "problem" if settings.backend == "engine" else "ok"
        yield Finding(level, "engine", "llama.cpp is not installed", "to have it: pip install 'osync[engine]'")
        return
    from osync.backend.engine.runner import accelerators, probe_library
    from osync.engine.devices import require

    try:
        require(accelerators(settings))
        report = probe_library(settings).report
    except OsyncError as error:
        yield Finding("problem", "engine", str(error))
        return
    assert report is not None
    yield Finding("ok", "engine", describe(report))
    for device in report.devices:
        free = f"{device.memory_free / (1 << 30):.1f} of {device.memory_total / (1 << 30):.1f} GiB free"
        use = "" if device.used else ", not used"
        yield Finding("ok", "device", f"{device.name} ({device.description}, {device.backend}), {free}{use}")
    yield from cache_findings(settings, report)


def describe(report: EngineReport) -> str:
    """Return one line on a build of llama.cpp."""
    able = [name for name in ("gpu_offload", "mmap", "mlock", "rpc") if getattr(report, name)]
    instructions = [
        part.split("=")[0].strip(" :") for part in report.system_info.split("|") if part.strip()[-1:] == "1"
    ]
    names = " ".join(name.rpartition(":")[2].strip() for name in instructions)
    return f"{report.version} ({report.commit}), can {', '.join(able)}; {names}; {report.threads} threads"


def cache_findings(settings: Settings, report: EngineReport) -> Iterator[Finding]:
    """Say where the KV cache is not what the settings ask for."""
    if report.kv_cache_values != settings.kv_cache_type:
        yield Finding(
            "warning",
            "kv cache",
            f"{settings.kv_cache_type} is asked for; without flash attention values stay {report.kv_cache_values}",
            "drop --deterministic" if settings.deterministic else "say OLLAMA_FLASH_ATTENTION=1",
        )


def check_models(settings: Settings) -> Iterator[Finding]:
    """Look at the directories that models are read from."""
    for directory in settings.model_dirs:
        if not directory.exists():
            level: Level = "warning" if settings.models_dir else "ok"
            advice = "put .gguf files there, or name another with --models-dir" if settings.backend != "ollama" else ""
            yield Finding(level, "models", f"{directory} does not exist", advice)
        elif not os.access(directory, os.R_OK | os.X_OK if directory.is_dir() else os.R_OK):
            advice = "give the user that runs osyncd the right to read it"
            yield Finding("problem", "models", f"{directory} cannot be read", advice)
        else:
            yield _count(directory)


def _count(directory: Path) -> Finding:
    from osync.engine.store import ModelStore

    store = ModelStore((directory,))
    store.scan()
    # A bare file has two names; what counts is the files.
    count = len({model.path for model in store.models})
    return Finding("ok", "models", f"{count} model{'' if count == 1 else 's'} in {directory}")


def check_state(settings: Settings) -> Iterator[Finding]:
    """Look at the state directory."""
    directory = settings.state_dir or config.default_state_dir()
    place = next(path for path in (directory, *directory.parents) if path.exists())
    if os.access(place, os.W_OK | os.X_OK):
        yield Finding("ok", "state", f"{directory} can be written")
    else:
        yield Finding("problem", "state", f"{directory} cannot be written", "name another with --state-dir")


def check_ports(settings: Settings) -> Iterator[Finding]:
    """Look at the daemon's ports: free, or osync's own."""
    if "proxy" in settings.role and settings.port:
        yield _port(settings, settings.port, "HTTP port", "--port", _is_proxy)
    if settings.grpc_port:
        yield _port(settings, settings.grpc_port, "gRPC port", "--grpc-port", _is_daemon)


def _port(settings: Settings, port: int, what: str, flag: str, is_osync: Callable[[str, int], bool]) -> Finding:
    try:
        found = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104 - compared
        if is_osync(host, port):
            return Finding("ok", "ports", f"{what} {port}: osync answers there")
        return Finding(
            "problem",
            "ports",
            f"{what} {port} cannot be used: {error.strerror or error}",
            f"choose another with {flag}",
        )
    return Finding("ok", "ports", f"{what} {port} is free")


def _is_proxy(host: str, port: int) -> bool:
    answer = ask(f"http://{f'[{host}]' if ':' in host else host}:{port}", "/api/status")
    return answer is not None and "osync" in answer


def _is_daemon(host: str, port: int) -> bool:
    from osync.net.probe import is_daemon

    return is_daemon(host, port, _TIMEOUT_S)


def ask(url: str, path: str) -> dict[str, Any] | None:
    """Return the JSON object that an HTTP server answers, None where none does."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        with closing(kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)) as connection:
            connection.request("GET", parts.path.rstrip("/") + path)
            response = connection.getresponse()
            value = json.loads(response.read(_LIMIT)) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return value if isinstance(value, dict) else None


CHECKS: Final[tuple[Check, ...]] = (
    check_host,
    check_security,
    check_ports,
    check_state,
    check_ollama,
    check_engine,
    check_models,
)


def examine(flags: dict[str, Any] | None = None, file: Path | None = None) -> list[Finding]:
    """Return all findings for the settings of flags, environment and file; blocking."""
    try:
        settings = config.load(flags, file=file).settings
    except ConfigError as error:
        return [Finding("problem", "settings", str(error))]
    with _quiet():
        return [finding for check in CHECKS for finding in _careful(check, settings)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what llama.cpp and the model store log out of the findings."""
    before = structlog.get_config()
    nothing = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=nothing, cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


def _careful(check: Check, settings: Settings) -> Iterator[Finding]:
    """Run a check; what it did not expect is a finding too, and the others still run."""
    try:
        yield from check(settings)
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        yield Finding("problem", name, f"cannot be looked at: {error!r}", "this may be a fault of osync: report it")


def print_findings(findings: list[Finding], *, as_json: bool) -> bool:
    """Print them, one line each; returns True if none is a problem."""
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        print_json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
        return not problems
    colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    for finding in findings:
        mark = typer.style(f"{finding.level:<8}", fg=colours[finding.level])
        advice = f" -> {finding.advice}" if finding.advice else ""
        typer.echo(f"{mark} {finding.what:<9} {finding.text}{advice}")
    return not problems
