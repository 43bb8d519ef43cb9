"""Both clients against a fake Ollama: typed answers, failover, broken streams, leaving early."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from osync import AsyncOllamaClient, OllamaClient, errors
from osync.client.synchronous import Stream
from tests.fakes.model import FakeModel
from tests.fakes.ollama import FakeOllama


@pytest.fixture
async def ollama() -> AsyncIterator[FakeOllama]:
    async with FakeOllama(models=("a:latest",)) as fake:
        yield fake


class Both:
    """Runs one scenario with either client; a plain one works in a thread."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain

    def client(self, *urls: str, **given: Any) -> Any:
        return (OllamaClient if self.plain else AsyncOllamaClient)(base_urls=urls, **given)

    async def call(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(client, method)
        if self.plain:
            return await asyncio.to_thread(bound, *args, **kwargs)
        return await bound(*args, **kwargs)

    async def step(self, stream: Any) -> Any:
        return await (asyncio.to_thread(next, stream) if self.plain else anext(stream))

    async def all(self, stream: Any, into: list[Any] | None = None) -> list[Any]:
        out = [] if into is None else into
        if self.plain:
            await asyncio.to_thread(out.extend, stream)
        else:
            async for item in stream:
                out.append(item)
        return out

    async def close(self, it: Any) -> None:
        if self.plain:
            await asyncio.to_thread(it.close)
        else:
            await (it.close() if hasattr(it, "close") else it.aclose())


@pytest.fixture(params=["async", "plain"])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(request.param == "plain")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_generate_streams_typed_pieces(both, ollama):
    client = both.client(ollama.url)
    pieces = await both.all(client.generate("a", "hi", num_predict=4, system="s"))
    assert pieces[-1].done
    assert pieces[-1].total_duration > 0
    assert pieces[-1].eval_count > 0
    assert all(piece.response for piece in pieces[:-1])
    assert len(pieces) > 2
    [request] = ollama.received("/api/generate")
    assert b'"num_predict":4' in request.body
    await both.close(client)


async def test_chat_in_one_piece(both, ollama):
    client = both.client(ollama.url)
    answer = await both.call(client, "chat", "a", [{"role": "user", "content": "hi"}], stream=False)
    assert answer.done
    assert answer.message.role == "assistant"
    assert answer.message.content
    await both.close(client)


async def test_reads_and_management(both, ollama):
    client = both.client(ollama.url)
    assert [m.name for m in (await both.call(client, "list")).models] == ["a:latest"]
    assert await both.call(client, "version") == ollama.version
    assert (await both.call(client, "show", "a")).details.format == "gguf"
    await both.call(client, "generate", "a", stream=False)
    assert [m.name for m in (await both.call(client, "ps")).models] == ["a:latest"]
    await both.call(client, "copy", "a", "b")
    await both.call(client, "delete", "a")
    assert [m.name for m in (await both.call(client, "list")).models] == ["b:latest"]
    with pytest.raises(errors.ModelNotFound, match="not found"):
        await both.call(client, "delete", "a")
    with pytest.raises(errors.ModelNotFound, match="'nope' not found"):
        await both.all(client.generate("nope", "x"))
    assert (await both.call(client, "status")).nodes == ()
    await both.close(client)


async def test_pull_ends_with_success(both, ollama):
    client = both.client(ollama.url)
    ollama.store.registry["new:latest"] = FakeModel("new:latest")
    steps = await both.all(client.pull("new"))
    assert steps[-1].status == "success"
    await both.close(client)


async def test_a_proxy_that_is_away_is_passed_over_and_the_other_kept(both, ollama):
    client = both.client(f"http://127.0.0.1:{free_port()}", ollama.url)
    for _ in range(2):
        assert (await both.all(client.generate("a", "hi")))[-1].done
    assert client._servers.order()[0] == ollama.url
    await both.close(client)


@pytest.mark.parametrize("status", [502, 503])
async def test_a_proxy_that_cannot_answer_is_passed_over(both, ollama, status):
    async with FakeOllama(models=("a:latest",)) as first:
        first.fault(status=status, times=0)
        client = both.client(first.url, ollama.url)
        assert (await both.all(client.generate("a", "hi")))[-1].done
        await both.close(client)


async def test_nothing_reachable_says_what_to_do(both):
    client = both.client(f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(errors.UpstreamUnavailable, match="osyncd"):
        await both.all(client.generate("a", "hi"))
    await both.close(client)


async def test_full_says_when_to_come_back(both):
    async def full(request: web.Request) -> web.Response:
        return web.json_response({"error": "server busy"}, status=503, headers={"Retry-After": "3"})

    async with serving(full) as url:
        client = both.client(url)
        with pytest.raises(errors.CapacityError, match="busy") as caught:
            await both.all(client.generate("a", "hi"))
        assert caught.value.retry_after_s == 3
        await both.close(client)


@pytest.mark.parametrize("fault", [{"eof_after": 2}, {"end_after": 2}, {"error_after": 2}, {"reset_after": 2}])
async def test_a_broken_stream_is_never_a_clean_end(both, ollama, fault):
    ollama.fault(**fault)
    client = both.client(ollama.url)
    pieces: list[Any] = []
    with pytest.raises(errors.StreamBroken):
        await both.all(client.generate("a", "hi"), pieces)
    assert len(pieces) == 2 or "reset_after" in fault
    await both.close(client)


async def test_closing_a_stream_ends_the_work(both, ollama):
    client = both.client(ollama.url)
    ollama.hold()
    stream = client.generate("a", "hi")
    ollama.release(1)
    assert (await both.step(stream)).response
    await both.close(stream)
    await ollama.changes.until(lambda: ollama.cancelled == 1)
    assert await both.all(stream) == []
    await both.close(client)


async def test_dropping_a_stream_ends_the_work(both, ollama):
    client = both.client(ollama.url)
    ollama.hold()
    stream = client.generate("a", "hi")
    ollama.release(1)
    await both.step(stream)
    del stream
    gc.collect()
    await ollama.changes.until(lambda: ollama.cancelled == 1)
    await both.close(client)


async def test_breaking_out_of_the_loop_ends_the_work(ollama):
    async with AsyncOllamaClient(base_urls=[ollama.url]) as client:
        ollama.hold()
        ollama.release(1)
        async for piece in client.generate("a", "hi"):
            assert piece.response
            break
        await ollama.changes.until(lambda: ollama.cancelled == 1)


async def test_cancelling_the_task_ends_the_work(ollama):
    async with AsyncOllamaClient(base_urls=[ollama.url]) as client:
        ollama.hold()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(Both(False).all(client.generate("a", "hi")))
            await ollama.changes.until(lambda: ollama.running == 1)
            task.cancel()
        await ollama.changes.until(lambda: ollama.cancelled == 1)


async def test_closing_the_client_ends_its_streams(both, ollama):
    client = both.client(ollama.url)
    ollama.hold()
    stream = client.generate("a", "hi")
    ollama.release(1)
    await both.step(stream)
    await both.close(client)
    await ollama.changes.until(lambda: ollama.cancelled == 1)
    with pytest.raises(errors.ConfigError, match="closed"):
        await both.call(client, "list")


async def test_closing_from_another_thread_frees_a_waiting_reader(ollama):
    client = OllamaClient(base_urls=[ollama.url])
    ollama.hold()
    stream: Stream[Any] = client.generate("a", "hi")
    ollama.release(1)
    await asyncio.to_thread(next, stream)
    waiting = asyncio.create_task(asyncio.to_thread(lambda: list(stream)))
    await ollama.changes.until(lambda: ollama.tokens_sent == 1)
    client.close()
    await ollama.changes.until(lambda: ollama.cancelled == 1)
    with contextlib.suppress(errors.StreamBroken):  # it had not begun to wait, where nothing is raised
        assert await waiting == []


async def test_timeout_bounds_the_whole_answer(both, ollama):
    ollama.hold()
    client = both.client(ollama.url, timeout=0.1)
    with pytest.raises(errors.UpstreamTimeout, match=r"0\.1 s"):
        await both.all(client.generate("a", "hi"))
    ollama.release(1)
    client_2 = both.client(ollama.url, timeout=0.3)
    pieces: list[Any] = []
    with pytest.raises(errors.UpstreamTimeout):
        await both.all(client_2.generate("a", "hi"), pieces)
    await both.close(client)
    await both.close(client_2)


class serving:
    """A server with one handler for everything; use with `async with`, gives its URL."""

    def __init__(self, handler: Any) -> None:
        self._app = web.Application()
        self._app.router.add_route("*", "/{path:.*}", handler)

    async def __aenter__(self) -> str:
        self._runner = web.AppRunner(self._app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


async def test_key_prefix_and_node_header(both):
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.method, request.path, request.headers.get("Authorization")))
        answer = {"embeddings": [[0.5, 1]], "done": True, "response": "x"}
        return web.json_response(answer, headers={"X-Osync-Node": "n1"})

    async with serving(handler) as url:
        client = both.client(url + "/prefix", api_key="k")
        answer = await both.call(client, "embed", "a", ["x"])
        assert (answer.embeddings, answer.node) == (((0.5, 1),), "n1")
        [piece] = await both.all(client.generate("a", ""))
        assert piece.node == "n1"
        assert seen[0] == ("POST", "/prefix/api/embed", "Bearer k")
        await both.close(client)


async def test_a_change_is_not_repeated_when_it_may_have_been_done(both):
    seen = []

    async def drop(request: web.Request) -> web.Response:
        seen.append(request.path)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving(drop) as first, serving(drop) as second:
        client = both.client(first, second)
        with pytest.raises(errors.UpstreamError):
            await both.call(client, "copy", "a", "b")
        assert seen == ["/api/copy"]
        with pytest.raises(errors.UpstreamError):
            await both.call(client, "show", "a")
        assert seen[1:] == ["/api/show", "/api/show"]
        await both.close(client)


async def test_many_streams_at_once(both, ollama):
    ollama.scheduler.parallel = 8
    client = both.client(ollama.url)
    answers = await asyncio.gather(*(both.all(client.generate("a", str(i))) for i in range(20)))
    assert all(pieces[-1].done for pieces in answers)
    await both.close(client)
