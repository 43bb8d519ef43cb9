"""osync.v1.Inference over a real gRPC server, asking a `Serve` of the test's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.struct_pb2 import Struct, Value

from osync import __version__, errors
from osync.net.exchange import Body, Responder
from osync.net.inference import add_inference
from osync.net.server import RpcServer
from osync.pb import inference_pb2 as pb
from osync.pb import inference_pb2_grpc
from osync.types import RequestHead, ResponseHead

Answer = Callable[[RequestHead, Any, Responder], Awaitable[None]]


class Api:
    """A `Serve` whose answers a test sets by path."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[RequestHead, Any]] = []
        self.cancelled = asyncio.Event()

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        raw = await body.read_all(1 << 20)
        request = json.loads(raw) if raw else None
        self.seen.append((head, request))
        try:
            await self.answers[head.target](head, request, responder)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def set(self, path: str, *pieces: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> None:
        async def answer(head: RequestHead, request: Any, responder: Responder) -> None:
            await responder.start(ResponseHead(status, headers))
            for piece in pieces:
                await responder.write(piece)

        self.answers[path] = answer


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.fixture
async def api() -> Api:
    return Api()


@pytest.fixture
async def stub(api: Api) -> AsyncIterator[Any]:
    server = RpcServer("127.0.0.1", 0)
    add_inference(server, api.serve)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await server.stop(0)


async def collect(call: Any) -> list[Any]:
    try:
        return [item async for item in call]
    finally:
        call.cancel()


async def refusal(awaitable: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (awaitable if asyncio.iscoroutine(awaitable) else as_coroutine(awaitable))
    return caught.value


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


async def test_generate_translates_both_ways(api, stub):
    whole = line(model="m", created_at="t", response="a", done=False) + line(
        model="m", response="", done=True, done_reason="stop", total_duration=7, eval_count=1, context=[1, 2]
    )
    api.set("/api/generate", whole[:10], whole[10:60], whole[60:], headers=(("X-Osync-Node", "n1"),))
    options = Struct()
    options.update({"num_ctx": 2048, "temperature": 0.5, "stop": ["x"]})
    request = pb.GenerateRequest(
        model="m", prompt="hi", system="", keep_alive="10", images=[b"A"], format=Value(string_value="json"),
        think=Value(bool_value=False), options=options,
    )  # fmt: skip
    first, last = await collect(stub.Generate(request, metadata=(("authorization", "Bearer k"), ("x", "y"))))
    assert (first.response, first.created_at, first.done, first.node) == ("a", "t", False, "n1")
    assert not first.HasField("timings")
    assert (last.done, last.done_reason, last.timings.total_duration, list(last.context)) == (True, "stop", 7, [1, 2])
    [(head, body)] = api.seen
    assert dict(head.headers) == {"authorization": "Bearer k", "content-type": "application/json"}
    assert body == {
        "model": "m", "prompt": "hi", "stream": True, "system": "", "keep_alive": 10, "images": ["QQ=="],
        "format": "json", "think": False, "options": {"num_ctx": 2048, "temperature": 0.5, "stop": ["x"]},
    }  # fmt: skip
    assert isinstance(body["options"]["num_ctx"], int)


async def test_chat_carries_tools_and_thoughts(api, stub):
    call = {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    api.set("/api/chat", line(message={"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
                              done=True))  # fmt: skip
    arguments, tool = Struct(), Struct()
    arguments.update({"city": "Ulm"})
    tool.update({"type": "function"})
    request = pb.ChatRequest(
        model="m",
        messages=[pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="c1", name="weather", arguments=arguments)])],
        tools=[tool],
    )
    [piece] = await collect(stub.Chat(request))
    assert piece.message.thinking == "hm"
    assert piece.message.tool_calls[0].arguments["city"] == "Ulm"
    assert api.seen[0][1]["messages"][0]["tool_calls"] == [call]
    assert api.seen[0][1]["tools"] == [{"type": "function"}]


async def test_reads_and_management(api, stub):
    row = {"name": "m:latest", "size": 5, "details": {"family": "llama"}, "expires_at": "t", "size_vram": 2}
    api.set("/api/tags", json.dumps({"models": [row]}).encode())
    api.set("/api/ps", json.dumps({"models": [row]}).encode())
    api.set(
        "/api/show", json.dumps({"template": "x", "model_info": {"a.b": [1, None]}, "capabilities": ["c"]}).encode()
    )
    api.set("/api/embed", json.dumps({"embeddings": [[0.5, 1]], "prompt_eval_count": 3}).encode())
    api.set("/api/version", b'{"version": "0.1"}')
    api.set("/api/copy")
    api.set("/api/delete")
    api.set("/api/pull", line(status="pulling manifest"), line(status="success"))
    assert (await stub.List(pb.ListRequest())).models[0].details.family == "llama"
    assert (await stub.Ps(pb.PsRequest())).models[0].size_vram == 2
    shown = await stub.Show(pb.ShowRequest(model="m"))
    assert (shown.template, list(shown.capabilities), shown.model_info["a.b"][0]) == ("x", ["c"], 1)
    embedded = await stub.Embed(pb.EmbedRequest(model="m", input=["x"], dimensions=2))
    assert list(embedded.embeddings[0].values) == [0.5, 1]
    version = await stub.Version(pb.VersionRequest())
    assert (version.version, version.osync) == ("0.1", __version__)
    await stub.Copy(pb.CopyRequest(source="a", destination="b"))
    await stub.Delete(pb.DeleteRequest(model="a"))
    assert [step.status for step in await collect(stub.Pull(pb.PullRequest(model="m")))] == [
        "pulling manifest",
        "success",
    ]
    assert [(head.method, body) for head, body in api.seen if head.target == "/api/delete"] == [
        ("DELETE", {"model": "a"})
    ]


async def test_health_of_a_proxy_and_of_a_backend(api, stub):
    api.set("/readyz", b'{"error": "no node is up"}', status=503)
    answer = await stub.Health(pb.HealthRequest())
    assert (answer.ready, answer.detail) == (False, "no node is up")
    api.set("/readyz", b"404 page not found", status=404)
    api.set("/", b"Ollama is running")
    assert (await stub.Health(pb.HealthRequest())).ready


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "INVALID_ARGUMENT"), (404, "NOT_FOUND"), (500, "INTERNAL"), (501, "UNIMPLEMENTED"), (502, "UNAVAILABLE"),
     (503, "UNAVAILABLE"), (504, "DEADLINE_EXCEEDED"), (401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"),
     (413, "RESOURCE_EXHAUSTED")],
)  # fmt: skip
async def test_statuses_become_codes(api, stub, status, code):
    api.set("/api/generate", b'{"error": ', b'"because"}', status=status)
    api.set("/api/embed", b'{"error": "because"}', status=status)
    for call in (collect(stub.Generate(pb.GenerateRequest())), stub.Embed(pb.EmbedRequest())):
        error = await refusal(call)
        assert (error.code(), error.details()) == (grpc.StatusCode[code], "because")


