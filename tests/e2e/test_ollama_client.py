"""The official `ollama` client against engine nodes: client → proxy → gRPC → node → llama.cpp."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import ollama
import pytest

from tests.daemons import Process
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine
GREEDY = {"temperature": 0, "num_predict": 24}


@pytest.fixture
def client(engine: Process) -> Iterator[ollama.Client]:
    with ollama.Client(host=engine.url) as made:
        yield made


def test_a_chat_is_answered_by_the_real_model(client: ollama.Client):
    messages = [{"role": "user", "content": "What color is the sky?"}]
    answer = client.chat(MODEL, messages, options=GREEDY)
    assert "blue" in (answer.message.content or "")
    assert answer.done and answer.done_reason in ("stop", "length")
    assert answer.prompt_eval_count and answer.eval_count and answer.total_duration


def test_a_stream_adds_up_to_the_whole_answer(client: ollama.Client):
    messages = [{"role": "user", "content": "Count from one to five."}]
    whole = client.chat(MODEL, messages, options=GREEDY)
    chunks = list(client.chat(MODEL, messages, options=GREEDY, stream=True))
    assert len(chunks) > 3
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].eval_count == whole.eval_count


def test_generate_raw_and_with_system(client: ollama.Client):
    raw = client.generate(MODEL, "The sun rises in the", raw=True, options={**GREEDY, "num_predict": 6})
    assert raw.response and raw.context is None
    text = client.generate(MODEL, "Say hello.", system="You are terse.", options=GREEDY)
    assert text.response and text.context


def test_a_seed_repeats_and_seeds_differ(client: ollama.Client):
    def once(seed: int) -> str:
        options = {"seed": seed, "temperature": 1.0, "num_predict": 24}
        return str(client.generate(MODEL, "Write a short poem about rain.", options=options).response)

    assert once(7) == once(7)
    assert len({once(seed) for seed in range(3)}) > 1


def test_stop_strings_end_the_answer_and_are_left_out(client: ollama.Client):
    prompt = "1, 2, 3, 4,"
    free = client.generate(MODEL, prompt, raw=True, options={**GREEDY, "num_predict": 20})
    assert "7" in free.response
    cut = client.generate(MODEL, prompt, raw=True, options={**GREEDY, "num_predict": 20, "stop": [" 7"]})
    assert cut.response == free.response.split(" 7")[0]
    assert cut.done_reason == "stop"


def test_num_predict_ends_with_length(client: ollama.Client):
    answer = client.generate(MODEL, "Tell me a long story.", options={"num_predict": 5, "temperature": 0})
    assert answer.eval_count == 5
    assert answer.done_reason == "length"


def test_lists_shows_and_loaded_models(client: ollama.Client):
    client.generate(MODEL, "hi", options={"num_predict": 1})
    names = [m.model for m in client.list().models]
    assert MODEL in names
    shown = client.show(MODEL)
    assert shown.details and shown.details.quantization_level == "Q4_1"
    assert shown.modelinfo and shown.modelinfo["general.architecture"] == "llama"
    assert [m.model for m in client.ps().models] == [MODEL]


def test_unload_and_load_on_request(client: ollama.Client):
    assert client.generate(MODEL, "", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    assert client.generate(MODEL, "").done_reason == "load"
    assert len(client.ps().models) == 1


def test_what_is_absent_is_404_in_ollamas_words(client: ollama.Client):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("nothing", [{"role": "user", "content": "hi"}])
    assert caught.value.status_code == 404
    assert "model 'nothing' not found" in caught.value.error


def test_what_is_not_there_yet_is_501_and_says_so(client: ollama.Client):
    with pytest.raises(ollama.ResponseError) as caught:
        client.generate(MODEL, "hi", suffix="there")
    assert caught.value.status_code == 501


async def test_many_at_once_are_all_answered(engine: Process):
    options = {"temperature": 0, "num_predict": 12}
    async with ollama.AsyncClient(host=engine.url) as client:
        answers = await asyncio.gather(
            *(client.generate(MODEL, f"Name the number {i}.", options=options) for i in range(12))
        )
    assert all(a.done and a.response for a in answers)


async def test_a_client_that_leaves_frees_its_slot(engine: Process):
    options = {"num_predict": 2000}
    async with ollama.AsyncClient(host=engine.url) as client:
        stream = await client.generate(MODEL, "Tell me a very long story.", options=options, stream=True)
        async for _ in stream:
            break
        await stream.aclose()

    def active() -> int:
        nodes = engine.get("/api/status")["osync"]["nodes"]
        return sum(node["load"]["active"] for node in nodes)

    async with asyncio.timeout(10):
        while await asyncio.to_thread(active):
            await asyncio.sleep(0.02)
