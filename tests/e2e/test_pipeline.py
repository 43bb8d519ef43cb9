"""A model over several shards answers as the whole model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from osync.coordinator.answering import Answering
from osync.coordinator.request import Final
from osync.coordinator.runner import Runner, RunnerSettings
from osync.engine.sampling import SamplingOptions
from tests.shards import group, source_of

pytestmark = pytest.mark.engine

SETTINGS = RunnerSettings(context_length=1024, parallel=2, deterministic=True, threads=1)
TEXT = "The sky over the sea was of a deep blue, and the old captain looked at it for a long time before he said: "


async def tokens_of(runner: Answering, text: str, options: SamplingOptions) -> tuple[int, ...]:
    prompt = await runner.tokenize(text)
    async for event in runner.generate(prompt, options):
        if isinstance(event, Final):
            return event.tokens
    raise AssertionError("no end")


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("options", [SamplingOptions(temperature=0, num_predict=48),
                                     SamplingOptions(temperature=0.9, seed=7, num_predict=48)])  # fmt: skip
async def test_it_gives_the_same_tokens(
    models_dir: Path, tmp_path: Path, stages: int, options: SamplingOptions
) -> None:
    (path,) = models_dir.glob("*.gguf")
    whole = await Runner.load(path, SETTINGS)
    try:
        expected = await tokens_of(whole, TEXT, options)
    finally:
        await whole.close()
    async with group(tmp_path, stages, (models_dir,)) as shards:
        settings = RunnerSettings(context_length=1024, parallel=2, deterministic=True, stages=stages)
        runner = await shards.coordinator.load(source_of(path, shards), settings)
        assert len(runner.pipeline.stages) == stages
        assert await tokens_of(runner, TEXT, options) == expected
        await runner.close()


@pytest.mark.parametrize("options", [SamplingOptions(temperature=0, num_predict=60),
                                     SamplingOptions(temperature=0.9, seed=7, num_predict=60)])  # fmt: skip
async def test_a_shard_that_dies_costs_no_token(models_dir: Path, tmp_path: Path, options: SamplingOptions) -> None:
    (path,) = models_dir.glob("*.gguf")
    whole = await Runner.load(path, SETTINGS)
    try:
        expected = await tokens_of(whole, TEXT, options)
    finally:
        await whole.close()
    async with group(tmp_path, 4, (models_dir,)) as shards:
        settings = RunnerSettings(context_length=1024, parallel=2, deterministic=True, stages=3)
        runner = await shards.coordinator.load(source_of(path, shards), settings)
        pipeline = runner.pipeline
        seen: list[int] = []
        async for event in runner.generate(await runner.tokenize(TEXT), options):
            if isinstance(event, Final):
                assert event.tokens == expected
                break
            seen.extend(event.tokens)
            if len(seen) > 20 and pipeline.epoch == 1:
                victim = pipeline.stages[1][1]
                await next(shard for shard in shards.shards if shard.address == victim).stop()
        assert pipeline.epoch == 2
        assert pipeline.recoveries == 1
        assert len(pipeline.stages) == 3
        await runner.close()
