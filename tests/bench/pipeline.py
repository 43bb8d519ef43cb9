"""Distributed inference on machines that are network namespaces: make bench-pipeline (root, Linux, cc).

Beside osync, in the same run: llama.cpp's RPC backend with the same cuts, and one machine that has the whole model
(a bare loop over llama.cpp's C API). They take turns within a round; a figure is the median over rounds, a ratio the
median of the rounds' ratios. Every process has one thread. Decoding of one stream is measured with a whole core for
each machine (of a single stream only one machine works at a time, and a quota would measure the throttling);
everything else with 0.4 core for each, so that four really run in parallel on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.engine import WORDS, counting, small_model
from tests.bench.pipeline_machines import SHARE, Machines, Talker, ready
from tests.bench.pipeline_table import Figures, show
from tests.net import lan as network
from tests.net.lan import Lan

UBATCH = 64
"""Of RPC in a pipeline: its prompt chunks; the unsplit model takes 512 rows at once, as osync does."""
ROUND_TRIPS = (0, 5, 20, 50)
LONG, LONGER = 768, 1000
REPEATS = "red apple, green pear, blue plum, yellow lemon, brown nut, white grape, black cherry. " * 5


def random_tokens(count: int, seed: str) -> list[int]:
    """Return a prompt like no other."""
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(count)]


def speed(answer: dict[str, Any]) -> float:
    """Return the tokens/s of one answer, from its first token on."""
    return float(sum(answer["counts"][1:]) / (answer["times"][-1] - answer["times"][0]))


def together(answers: list[dict[str, Any]]) -> float:
    """Return the tokens/s of several answers while all of them run."""
    begin = max(a["times"][0] for a in answers)
    end = min(a["times"][-1] for a in answers)
    tokens = sum(n for a in answers for t, n in zip(a["times"], a["counts"], strict=True) if begin < t <= end)
    return float(tokens / (end - begin))


def quantile(values: list[float], q: float) -> float:
    """Return a quantile, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


