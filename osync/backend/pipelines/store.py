"""The models of the whole cluster, as far as a coordinator needs them: headers, vocabularies, templates."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from osync.backend.pipelines.peers import Shards
from osync.cluster.view import ClusterView, Peer
from osync.coordinator.placement import ModelSource
from osync.core.merge import instant, majority
from osync.engine.gguf import GGUFHeader, read_header
from osync.engine.header_fetch import fetch_header
from osync.engine.model_info import check_language_model
from osync.engine.store import ModelStore, StoredModel
from osync.errors import ModelNotFound, ModelUnusable, OsyncError, UpstreamError
from osync.net.blob import BlobReader
from osync.types import ModelInfo, NodeState, RequestHead
from osync.wire import names

log = structlog.get_logger("osync.backend.pipelines")

MOST: Final = 64
"""Models of other hosts that are remembered, and whose headers are kept on disk."""
SHOW_S: Final = 30.0
"""A show may read a model's header from a slow disk."""
_MOST_SHOWN: Final = 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARAMETER = re.compile(r"(\w+)\s+(.*)")
_POST = (("Content-Type", "application/json"),)


class ClusterStore:
    """Finds a model by name: in this host's directories, else by what the nodes of the view say they have.

    Of another host's file only the header is fetched, into a file of the same length whose tensors are a hole:
    llama.cpp loads a vocabulary from it, and refuses one that ends before its tensors would.
    """

    def __init__(
        self, local: ModelStore, view: ClusterView, shards: Shards, directory: Path, own_address: str = ""
    ) -> None:
        self.local = local
        self._view = view
        self._shards = shards
        self._directory = directory
        self._own_address = own_address
        self._found: dict[tuple[str, str], StoredModel] = {}
        self._headers: dict[str, tuple[Path, GGUFHeader]] = {}
        self._lock = asyncio.Lock()

    @property
    def paths(self) -> set[Path]:
        """Files that stand for models of other hosts."""
        return {path for path, _ in self._headers.values()}

    def info(self, name: str) -> ModelInfo | None:
        """Return what is known of a model without reading anything; None where nobody has it."""
        with contextlib.suppress(OsyncError):
            return self.local.find(name).info
        found = self._elsewhere(names.canonical(name))
        return found[0] if found else None

    async def find(self, name: str) -> StoredModel:
        """Return a model. Raises ModelNotFound, ModelUnusable, UpstreamError."""
        try:
            return self.local.find(name)
        except ModelNotFound:
            pass
        key = names.canonical(name)
        found = self._elsewhere(key)
        if found is None:
            raise ModelNotFound(f"model '{name}' not found")
        info, holders = found
        known = self._found.get((key, info.digest))
        if known is None:
            async with self._lock:
                known = self._found.get((key, info.digest)) or await self._fetch(key, info, holders)
        return known

    def source(self, model: StoredModel) -> ModelSource:
        """Return a model as the coordinator takes it, with those that have its file now."""
        digest = model.info.digest
        sources = self._shards.sources(digest)
        if model.path not in self.paths and self._own_address:
            sources = tuple(dict.fromkeys((self._own_address, *sources)))
        return ModelSource(
            name=model.info.name,
            digest=digest,
            size=model.header.file_size,
            header=model.header,
            vocabulary=model.path,
            sources=sources,
        )

    def at(self, path: Path) -> StoredModel:
        """Return a model by the file that stands for it, by its plainest name. Raises ModelNotFound."""
        found = [model for model in (*self.local.models, *self._found.values()) if model.path == path]
        if not found:
            raise ModelNotFound(f"the file of a model is gone: {path.name}")
        return min(found, key=lambda model: (not model.info.name.endswith(":latest"), len(model.info.name)))

    def _elsewhere(self, key: str) -> tuple[ModelInfo, list[tuple[NodeState, Peer]]] | None:
        """Return the model that most nodes have by that name, the newest of equals, and those nodes."""
        held = [
            (model, node)
            for node in self._view.up()
            for model in node[0].backend.models
            if model.digest and names.key(model.name) == key
        ]
        if not held:
            return None
        digest = majority(model.digest for model, _ in held)
        same = [(model, node) for model, node in held if model.digest == digest]
        return max((model for model, _ in same), key=lambda m: instant(m.modified_at)), [node for _, node in same]

    async def _fetch(self, key: str, info: ModelInfo, holders: list[tuple[NodeState, Peer]]) -> StoredModel:
        path, header = await self._header(info)
        model = StoredModel(info, path, header, max(0.0, instant(info.modified_at)))
        model = await _with_texts(model, holders)
        while len(self._found) >= MOST:
            self._found.pop(next(iter(self._found)))
        used = {known.info.digest for known in self._found.values()} | {info.digest}
        self._headers = {digest: kept for digest, kept in self._headers.items() if digest in used}
        self._found[key, info.digest] = model
        return model

    async def _header(self, info: ModelInfo) -> tuple[Path, GGUFHeader]:
        kept = self._headers.get(info.digest)
        if kept is not None:
            return kept
        if not _DIGEST.fullmatch(info.digest):
            raise ModelUnusable(f"{info.name} cannot be split: its node gives it no digest")
        path = self._directory / f"{info.digest}.gguf"
        try:
            header = await asyncio.to_thread(read_header, path)
        except ModelUnusable:  # not there yet, or not whole
            header = await self._read(info, path)
        check_language_model(path, header)
        self._headers[info.digest] = path, header
        return path, header

    async def _read(self, info: ModelInfo, path: Path) -> GGUFHeader:
        async with BlobReader(info.digest, self._shards.sources(info.digest)) as reader:
            try:
                size = await reader.size()
                header, start = await fetch_header(reader.read, size, info.name)
            except ModelNotFound as error:
                raise ModelUnusable(f"{info.name} cannot be split: nobody gives its file away ({error})") from error
        log.info("header_fetched", model=info.name, bytes=len(start), of=size)
        try:
            await asyncio.to_thread(_write, path, start, size)
        except OSError as error:
            raise ModelUnusable(f"cannot keep the header of {info.name} in {path.parent}: {error}") from error
        return header


