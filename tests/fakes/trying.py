"""Gives many files to llama.cpp: `python -m tests.fakes.trying trial|load`, a path a line on stdin.

`trial` tries each in a forked process of its own, as the daemon does in a new one. `load` loads and uses
one after the other in this process, which must live. Each answers with "RESULT path" lines on stdout.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path


def trial(path: str) -> str:
    """Return PASSED, REFUSED or DIED."""
    from osync.engine import trial_worker

    child = os.fork()
    if child == 0:
        signal.alarm(60)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(3 if trial_worker.try_file(path) else 0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {0: "PASSED", 3: "REFUSED"}.get(code, "DIED")


async def load(path: str) -> str:
    """Load as the daemon does and answer a request; return ANSWERED or REFUSED."""
    from osync.coordinator.runner import Runner, RunnerSettings
    from osync.engine.sampling import SamplingOptions
    from osync.errors import OsyncError

    try:
        runner = await Runner.load(Path(path), RunnerSettings(context_length=64, parallel=2, threads=1, n_batch=32))
    except OsyncError:
        return "REFUSED"
    try:
        prompt = await runner.tokenize("Hello then, h\u00e9llo \u4e16\u754c \U0001f600\n")
        prompt = [0, *prompt][:40]
        async for _ in runner.generate(prompt, SamplingOptions(num_predict=4, seed=1)):
            pass
        return "ANSWERED"
    except OsyncError:
        return "REFUSED"
    finally:
        await runner.close()


async def _load_all(paths: list[str]) -> None:
    for path in paths:
        print("BEGIN", path, flush=True)
        print(await load(path), path, flush=True)


def main() -> None:
    """Do as the first argument says with all files of stdin."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    paths = sys.stdin.read().split("\n")
    if sys.argv[1] == "trial":
        import llama_cpp.llama_cpp  # noqa: F401 - once, not in each child

        for path in paths:
            print(trial(path), path, flush=True)
    else:
        asyncio.run(_load_all(paths))


if __name__ == "__main__":
    main()
