"""The client for asyncio, on aiohttp."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload
from weakref import WeakSet

import aiohttp

from osync.client import calls, decoding
from osync.client.answers import (
    Answer,
    ChatResponse,
    EmbedResponse,
    GenerateResponse,
    ListResponse,
    Message,
    PlanResponse,
    Progress,
    PsResponse,
    ShowResponse,
    StatusResponse,
)
from osync.client.calls import Call
from osync.client.servers import CONNECT_TIMEOUT_S, Servers, base_url, headers, may_move
from osync.errors import ConfigError, OsyncError, StreamBroken

T = TypeVar("T", bound=Answer)

_BROKEN = (aiohttp.ClientError, OSError)


class AsyncStream(Generic[T]):
    """A streamed answer: iterate it; the request goes out with the first step.

    Leaving it early (`aclose`, the end of `async with`, or dropping it) closes the connection, which
    ends the work for it.
    """

    def __init__(self, client: AsyncOllamaClient, call: Call, build: Callable[..., T]) -> None:
        self._client = client
        self._call = call
        self._build = build
        self._url = ""
        self._response: aiohttp.ClientResponse | None = None
        self._decoder: decoding.Decoder[T] | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._closed:
            raise StopAsyncIteration
        try:
            item = await self._next()
        except BaseException:
            await self.aclose()
            raise
        if item is None:
            await self.aclose()
            raise StopAsyncIteration
        return item

    async def _next(self) -> T | None:
        response, decoder = self._response, self._decoder
        if response is None or decoder is None:
            response, self._url = await self._client._open(self._call)
            self._response = response
            self._client._streams.add(self)
            build = decoding.with_node(self._build, response.headers.get("X-Osync-Node", ""))
            decoder = self._decoder = decoding.Decoder(build, self._url)
        while True:
            if (item := decoder.pop()) is not None:
                return item
            if data := await self._read(response, decoder):
                decoder.feed(data)
                continue
            decoder.end()
            return decoder.pop()

    async def _read(self, response: aiohttp.ClientResponse, decoder: decoding.Decoder[T]) -> bytes:
        try:
            return await response.content.readany()
        except TimeoutError as error:
            raise decoding.timed_out(self._url, self._client._timeout) from error
        except _BROKEN as error:
            if decoder.complete:
                return b""
            raise decoding.broken(self._url, error) from error

    async def aclose(self) -> None:
        """Close the connection unless the answer came to its end. May be called twice."""
        self._closed = True
        self._client._streams.discard(self)
        response, self._response = self._response, None
        if response is not None:
            response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        response = getattr(self, "_response", None)
        if response is not None:
            _close_soon(response)


def _close_soon(response: aiohttp.ClientResponse) -> None:
    """Close from wherever the collector runs: the loop's thread does it."""
    try:
        response._loop.call_soon_threadsafe(response.close)
    except RuntimeError:  # the loop is closed, and its sockets with it
        pass


