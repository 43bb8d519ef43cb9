"""Where models lie on disk: names of files, directories of GGUF files, the layout of Ollama's store."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import structlog

from osync.errors import BadRequest, ModelUnusable
from osync.wire import names

log = structlog.get_logger("osync.engine")

MAX_FILES = 10_000  # per directory: a wrong --models-dir such as / must not keep the daemon busy
MAX_DEPTH = 4
MAX_MANIFEST = 4 << 20
MAX_LAYER = 4 << 20  # licences and templates; the weights are not read here

_QUANT = re.compile(
    r"[.\-_]((?:UD-)?(?:I?Q[1-8]_[0-9A-Z]+(?:_[A-Z]+)*|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4|TQ[12]_0))$",
    re.IGNORECASE,
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
LAYER = "application/vnd.ollama.image."
TEXT_LAYERS = ("template", "prompt", "system", "params", "messages", "license")


def file_name(file: str) -> tuple[str, str]:
    """Split a GGUF file's name into model and tag: `Smol.Q4_1.gguf` into `smol` and `q4_1`; no tag: ""."""
    stem = file[:-5] if file.lower().endswith(".gguf") else file
    stem = _PART.sub("", stem)
    match = _QUANT.search(stem)
    tag = ""
    if match and match.start() > 0:
        tag = match.group(1).lower().replace("fp16", "f16").replace("fp32", "f32")
        stem = stem[: match.start()]
    return sanitise(stem.lower()), sanitise(tag) if tag else ""


def sanitise(text: str) -> str:
    """Replace what a model's name may not contain."""
    text = re.sub(r"[^a-z0-9_.\-]+", "-", text.lower())[:80]
    return re.sub(r"^[^a-z0-9_]+", "", text) or "model"


def gguf_files(directory: Path) -> Iterator[Path]:
    """Yield GGUF files below a directory, or the one that it is; of split files only the first part."""
    if directory.is_file():
        yield directory
        return
    count = 0
    for place, below, files in os.walk(directory, followlinks=False):
        depth = len(Path(place).relative_to(directory).parts)
        below[:] = sorted(d for d in below if not d.startswith(".") and d not in {"blobs", "manifests"})
        if depth >= MAX_DEPTH:
            below.clear()
        for file in sorted(files):
            count += 1
            if count > MAX_FILES:
                log.warning("too_many_files", directory=str(directory), limit=MAX_FILES)
                return
            if file.lower().endswith(".gguf") and not file.startswith("."):
                part = _PART.search(file[:-5])
                if part is None or int(part.group(1)) == 1:
                    yield Path(place) / file


def manifests(directory: Path) -> Iterator[tuple[Path, names.ModelName]]:
    """Yield manifests of an Ollama store: manifests/<host>/<namespace>/<model>/<tag>."""
    root = directory / "manifests"
    for count, path in enumerate(sorted(root.glob("*/*/*/*"))):
        if count >= MAX_FILES:
            log.warning("too_many_files", directory=str(root), limit=MAX_FILES)
            return
        if path.is_file() and not path.name.startswith("."):
            host, namespace, model, tag = path.relative_to(root).parts
            with contextlib.suppress(BadRequest):
                yield path, names.parse(f"{host}/{namespace}/{model}:{tag}")


def blob_path(directory: Path, digest: str) -> Path:
    """Return where a blob lies. Raises ModelUnusable for what is no digest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ModelUnusable(f"{digest[:80]!r} is not a digest")
    return directory / "blobs" / f"sha256-{match.group(1)}"


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole small file. Raises ModelUnusable over the limit."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelUnusable(f"{path.name} is over {limit >> 20} MiB")
    return data


def read_start(path: Path, count: int) -> bytes:
    """Read the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(count)


def total_size(path: Path, first: int) -> int:
    """Return the size of all parts of a split file. Raises ModelUnusable if one is missing."""
    part = _PART.search(path.stem)
    if part is None:
        return first
    count = int(part.group(2))
    total = first
    for number in range(2, count + 1):
        other = path.with_name(f"{path.stem[: part.start()]}-{number:05d}-of-{count:05d}{path.suffix}")
        try:
            total += other.stat().st_size
        except OSError as error:
            raise ModelUnusable(f"{path.name}: part {number} of {count} is missing: {other.name}") from error
    return total


def decode(raw: bytes) -> str:
    """Return text; what is no UTF-8 becomes U+FFFD."""
    return raw.decode(errors="replace")


def json_object(texts: list[bytes]) -> dict[str, Any]:
    """Merge JSON objects, later ones over earlier; what is none is left out."""
    merged: dict[str, Any] = {}
    for text in texts:
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(text)
            if isinstance(value, dict):
                merged.update(value)
    return merged


def json_messages(texts: list[bytes]) -> tuple[dict[str, Any], ...]:
    """Join JSON arrays of objects; what is none is left out."""
    messages: list[dict[str, Any]] = []
    for text in texts:
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(text)
            if isinstance(value, list):
                messages.extend(m for m in value if isinstance(m, dict))
    return tuple(messages)
