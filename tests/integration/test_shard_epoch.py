"""An epoch of a pipeline at its stages, over real flows, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from osync.coordinator.wiring import Wiring
from osync.core.stages import Route
from osync.engine import frame_codec
from osync.engine.frame import SAMPLED, Frame, Outcome, Rows, Truncate
from osync.engine.layers import Part
from osync.errors import CapacityError, ModelError, OsyncError, StageLost, WireError
from osync.net.shard_service import Downstream
from osync.shard.epoch import EARLY_OUTCOMES, Epoch, Work
from osync.wire import activation
from tests.fakes.stages import SumShard, SumStage, next_token, order, sum_shards


class Held:
    """Stages of a pipeline that are held without a coordinator's lease."""

    def __init__(self, shards: list[SumShard]) -> None:
        self.shards = shards
        self.stages = [(shard.address, order(i, i + 1, len(shards))) for i, shard in enumerate(shards)]
        self.broke: asyncio.Future[tuple[OsyncError, int | None]] = asyncio.get_running_loop().create_future()

    def wire(self, epoch: int = 1, depth: int = 4) -> Wiring:
        def broke(error: OsyncError, stage: int | None) -> None:
            if not self.broke.done():
                self.broke.set_result((error, stage))

        return Wiring("p", epoch, self.stages, activation_dtype="f32", depth=depth, broke=broke)

    def evaluator(self, stage: int) -> SumStage:
        return self.shards[stage].held[0].evaluator


@asynccontextmanager
async def held(count: int) -> AsyncIterator[Held]:
    async with sum_shards(count) as shards, asyncio.timeout(20):
        group = Held(shards)
        reports = [shard.hold(stage) for shard, (_, stage) in zip(shards, group.stages, strict=True)]
        for each in reports:
            await anext(each)
        yield group
        for each in reports:
            await each.aclose()


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_frames_sent_ahead_of_their_tokens_give_what_the_model_gives(stages: int) -> None:
    async with held(stages) as group:
        wiring = group.wire()
        tasks = [asyncio.create_task(wiring.evaluate(Frame((Rows(0, 0, (5, 6), 1), Rows(1, 0, (7,), 1)))))]
        tasks += [
            asyncio.create_task(wiring.evaluate(Frame((Rows(0, n + 2, (SAMPLED,), 1), Rows(1, n + 1, (SAMPLED,), 1)))))
            for n in range(6)
        ]
        histories = {0: [5, 6], 1: [7]}
        for task in tasks:
            outcome = await task
            for sequence, history in histories.items():
                assert outcome.sampled[sequence] == (next_token(history),)
                history.append(next_token(history))
        assert wiring.in_flight == 0
        await wiring.close()


async def test_a_new_epoch_finds_empty_caches_and_ends_the_old_one() -> None:
    async with held(2) as group:
        first = group.wire(1)
        await first.evaluate(Frame((Rows(0, 0, (1, 2, 3), 1),)))
        second = group.wire(2)
        outcome = await second.evaluate(Frame((Rows(0, 0, (4, 5), 1),)))
        assert outcome == Outcome({0: (next_token([4, 5]),)})
        error, _ = await group.broke
        assert "epoch" in str(error) or "neighbour" in str(error) or "ended" in str(error)
        with pytest.raises(StageLost):
            await first.evaluate(Frame((Rows(0, 3, (1,), 1),)))
        await second.close()
        await first.close()


async def test_an_error_goes_down_the_pipe_and_only_its_frame_fails() -> None:
    async with held(3) as group:
        group.evaluator(1).fails = lambda frame: any(rows.sequence == 1 for rows in frame.rows)
        wiring = group.wire()
        good, bad, later = await asyncio.gather(
            wiring.evaluate(Frame((Rows(0, 0, (1,), 1),))),
            wiring.evaluate(Frame((Rows(1, 0, (2,), 1),))),
            wiring.evaluate(Frame((Rows(0, 1, (SAMPLED,), 1),))),
            return_exceptions=True,
        )
        assert good == Outcome({0: (1,)})
        assert isinstance(bad, ModelError) and "told to fail" in str(bad)
        assert later == Outcome({0: (next_token([1, 1]),)})
        assert not any(rows.sequence == 1 for frame in group.evaluator(2).frames for rows in frame.rows)
        await wiring.close()


async def test_what_one_stage_undoes_is_undone_by_all_after_it() -> None:
    async with held(3) as group:
        wiring = group.wire()
        await wiring.evaluate(Frame((Rows(0, 0, (1, 2, 3), 1),)))
        group.evaluator(1).cells[0] = [1]  # as if it had lost some
        undone, ahead = await asyncio.gather(
            wiring.evaluate(Frame((Rows(0, 3, (4,), 1),))), wiring.evaluate(Frame((Rows(0, 4, (SAMPLED,), 1),)))
        )
        assert undone == Outcome({}, {0: 1})
        assert ahead.undone is not None and ahead.undone[0] <= 1
        again = await wiring.evaluate(Frame((Rows(0, 1, (2, 3, 4), 1),), (Truncate(0, 1),)))
        assert again == Outcome({0: (next_token([1, 2, 3, 4]),)})
        await wiring.close()


async def test_a_stage_that_dies_is_named_by_its_neighbour() -> None:
    async with held(3) as group:
        wiring = group.wire()
        await wiring.evaluate(Frame((Rows(0, 0, (1,), 1),)))
        await group.shards[1].stop()
        waiting = asyncio.create_task(wiring.evaluate(Frame((Rows(0, 1, (SAMPLED,), 1),))))
        with pytest.raises(StageLost):
            await waiting
        _, stage = await group.broke
        assert stage in (1, 2)  # the arrow into it, or out of it: whichever is heard of first
        await wiring.close()


