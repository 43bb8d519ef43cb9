"""The generation loop over a stage that is a few lines of arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osync.coordinator.generation import SERVER_BUSY, Generation
from osync.coordinator.pace import FIRST_CHUNK
from osync.coordinator.request import Final, Piece, Request
from osync.coordinator.schedule import CHUNK, Schedule
from osync.engine.frame import Frame, Limits, Outcome
from osync.engine.sampling import SamplingOptions
from osync.errors import BadRequest, CapacityError, ModelError
from tests.fakes.stage import FakeStage, Letters, answer


@asynccontextmanager
async def loop_over(stage: FakeStage, **settings: int | bool) -> AsyncIterator[Generation]:
    generation = Generation(stage, Letters(), **settings)  # type: ignore[arg-type]
    try:
        yield generation
    finally:
        await generation.close()


async def read(request: Request) -> tuple[str, Final]:
    text = ""
    async for event in request.events():
        if isinstance(event, Piece):
            text += event.text
        else:
            return text, event
    raise AssertionError("no end")


async def test_many_requests_each_get_their_own_answer():
    stage = FakeStage(sequences=3, n_batch=8)
    prompts = [[n, n + 1, *range(1, 5 + n)] for n in range(1, 12)]
    async with loop_over(stage) as generation:
        requests = [generation.submit(p, SamplingOptions(num_predict=9)) for p in prompts]
        answers = await asyncio.gather(*(read(request) for request in requests))
    for prompt, (text, final) in zip(prompts, answers, strict=True):
        assert final.tokens == tuple(answer(prompt, 9))
        assert text == "".join(chr(97 + token % 26) for token in final.tokens)
        assert (final.done_reason, final.prompt_tokens, final.output_tokens) == ("length", len(prompt), 9)
    assert any(len(frame.rows) == 3 for frame in stage.frames)
    assert stage.open == set()


async def test_deterministic_mode_evaluates_one_sequence_at_a_time():
    stage = FakeStage(sequences=3, n_batch=512, context=2000)
    prompts = [list(range(1, 600)), list(range(1, 300)), [5]]
    async with loop_over(stage, deterministic=True) as generation:
        requests = [generation.submit(p, SamplingOptions(num_predict=4)) for p in prompts]
        answers = await asyncio.gather(*(read(request) for request in requests))
    assert [final.tokens for _, final in answers] == [tuple(answer(p, 4)) for p in prompts]
    assert all(len(frame.rows) <= 1 for frame in stage.frames)
    shapes = [len(f.rows[0].tokens) for f in stage.frames if f.rows and f.rows[0].sequence == 0]
    assert shapes == [CHUNK, CHUNK, 599 - 2 * CHUNK, 1, 1, 1]


async def test_next_turn_evaluates_only_what_is_new():
    stage = FakeStage(context=64, n_batch=64)
    async with loop_over(stage) as generation:
        prompt = [1, 2, 3, 4, 5]
        _, first = await read(generation.submit(prompt, SamplingOptions(num_predict=4)))
        longer = [*prompt, *first.tokens, 8, 9]
        _, second = await read(generation.submit(longer, SamplingOptions(num_predict=2)))
        assert second.reused_tokens == 8  # the last sampled token was never evaluated
        assert second.tokens == tuple(answer(longer, 2))
        _, third = await read(generation.submit(prompt, SamplingOptions(num_predict=2)))
        assert third.reused_tokens == 4
        assert third.tokens == tuple(answer(prompt, 2))


async def test_a_cache_that_cannot_be_cut_is_evaluated_again():
    stage = FakeStage(sequences=1, can_cut=False)
    async with loop_over(stage) as generation:
        for prompt in ([1, 2, 3, 4], [1, 2, 9], [1, 2, 9, 4]):
            _, final = await read(generation.submit(prompt, SamplingOptions(num_predict=3)))
            assert final.tokens == tuple(answer(prompt, 3))


async def test_full_context_ends_the_answer():
    stage = FakeStage(context=8)
    async with loop_over(stage) as generation:
        _, final = await read(generation.submit([1, 2, 3], SamplingOptions()))
        assert (final.done_reason, final.output_tokens) == ("length", 6)
        _, final = await read(generation.submit(list(range(1, 9)), SamplingOptions()))
        assert (final.done_reason, final.output_tokens) == ("length", 1)
        with pytest.raises(BadRequest, match="the input length exceeds the context length"):
            generation.submit(list(range(1, 10)), SamplingOptions())


async def test_num_predict_0_evaluates_the_prompt_only():
    stage = FakeStage()
    async with loop_over(stage) as generation:
        text, final = await read(generation.submit([1, 2, 3], SamplingOptions(num_predict=0)))
    assert (text, final.done_reason, final.output_tokens, final.tokens) == ("", "length", 0, ())
    assert stage.cache[final.reused_tokens] == [1, 2, 3]


async def test_stop_string_and_end_token():
    prompt = [1, 2, 3]
    text = "".join(chr(97 + token % 26) for token in answer(prompt, 12))
    async with loop_over(FakeStage()) as generation:
        got, final = await read(generation.submit(prompt, SamplingOptions(stop=(text[4:7],))))
        assert (got, final.done_reason) == (text[:4], "stop")
        assert generation.active == 0


async def test_full_queue_refuses_in_ollamas_words():
    stage = FakeStage(sequences=1)
    stage.gate.clear()
    async with loop_over(stage, max_queue=2) as generation:
        requests = [generation.submit([1], SamplingOptions(num_predict=1)) for _ in range(3)]
        with pytest.raises(CapacityError, match=SERVER_BUSY):
            generation.submit([1], SamplingOptions())
        await asyncio.sleep(0)
        assert (generation.active, generation.queued) == (1, 2)
        stage.gate.set()
        await asyncio.gather(*(read(request) for request in requests))
        assert (generation.active, generation.queued) == (0, 0)


async def test_cancelled_requests_free_slot_and_queue():
    stage = FakeStage(sequences=1, n_batch=32)
    stage.gate.clear()
    async with loop_over(stage) as generation:
        long = generation.submit(list(range(1, 30)), SamplingOptions())
        waiting = generation.submit([1], SamplingOptions())
        last = generation.submit([2], SamplingOptions(num_predict=2))
        async with aclosing(long.events()):
            while not stage.frames:
                await asyncio.sleep(0)
        waiting.cancel()
        assert generation.queued == 1
        long.cancel()  # its many rows are aborted
        _, final = await read(last)
        assert final.tokens == tuple(answer([2], 2))
        assert generation.active == 0


async def test_a_failing_stage_fails_its_sequences_and_no_more():
    stage = FakeStage(sequences=1)
    async with loop_over(stage) as generation:
        stage.fail_next = RuntimeError("broken")
        broken = generation.submit([1, 2], SamplingOptions())
        fine = generation.submit([1, 2], SamplingOptions(num_predict=3))
        with pytest.raises(ModelError, match="broken"):
            await read(broken)
        _, final = await read(fine)
        assert final.tokens == tuple(answer([1, 2], 3))


async def test_close_fails_what_is_under_way():
    stage = FakeStage(sequences=1)
    stage.gate.clear()
    async with loop_over(stage) as generation:
        requests = [generation.submit([1], SamplingOptions()) for _ in range(2)]
        await asyncio.sleep(0)
    for request in requests:
        with pytest.raises(ModelError, match="unloaded"):
            await read(request)
    with pytest.raises(ModelError, match="unloaded"):
        generation.submit([1], SamplingOptions())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(4, 16),
    st.booleans(),
)
def test_any_load_gives_each_request_its_answer(
    wishes: list[tuple[int, int, bool]], sequences: int, n_batch: int, deterministic: bool
):
    """Requests, some of them cancelled in mid-answer, over any number of slots and any batch."""

    async def ask(generation: Generation, prompt: list[int], count: int, leave: bool) -> None:
        request = generation.submit(prompt, SamplingOptions(num_predict=count))
        if leave:
            for _ in range(count):
                await asyncio.sleep(0)
            request.cancel()
            return
        _, final = await read(request)
        assert final.tokens == tuple(answer(prompt, count))

    async def main() -> None:
        async with loop_over(FakeStage(sequences, 64, n_batch), deterministic=deterministic) as generation:
            prompts = [[number % 3 + 1] * length for number, (length, _, _) in enumerate(wishes)]
            async with asyncio.TaskGroup() as group:
                for prompt, (_, count, leave) in zip(prompts, wishes, strict=True):
                    group.create_task(ask(generation, prompt, count, leave))

    asyncio.run(main())


def request_for(prompt: list[int], **options: Any) -> Request:
    return Request(prompt, SamplingOptions(**options), Letters(), context_length=4096, now_ns=0)


def evaluate(schedule: Schedule, took_ns: int = 1) -> Frame:
    """Evaluate the next frame; whoever samples gets token 5."""
    frame = schedule.frame()
    assert frame is not None
    finish(schedule, frame, took_ns)
    return frame


def finish(schedule: Schedule, frame: Frame, took_ns: int) -> None:
    sampled = {rows.sequence: (5,) for rows in frame.rows if rows.sample}
    for request in schedule.apply(frame, Outcome(sampled), took_ns, 1):
        schedule.release(request)


def test_prompts_join_running_answers_so_that_these_slow_down_twofold_at_most():
    """An evaluation takes 100, and 10 more for each row of a prompt."""
    schedule = Schedule(Limits(2, 4096, 512, 2, 1000))
    schedule.admit(request_for(list(range(1, 400))))
    assert [len(rows.tokens) for rows in evaluate(schedule, 100 + 3990).rows] == [399]
    evaluate(schedule, 100)
    schedule.admit(request_for(list(range(2, 401))))
    sizes = []
    while schedule.slots[1].pending > 1:
        frame = schedule.frame()
        assert frame is not None
        sizes.append(sum([len(rows.tokens) for rows in frame.rows]) - 1)
        finish(schedule, frame, 100 + 10 * sizes[-1])
    assert sum(sizes) == 399
    assert max(sizes) < 10  # which would be twofold; from the first one on
    assert sizes[-2] >= 6 or sizes[-3] >= 6


def test_a_host_that_became_slower_changes_what_may_join_only_for_a_while():
    schedule = Schedule(Limits(2, 4096, 512, 2, 1000))
    schedule.admit(request_for([1] * 100))
    evaluate(schedule, 1100)
    evaluate(schedule, 100)
    schedule.admit(request_for([2] * 2000))
    sizes = []
    while schedule.slots[1].pending > 1:
        frame = schedule.frame()
        assert frame is not None
        sizes.append(sum([len(rows.tokens) for rows in frame.rows]) - 1)
        finish(schedule, frame, (100 + 10 * sizes[-1]) * (5 if len(sizes) > 20 else 1))
    assert min(sizes[100:-1]) == 0
    assert 6 <= max(sizes[100:]) < 10


def test_without_a_measurement_few_rows_join():
    schedule = Schedule(Limits(2, 4096, 512, 2, 1000))
    schedule.admit(request_for([1]))
    evaluate(schedule)
    schedule.admit(request_for(list(range(2, 401))))
    assert sorted(len(rows.tokens) for rows in evaluate(schedule).rows) == [1, FIRST_CHUNK]


def test_prompts_that_wait_share_an_evaluation():
    schedule = Schedule(Limits(3, 4096, 512, 3, 1000))
    for n, length in enumerate((2000, 40, 1000), 1):
        schedule.admit(request_for([n] * length))
    assert {rows.sequence: len(rows.tokens) for rows in evaluate(schedule).rows} == {0: 256, 1: 40, 2: 216}


def test_a_fixed_seed_uses_nothing_again_that_was_evaluated_in_another_shape():
    schedule = Schedule(Limits(1, 64, 8, 1, 1000))
    prompt = list(range(20))

    def ask(seed: int) -> int:
        request = request_for(prompt, seed=seed, num_predict=1)
        kept = schedule.admit(request)
        while not request.ended:
            evaluate(schedule)
        return kept

    assert [ask(7), ask(7), ask(-1), ask(7)] == [0, 16, 19, 16]  # whole batches of 8 only, unless no seed asks
