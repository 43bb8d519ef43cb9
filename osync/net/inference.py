"""The typed gRPC API over a `Serve`: each call is one request of Ollama's HTTP API, answered in place.

The serving side runs in the handler's own task: gRPC's flow control holds it back, and a client that
cancels or leaves cancels it. Nothing is queued here but one line that is not complete yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
import orjson
import structlog

from osync.errors import FrameTooLarge, OsyncError, StreamBroken
from osync.net import typed
from osync.net.body import BytesBody
from osync.net.exchange import Responder, Serve
from osync.net.server import RpcServer
from osync.net.serving import answer
from osync.net.typed import Json
from osync.pb import inference_pb2 as pb
from osync.pb import inference_pb2_grpc
from osync.types import Headers, RequestHead, ResponseHead
from osync.version import __version__
from osync.wire.ndjson import LineSplitter

log = structlog.get_logger("osync.net")

FULL_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_MAX_OBJECT = 64 << 20  # the data limit of the gRPC port
_MAX_REASON = 4 << 10  # gRPC sends it in a header, and peers refuse those over 8 KiB
_CANCEL_S = 5.0  # it comes within a turn of the loop
_PASSED_ON = ("authorization", "x-osync-node", "x-osync-session", "x-osync-request-id")
_CODE = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M")


class _Refused(Exception):
    """The API answered with an error; `code` is what a gRPC client sees."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers osync.v1.Inference by asking `serve` in the words of Ollama's HTTP API."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve

    async def Generate(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream a completion."""
        async with _refusals(context):
            await self._stream(context, "/api/generate", typed.generate(request), typed.generate_response)

    async def Chat(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.ChatRequest, context: Context
    ) -> None:
        """Stream an assistant's message."""
        async with _refusals(context):
            await self._stream(context, "/api/chat", typed.chat(request), typed.chat_response)

    async def Pull(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.PullRequest, context: Context
    ) -> None:
        """Stream the progress of a pull."""
        body = {"model": request.model, "insecure": request.insecure, "stream": True}
        async with _refusals(context):
            await self._stream(context, "/api/pull", body, typed.progress)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Return one vector per input."""
        async with _refusals(context):
            whole = await self._whole(context, "POST", "/api/embed", typed.embed(request))
            return typed.embed_response(whole.object(), whole.node)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """Return the models on disk."""
        async with _refusals(context):
            return typed.list_response((await self._whole(context, "GET", "/api/tags")).object())

    async def Ps(self, request: pb.PsRequest, context: Context) -> pb.PsResponse:
        """Return the models in memory."""
        async with _refusals(context):
            return typed.ps_response((await self._whole(context, "GET", "/api/ps")).object())

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.ShowResponse:
        """Return what is known of one model."""
        body = {"model": request.model, "verbose": request.verbose}
        async with _refusals(context):
            return typed.show_response((await self._whole(context, "POST", "/api/show", body)).object())

    async def Copy(self, request: pb.CopyRequest, context: Context) -> pb.CopyResponse:
        """Give a model a second name."""
        body = {"source": request.source, "destination": request.destination}
        async with _refusals(context):
            (await self._whole(context, "POST", "/api/copy", body)).check()
            return pb.CopyResponse()

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        """Remove a model."""
        async with _refusals(context):
            (await self._whole(context, "DELETE", "/api/delete", {"model": request.model})).check()
            return pb.DeleteResponse()

    async def Version(self, request: pb.VersionRequest, context: Context) -> pb.VersionResponse:
        """Return the version of Ollama's API, and of this daemon."""
        async with _refusals(context):
            raw = (await self._whole(context, "GET", "/api/version")).object()
            return pb.VersionResponse(version=str(raw.get("version", "")), osync=__version__)

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        """Say whether something here can answer; a proxy knows by /readyz, a backend by /."""
        async with _refusals(context):
            try:
                whole = await self._whole(context, "GET", "/readyz")
                if whole.status == 404:
                    whole = await self._whole(context, "GET", "/")
                whole.check()
            except (_Refused, OsyncError) as error:
                return pb.HealthResponse(ready=False, detail=str(error))
            return pb.HealthResponse(ready=True)

    async def _stream(self, context: Context, target: str, body: Json, build: Callable[[Json, str], Any]) -> None:
        responder = _Streamed(context, build)
        await self._ask(_head(context, "POST", target), orjson.dumps(body), responder)
        await responder.finish()

    async def _whole(self, context: Context, method: str, target: str, body: Json | None = None) -> _Whole:
        whole = _Whole()
        await self._ask(_head(context, method, target), b"" if body is None else orjson.dumps(body), whole)
        return whole

    async def _ask(self, head: RequestHead, body: bytes, responder: Responder) -> None:
        if error := await answer(self._serve, head, BytesBody(body), responder):
            raise error


def add_inference(server: RpcServer, serve: Serve) -> None:
    """Serve osync.v1.Inference on `server`; before its start."""
    server.add_service(inference_pb2_grpc.add_InferenceServicer_to_server, InferenceService(serve), FULL_NAME)


@asynccontextmanager
async def _refusals(context: Context) -> AsyncIterator[None]:
    """End the call with the code and text of whatever error comes out; never with a stack's words."""
    try:
        yield
    except _Refused as error:
        code, text = error.code, str(error)
    except OsyncError as error:
        code, text = error.grpc_code, str(error)
    except Exception as error:
        log.error("inference_failed", error=repr(error), exc_info=error)
        code, text = "INTERNAL", "internal error; see the log of this daemon"
    else:
        return
    try:
        await context.abort(grpc.StatusCode[code], text[:_MAX_REASON])
    except grpc.aio.InternalError:  # the client is gone
        log.debug("inference_client_gone", code=code)


def _head(context: Context, method: str, target: str) -> RequestHead:
    given = {str(key): value for key, value in context.invocation_metadata() or ()}
    passed = tuple((name, given[name]) for name in _PASSED_ON if isinstance(given.get(name), str))
    headers: Headers = tuple((name, str(value)) for name, value in passed)
    if method != "GET":
        headers += (("content-type", "application/json"),)
    return RequestHead(method, target, headers)


class _Whole:
    """Collects an answer that is not streamed."""

    def __init__(self) -> None:
        self.status = 0
        self.node = ""
        self._data = bytearray()

    @property
    def started(self) -> bool:
        return self.status > 0

    async def start(self, head: ResponseHead) -> None:
        self.status, self.node = head.status, _node(head)

    async def write(self, data: bytes) -> None:
        if len(self._data) + len(data) > _MAX_OBJECT:
            raise FrameTooLarge(f"the answer is over {_MAX_OBJECT} bytes")
        self._data += data

    def check(self) -> None:
        """Raise what an error status says."""
        if self.status >= 400:
            raise _refused(self.status, bytes(self._data))

    def object(self) -> Json:
        """Return the decoded answer; raises as `check`, and StreamBroken if it is none."""
        self.check()
        raw = _decode(bytes(self._data))
        if error := raw.get("error"):
            raise _Refused("INTERNAL", str(error))
        return raw


class _Streamed:
    """Types an answer line by line and sends each to the client, at the client's pace."""

    def __init__(self, context: Context, build: Callable[[Json, str], Any]) -> None:
        self._context = context
        self._build = build
        self._status = 0
        self._node = ""
        self._splitter = LineSplitter()
        self._refusal = bytearray()
        self._failure: OsyncError | _Refused | None = None
        self._complete = False

    @property
    def started(self) -> bool:
        return self._status > 0

    async def start(self, head: ResponseHead) -> None:
        self._status, self._node = head.status, _node(head)

    async def write(self, data: bytes) -> None:
        if self._failure is not None:
            return
        if self._status >= 400:
            self._refusal += data[: _MAX_REASON - len(self._refusal)]
            return
        try:
            for line in self._splitter.feed(data):
                await self._line(line)
        except FrameTooLarge as error:
            self._failure = error

    async def finish(self) -> None:
        """Take what is left; raises unless the answer came to its clean end."""
        if self._failure is None and self._status >= 400:
            raise _refused(self._status, bytes(self._refusal))
        await self._line(self._splitter.finish())
        if self._failure is not None:
            raise self._failure
        if not self._complete:
            raise StreamBroken("the answer stopped before its end")

    async def _line(self, line: bytes) -> None:
        if self._failure is not None or not line:
            return
        try:
            raw = _decode(line)
        except StreamBroken as error:
            self._failure = error
            return
        if error_text := raw.get("error"):
            self._failure = _Refused("INTERNAL", str(error_text))
            return
        self._complete = self._complete or typed.is_last(raw)
        try:
            await self._context.write(self._build(raw, self._node))
        except grpc.aio.InternalError as error:  # the client is gone: this task's cancellation is on its way
            await asyncio.sleep(_CANCEL_S)
            raise StreamBroken("the client is gone") from error


def _node(head: ResponseHead) -> str:
    return next((value for name, value in head.headers if name.lower() == "x-osync-node"), "")


def _decode(data: bytes) -> Json:
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise StreamBroken(f"the backend's answer is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise StreamBroken("the backend's answer is no JSON object")
    return raw


def _refused(status: int, body: bytes) -> _Refused:
    try:
        text = str(orjson.loads(body)["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = body[:200].decode("utf-8", "replace").strip() or f"HTTP status {status}"
    return _Refused(_CODE.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL"), text)
