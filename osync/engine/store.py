"""The models that this host has on disk: bare GGUF files and Ollama's own store, side by side.

Blocking: call `scan` and `digest_files` in a thread. `find` and `models` only read the last scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import structlog

from osync.engine.files import (
    LAYER,
    MAX_FILES,
    MAX_LAYER,
    MAX_MANIFEST,
    TEXT_LAYERS,
    blob_path,
    decode,
    file_name,
    gguf_files,
    json_messages,
    json_object,
    manifests,
    read_bounded,
    read_start,
    sanitise,
    total_size,
)
from osync.engine.gguf import GGUFHeader, human_count, read_header
from osync.errors import ModelNotFound, ModelUnusable
from osync.types import ModelInfo
from osync.wire import names

log = structlog.get_logger("osync.engine")

_NO_LANGUAGE_MODELS = {"clip", "mmproj", "adapter", "imatrix"}


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model that can be asked for by name."""

    info: ModelInfo
    path: Path
    header: GGUFHeader
    mtime: float
    """Of the file, or of the manifest; Unix time."""
    system: str = ""
    template: str = ""
    """A Go template, where an Ollama store gives one."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    licenses: tuple[str, ...] = ()
    is_digest_final: bool = True


@dataclass(frozen=True, slots=True)
class _Snapshot:
    models: Mapping[str, StoredModel] = field(default_factory=dict)
    faults: Mapping[str, ModelUnusable] = field(default_factory=dict)


_Stamp = tuple[int, int]


class ModelStore:
    """Looks for models in directories, each of which may hold `.gguf` files, an Ollama store, or both.

    The digest of a bare file is the SHA-256 of its bytes. That takes long for large files, so until
    `digest_files` has run it is the SHA-256 of the header's bytes and the file's size: stable, but
    not equal to the final one. Final digests are kept in the state directory by path, time and size.
    """

    def __init__(self, directories: tuple[Path, ...], state_dir: Path | None = None) -> None:
        self._directories = directories
        self._cache_file = state_dir / "digests.json" if state_dir else None
        self._lock = threading.Lock()
        self._snapshot = _Snapshot()
        self._headers: dict[Path, tuple[_Stamp, GGUFHeader | ModelUnusable]] = {}
        self._layers: dict[str, bytes] = {}
        self._partial: dict[Path, tuple[_Stamp, str]] = {}
        self._digests: dict[str, tuple[int, int, str]] | None = None
        self._reported: set[Path] = set()

    @property
    def models(self) -> tuple[StoredModel, ...]:
        """All usable models of the last scan, newest first."""
        return tuple(sorted(self._snapshot.models.values(), key=lambda m: (-m.mtime, len(m.info.name))))

    def find(self, name: str) -> StoredModel:
        """Look a name up in the last scan. Raises BadRequest, ModelNotFound, or a broken file's ModelUnusable."""
        key = names.canonical(name)
        snapshot = self._snapshot
        if (model := snapshot.models.get(key)) is not None:
            return model
        if (fault := snapshot.faults.get(key)) is not None:
            raise ModelUnusable(str(fault))
        raise ModelNotFound(f"model '{name}' not found")

    def scan(self) -> bool:
        """Look at the directories again; returns True if what there is has changed."""
        with self._lock:
            models: dict[str, StoredModel] = {}
            faults: dict[str, ModelUnusable] = {}
            bare: dict[str, list[str]] = {}
            seen: set[Path] = set()
            for directory in self._directories:
                for path in gguf_files(directory):
                    seen.add(path)
                    self._add_file(path, models, faults, bare)
                for path, name in manifests(directory):
                    self._add_manifest(directory, path, name, models, faults, seen)
            for stem, tagged in bare.items():
                self._add_alias(stem, tagged, models, faults)
            self._headers = {p: v for p, v in self._headers.items() if p in seen}
            self._partial = {p: v for p, v in self._partial.items() if p in seen}
            before, self._snapshot = self._snapshot, _Snapshot(models, faults)
            is_same = {k: m.info for k, m in before.models.items()} == {k: m.info for k, m in models.items()}
            return not is_same

    def _add_file(
        self,
        path: Path,
        models: dict[str, StoredModel],
        faults: dict[str, ModelUnusable],
        bare: dict[str, list[str]],
    ) -> None:
        stem, tag = file_name(path.name)
        try:
            stat = path.stat()
            header = self._header(path, stat)
            size = total_size(path, stat.st_size)
            _check_language_model(path, header)
        except (OSError, ModelUnusable) as error:
            fault = self._report(path, error)
            faults.setdefault(names.key(f"{stem}:{tag}" if tag else stem), fault)
            faults.setdefault(names.key(stem), fault)
            return
        name = names.parse(f"{stem}:{tag or sanitise(header.quantization.lower())}")
        if name.canonical in models:
            return
        digest, is_final = self._digest(path, stat, header)
        info = _info(name.display, digest, size, stat.st_mtime, header)
        models[name.canonical] = StoredModel(info, path, header, stat.st_mtime, is_digest_final=is_final)
        bare.setdefault(names.canonical(stem), []).append(name.canonical)

    @staticmethod
    def _add_alias(
        stem: str, tagged: list[str], models: dict[str, StoredModel], faults: dict[str, ModelUnusable]
    ) -> None:
        if len(tagged) == 1 and stem not in models:
            model = models[tagged[0]]
            models[stem] = replace(model, info=replace(model.info, name=names.display(stem)))
        faults.pop(stem, None)

    def _add_manifest(
        self,
        directory: Path,
        path: Path,
        name: names.ModelName,
        models: dict[str, StoredModel],
        faults: dict[str, ModelUnusable],
        seen: set[Path],
    ) -> None:
        if name.canonical in models:
            return
        try:
            raw = read_bounded(path, MAX_MANIFEST)
            layers, config = self._manifest(directory, raw, path)
            weights = layers.get("model")
            if not weights:
                raise ModelUnusable("its manifest names no GGUF weights")
            blob, total = weights[0]
            if not blob.is_file():
                raise ModelUnusable(f"its weights are missing: {blob.name}; pull it again")
            seen.add(blob)
            header = self._header(blob, blob.stat())
            _check_language_model(path, header)
            mtime = path.stat().st_mtime
            info = _info(name.display, hashlib.sha256(raw).hexdigest(), total, mtime, header, config)
            texts = {kind: [self._layer(p) for p, _ in layers.get(kind, ())] for kind in TEXT_LAYERS}
            models[name.canonical] = StoredModel(
                info,
                blob,
                header,
                mtime,
                system="\n".join(decode(t) for t in texts["system"]),
                template=decode((texts["template"] or texts["prompt"] or [b""])[-1]),
                parameters=json_object(texts["params"]),
                messages=json_messages(texts["messages"]),
                licenses=tuple(decode(t) for t in texts["license"]),
            )
        except (OSError, ModelUnusable) as error:
            faults.setdefault(name.canonical, self._report(path, ModelUnusable(f"{name.display}: {error}")))

    def _manifest(
        self, directory: Path, raw: bytes, path: Path
    ) -> tuple[dict[str, list[tuple[Path, int]]], dict[str, Any]]:
        """Return the layers by kind, each with the model's total size, and the config object."""
        try:
            manifest = orjson.loads(raw)
            entries = [(str(e["mediaType"]), str(e["digest"]), int(e["size"])) for e in manifest["layers"]]
            config = manifest.get("config") or {}
            config_digest, config_size = str(config.get("digest", "")), int(config.get("size", 0))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelUnusable(f"the manifest {path.name} is not valid: {error!r}") from error
        total = sum(size for _, _, size in entries) + config_size
        layers: dict[str, list[tuple[Path, int]]] = {}
        for media_type, digest, _ in entries:
            kind = media_type.removeprefix(LAYER)
            if kind == "model" or kind in TEXT_LAYERS:
                layers.setdefault(kind, []).append((blob_path(directory, digest), total))
        facts: dict[str, Any] = {}
        if config_digest:
            with contextlib.suppress(OSError, ModelUnusable, orjson.JSONDecodeError):
                loaded = orjson.loads(self._layer(blob_path(directory, config_digest)))
                facts = loaded if isinstance(loaded, dict) else {}
        return layers, facts

    def _layer(self, path: Path) -> bytes:
        """Read a small blob; its name is its digest, so what was read once stays right."""
        if path.name not in self._layers:
            if len(self._layers) > 4 * MAX_FILES:
                self._layers.clear()
            self._layers[path.name] = read_bounded(path, MAX_LAYER)
        return self._layers[path.name]

    def _header(self, path: Path, stat: os.stat_result) -> GGUFHeader:
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._headers.get(path)
        if known is None or known[0] != stamp:
            try:
                result: GGUFHeader | ModelUnusable = read_header(path)
            except ModelUnusable as error:
                result = error
            known = self._headers[path] = (stamp, result)
        if isinstance(known[1], ModelUnusable):
            raise ModelUnusable(str(known[1]))
        return known[1]

    def _report(self, path: Path, error: Exception) -> ModelUnusable:
        if path not in self._reported:  # once: a file that is being copied in changes at every scan
            self._reported.add(path)
            log.warning("model_unusable", path=str(path), error=str(error))
        return error if isinstance(error, ModelUnusable) else ModelUnusable(f"{path.name}: {error}")

    # Digests of bare files.

    def _digest(self, path: Path, stat: os.stat_result, header: GGUFHeader) -> tuple[str, bool]:
        if self._digests is None:
            self._digests = self._load_digests()
        known = self._digests.get(str(path))
        if known and known[:2] == (stat.st_mtime_ns, stat.st_size):
            return known[2], True
        stamp = (stat.st_mtime_ns, stat.st_size)
        partial = self._partial.get(path)
        if partial is None or partial[0] != stamp:
            digest = hashlib.sha256(str(stat.st_size).encode() + read_start(path, header.header_bytes))
            partial = self._partial[path] = (stamp, digest.hexdigest())
        return partial[1], False

    def pending_digests(self) -> tuple[Path, ...]:
        """Bare files of the last scan whose final digest is not known yet, smallest first."""
        pending = {m.path: m.info.size for m in self._snapshot.models.values() if not m.is_digest_final}
        return tuple(sorted(pending, key=lambda p: pending[p]))

    def digest_file(self, path: Path, stop: threading.Event) -> None:
        """Compute and keep one file's digest; gives up when `stop` is set. `scan` then shows it."""
        try:
            before = path.stat()
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    if stop.is_set():
                        return
            after = path.stat()
        except OSError:
            return
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
            with self._lock:
                digests = self._digests if self._digests is not None else self._load_digests()
                digests[str(path)] = (after.st_mtime_ns, after.st_size, digest.hexdigest())
                self._digests = digests
                self._save_digests(digests)

    def _load_digests(self) -> dict[str, tuple[int, int, str]]:
        if self._cache_file is None:
            return {}
        try:
            table = orjson.loads(self._cache_file.read_bytes())
            return {str(k): (int(v[0]), int(v[1]), str(v[2])) for k, v in table.items()}
        except (OSError, orjson.JSONDecodeError, TypeError, ValueError, LookupError, AttributeError):
            return {}  # a cache: computed again

    def _save_digests(self, digests: dict[str, tuple[int, int, str]]) -> None:
        if self._cache_file is None:
            return
        try:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._cache_file.with_suffix(".tmp")
            temporary.write_bytes(orjson.dumps(digests))
            temporary.replace(self._cache_file)
        except OSError as error:
            log.warning("digest_cache_not_written", path=str(self._cache_file), error=str(error))


