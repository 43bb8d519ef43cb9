"""What a test may leave behind: nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

_FDS = Path("/proc/self/fd")


def open_fds() -> dict[str, str]:
    """Return the open descriptors of this process and what each is; empty where /proc does not tell."""
    found = {}
    if _FDS.is_dir():
        for entry in _FDS.iterdir():
            try:
                what = str(entry.readlink())
            except OSError:
                continue  # the one that listing itself uses
            if not what.startswith("anon_inode:[event"):  # gRPC's threads come and go with one each
                found[entry.name] = what
    return found


def children() -> set[int]:
    """Return the process ids of this process's children."""
    return {child.pid for child in psutil.Process().children()}


async def leaks(fds: dict[str, str], pids: set[int]) -> list[str]:
    """Return what is there beyond `fds` and `pids`, and all other tasks of this loop, once it settled."""
    found: list[str] = []
    for _ in range(100):
        found = [f"task {task}" for task in asyncio.all_tasks() - {asyncio.current_task()}]
        now = open_fds()
        if len(now) > len(fds):
            found += [f"fd {number} {now[number]}" for number in now.keys() - fds.keys()]
        found += [f"child process {pid}" for pid in children() - pids]
        if not found:
            break
        await asyncio.sleep(0.01)
    return found
