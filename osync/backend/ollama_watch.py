"""Watches one Ollama: is it there, what is on its disk, what is in its memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TypeVar

import structlog

from osync.backend.http1_connection import why
from osync.backend.http1_pool import Client
from osync.backend.ollama_state import parse_ps, parse_tags, parse_version
from osync.errors import OsyncError, WireError
from osync.net.tasks import Tasks
from osync.types import LoadedModel, ModelInfo
from osync.wire import names

log = structlog.get_logger("osync.backend")

BUSY_INTERVAL_S = 1.0  # a second is how old a node's state may be
IDLE_INTERVAL_S = 2.0
SUSPECT_INTERVAL_S = 0.25  # between the first failed check and the one that decides
MIN_SPACING_S = 0.2  # however often somebody asks for a look
CHECK_TIMEOUT_S = 2.0
PS_TIMEOUT_S = 6.0  # Ollama holds ps back for about 5 s while it unloads
FALL = 2  # failed checks in a row
MAX_ANSWER = 16 << 20

T = TypeVar("T")


class Watch:
    """Polls version, ps and tags; `changed` is called when what it knows differs."""

    def __init__(self, client: Client, url: str, busy: Callable[[], bool], changed: Callable[[], None]) -> None:
        self.ok = False
        self.version = ""
        self.models: tuple[ModelInfo, ...] = ()
        self.loaded: tuple[LoadedModel, ...] = ()
        self.error = f"Ollama at {url} was not asked yet"
        self._client, self._url = client, url
        self._busy, self._changed = busy, changed
        self._failures = 0
        self._tasks = Tasks("ollama")
        self._version_due, self._ps_due, self._tags_due = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._seen: dict[str, bytes] = {}
        self._loaded_names: frozenset[str] = frozenset()

    def start(self) -> None:
        """Begin polling."""
        self._tasks.spawn("version", self._poll(self._check, self._version_due))
        self._tasks.spawn("ps", self._poll(self._look_at_ps, self._ps_due))
        self._tasks.spawn("tags", self._poll(self._look_at_tags, self._tags_due))

    async def close(self) -> None:
        """Stop polling."""
        await self._tasks.close()

    def check_soon(self) -> None:
        """Something failed: ask now whether Ollama is there."""
        self._version_due.set()

    def tags_soon(self) -> None:
        """The disk may have changed."""
        self._tags_due.set()

    def ps_soon(self) -> None:
        """The memory may have changed."""
        self._ps_due.set()

    def is_loaded(self, name: str) -> bool:
        """Return True if that model was in memory at the last look."""
        return _key(name) in self._loaded_names

    async def _poll(self, look: Callable[[], Awaitable[None]], due: asyncio.Event) -> None:
        while True:
            due.clear()
            if self.ok or look == self._check:
                await look()
            await asyncio.sleep(MIN_SPACING_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval()):
                    await due.wait()

    def _interval(self) -> float:
        if self._failures and self._failures < FALL:
            return SUSPECT_INTERVAL_S
        return BUSY_INTERVAL_S if self._busy() or not self.ok else IDLE_INTERVAL_S

    async def _check(self) -> None:
        try:
            version = parse_version(await self._get("/api/version", CHECK_TIMEOUT_S))
        except (OSError, OsyncError) as error:
            self._fail(error)
            return
        self._failures = 0
        if self.ok and version == self.version:
            return
        # Whatever runs there now need not be what ran there before; it counts once its models are known.
        self._seen.clear()
        await asyncio.gather(self._look_at_tags(), self._look_at_ps(CHECK_TIMEOUT_S))
        log.info("ollama_up", url=self._url, version=version)
        self.ok, self.version, self.error = True, version, ""
        self._changed()

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        text = (
            f"Ollama at {self._url} does not answer ({why(error)}); start it with `ollama serve`, "
            "or say where it is with --ollama-host or OLLAMA_HOST"
        )
        if self._failures < FALL and self.ok:
            return
        if self.ok:
            log.warning("ollama_down", url=self._url, reason=why(error))
        if self.ok or self.error != text:
            self.ok, self.error, self.loaded, self._loaded_names = False, text, (), frozenset()
            self._seen.clear()
            self._changed()

    async def _look_at_tags(self) -> None:
        models = await self._look("/api/tags", CHECK_TIMEOUT_S, parse_tags)
        if models is not None and models != self.models:
            self.models = models
            self._changed_if_up()

    async def _look_at_ps(self, timeout_s: float = PS_TIMEOUT_S) -> None:
        loaded = await self._look("/api/ps", timeout_s, parse_ps)
        if loaded is not None and loaded != self.loaded:
            self.loaded = loaded
            self._loaded_names = frozenset(_key(m.name) for m in loaded)
            self._changed_if_up()

    def _changed_if_up(self) -> None:
        if self.ok:
            self._changed()

    async def _look(self, path: str, timeout_s: float, parse: Callable[[bytes], T]) -> T | None:
        """Return the answer where it is news; only the version decides about up and down."""
        try:
            body = await self._get(path, timeout_s)
            if self._seen.get(path) == body:
                return None
            value = parse(body)
        except (OSError, OsyncError) as error:
            log.debug("ollama_look_failed", url=self._url, path=path, reason=why(error))
            if self.ok:
                self.check_soon()
            return None
        self._seen[path] = body
        return value

    async def _get(self, path: str, timeout_s: float) -> bytes:
        async with asyncio.timeout(timeout_s):
            answer = await self._client.request("GET", path)
            try:
                status = (await answer.head()).status
                if status != 200:
                    raise WireError(f"it answers {status} to GET {path}")
                body = bytearray()
                while piece := await answer.read():
                    body += piece
                    if len(body) > MAX_ANSWER:
                        raise WireError(f"its answer to GET {path} is over {MAX_ANSWER} bytes")
                return bytes(body)
            finally:
                answer.close()


@lru_cache(maxsize=1024)
def _key(name: str) -> str:
    return names.key(name)
