"""The one place that makes background tasks: each has a name and an owner that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

log = structlog.get_logger("osync.tasks")


class Tasks:
    """Owns background tasks: none outlives `close()`, none fails unheard."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, purpose: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` as the task `owner.purpose`; a failure is logged, and re-raised to who awaits it."""
        task = asyncio.create_task(work, name=f"{self._owner}.{purpose}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), error=repr(error), exc_info=error)

    async def close(self) -> None:
        """Cancel all and wait until each has ended."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
