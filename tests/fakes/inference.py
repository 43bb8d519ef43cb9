"""The fake Ollama's inference: what a request asks for, its tokens, and the faults in between."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from tests.fakes.body import Refused, check_options, decode
from tests.fakes.fault import Fault
from tests.fakes.model import FakeModel, expected_text, keep_alive_s, token
from tests.fakes.scheduler import LoadRefused
from tests.fakes.surface import SURFACES, Surface

if TYPE_CHECKING:
    from tests.fakes.ollama import FakeOllama

JSON = "application/json; charset=utf-8"
_NO_FAULT = Fault(times=0)


@dataclass(slots=True)
class Ask:
    """What an inference request asks for, whatever its surface."""

    model: str
    prompt: str
    stream: bool
    limit: int
    options: dict[str, Any]
    keep_alive: float | None
    empty: bool


def answer(data: object, status: int = 200) -> web.Response:
    """Return a JSON answer with gin's content type; bytes go as they are."""
    body = data if isinstance(data, bytes) else orjson.dumps(data)
    return web.Response(status=status, body=body, headers={"Content-Type": JSON})


def _text(content: object) -> str:
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    return str(content or "")


def lifetime(body: dict[str, Any]) -> float | None:
    """Return keep_alive in seconds, None where absent. Raises Refused."""
    if "keep_alive" not in body:
        return None
    try:
        return keep_alive_s(body["keep_alive"], 300.0)
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _said(messages: object) -> str:
    items = messages if isinstance(messages, list) else ()
    return " ".join(_text(m.get("content")) for m in items if isinstance(m, dict))


def read_ask(path: str, body: dict[str, Any]) -> Ask:
    """Read a request of any surface. Raises Refused."""
    native = path.startswith("/api/")
    options = check_options(body.get("options", {})) if native else {}
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    limit = options.get("num_predict", -1) if native else body.get(most, -1)
    if "messages" in body or path == "/api/chat":
        prompt = _said(body.get("messages"))
        empty = not body.get("messages")
    else:
        source = body.get("input" if path == "/v1/responses" else "prompt", "")
        if not isinstance(source, (str, list)):
            raise Refused(400, f"invalid input: {source!r:.50}")
        prompt = _said(source) if isinstance(source, list) else source
        empty = not prompt
    alive = lifetime(body) if native else None
    limit = int(max(-1, min(limit, 1 << 31)))
    return Ask(body.get("model", ""), prompt, body.get("stream", native), limit, options, alive, empty and native)


def kill_connection(request: web.BaseRequest, *, rst: bool) -> None:
    """Close the client's connection in the middle of the answer, with a RST or a FIN."""
    transport = request.transport
    if transport is None:
        return
    if rst:
        # The option belongs to the open socket, which the duplicate shares (uvloop hides its own).
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


