"""osyncd with a probe: on SIGUSR1 it writes what it counted since the last time to the file BENCH_PROBE.

The daemon is the real one. Counted is how late its event loop's timers were, and the time that its threads
spent in llama_decode and llama_sampler_sample.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osync.cli.daemon import main
from osync.daemon import run
from osync.telemetry.lag import LoopLag

TIMED = {"llama_decode": "decode", "llama_sampler_sample": "sample"}


class Counts:
    """What was counted since the last report."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(TIMED.values(), 0)
        self.spent_ns = dict.fromkeys(TIMED.values(), 0)
        self.lag = LoopLag()
        self.cells: dict[int, int] = {}
        """Of the KV cache of each context that is there."""

    def watch_contexts(self, api: Any) -> None:
        """Know how large a KV cache each context was given."""
        make, free = api.llama_init_from_model, api.llama_free

        def made(*arguments: Any) -> Any:
            context = make(*arguments)
            if context:
                self.cells[context] = api.llama_n_ctx(context)
            return context

        def freed(context: Any) -> None:
            self.cells.pop(context, None)
            free(context)

        api.llama_init_from_model, api.llama_free = made, freed

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a C function; its time includes waiting for the GIL afterwards."""
        calls, spent, now = self.calls, self.spent_ns, time.perf_counter_ns

        def call(*arguments: Any) -> Any:
            began = now()
            result = function(*arguments)
            spent[name] += now() - began
            calls[name] += 1
            return result

        return call

    def report(self, path: Path) -> None:
        """Write and start anew."""
        lag = self.lag
        body = {"calls": self.calls, "spent_ns": self.spent_ns, "lag": lag.counts, "lag_most_s": lag.most_s}
        body["cells"] = sum(self.cells.values())
        new = path.with_suffix(".new")
        new.write_text(json.dumps(body))
        new.rename(path)
        for name in self.calls:
            self.calls[name] = self.spent_ns[name] = 0
        lag.counts[:] = [0] * len(lag.counts)
        lag.most_s = 0.0


class Probed(run.Daemon):
    """The daemon, listening to SIGUSR1, too."""

    async def start(self) -> None:
        """Start, with the probe's counters in place."""
        counts = Counts()
        counts.lag = self.lag
        if "node" in self.settings.role:
            import llama_cpp.llama_cpp as api

            for name, short in TIMED.items():
                setattr(api, name, counts.timed(short, getattr(api, name)))
            counts.watch_contexts(api)
        await super().start()
        path = Path(os.environ["BENCH_PROBE"])
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, counts.report, path)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as osync.engine.llama does; here the library is loaded first
    run.Daemon = Probed  # type: ignore[misc]
    main()
