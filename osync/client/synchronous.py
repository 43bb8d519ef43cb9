"""The client for plain code, on the standard library's HTTP client."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload
from weakref import WeakSet

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
from osync.client.plain_http import BROKEN, Response
from osync.client.servers import CONNECT_TIMEOUT_S, Servers, base_url, headers, may_move
from osync.errors import ConfigError, OsyncError, StreamBroken

T = TypeVar("T", bound=Answer)


class Stream(Generic[T]):
    """A streamed answer: iterate it; the request goes out with the first step.

    Leaving it early (`close`, the end of `with`, or dropping it) closes the connection, which ends
    the work for it.
    """

    def __init__(self, client: OllamaClient, call: Call, build: Callable[..., T]) -> None:
        self._client = client
        self._call = call
        self._build = build
        self._response: Response | None = None
        self._decoder: decoding.Decoder[T] | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        try:
            item = self._next()
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close()
            raise StopIteration
        return item

    def _next(self) -> T | None:
        response, decoder = self._response, self._decoder
        if response is None or decoder is None:
            response = self._response = self._client._open(self._call)
            self._client._streams.add(self)
            build = decoding.with_node(self._build, response.header("X-Osync-Node"))
            decoder = self._decoder = decoding.Decoder(build, response.url)
        while True:
            if (item := decoder.pop()) is not None:
                return item
            if data := response.read(complete=decoder.complete):
                decoder.feed(data)
                continue
            decoder.end()
            return decoder.pop()

    def close(self) -> None:
        """Close the connection unless the answer came to its end. May be called twice."""
        self._closed = True
        self._client._streams.discard(self)
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        response = getattr(self, "_response", None)
        if response is not None:
            response.close()


class OllamaClient:
    """Asks one osync proxy (or Ollama), or the next of several where one cannot answer.

    `timeout` bounds a whole answer in seconds; None: no limit. Connecting is always bounded.
    Keywords of `generate`, `chat` and `embed` beyond those named: fields of Ollama's request (system,
    format, keep_alive, images, think, tools, …; see `calls.TOP_LEVEL`) go where it has them, `options`
    is a mapping of options, and every other name (temperature, num_ctx, seed, distributed,
    session_id, quantize, …) is one option. May be used by several threads at once.
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
        self._streams: WeakSet[Stream[Any]] = WeakSet()
        self._closed = False

    @overload
    def generate(
        self, model: str, prompt: str = "", *, stream: Literal[True] = True, **options: Any
    ) -> Stream[GenerateResponse]: ...
    @overload
    def generate(self, model: str, prompt: str = "", *, stream: Literal[False], **options: Any) -> GenerateResponse: ...
    @overload
    def generate(
        self, model: str, prompt: str = "", *, stream: bool, **options: Any
    ) -> Stream[GenerateResponse] | GenerateResponse: ...
    def generate(
        self, model: str, prompt: str = "", *, stream: bool = True, **options: Any
    ) -> Stream[GenerateResponse] | GenerateResponse:
        """Complete a prompt: iterate the pieces, or get all of it with stream=False."""
        return self._answer(calls.generate(model, prompt, stream, options), GenerateResponse.of, stream)

    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: Literal[True] = True,
        **options: Any,
    ) -> Stream[ChatResponse]: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: Literal[False],
        **options: Any,
    ) -> ChatResponse: ...
    @overload
    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any] | Message], *, stream: bool, **options: Any
    ) -> Stream[ChatResponse] | ChatResponse: ...
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        stream: bool = True,
        **options: Any,
    ) -> Stream[ChatResponse] | ChatResponse:
        """Answer a conversation: iterate the pieces, or get the whole message with stream=False."""
        return self._answer(calls.chat(model, messages, stream, options), ChatResponse.of, stream)

    def embed(
        self,
        model: str,
        input: str | Sequence[str],  # noqa: A002
        **options: Any,
    ) -> EmbedResponse:
        """Return one vector per input."""
        return self._one(calls.embed(model, input, options), EmbedResponse.of)

    def list(self) -> ListResponse:
        """Return the models of all nodes."""
        return ListResponse.of((self._object(calls.get("/api/tags")))[0])

    def ps(self) -> PsResponse:
        """Return the models that are in memory."""
        return PsResponse.of((self._object(calls.get("/api/ps")))[0])

    def show(self, model: str, *, verbose: bool = False) -> ShowResponse:
        """Return what is known of one model."""
        return ShowResponse.of((self._object(calls.show(model, verbose)))[0])

    @overload
    def pull(self, model: str, *, stream: Literal[True] = True, insecure: bool = False) -> Stream[Progress]: ...
    @overload
    def pull(self, model: str, *, stream: Literal[False], insecure: bool = False) -> Progress: ...
    @overload
    def pull(self, model: str, *, stream: bool, insecure: bool = False) -> Stream[Progress] | Progress: ...
    def pull(self, model: str, *, stream: bool = True, insecure: bool = False) -> Stream[Progress] | Progress:
        """Fetch a model from its registry: iterate the progress, or get the end with stream=False."""
        return self._answer(calls.pull(model, stream, insecure), Progress.of, stream)

    @overload
    def push(self, model: str, *, stream: Literal[True] = True, insecure: bool = False) -> Stream[Progress]: ...
    @overload
    def push(self, model: str, *, stream: Literal[False], insecure: bool = False) -> Progress: ...
    @overload
    def push(self, model: str, *, stream: bool, insecure: bool = False) -> Stream[Progress] | Progress: ...
    def push(self, model: str, *, stream: bool = True, insecure: bool = False) -> Stream[Progress] | Progress:
        """Send a model to its registry: iterate the progress, or get the end with stream=False."""
        return self._answer(calls.push(model, stream, insecure), Progress.of, stream)

    @overload
    def create(self, model: str, *, stream: Literal[True] = True, **fields: Any) -> Stream[Progress]: ...
    @overload
    def create(self, model: str, *, stream: Literal[False], **fields: Any) -> Progress: ...
    @overload
    def create(self, model: str, *, stream: bool, **fields: Any) -> Stream[Progress] | Progress: ...
    def create(self, model: str, *, stream: bool = True, **fields: Any) -> Stream[Progress] | Progress:
        """Make a model; fields are those of Ollama's /api/create (`from_`, files, system, quantize, …)."""
        return self._answer(calls.create(model, stream, fields), Progress.of, stream)

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        self._bytes(calls.copy(source, destination))

    def delete(self, model: str) -> None:
        """Remove a model from every node that has it."""
        self._bytes(calls.delete(model))

    def version(self) -> str:
        """Return the version of Ollama's API that the server speaks."""
        return str((self._object(calls.get("/api/version")))[0].get("version", ""))

    def status(self) -> StatusResponse:
        """Return the cluster as the proxy sees it."""
        return StatusResponse.of((self._object(calls.get("/api/status")))[0].get("osync"))

    def plan(
        self, model: str, *, stages: int | None = None, shards: Sequence[str] = (), context: int | None = None
    ) -> PlanResponse:
        """Return how the proxy would split a model over its shards now, and whether it would."""
        return PlanResponse.of((self._object(calls.plan(model, stages, shards, context)))[0])

    def close(self) -> None:
        """Close all streams and connections; the client cannot be used any more."""
        self._closed = True
        for stream in builtins.list(self._streams):
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call, build: Callable[..., T], stream: bool) -> Stream[T] | T:
        return Stream(self, call, build) if stream else self._one(call, build)

    def _one(self, call: Call, build: Callable[..., T]) -> T:
        value, node = self._object(call)
        return decoding.with_node(build, node)(value)

    def _object(self, call: Call) -> tuple[dict[str, Any], str]:
        body, node, url = self._bytes(call)
        value = decoding.decode(body, url)
        if error := value.get("error"):
            raise StreamBroken(str(error))
        return value, node

    def _bytes(self, call: Call) -> tuple[bytes, str, str]:
        response = self._open(call)
        return response.body(), response.header("X-Osync-Node"), response.url

    def _open(self, call: Call) -> Response:
        """Send a request to the first server that takes it; the caller closes the response."""
        if self._closed:
            raise ConfigError("this client is closed; make a new one")
        failure: OsyncError | None = None
        for url in self._servers.order():
            response, sent = Response(url, self._timeout), False
            taken = False
            try:
                response.connect()
                sent = True
                response.send(call, self._headers)
                if response.status < 400:
                    self._servers.answered(url)
                    taken = True
                    return response
                error = decoding.error_of(response.status, response.header("Retry-After"), response.body(), url)
            except TimeoutError as reason:
                if sent:
                    raise decoding.timed_out(url, self._timeout) from reason
                error = decoding.unreachable(url, f"no connection within {CONNECT_TIMEOUT_S:.0f} s")
            except BROKEN as reason:
                error = decoding.unreachable(url, reason)
            finally:
                if not taken:
                    response.close()
            if not may_move(call, error, sent=sent):
                raise error
            if failure is None or sent:  # what a server said tells more than that another is away
                failure = error
        assert failure is not None
        raise failure
