"""Child processes of the engine: started in a thread, on both kinds of event loop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from osync.engine.child import spawn
from osync.engine.template import ChatTemplate

ECHO = (sys.executable, "-I", "-c", "import sys; sys.stderr.write('e'); sys.stdout.write(sys.stdin.read()[::-1])")
SLEEPER = (sys.executable, "-I", "-c", "import sys; print(flush=True); sys.stdin.read(); import time; time.sleep(60)")
LOOPS = ["asyncio"]
try:
    import uvloop

    LOOPS.append("uvloop")
except ModuleNotFoundError:
    pass


def run(kind: str, main: Callable[[], Any]) -> None:
    uvloop.run(main()) if kind == "uvloop" else asyncio.run(main())


@pytest.fixture
def starters(monkeypatch: pytest.MonkeyPatch) -> list[tuple[threading.Thread, subprocess.Popen[bytes]]]:
    """Processes that were started, each with the thread that did."""
    found: list[tuple[threading.Thread, subprocess.Popen[bytes]]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append((threading.current_thread(), self))

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return found


Starters = list[tuple[threading.Thread, "subprocess.Popen[bytes]"]]


@pytest.mark.parametrize("kind", LOOPS)
def test_it_starts_in_a_thread_and_talks_through_pipes(kind: str, starters: Starters) -> None:
    async def main() -> None:
        child = await spawn(*ECHO, stderr=True)
        assert child.returncode is None
        child.stdin.write(b"abc")
        await child.stdin.drain()
        child.stdin.close()
        assert child.stderr is not None
        assert (await child.stdout.read(), await child.stderr.read()) == (b"cba", b"e")
        assert await child.wait() == child.returncode == 0
        child.close()

    run(kind, main)
    assert [thread is threading.main_thread() for thread, _ in starters] == [False]


@pytest.mark.parametrize("kind", LOOPS)
def test_closing_and_killing_end_it(kind: str) -> None:
    async def main() -> None:
        for end in ("kill", "close"):
            child = await spawn(*SLEEPER)
            assert await child.stdout.readline() == b"\n"
            getattr(child, end)()
            async with asyncio.timeout(10):
                assert await child.wait() == -signal.SIGKILL
            child.kill()
            child.close()

    run(kind, main)


async def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        await spawn("/nonexistent/program")


async def test_who_leaves_during_the_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go, ended = threading.Event(), threading.Event(), asyncio.Event()
    loop, found = asyncio.get_running_loop(), []

    class Slow(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            entered.set()
            assert go.wait(10)
            super().__init__(*args, **options)
            found.append(self)

        def wait(self, timeout: float | None = None) -> int:
            code: int = super().wait(timeout)
            loop.call_soon_threadsafe(ended.set)
            return code

    monkeypatch.setattr(subprocess, "Popen", Slow)
    task = asyncio.create_task(spawn(*SLEEPER))
    await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    async with asyncio.timeout(10):
        await ended.wait()
    assert [process.returncode for process in found] == [-signal.SIGKILL]


async def test_a_chat_templates_process_does_not_start_in_the_loops_thread(starters: Starters) -> None:
    template = ChatTemplate(jinja="{{ messages[0].content }}", go="", bos="", eos="")
    try:
        assert await template.render([{"role": "user", "content": "hi"}]) == "hi"
    finally:
        await template.close()
    assert [thread is threading.main_thread() for thread, _ in starters] == [False]
    assert starters[0][1].returncode == 0
