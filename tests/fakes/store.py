"""The fake Ollama's disk and registry: models, blobs, and the routes that manage them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from tests.fakes.body import Refused, decode
from tests.fakes.fault import Gate
from tests.fakes.inference import answer
from tests.fakes.model import FakeModel, canonical, rfc3339

if TYPE_CHECKING:
    from tests.fakes.ollama import FakeOllama

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_NAME = re.compile(r"(?:[\w.:-]+/)?(?:[\w-]+/)?\w[\w.-]*(?::\w[\w.-]*)?")
Progress = dict[str, Any]


class ProgressFailed(Exception):
    """An error after the first line of progress."""


class Store:
    """Models by canonical name in lower case; blobs by digest. `registry` is what pull can get."""

    def __init__(self, fake: FakeOllama, models: tuple[FakeModel, ...]) -> None:
        self._fake = fake
        self.models = {m.name.lower(): m for m in models}
        self.registry: dict[str, FakeModel] = {}
        self.blobs: dict[str, int] = {}
        self.gate = Gate()
        self.pull_steps = 4

    def find(self, name: str) -> FakeModel | None:
        """Return the model of that name, as Ollama compares names."""
        return self.models.get(canonical(name).lower())

    def add(self, model: FakeModel) -> None:
        """Put a model on the disk, newest."""
        self.models[model.name.lower()] = model
        self._fake.changes.notify()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of /api/tags, newest first."""
        return [m.tag_row() for m in sorted(self.models.values(), key=lambda m: m.modified_at, reverse=True)]

    async def serve(self, request: web.BaseRequest, path: str, raw: bytes) -> web.StreamResponse:
        """Answer show, delete, copy, pull, push and create."""
        try:
            body = decode(path, raw)
            name = body.get("model") or body.get("name") or ""
            match path:
                case "/api/show":
                    return self._show(name, body)
                case "/api/copy":
                    return self._copy(body)
                case "/api/delete":
                    return self._delete(name)
            if not _NAME.fullmatch(name):
                raise Refused(400, "invalid model name")
            steps = {"/api/pull": self._pull, "/api/push": self._push, "/api/create": self._create}[path]
            return await self._progress(request, steps(name, body), body.get("stream", True))
        except Refused as error:
            return answer({"error": error.text}, error.status)

    def _show(self, name: str, body: dict[str, Any]) -> web.Response:
        if not name:
            raise Refused(400, "model is required")
        model = self.find(name)
        if model is None:
            raise Refused(404, f"model '{canonical(name)}' not found")
        shown = model.show()
        if body.get("verbose"):
            shown["tensors"] = [{"name": "token_embd.weight", "type": "Q8_0", "shape": [576, 49152]}]
        return answer(shown)

    def _copy(self, body: dict[str, Any]) -> web.Response:
        source, destination = body.get("source", ""), body.get("destination", "")
        for field, name in (("source", source), ("destination", destination)):
            if not _NAME.fullmatch(name):
                raise Refused(400, f'{field} "{name}" is invalid')
        model = self.find(source)
        if model is None:
            raise Refused(404, f'model "{source}" not found')
        self.add(dataclasses.replace(model, name=destination, digest=model.digest, modified_at=rfc3339(time.time())))
        return web.Response()

    def _delete(self, name: str) -> web.Response:
        model = self.find(name)
        if model is None:
            raise Refused(404, f"model '{name}' not found")
        self._fake.scheduler.expire(model)
        del self.models[model.name.lower()]
        return web.Response()

    async def _pull(self, name: str, body: dict[str, Any]) -> AsyncIterator[Progress]:
        yield {"status": "pulling manifest"}
        model = self.registry.get(canonical(name).lower()) or self.find(name)
        if model is None:
            raise ProgressFailed("pull model manifest: file does not exist")
        layer = {"status": f"pulling {model.digest[:12]}", "digest": f"sha256:{model.digest}", "total": model.size}
        yield layer
        for step in range(1, self.pull_steps + 1):
            await self.gate.passage()
            yield {**layer, "completed": model.size * step // self.pull_steps}
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        self.add(dataclasses.replace(model, modified_at=rfc3339(time.time())))
        yield {"status": "success"}

    async def _push(self, name: str, body: dict[str, Any]) -> AsyncIterator[Progress]:
        yield {"status": "retrieving manifest"}
        model = self.find(name)
        if model is None:
            yield {"status": "couldn't retrieve manifest"}
            raise ProgressFailed("file does not exist")
        layer = {"status": f"pushing {model.digest[:12]}", "digest": f"sha256:{model.digest}", "total": model.size}
        yield layer
        await self.gate.passage()
        yield {**layer, "completed": model.size}
        yield {"status": "pushing manifest"}
        yield {"status": "success"}

    async def _create(self, name: str, body: dict[str, Any]) -> AsyncIterator[Progress]:
        files: dict[str, str] = {name: digest or "" for name, digest in body.get("files", {}).items()}
        parent = body.get("from", "")
        if not files and not parent:
            raise Refused(400, "neither 'from' or 'files' was specified")
        if missing := [d for d in files.values() if d.replace("-", ":") not in self.blobs]:
            raise Refused(400, f"blob not found: {missing[0]}")
        base = self.find(parent) if parent else None
        if parent and base is None:
            yield {"status": "pulling manifest"}
            raise ProgressFailed("pull model manifest: file does not exist")
        if files:
            yield {"status": "parsing GGUF"}
        digest = hashlib.sha256(repr((name, sorted(files.items()), parent)).encode()).hexdigest()
        yield {"status": f"creating new layer sha256:{digest}"}
        await self.gate.passage()
        yield {"status": "writing manifest"}
        now = rfc3339(time.time())
        size = sum(self.blobs[d.replace("-", ":")] for d in files.values())
        if base is not None:
            self.add(dataclasses.replace(base, name=name, digest=digest, modified_at=now))
        else:
            self.add(FakeModel(name, digest=digest, modified_at=now, size=size))
        yield {"status": "success"}

    async def _progress(
        self, request: web.BaseRequest, steps: AsyncIterator[Progress], stream: bool
    ) -> web.StreamResponse:
        first = await anext(steps)
        if not stream:
            try:
                rest = [step async for step in steps]
            except ProgressFailed as error:
                return answer({"error": str(error)}, 500)
            return answer(rest[-1] if rest else first)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(orjson.dumps(first) + b"\n")
        try:
            async for step in steps:
                await response.write(orjson.dumps(step) + b"\n")
                self._fake.changes.notify()
        except ProgressFailed as error:
            await response.write(orjson.dumps({"error": str(error)}) + b"\n")
        await response.write_eof()
        return response

    async def blob(self, request: web.BaseRequest, name: str) -> web.Response:
        """Answer HEAD and POST of /api/blobs/DIGEST."""
        match = _DIGEST.fullmatch(name)
        if match is None:
            return answer({"error": "invalid digest format"}, 400)
        digest = f"sha256:{match[1]}"
        if request.method == "HEAD":
            return web.Response(status=200 if digest in self.blobs else 404)
        if digest in self.blobs:
            return web.Response(status=200)
        size, got = 0, hashlib.sha256()
        async for piece in request.content.iter_any():
            got.update(piece)
            size += len(piece)
            self._fake.blob_bytes += len(piece)
            self._fake.changes.notify()
        if got.hexdigest() != match[1]:
            text = f"digest mismatch, expected sha256:{match[1]}, got sha256:{got.hexdigest()}"
            return answer({"error": text}, 400)
        self.blobs[digest] = size
        self._fake.changes.notify()
        return web.Response(status=201)
