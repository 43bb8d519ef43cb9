"""A thread of its own for blocking llama.cpp calls, awaited from the event loop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_Call = tuple[Callable[[], Any], asyncio.AbstractEventLoop | None, "asyncio.Future[Any] | None"]


SWITCH_S = 0.0005
"""After so long a thread that holds the interpreter gives it to one that waits. Python's 5 ms would have the engine
wait, with a frame in hand, until the event loop has written all tokens of the last one."""

_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    # A thread in llama.cpp that comes back to an interpreter being torn down takes the process with it.
    for thread in list(_threads):
        thread.close()
        thread.join(2.0)


class EngineThread:
    """Runs calls one after the other in one thread; ctypes releases the GIL while they are in C."""

    def __init__(self, name: str) -> None:
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        # Its callers bound it: each awaits its call before it makes the next.
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        _threads.add(self)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread. Cancelled while it runs, it runs to its end and nobody hears of it."""
        return await self.begin(work)

    def begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Have `work` run in the thread; the future is the running loop's."""
        if self._closed:
            raise RuntimeError(f"thread {self._thread.name} is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put((work, loop, future))
        return future

    def post(self, work: Callable[[], object]) -> None:
        """Have `work` run after the calls before it; nobody hears how it went."""
        self._calls.put((work, None, None))

    def close(self) -> None:
        """End the thread after the calls that it has; does not wait."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)

    def join(self, timeout_s: float) -> None:
        """Block until the thread has ended, or the time is over."""
        self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """True until the thread has ended."""
        return self._thread.is_alive()

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            work, loop, future = call
            del call
            if future is not None and future.cancelled():
                continue
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:  # handed to who awaits it
                error = raised
            if loop is not None and future is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(_settle, future, result, error)
            del work, future, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
