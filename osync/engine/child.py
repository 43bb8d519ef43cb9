"""Child processes whose start does not hold the event loop up.

uvloop forks in the loop's thread, and a fork copies the page tables of all memory: 130 to 260 ms with a KV cache of
755 MB. `subprocess` uses vfork, which copies nothing, and here it does so in a thread.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping
from subprocess import DEVNULL, PIPE


class Child:
    """A process of its own session with pipes to it; its owner waits for its end, and closes it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._transports: list[asyncio.BaseTransport] = []
        self.stdin: asyncio.StreamWriter
        self.stdout: asyncio.StreamReader
        self.stderr: asyncio.StreamReader | None = None

    async def connect(self) -> None:
        """Open the pipes to the loop."""
        process = self._process
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, process.stdin)
        self._transports.append(transport)
        self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        self.stdout = await self._reader(process.stdout)
        if process.stderr is not None:
            self.stderr = await self._reader(process.stderr)

    async def _reader(self, pipe: object) -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        self._transports.append(transport)
        return reader

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it at once; nothing where it has ended."""
        self._process.kill()

    async def wait(self) -> int:
        """Return its exit status once it has ended."""
        if self._process.poll() is None and hasattr(os, "pidfd_open"):
            await _readable(os.pidfd_open(self._process.pid))
        return await asyncio.to_thread(self._process.wait)

    def close(self) -> None:
        """Close the pipes; a process that still runs ends at once."""
        if self._process.poll() is None:
            self._process.kill()
        for transport in self._transports:
            transport.close()


async def spawn(*command: str, stderr: bool = False, env: Mapping[str, str] | None = None) -> Child:
    """Start a process with pipes to its stdin and stdout, and to its stderr if asked. Raises OSError."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own programs
            command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=PIPE if stderr else DEVNULL, env=env,
            start_new_session=True,
        )  # fmt: skip

    loop = asyncio.get_running_loop()
    starting = loop.run_in_executor(None, start)
    try:
        child = Child(await asyncio.shield(starting))
    except asyncio.CancelledError:
        starting.add_done_callback(_discard)
        raise
    try:
        await child.connect()
    except BaseException:
        child.kill()
        child.close()
        raise
    return child


def _discard(starting: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """End a process that nobody waits for any more."""
    if not starting.cancelled() and starting.exception() is None:
        process = starting.result()
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()  # it has been killed: at once


async def _readable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