def _check_language_model(path: Path, header: GGUFHeader) -> None:
    kind = header.text("general.type", "model")
    if header.architecture in _NO_LANGUAGE_MODELS or kind in _NO_LANGUAGE_MODELS:
        raise ModelUnusable(f"{path.name}: a {kind if kind != 'model' else 'projector'}, not a language model")
    if not header.tensors:
        raise ModelUnusable(f"{path.name}: it holds no tensors, only a vocabulary")


def _info(
    name: str,
    digest: str,
    size: int,
    mtime: float,
    header: GGUFHeader,
    config: Mapping[str, Any] | None = None,
) -> ModelInfo:
    config = config or {}
    family = str(config.get("model_family") or header.architecture)
    families = config.get("model_families")
    quantization = str(config.get("file_type") or "")
    return ModelInfo(
        name=name,
        digest=digest,
        size=size,
        modified_at=datetime.fromtimestamp(mtime, UTC).isoformat().replace("+00:00", "Z"),
        family=family,
        families=tuple(map(str, families)) if isinstance(families, list) and families else (family,),
        architecture=header.architecture,
        parameter_size=str(config.get("model_type") or human_count(header.parameter_count)),
        quantization=quantization if quantization not in {"", "unknown"} else header.quantization,
        context_length=header.context_length,
        embedding_length=header.embedding_length,
        capabilities=("embedding",) if f"{header.architecture}.pooling_type" in header.metadata else ("completion",),
    )