async def test_no_more_frames_than_may_be_in_flight_reach_a_stage_that_stands_still() -> None:
    async with held(2) as group:
        wiring = group.wire(depth=2)
        await wiring.evaluate(Frame((Rows(0, 0, (1,), 1),)))
        group.evaluator(1).gate.clear()
        tasks = [asyncio.create_task(wiring.evaluate(Frame((Rows(0, n + 1, (2,)),)))) for n in range(20)]
        work = group.shards[0].held[0].work
        while work.done < 4:  # as many as stage 1 may owe acknowledgements for
            await asyncio.sleep(0.01)
        await asyncio.wait(tasks, timeout=0.2)
        assert group.shards[1].held[0].work.taken == work.done == 4
        assert not any(task.done() for task in tasks)
        group.evaluator(1).gate.set()
        await asyncio.gather(*tasks)
        await wiring.close()


async def test_a_frame_given_up_before_it_was_sent_ends_the_epoch() -> None:
    async with held(1) as group:
        wiring = group.wire(depth=1)
        await wiring.evaluate(Frame((Rows(0, 0, (1,), 1),)))
        group.evaluator(0).gate.clear()
        tasks = [asyncio.create_task(wiring.evaluate(Frame((Rows(0, n + 1, (2,)),)))) for n in range(4)]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[-1], asyncio.CancelledError)
        assert all(isinstance(result, StageLost) for result in results[:-1])
        group.evaluator(0).gate.set()
        await wiring.close()


# One epoch alone, its flows played by the test.


def route(stage: int = 0, epoch: int = 1, **fields: object) -> Route:
    return Route(pipeline="p", epoch=epoch, stage=stage, addresses=("127.0.0.1:1",), in_flight=4, **fields)  # type: ignore[arg-type]


def encoded(number: int, epoch: int = 1, frame: Frame = Frame((Rows(0, 0, (1,), 1),))) -> bytes:  # noqa: B008 (frozen)
    return b"".join(activation.encode(frame_codec.to_wire(frame, epoch, number)))


@asynccontextmanager
async def epoch_alone() -> AsyncIterator[tuple[Epoch, SumStage]]:
    evaluator = SumStage(Part(0, 1, 1, 1))
    epoch = Epoch(route(), evaluator, Work())
    try:
        yield epoch, evaluator
    finally:
        await epoch.close()


@pytest.mark.parametrize(("number", "epoch_number", "reason"), [(2, 1, "frame 2 came, not 1"), (1, 2, "another epoch")])
async def test_gaps_and_other_epochs_are_refused(number: int, epoch_number: int, reason: str) -> None:
    async with epoch_alone() as (epoch, _):
        door = epoch.open(route(), Downstream(route()))
        with pytest.raises(WireError, match=reason):
            door.take(encoded(number, epoch_number))


async def test_more_frames_than_may_be_in_flight_are_refused() -> None:
    async with epoch_alone() as (epoch, evaluator):
        evaluator.gate.clear()
        door = epoch.open(route(), Downstream(route()))
        with pytest.raises(CapacityError, match="in flight"):
            for number in range(1, 7):
                door.take(encoded(number))
        evaluator.gate.set()


async def messages_of(down: Downstream, count: int) -> list[bytes]:
    found: list[bytes] = []
    async with asyncio.timeout(5):
        async for message in down.messages():
            if message.outcome:
                found.append(message.outcome)
            if len(found) == count:
                break
    return found


async def test_outcomes_wait_for_an_ear_that_comes_late() -> None:
    async with epoch_alone() as (epoch, evaluator):
        source = Downstream(route())
        door = epoch.open(route(), source)
        for number in range(1, 4):
            door.take(encoded(number, frame=Frame((Rows(0, number - 1, (number,), 1),))))
        while len(evaluator.frames) < 4:  # with the one that empties the caches
            await asyncio.sleep(0)
        ear = Downstream(route(wants_outcomes=True))
        epoch.open(route(wants_outcomes=True), ear)
        outcomes = [activation.decode(data) for data in await messages_of(ear, 3)]
        assert [outcome.number for outcome in outcomes] == [1, 2, 3]
        assert EARLY_OUTCOMES > 3


async def test_an_evaluator_that_breaks_is_told_to_the_neighbours() -> None:
    async with epoch_alone() as (epoch, evaluator):

        def broken(frame: Frame) -> bool:
            raise RuntimeError("no thread")

        evaluator.fails = broken
        down = Downstream(route())
        epoch.open(route(), down)
        async with asyncio.timeout(5):
            failures = [message.failure async for message in down.messages()]
        assert "no thread" in failures[0].error
        assert failures[0].stage == 0
        with pytest.raises(StageLost):
            epoch.open(route(), Downstream(route()))


async def test_a_neighbour_that_goes_ends_the_epoch_with_the_stage_that_is_to_blame() -> None:
    async with epoch_alone() as (epoch, _):
        source, ear = Downstream(route()), Downstream(route(wants_outcomes=True))
        epoch.open(route(), source)
        door = epoch.open(route(wants_outcomes=True), ear)
        epoch.fail(StageLost("the next is out of reach"), 3)
        for down in (source, ear):
            async with asyncio.timeout(5):
                (failure,) = [message.failure async for message in down.messages()]
            assert (failure.stage, failure.error) == (3, "the next is out of reach")
        door.closed()
        assert epoch.queued == 0


async def test_a_stage_is_fed_by_one_flow() -> None:
    async with epoch_alone() as (epoch, _):
        epoch.open(route(), Downstream(route()))
        with pytest.raises(WireError, match="one flow"):
            epoch.open(route(), Downstream(route()))
