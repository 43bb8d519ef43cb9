"""The models in memory: loaded on demand, shared, kept alive, and put away for others."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from osync.backend.engine.runner import EngineRunner, Load
from osync.config import Settings
from osync.coordinator.generation import SERVER_BUSY
from osync.coordinator.runner import DEFAULT_CONTEXT, MAX_BATCH, RunnerSettings, too_large
from osync.engine.llama import threads_for
from osync.engine.store import StoredModel
from osync.engine.template import ChatTemplate
from osync.errors import BadRequest, CapacityError, ConfigError, ModelUnusable, OsyncError
from osync.net.tasks import Tasks
from osync.wire.options import RunnerOptions, parse_lifetime

log = structlog.get_logger("osync.engine")

DEFAULT_MODELS = 3  # Ollama's number without a GPU
CLOSE_TIMEOUT_S = 5.0  # llama.cpp finishes the evaluation that it is in
_FAR_S = 200 * 365 * 86400.0  # how "forever" is written as a date


@dataclass(eq=False, slots=True)
class Slot:
    """One file in memory, or on its way there."""

    model: StoredModel
    """By the name that loaded it; aliases of the same file share it."""
    settings: RunnerSettings
    keep_alive_s: float
    ready: asyncio.Future[EngineRunner]
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    runner: EngineRunner | None = None
    templates: dict[str, ChatTemplate] = field(default_factory=dict)
    users: int = 0
    """Requests that hold it, also those that wait for its load."""
    last_used: float = 0.0
    timer: asyncio.TimerHandle | None = None
    is_closing: bool = False
    """Goes as soon as nobody uses it; new requests wait until it is gone."""
    is_unloading: bool = False

    def expires_at(self, now: float) -> float:
        """When it will be unloaded, as Unix time, if nobody asks for it any more."""
        if self.keep_alive_s == math.inf:
            return now + _FAR_S
        idle_s = time.monotonic() - self.last_used if self.users == 0 else 0.0
        return now + max(0.0, self.keep_alive_s - idle_s)


class Table:
    """Owns all runners of a backend. Only the event loop's thread touches it."""

    def __init__(
        self,
        settings: Settings,
        load: Load,
        *,
        available_memory: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._load = load
        self._available_memory = available_memory
        self._on_change = on_change
        try:
            self._default_keep_alive_s = parse_lifetime(settings.keep_alive)
            timeout_s = parse_lifetime(settings.load_timeout)
        except BadRequest as error:
            raise ConfigError(f"keep_alive or load_timeout is no duration: {error}") from error
        self._load_timeout_s = timeout_s if timeout_s > 0 else math.inf
        self._slots: dict[Path, Slot] = {}
        self._loads = Tasks("engine.load")
        self._unloads = Tasks("engine.unload")
        self._loading = asyncio.Lock()
        self._freed = asyncio.Event()
        self._closed = False
        self.has_gpu = False

    @property
    def loaded(self) -> tuple[Slot, ...]:
        """Slots that can answer now."""
        return tuple(s for s in self._slots.values() if s.runner is not None and not s.is_closing)

    @property
    def pending(self) -> int:
        """Requests that wait for a load."""
        return sum(s.users for s in self._slots.values() if s.runner is None)

    def runner_settings(self, model: StoredModel, options: RunnerOptions) -> RunnerSettings:
        """Complete what a request asks for with the daemon's settings."""
        trained = model.header.context_length or DEFAULT_CONTEXT
        wanted = options.num_ctx if options.num_ctx is not None and options.num_ctx > 0 else 0
        length = wanted or self._settings.context_window or DEFAULT_CONTEXT
        layers = 0 if self._settings.device == "cpu" else -1
        if options.num_gpu is not None and options.num_gpu >= 0 and layers:
            layers = options.num_gpu
        return RunnerSettings(
            context_length=max(4, min(length, trained)),
            parallel=self._settings.parallel,
            threads=threads_for(max(0, options.num_thread or 0) or self._settings.threads),
            n_batch=max(1, min(options.num_batch or MAX_BATCH, MAX_BATCH)),
            flash_attention=self._settings.flash_attention,
            use_mmap=options.use_mmap is not False,
            gpu_layers=layers,
            max_queue=self._settings.max_queue,
            load_timeout_s=min(self._load_timeout_s, 1e9),
            deterministic=self._settings.deterministic,
        )

    @asynccontextmanager
    async def lease(
        self, model: StoredModel, options: RunnerOptions, keep_alive_s: float | None
    ) -> AsyncIterator[tuple[Slot, EngineRunner]]:
        """Hold a loaded model; loads it first if need be. Raises ModelUnusable or CapacityError."""
        slot = await self._slot(model, options)
        try:
            slot.users += 1
            if keep_alive_s is not None:
                slot.keep_alive_s = keep_alive_s
            if slot.timer:
                slot.timer.cancel()
                slot.timer = None
            self._on_change()
            if slot.runner is None:
                # The load belongs to the table: who leaves here does not stop it for the others.
                await asyncio.wait([slot.ready])
            yield slot, slot.ready.result()
        finally:
            slot.users -= 1
            slot.last_used = time.monotonic()
            self._idle(slot)
            self._on_change()

    async def _slot(self, model: StoredModel, options: RunnerOptions) -> Slot:
        while True:
            if self._closed:
                raise CapacityError("the engine is shutting down")
            slot = self._slots.get(model.path)
            if slot is None:
                return self._begin(model, options)
            if not slot.is_closing and self._suits(slot, model, options):
                if slot.runner is None:
                    self._check_queue()
                return slot
            if not slot.is_closing:
                log.info("model_reload", model=model.info.name, waits_for=slot.users)
                slot.is_closing = True
                self._idle(slot)
            await slot.gone.wait()

    def _check_queue(self) -> None:
        """As many may wait for loads as a loaded model takes: those that it works on, and its queue."""
        if self.pending >= self._settings.max_queue + self._settings.parallel:
            raise CapacityError(SERVER_BUSY)

    def _suits(self, slot: Slot, model: StoredModel, options: RunnerOptions) -> bool:
        """Tell whether a slot is what a request asks for; what it leaves open suits it as it is."""
        if slot.model.header is not model.header:  # the store reads a header again once its file has changed
            return False
        wanted, has = self.runner_settings(model, options), slot.settings
        if options.num_ctx is None:
            is_length_right = has.context_length >= wanted.context_length
        else:
            is_length_right = has.context_length == wanted.context_length
        return (
            is_length_right
            and (not options.num_batch or has.n_batch == wanted.n_batch)
            and (not options.num_thread or has.threads == wanted.threads)
            and (options.use_mmap is None or has.use_mmap == wanted.use_mmap)
            and (options.num_gpu is None or options.num_gpu < 0 or has.gpu_layers == wanted.gpu_layers)
        )

    def _begin(self, model: StoredModel, options: RunnerOptions) -> Slot:
        self._check_queue()
        slot = Slot(
            model,
            self.runner_settings(model, options),
            self._default_keep_alive_s,
            asyncio.get_running_loop().create_future(),
        )
        slot.last_used = time.monotonic()
        slot.ready.add_done_callback(lambda f: f.cancelled() or f.exception())  # also if all have left
        self._slots[model.path] = slot
        self._loads.spawn("load", self._fill(slot))
        return slot

    async def _fill(self, slot: Slot) -> None:
        """Load a slot's model; whatever happens, who waits for it is told."""
        name = slot.model.info.name
        try:
            async with asyncio.timeout(None if self._load_timeout_s == math.inf else self._load_timeout_s):
                async with self._loading:
                    await self._make_room(slot)
                    began = time.monotonic()
                    runner = await self._load(slot.model.path, slot.settings)
            slot.runner = runner
            await self._try_template(slot)
        except BaseException as error:
            await self._failed(slot, error)
            if not isinstance(error, Exception):
                raise
            return
        log.info("model_ready", model=name, seconds=round(time.monotonic() - began, 2))
        slot.last_used = time.monotonic()
        slot.ready.set_result(runner)
        self._idle(slot)
        self._on_change()

    async def _try_template(self, slot: Slot) -> None:
        """Start the template's process with the model; without a good template, `raw` still works."""
        try:
            await self.template(slot, slot.model).start()
        except ModelUnusable as error:
            log.warning("chat_template_unusable", model=slot.model.info.name, error=str(error))

    async def _failed(self, slot: Slot, error: BaseException) -> None:
        if isinstance(error, OsyncError):
            shown: OsyncError = error
        elif isinstance(error, TimeoutError):
            shown = ModelUnusable(f"timed out loading {slot.model.info.name} after {self._load_timeout_s:g} s")
        elif isinstance(error, asyncio.CancelledError):
            shown = CapacityError("the engine is shutting down")
        else:
            log.error("load_failed", model=slot.model.info.name, exc_info=error)
            shown = ModelUnusable(f"{slot.model.info.name} could not be loaded: {error!r}")
        slot.is_closing = slot.is_unloading = True
        slot.ready.set_exception(shown)
        log.warning("model_not_loaded", model=slot.model.info.name, error=str(shown))
        await self._put_away(slot)

    async def _make_room(self, slot: Slot) -> None:
        """Unload the least recently used until the number of models and the memory are right."""
        most = self._settings.max_loaded_models or DEFAULT_MODELS
        while True:
            others = [s for s in self._slots.values() if s is not slot and (s.runner is not None or s.is_unloading)]
            missing = self._missing_memory(slot)
            if len(others) < most and not missing:
                return
            if not others:
                raise ModelUnusable(missing)
            self._freed.clear()
            victim = min(others, key=lambda s: (not s.is_closing, s.users > 0, s.last_used))
            if not victim.is_closing:
                log.info("model_evicted", model=victim.model.info.name, by=slot.model.info.name)
                victim.is_closing = True
                self._idle(victim)
            await self._freed.wait()

    def _missing_memory(self, slot: Slot) -> str:
        """Say what is short for one sequence at least, "" if nothing is known to be."""
        if self.has_gpu and slot.settings.gpu_layers != 0:
            return ""  # llama.cpp decides how much goes to the accelerator
        header = slot.model.header
        need = slot.model.info.size + header.kv_bytes_per_token() * slot.settings.context_length
        available = self._available_memory()
        if need <= available:
            return ""
        return too_large(need, available)

    def template(self, slot: Slot, model: StoredModel) -> ChatTemplate:
        """Return the template of one of the names that share a slot's file."""
        found = slot.templates.get(model.template)
        if found is None:
            assert slot.runner is not None
            words = slot.runner.vocabulary
            found = slot.templates[model.template] = ChatTemplate(
                jinja=model.header.chat_template, go=model.template, bos=words.bos_text, eos=words.eos_text
            )
        return found

    def expire(self, model: StoredModel) -> None:
        """Unload a model as soon as nobody uses it."""
        slot = self._slots.get(model.path)
        if slot is not None:
            slot.keep_alive_s = 0.0
            self._idle(slot)

    def retain(self, paths: Collection[Path]) -> None:
        """Unload what lies in none of `paths` any more: nobody could ask for it, not even to unload it."""
        for slot in list(self._slots.values()):
            if slot.model.path not in paths and slot.ready.done():
                slot.keep_alive_s = 0.0
                self._idle(slot)

    def _idle(self, slot: Slot) -> None:
        """Decide what happens to a slot that may have become free."""
        if slot.users or slot.is_unloading or not slot.ready.done():
            return
        if slot.timer:
            slot.timer.cancel()
            slot.timer = None
        if slot.is_closing or slot.keep_alive_s <= 0:
            slot.is_closing = slot.is_unloading = True
            self._unloads.spawn("unload", self._unload(slot))
        elif slot.keep_alive_s != math.inf:
            delay_s = min(slot.keep_alive_s, 1e8)
            slot.timer = asyncio.get_running_loop().call_later(delay_s, self._expired, slot)

    def _expired(self, slot: Slot) -> None:
        slot.timer = None
        if not slot.users and not slot.is_closing:
            slot.is_closing = True
            self._idle(slot)

    async def _unload(self, slot: Slot) -> None:
        self._on_change()
        await self._put_away(slot)
        log.info("model_unloaded", model=slot.model.info.name)

    async def _put_away(self, slot: Slot) -> None:
        runner, slot.runner = slot.runner, None
        try:
            for template in slot.templates.values():
                await template.close()
            if runner is not None:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await runner.close()
        except TimeoutError:
            log.error("unload_timed_out", model=slot.model.info.name, seconds=CLOSE_TIMEOUT_S)
        finally:
            self._remove(slot)
            slot.gone.set()
            self._freed.set()
            self._on_change()

    def _remove(self, slot: Slot) -> None:
        if self._slots.get(slot.model.path) is slot:
            del self._slots[slot.model.path]

    async def close(self) -> None:
        """Stop loads and free all models."""
        self._closed = True
        await self._loads.close()
        for slot in list(self._slots.values()):
            if slot.timer:
                slot.timer.cancel()
            if not slot.is_unloading:
                slot.is_closing = slot.is_unloading = True
                self._unloads.spawn("unload", self._unload(slot))
            # Not cancelled: half-freed models are worse than a wait, and each is bounded.
            await slot.gone.wait()
        await self._unloads.close()
