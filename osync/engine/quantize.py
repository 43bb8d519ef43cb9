"""Makes the quantization that the settings prefer of full-precision files, once, and keeps it.

Blocking: call `make` in a thread. What is made lies in `<state-dir>/quantized/`, by source and its state.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from osync.engine.llama import cores
from osync.errors import ModelUnusable

log = structlog.get_logger("osync.engine")

TIME_LIMIT_S: Final = 3600.0
_POLL_S: Final = 0.1
_KEEP_FREE: Final = 1 << 30
"""Bytes of the disk that are not used up."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was when it was looked at."""

    path: Path
    mtime_ns: int
    size: int


class Quantizer:
    """Knows where the quantized form of a file lies, and makes it."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.kind = kind.lower()
        self._directory = directory
        self._failed: set[Source] = set()

    def target(self, source: Source) -> Path:
        """Return where a file's quantized form lies once it is made; another state of the file, another place."""
        return self._directory / f"{self._stem(source)}.{self._stamp(source)}.{self.kind.upper()}.gguf"

    def _stem(self, source: Source) -> str:
        place = hashlib.sha256(os.fsencode(source.path)).hexdigest()[:12]
        return f"{source.path.stem[:60]}-{place}"

    @staticmethod
    def _stamp(source: Source) -> str:
        return hashlib.sha256(f"{source.mtime_ns} {source.size}".encode()).hexdigest()[:12]

    def has_failed(self, source: Source) -> bool:
        """Tell whether it was tried in vain; only another state of the file is tried again."""
        return source in self._failed

    def make(self, source: Source, stop: threading.Event) -> Path | None:
        """Quantize a file; ends early with None once `stop` is set. Raises ModelUnusable, and never tries again."""
        target = self.target(source)
        if target.is_file():
            return target
        began = time.monotonic()
        log.info("quantizing", file=source.path.name, to=self.kind, size_bytes=source.size)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._clear(source)
            if shutil.disk_usage(self._directory).free < source.size + _KEEP_FREE:
                raise ModelUnusable(f"cannot quantize {source.path.name}: the disk of {self._directory} is too full")
            # The name does not end in .gguf, so that half a file is never taken for a model.
            with tempfile.TemporaryDirectory(prefix=".making-", dir=self._directory) as place:
                made = Path(place) / "model.part"
                if not self._run(source, made, stop):
                    return None
                self._settle(made, target)
        except ModelUnusable as error:
            self._failed.add(source)
            log.error("quantize_failed", file=source.path.name, to=self.kind, error=str(error))
            raise
        except OSError as error:
            self._failed.add(source)
            log.error("quantize_failed", file=source.path.name, to=self.kind, error=str(error))
            raise ModelUnusable(f"cannot quantize {source.path.name}: {error}") from error
        seconds = round(time.monotonic() - began, 1)
        log.info("quantized", file=target.name, size_bytes=target.stat().st_size, seconds=seconds)
        return target

    def _run(self, source: Source, made: Path, stop: threading.Event) -> bool:
        arguments = [str(source.path), str(made), self.kind, str(max(1, cores() - 1))]
        # A file for stderr: a pipe that nobody reads fills up and stops the process.
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "osync.engine.quantize_worker", *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
            try:
                deadline = time.monotonic() + TIME_LIMIT_S
                while process.poll() is None:
                    if stop.wait(_POLL_S):
                        return False
                    if time.monotonic() > deadline:
                        raise ModelUnusable(f"quantizing {source.path.name} took longer than {TIME_LIMIT_S:g} s")
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            errors.seek(0)
            said = errors.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
        if process.returncode:
            why = said[-1] if said else f"its process ended with {process.returncode}"
            raise ModelUnusable(f"cannot quantize {source.path.name}: {why}")
        return True

    @staticmethod
    def _settle(made: Path, target: Path) -> None:
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(target)

    def _clear(self, source: Source) -> None:
        """Remove what was made of former states of the file, and what a killed daemon left half done."""
        for path in self._directory.glob(f"{glob.escape(self._stem(source))}.*.{self.kind.upper()}.gguf"):
            with contextlib.suppress(OSError):
                path.unlink()
        for place in self._directory.glob(".making-*"):
            shutil.rmtree(place, ignore_errors=True)


def source_of(path: Path) -> Source:
    """Look at a file. Raises OSError."""
    stat = path.stat()
    return Source(path, stat.st_mtime_ns, stat.st_size)
