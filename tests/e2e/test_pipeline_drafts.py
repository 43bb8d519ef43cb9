"""Run-ahead, drafts and batches in normal mode: every token is the model's own, judged by the whole model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osync.coordinator.answering import Answering
from osync.coordinator.request import Final
from osync.coordinator.runner import RunnerSettings
from osync.engine.frame import Rows
from osync.engine.llama import ContextSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import LocalStage
from tests.e2e.chain import whole
from tests.shards import Group, group, source_of

pytestmark = pytest.mark.engine

CHUNK = 48
GREEDY = SamplingOptions(temperature=0, num_predict=96)
LIST = "Count: one apple, two apples, three apples, one apple, two apples, three apples, one apple, two apples,"
STORIES = ["The sky over the sea was", "Once upon a time a miller had", "The best way to cook rice is", "In 1969 men"]


async def tokens_of(runner: Answering, text: str, options: SamplingOptions = GREEDY) -> tuple[int, ...]:
    async for event in runner.generate(await runner.tokenize(text), options):
        if isinstance(event, Final):
            return event.tokens
    raise AssertionError("no end")


async def judged(stage: LocalStage, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, float]:
    """Return how many tokens of a greedy answer are not the whole model's best, and how far the worst is from it."""
    tokens = (*prompt, *answer)

    def logits() -> Any:
        api, size = stage._api, stage.limits.vocabulary_size
        rows = []
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK]
            assert api.llama_decode(stage._context, stage._batch.fill((Rows(0, start, piece),), True)) == 0
            rows += [
                np.ctypeslib.as_array(api.llama_get_logits_ith(stage._context, n), (size,)).copy()
                for n in range(len(piece))
            ]
        return np.stack(rows[len(prompt) - 1 : -1])

    found = await stage._thread.run(logits)
    short = found.max(axis=1) - found[np.arange(len(answer)), list(answer)]
    return int((short > 0).sum()), float(short.max())


async def check(path: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    settings = ContextSettings(context_length=512, sequences=1, n_batch=512, threads=2)
    wrong = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        async with whole(path, settings) as stage:
            missed, worst = await judged(stage, prompt, answer)
        assert worst <= 2.0
        wrong, total = wrong + missed, total + len(answer)
    assert wrong <= 0.05 * total


async def ask(shards: Group, path: Path, texts: Sequence[str], stages: int) -> tuple[list[Any], list[Any], Any]:
    settings = RunnerSettings(context_length=512, parallel=4, stages=stages, threads=1)
    runner = await shards.coordinator.load(source_of(path, shards), settings)
    answers = await asyncio.gather(*(tokens_of(runner, text) for text in texts))
    prompts = [await runner.tokenize(text) for text in texts]
    frames = [report.frames for _, _, report in runner.pipeline.stages if report]
    await runner.close()
    return prompts, list(answers), frames


async def test_streams_together_over_stages_give_the_models_own_tokens(models_dir: Path, tmp_path: Path) -> None:
    (path,) = models_dir.glob("*.gguf")
    async with group(tmp_path, 2, (models_dir,)) as shards:
        prompts, answers, _ = await ask(shards, path, STORIES, 2)
    await check(path, prompts, answers)


async def test_drafts_are_only_taken_where_they_are_the_models_own(models_dir: Path, tmp_path: Path) -> None:
    (path,) = models_dir.glob("*.gguf")
    async with group(tmp_path, 3, (models_dir,)) as shards:
        prompts, answers, _ = await ask(shards, path, [LIST], 3)
    await check(path, prompts, answers)
