"""Writes a planned slice to disk: in order, resumable, every tensor checked.

Beside the unfinished `.part` file lies a `.journal` with the digest of each chunk written; after a cut, what still
has these digests is kept and the rest fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from osync.core.stages import SlicePiece as Piece
from osync.engine.gguf import GGUFHeader
from osync.engine.slice import SlicePlan
from osync.errors import ModelUnusable

log = structlog.get_logger("osync.engine")

Read = Callable[[int, int], Awaitable[bytes]]
"""So many bytes of the source from an offset on."""
CHUNK: Final = 1 << 20
_GAP: Final = 4096
"""Bytes of the source that are read and dropped where that saves a read: padding between tensors."""
_AHEAD: Final = 4
"""Reads under way at once: hides round trips, at 4 MiB of memory."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A run of one piece's bytes, at most CHUNK long."""

    piece: Piece
    start: int
    size: int
    offset: int
    """In the slice."""

    @property
    def is_end(self) -> bool:
        """True if its piece ends with it."""
        return self.start + self.size == self.piece.size

    @property
    def source(self) -> int:
        """Where it is in the source."""
        return (self.piece.source or 0) + self.start


async def write_slice(
    plan: SlicePlan,
    read: Read,
    target: Path,
    *,
    digests: Mapping[str, bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the slice to `target`, which is there whole or not at all; returns how many bytes were read.

    `digests` are SHA-256 of the source's tensors by name. `progress` gets bytes done and of all. Who calls bounds
    `read` in time. Raises ModelUnusable for a damaged tensor, a short source or a full disk, and what `read` raises;
    called again, it goes on from there.
    """
    part = _Part(plan, target, digests or {})
    try:
        return await _write(plan, read, part, progress)
    except BaseExceptionGroup as group:
        raise _first(group) from None
    except OSError as error:
        raise ModelUnusable(f"cannot write {target.name}: {error.strerror or error}") from error
    finally:
        await asyncio.to_thread(part.close)


async def _write(plan: SlicePlan, read: Read, part: _Part, progress: Callable[[int, int], None] | None) -> int:
    kept = await asyncio.to_thread(part.resume)
    chunks = list(_chunks(plan))
    done, total, fetched = sum(chunk.size for chunk in chunks[:kept]), plan.stored_bytes, 0
    if kept:
        log.info("slice_resumed", file=part.target.name, bytes_done=done, bytes_total=total)
    runs = _runs(chunks[kept:])
    waiting: deque[tuple[list[_Chunk], asyncio.Task[bytes] | None]] = deque()
    async with asyncio.TaskGroup() as group:
        while True:
            while len(waiting) < _AHEAD and (run := next(runs, None)):
                task = None
                if run[0].piece.source is not None:
                    size = run[-1].source + run[-1].size - run[0].source
                    task = group.create_task(_fetch(read, run[0].source, size), name="engine.fetch")
                    fetched += size
                waiting.append((run, task))
            if not waiting:
                break
            run, task = waiting.popleft()
            await asyncio.to_thread(part.write, run, await task if task else b"")
            done += sum(chunk.size for chunk in run)
            if progress:
                progress(done, total)
    await asyncio.to_thread(part.finish)
    return fetched


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionError):
        return ModelUnusable(f"cannot write a slice: {error.strerror or error}")
    return error


async def _fetch(read: Read, offset: int, size: int) -> bytes:
    data = await read(offset, size)
    if len(data) != size:
        raise ModelUnusable(f"the source gave {len(data)} bytes at {offset}, not {size}")
    return data


def _chunks(plan: SlicePlan) -> Iterator[_Chunk]:
    """Yield all that is written, in order; holes are not."""
    offset = 0
    for piece in plan.pieces:
        if piece.source is not None or piece.data:
            for start in range(0, piece.size, CHUNK):
                yield _Chunk(piece, start, min(CHUNK, piece.size - start), offset + start)
        offset += piece.size


def _runs(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Join chunks that one read of at most CHUNK bytes gets, made-up bytes between them included."""
    run: list[_Chunk] = []
    begin = end = -1
    for chunk in chunks:
        if chunk.piece.source is None and run:
            run.append(chunk)
            continue
        if run and begin >= 0 and 0 <= chunk.source - end <= _GAP and chunk.source + chunk.size - begin <= CHUNK:
            run.append(chunk)
        else:
            yield from _split(run)
            run, begin = [chunk], chunk.source if chunk.piece.source is not None else -1
        end = chunk.source + chunk.size
    yield from _split(run)


def _split(run: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Take made-up bytes at a run's end off it."""
    count = len(run)
    while count and run[count - 1].piece.source is None:
        count -= 1
    if run[:count]:
        yield run[:count]
    if run[count:]:
        yield run[count:]


class _Part:
    """The unfinished file and its journal. Blocking; one call at a time, `close` excepted."""

    def __init__(self, plan: SlicePlan, target: Path, digests: Mapping[str, bytes]) -> None:
        self.target = target
        self._plan = plan
        self._digests = digests
        self._path = target.with_name(target.name + ".part")
        self._journal_path = target.with_name(target.name + ".journal")
        self._file = self._journal = -1
        self._hash = hashlib.sha256()
        self._piece_entry = 0
        """Where the journal was when the piece under way began."""
        self._lock = threading.Lock()
        self._is_closed = False

    def resume(self) -> int:
        """Open both files; returns how many chunks are there already."""
        with self._lock:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            first, lines = self._plan.fingerprint.encode(), list[bytes]()
            with contextlib.suppress(FileNotFoundError):
                lines = self._journal_path.read_bytes().split(b"\n")[:-1]
            if lines[:1] != [first]:
                lines = []
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not lines:
                os.ftruncate(self._file, 0)  # so that holes are zeros
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.write(self._journal, first + b"\n")
            kept = begin = 0
            for chunk, line in zip(_chunks(self._plan), lines[1:], strict=False):
                if self._is_closed:
                    break
                begin = kept if chunk.start == 0 else begin
                data = os.pread(self._file, chunk.size, chunk.offset)
                if hashlib.sha256(data).hexdigest().encode() != line:
                    break
                if not self._check(chunk, data):
                    kept = begin
                    break
                os.write(self._journal, line + b"\n")
                kept += 1
            return kept

    def write(self, run: list[_Chunk], data: bytes) -> None:
        """Write chunks; `data` is the source from the first one on. Raises ModelUnusable for a damaged tensor."""
        with self._lock:
            if self._is_closed:
                return
            begin = run[0].source
            for chunk in run:
                if chunk.piece.source is None:
                    raw = chunk.piece.data[chunk.start : chunk.start + chunk.size]
                else:
                    raw = data[chunk.source - begin : chunk.source - begin + chunk.size]
                if not self._check(chunk, raw):
                    raise ModelUnusable(f"the tensor {chunk.piece.tensor} came damaged: its digest is not the source's")
                view, at = memoryview(raw), chunk.offset
                while view:
                    count = os.pwrite(self._file, view, at)
                    view, at = view[count:], at + count
                os.write(self._journal, hashlib.sha256(raw).hexdigest().encode() + b"\n")

    def _check(self, chunk: _Chunk, raw: bytes) -> bool:
        """Digest a chunk, in order; False if it ends a tensor that is not the source's, which is then forgotten."""
        if chunk.start == 0:
            self._hash = hashlib.sha256()
            self._piece_entry = os.lseek(self._journal, 0, os.SEEK_CUR)
        if not chunk.piece.tensor:
            return True
        self._hash.update(raw)
        wanted = self._digests.get(chunk.piece.tensor)
        if not chunk.is_end or wanted is None or self._hash.digest() == wanted:
            return True
        os.ftruncate(self._journal, self._piece_entry)
        os.lseek(self._journal, self._piece_entry, os.SEEK_SET)
        return False

    def finish(self) -> None:
        """Put the file in its place, for good."""
        with self._lock:
            if self._is_closed:
                return
            os.ftruncate(self._file, self._plan.size_bytes)
            os.fsync(self._file)
            self._path.replace(self.target)
            self._journal_path.unlink(missing_ok=True)
            directory = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def close(self) -> None:
        """Close both files, after a write that is under way."""
        self._is_closed = True
        with self._lock:
            for descriptor in (self._file, self._journal):
                if descriptor >= 0:
                    os.close(descriptor)
            self._file = self._journal = -1


def tensor_digests(path: Path, header: GGUFHeader) -> dict[str, bytes]:
    """Return the SHA-256 of each tensor of a file; blocking, and as long as reading the file takes."""
    digests: dict[str, bytes] = {}
    with path.open("rb", buffering=0) as file:
        for tensor in sorted(header.tensors, key=lambda t: t.offset):
            digest = hashlib.sha256()
            at, end = tensor.offset, tensor.offset + tensor.size_bytes
            while at < end:
                data = os.pread(file.fileno(), min(CHUNK, end - at), at)
                if not data:
                    raise ModelUnusable(f"{path.name} is truncated: it ends within {tensor.name}")
                digest.update(data)
                at += len(data)
            digests[tensor.name] = digest.digest()
    return digests


def file_reader(path: Path) -> Read:
    """Return a `read` of a file on this host, off the event loop."""

    def at(offset: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    async def read(offset: int, size: int) -> bytes:
        return await asyncio.to_thread(at, offset, size)

    return read