class Bench:
    """All measurements, on one set of machines."""

    def __init__(self, machines: Machines, rounds: int, count: int, kills: int) -> None:
        self.m, self.rounds, self.count, self.kills = machines, rounds, count, kills
        self.figures = Figures()
        self.split: list[int] = []

    @property
    def driver(self) -> Talker:
        """The coordinator's process."""
        return self.m.driver

    def load(self, stages: int = 4, workers: list[int] | None = None, **wanted: Any) -> dict[str, Any]:
        """Open the pipeline."""
        hosts = workers or self.m.workers[:stages]
        return dict(self.driver.do("load", name="it", model=str(self.m.model), source=self.m.address(self.m.storage),
                                   shards=[self.m.address(host) for host in hosts], stages=stages,
                                   **({"parallel": 8, "drafts": False} | wanted)))  # fmt: skip

    def run(self, prompts: list[list[int]], count: int, **options: Any) -> dict[str, Any]:
        """Let osync answer."""
        return dict(self.driver.do("run", name="it", prompts=prompts, count=count, **options))

    def tokens(self, text: str) -> list[int]:
        """Return a text's tokens."""
        return list(self.driver.do("tokenize", name="it", text=text))

    def start(self) -> None:
        """Load for the first time, with nothing on the workers' disks, and again after a restart."""
        add = self.figures.add
        first = self.load()
        add("first load s", first["seconds"])
        print("  cuts", [tuple(stage.values())[:5] for stage in first["stages"]], flush=True)
        self.split = [stage["last"] - stage["first"] for stage in first["stages"]]
        self.split[-1] += 1  # llama.cpp counts the output as a layer
        add("fetched of slice", max(stage["fetched"] / stage["weights"] for stage in first["stages"]))
        for _ in range(self.rounds):
            self.driver.do("close", name="it")
            add("processes up again s", self.m.restart(self.m.workers[:4]))
            again = self.load()
            add("ready after restart s", again["seconds"])
            print("  cuts", [tuple(stage.values())[:5] for stage in again["stages"]], flush=True)
            add("fetched after restart", sum(stage["fetched"] for stage in again["stages"]))

    def decode(self, round_trips: tuple[int, ...]) -> None:
        """One stream, a whole core for each machine; bytes over the coordinator too."""
        prompt = self.tokens(counting(100))
        rpc, whole = self.m.client(self.split, UBATCH), self.m.client([], 512)
        self.figures.add("rpc load s", rpc.do("load"))
        self.m.limit(0)
        for number in range(-1, self.rounds):
            for trip in round_trips:
                self.m.lan.set_round_trip(trip)
                count = self.count if number >= 0 else 8
                if trip:
                    self.run([prompt], 8)  # TCP's windows open again
                before = self.m.wire(self.m.workers[:4])
                result = self.run([prompt], count)
                wire = (self.m.wire(self.m.workers[:4]) - before) / count
                mine = speed(result["answers"][0])
                before = self.m.wire(self.m.workers[:4])
                theirs = rpc.do("decode", prompts=[prompt], count=count)
                rpc_wire = (self.m.wire(self.m.workers[:4]) - before) / count
                if number < 0:
                    continue
                self.figures.add(f"decode {trip}", 1e3 / mine)
                self.figures.add(f"rpc decode {trip}", 1e3 / theirs)
                if trip == 0:
                    self.figures.add("wire bytes per token", wire)
                    self.figures.add("rpc wire bytes per token", rpc_wire)
                    self.figures.add("unsplit decode", 1e3 / whole.do("decode", prompts=[prompt], count=count))
        self.m.lan.set_round_trip(0)
        self.m.limit(SHARE)
        for client in (rpc, whole):
            client.kill()

    def two(self) -> None:
        """Two shards against none, a whole core for each machine."""
        self.driver.do("close", name="it")
        self.m.restart(self.m.workers[:2], stages=2)
        self.load(2)
        prompt = self.tokens(counting(100))
        rpc = self.m.client([self.split[0] + self.split[1], self.split[2] + self.split[3]], UBATCH)
        whole = self.m.client([], 512)
        self.m.limit(0)
        for number in range(-1, self.rounds):
            mine = speed(self.run([prompt], self.count)["answers"][0])
            theirs = rpc.do("decode", prompts=[prompt], count=self.count)
            alone = whole.do("decode", prompts=[prompt], count=self.count)
            if number >= 0:
                self.figures.add("two decode", mine / alone)
                self.figures.add("rpc two decode", theirs / alone)
        self.m.limit(SHARE)
        for client in (rpc, whole):
            client.kill()
        self.driver.do("close", name="it")
        self.m.restart(self.m.workers[:2])
        self.load()

    def prefill(self) -> None:
        """A prompt of 768 tokens, 0.4 core for each machine; and what a long prompt does to a running stream."""
        rpc, whole = self.m.client(self.split, UBATCH), self.m.client([], 512)
        prompt = self.tokens(counting(100))
        for number in range(self.rounds):
            for trip in (0, 10):
                self.m.lan.set_round_trip(trip)
                tokens = random_tokens(LONG, f"{number} {trip}")
                result = self.run([tokens], 1)["answers"][0]
                mine = result["ended"] - result["began"]
                theirs, before = rpc.do("prompt", tokens=tokens), whole.cpu_s()
                alone = whole.do("prompt", tokens=tokens)
                self.figures.add(
                    "share of its quota that the unsplit model got", (whole.cpu_s() - before) / alone / SHARE
                )
                self.figures.add(f"prefill {trip}", alone / mine)
                self.figures.add(f"rpc prefill {trip}", alone / theirs)
                self.figures.add(f"prefill over rpc {trip}", theirs / mine)
            late = random_tokens(LONGER, f"late {number}")
            self.driver.send("run", name="it", prompts=[prompt], count=300, reach=40, late=late)
            self.driver.answer()  # the notice
            result = self.driver.answer()
            answer, (began, ended) = result["answers"][0], result["late"]
            inside = [b - a for a, b in pairwise(answer["times"]) if b > began and a < ended]
            quiet = [b - a for a, b in pairwise(answer["times"]) if b < began]
            self.figures.add("gap p99 over median", quantile(inside, 0.99) / statistics.median(quiet))
            self.figures.add("gap p99 ms", quantile(inside, 0.99) * 1e3)
            self.figures.add("late prompt s", ended - began)
            self.figures.add("rpc stall s", rpc.do("prompt", tokens=late))
        self.m.lan.set_round_trip(0)
        for client in (rpc, whole):
            client.kill()

    def streams(self) -> None:
        """Several streams at once, 0.4 core for each machine."""
        rpc = self.m.client(self.split, UBATCH)
        for number in range(-1, self.rounds):
            for streams, trip in ((4, 10), (8, 50)):
                self.m.lan.set_round_trip(trip)
                prompts = [self.tokens(counting(100 * (1 + i))) for i in range(streams)]
                count = self.count if number >= 0 else 8
                mine = together(self.run(prompts, count)["answers"])
                alone = speed(self.run(prompts[:1], count)["answers"][0])
                theirs = rpc.do("decode", prompts=prompts, count=count)
                if number >= 0:
                    self.figures.add(f"streams {streams}", mine)
                    self.figures.add(f"streams over one {streams}", mine / alone)
                    self.figures.add(f"rpc streams {streams}", theirs)
        self.m.lan.set_round_trip(0)
        rpc.kill()

    def drafts(self, round_trips: tuple[int, ...]) -> None:
        """Drafts by look-up, on and off, on text that repeats and on text that does not; a core for each machine."""
        for _ in range(self.rounds):
            got: dict[tuple[str, int, bool], float] = {}
            for on in (False, True):
                self.driver.do("close", name="it")
                self.m.lan.set_round_trip(0)
                self.load(drafts=on)
                self.m.limit(0)
                repeats, other = self.tokens(REPEATS), self.tokens(" ".join(WORDS) + ". The story begins when")
                for trip in round_trips:
                    self.m.lan.set_round_trip(trip)
                    self.run([repeats], 8)
                    result = self.run([repeats], 2 * self.count)["answers"][0]
                    got["repeats", trip, on] = speed(result)
                    # Hot, so that hardly anything comes twice; the same seed gives the same text with and without.
                    result = self.run([other], 2 * self.count, temperature=1.2, seed=5, top_k=0, top_p=1.0)["answers"][
                        0
                    ]
                    got["differs", trip, on] = speed(result)
                self.m.limit(SHARE)
            for kind in ("repeats", "differs"):
                for trip in round_trips:
                    self.figures.add(f"drafts {kind} {trip}", got[kind, trip, True] / got[kind, trip, False])
        self.m.lan.set_round_trip(0)
        self.driver.do("close", name="it")
        self.load()

    def killed(self) -> None:
        """kill -9 of a shard in mid-answer, one spare: first in deterministic mode, then with normal batching."""
        seeded = {"temperature": 0.9, "seed": 7}
        for deterministic in (True, False):
            self.driver.do("close", name="it")
            self.load(workers=self.m.workers, deterministic=deterministic, parallel=8)
            whole = identical = 0
            references: dict[tuple[bool, int], list[list[int]]] = {}
            for number in range(self.kills):
                is_seeded, streams = number % 2 == 1, (1, 4)[number // 2 % 2]
                options: dict[str, Any] = seeded if is_seeded else {}
                prompts = [self.tokens(counting(100 * (1 + i))) for i in range(streams)]
                if deterministic and (is_seeded, streams) not in references:
                    undisturbed = self.run(prompts, self.count, **options)["answers"]
                    references[is_seeded, streams] = [a["tokens"] for a in undisturbed]
                stages = self.driver.do("stages", name="it")
                address = stages[random.Random(number).randrange(len(stages))]["address"]
                host = next(h for h in self.m.workers if self.m.address(h) == address)
                self.driver.send("run", name="it", prompts=prompts, count=self.count, reach=self.count // 3, **options)
                self.driver.answer()
                killed_at = time.perf_counter()
                self.m.shards[host].kill()
                result = self.driver.answer()
                answers = result["answers"]
                whole += all(len(a["tokens"]) == self.count for a in answers)
                if deterministic:
                    identical += [a["tokens"] for a in answers] == references[is_seeded, streams]
                stall = max(b - a for answer in answers for a, b in pairwise(answer["times"]) if b > killed_at)
                new = next((s for s in self.driver.do("stages", name="it") if s["address"] not in
                            {t["address"] for t in stages}), None)  # fmt: skip
                kind = "fetched" if new is None or new["fetched"] else "from disk"
                mode = "deterministic" if deterministic else "normal"
                self.figures.add(f"stall {mode}, {kind}", stall)
                self.m.restart([host])
            if deterministic:
                self.figures.add("identical", identical)
            self.figures.add("whole", whole)
        self.driver.do("close", name="it")
        self.load()


PARTS: dict[str, Callable[[Bench, bool], None]] = {
    "decode": lambda b, quick: b.decode((0, 20) if quick else ROUND_TRIPS),
    "two": lambda b, _: b.two(),
    "prefill": lambda b, _: b.prefill(),
    "streams": lambda b, _: b.streams(),
    "drafts": lambda b, quick: b.drafts((0, 20) if quick else (0, 20, 50)),
    "killed": lambda b, _: b.killed(),
}


def main(a: argparse.Namespace) -> int:
    """Run the parts; returns 1 if an expectation was missed."""
    if reason := network.unavailable():
        print(f"bench-pipeline {reason}")
        return 2
    lock = (Path(tempfile.gettempdir()) / "osync-bench-pipeline.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would measure each other
    print(f"llama.cpp's RPC backend: {ready()}")
    rounds, kills = (1, 4) if a.quick else (a.rounds, a.kills)
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lan = stack.enter_context(Lan(hosts=7))
        bench = Bench(Machines(lan, folder, a.model.resolve()), rounds, a.tokens, kills)
        bench.start()
        for name in a.parts:
            print(f"{name}", flush=True)
            PARTS[name](bench, a.quick)
    print(f"\n{a.model.name}, {datetime.now(UTC):%Y-%m-%d}, medians of {rounds}, cuts {bench.split}, {os.cpu_count()} "
          f"cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after\n")  # fmt: skip
    if got := bench.figures.seen.get("share of its quota that the unsplit model got"):
        print(f"share of its quota that the unsplit model got: {statistics.median(got):.2f}; below 0.95 others were at "
              "work, and four machines suffer more from that than one\n")  # fmt: skip
    return 0 if show(bench.figures, kills) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=small_model(), help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure; the median counts")
    parser.add_argument("--tokens", type=int, default=48, help="length of the answers")
    parser.add_argument("--kills", type=int, default=20, help="shards killed, in each mode")
    parser.add_argument("--quick", action="store_true", help="one measurement per figure, fewer points")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    sys.exit(main(parser.parse_args()))