async def test_errors_of_the_serve_become_their_codes(api, stub):
    async def refuse(head: RequestHead, request: Any, responder: Responder) -> None:
        raise errors.ModelNotFound("model 'm' not found")

    async def fail(head: RequestHead, request: Any, responder: Responder) -> None:
        raise ValueError("a secret")

    api.answers |= {"/api/tags": refuse, "/api/ps": fail}
    error = await refusal(stub.List(pb.ListRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "model 'm' not found")
    error = await refusal(stub.Ps(pb.PsRequest()))
    assert "secret" not in str(error.details())


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ((line(response="a", done=False), line(error="runner died")), grpc.StatusCode.INTERNAL),
        ((line(response="a", done=False),), grpc.StatusCode.UNAVAILABLE),
        ((line(response="a", done=False), b"<html>\n"), grpc.StatusCode.UNAVAILABLE),
        ((line(response="a", done=False), *[b"x" * (1 << 20)] * 9), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_broken_stream_is_never_a_clean_end(api, stub, pieces, code):
    api.set("/api/generate", *pieces)
    got = []
    call = stub.Generate(pb.GenerateRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for item in call:
            got.append(item.response)  # noqa: PERF401
    assert got == ["a"]
    assert caught.value.code() == code


async def test_numbers_that_json_has_not_are_refused(api, stub):
    options = Struct()
    options.update({"temperature": float("nan")})
    error = await refusal(collect(stub.Generate(pb.GenerateRequest(model="m", options=options))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not api.seen


async def test_cancelling_the_call_cancels_the_work(api, stub):
    async def endless(head: RequestHead, request: Any, responder: Responder) -> None:
        await responder.start(ResponseHead(200))
        await responder.write(line(response="a", done=False))
        await asyncio.Event().wait()

    api.answers["/api/generate"] = endless
    call = stub.Generate(pb.GenerateRequest())
    assert (await call.read()).response == "a"
    call.cancel()
    async with asyncio.timeout(5):
        await api.cancelled.wait()


async def test_a_reader_that_stops_holds_the_work_back(api, stub):
    written = 0
    moved = asyncio.Event()

    async def endless(head: RequestHead, request: Any, responder: Responder) -> None:
        nonlocal written
        await responder.start(ResponseHead(200))
        while True:
            await responder.write(line(response="x" * 100_000, done=False))
            written += 1
            moved.set()

    api.answers["/api/generate"] = endless
    call = stub.Generate(pb.GenerateRequest())
    await call.read()
    while True:  # until half a second brings nothing more
        moved.clear()
        try:
            async with asyncio.timeout(0.5):
                await moved.wait()
        except TimeoutError:
            break
        assert written < 500, "50 MB were taken for a client that reads nothing"
    call.cancel()
    async with asyncio.timeout(5):
        await api.cancelled.wait()
