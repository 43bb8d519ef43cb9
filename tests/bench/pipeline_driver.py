"""A coordinator in a process of its own, on a host of the benchmark: python -m tests.bench.pipeline_driver SHARD…

It links to the shards as a proxy does, and obeys: one JSON command a line on stdin, one JSON answer a line on stdout
(`run` says {"reached": n} before its answer where it was asked to). Nothing of HTTP is measured here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from osync.config import Settings
from osync.coordinator.coordinator import Coordinator
from osync.coordinator.pipeline_runner import PipelineRunner
from osync.coordinator.placement import ModelSource, ShardPeer
from osync.coordinator.request import Final
from osync.coordinator.runner import RunnerSettings
from osync.engine.gguf import read_header
from osync.engine.sampling import SamplingOptions
from osync.net.uplink import RemoteLink
from osync.telemetry.log import setup
from osync.types import NodeId

SHARD_CONTEXT = 8192
"""Of each sequence: large enough that the KV cache, and with it the layers, fills the shards' memory evenly."""


class Driver:
    """Does what it is told with real shards."""

    def __init__(self, addresses: list[str], folder: Path) -> None:
        self._links = [RemoteLink(address, "bench") for address in addresses]
        settings = Settings(state_dir=folder)
        self._coordinator = Coordinator(settings, NodeId("bench"), self._peers)
        self._runners: dict[str, PipelineRunner] = {}
        for link in self._links:
            link.start()

    def _peers(self) -> list[ShardPeer]:
        return [ShardPeer(link.address, link.state, link.round_trip_s) for link in self._links if link.state]

    async def do_up(self, addresses: list[str], seconds: float = 60.0) -> float:
        """Wait until these shards are linked, and know their speed; return the seconds that took."""
        began = time.monotonic()
        async with asyncio.timeout(seconds):
            while not set(addresses) <= {peer.address for peer in self._peers() if peer.lends.engine}:
                await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def do_down(self, addresses: list[str]) -> None:
        """Wait until none of these shards is linked."""
        async with asyncio.timeout(30):
            while not set(addresses).isdisjoint(peer.address for peer in self._peers()):
                await asyncio.sleep(0.02)

    async def do_load(self, name: str, model: str, source: str, shards: list[str], **wanted: Any) -> dict[str, Any]:
        """Open a pipeline; return how long that took and what its stages are."""
        path = Path(model)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(path.read_bytes()).hexdigest())
        async with asyncio.timeout(60):
            while not any(p.address == source and digest in p.lends.digests for p in self._peers()):
                await asyncio.sleep(0.05)
        header = read_header(path)
        described = ModelSource(name=path.stem, digest=digest, size=path.stat().st_size, header=header,
                                vocabulary=path, sources=(source,))  # fmt: skip
        settings = RunnerSettings(shards=tuple(shards), context_length=SHARD_CONTEXT, threads=1, **wanted)
        began = time.monotonic()
        self._runners[name] = await self._coordinator.load(described, settings)
        return {"seconds": time.monotonic() - began, "stages": await self.do_stages(name)}

    async def do_stages(self, name: str) -> list[dict[str, Any]]:
        """Return what the stages of a pipeline are."""
        return [
            {"address": address, "first": order.first, "last": order.last,
             "weights": report.weight_bytes if report else 0, "fetched": report.bytes_fetched if report else 0,
             "busy_s": report.busy_s if report else 0.0, "frames": report.frames if report else 0}
            for order, address, report in self._runners[name].pipeline.stages
        ]  # fmt: skip

    async def do_close(self, name: str) -> None:
        """Give a pipeline's stages back."""
        await self._runners.pop(name).close()

    async def do_tokenize(self, name: str, text: str) -> list[int]:
        """Return a text's tokens."""
        return await self._runners[name].tokenize(text)

    async def do_run(
        self,
        name: str,
        prompts: list[list[int]],
        count: int,
        reach: int = 0,
        late: list[int] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Answer all prompts at once. At `reach` tokens of the first, say so, and then let `late` come in."""
        runner = self._runners[name]
        sampling = SamplingOptions(num_predict=count, **({"temperature": 0.0} | options))
        reached = asyncio.Event()

        async def one(number: int, prompt: list[int]) -> dict[str, Any]:
            began = time.perf_counter()
            times: list[float] = []
            counts: list[int] = []
            async for event in runner.generate(prompt, sampling):
                if isinstance(event, Final):
                    return {
                        "began": began,
                        "ended": time.perf_counter(),
                        "times": times,
                        "counts": counts,
                        "tokens": event.tokens,
                    }
                times.append(time.perf_counter())
                counts.append(len(event.tokens))
                if number == 0 and reach and sum(counts) >= reach and not reached.is_set():
                    reached.set()
                    print(json.dumps({"reached": sum(counts)}), flush=True)
            raise RuntimeError("an answer without an end")

        async def later(prompt: list[int]) -> list[float]:
            await reached.wait()
            began = time.perf_counter()
            async for _ in runner.generate(prompt, SamplingOptions(num_predict=1, temperature=0.0)):
                break
            return [began, time.perf_counter()]

        waiting = asyncio.create_task(later(late)) if late else None
        answers = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
        pipeline = runner.pipeline
        return {"answers": answers, "late": await waiting if waiting else None, "epoch": pipeline.epoch,
                "recoveries": pipeline.recoveries, "traffic": pipeline.traffic}  # fmt: skip

    async def close(self) -> None:
        """End everything."""
        await self._coordinator.close()
        for link in self._links:
            await link.close()


async def main() -> None:
    """Obey until stdin ends."""
    setup("WARNING", "json")
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver(sys.argv[1:], Path(folder))
        try:
            while line := await asyncio.to_thread(sys.stdin.readline):
                command = json.loads(line)
                answer = await getattr(driver, "do_" + command.pop("do"))(**command)
                print(json.dumps(answer), flush=True)
        finally:
            await driver.close()


if __name__ == "__main__":
    uvloop.run(main())
