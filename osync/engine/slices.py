"""Slices kept on disk for the next start: by model and layers, bounded in bytes, the longest unused going first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from osync.engine.slice import SlicePlan
from osync.engine.slice_file import Read, write_slice
from osync.errors import CapacityError, ModelUnusable

log = structlog.get_logger("osync.engine")

_VERSION: Final = 1
"""Of how slices are written; others are removed."""
_NAME = re.compile(r"(?:sha256[:-])?([0-9a-f]{64})\.(\d+)-(\d+)\.v(\d+)\.gguf(\.part|\.journal)?")
_DIGEST = re.compile(r"(?:sha256[:-])?([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class CachedSlice:
    """A slice that is there whole."""

    digest: str
    """Of the model's file: 64 hexadecimal digits."""
    first: int
    last: int
    path: Path
    size_bytes: int
    """On disk: holes take nothing."""
    used: float
    """Unix time."""


class SliceCache:
    """A directory of slices. All of it on one event loop; what blocks runs in threads."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """`limit_bytes` 0: nothing but what is in use is kept."""
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._users: dict[str, int] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._room = asyncio.Lock()
        self._promised: dict[str, int] = {}
        """Bytes on disk that files being written will have."""

    def name(self, digest: str, first: int, last: int) -> str:
        """Return a slice's file name. Raises ModelUnusable for a digest that is none."""
        match = _DIGEST.fullmatch(digest)
        if not match or first < 0 or last <= first:
            raise ModelUnusable(f"layers {first} to {last} of {digest!r} name no slice")
        return f"{match[1]}.{first}-{last}.v{_VERSION}.gguf"

    def entries(self) -> list[CachedSlice]:
        """List what is there whole, the longest unused first; blocking."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                match = _NAME.fullmatch(path.name)
                if match and int(match[4]) == _VERSION and not match[5]:
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        found.append(
                            CachedSlice(match[1], int(match[2]), int(match[3]), path, _on_disk(stat), stat.st_mtime)
                        )
        return sorted(found, key=lambda entry: (entry.used, entry.path.name))

    def find(self, digest: str, first: int, last: int) -> CachedSlice | None:
        """Return a slice if it is there whole; blocking."""
        name = self.name(digest, first, last)
        return next((entry for entry in self.entries() if entry.path.name == name), None)

    @contextlib.asynccontextmanager
    async def use(
        self,
        digest: str,
        plan: SlicePlan,
        read: Read,
        *,
        digests: Mapping[str, bytes] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> AsyncIterator[Path]:
        """Yield the path of a slice, written first where it is not there, and keep it as long as it is used.

        Raises CapacityError where it does not fit beside those in use, and as `write_slice` does.
        """
        name = self.name(digest, plan.first, plan.last)
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with self._locks.setdefault(name, asyncio.Lock()):
                path = self.directory / name
                if not await asyncio.to_thread(_is_whole, path, plan.size_bytes):
                    await self._write(plan, read, path, digests, progress)
                elif progress:
                    progress(plan.stored_bytes, plan.stored_bytes)
                await asyncio.to_thread(os.utime, path)
            yield path
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._locks.pop(name, None)

    @contextlib.asynccontextmanager
    async def hold(self, entry: CachedSlice) -> AsyncIterator[Path]:
        """Yield the path of a slice that is there whole, and keep it as long as it is used."""
        name = entry.path.name
        self._users[name] = self._users.get(name, 0) + 1
        try:
            await asyncio.to_thread(os.utime, entry.path)
            yield entry.path
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

    async def discard(self, entry: CachedSlice) -> None:
        """Remove a slice, as one that is damaged; who has it open keeps what they have."""
        await asyncio.to_thread(entry.path.unlink, missing_ok=True)

    async def _write(
        self,
        plan: SlicePlan,
        read: Read,
        path: Path,
        digests: Mapping[str, bytes] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        async with self._room:
            self._promised[path.name] = plan.stored_bytes
            try:
                await asyncio.to_thread(self._make_room, path.name)
            except BaseException:
                del self._promised[path.name]
                raise
        began = time.monotonic()
        try:
            fetched = await write_slice(plan, read, path, digests=digests, progress=progress)
        finally:
            del self._promised[path.name]
        log.info(
            "slice_written", file=path.name, first=plan.first, last=plan.last, bytes_fetched=fetched,
            seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip

    async def trim(self) -> None:
        """Bring the directory under its limit again, as after a start with a lower one."""
        async with self._room:
            await asyncio.to_thread(self._make_room, "")

    def _make_room(self, wanted: str) -> None:
        """Remove the longest unused until all that is promised fits. Raises CapacityError."""
        used = dict(self._users)
        whole: list[tuple[float, str, int, list[Path]]] = []
        with contextlib.suppress(FileNotFoundError):
            files: dict[str, list[Path]] = {}
            for path in self.directory.iterdir():
                if match := _NAME.fullmatch(path.name):
                    files.setdefault(path.name.removesuffix(match[5] or ""), []).append(path)
            for name, paths in files.items():
                stats = [path.stat() for path in paths]
                whole.append((max(s.st_mtime for s in stats), name, sum(map(_on_disk, stats)), paths))
        # What is being written counts with what it will take, not with what it has.
        kept = sum(size for _, name, size, _ in whole if name not in self._promised)
        need = sum(self._promised.values())
        for _, name, size, paths in sorted(whole):
            stale = int(_NAME.fullmatch(name)[4]) != _VERSION  # type: ignore[index]
            if name in used or name in self._promised or not (stale or kept + need > self.limit_bytes):
                continue
            for path in paths:
                path.unlink(missing_ok=True)
            kept -= size
            log.info("slice_removed", file=name, size_bytes=size)
        if wanted and kept + need > self.limit_bytes:
            raise CapacityError(
                f"a slice of {self._promised[wanted]} bytes does not fit beside {kept + need - self._promised[wanted]} "
                f"bytes of slices in use under --slice-cache {self.limit_bytes}"
            )


def _on_disk(stat: os.stat_result) -> int:
    blocks: int = getattr(stat, "st_blocks", 0)  # absent on Windows
    return min(stat.st_size, blocks * 512) if blocks else stat.st_size


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
