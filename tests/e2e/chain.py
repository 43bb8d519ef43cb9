"""A pipeline of layer stages in one process, without network: what one stage gives is what the next one takes."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from osync.engine.context import ContextStage
from osync.engine.frame import Frame, Open, Outcome, Rows
from osync.engine.gguf import read_header
from osync.engine.layers import LayerStage
from osync.engine.llama import ContextSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.slice import plan_slice
from osync.engine.slice_file import file_reader, write_slice
from osync.engine.stage import LocalStage

DETERMINISTIC = ContextSettings(
    context_length=1024, sequences=1, n_batch=256, threads=1, flash_attention="off", unified=False
)


class Evaluates(Protocol):
    """A stage that takes tokens and samples."""

    async def evaluate(self, frame: Frame) -> Outcome: ...


class Chain:
    """Stages one after the other."""

    def __init__(self, stages: Sequence[LayerStage]) -> None:
        self.stages = stages

    async def evaluate(self, frame: Frame) -> Outcome:
        activations: memoryview | None = None
        for stage in self.stages:
            outcome, activations = await stage.evaluate(frame, activations)
            if outcome is not None:
                return outcome
        raise AssertionError("the last stage gave no outcome")


@asynccontextmanager
async def chain(model: Path, cuts: Sequence[int], where: Path, settings: ContextSettings) -> AsyncIterator[Chain]:
    """Write the slices between `cuts`, inner ones only, and load them."""
    header = read_header(model)
    bounds = [0, *cuts, header.block_count]
    async with AsyncExitStack() as stack:
        stages = []
        for first, last in itertools.pairwise(bounds):
            path = where / f"{model.stem}.{first}-{last}.gguf"
            await write_slice(plan_slice(header, first, last), file_reader(model), path)
            stage = await LayerStage.load(path, lambda _model, _part: settings)
            stack.push_async_callback(stage.close)
            stages.append(stage)
        yield Chain(stages)


@asynccontextmanager
async def whole(model: Path, settings: ContextSettings) -> AsyncIterator[LocalStage]:
    stage = await LocalStage.load(model, lambda _: settings)
    try:
        yield stage
    finally:
        await stage.close()


async def logits(stage: ContextStage) -> Any:
    """Return the logits of the last row that was sampled."""

    def read() -> Any:
        size = stage._api.llama_vocab_n_tokens(stage.model.vocabulary_pointer)
        pointer = stage._api.llama_get_logits_ith(stage._context, -1)
        return np.ctypeslib.as_array(pointer, (size,)).copy()

    return await stage._thread.run(read)


async def answer(
    pipeline: Evaluates, last: ContextStage, prompt: Sequence[int], count: int, options: SamplingOptions
) -> tuple[list[int], list[Any]]:
    """Evaluate a prompt in chunks of 256, then sample; returns the tokens, and the logits that each came from."""
    await pipeline.evaluate(Frame(operations=(Open(0, options),)))
    tokens: list[int] = []
    rows: list[Any] = []
    position, chunk = 0, tuple(prompt[:256])
    while len(tokens) < count:
        at_end = position + len(chunk) >= len(prompt)
        outcome = await pipeline.evaluate(Frame((Rows(0, position, chunk, sample=int(at_end)),)))
        assert outcome.undone is None
        position += len(chunk)
        if at_end:
            rows.append(await logits(last))
            tokens += outcome.sampled[0]
            chunk = outcome.sampled[0]
        else:
            chunk = tuple(prompt[position : position + 256])
    return tokens, rows
