"""What a daemon with the shard role is made of."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osync.backend.base import Backend
from osync.config import Settings, default_state_dir
from osync.errors import ConfigError
from osync.net.blob import Find
from osync.shard.role import ShardRole

if TYPE_CHECKING:
    from osync.engine.store import ModelStore

_RESCAN_S: Final = 2.0


async def make_shard(settings: Settings, backend: Backend) -> ShardRole:
    """Return the shard role, not started. Raises ConfigError where llama.cpp is not there.

    It shares the models of the daemon's engine, where that is its backend.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError("the shard role needs the engine; run: pip install 'osync[engine]'")
    # Only here: llama.cpp and numpy cost seconds and memory that other daemons need not pay.
    from osync.backend.engine import EngineBackend
    from osync.backend.engine.runner import accelerators, probe_library
    from osync.engine.devices import LoadSettings
    from osync.engine.store import ModelStore

    library = await asyncio.to_thread(probe_library, settings)
    is_shared = isinstance(backend, EngineBackend)
    store = backend.store if isinstance(backend, EngineBackend) else None
    return ShardRole(
        settings,
        store or ModelStore(settings.model_dirs, settings.state_dir or default_state_dir()),
        watches=not is_shared,
        engine=library.version,
        load=LoadSettings(accelerators=accelerators(settings), memory_lock=settings.memory_lock),
    )


def blobs_of(settings: Settings, backend: Backend, shard: ShardRole | None) -> Find:
    """Return how to find the files of models on this host by digest."""
    if shard is not None:
        return shard.find
    find: Find | None = getattr(backend, "find_blob", None)
    return find or StoreFiles(settings).find


class StoreFiles:
    """The files of an Ollama's store, looked at when somebody asks for one that is not known yet."""

    def __init__(self, settings: Settings) -> None:
        self._directories = settings.model_dirs
        self._store: ModelStore | None = None
        self._lock = threading.Lock()
        self._scanned = 0.0

    def find(self, digest: str) -> Path | None:
        """Return a model's file; blocking."""
        with self._lock:
            if self._store is None:
                from osync.engine.store import ModelStore

                self._store = ModelStore(self._directories)
            path = self._store.find_blob(digest)
            if path is None and time.monotonic() - self._scanned > _RESCAN_S:
                self._store.scan()
                self._scanned = time.monotonic()
                path = self._store.find_blob(digest)
            return path
