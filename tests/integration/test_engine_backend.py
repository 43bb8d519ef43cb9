"""The engine backend's HTTP behaviour, with a runner that needs no llama.cpp."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import orjson
import pytest

from osync.backend.engine import EngineBackend, answers
from osync.backend.engine.runner import EngineLibrary
from osync.config import Settings
from osync.coordinator.embedding import Embeddings
from osync.coordinator.request import Final, Piece
from osync.coordinator.runner import RunnerSettings
from osync.engine.embedding import normalized
from osync.engine.sampling import SamplingOptions
from osync.errors import BadRequest, CapacityError, ConfigError, ModelUnusable, NotSupported
from osync.version import OLLAMA_API
from tests.fakes.gguf import gguf, write
from tests.fakes.serve import Answer, call


class Words:
    size = 100_000
    bos_text = "<s>"
    eos_text = "</s>"


class FakeRunner:
    """A token is a character; it says what it was asked, word by word."""

    vocabulary = Words()
    size_bytes = 1000
    size_vram = 0

    def __init__(self, engine: FakeEngine, path: Path, settings: RunnerSettings) -> None:
        self.engine = engine
        self.path = path
        self.settings = settings
        self.context_length = settings.context_length
        self.parallel = settings.parallel
        self.closed = False
        self.prompts: list[str] = []
        self.options: list[SamplingOptions] = []
        self.running = 0

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return [ord(c) for c in text]

    async def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Final, None]:
        assert not self.closed
        self.prompts.append("".join(map(chr, prompt)))
        self.options.append(options)
        if self.engine.refuses is not None:
            raise self.engine.refuses
        self.running += 1
        self.engine.generating.set()
        try:
            for number, word in enumerate(("Hel", "lo", "")):
                await self.engine.go.wait()
                if number == 1 and self.engine.breaks is not None:
                    raise self.engine.breaks
                yield Piece(word, (65 + number,))
            yield Final("stop", len(prompt), 1000, 4, 2000, (65, 66, 67))
        finally:
            self.running -= 1

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """A text's vector points along its length, its first character and 1."""
        assert not self.closed and texts
        if self.engine.refuses is not None:
            raise self.engine.refuses
        if not truncate and any(len(text) > self.context_length for text in texts):
            raise BadRequest("the input length exceeds the context length")
        vectors = [normalized([len(text), ord(text[0]) if text else 0, 1.0]) for text in texts]
        return Embeddings(tuple(vectors), sum(map(len, texts)))

    async def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Loads fake runners, and holds and breaks them as a test wants."""

    def __init__(self) -> None:
        self.runners: list[FakeRunner] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.go = asyncio.Event()
        self.go.set()
        self.load_error: Exception | None = None
        self.refuses: Exception | None = None
        self.breaks: Exception | None = None
        self.loads = 0
        self.loading = asyncio.Event()
        self.generating = asyncio.Event()

    async def load(self, path: Path, settings: RunnerSettings) -> FakeRunner:
        self.loads += 1
        self.loading.set()
        await self.may_load.wait()
        if self.load_error:
            raise self.load_error
        self.runners.append(FakeRunner(self, path, settings))
        return self.runners[-1]


class Rig:
    """A backend, its engine and its directory."""

    def __init__(self, tmp_path: Path, **settings: object) -> None:
        self.engine = FakeEngine()
        self.models = tmp_path / "models"
        self.memory = 1 << 40
        self.backend = EngineBackend(
            Settings(models_dir=(self.models,), state_dir=tmp_path / "state", **settings),  # type: ignore[arg-type]
            load=self.engine.load,
            probe=lambda: EngineLibrary("fake 1"),
            available_memory=lambda: self.memory,
            scan_interval_s=0.02,
        )
        self._changed = asyncio.Event()
        self.backend.on_change(self._changed.set)

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def call(self, method: str, target: str, body: object = b"") -> Answer:
        return await call(self.backend.serve, method, target, body)

    async def generate(self, **body: object) -> Answer:
        return await self.call("POST", "/api/generate", {"model": "tiny", "prompt": "hi", "stream": False, **body})

    async def chat(self, **body: object) -> Answer:
        messages = [{"role": "user", "content": "hi"}]
        return await self.call("POST", "/api/chat", {"model": "tiny", "messages": messages, **body})


@pytest.fixture
async def rig(tmp_path):
    write(tmp_path / "models" / "Tiny.Q4_1.gguf")
    rig = Rig(tmp_path)
    await rig.backend.start()
    await rig.until(lambda: rig.backend.state().ok and rig.backend.state().models)
    yield rig
    await rig.backend.close()
    assert all(r.closed for r in rig.engine.runners)


async def test_the_simple_routes(rig):
    root = await rig.call("GET", "/")
    assert (root.status, root.body) == (200, b"Ollama is running")
    assert root.headers["Content-Type"] == "text/plain; charset=utf-8"
    head = await rig.call("HEAD", "/api/tags")
    assert (head.status, head.body) == (200, b"")
    assert (await rig.call("GET", "/api/version?x=1")).json() == {"version": OLLAMA_API}
    assert (await rig.call("GET", "/api/ps")).body == b'{"models":[]}'
    missing = await rig.call("GET", "/nothing")
    assert (missing.status, missing.body) == (404, b"404 page not found")
    wrong = await rig.call("GET", "/api/chat")
    assert (wrong.status, wrong.body) == (405, b"405 method not allowed")


async def test_tags_and_show(rig):
    tags = (await rig.call("GET", "/api/tags")).json()["models"]
    assert [t["name"] for t in tags] == ["tiny:q4_1", "tiny:latest"]
    assert tags[0]["details"]["quantization_level"] == "Q4_1"
    assert tags[0]["details"]["context_length"] == 4096
    shown = (await rig.call("POST", "/api/show", {"model": "TINY"})).json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["tokenizer.ggml.tokens"] == []
    assert "general.name" not in shown["model_info"]
    assert "tensors" not in shown
    verbose = (await rig.call("POST", "/api/show", {"name": "tiny", "verbose": True})).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == 2000
    assert verbose["tensors"][0] == {"name": "a.weight", "type": "F32", "shape": [32]}
    none = await rig.call("POST", "/api/show", {"model": "x"})
    assert (none.status, none.json()) == (404, {"error": "model 'x:latest' not found"})


async def test_a_vocabulary_is_read_and_serialized_in_slices_beside_the_loop(rig, monkeypatch):
    seen = []

    def dumps(value):
        seen.append((threading.current_thread(), len(value)))
        return before(value)

    before = answers.dumps
    monkeypatch.setattr(answers, "dumps", dumps)
    monkeypatch.setattr(answers, "_SLICE", 300)
    body = {"model": "tiny", "verbose": True}
    tokens = (await rig.call("POST", "/api/show", body)).json()["model_info"]["tokenizer.ggml.tokens"]
    assert len(tokens) == 2000 and tokens[299:302] == ["token299", "token300", "token301"]
    assert [size for _, size in seen].count(300) == 2000 // 300
    assert threading.main_thread() not in {thread for thread, _ in seen}


async def test_a_streamed_chat_has_ollamas_shape(rig):
    answer = await rig.chat()
    assert answer.headers == {"Content-Type": "application/x-ndjson"}
    assert answer.body.endswith(b"\n")
    first, second, last = answer.lines()
    assert list(first) == ["model", "created_at", "message", "done"]
    assert first["message"] == {"role": "assistant", "content": "Hel"}
    assert second["message"]["content"] == "lo"
    assert (first["model"], first["done"]) == ("tiny", False)
    assert first["created_at"].endswith("Z")
    assert (last["done"], last["done_reason"], last["eval_count"], last["eval_duration"]) == (True, "stop", 4, 2000)
    assert last["total_duration"] >= last["load_duration"] > 0
    assert "context" not in last
    assert rig.engine.runners[0].prompts == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    assert rig.engine.runners[0].options[0].stop == ("<|im_end|>",)


async def test_generate_whole_and_with_context(rig):
    answer = await rig.generate(system="<S>", options={"temperature": 0, "stop": ["x"]})
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    body = answer.json()
    assert body["response"] == "Hello"
    prompt = rig.engine.runners[0].prompts[0]
    assert prompt.startswith("<|im_start|>system\n<S><|im_end|>")
    assert body["context"] == [*map(ord, prompt), 65, 66, 67]
    assert b"\\u003c" not in answer.body
    await rig.generate(context=body["context"])
    assert rig.engine.runners[0].prompts[1].startswith(prompt + "ABC<|im_start|>user")
    raw = (await rig.generate(raw=True)).json()
    assert rig.engine.runners[0].prompts[2] == "hi"
    assert "context" not in raw
    await rig.generate(template="T:{{ .Prompt }}:")
    assert rig.engine.runners[0].prompts[3] == "T:hi:"


async def test_nothing_goes_out_before_the_first_token(rig):
    rig.engine.go.clear()
    answer = Answer()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    task = asyncio.create_task(call(rig.backend.serve, "POST", "/api/chat", body, answer))
    await rig.engine.generating.wait()
    assert not answer.started
    rig.engine.go.set()
    await task
    assert answer.status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"{", 400, "unexpected EOF"),
        ("/api/chat", b"nope", 400, "invalid character 'n' looking for beginning of value"),
        ("/api/chat", b"[]", 400, "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        ("/api/chat", b"{}", 400, "model is required"),
        ("/api/generate", b"{}", 404, "model '' not found"),
        ("/api/show", b"{}", 400, "model is required"),
        ("/api/chat", {"model": 5}, 400,
         "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
        ("/api/generate", {"model": "tiny", "prompt": []}, 400,
         "json: cannot unmarshal array into Go struct field GenerateRequest.prompt of type string"),
        ("/api/chat", {"model": "tiny", "messages": "x"}, 400,
         "json: cannot unmarshal string into Go struct field ChatRequest.messages of type []api.Message"),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": 1}]}, 400,
         "json: cannot unmarshal number into Go struct field ChatRequest.messages.content of type string"),
        ("/api/generate", {"model": "tiny", "stream": "no"}, 400,
         "json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool"),
        ("/api/chat", {"model": "none"}, 404, "model 'none' not found"),
        ("/api/generate", {"model": "a b"}, 400, "invalid model name"),
        ("/api/generate", {"model": "tiny", "keep_alive": "10"}, 400, 'time: missing unit in duration "10"'),
        ("/api/generate", {"model": "tiny", "options": {"num_ctx": "x"}}, 500,
         'option "num_ctx" must be of type integer'),
        ("/api/generate", {"model": "tiny", "prompt": "x", "raw": True, "system": "y"}, 400,
         "raw mode does not support template, system, or context"),
    ],
)  # fmt: skip
async def test_errors_in_ollamas_words(rig, path, body, status, text):
    answer = await rig.call("POST", path, body)
    assert (answer.status, answer.json()) == (status, {"error": text})
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert rig.engine.loads == 0


@pytest.mark.parametrize(
    "more",
    [{"images": ["aGk="]}, {"tools": [{"type": "function"}]}, {"format": "json"}, {"think": True},
     {"suffix": "x"}, {"logprobs": True}],
)  # fmt: skip
async def test_what_it_cannot_do_it_says(rig, more):
    answer = await rig.generate(**more)
    assert answer.status == 501
    assert f'"{next(iter(more))}"' in answer.json()["error"]


async def test_what_asks_for_nothing_is_fine(rig):
    answer = await rig.generate(images=[], tools=None, format="", think=False, unknown={"a": 1})
    assert answer.status == 200


@pytest.mark.parametrize("path", ["/api/pull", "/api/create", "/api/blobs/sha256:00", "/v1/embeddings"])
async def test_routes_of_other_backends(rig, path):
    answer = await rig.call("POST", path, {"model": "tiny"})
    assert answer.status == 501
    assert "ollama" in answer.json()["error"]


async def test_a_stream_that_breaks_ends_with_an_error_line(rig):
    rig.engine.breaks = RuntimeError("boom")
    lines = (await rig.chat()).lines()
    assert lines[0]["message"]["content"] == "Hel"
    assert list(lines[1]) == ["error"]
    assert len(lines) == 2
    whole = await rig.chat(stream=False)
    assert whole.status == 500
    assert "error" in whole.json()


async def test_a_full_queue_is_503_with_retry_after(rig):
    rig.engine.refuses = CapacityError("server busy, please try again.  maximum pending requests exceeded")
    answer = await rig.chat()
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1"


async def test_load_unload_and_ps(rig):
    answer = await rig.call("POST", "/api/generate", {"model": "tiny", "keep_alive": -1})
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.json()["done_reason"] == "load"
    (row,) = (await rig.call("GET", "/api/ps")).json()["models"]
    assert (row["name"], row["size"], row["size_vram"], row["context_length"]) == ("tiny:latest", 1000, 0, 4096)
    assert row["expires_at"] > "2200"
    assert rig.backend.state().loaded[0].name == "tiny:latest"
    gone = await rig.call("POST", "/api/chat", {"model": "tiny:q4_1", "messages": [], "keep_alive": 0})
    assert gone.json()["message"] == {"role": "assistant", "content": ""}
    assert gone.json()["done_reason"] == "unload"
    await rig.until(lambda: rig.engine.runners[0].closed)
    assert (await rig.call("GET", "/api/ps")).json() == {"models": []}


async def test_keep_alive_ends_an_idle_model(rig):
    await rig.generate(keep_alive="20ms")
    await rig.until(lambda: rig.engine.runners[0].closed)
    await rig.generate(keep_alive=0)
    await rig.until(lambda: rig.engine.runners[1].closed)


async def test_concurrent_requests_share_one_load_and_who_leaves_does_not_stop_it(rig):
    rig.engine.may_load.clear()
    first = asyncio.create_task(rig.generate())
    second = asyncio.create_task(rig.generate(model="tiny:q4_1"))
    await rig.until(lambda: rig.backend.state().queued == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    rig.engine.may_load.set()
    assert (await second).status == 200
    assert rig.engine.loads == 1
    assert rig.backend.state().active == 0


async def test_a_client_that_leaves_frees_its_slot(rig):
    rig.engine.go.clear()
    task = asyncio.create_task(rig.generate())
    await rig.engine.generating.wait()
    assert rig.backend.state().active == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.engine.runners[0].running == 0
    assert rig.backend.state().active == 0


async def test_only_a_real_change_of_options_reloads_and_waits_for_who_is_in_flight(rig):
    await rig.generate(options={"num_ctx": 8192})  # more than the model was trained for: 4096
    await rig.generate(options={"num_gpu": -1, "temperature": 1})
    await rig.generate(options={"num_ctx": 4096})
    assert rig.engine.loads == 1
    rig.engine.go.clear()
    rig.engine.generating.clear()
    running = asyncio.create_task(rig.generate())
    await rig.engine.generating.wait()
    changed = asyncio.create_task(rig.generate(options={"num_ctx": 64}))
    await asyncio.sleep(0)
    assert not rig.engine.runners[0].closed
    rig.engine.go.set()
    assert (await running).status == 200
    assert (await changed).status == 200
    assert rig.engine.runners[0].closed
    assert rig.engine.runners[1].context_length == 64


async def test_the_least_recently_used_model_makes_room(tmp_path):
    for name in "abc":
        write(tmp_path / "models" / f"{name}-Q4_1.gguf")
    rig = Rig(tmp_path, max_loaded_models=2)
    await rig.backend.start()
    await rig.until(lambda: rig.backend.state().ok)
    for name in ("a", "b", "a", "c"):
        assert (await rig.generate(model=name)).status == 200
    assert {s.name for s in rig.backend.state().loaded} == {"a:latest", "c:latest"}
    assert [r.path.name[0] for r in rig.engine.runners if r.closed] == ["b"]
    await rig.backend.close()


async def test_a_model_too_large_for_the_memory_says_so_with_numbers(rig):
    rig.memory = 0
    answer = await rig.generate()
    assert answer.status == 500
    assert answer.json()["error"].startswith("model requires more system memory (")
    assert rig.engine.loads == 0
    rig.memory = 1 << 40
    assert (await rig.generate()).status == 200


async def test_a_load_that_fails_is_an_error_and_the_next_try_is_fresh(rig):
    rig.engine.load_error = ModelUnusable("unsupported architecture")
    answer = await rig.generate()
    assert (answer.status, answer.json()) == (500, {"error": "unsupported architecture"})
    rig.engine.load_error = None
    assert (await rig.generate()).status == 200


async def test_a_load_that_takes_too_long(tmp_path):
    write(tmp_path / "models" / "tiny-Q4_1.gguf")
    rig = Rig(tmp_path, load_timeout="50ms")
    rig.engine.may_load.clear()
    await rig.backend.start()
    answer = await rig.generate()
    assert answer.status == 500
    assert "timed out loading tiny" in answer.json()["error"]
    await rig.backend.close()


async def test_a_long_conversation_loses_its_oldest_turns(rig):
    messages = [{"role": "system", "content": "S"}]
    messages += [{"role": "user", "content": f"turn {n} " + "x" * 50} for n in range(20)]
    answer = await rig.chat(messages=messages, options={"num_ctx": 400})
    assert answer.status == 200
    (prompt,) = rig.engine.runners[0].prompts
    assert len(prompt) < 400
    assert "system\nS" in prompt
    assert "turn 19" in prompt
    assert "turn 0 " not in prompt
    short = await rig.chat(messages=messages, options={"num_ctx": 400}, truncate=False)
    assert (short.status, short.json()) == (400, {"error": "the input length exceeds the context length"})


async def test_a_broken_file_says_why_and_a_new_one_appears_by_itself(rig):
    (rig.models / "bad-Q4_0.gguf").write_bytes(gguf()[:-300])
    answer = await rig.generate(model="bad")
    assert answer.status == 500
    assert "truncated" in answer.json()["error"]
    write(rig.models / "new-Q4_1.gguf")
    await rig.until(lambda: any(m.name == "new:q4_1" for m in rig.backend.state().models))
    write(rig.models / "other-Q4_1.gguf")
    assert (await rig.generate(model="other")).status == 200  # without waiting for the next look


async def test_an_ollama_stores_system_and_parameters_count(rig):
    import hashlib

    def blob(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (rig.models / "blobs").mkdir(exist_ok=True)
        (rig.models / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    layers = {"model": gguf(), "template": b"{{ .System }}|{{ .Prompt }}|", "system": b"Brief.",
              "params": b'{"stop": ["END"], "num_ctx": 128}'}  # fmt: skip
    manifest = rig.models / "manifests" / "registry.ollama.ai" / "library" / "stored" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(
        orjson.dumps({"layers": [
            {"mediaType": f"application/vnd.ollama.image.{k}", "digest": blob(v), "size": len(v)}
            for k, v in layers.items()
        ]})
    )  # fmt: skip
    assert (await rig.generate(model="stored", options={"temperature": 0})).status == 200
    runner = rig.engine.runners[0]
    assert runner.prompts == ["Brief.|hi|"]
    assert runner.options[0].stop == ("END",)
    assert runner.context_length == 128
    shown = (await rig.call("POST", "/api/show", {"model": "stored"})).json()
    assert shown["parameters"] == f'{"num_ctx":<30} 128\n{"stop":<30} "END"'
    assert shown["system"] == "Brief."


async def test_without_llama_cpp_it_says_what_to_install(tmp_path):
    def probe() -> EngineLibrary:
        raise NotSupported("llama.cpp is not installed (pip install 'osync[engine]')")

    write(tmp_path / "models" / "tiny-Q4_1.gguf")
    backend = EngineBackend(
        Settings(models_dir=(tmp_path / "models",), state_dir=tmp_path), probe=probe, scan_interval_s=0.02
    )
    changed = asyncio.Event()
    backend.on_change(changed.set)
    await backend.start()
    await asyncio.wait_for(changed.wait(), 10)
    assert backend.state().ok is False
    assert "pip install 'osync[engine]'" in backend.state().error
    answer = await call(backend.serve, "POST", "/api/generate", {"model": "tiny", "prompt": "x"})
    assert answer.status == 501
    await backend.close()


async def test_close_ends_what_runs(tmp_path):
    write(tmp_path / "models" / "tiny-Q4_1.gguf")
    rig = Rig(tmp_path)
    rig.engine.may_load.clear()
    await rig.backend.start()
    waiting = asyncio.create_task(rig.generate())
    await rig.engine.loading.wait()
    await rig.backend.close()
    assert (await waiting).status == 503


async def test_an_embedding_model_does_not_chat(rig):
    write(rig.models / "embed-F16.gguf", llama__pooling_type=1)
    answer = await rig.chat(model="embed")
    assert (answer.status, answer.json()) == (400, {"error": '"embed" does not support chat'})


async def test_a_wrong_duration_in_the_settings_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="keep_alive"):
        Rig(tmp_path, keep_alive="soon")
