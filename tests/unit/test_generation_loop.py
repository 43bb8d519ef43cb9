"""The generation loop over a stage that is a few lines of arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osync.coordinator.generation import SERVER_BUSY, Generation
from osync.coordinator.request import Final, Piece, Request
from osync.coordinator.schedule import CHUNK, Schedule
from osync.engine.frame import Close, Copy, Frame, Open, Outcome, Truncate
from osync.engine.sampling import SamplingOptions
from osync.engine.stage import Limits
from osync.errors import BadRequest, CapacityError, ModelError

END = 0


class Letters:
    """Token 1 is "b" and so on; token 0 ends an answer."""

    def piece(self, token: int) -> bytes:
        return bytes([97 + token % 26])

    def is_end(self, token: int) -> bool:
        return token == END


def follow(history: list[int]) -> int:
    """The "model": the next token depends on all before it."""
    return (sum(history) * 7 + len(history)) % 100 + 1


def answer(prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(follow(history))
    return history[len(prompt) :]


class FakeStage:
    """Keeps what a stage keeps and checks that each frame fits it."""

    def __init__(self, sequences: int = 2, context: int = 64, n_batch: int = 8, can_cut: bool = True) -> None:
        self.limits = Limits(sequences, context, n_batch, sequences, 1000)
        self.cache: list[list[int]] = [[] for _ in range(sequences)]
        self.open: set[int] = set()
        self.frames: list[Frame] = []
        self.can_cut = can_cut
        self.aborted = False
        self.fail_next: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def evaluate(self, frame: Frame) -> Outcome:
        self.frames.append(frame)
        self.aborted = False
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        whole = True
        for operation in frame.operations:
            match operation:
                case Open(sequence):
                    self.open.add(sequence)
                case Close(sequence):
                    self.open.discard(sequence)
                case Truncate(sequence, length):
                    if length and length < len(self.cache[sequence]) and not self.can_cut:
                        length, whole = 0, False
                    del self.cache[sequence][length:]
                case Copy():
                    raise AssertionError("unused")
        if self.aborted or not whole:
            return Outcome({}, {rows.sequence: len(self.cache[rows.sequence]) for rows in frame.rows})
        assert sum(len(rows.tokens) for rows in frame.rows) <= self.limits.n_batch
        sampled = {}
        for rows in frame.rows:
            cache = self.cache[rows.sequence]
            assert rows.position == len(cache)
            cache.extend(rows.tokens)
            assert len(cache) <= self.limits.context_length
            if rows.sample:
                assert rows.sequence in self.open
                sampled[rows.sequence] = (follow(cache),)
        return Outcome(sampled)

    def abort(self) -> None:
        self.aborted = True
        self.gate.set()

    async def close(self) -> None:
        pass


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


def test_prompts_join_running_answers_in_small_chunks():
    schedule = Schedule(2, 512)
    requests = [
        Request(list(range(n, 399 + n)), SamplingOptions(), Letters(), context_length=4096, now_ns=0) for n in (1, 2)
    ]
    schedule.admit(requests[0])
    frame = schedule.frame()
    assert [len(rows.tokens) for rows in frame.rows] == [399]
    schedule.apply(frame, Outcome({frame.rows[0].sequence: (5,)}), 1, 1)
    frame = schedule.frame()
    schedule.apply(frame, Outcome({frame.rows[0].sequence: (5,)}), 100, 1)
    schedule.admit(requests[1])
    sizes = []
    while schedule.slots[1].pending > 1:
        frame = schedule.frame()
        sizes.append(max(len(rows.tokens) for rows in frame.rows))
        sampled = {rows.sequence: (5,) for rows in frame.rows if rows.sample}
        schedule.apply(frame, Outcome(sampled), 100 + 10 * sizes[-1], 1)
    assert sum(sizes) == 399
    assert sizes[0] == 32
    assert 7 <= sizes[-2] <= 10  # ten rows double the time of an evaluation


def test_a_fixed_seed_uses_nothing_again_that_was_evaluated_in_another_shape():
    schedule = Schedule(1, 8)
    prompt = list(range(20))

    def ask(seed: int) -> int:
        request = Request(prompt, SamplingOptions(seed=seed, num_predict=1), Letters(), context_length=64, now_ns=0)
        kept = schedule.admit(request)
        while not request.ended:
            frame = schedule.frame()
            sampled = {0: (5,)} if frame.rows[0].sample else {}
            schedule.apply(frame, Outcome(sampled), 1, 1)
        schedule.release(request)
        return kept

    assert [ask(7), ask(7), ask(-1), ask(7)] == [0, 16, 19, 16]  # whole batches of 8 only, unless no seed asks
