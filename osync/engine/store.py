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
from pathlib import Path
from typing import Any

import orjson
import structlog

from osync.core.quantization import FULL, is_asked_by_name, pick, source
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
from osync.engine.gguf import GGUFHeader, read_header
from osync.engine.model_info import check_language_model, model_info
from osync.engine.quantize import Quantizer, Source, source_of
from osync.errors import ModelNotFound, ModelUnusable
from osync.types import ModelInfo
from osync.wire import names

log = structlog.get_logger("osync.engine")


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

    def __init__(self, directories: tuple[Path, ...], state_dir: Path | None = None, *, prefer: str = "") -> None:
        """`prefer` is the quantization to serve where a name leaves it open; "": whatever is there."""
        self._directories = directories
        self._prefer = prefer.lower()
        self._quantizer = Quantizer(state_dir / "quantized", prefer) if prefer and state_dir else None
        self._wanted: tuple[Source, ...] = ()
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

    def find_blob(self, digest: str) -> Path | None:
        """Return the file of a model by its digest, or by that of its weights in an Ollama store."""
        for model in self._snapshot.models.values():
            if model.info.digest == digest or model.path.name in (f"sha256-{digest}", f"sha256:{digest}"):
                return model.path
        # Who asks may have heard of it before its final digest was known.
        return next((path for path, (_, known) in list(self._partial.items()) if known == digest), None)

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
            if self._quantizer:
                self._prefer_quantized(models, bare, seen, self._quantizer)
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
            check_language_model(path, header)
        except (OSError, ModelUnusable) as error:
            fault = self._report(path, error)
            faults.setdefault(names.key(f"{stem}:{tag}" if tag else stem), fault)
            faults.setdefault(names.key(stem), fault)
            return
        name = names.parse(f"{stem}:{tag or sanitise(header.quantization.lower())}")
        if name.canonical in models:
            return
        digest, is_final = self._digest(path, stat, header)
        info = model_info(name.display, digest, size, stat.st_mtime, header)
        models[name.canonical] = StoredModel(info, path, header, stat.st_mtime, is_digest_final=is_final)
        bare.setdefault(names.canonical(stem), []).append(name.canonical)

    def _add_alias(
        self, stem: str, tagged: list[str], models: dict[str, StoredModel], faults: dict[str, ModelUnusable]
    ) -> None:
        by_kind = {models[name].info.quantization: name for name in tagged}
        # Of several files the one that the settings prefer, or that a preferred one can be made of.
        chosen = pick(self._prefer, by_kind) or source(by_kind) if self._prefer else None
        name = tagged[0] if len(tagged) == 1 else by_kind.get(chosen or "")
        if name and stem not in models:
            model = models[name]
            models[stem] = replace(model, info=replace(model.info, name=names.display(stem)))
        faults.pop(stem, None)

    def _prefer_quantized(
        self, models: dict[str, StoredModel], bare: dict[str, list[str]], seen: set[Path], quantizer: Quantizer
    ) -> None:
        """Put what was quantized in the place of full-precision files whose name leaves the quantization open."""
        tagged = {name for group in bare.values() for name in group}
        wanted: dict[Source, None] = {}
        for key, model in list(models.items()):
            is_full = model.info.quantization.lower() in FULL and quantizer.kind not in FULL
            if not is_full or key in tagged or is_asked_by_name(model.info.name):
                continue
            with contextlib.suppress(OSError, ModelUnusable):
                found = source_of(model.path)
                target = quantizer.target(found)
                if not target.is_file():
                    if not quantizer.has_failed(found):
                        wanted[found] = None
                    continue
                header = self._header(target, target.stat())
                seen.add(target)
                # Other bytes, another digest; the same one on each host that has the same file.
                digest = hashlib.sha256(f"{model.info.digest} {quantizer.kind}".encode()).hexdigest()
                size = target.stat().st_size
                info = replace(model.info, quantization=header.quantization, size=size, digest=digest)
                models[key] = replace(model, info=info, path=target, header=header, is_digest_final=True)
                if key in bare:  # and by its quantization, as if the file lay beside the other
                    name = names.parse(f"{key.rpartition(':')[0] or key}:{quantizer.kind}")
                    models.setdefault(name.canonical, replace(models[key], info=replace(info, name=name.display)))
        self._wanted = tuple(sorted(wanted, key=lambda one: one.size))

    @property
    def pending_quantizations(self) -> tuple[Source, ...]:
        """Files of the last scan that the preferred quantization is to be made of, smallest first."""
        return self._wanted

    def quantize(self, found: Source, stop: threading.Event) -> None:
        """Make a file's preferred quantization; gives up when `stop` is set. `scan` then shows it."""
        if self._quantizer:
            with contextlib.suppress(ModelUnusable):  # it is in the log, and the file is served as it is
                self._quantizer.make(found, stop)

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
            check_language_model(path, header)
            mtime = path.stat().st_mtime
            info = model_info(name.display, hashlib.sha256(raw).hexdigest(), total, mtime, header, config)
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
