"""How Ollama schedules: slots per loaded model, serial loads, a bounded queue for loads, keep_alive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.fault import Gate
from tests.fakes.model import FOREVER_S, FakeModel, rfc3339

BUSY = "server busy, please try again.  maximum pending requests exceeded"
_RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")


class LoadRefused(Exception):
    """The load failed: status and text of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(slots=True)
class Runner:
    """A model in memory."""

    model: FakeModel
    name: str
    options: tuple[Any, ...]
    slots: asyncio.Semaphore
    num_ctx: int
    session_s: float
    users: int = 0
    expires_at: float = 0.0
    timer: asyncio.TimerHandle | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Scheduler:
    """One Ollama's memory. Loads are serial and in order; loaded models wait without bound."""

    def __init__(
        self, *, parallel: int, max_queue: int, max_loaded: int, load_s: float, keep_alive_s: float,
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.parallel, self.max_queue, self.max_loaded = parallel, max_queue, max_loaded
        self.load_s, self.keep_alive_s = load_s, keep_alive_s
        self.context_length = 4096
        self.runners: dict[str, Runner] = {}
        self.pending = 0
        self.loads = 0
        self.gate = Gate()
        self._turn = asyncio.Lock()
        self._changed = changed

    @contextlib.asynccontextmanager
    async def slot(
        self, model: FakeModel, options: dict[str, Any], keep_alive: float | None, refuse_load: bool = False
    ) -> AsyncIterator[float]:
        """Hold one slot of the loaded model; yields the seconds until it was granted."""
        began = time.perf_counter()
        runner = await self.load(model, options, keep_alive, refuse_load)
        try:
            async with runner.slots:
                yield time.perf_counter() - began
        finally:
            self.done(runner)

    async def load(
        self, model: FakeModel, options: dict[str, Any], keep_alive: float | None, refuse: bool = False
    ) -> Runner:
        """Return the model's runner with one user more; give it back by `done`."""
        wanted = tuple(options.get(name) for name in _RUNNER_OPTIONS)
        runner = self.runners.get(model.digest)
        if runner is None or runner.options != wanted:
            if self.pending >= self.max_queue:
                raise LoadRefused(503, BUSY)
            self.pending += 1
            self._changed()
            try:
                async with self._turn:
                    runner = await self._load(model, wanted, refuse)
            finally:
                self.pending -= 1
        runner.users += 1
        runner.idle.clear()
        if runner.timer is not None:
            runner.timer.cancel()
            runner.timer = None
        if keep_alive is not None:
            runner.session_s = keep_alive
        return runner

    async def _load(self, model: FakeModel, wanted: tuple[Any, ...], refuse: bool) -> Runner:
        runner = self.runners.get(model.digest)
        if runner is not None:
            if runner.options == wanted:
                return runner
            await self._evict(runner)
        while self.max_loaded and len(self.runners) >= self.max_loaded:
            victims = sorted(self.runners.values(), key=lambda r: (r.users > 0, r.session_s))
            await self._evict(victims[0])
        if refuse:
            raise LoadRefused(500, "llama runner process has terminated: exit status 2")
        await self.gate.passage()
        if self.load_s:
            await asyncio.sleep(self.load_s)
        num_ctx = min(int(wanted[0] or self.context_length), model.context_length)
        runner = Runner(model, model.name, wanted, asyncio.Semaphore(self.parallel), num_ctx, self.keep_alive_s)
        self.runners[model.digest] = runner
        self.loads += 1
        self._changed()
        return runner

    async def _evict(self, runner: Runner) -> None:
        while runner.users:
            await runner.idle.wait()
        self.unload(runner)

    def done(self, runner: Runner) -> None:
        """Give a runner back; the last user starts its keep_alive."""
        runner.users -= 1
        if not runner.users:
            runner.idle.set()
            if runner.session_s <= 0:
                self.unload(runner)
            else:
                runner.expires_at = time.time() + runner.session_s
                if runner.session_s < FOREVER_S:
                    loop = asyncio.get_running_loop()
                    runner.timer = loop.call_later(runner.session_s, self.unload, runner)
        self._changed()

    def unload(self, runner: Runner) -> None:
        """Forget the runner now."""
        if runner.timer is not None:
            runner.timer.cancel()
        if self.runners.get(runner.model.digest) is runner:
            del self.runners[runner.model.digest]
        self._changed()

    def expire(self, model: FakeModel) -> None:
        """Unload when idle, as keep_alive 0 with an empty prompt does."""
        if runner := self.runners.get(model.digest):
            runner.session_s = 0.0
            runner.expires_at = time.time()
            if not runner.users:
                self.unload(runner)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of /api/ps."""
        runners = sorted(self.runners.values(), key=lambda r: -r.expires_at)
        return [
            {
                "name": r.name,
                "model": r.name,
                "size": r.model.size,
                "digest": r.model.digest,
                "details": r.model.details(),
                "expires_at": rfc3339(r.expires_at or time.time() + min(r.session_s, FOREVER_S)),
                "size_vram": 0,
                "context_length": r.num_ctx,
            }
            for r in runners
        ]

    def close(self) -> None:
        """Cancel the keep_alive timers."""
        for runner in list(self.runners.values()):
            self.unload(runner)
