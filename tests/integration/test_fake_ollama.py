"""The fake Ollama behaves as the real one does, so that what is tested against it means something."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import ollama
import openai
import pytest
import zstandard

from tests.fakes.fault import Fault
from tests.fakes.ollama import FakeModel, FakeOllama, expected_text


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    async with FakeOllama(models=("a", FakeModel("b:7b", quantization="Q8_0"))) as fake:
        yield fake


@pytest.fixture
async def http(fake: FakeOllama) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=fake.url) as session:
        yield session


def chat(model: str = "a", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi there"}], **fields}


def lines(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


async def test_chat_streams_the_expected_text(http: aiohttp.ClientSession) -> None:
    async with http.post("/api/chat", json=chat()) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        got = lines(await response.read())
    assert "".join(line["message"]["content"] for line in got) == expected_text(5)
    assert got[-1]["done"] and got[-1]["done_reason"] == "stop" and got[-1]["eval_count"] == 5


async def test_num_predict_cuts_and_says_so(http: aiohttp.ClientSession) -> None:
    body = {"model": "A:latest", "prompt": "p", "stream": False, "options": {"num_predict": 2}}
    async with http.post("/api/generate", json=body) as response:
        got = await response.json()
    assert (got["response"], got["done_reason"], got["model"]) == (expected_text(2), "length", "A:latest")


async def test_nothing_is_sent_before_the_first_token(fake: FakeOllama, http: aiohttp.ClientSession) -> None:
    fake.hold()
    pending = asyncio.create_task(http.post("/api/chat", json=chat()))
    await fake.changes.until(lambda: fake.requests)
    assert not pending.done()
    fake.release(1)
    async with await pending as response:
        assert await response.content.readline()
        await fake.changes.until(lambda: fake.tokens_sent == 1)
        fake.release()
        assert lines(await response.content.read())[-1]["done"]


async def test_slots_wait_and_a_client_that_leaves_stops_its_work(
    fake: FakeOllama, http: aiohttp.ClientSession
) -> None:
    fake.hold()
    first = asyncio.create_task(http.post("/api/chat", json=chat()))
    await fake.changes.until(lambda: fake.running == 1)
    second = asyncio.create_task(http.post("/api/chat", json=chat(stream=False)))
    await fake.changes.until(lambda: len(fake.requests) == 2)
    assert fake.running == 1
    first.cancel()
    await fake.changes.until(lambda: fake.cancelled == 1)
    fake.release()
    async with await second as response:
        assert response.status == 200


async def test_loads_are_bounded_and_loaded_models_are_not(fake: FakeOllama, http: aiohttp.ClientSession) -> None:
    fake.scheduler.max_queue = 1
    async with http.post("/api/chat", json=chat(stream=False)) as response:
        assert response.status == 200
    fake.scheduler.gate.hold()
    loading = asyncio.create_task(http.post("/api/chat", json=chat("b:7b", stream=False)))
    await fake.changes.until(lambda: fake.scheduler.pending == 1)
    async with http.post("/api/chat", json=chat("b:7b")) as response:
        assert response.status == 503
        assert "please try again.  maximum pending" in (await response.json())["error"]
    async with http.post("/api/chat", json=chat(stream=False)) as response:
        assert response.status == 200
    fake.scheduler.gate.release()
    async with await loading as response:
        assert response.status == 200


async def test_ps_keep_alive_and_reload(fake: FakeOllama, http: aiohttp.ClientSession) -> None:
    async with http.post("/api/generate", json={"model": "a", "keep_alive": "10m"}) as response:
        assert (await response.json())["done_reason"] == "load"
    async with http.get("/api/ps") as response:
        (row,) = (await response.json())["models"]
    assert row["name"] == "a:latest" and row["context_length"] == 4096
    async with http.post("/api/chat", json=chat(stream=False, options={"num_ctx": 2048})) as response:
        assert response.status == 200
    assert fake.scheduler.loads == 2
    async with http.post("/api/generate", json={"model": "a", "keep_alive": 0}) as response:
        assert (await response.json())["done_reason"] == "unload"
    assert not fake.scheduler.runners
    async with http.post("/api/generate", json={"model": "a", "prompt": "x", "keep_alive": "10"}) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    ("fault", "broken"),
    [("reset_after", True), ("eof_after", True), ("error_after", False), ("end_after", False)],
)
async def test_streams_break_as_asked(fake: FakeOllama, http: aiohttp.ClientSession, fault: str, broken: bool) -> None:
    fake.fault(Fault.of({fault: 2}))
    got = b""
    async with http.post("/api/chat", json=chat()) as response:
        assert response.status == 200
        try:
            async for piece in response.content.iter_any():
                got += piece
            assert not broken
        except aiohttp.ClientError:
            assert broken
    parsed = lines(got)
    assert not any(line.get("done") for line in parsed)
    assert ("error" in parsed[-1]) is (fault == "error_after")
    assert fake.cancelled == 0


async def test_faults_before_the_first_byte(fake: FakeOllama, http: aiohttp.ClientSession) -> None:
    fake.fault(status=500, text="boom", model="a", times=2)
    for _ in range(2):
        async with http.post("/api/chat", json=chat()) as response:
            assert (response.status, await response.json()) == (500, {"error": "boom"})
    async with http.post("/api/chat", json=chat("b:7b", stream=False)) as response:
        assert response.status == 200
    fake.fault(reset_after=0)
    with pytest.raises(aiohttp.ClientError):
        await http.post("/api/chat", json=chat())
    fake.fault(hang=True)
    hung = asyncio.create_task(http.post("/api/chat", json=chat(stream=False)))
    await fake.changes.until(lambda: len(fake.received("/api/chat")) >= 5)
    fake.clear_faults()
    async with await hung as response:
        assert response.status == 200


async def test_host_and_origin_are_checked(http: aiohttp.ClientSession) -> None:
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "box.local:11434"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
    ):
        async with http.get("/api/tags", headers=headers) as response:
            assert response.status == status
            assert status == 200 or not await response.read()


async def test_unknown_routes_and_models(http: aiohttp.ClientSession) -> None:
    for method, path, status, text in (
        ("GET", "/api/new", 404, "404 page not found"),
        ("GET", "/api/chat", 405, "405 method not allowed"),
        ("GET", "/", 200, "Ollama is running"),
    ):
        async with http.request(method, path) as response:
            assert (response.status, await response.text()) == (status, text)
    async with http.post("/api/chat", json=chat("zzz")) as response:
        assert (response.status, await response.json()) == (404, {"error": "model 'zzz' not found"})
    async with http.post("/api/embed", json={"model": "zzz", "input": "x"}) as response:
        assert (await response.json())["error"] == 'model "zzz" not found, try pulling it first'
    async with http.get("/api/tags") as response:
        assert (await response.json())["models"][0]["x_new_field"]


async def test_pull_create_copy_delete_and_blobs(fake: FakeOllama, http: aiohttp.ClientSession) -> None:
    async with http.post("/api/pull", json={"model": "nope"}) as response:
        got = lines(await response.read())
    assert got == [{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}]
    fake.store.registry["c:latest"] = FakeModel("c", size=400)
    async with http.post("/api/pull", json={"model": "c"}) as response:
        got = lines(await response.read())
    assert [line["completed"] for line in got if "completed" in line] == [100, 200, 300, 400]
    assert got[-1] == {"status": "success"} and fake.store.find("c")
    data = b"GGUF" * 1000
    digest = hashlib.sha256(data).hexdigest()

    async def pieces() -> AsyncIterator[bytes]:
        yield data[:100]
        yield data[100:]

    async with http.head(f"/api/blobs/sha256:{digest}") as response:
        assert response.status == 404
    for status in (201, 200):
        async with http.post(f"/api/blobs/sha256:{digest}", data=pieces()) as response:
            assert response.status == status
    async with http.post(f"/api/blobs/sha256:{'0' * 64}", data=data) as response:
        assert response.status == 400
    body = {"model": "made", "files": {"m.gguf": f"sha256:{digest}"}, "stream": False}
    async with http.post("/api/create", json=body) as response:
        assert await response.json() == {"status": "success"}
    async with http.post("/api/copy", json={"source": "made", "destination": "x/y:z"}) as response:
        assert response.status == 200
    for status in (200, 404):
        async with http.delete("/api/delete", json={"model": "x/y:z"}) as response:
            assert response.status == status
    assert fake.store.find("made")


async def test_official_clients_work(fake: FakeOllama) -> None:
    client = ollama.AsyncClient(host=fake.url)
    parts = [part async for part in await client.chat("a", [{"role": "user", "content": "x"}], stream=True)]
    assert "".join(part.message.content or "" for part in parts) == expected_text(5)
    assert [m.model for m in (await client.list()).models]
    assert (await client.show("a")).details is not None
    assert len((await client.embed("a", "text")).embeddings[0]) == 16
    await client._client.aclose()
    async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="x") as api:
        messages: Any = [{"role": "user", "content": "x"}]
        whole = await api.chat.completions.create(model="a", messages=messages)
        assert whole.choices[0].message.content == expected_text(5)
        stream = await api.chat.completions.create(model="a", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == expected_text(5)
        assert (await api.completions.create(model="a", prompt="x")).choices[0].text == expected_text(5)
        answer = await api.responses.create(model="a", input="x")
        assert answer.output_text == expected_text(5)
        assert [m.id async for m in api.models.list()]
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(model="zzz", messages=messages)


async def test_anthropic_events(http: aiohttp.ClientSession) -> None:
    body = {"model": "a", "max_tokens": 2, "stream": True, "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/messages", json=body) as response:
        text = (await response.read()).decode()
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-1] == "message_stop"
    assert names.count("content_block_delta") == 2


async def test_runs_as_a_process() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.ollama", "--models", "m1,m2", "--tokens", "3", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        word, _, url = (await process.stdout.readline()).decode().strip().partition(" ")
        assert word == "listening"
        async with aiohttp.ClientSession(base_url=url) as http:
            async with http.post("/_fake/fault", json={"status": 503, "text": "full"}) as response:
                assert response.status == 200
            async with http.post("/api/chat", json=chat("m1")) as response:
                assert response.status == 503
            async with http.post("/api/chat", json=chat("m2", stream=False)) as response:
                assert (await response.json())["message"]["content"] == expected_text(3)
    finally:
        process.kill()
        await process.wait()


ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "x",
    "",
    [],
    [1],
    ["x"],
    [{}],
    [None],
    {},
    {"x": 1},
    {"x": None},
)
SHAPES: dict[str, dict[str, Any]] = {
    "/api/generate": {"model": "a", "prompt": "x", "stream": False},
    "/api/chat": chat(stream=False),
    "/api/embed": {"model": "a", "input": "x"},
    "/api/embeddings": {"model": "a", "prompt": "x"},
    "/v1/chat/completions": chat(),
    "/v1/completions": {"model": "a", "prompt": "x"},
    "/v1/embeddings": {"model": "a", "input": "x"},
    "/v1/responses": {"model": "a", "input": "x"},
    "/v1/messages": chat(max_tokens=5),
    "/api/show": {"model": "a"},
    "/api/copy": {"source": "a", "destination": "z"},
    "/api/pull": {"model": "a", "stream": False},
    "/api/push": {"model": "a", "stream": False},
    "/api/create": {"model": "c", "from": "a", "files": {}, "stream": False},
    "/api/delete": {"model": "b:7b"},
}
MORE = ("options", "keep_alive", "max_tokens", "max_output_tokens", "dimensions", "context", "name")


@pytest.mark.parametrize("path", SHAPES)
async def test_odd_types_get_an_error_and_never_a_crash(http: aiohttp.ClientSession, path: str) -> None:
    shape = SHAPES[path]
    method = "DELETE" if path == "/api/delete" else "POST"
    bodies: list[bytes] = [b"", b" ", b"{", b"nope", b"null", b"[]", b"5", b'{"a":' * 2000, b'{"model":"\\ud800"}']
    bodies += [json.dumps({**shape, name: odd}).encode() for name in (*shape, *MORE) for odd in ODD]
    if path.startswith("/api/"):
        bodies += [json.dumps({**shape, "options": {name: odd}}).encode() for name in ("num_predict", "temperature",
                   "stop", "use_mmap", "num_ctx") for odd in ODD]  # fmt: skip
    for body in bodies:
        async with http.request(method, path, data=body) as response:
            text = await response.text()
            assert response.status in {200, 400, 404, 500}, body
            if response.status != 200:
                assert "error" in json.loads(text), body


async def test_wrong_types_in_the_real_ones_words(http: aiohttp.ClientSession) -> None:
    for path, body, status, text in (
        ("/api/chat", chat(stream="no"), 400,
         "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool"),
        ("/api/chat", {"model": "a", "messages": ["x"]}, 400,
         "json: cannot unmarshal string into Go struct field ChatRequest.messages of type api.Message"),
        ("/api/generate", {"model": 5}, 400,
         "json: cannot unmarshal number into Go struct field GenerateRequest.model of type string"),
        ("/api/generate", {"model": "a", "prompt": "x", "options": {"num_ctx": "x"}}, 500,
         'option "num_ctx" must be of type integer'),
        ("/api/generate", {"model": "a", "keep_alive": [1]}, 400, "Unsupported type: '[]interface {}'"),
        ("/api/pull", {"model": "a", "insecure": 1}, 400,
         "json: cannot unmarshal number into Go struct field PullRequest.insecure of type bool"),
    ):  # fmt: skip
        async with http.post(path, json=body) as response:
            assert (response.status, await response.json()) == (status, {"error": text})


async def test_zstd_is_read_on_the_routes_where_the_real_one_reads_it(
    fake: FakeOllama, http: aiohttp.ClientSession
) -> None:
    packed = zstandard.compress(json.dumps({**chat(), "input": "x", "prompt": "x"}).encode())
    headers = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
    for path, status in (
        ("/v1/responses", 200), ("/v1/chat/completions", 200), ("/v1/completions", 200), ("/v1/messages", 200),
        ("/v1/embeddings", 200), ("/api/chat", 400),
    ):  # fmt: skip
        async with http.post(path, data=packed, headers=headers) as response:
            assert response.status == status, await response.text()
        assert fake.received(path)[-1].body == packed
    async with http.post("/v1/responses", data=b"not zstd", headers=headers) as response:
        assert response.status == 400
