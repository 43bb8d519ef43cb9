"""What the host of a node has to spare: processor, memory, accelerators."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from typing import Final

import psutil
import structlog

from osync.net.tasks import Tasks
from osync.types import Gpu, HostLoad

log = structlog.get_logger("osync.node")

SAMPLE_S: Final = 1.0
GPU_SAMPLE_S: Final = 5.0
GPU_TIMEOUT_S: Final = 3.0
_QUERY: Final = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")


class HostSampler:
    """Samples the load once a second; `load` is the newest sample."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self.load = HostLoad()
        self._notify = notify
        self._gpus: tuple[Gpu, ...] = ()
        self._tasks = Tasks("host")

    def start(self) -> None:
        """Take the first sample, and begin."""
        psutil.cpu_percent()  # the first answer is always 0: what counts is the time since the call before
        self.load = self._sample()
        self._tasks.spawn("sample", self._run())
        if binary := shutil.which("nvidia-smi"):
            self._tasks.spawn("gpus", self._watch_gpus(binary))

    async def close(self) -> None:
        """End sampling."""
        await self._tasks.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.load = self._sample()
            self._notify()

    def _sample(self) -> HostLoad:
        memory = psutil.virtual_memory()
        return HostLoad(
            cpu_percent=psutil.cpu_percent(),
            cpu_count=os.cpu_count() or 1,
            load_1m=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
            memory_total=memory.total,
            memory_free=memory.available,
            gpus=self._gpus,
        )

    async def _watch_gpus(self, binary: str) -> None:
        while True:
            try:
                self._gpus = await query_gpus(binary)
            except (OSError, TimeoutError, ValueError) as error:
                self._gpus = ()
                log.warning("gpu_query_failed", error=repr(error))
                return
            await asyncio.sleep(GPU_SAMPLE_S)


async def query_gpus(binary: str) -> tuple[Gpu, ...]:
    """Ask nvidia-smi. Raises OSError, TimeoutError or ValueError."""
    process = await asyncio.create_subprocess_exec(
        binary, *_QUERY, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(GPU_TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return parse_gpus(output.decode(errors="replace")) if process.returncode == 0 else ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse lines of name, total and free memory in MiB; memory that is not a number counts as unknown."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3:
            total, free = (int(part) << 20 if part.isdigit() else 0 for part in parts[1:])
            gpus.append(Gpu(parts[0], total, free))
    return tuple(gpus)