class Inference:
    """Answers generate, chat and embed on every surface."""

    def __init__(self, fake: FakeOllama) -> None:
        self._fake = fake

    async def serve(self, request: web.BaseRequest, path: str, raw: bytes) -> web.StreamResponse:
        """Answer one generate, chat, completion, response or message request."""
        surface = SURFACES[path]("")
        try:
            body = decode(path, raw, request.headers.get("Content-Encoding", "").lower())
            ask = read_ask(path, body)
            surface = SURFACES[path](ask.model)
            return await self._answer(request, path, ask, surface)
        except Refused as error:
            return answer(surface.refused(error.status, error.text), error.status)
        except LoadRefused as error:
            return answer(surface.refused(error.status, error.text), error.status)

    def find(self, name: str, *, quoted: str = "'") -> FakeModel:
        """Return the model. Raises Refused in the words of the route."""
        model = self._fake.store.find(name)
        if model is None:
            tail = "" if quoted == "'" else ", try pulling it first"
            raise Refused(404, f"model {quoted}{name}{quoted} not found{tail}")
        return model

    async def _answer(self, request: web.BaseRequest, path: str, ask: Ask, surface: Surface) -> web.StreamResponse:
        fake = self._fake
        if not ask.model and path == "/api/chat":
            raise Refused(400, "model is required")
        model = self.find(ask.model)
        if ask.empty and ask.keep_alive == 0:
            fake.scheduler.expire(model)
            return answer(surface.whole("", {"done_reason": "unload"}))
        fault = fake.take_fault(model.name) or _NO_FAULT
        await self._before_load(fault)
        began = time.perf_counter()
        refuse = fault.refuse_load
        async with fake.scheduler.slot(model, ask.options, ask.keep_alive, refuse) as load_s:
            if ask.empty:
                return answer(surface.whole("", {"done_reason": "load"}))
            fake.running += 1
            try:
                if fake.first_token_delay_s:
                    await asyncio.sleep(fake.first_token_delay_s)
                count = min(ask.limit, fake.tokens) if ask.limit > 0 else fake.tokens
                reason = "length" if 0 < ask.limit <= fake.tokens else "stop"
                if ask.stream:
                    return await self._stream(request, ask, surface, fault, count, reason, began, load_s)
                await self._whole(request, fault, count)
                metrics = self._metrics(ask, count, reason, began, load_s)
                return answer(surface.whole(expected_text(count), metrics))
            finally:
                fake.running -= 1

    async def _before_load(self, fault: Fault) -> None:
        if fault.status:
            raise Refused(fault.status, fault.text)
        if fault.hang:
            await self._fake.unhang.wait()

    async def _whole(self, request: web.BaseRequest, fault: Fault, count: int) -> None:
        fake = self._fake
        if fake.gate.held or fake.token_delay_s or fault is not _NO_FAULT:
            for index in range(count):
                await self._break_if_due(request, fault, index)
                if index in {fault.error_after, fault.end_after}:
                    raise Refused(500, fault.text)
                await self._pace(fault)
        fake.tokens_sent += count

    async def _pace(self, fault: Fault) -> None:
        fake = self._fake
        if fake.gate.held:
            await fake.gate.passage()
        delay = fake.token_delay_s + fault.delay_s
        if delay:
            await asyncio.sleep(delay)

    async def _break_if_due(self, request: web.BaseRequest, fault: Fault, index: int) -> None:
        if index in {fault.reset_after, fault.eof_after}:
            self._fake.killed.add(id(request))
            kill_connection(request, rst=index == fault.reset_after)
            await asyncio.Event().wait()  # the lost connection cancels this handler

    async def _stream(
        self, request: web.BaseRequest, ask: Ask, surface: Surface, fault: Fault, count: int, reason: str,
        began: float, load_s: float,
    ) -> web.StreamResponse:  # fmt: skip
        fake = self._fake
        response: web.StreamResponse | None = None
        for index in range(count):
            await self._break_if_due(request, fault, index)
            if index in {fault.error_after, fault.end_after}:
                if response is None and index == fault.error_after:
                    raise Refused(500, fault.text)
                response = response or await self._start(request, surface)
                if index == fault.error_after:
                    await response.write(surface.broken(fault.text))
                await response.write_eof()
                return response
            await self._pace(fault)
            data = surface.token(token(index)) if response else b""
            if response is None:
                response = await self._start(request, surface)
                data = surface.first() + surface.token(token(index))
            await response.write(data)
            fake.tokens_sent += 1
            fake.changes.notify()
        await self._break_if_due(request, fault, count)
        response = response or await self._start(request, surface)
        await response.write(surface.last(count, self._metrics(ask, count, reason, began, load_s)))
        await response.write_eof()
        return response

    async def _start(self, request: web.BaseRequest, surface: Surface) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": surface.content_type})
        response.enable_chunked_encoding()
        await response.prepare(request)
        return response

    def _metrics(self, ask: Ask, count: int, reason: str, began: float, load_s: float) -> dict[str, Any]:
        total = max(1, int((time.perf_counter() - began) * 1e9))
        load = max(1, int(load_s * 1e9))
        return {
            "done_reason": reason,
            "total_duration": total,
            "load_duration": load,
            "prompt_eval_count": max(1, len(ask.prompt.split())),
            "prompt_eval_duration": max(1, int(self._fake.first_token_delay_s * 1e9)),
            "eval_count": count,
            "eval_duration": max(1, total - load),
        }

    async def embed(self, path: str, raw: bytes, encoding: str) -> web.Response:
        """Answer /api/embed, /api/embeddings and /v1/embeddings."""
        openai = SURFACES["/v1/completions"]("")
        try:
            return answer(await self._embed(path, decode(path, raw, encoding)))
        except (Refused, LoadRefused) as error:
            body = openai if path == "/v1/embeddings" else Surface("")
            return answer(body.refused(error.status, error.text), error.status)

    async def _embed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("model", "")
        native = path != "/v1/embeddings"
        options, alive = (check_options(body.get("options", {})), lifetime(body)) if native else ({}, None)
        model = self.find(name, quoted='"')
        source = body.get("prompt" if path == "/api/embeddings" else "input", "")
        inputs = source if isinstance(source, list) else [source] if source else []
        if not all(isinstance(text, str) for text in inputs):
            raise Refused(400, "invalid input type")
        fault = self._fake.take_fault(model.name) or _NO_FAULT
        await self._before_load(fault)
        size = 16 if path == "/api/embeddings" else max(0, min(body.get("dimensions", 0), 4096)) or 16
        async with self._fake.scheduler.slot(model, options, alive, fault.refuse_load) as load_s:
            await self._pace(fault)
            vectors = [embedding(text, size) for text in inputs]
        count = sum(len(text.split()) for text in inputs)
        if path == "/api/embeddings":
            return {"embedding": vectors[0] if vectors else []}
        if path == "/v1/embeddings":
            rows = [{"object": "embedding", "embedding": v, "index": i} for i, v in enumerate(vectors)]
            usage = {"prompt_tokens": count, "total_tokens": count}
            return {"object": "list", "data": rows, "model": name, "usage": usage}
        load = max(1, int(load_s * 1e9))
        return {"model": name, "embeddings": vectors, "total_duration": load + 1, "load_duration": load,
                "prompt_eval_count": count}  # fmt: skip


def embedding(text: str, size: int = 16) -> list[float]:
    """Return the fake's vector of a text: the same everywhere, of length one."""
    seed = hashlib.shake_256(text.encode()).digest(size)
    raw = [byte - 127.5 for byte in seed]
    norm = math.sqrt(sum(x * x for x in raw))
    return [round(x / norm, 7) for x in raw]