def _write(path: Path, start: bytes, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(start)
    os.truncate(temporary, size)  # a hole: it takes no room
    temporary.replace(path)
    files = sorted(path.parent.glob("*.gguf"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in files[MOST:]:
        old.unlink(missing_ok=True)


async def _with_texts(model: StoredModel, holders: list[tuple[NodeState, Peer]]) -> StoredModel:
    """Add what an Ollama store knows beside the weights, from the first node that tells."""
    problem: OsyncError | None = None
    for state, peer in holders:
        try:
            shown = await _show(peer, model.info.name)
        except (OsyncError, TimeoutError) as error:
            problem = error if isinstance(error, OsyncError) else UpstreamError(f"{state.node_id} does not answer")
            continue
        return with_shown(model, shown)
    raise problem or UpstreamError(f"no node tells about {model.info.name}")


async def _show(peer: Peer, name: str) -> Mapping[str, Any]:
    async with asyncio.timeout(SHOW_S):
        exchange = peer.link.open(RequestHead("POST", "/api/show", _POST), orjson.dumps({"model": name}))
        try:
            head = await exchange.head()
            data = b""
            while piece := await exchange.read():
                data += piece
                if len(data) > _MOST_SHOWN:
                    raise UpstreamError(f"{peer.link.address} says too much of {name}")
        finally:
            exchange.close()
    try:
        shown = orjson.loads(data)
    except orjson.JSONDecodeError:
        shown = None
    if head.status != 200 or not isinstance(shown, dict):
        raise UpstreamError(f"{peer.link.address} answers {head.status} to /api/show of {name}")
    return shown


def with_shown(model: StoredModel, shown: Mapping[str, Any]) -> StoredModel:
    """Return the model with what /api/show says of it."""
    template = _text(shown, "template")
    messages = shown.get("messages")
    return replace(
        model,
        # An engine node shows the file's own template, which is no Go template, where the store has none.
        template="" if template == model.header.chat_template else template,
        system=_text(shown, "system"),
        parameters=parameters(_text(shown, "parameters")),
        licenses=(text,) if (text := _text(shown, "license")) else (),
        messages=tuple(m for m in messages if isinstance(m, dict)) if isinstance(messages, list) else (),
    )


def parameters(text: str) -> dict[str, Any]:
    """Read the `parameters` of /api/show: a name and a value on each line; a name that comes again is a list."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        match = _PARAMETER.fullmatch(line.strip())
        if match is None:
            continue
        name, raw = match.groups()
        try:
            value: Any = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = raw
        if name == "stop":
            found.setdefault(name, []).append(value if isinstance(value, str) else raw)
        else:
            found[name] = value
    return found


def _text(shown: Mapping[str, Any], name: str) -> str:
    value = shown.get(name)
    return value if isinstance(value, str) else ""
