"""The table of loaded models: several at once within memory, nobody starved, nothing reloaded for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osync.backend.engine.slot import needed
from osync.backend.engine.table import Table
from osync.config import Settings
from osync.coordinator.embedding import Embeddings
from osync.coordinator.request import Final, Piece
from osync.coordinator.runner import RunnerSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.store import ModelStore, StoredModel
from osync.errors import CapacityError, ModelUnusable
from osync.wire.options import RunnerOptions
from tests.fakes.gguf import write

MIB = 1 << 20
NEED = 200 * MIB
"""More than one of the fake models takes, less than two."""


class Words:
    size = 10
    bos_text = eos_text = ""


@dataclass(eq=False)
class FakeRunner:
    """A loaded model that takes memory and does nothing."""

    host: Host
    path: Path
    settings: RunnerSettings
    size_bytes: int
    size_vram: int = 0
    closed: bool = False
    vocabulary: Words = field(default_factory=Words)

    def __post_init__(self) -> None:
        self.context_length, self.parallel = self.settings.context_length, self.settings.parallel

    def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Final, None]:
        raise AssertionError("nobody asks for it here")

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        raise AssertionError("nobody asks for it here")

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return []

    async def close(self) -> None:
        await asyncio.sleep(0)
        assert not self.closed
        self.closed = True


class Host:
    """A table over fake memory; each load checks that it keeps within the bounds."""

    def __init__(self, folder: Path, *, total: int = 1 << 40, most: int = 0, **more: Any) -> None:
        for name in "abc":
            write(folder / f"{name}.Q4_1.gguf")
        store = ModelStore((folder,))
        store.scan()
        self.models = {name: store.find(name) for name in "abc"}
        self.total, self.most = total, most or 3
        self.loads: list[str] = []
        self.runners: list[FakeRunner] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.table = Table(
            Settings(memory="100%", max_loaded_models=most, models_dir=(folder,), **more),
            self.load,
            available_memory=lambda: self.total - sum(r.size_bytes for r in self.live),
            on_change=lambda: None,
        )

    @property
    def live(self) -> list[FakeRunner]:
        return [r for r in self.runners if not r.closed]

    async def load(self, path: Path, wanted: RunnerSettings) -> FakeRunner:
        self.loads.append(path.name[0])
        await self.may_load.wait()
        await asyncio.sleep(0)
        runner = FakeRunner(self, path, wanted, size_bytes=150 * MIB)
        assert wanted.memory >= runner.size_bytes
        assert sum(r.size_bytes for r in self.live) + runner.size_bytes <= self.total
        assert len(self.live) < self.most
        assert path not in {r.path for r in self.live}
        self.runners.append(runner)
        return runner

    def model(self, name: str) -> StoredModel:
        return self.models[name]

    async def use(
        self, name: str, ticks: int = 0, keep_alive_s: float | None = None, until: asyncio.Event | None = None,
        **options: Any,
    ) -> RunnerSettings:  # fmt: skip
        async with self.table.lease(self.model(name), RunnerOptions(**options), keep_alive_s) as (_, runner):
            assert isinstance(runner, FakeRunner)
            for _ in range(ticks):
                await asyncio.sleep(0)
                assert not runner.closed
            if until:
                await until.wait()
            assert not runner.closed
            return runner.settings


@pytest.fixture
async def hosts(tmp_path):
    made: list[Host] = []

    def make(**more: Any) -> Host:
        made.append(Host(tmp_path / str(len(made)), **more))
        return made[-1]

    yield make
    for host in made:
        await host.table.close()
        assert not host.live


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def test_memory_bounds_the_models_and_the_least_recently_used_goes(hosts):
    host = hosts(total=2 * NEED)
    for name in ("a", "b", "a", "c"):
        await host.use(name)
    assert host.loads == ["a", "b", "c"]
    assert [r.path.name[0] for r in host.live] == ["a", "c"]


async def test_two_models_at_once_with_room_for_one_take_turns(hosts):
    host = hosts(total=NEED)
    async with asyncio.timeout(10):
        await asyncio.gather(*(host.use(name, ticks=3) for name in "abababab"))
    assert host.loads == ["a", "b"]  # all that wait for a model are served by one load


async def test_a_stream_of_requests_for_one_model_does_not_starve_another(hosts):
    host = hosts(total=NEED, parallel=1)
    await host.use("a")
    served: list[str] = []

    async def client(name: str, count: int) -> None:
        for _ in range(count):
            await host.use(name, ticks=5)
            served.append(name)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(client("a", 40))
        await settle()
        before = len(served)
        await host.use("b")
        # Those that were under way, and those that came while b was loaded: each client at most once more.
        assert len(served) - before <= 6
    assert len(host.loads) == 3


async def test_too_large_a_model_makes_nobody_go(hosts):
    host = hosts(total=NEED)
    await host.use("a")
    host.total = 100 * MIB
    with pytest.raises(ModelUnusable, match="model requires more system memory"):
        await host.use("b")
    assert [r.path.name[0] for r in host.live] == ["a"]


async def test_a_load_that_nobody_waits_for_any_more_is_left_and_its_victim_stays(hosts):
    host = hosts(total=NEED)
    done = asyncio.Event()
    running = asyncio.create_task(host.use("a", until=done))
    await settle()
    waiting = asyncio.create_task(host.use("b"))
    await settle()
    behind = asyncio.create_task(host.use("a"))  # a is to go: it waits for its turn
    await settle()
    assert (host.table.active, host.table.queued) == (1, 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(10):
        await behind
    done.set()
    await running
    assert host.loads == ["a"]
    assert (host.table.active, host.table.queued) == (0, 0)


async def test_the_queue_counts_all_that_wait_and_is_bounded(hosts):
    host = hosts(total=NEED, max_queue=2, parallel=1)
    done = asyncio.Event()
    running = [asyncio.create_task(host.use("a", until=done)) for _ in range(3)]
    await settle()
    assert (host.table.active, host.table.queued) == (1, 2)
    with pytest.raises(CapacityError, match="server busy, please try again"):
        await host.use("a")
    waiting = [asyncio.create_task(host.use("b")) for _ in range(2)]
    waiting.append(asyncio.create_task(host.use("a", num_ctx=64)))  # a is to go, for b
    await settle()
    assert (host.table.active, host.table.queued) == (1, 5)
    for name in "abc":
        with pytest.raises(CapacityError):
            await host.use(name)
    assert (host.table.active, host.table.queued) == (1, 5)
    done.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*running, *waiting)
    assert (host.table.active, host.table.queued) == (0, 0)


async def test_the_time_for_a_load_begins_with_its_turn(hosts):
    host = hosts(total=NEED, load_timeout="50ms")
    done = asyncio.Event()
    running = asyncio.create_task(host.use("a", until=done))
    await settle()
    waiting = asyncio.create_task(host.use("b"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.2)
    done.set()
    await running
    await waiting
    host.may_load.clear()
    with pytest.raises(ModelUnusable, match="timed out loading c"):
        await host.use("c")


@pytest.mark.parametrize(
    ("first", "second", "loads"),
    [
        ({}, {}, 1),
        ({"num_ctx": 64}, {}, 2),  # what one client made small does not cut the prompts of those who do not say
        ({}, {"num_ctx": 64}, 2),
        ({"num_ctx": 64}, {"num_ctx": 128}, 2),
        ({"num_ctx": 128}, {"num_ctx": 64}, 2),
        ({"num_ctx": 4096}, {"num_ctx": 99999}, 1),  # the model was trained for 4096
        ({}, {"num_ctx": 4096}, 1),  # which is also what it gets where nobody says
        ({}, {"num_batch": 512}, 1),
        ({}, {"num_batch": 4096}, 1),  # more than is ever used
        ({}, {"num_batch": 16}, 2),
        ({}, {"num_gpu": -1}, 1),
        ({}, {"main_gpu": -1}, 1),
        ({}, {"use_mmap": True}, 1),
        ({}, {"use_mmap": False}, 2),
        ({"use_mmap": False}, {}, 1),
        ({}, {"num_thread": 0}, 1),
        ({}, {"num_thread": 1}, 2),
    ],
)
async def test_only_a_real_change_of_a_runner_option_reloads(hosts, monkeypatch, first, second, loads):
    monkeypatch.setattr("osync.backend.engine.table.threads_for", lambda wanted: wanted or 4)
    host = hosts()
    await host.use("a", **first)
    await host.use("a", **second)
    assert len(host.loads) == loads


@pytest.mark.parametrize("keep_alive_s", [0.0, 0.01])
async def test_keep_alive_counts_from_the_last_request(hosts, keep_alive_s):
    host = hosts()
    done = asyncio.Event()
    running = asyncio.create_task(host.use("a", until=done))
    await host.use("a", keep_alive_s=keep_alive_s)
    await asyncio.sleep(0.03)
    assert host.live  # still in use
    done.set()
    await running
    async with asyncio.timeout(10):
        while host.live:
            await asyncio.sleep(0.001)


async def test_what_is_counted_of_a_model_before_it_is_loaded(hosts):
    host = hosts()
    async with host.table.lease(host.model("a"), RunnerOptions(num_ctx=1000), None) as (slot, _):
        loaded, before = slot.footprint(), needed(slot)
    header = host.model("a").header
    assert before.weights == host.model("a").info.size
    assert before.kv == header.kv_bytes_per_token() * 1000
    assert before.compute >= 128 * MIB
    assert loaded.total == 150 * MIB
    assert loaded.weights == sum(t.size_bytes for t in header.tensors)
    assert loaded.file == before.file is not None


requests = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 6),
        st.sampled_from([None, None, 0.0, float("inf")]),
        st.sampled_from([None, None, 64, 128]),
        st.integers(0, 12),
        st.sampled_from([None, None, None, 0, 2, 5]),
    ),
    min_size=1, max_size=14,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=requests, fitting=st.integers(1, 3), most=st.integers(1, 3))
def test_whatever_comes_is_answered_within_the_bounds(tmp_path, rows, fitting, most):
    async def one(host: Host, name: str, ticks: int, keep: float | None, ctx: int | None, start: int) -> int:
        for _ in range(start):
            await asyncio.sleep(0)
        got = await host.use(name, ticks, keep, num_ctx=ctx)
        assert ctx is None or got.context_length == ctx
        return 1

    async def run() -> None:
        host = Host(tmp_path, total=fitting * NEED, most=most)
        tasks = [asyncio.create_task(one(host, *row[:5])) for row in rows]
        for task, row in zip(tasks, rows, strict=True):
            if row[5] is not None:
                for _ in range(row[5]):
                    await asyncio.sleep(0)
                task.cancel()
        async with asyncio.timeout(20):  # a deadlock would wait for ever
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, row in zip(results, rows, strict=True):
            assert result == 1 or (row[5] is not None and isinstance(result, asyncio.CancelledError)), result
        assert (host.table.active, host.table.queued) == (0, 0)
        # Not more loads than models that were asked for, one after the other, with changing options.
        assert len(host.loads) <= len(rows)
        await host.table.close()
        assert not host.live

    asyncio.run(run())
