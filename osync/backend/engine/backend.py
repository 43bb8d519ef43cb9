"""Ollama's HTTP API over llama.cpp, as a `Backend`."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
import structlog

from osync.backend.engine import answers, embedding, inference
from osync.backend.engine.answers import JSON, TEXT, dumps, respond
from osync.backend.engine.fields import Fields
from osync.backend.engine.runner import EngineLibrary, Load, load_runner, probe_library
from osync.backend.engine.table import Table
from osync.config import Settings, default_state_dir
from osync.engine.store import ModelStore, StoredModel
from osync.errors import BadRequest, CapacityError, ModelNotFound, NotSupported, OsyncError
from osync.net.exchange import Body, Responder
from osync.net.tasks import Tasks
from osync.types import BackendState, LoadedModel, RequestHead
from osync.version import OLLAMA_API
from osync.wire import names

log = structlog.get_logger("osync.engine")

SCAN_INTERVAL_S = 2.0  # a file that is dropped in appears by itself; a scan is a few stat calls

_STARTING = "the engine is starting"

_Handler = Callable[[RequestHead, Body, Responder], Awaitable[None]]

_ELSEWHERE = {
    "/api/create": "creating models; put a .gguf file into a models directory",
    "/api/copy": "copying models; put a .gguf file into a models directory",
    "/api/delete": "deleting models; remove the file from the models directory",
    "/api/pull": "pulling models; put a .gguf file into a models directory",
    "/api/push": "pushing models",
    "/api/me": "accounts",
    "/api/signout": "accounts",
}


class EngineBackend:
    """Answers Ollama's API from the models on this host, without an Ollama."""

    def __init__(
        self,
        settings: Settings,
        *,
        load: Load = load_runner,
        probe: Callable[[], EngineLibrary] | None = None,
        available_memory: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
        scan_interval_s: float = SCAN_INTERVAL_S,
        store: ModelStore | None = None,
    ) -> None:
        """A given `store` is watched by its owner; without one, a store of the settings' directories is made."""
        self._settings = settings
        self._probe = probe or partial(probe_library, settings)
        self._scan_interval_s = scan_interval_s
        state_dir = settings.state_dir or default_state_dir()
        self._owns_store = store is None
        self._store = store or ModelStore(settings.model_dirs, state_dir, prefer=settings.quantize)
        self._table = Table(settings, load, available_memory=available_memory, on_change=self._changed)
        self._tasks = Tasks("backend.engine")
        self._notify: list[Callable[[], None]] = []
        self._library: EngineLibrary | None = None
        self._error = _STARTING
        self._scan_lock = asyncio.Lock()
        self._scans = 0
        self._stop = threading.Event()
        self._routes = self._make_routes()

    @property
    def store(self) -> ModelStore:
        """The models on this host."""
        return self._store

    def find_blob(self, digest: str) -> Path | None:
        """Return the file of a model by its digest, or by that of its weights in an Ollama store."""
        return self._store.find_blob(digest)

    # Lifetime and state.

    async def start(self) -> None:
        """Begin to load llama.cpp and to watch the directories; `state().ok` once both are known."""
        self._tasks.spawn("watch", self._watch())
        if self._settings.quantize:
            self._tasks.spawn("quantize", self._quantize())

    async def close(self) -> None:
        """Unload everything; bounded to a few seconds."""
        self._stop.set()
        await self._tasks.close()
        await self._table.close()

    def state(self) -> BackendState:
        """Return models, loaded models and load, without waiting."""
        now = time.time()
        ready = [(slot, slot.runner) for slot in self._table.loaded if slot.runner is not None]
        return BackendState(
            kind="engine",
            ok=self._library is not None,
            error="" if self._library else self._error,
            version=self._library.version if self._library else "",
            engine=self._library.report if self._library else None,
            models=tuple(m.info for m in self._store.models),
            loaded=tuple(
                LoadedModel(
                    name=slot.model.info.name,
                    digest=slot.model.info.digest,
                    size=runner.size_bytes,
                    size_vram=runner.size_vram,
                    expires_at=answers.now_text(int(slot.expires_at(now) * 1e9)),
                    context_length=runner.context_length,
                    active=slot.active,
                    queued=slot.queued,
                )
                for slot, runner in ready
            ),
            slots=min((runner.parallel for _, runner in ready), default=self._settings.parallel),
            active=self._table.active,
            queued=self._table.queued,
        )

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever models, loaded models or the load change."""
        self._notify.append(notify)

    def _changed(self) -> None:
        for notify in self._notify:
            notify()

    async def _watch(self) -> None:
        try:
            self._library = await asyncio.to_thread(self._probe)
            self._table.has_gpu = self._library.has_gpu
        except OsyncError as error:
            self._error = str(error)
            log.error("engine_unavailable", error=self._error)
        self._changed()
        while self._owns_store:
            try:
                await self._scan()
                for path in self._store.pending_digests():
                    await asyncio.to_thread(self._store.digest_file, path, self._stop)
                    await self._scan()
            except Exception as error:  # a directory that misbehaves must not end the watch
                log.error("scan_failed", exc_info=error)
            await asyncio.sleep(self._scan_interval_s)

    async def _quantize(self) -> None:
        """Make what the settings prefer of full-precision files, one after the other; those are served meanwhile."""
        while True:
            if self._library is not None:
                for source in self._store.pending_quantizations[:1]:  # the scan after it finds the others
                    await asyncio.to_thread(self._store.quantize, source, self._stop)
                    await self._scan()
            await asyncio.sleep(self._scan_interval_s)

    async def _scan(self) -> None:
        """Scan; callers that come while one runs share the next one."""
        arrived = self._scans
        async with self._scan_lock:
            if self._scans > arrived:
                return
            self._scans += 1
            if await asyncio.to_thread(self._store.scan):
                self._table.retain(self._paths())
                self._changed()

    def _paths(self) -> set[Path]:
        """Return the files that can be asked for: others are unloaded."""
        return {model.path for model in self._store.models}

    async def _find(self, name: str) -> StoredModel:
        try:
            return self._store.find(name)
        except ModelNotFound:
            await self._scan()
            return self._store.find(name)

    # Requests.

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request; errors in Ollama's form. After the head, an error breaks the stream."""
        try:
            await self._route(head, body, responder)
        except OsyncError as error:
            if responder.started:
                raise
            retry_after = str(math.ceil(error.retry_after_s)) if isinstance(error, CapacityError) else ""
            await respond(responder, error.status, dumps({"error": str(error)}), retry_after=retry_after)
        except Exception as error:
            log.error("request_failed", target=head.target.partition("?")[0], exc_info=error)
            if responder.started:
                raise
            await respond(responder, 500, dumps({"error": "internal error; see the daemon's log"}))

    async def _route(self, head: RequestHead, body: Body, responder: Responder) -> None:
        path = unquote(head.target.partition("?")[0])
        methods = self._routes.get(path)
        if path in _ELSEWHERE or path.startswith(("/api/blobs/", "/v1/")):
            what = _ELSEWHERE.get(path, "this route")
            raise NotSupported(
                f"the engine backend does not support {what}; use a node whose backend is ollama for {path}"
            )
        if methods is None:
            await respond(responder, 404, b"404 page not found", TEXT)
            return
        handler = methods.get(head.method)
        if handler is None:
            await respond(responder, 405, b"405 method not allowed", TEXT)
            return
        await handler(head, body, responder)

    def _make_routes(self) -> dict[str, dict[str, _Handler]]:
        def get(handler: _Handler) -> dict[str, _Handler]:
            return {"GET": handler, "HEAD": handler}

        return {
            "/": get(self._root),
            "/api/version": get(self._version),
            "/api/tags": get(self._tags),
            "/api/ps": {"GET": self._ps},
            "/api/status": {"GET": self._status},
            "/api/show": {"POST": self._show},
            "/api/generate": {"POST": self._generate},
            "/api/chat": {"POST": self._chat},
            "/api/embed": {"POST": partial(self._embed, "EmbedRequest", embedding.embed)},
            "/api/embeddings": {"POST": partial(self._embed, "EmbeddingRequest", embedding.embeddings)},
        }

    async def _root(self, head: RequestHead, _: Body, responder: Responder) -> None:
        await respond(responder, 200, b"Ollama is running", TEXT, is_head=head.method == "HEAD")

    async def _json(self, head: RequestHead, responder: Responder, value: Any) -> None:
        await respond(responder, 200, dumps(value), JSON, is_head=head.method == "HEAD")

    async def _version(self, head: RequestHead, _: Body, responder: Responder) -> None:
        await self._json(head, responder, {"version": OLLAMA_API})

    async def _status(self, head: RequestHead, _: Body, responder: Responder) -> None:
        await self._json(head, responder, {"cloud": {"disabled": True, "source": "config"}})

    async def _tags(self, head: RequestHead, _: Body, responder: Responder) -> None:
        await self._json(head, responder, {"models": [answers.tag(m.info) for m in self._store.models]})

    async def _ps(self, head: RequestHead, _: Body, responder: Responder) -> None:
        now = time.time()
        slots = sorted(self._table.loaded, key=lambda s: s.expires_at(now), reverse=True)
        await self._json(head, responder, {"models": [answers.running(s, now) for s in slots]})

    async def _show(self, _: RequestHead, body: Body, responder: Responder) -> None:
        fields = Fields.decode(await body.read_all(self._settings.max_body), "ShowRequest")
        name = fields.model()
        if not name:
            raise BadRequest("model is required")
        model = await self._find_as(name, names.display(name))
        verbose, system = fields.boolean("verbose", False), fields.text("system")
        data = await asyncio.to_thread(answers.show, model, verbose=verbose, system=system)
        await respond(responder, 200, data)

    async def _find_as(self, name: str, shown: str) -> StoredModel:
        try:
            return await self._find(name)
        except ModelNotFound:
            raise ModelNotFound(f"model '{shown}' not found") from None

    async def _generate(self, _: RequestHead, body: Body, responder: Responder) -> None:
        fields = Fields.decode(await body.read_all(self._settings.max_body), "GenerateRequest")
        name = fields.model()
        if not name:
            raise ModelNotFound("model '' not found")
        model = await self._find(name)
        self._require(model, name, "generate")
        await inference.generate(fields, model, self._table, responder)

    async def _chat(self, _: RequestHead, body: Body, responder: Responder) -> None:
        fields = Fields.decode(await body.read_all(self._settings.max_body), "ChatRequest")
        name = fields.model()
        if not name:
            raise BadRequest("model is required")
        model = await self._find(name)
        self._require(model, name, "chat")
        await inference.chat(fields, model, self._table, responder)

    async def _embed(
        self, struct: str, answer: embedding.Answer, _: RequestHead, body: Body, responder: Responder
    ) -> None:
        fields = Fields.decode(await body.read_all(self._settings.max_body), struct)
        name = fields.model()
        if not name:
            raise BadRequest("model is required")
        try:
            model = await self._find(name)
        except ModelNotFound:
            raise ModelNotFound(f'model "{name}" not found, try pulling it first') from None
        self._require_engine()
        await answer(fields, model, self._table, responder)

    def _require(self, model: StoredModel, name: str, what: str) -> None:
        self._require_engine()
        if "completion" not in model.info.capabilities:
            raise BadRequest(f'"{name}" does not support {what}')

    def _require_engine(self) -> None:
        if self._library is None and self._error != _STARTING:
            raise NotSupported(self._error)
