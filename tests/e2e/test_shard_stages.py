"""What a shard does with its memory and its slices: standbys, stages that nobody holds, files that are damaged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from osync.coordinator import coordinator as coordinators
from osync.coordinator.placement import Demand, order
from osync.coordinator.runner import RunnerSettings
from osync.core.stages import Route, StageOrder, StageReport, StageSettings, StageState
from osync.engine.sampling import SamplingOptions
from osync.errors import ModelUnusable, StageLost
from osync.net.shard_service import Downstream
from osync.shard import role as roles
from tests.e2e.test_pipeline import tokens_of
from tests.shards import Group, RunningShard, group, source_of, start_shard

pytestmark = pytest.mark.engine

SETTINGS = StageSettings(context_length=256, sequences=1, n_batch=64)


def an_order(shards: Group, models: Path, first: int, last: int, pipeline: str = "p") -> StageOrder:
    (path,) = models.glob("*.gguf")
    demand = Demand(model=source_of(path, shards), settings=SETTINGS)
    return order(demand, shards.up(), pipeline, "me", first, last)


async def report_in(reports: AsyncGenerator[StageReport, None], *states: StageState) -> StageReport:
    async with asyncio.timeout(30):
        async for report in reports:
            if report.state in states:
                return report
    raise AssertionError("the reports ended")


@asynccontextmanager
async def holding(shard: RunningShard, wanted: StageOrder) -> AsyncIterator[AsyncGenerator[StageReport, None]]:
    reports = shard.role.hold(wanted)
    try:
        report = await report_in(reports, StageState.READY, StageState.FAILED)
        assert report.state is StageState.READY, report.error
        yield reports
    finally:
        await reports.aclose()


def states(shard: RunningShard) -> list[str]:
    return [stage.state for stage in shard.role.state().stages]


async def test_a_slice_that_was_cut_off_is_fetched_again(models_dir: Path, tmp_path: Path) -> None:
    async with group(tmp_path, 1, (models_dir,)) as shards:
        for wanted in (an_order(shards, models_dir, 0, 4), an_order(shards, models_dir, 4, 8)):
            sizes = []
            for _ in range(3):
                other = await start_shard(tmp_path / f"other{wanted.first}")
                shards.shards.append(other)
                async with holding(other, wanted):
                    sizes.append(other.role.state().stages[0].size)
                    fetched = next(held for held in other.role._held).report().bytes_fetched
                (path,) = (tmp_path / f"other{wanted.first}" / "slices").glob("*.gguf")
                await other.stop()
                if len(sizes) == 1:
                    assert fetched > 0
                    whole = path.stat().st_size
                    with path.open("r+b") as file:
                        file.truncate(whole - 4096)
                elif len(sizes) == 2:
                    assert fetched > 0  # again
                    assert path.stat().st_size == whole
                else:
                    assert fetched == 0


async def test_a_stage_that_does_not_fit_says_so_in_numbers(models_dir: Path, tmp_path: Path) -> None:
    async with group(tmp_path, 1, (models_dir,), memory="20MiB") as shards:
        reports = shards.shards[0].role.hold(an_order(shards, models_dir, 0, 30))
        report = await report_in(reports, StageState.FAILED)
        assert "the stage needs" in report.error
        assert "20.0 MiB" in report.error
        await reports.aclose()


async def test_memory_of_standbys_is_free_and_goes_to_who_uses_it(models_dir: Path, tmp_path: Path) -> None:
    async with group(tmp_path, 1, (models_dir,), memory="80MiB") as shards:
        (shard,) = shards.shards
        standby = replace(an_order(shards, models_dir, 10, 20), standby=True)
        async with holding(shard, standby) as reports:
            assert states(shard) == ["standby"]
            assert shard.role.state().memory_free == shard.role.state().memory
            whole = shard.role.hold(an_order(shards, models_dir, 0, 30, "another"))
            assert "the stage needs" in (await report_in(whole, StageState.FAILED)).error
            assert states(shard)[0] == "standby"  # nobody loses a stage for nothing
            await whole.aclose()
            async with holding(shard, an_order(shards, models_dir, 0, 20, "other")):
                report = await report_in(reports, StageState.FAILED)
                assert "needs the memory" in report.error
                assert "standby" not in states(shard)
                again = shard.role.hold(standby)
                assert "the stage needs" in (await report_in(again, StageState.FAILED)).error
                assert "ready" in states(shard)  # a standby takes nothing from who is at work
                await again.aclose()


async def test_a_standby_that_is_used_keeps_its_memory(models_dir: Path, tmp_path: Path) -> None:
    async with group(tmp_path, 1, (models_dir,)) as shards:
        (shard,) = shards.shards
        wanted = replace(an_order(shards, models_dir, 0, 30), standby=True)
        async with holding(shard, wanted):
            route = Route(pipeline="p", epoch=1, stage=0, addresses=(shard.address,), cuts=(0, 30))
            with pytest.raises(StageLost, match="no such stage"):
                shard.role.open(replace(route, cuts=(0, 29)), Downstream(route))
            shard.role.open(route, Downstream(route))
            assert states(shard) == ["ready"]
            assert shard.role.state().memory_free < shard.role.state().memory
            with pytest.raises(StageLost, match="epoch 0 of the pipeline is over"):
                shard.role.open(replace(route, epoch=0), Downstream(route))


async def test_a_stage_that_nobody_holds_is_kept_a_little_and_found_again(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "RETAIN_S", 0.5)
    async with group(tmp_path, 1, (models_dir,)) as shards:
        (shard,) = shards.shards
        wanted = an_order(shards, models_dir, 10, 12)
        async with holding(shard, wanted):
            held = shard.role._held[0]
        assert states(shard) == ["retained"]
        assert shard.role.state().memory_free == shard.role.state().memory
        await asyncio.sleep(0.3)
        async with holding(shard, wanted):
            assert shard.role._held == [held]
            await asyncio.sleep(0.3)  # the first release's time is over
            assert states(shard) == ["ready"]
        async with asyncio.timeout(5):
            await shard.role.idle()
            while states(shard):
                await asyncio.sleep(0.02)


async def test_a_shard_that_leaves_is_idle_once_its_stages_were_moved(models_dir: Path, tmp_path: Path) -> None:
    (path,) = models_dir.glob("*.gguf")
    options = SamplingOptions(temperature=0, num_predict=12)
    async with group(tmp_path, 3, (models_dir,)) as shards:
        settings = RunnerSettings(context_length=256, parallel=1, deterministic=True, stages=2)
        runner = await shards.coordinator.load(source_of(path, shards), settings)
        expected = await tokens_of(runner, "Once upon a time", options)
        leaving = next(s for s in shards.shards if s.address == runner.pipeline.stages[0][1])
        leaving.role.drain()
        async with asyncio.timeout(20):
            await leaving.role.idle()
        assert leaving.address not in [address for _, address, _ in runner.pipeline.stages]
        assert await tokens_of(runner, "Once upon a time", options) == expected
        assert runner.pipeline.recoveries == 1
        await runner.close()


async def test_a_shard_that_cannot_be_replaced_keeps_its_stage_until_it_is_gone(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinators, "COMEBACK_S", 0.5)
    (path,) = models_dir.glob("*.gguf")
    options = SamplingOptions(temperature=0, num_predict=4)
    async with group(tmp_path, 2, (models_dir,), memory="80MiB") as shards:
        settings = RunnerSettings(context_length=256, parallel=1, deterministic=True, stages=2)
        runner = await shards.coordinator.load(source_of(path, shards), settings)
        leaving = shards.shards[0]
        leaving.role.drain()
        await asyncio.sleep(0.6)  # two looks of the coordinator's
        assert len(await tokens_of(runner, "Once upon a time", options)) == 4
        assert runner.pipeline.recoveries == 0
        await leaving.stop()
        with pytest.raises(ModelUnusable, match=r"needs .* MiB"):
            await tokens_of(runner, "Once upon a time", options)
        await runner.close()
