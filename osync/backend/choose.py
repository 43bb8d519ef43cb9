"""Picks the backend that a node fronts: the Ollama on its host, or the embedded engine."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import socket

import aiohttp
import psutil
import structlog
from yarl import URL

from osync.backend.base import Backend
from osync.backend.ollama import OllamaBackend
from osync.backend.ollama_state import parse_version
from osync.config import Settings
from osync.errors import ConfigError, WireError

log = structlog.get_logger("osync.backend")

_PROBE_TIMEOUT_S = 1.0
_INSTALL = "; or have osync run models itself: pip install 'osync[engine]'"


async def choose(settings: Settings) -> Backend:
    """Return the backend that the settings ask for, not started. Raises ConfigError."""
    if settings.backend == "engine":
        return await _engine(settings)
    if _is_own_address(settings):
        raise ConfigError(
            f"ollama_host {settings.ollama_host} is the address of this very proxy, which would ask itself for ever; "
            "give Ollama's own address (--ollama-host), or another --port, or --backend engine"
        )
    if settings.backend == "ollama":
        return _ollama(settings)
    if await _answers(settings.ollama_host):
        log.info("backend_chosen", backend="ollama", url=settings.ollama_host)
        return _ollama(settings)
    if _has_engine():
        log.info("backend_chosen", backend="engine", reason=f"no Ollama answers at {settings.ollama_host}")
        return await _engine(settings)
    log.warning("backend_chosen", backend="ollama", reason="no Ollama answers, and the engine is not installed")
    return _ollama(settings, hint=_INSTALL)


def _ollama(settings: Settings, hint: str = "") -> Backend:
    url = URL(settings.ollama_host)
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(f"ollama_host {settings.ollama_host!r} is not host:port or http://host:port")
    return OllamaBackend(settings.ollama_host, hint=hint)


async def _engine(settings: Settings) -> Backend:
    if not _has_engine():
        raise ConfigError("the engine is not installed; run: pip install 'osync[engine]'")
    # Only here: llama.cpp and numpy cost seconds and memory that an Ollama node need not pay.
    from osync.backend.engine import EngineBackend

    if settings.device not in {"auto", "cpu"} or settings.main_gpu >= 0:
        # It costs a second, and who names a device wants to hear now that it is not there.
        from osync.backend.engine.runner import accelerators
        from osync.engine.devices import require

        await asyncio.to_thread(require, accelerators(settings))
    backend: Backend = EngineBackend(settings)
    return backend


def _has_engine() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


async def _answers(url: str) -> bool:
    """Return True if an Ollama answers there within a second."""
    try:
        async with (
            asyncio.timeout(_PROBE_TIMEOUT_S),
            aiohttp.ClientSession() as session,
            session.get(url.rstrip("/") + "/api/version") as response,
        ):
            parse_version(await response.content.read(4096))
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, WireError):
        return False


def _is_own_address(settings: Settings) -> bool:
    """Return True if the Ollama asked for is this daemon's own HTTP listener."""
    url = URL(settings.ollama_host)
    if "proxy" not in settings.role or not settings.port or url.port != settings.port or not url.host:
        return False
    asked, bound = url.host.lower(), settings.host.lower()
    both_loopback = settings.is_loopback and _is_loopback(asked)
    return asked == bound or both_loopback or (_is_any(bound) and _is_local(asked))


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def _is_local(host: str) -> bool:
    if _is_loopback(host) or host == socket.gethostname().lower():
        return True
    return any(address.address == host for group in psutil.net_if_addrs().values() for address in group)
