"""The first load of a file happens in a process that may die of it: llama.cpp aborts on some content.

`gguf.py` refuses what can be seen to be wrong. What is left depends on what each architecture's code in llama.cpp
asserts (types of norms, words of vocabularies, sizes that contradict each other), so it is tried.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import orjson
import structlog

from osync.engine import trial_worker
from osync.engine.child import Child, spawn
from osync.errors import ModelUnusable

log = structlog.get_logger("osync.engine")

_MAX_KNOWN = 1000
_TAIL = 16 << 10
_ANSWER = 64 << 10
_TELLING = (
    r"GGML_ASSERT\(.*",
    r"what\(\): .*",
    r"terminate called.*",
    r"[^/]*(?:failed|fatal error|unsupported|abort).*",
)
"""What a dying llama.cpp prints, the most telling first; without the path of its source."""

Stamp = tuple[int, int]


class Trials:
    """Remembers by path, time and size how each file's trial went."""

    def __init__(self, command: tuple[str, ...] = ()) -> None:
        self._command = command or (sys.executable, "-I", str(Path(trial_worker.__file__)))
        self._known: dict[Path, tuple[Stamp, str]] = {}

    async def check(self, path: Path, deadline_s: float = 300.0) -> None:
        """Return if llama.cpp survives the file. Raises ModelUnusable if not, or in `deadline_s`."""
        try:
            stat = await asyncio.to_thread(path.stat)
        except OSError as error:
            raise ModelUnusable(f"cannot read {path.name}: {error.strerror}") from error
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            fault = await self._try(path, deadline_s)
            if len(self._known) >= _MAX_KNOWN:
                del self._known[next(iter(self._known))]
            known = self._known[path] = (stamp, fault)
        if known[1]:
            raise ModelUnusable(known[1])

    async def _try(self, path: Path, deadline_s: float) -> str:
        """Return what is wrong with the file, "" if nothing is. Raises ModelUnusable where that is not known."""
        try:
            # GGML would start a debugger where its process breaks.
            env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
            process = await spawn(*self._command, str(path), stderr=True, env=env)
        except OSError as error:
            raise ModelUnusable(f"no process to try {path.name} in: {error}") from error
        assert process.stderr is not None
        try:
            async with asyncio.timeout(deadline_s):
                said, written, _ = await asyncio.gather(
                    _tail(process.stdout, _ANSWER), _tail(process.stderr, _TAIL), process.wait()
                )
        except TimeoutError:
            raise ModelUnusable(f"timed out loading {path.name} after {deadline_s:g} s") from None
        finally:
            await _end(process)
        return _verdict(path.name, process.returncode or 0, said, written)


async def _tail(stream: asyncio.StreamReader, limit: int) -> bytes:
    """Read to the end, keep the last `limit` bytes."""
    kept = b""
    while piece := await stream.read(limit):
        kept = (kept + piece)[-limit:]
    return kept


async def _end(process: Child) -> None:
    process.close()
    await process.wait()


def _verdict(name: str, code: int, said: bytes, written: bytes) -> str:
    """Say what a trial's end means. Raises ModelUnusable where it is not the file's fault."""
    if code == 0:
        try:
            answer = orjson.loads(said)
            return f"cannot load {name}: {answer['refused']}" if "refused" in answer else ""
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass
    if code == -signal.SIGKILL:  # the system's own way out of low memory: next time may be better
        raise ModelUnusable(f"loading {name} was killed by the system; is there enough memory?")
    lines = written.decode("utf-8", "replace").splitlines()
    found = [match.group() for telling in _TELLING for line in lines if (match := re.search(telling, line))]
    why = (found or lines[-1:] or ["it does not say why"])[0].strip()[:300]
    log.warning("model_trial_died", file=name, code=code, why=why)
    if code > 0 and not found:  # the process itself could not work
        raise ModelUnusable(f"{name} could not be tried: {why}")
    return f"cannot load {name}: llama.cpp breaks on it: {why}"
