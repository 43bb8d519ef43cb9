"""What a pipeline does when shards refuse, stall, die, leave or come back: over real gRPC, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from osync.coordinator import pipeline as pipelines
from osync.coordinator.pipeline import Pipeline, Placed, Remains, stuck
from osync.core.stages import StageReport, StageState
from osync.engine.frame import Frame, Outcome, Rows
from osync.errors import ModelUnusable, OsyncError, StageLost, UpstreamUnavailable
from osync.net import lease as leases
from osync.net.lease import StageLease
from tests.fakes.stages import LIMITS, SumShard, next_token, order, sum_shards

LAYERS = 2


class Planner:
    """Places two stages on the first shards that are left."""

    def __init__(self, shards: list[SumShard]) -> None:
        self.shards = shards
        self.asked: list[Remains] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, remains: Remains) -> Sequence[Placed]:
        self.asked.append(remains)
        await self.gate.wait()
        bad = remains.failed | remains.refused
        held = {stage.order.first: stage for stage in remains.held if stage.address not in bad}
        standby = {stage.order.first: stage for stage in remains.standby if stage.address not in bad}
        busy = {stage.address for stage in held.values()}
        spare = [s.address for s in self.shards if s.address not in busy | bad]
        placed = []
        for first in range(LAYERS):
            stage = held.get(first) or standby.get(first)
            if stage is None:
                if not spare:
                    raise ModelUnusable("nobody is left")
                stage = Placed(spare.pop(0), order(first, first + 1, LAYERS))
            placed.append(stage)
        return placed


@asynccontextmanager
async def made(count: int, **fields: float) -> AsyncIterator[tuple[Pipeline, Planner, list[SumShard]]]:
    async with sum_shards(count) as shards:
        planner = Planner(shards)
        times = {"stage_timeout_s": 10.0, "load_timeout_s": 10.0} | fields
        pipeline = Pipeline("p", planner, limits=LIMITS, activation_dtype="f32", **times)
        try:
            async with asyncio.timeout(30):
                yield pipeline, planner, shards
        finally:
            await pipeline.close()


def addresses(pipeline: Pipeline) -> list[str]:
    return [address for _, address, _ in pipeline.stages]


async def one(pipeline: Pipeline, *tokens: int) -> Outcome:
    return await pipeline.evaluate(Frame((Rows(0, 0, tokens, 1),)))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_shard_that_refuses_is_left_out() -> None:
    async with made(3) as (pipeline, planner, shards):
        shards[1].refusal = "the stage needs 2 GiB and this shard has 1 GiB"
        await pipeline.open()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        assert planner.asked[1].refused == {shards[1].address}
        assert len(shards[0].orders) == 1  # it went on holding what it had
        assert await one(pipeline, 3, 4) == Outcome({0: (next_token([3, 4]),)})
        assert pipeline.recoveries == 0


async def test_where_nobody_can_hold_it_the_error_has_the_numbers_and_all_is_given_back() -> None:
    async with made(2) as (pipeline, _, shards):
        shards[1].refusal = "the stage needs 2 GiB and this shard has 1 GiB"
        with pytest.raises(ModelUnusable, match=r"nobody is left; .*needs 2 GiB"):
            await pipeline.open()
        await until(lambda: not shards[0].held)


async def test_a_load_without_progress_is_given_up_and_the_others_go_on() -> None:
    async with made(3, load_timeout_s=0.5) as (pipeline, _, shards):
        shards[0].loads.clear()
        await pipeline.open()
        assert addresses(pipeline) == [shards[2].address, shards[1].address]
        assert len(shards[1].orders) == 1


async def test_a_shard_that_fails_while_others_load_is_replaced_at_once() -> None:
    async with made(3) as (pipeline, planner, shards):
        shards[0].loads.clear()
        shards[1].refusal = "no"
        opening = asyncio.create_task(pipeline.open())
        await until(lambda: len(planner.asked) == 2)  # before the first has loaded
        shards[0].loads.set()
        await opening
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        assert len(shards[0].orders) == 1


async def test_a_shard_that_dies_is_replaced_and_the_other_keeps_its_stage() -> None:
    async with made(3) as (pipeline, _, shards):
        await pipeline.open()
        await one(pipeline, 1, 2)
        waiting = asyncio.create_task(pipeline.evaluate(Frame((Rows(0, 2, (3,), 1),))))
        await shards[1].stop()
        await asyncio.gather(waiting, return_exceptions=True)
        with pytest.raises(StageLost):
            await one(pipeline, 9)
        await pipeline.recover()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        assert (len(shards[0].orders), pipeline.epoch, pipeline.recoveries) == (1, 2, 1)
        assert await one(pipeline, 1, 2, 3) == Outcome({0: (next_token([1, 2, 3]),)})


async def test_a_standby_takes_over_without_a_load() -> None:
    async with made(3) as (pipeline, _, shards):
        await pipeline.open()
        assert await pipeline.stand_by([Placed(shards[2].address, order(1, 2, LAYERS))]) == []
        await until(lambda: any(report is not None for _, _, report in pipeline.standbys))
        assert shards[2].orders[0].standby
        await shards[1].stop()
        await until(lambda: not pipeline.is_connected)
        await pipeline.recover()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        assert len(shards[2].orders) == 1
        assert pipeline.standbys == []
        assert await one(pipeline, 5) == Outcome({0: (5,)})


async def test_a_standby_that_is_not_wanted_any_more_is_given_back_and_a_lost_one_is_told() -> None:
    async with made(4) as (pipeline, _, shards):
        await pipeline.open()
        wanted = [Placed(shards[2].address, order(0, 1, LAYERS)), Placed(shards[3].address, order(1, 2, LAYERS))]
        await pipeline.stand_by(wanted)
        await until(lambda: bool(shards[2].held and shards[3].held))
        await pipeline.stand_by(wanted[1:])
        await until(lambda: not shards[2].held)
        await shards[3].stop()
        await until(lambda: not pipeline.standbys)
        assert await pipeline.stand_by(wanted[1:]) == [shards[3].address]
        assert pipeline.is_connected


async def test_an_idle_pipeline_repairs_itself_and_its_driver_hears_of_it() -> None:
    async with made(3) as (pipeline, _, shards):
        await pipeline.open()
        await one(pipeline, 1)
        await shards[1].stop()
        await until(lambda: pipeline.epoch == 2)
        with pytest.raises(StageLost):
            await one(pipeline, 1)
        await pipeline.recover()
        assert pipeline.epoch == 2  # nothing is made twice
        assert await one(pipeline, 7) == Outcome({0: (7,)})


async def test_it_is_made_anew_between_frames_where_a_shard_is_about_to_leave() -> None:
    async with made(3) as (pipeline, planner, shards):
        await pipeline.open()
        planner.shards = [shards[0], shards[2]]

        async def elsewhere(remains: Remains) -> Sequence[Placed]:
            return await planner(replace(remains, failed=frozenset({shards[1].address})))

        pipeline._place = elsewhere
        pipeline.renew("it is leaving")
        await pipeline.recover()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        await until(lambda: not shards[1].held)


async def test_who_takes_frames_and_passes_none_on_loses_its_place() -> None:
    async with made(3, stage_timeout_s=1.0) as (pipeline, _, shards):
        await pipeline.open()
        await one(pipeline, 1)
        shards[1].held[0].evaluator.gate.clear()
        with pytest.raises(StageLost, match="no progress for 1 s"):
            await pipeline.evaluate(Frame((Rows(0, 1, (2,), 1),)))
        await pipeline.recover()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]


async def test_an_arrow_that_breaks_twice_costs_the_later_shard_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "HINDSIGHT_S", 0.02)
    async with made(3) as (pipeline, _, shards):
        await pipeline.open()
        for _ in range(2):
            assert addresses(pipeline) == [shards[0].address, shards[1].address]
            await one(pipeline, 1)
            epoch = shards[0].held[0].epoch
            assert epoch is not None
            epoch.fail(StageLost("the way to the next stage is gone"), 1)
            await until(lambda: not pipeline.is_connected)
            await pipeline.recover()
        assert addresses(pipeline) == [shards[0].address, shards[2].address]
        assert await one(pipeline, 7) == Outcome({0: (7,)})


async def test_a_second_loss_during_recovery() -> None:
    async with made(4) as (pipeline, planner, shards):
        await pipeline.open()
        shards[2].loads.clear()
        await shards[1].stop()
        await until(lambda: not pipeline.is_connected)
        recovering = asyncio.create_task(pipeline.recover())
        await until(lambda: bool(shards[2].orders))
        await shards[2].stop()
        await recovering
        assert addresses(pipeline) == [shards[0].address, shards[3].address]
        await shards[0].stop()
        planner.shards = [shards[3]]
        with pytest.raises(OsyncError):
            await pipeline.recover()


async def test_closed_while_it_is_opened_it_gives_all_back() -> None:
    async with made(2) as (pipeline, _, shards):
        shards[1].loads.clear()
        opening = asyncio.create_task(pipeline.open())
        await until(lambda: bool(shards[0].held))
        await pipeline.close()
        with pytest.raises(UpstreamUnavailable, match="closed"):
            await opening
        await until(lambda: not shards[0].held)


async def test_closed_while_it_is_planned_it_asks_nobody() -> None:
    async with made(2) as (pipeline, planner, shards):
        planner.gate.clear()
        opening = asyncio.create_task(pipeline.open())
        await until(lambda: bool(planner.asked))
        await pipeline.close()
        planner.gate.set()
        with pytest.raises(UpstreamUnavailable, match="closed"):
            await opening
        assert not shards[0].orders


async def test_cancelled_while_it_recovers_it_can_be_closed() -> None:
    async with made(3) as (pipeline, _, shards):
        await pipeline.open()
        shards[2].loads.clear()
        await shards[1].stop()
        await until(lambda: not pipeline.is_connected)
        recovering = asyncio.create_task(pipeline.recover())
        await until(lambda: bool(shards[2].orders))
        recovering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await recovering
        await pipeline.close()
        await until(lambda: not shards[0].held)


async def test_too_many_epochs_without_an_outcome_are_an_error_and_the_next_request_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelines, "BACKOFF_S", (0.0, 0.0))
    async with made(2) as (pipeline, planner, shards):
        await pipeline.open()
        await one(pipeline, 1)
        address = shards[1].address
        await shards[1].stop()
        await until(lambda: not pipeline.is_connected)

        async def the_dead_one(remains: Remains) -> Sequence[Placed]:
            return await planner(replace(remains, failed=frozenset()))

        pipeline._place = the_dead_one
        with pytest.raises(UpstreamUnavailable, match=f"given up: .*{address}"):
            await pipeline.recover()
        shards.append(SumShard())
        await shards[2].start()
        planner.shards = [shards[0], shards[2]]
        await pipeline.recover()
        assert await one(pipeline, 7) == Outcome({0: (7,)})


async def test_different_versions_of_the_engine_are_refused() -> None:
    async with made(2) as (pipeline, _, shards):
        shards[1].engine = "2"
        with pytest.raises(ModelUnusable, match=r"different versions of llama.cpp \(1, 2\)"):
            await pipeline.open()
        await until(lambda: not shards[0].held)


async def test_a_lease_that_is_closed_while_it_waits_says_so() -> None:
    async with sum_shards(1) as (shard,):
        shard.loads.clear()
        lease = StageLease(shard.address, order(0, 1, 1), lambda error: None)
        waiting = asyncio.create_task(lease.ready())
        await until(lambda: bool(shard.orders))
        await lease.close()
        with pytest.raises(StageLost):
            await waiting


async def test_a_lease_that_breaks_inside_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(message: object) -> StageReport:
        raise AttributeError("no such field")

    monkeypatch.setattr(leases, "report_from", broken)
    async with sum_shards(1) as (shard,), asyncio.timeout(5):
        lease = StageLease(shard.address, order(0, 1, 1), lambda error: None)
        with pytest.raises(UpstreamUnavailable, match="no such field"):
            await lease.ready()
        await lease.close()


def reports(*numbers: tuple[int, int]) -> list[StageReport | None]:
    return [StageReport(state=StageState.READY, taken=taken, done=done) for taken, done in numbers]


@pytest.mark.parametrize(
    ("submitted", "seen", "blamed"),
    [
        (9, reports((9, 5), (5, 4), (4, 4)), 1),  # the first holds frames whose token is still to come
        (9, reports((9, 9), (9, 9), (9, 6)), 2),
        (9, reports((9, 9), (4, 4), (4, 4)), 1),  # nothing gets there any more
        (9, reports((4, 4), (4, 4)), 0),
        (9, reports((9, 7), (7, 7)), 0),
        (9, reports((9, 9), (9, 9)), 1),  # the outcomes do not come back
        (9, [None, *reports((0, 0))], 0),
    ],
)
def test_who_is_to_blame_for_a_standstill(submitted: int, seen: list[StageReport | None], blamed: int) -> None:
    assert stuck(submitted, seen) == blamed
