"""Several frames in flight, and what may become of them: each request gets the tokens it would get alone."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osync.coordinator.generation import Generation
from osync.coordinator.request import Final, Request
from osync.coordinator.schedule import Schedule
from osync.engine.frame import Frame, Limits, Outcome
from osync.engine.sampling import SamplingOptions
from osync.errors import ModelError, StageLost
from tests.fakes.stage import FakeStage, Fault, Letters, answer


async def final_of(request: Request) -> Final:
    async for event in request.events():
        if isinstance(event, Final):
            return event
    raise AssertionError("no end")


async def run(stage: FakeStage, prompts: list[list[int]], count: int, deterministic: bool = False) -> None:
    """Ask all at once; each answer must be right."""
    generation = Generation(stage, Letters(), deterministic=deterministic)
    try:
        requests = [generation.submit(prompt, SamplingOptions(num_predict=count)) for prompt in prompts]
        finals = await asyncio.gather(*map(final_of, requests))
    finally:
        await generation.close()
    assert [final.tokens for final in finals] == [tuple(answer(prompt, count)) for prompt in prompts]


async def test_a_prompts_chunks_follow_each_other():
    stage = FakeStage(context=1024, n_batch=512, depth=4)
    await run(stage, [list(range(1, 700))], 2)
    assert [len(frame.rows[0].tokens) for frame in stage.frames[:11]] == [64] * 10 + [59]
    assert stage.most_flying == 4


@pytest.mark.parametrize("deterministic", [False, True])
async def test_sequences_are_divided_over_the_frames(deterministic: bool):
    stage = FakeStage(sequences=8, n_batch=512, depth=4)
    await run(stage, [[n] for n in range(1, 9)], 20, deterministic)
    late = [len(frame.rows) for frame in stage.frames[20:40]]
    assert set(late) == ({1} if deterministic else {2})
    assert stage.most_flying == 4


@pytest.mark.parametrize("deterministic", [False, True])
async def test_a_token_need_not_be_known_for_its_successor_to_be_sent(deterministic: bool):
    stage = FakeStage(sequences=1, depth=8, runs_ahead=True)
    await run(stage, [[1, 2, 3]], 20, deterministic)
    assert stage.ran_ahead >= 9
    assert stage.most_flying == 2
    assert sum(len(frame.rows) for frame in stage.frames) == 20


async def test_nothing_is_sent_beyond_the_last_token_that_is_wanted():
    stage = FakeStage(sequences=1, context=12, depth=8, runs_ahead=True)
    generation = Generation(stage, Letters())
    final = await final_of(generation.submit([1, 2, 3], SamplingOptions(num_predict=-1)))
    assert final.done_reason == "length"
    assert len(stage.cache[0]) <= 12
    await generation.close()


async def test_what_was_sent_after_an_end_is_cut_off():
    stage = FakeStage(sequences=1, n_batch=64, context=256, depth=4, runs_ahead=True)
    generation = Generation(stage, Letters())
    prompt = [5, 6, 7]
    text = answer(prompt, 6)
    stop = Letters().piece(text[2]).decode()
    final = await final_of(generation.submit(prompt, SamplingOptions(num_predict=50, stop=(stop,))))
    assert final.done_reason == "stop"
    more = [*prompt, *text[:3], 9]
    second = await final_of(generation.submit(more, SamplingOptions(num_predict=4)))
    assert second.tokens == tuple(answer(more, 4))
    assert second.reused_tokens == len(more) - 1
    await generation.close()


async def test_prompts_go_through_the_stages_that_wait_for_a_token():
    stage = FakeStage(sequences=2, context=1024, n_batch=512, depth=8, runs_ahead=True)
    generation = Generation(stage, Letters())
    first = generation.submit([1], SamplingOptions(num_predict=100))
    async with asyncio.timeout(10):
        while len(stage.frames) < 10:
            await asyncio.sleep(0)
        second = generation.submit(list(range(1, 300)), SamplingOptions(num_predict=2))
        finals = [await final_of(second), await final_of(first)]
    assert [final.tokens for final in finals] == [tuple(answer(list(range(1, 300)), 2)), tuple(answer([1], 100))]
    both = [frame for frame in stage.frames if any(run.sequence == 1 and len(run.tokens) > 1 for run in frame.rows)]
    alone = [frame for frame in both if len(frame.rows) == 1]
    assert len(alone) > len(both) // 2, "between two tokens of a stream there is room for more than one frame"
    await generation.close()


class Repeats(FakeStage):
    """A text that says the same eight tokens again and again; a trip through the stages takes long."""

    def follow(self, history: list[int]) -> int:
        return 1 + (len(history) * 7) % 8


async def test_a_text_that_repeats_is_drafted_and_a_trip_gives_several_tokens():
    stage = Repeats(sequences=1, context=512, n_batch=64, depth=8, runs_ahead=True)
    generation = Generation(stage, Letters())
    final = await final_of(generation.submit([1, 2, 3], SamplingOptions(num_predict=120)))
    assert final.tokens == tuple(1 + (n * 7) % 8 for n in range(3, 123))
    assert stage.accepted > 40
    assert len(stage.frames) < 80
    await generation.close()


@pytest.mark.parametrize(("drafts", "deterministic"), [(False, False), (True, True)])
async def test_drafts_can_be_turned_off(drafts: bool, deterministic: bool):
    stage = Repeats(sequences=1, context=512, n_batch=64, depth=8, runs_ahead=True)
    generation = Generation(stage, Letters(), drafts=drafts, deterministic=deterministic)
    await final_of(generation.submit([1, 2, 3], SamplingOptions(num_predict=60)))
    assert stage.verified == 0
    await generation.close()


async def test_a_lost_stage_is_made_anew_and_nobody_notices():
    stage = FakeStage(sequences=3, n_batch=64, depth=3, kept=2, kept_tokens=200, faults={4: "lose", 9: "lose"})
    await run(stage, [[n, n + 1, n + 2] for n in range(1, 7)], 9)
    assert stage.recovered == 2


async def test_without_a_new_pipeline_everybody_hears_of_it():
    class Hopeless(FakeStage):
        async def recover(self) -> None:
            raise ModelError("no shard is left")

    generation = Generation(Hopeless(sequences=1, depth=2, faults={1: "lose"}), Letters())
    requests = [generation.submit([1, 2], SamplingOptions(num_predict=2)) for _ in range(2)]
    for request in requests:
        with pytest.raises(ModelError, match="no shard is left"):
            await final_of(request)
    assert (generation.active, generation.queued) == (0, 0)
    await generation.close()


async def test_a_stage_that_cannot_be_made_anew_fails_its_requests():
    class Plain:
        limits = FakeStage(depth=2).limits

        async def evaluate(self, frame: Frame) -> Outcome:
            raise StageLost("a shard is gone")

        def abort(self) -> None:
            pass

        async def close(self) -> None:
            pass

    generation = Generation(Plain(), Letters())
    with pytest.raises(StageLost, match="a shard is gone"):
        await final_of(generation.submit([1, 2], SamplingOptions(num_predict=2)))
    await generation.close()


FAULTS = st.dictionaries(st.integers(1, 60), st.sampled_from(["fail", "undo", "lose"]), max_size=5)


@settings(deadline=None, max_examples=300)
@given(
    wishes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12), st.booleans()), min_size=1, max_size=10),
    sequences=st.integers(1, 4),
    n_batch=st.integers(4, 16),
    depth=st.integers(1, 4),
    ahead=st.booleans(),
    repeats=st.booleans(),
    kept=st.integers(0, 3),
    can_cut=st.booleans(),
    deterministic=st.booleans(),
    faults=FAULTS,
    seed=st.integers(0, 1000),
)
def test_whatever_happens_each_request_gets_its_answer_or_an_error(
    wishes: list[tuple[int, int, bool]],
    sequences: int,
    n_batch: int,
    depth: int,
    ahead: bool,
    repeats: bool,
    kept: int,
    can_cut: bool,
    deterministic: bool,
    faults: dict[int, Fault],
    seed: int,
):
    """Conversations of two turns that begin alike, some given up, over stages where evaluations go wrong."""
    rng = random.Random(seed)
    stage = (Repeats if repeats else FakeStage)(
        sequences,
        96,
        n_batch,
        can_cut,
        depth=2 * depth if ahead else depth,
        kept=kept,
        kept_tokens=100 if kept else 0,
        faults=faults,
        runs_ahead=ahead,
    )
    failures = 0

    async def ask(generation: Generation, prompt: list[int], count: int, leave: bool) -> None:
        nonlocal failures
        for turn in range(2):
            seeded = rng.choice([-1, 7])
            request = generation.submit(prompt, SamplingOptions(num_predict=count, seed=seeded))
            if leave and turn == rng.randrange(2):
                for _ in range(rng.randrange(12)):
                    await asyncio.sleep(0)
                request.cancel()
                continue
            try:
                final = await final_of(request)
            except ModelError as error:
                assert str(error) == "broken"
                failures += 1
                return
            assert final.tokens == tuple(stage.answer(prompt, count))
            prompt = [*prompt, *final.tokens, 9, 8, turn]

    async def main() -> None:
        generation = Generation(stage, Letters(), deterministic=deterministic)
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                for number, (length, count, leave) in enumerate(wishes):
                    prompt = [number % 3 + 1] * length + [number]
                    group.create_task(ask(generation, prompt, count, leave))
            assert stage.kept_tokens <= max(100, 0)
        finally:
            await generation.close()

    had = sum(fault == "fail" for fault in faults.values())
    asyncio.run(main())
    assert failures <= had * sequences


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_outcomes_of_a_request_that_left_do_not_reach_the_next(seed: int, depth: int):
    """One slot; prompts in many chunks are given up one after the other while they are in flight."""
    rng = random.Random(seed)
    stage = FakeStage(1, 64, 4, depth=depth, faults={rng.randrange(1, 20): "undo", rng.randrange(1, 20): "fail"})

    async def main() -> None:
        generation = Generation(stage, Letters())
        for n in range(6):
            request = generation.submit([n % 2 + 1] * rng.randrange(1, 30), SamplingOptions(num_predict=3))
            for _ in range(rng.randrange(10)):
                await asyncio.sleep(0)
            request.cancel()
        for prompt in ([1] * 20, [2] * 20, [1] * 24):
            try:
                final = await final_of(generation.submit(prompt, SamplingOptions(num_predict=4)))
            except ModelError:
                continue
            assert final.tokens == tuple(answer(prompt, 4))
        await generation.close()

    asyncio.run(main())


def test_what_became_of_a_request_that_left_does_not_concern_the_next_in_its_slot():
    schedule = Schedule(Limits(1, 64, 4, 1, 1000, depth=3))

    def admit(prompt: list[int]) -> Request:
        request = Request(prompt, SamplingOptions(num_predict=1), Letters(), context_length=64, now_ns=0)
        schedule.admit(request)
        return request

    left = admit([1] * 10)
    first = schedule.frame()
    schedule.release(left)
    asked = admit([2])
    second = schedule.frame()
    assert first is not None and second is not None
    schedule.apply(first, Outcome({}, {0: 0}), 1, 1)
    assert schedule.apply(second, Outcome({0: (5,)}), 1, 1) == [asked]
