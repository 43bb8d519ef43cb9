"""Pipelines over real shard processes that are killed and stopped: no stream fails, and none changes."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from osync.backend.pipelines.peers import Shards
from osync.cluster.membership import Membership
from osync.config import Settings
from osync.coordinator.answering import Answering
from osync.coordinator.coordinator import Coordinator
from osync.coordinator.pipeline_runner import PipelineRunner
from osync.coordinator.placement import ModelSource
from osync.coordinator.request import Final
from osync.coordinator.runner import Runner, RunnerSettings
from osync.core.stages import StageState
from osync.engine.gguf import read_header
from osync.engine.sampling import SamplingOptions
from osync.types import NodeId
from tests.daemons import Process, Processes, processes, wait_for
from tests.e2e.conftest import MODEL, models_dir

__all__ = ["models_dir"]  # the fixture
pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

SEED = 20
CHAOS_S = 14.0
SETTINGS = RunnerSettings(context_length=512, parallel=8, deterministic=True, stages=3)
PROMPTS = [f"The {ordinal} of the eight captains looked at the sea and said: " for ordinal in
           ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "last")]  # fmt: skip


def options(number: int, tokens: int) -> SamplingOptions:
    """Greedy and seeded, by turns."""
    if number % 2:
        return SamplingOptions(temperature=0.9, seed=number, num_predict=tokens)
    return SamplingOptions(temperature=0, num_predict=tokens)


@dataclass(slots=True)
class Answer:
    """What came of a request, and the longest time without a token once they came."""

    tokens: tuple[int, ...] = ()
    stall_s: float = 0.0


async def ask(
    runner: Answering, prompt: str, chosen: SamplingOptions, seen: Callable[[int], None] = lambda count: None
) -> Answer:
    answer, count, last = Answer(), 0, 0.0
    async for event in runner.generate(await runner.tokenize(prompt), chosen):
        if isinstance(event, Final):
            answer.tokens = event.tokens
            return answer
        now = time.monotonic()
        answer.stall_s = max(answer.stall_s, now - last if last else 0.0)
        last, count = now, count + len(event.tokens)
        seen(count)
    raise AssertionError("no end")


@dataclass(slots=True)
class Cluster:
    """Shards in processes of their own, and a coordinator in this one."""

    owner: Processes
    models: Path
    membership: Membership | None = None
    coordinator: Coordinator | None = None
    shards: dict[str, Process] = field(default_factory=dict)

    def start(self, name: str, port: int = 0) -> Process:
        """Start a shard; on the port of one that is gone it is the same again."""
        process = self.owner.osyncd(
            "--role", "shard", "--models-dir", str(self.models), "--threads", "1", "--memory", "1GiB",
            "--state-dir", str(self.owner.folder / name), "--drain-timeout", "20", grpc_port=port, name=name,
        )  # fmt: skip
        self.shards[f"127.0.0.1:{process.grpc_port}"] = process
        return process

    def again(self, address: str) -> None:
        """Start a shard that was killed again."""
        gone = self.shards[address]
        self.start(gone.name, gone.grpc_port)

    async def watch(self) -> Shards:
        """Link to all shards, and wait until they lend."""
        settings = Settings(servers=tuple(self.shards), state_dir=self.owner.folder / "proxy")
        self.membership = Membership(settings, NodeId("coordinator"), None)
        await self.membership.start()
        view = Shards(self.membership.view, NodeId("coordinator"), "")
        await until(lambda: sum(bool(peer.lends.digests) for peer in view.up()) == len(self.shards))
        self.coordinator = Coordinator(settings, NodeId("coordinator"), view.up)
        return view

    async def load(self, view: Shards) -> PipelineRunner:
        (path,) = self.models.glob("*.gguf")
        (digest,) = {digest for peer in view.up() for digest in peer.lends.digests}
        source = ModelSource(name="m", digest=digest, size=path.stat().st_size, header=read_header(path),
                             vocabulary=path, sources=tuple(self.shards))  # fmt: skip
        assert self.coordinator is not None
        return await self.coordinator.load(source, SETTINGS)


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def is_backed(runner: PipelineRunner) -> bool:
    """True if each stage has a standby that is loaded."""
    standbys = runner.pipeline.standbys
    ready = {order for order, _, report in standbys if report and report.state is StageState.READY}
    return runner.pipeline.is_connected and {order for order, _, _ in runner.pipeline.stages} <= ready


@asynccontextmanager
async def cluster(folder: Path, models: Path, count: int = 4) -> AsyncIterator[Cluster]:
    with processes(folder) as owner:
        group = Cluster(owner, models)
        for number in range(count):
            group.start(f"shard{number}")
        try:
            yield group
        finally:
            if group.coordinator is not None:
                await group.coordinator.close()
            if group.membership is not None:
                await group.membership.close()
            for process in owner.running:
                if process.popen.poll() is None:
                    process.kill()


async def whole(models: Path, asked: list[tuple[str, SamplingOptions]]) -> list[tuple[int, ...]]:
    """Return what the whole model answers."""
    (path,) = models.glob("*.gguf")
    runner = await Runner.load(path, RunnerSettings(context_length=512, parallel=8, deterministic=True, threads=1))
    try:
        answers = await asyncio.gather(*(ask(runner, prompt, chosen) for prompt, chosen in asked))
    finally:
        await runner.close()
    return [answer.tokens for answer in answers]


async def test_shards_die_and_stop_and_come_back_under_eight_streams(models_dir: Path, tmp_path: Path) -> None:
    asked = [(prompt, options(number, 24)) for number, prompt in enumerate(PROMPTS)]
    expected = await whole(models_dir, asked)
    async with cluster(tmp_path, models_dir) as group:
        runner = await group.load(await group.watch())
        over = asyncio.Event()
        answered = [0] * len(asked)

        async def stream(number: int) -> None:
            while not over.is_set():
                answer = await ask(runner, *asked[number])
                assert answer.tokens == expected[number]
                answered[number] += 1

        async def chaos() -> None:
            rng = random.Random(SEED)
            end = time.monotonic() + CHAOS_S
            while time.monotonic() < end:
                await asyncio.sleep(rng.uniform(0.5, 2.0))
                used = [address for _, address, _ in runner.pipeline.stages]
                address = rng.choice(used if rng.random() < 0.8 else sorted(group.shards))
                victim, deed = group.shards[address], rng.choice(("kill", "stop", "stop and kill"))
                if deed != "kill":
                    victim.popen.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(rng.choice((0.5, 2.0, 4.0)))
                if deed == "stop":
                    victim.popen.send_signal(signal.SIGCONT)
                else:
                    victim.kill()
                    group.again(address)
            over.set()

        async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
            tasks.create_task(chaos())
            for number in range(len(asked)):
                tasks.create_task(stream(number))
        assert min(answered) >= 1
        assert runner.pipeline.recoveries >= 2
        print(f"answers {sum(answered)}, recoveries {runner.pipeline.recoveries}")


async def test_a_shard_that_is_killed_or_leaves_in_mid_answer_costs_no_token(models_dir: Path, tmp_path: Path) -> None:
    asked = [(PROMPTS[0], options(0, 40)), (PROMPTS[1], options(1, 40))]
    expected = await whole(models_dir, asked)
    async with cluster(tmp_path, models_dir) as group:
        runner = await group.load(await group.watch())

        async def answer_without(number: int, victim: str, deed: signal.Signals) -> Answer:
            """Ask, and do that to a shard once some tokens have come."""
            is_done = False

            def seen(count: int) -> None:
                nonlocal is_done
                if count > 15 and not is_done:
                    is_done = True
                    group.shards[victim].popen.send_signal(deed)

            answer = await ask(runner, *asked[number], seen)
            assert is_done
            assert answer.tokens == expected[number]
            return answer

        stalls = []
        for run in range(5):
            await until(lambda: is_backed(runner))
            victim = runner.pipeline.stages[run % 3][1]
            answer = await answer_without(run % 2, victim, signal.SIGKILL)
            stalls.append(answer.stall_s)
            group.shards[victim].popen.wait(10)
            group.again(victim)
        assert runner.pipeline.recoveries == 5
        print("stalls", [round(stall, 2) for stall in stalls])
        assert max(stalls) < 5.0

        await until(lambda: is_backed(runner))
        leaving = runner.pipeline.stages[1][1]
        await answer_without(0, leaving, signal.SIGTERM)
        process = group.shards[leaving].popen
        await until(lambda: process.poll() is not None, 15)
        assert process.returncode == 0
        assert leaving not in [address for _, address, _ in runner.pipeline.stages]
        assert (await ask(runner, *asked[1])).tokens == expected[1]


async def test_a_coordinator_that_dies_frees_the_shards(models_dir: Path, tmp_path: Path) -> None:
    async with cluster(tmp_path, models_dir, 2) as group:
        view = await group.watch()
        proxy = group.owner.osyncd(
            "--role",
            "proxy",
            "--servers",
            ",".join(group.shards),
            "--state-dir",
            str(tmp_path / "proxy"),
            "--models-dir",
            str(models_dir),
            name="proxy",
        )
        await asyncio.to_thread(wait_for, lambda: proxy.log.exists() and b"started" in proxy.log.read_bytes(), proxy)
        body = {"model": MODEL, "prompt": PROMPTS[0], "raw": True,
                "options": {"distributed": True, "num_ctx": 512, "num_predict": 400, "temperature": 0}}  # fmt: skip
        async with aiohttp.ClientSession() as session:
            for _ in range(100):  # until it has seen the shards
                async with session.post(f"{proxy.url}/api/generate", json=body) as answer:
                    if answer.status != 200:
                        await asyncio.sleep(0.1)
                        continue
                    line = json.loads(await answer.content.readline())
                    assert "error" not in line
                    held = [stage for peer in view.up() for stage in peer.lends.stages]
                    assert len({stage.owner for stage in held}) == 1
                    proxy.kill()
                    began = time.monotonic()
                    break
            else:
                raise AssertionError((proxy.log.read_text(), await answer.text()))
        await until(lambda: not any(peer.lends.stages for peer in view.up()), 10.0)
        assert len(view.up()) == 2
        print("freed after", round(time.monotonic() - began, 1))