class AsyncOllamaClient:
    """Asks one osync proxy (or Ollama), or the next of several where one cannot answer.

    `timeout` bounds a whole answer in seconds; None: no limit. Connecting is always bounded.
    Keywords of `generate`, `chat` and `embed` beyond those named: fields of Ollama's request (system,
    format, keep_alive, images, think, tools, …; see `calls.TOP_LEVEL`) go where it has them, `options`
    is a mapping of options, and every other name (temperature, num_ctx, seed, distributed,
    session_id, quantize, …) is one option.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8000,
        *,
        base_urls: Sequence[str] | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self._servers = Servers([base_url(host, port)] if base_urls is None else base_urls)
        self._headers = headers(api_key)
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._streams: WeakSet[AsyncStream[Any]] = WeakSet()
        self._closed = False

    @overload
    def generate(
        self, model: str, prompt: str = "", *, stream: Literal[True] = True, **options: Any
    ) -> AsyncStream[GenerateResponse]: ...
    @overload
    def generate(
        self, model: str, prompt: str = "", *, stream: Literal[False], **options: Any
    ) -> Coroutine[Any, Any, GenerateResponse]: ...
    @overload
    def generate(
        self, model: str, prompt: str = "", *, stream: bool, **options: Any
    ) -> AsyncStream[GenerateResponse] | Coroutine[Any, Any, GenerateResponse]: ...
    def generate(
        self, model: str, prompt: str = "", *, stream: bool = True, **options: Any
    ) -> AsyncStream[GenerateResponse] | Coroutine[Any, Any, GenerateResponse]:
        """Complete a prompt: iterate the pieces, or await all of it with stream=False."""
        return self._answer(calls.generate(model, prompt, stream, options), GenerateResponse.of, stream)

    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: Literal[True] = True,
        **options: Any,
    ) -> AsyncStream[ChatResponse]: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: Literal[False],
        **options: Any,
    ) -> Coroutine[Any, Any, ChatResponse]: ...
    @overload
    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any] | Message], *, stream: bool, **options: Any
    ) -> AsyncStream[ChatResponse] | Coroutine[Any, Any, ChatResponse]: ...
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: bool = True,
        **options: Any,
    ) -> AsyncStream[ChatResponse] | Coroutine[Any, Any, ChatResponse]:
        """Answer a conversation: iterate the pieces, or await the whole message with stream=False."""
        return self._answer(calls.chat(model, messages, stream, options), ChatResponse.of, stream)

    async def embed(
        self,
        model: str,
        input: str | Sequence[str],  # noqa: A002
        **options: Any,
    ) -> EmbedResponse:
        """Return one vector per input."""
        return await self._one(calls.embed(model, input, options), EmbedResponse.of)

    async def list(self) -> ListResponse:
        """Return the models of all nodes."""
        return ListResponse.of((await self._object(calls.get("/api/tags")))[0])

    async def ps(self) -> PsResponse:
        """Return the models that are in memory."""
        return PsResponse.of((await self._object(calls.get("/api/ps")))[0])

    async def show(self, model: str, *, verbose: bool = False) -> ShowResponse:
        """Return what is known of one model."""
        return ShowResponse.of((await self._object(calls.show(model, verbose)))[0])

    @overload
    def pull(self, model: str, *, stream: Literal[True] = True, insecure: bool = False) -> AsyncStream[Progress]: ...
    @overload
    def pull(self, model: str, *, stream: Literal[False], insecure: bool = False) -> Coroutine[Any, Any, Progress]: ...
    @overload
    def pull(
        self, model: str, *, stream: bool, insecure: bool = False
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]: ...
    def pull(
        self, model: str, *, stream: bool = True, insecure: bool = False
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]:
        """Fetch a model from its registry: iterate the progress, or await the end with stream=False."""
        return self._answer(calls.pull(model, stream, insecure), Progress.of, stream)

    @overload
    def push(self, model: str, *, stream: Literal[True] = True, insecure: bool = False) -> AsyncStream[Progress]: ...
    @overload
    def push(self, model: str, *, stream: Literal[False], insecure: bool = False) -> Coroutine[Any, Any, Progress]: ...
    @overload
    def push(
        self, model: str, *, stream: bool, insecure: bool = False
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]: ...
    def push(
        self, model: str, *, stream: bool = True, insecure: bool = False
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]:
        """Send a model to its registry: iterate the progress, or await the end with stream=False."""
        return self._answer(calls.push(model, stream, insecure), Progress.of, stream)

    @overload
    def create(self, model: str, *, stream: Literal[True] = True, **fields: Any) -> AsyncStream[Progress]: ...
    @overload
    def create(self, model: str, *, stream: Literal[False], **fields: Any) -> Coroutine[Any, Any, Progress]: ...
    @overload
    def create(
        self, model: str, *, stream: bool, **fields: Any
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]: ...
    def create(
        self, model: str, *, stream: bool = True, **fields: Any
    ) -> AsyncStream[Progress] | Coroutine[Any, Any, Progress]:
        """Make a model; fields are those of Ollama's /api/create (`from_`, files, system, quantize, …)."""
        return self._answer(calls.create(model, stream, fields), Progress.of, stream)

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        await self._bytes(calls.copy(source, destination))

    async def delete(self, model: str) -> None:
        """Remove a model from every node that has it."""
        await self._bytes(calls.delete(model))

    async def version(self) -> str:
        """Return the version of Ollama's API that the server speaks."""
        return str((await self._object(calls.get("/api/version")))[0].get("version", ""))

    async def status(self) -> StatusResponse:
        """Return the cluster as the proxy sees it."""
        return StatusResponse.of((await self._object(calls.get("/api/status")))[0].get("osync"))

    async def plan(
        self, model: str, *, stages: int | None = None, shards: Sequence[str] = (), context: int | None = None
    ) -> PlanResponse:
        """Return how the proxy would split a model over its shards now, and whether it would."""
        return PlanResponse.of((await self._object(calls.plan(model, stages, shards, context)))[0])

    async def close(self) -> None:
        """Close all streams and connections; the client cannot be used any more."""
        self._closed = True
        for stream in builtins.list(self._streams):
            await stream.aclose()
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _answer(self, call: Call, build: Callable[..., T], stream: bool) -> AsyncStream[T] | Coroutine[Any, Any, T]:
        return AsyncStream(self, call, build) if stream else self._one(call, build)

    async def _one(self, call: Call, build: Callable[..., T]) -> T:
        value, node = await self._object(call)
        return decoding.with_node(build, node)(value)

    async def _object(self, call: Call) -> tuple[dict[str, Any], str]:
        body, node, url = await self._bytes(call)
        value = decoding.decode(body, url)
        if error := value.get("error"):
            raise StreamBroken(str(error))
        return value, node

    async def _bytes(self, call: Call) -> tuple[bytes, str, str]:
        response, url = await self._open(call)
        async with response:
            return await self._body(response, url), response.headers.get("X-Osync-Node", ""), url

    async def _body(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        parts, size = [], 0
        try:
            async for part in response.content.iter_any():
                size += len(part)
                if size > decoding.MAX_OBJECT:
                    raise decoding.broken(url, f"it is over {decoding.MAX_OBJECT} bytes")
                parts.append(part)
        except TimeoutError as error:
            raise decoding.timed_out(url, self._timeout) from error
        except _BROKEN as error:
            raise decoding.broken(url, error) from error
        return b"".join(parts)

    async def _open(self, call: Call) -> tuple[aiohttp.ClientResponse, str]:
        """Send a request to the first server that takes it; the caller closes the response."""
        failure: OsyncError | None = None
        for url in self._servers.order():
            sent = True
            try:
                response = await self._send(call, url)
                if response.status < 400:
                    self._servers.answered(url)
                    return response, url
                async with response:
                    body = await self._body(response, url)
                error = decoding.error_of(response.status, response.headers.get("Retry-After", ""), body, url)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as reason:
                sent, error = False, decoding.unreachable(url, reason)
            except TimeoutError as reason:
                raise decoding.timed_out(url, self._timeout) from reason
            except _BROKEN as reason:
                error = decoding.unreachable(url, str(reason) or type(reason).__name__)
            if not may_move(call, error, sent=sent):
                raise error
            if failure is None or sent:  # what a server said tells more than that another is away
                failure = error
        assert failure is not None
        raise failure

    async def _send(self, call: Call, url: str) -> aiohttp.ClientResponse:
        if self._closed:
            raise ConfigError("this client is closed; make a new one")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self._timeout, connect=CONNECT_TIMEOUT_S),
                headers=self._headers,
            )
        return await self._session.request(call.method, url + call.path, data=call.body, allow_redirects=False)
