"""The models in memory: loaded on demand, shared, kept alive, and put away for others."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import structlog

from osync.backend.engine.runner import EngineRunner, Load, accelerators
from osync.backend.engine.slot import Slot, identity, needed
from osync.config import Settings
from osync.coordinator.generation import SERVER_BUSY
from osync.coordinator.runner import DEFAULT_CONTEXT, MAX_BATCH, RunnerSettings, too_large
from osync.core.memory import budget
from osync.core.residency import Fits, Footprint, Never, Resident, Unload, make_room
from osync.engine.llama import threads_for
from osync.engine.store import StoredModel
from osync.engine.template import ChatTemplate
from osync.errors import BadRequest, CapacityError, ConfigError, ModelUnusable, OsyncError
from osync.net.tasks import Tasks
from osync.wire.options import RunnerOptions, parse_lifetime

log = structlog.get_logger("osync.engine")

DEFAULT_MODELS = 3  # Ollama's number without a GPU
CLOSE_TIMEOUT_S = 5.0  # llama.cpp finishes the evaluation that it is in


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
        self._waiting = 0
        """Requests that wait until a model that is to go is gone, to load it anew."""
        self._closed = False
        self.has_gpu = False

    @property
    def loaded(self) -> tuple[Slot, ...]:
        """Models in memory; one that is to go is, until its last request has ended."""
        return tuple(s for s in self._slots.values() if s.runner is not None and not s.is_unloading)

    @property
    def active(self) -> int:
        """Requests that models work on."""
        return sum(s.active for s in self._slots.values())

    @property
    def queued(self) -> int:
        """Requests that wait: for a model's load, for one of its places, or for one that is to go."""
        return self._waiting + sum(s.queued for s in self._slots.values())

    def runner_settings(self, model: StoredModel, options: RunnerOptions) -> RunnerSettings:
        """Complete what a request asks for with the daemon's settings."""
        trained = model.header.context_length or DEFAULT_CONTEXT
        wanted = options.num_ctx if options.num_ctx is not None and options.num_ctx > 0 else 0
        length = wanted or self._settings.context_window or DEFAULT_CONTEXT
        layers = 0 if self._settings.device == "cpu" else -1
        if layers:
            layers = options.num_gpu if options.num_gpu is not None and options.num_gpu >= 0 else self._settings.num_gpu
        devices = accelerators(self._settings)
        if options.main_gpu is not None and options.main_gpu >= 0:
            devices = replace(devices, main_gpu=options.main_gpu)
        return RunnerSettings(
            context_length=max(4, min(length, trained)),
            parallel=self._settings.parallel,
            threads=threads_for(max(0, options.num_thread or 0) or self._settings.threads),
            n_batch=max(1, min(options.num_batch or MAX_BATCH, MAX_BATCH)),
            flash_attention=self._settings.flash_attention,
            kv_type=self._settings.kv_cache_type,
            accelerators=devices,
            memory_lock=self._settings.memory_lock,
            use_mmap=options.use_mmap is not False,
            gpu_layers=layers,
            max_queue=self._settings.max_queue,
            load_timeout_s=min(self._load_timeout_s, 1e9),
            deterministic=self._settings.deterministic,
            embeds="completion" not in model.info.capabilities,
            stages=options.stages or 0,
            shards=options.shards or (),
            activation_dtype=options.activation_dtype or "",
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
                self._check_queue(None)
                return self._begin(model, options)
            if not slot.is_closing and self._suits(slot, model, options):
                self._check_queue(slot)
                return slot
            self._check_queue(None)
            if not slot.is_closing:
                log.info("model_reload", model=model.info.name, waits_for=slot.users)
                slot.is_closing = True
                self._idle(slot)
            self._waiting += 1
            self._on_change()
            try:
                await slot.changed.wait()
            finally:
                self._waiting -= 1
                self._on_change()

    def _check_queue(self, slot: Slot | None) -> None:
        """Refuse what would wait behind a full queue.

        A loaded model takes those that it works on, and a queue. All that wait for loads are one queue, which
        takes as many: whether a model is warm makes no difference to how many may ask for it.
        """
        most = self._settings.max_queue
        if slot is not None and slot.runner is not None:
            is_full = slot.users >= most + slot.runner.parallel
        else:
            pending = self._waiting + sum(s.users for s in self._slots.values() if s.runner is None)
            is_full = pending >= most + self._settings.parallel
        if is_full:
            raise CapacityError(SERVER_BUSY)

    def _suits(self, slot: Slot, model: StoredModel, options: RunnerOptions) -> bool:
        """Tell whether a slot is what a request asks for; what it leaves open suits it as it is."""
        if slot.model.header is not model.header:  # the store reads a header again once its file has changed
            return False
        wanted, has = self.runner_settings(model, options), slot.settings
        if options.num_ctx:
            is_length_right = has.context_length == wanted.context_length
        else:  # what one client made smaller must not cut the prompts of all others
            is_length_right = has.context_length >= wanted.context_length
        return (
            is_length_right
            and (not options.num_batch or has.n_batch == wanted.n_batch)
            and (not options.num_thread or has.threads == wanted.threads)
            and (options.use_mmap is None or has.use_mmap == wanted.use_mmap)
            and (options.num_gpu is None or options.num_gpu < 0 or has.gpu_layers == wanted.gpu_layers)
            and (options.stages is None or has.stages == wanted.stages)
            and (options.shards is None or has.shards == wanted.shards)
            and (options.activation_dtype is None or has.activation_dtype == wanted.activation_dtype)
            and (options.main_gpu is None or options.main_gpu < 0 or has.accelerators == wanted.accelerators)
        )

    def suiting(self, model: StoredModel, options: RunnerOptions) -> bool:
        """True if the model is in memory, or on its way there, as a request asks for it."""
        slot = self._slots.get(model.path)
        return slot is not None and not slot.is_closing and self._suits(slot, model, options)

    def _begin(self, model: StoredModel, options: RunnerOptions) -> Slot:
        slot = Slot(
            model,
            self.runner_settings(model, options),
            self._default_keep_alive_s,
            asyncio.get_running_loop().create_future(),
            identity(model.path),
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
            # Loads come one after the other, in the order in which they were asked for. The time that one may
            # take begins with its turn: waiting for a long answer of another model is no fault of this one.
            async with self._loading:
                room = await self._make_room(slot)
                began = time.monotonic()
                async with asyncio.timeout(None if self._load_timeout_s == math.inf else self._load_timeout_s):
                    runner = await self._load(slot.model.path, replace(slot.settings, memory=room))
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
        if slot.settings.embeds:
            return
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

    async def _make_room(self, slot: Slot) -> int:
        """Unload others until there is room; returns the bytes that the model may take, 0: no bound is known.

        Raises ModelUnusable if it does not fit even alone, and CapacityError once nobody waits for it any more.
        """
        most = self._settings.max_loaded_models or DEFAULT_MODELS
        victims: list[Slot] = []
        is_bound = not (self.has_gpu and slot.settings.gpu_layers != 0)  # else it is decided layer by layer
        while True:
            if not slot.users:
                self._spare(victims)
                raise CapacityError("nobody waits for the model any more")
            others = {s.model.path: s for s in self._slots.values() if s.runner is not None or s.is_unloading}
            residents = [
                Resident(path, s.footprint(), s.users, s.last_used, s.is_closing) for path, s in others.items()
            ]
            need = needed(slot) if is_bound else Footprint()
            free = self._available_memory() + sum(r.footprint.own for r in residents)
            limit = budget(self._settings.memory, free) if is_bound else sys.maxsize
            self._freed.clear()
            decision = make_room(residents, need, limit, most)
            if isinstance(decision, Fits):
                return decision.room if is_bound else 0
            if isinstance(decision, Never):
                raise ModelUnusable(too_large(decision.need, decision.limit))
            if isinstance(decision, Unload):
                victim = others[Path(str(decision.key))]
                log.info("model_evicted", model=victim.model.info.name, by=slot.model.info.name)
                victim.is_closing = True
                victims.append(victim)
                self._idle(victim)
                continue
            await self._freed.wait()

    def _spare(self, victims: Collection[Slot]) -> None:
        """Let those stay after all that were to make room and are still in use."""
        for victim in victims:
            if not victim.is_unloading:
                victim.is_closing = False
                victim.changed.set()
                victim.changed.clear()
                self._idle(victim)

    def put_away_idle(self) -> None:
        """Unload what nobody uses, whatever its lifetime."""
        for slot in list(self._slots.values()):
            if slot.runner is not None and not slot.users and not slot.is_closing:
                log.info("model_evicted", model=slot.model.info.name)
                slot.is_closing = True
                self._idle(slot)

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
        if not slot.users and not slot.ready.done():
            self._freed.set()  # its load may find that nobody waits for it
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
            slot.changed.set()
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
