"""What the pipeline's benchmark expects, and its table in Markdown: ratios first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

NOTHING = "-"


@dataclass(slots=True)
class Figures:
    """What each round gave, by name."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> float:
        """Note a figure."""
        self.seen.setdefault(name, []).append(value)
        print(f"  {name}: {value:.3f}", flush=True)
        return value

    def median(self, name: str) -> float:
        """Return its median."""
        return statistics.median(self.seen[name])

    def ratio(self, above: str, below: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.seen[above], self.seen[below], strict=True))

    def p95(self, name: str) -> float:
        """Return the 95th percentile, without interpolation."""
        values = sorted(self.seen[name])
        return values[min(len(values) - 1, int(0.95 * len(values)))]


@dataclass(frozen=True, slots=True)
class Row:
    """One line: shown where all figures that it `needs` were measured."""

    title: str
    needs: tuple[str, ...]
    value: Callable[[Figures], float]
    bound: float
    is_most: bool = False
    beside: Callable[[Figures], str] = lambda _: NOTHING


def rows(kills: int) -> list[Row]:
    """Return all rows, ratios first."""
    return [*_ratios(), *_failures(kills), *_amounts()]


def _ratios() -> list[Row]:
    found = [_faster(trip, least) for trip, least in ((0, 1.0), (5, 1.2), (20, 1.7), (50, 1.9))]
    found.append(Row("decode, 2 shards, 0 ms, against unsplit", ("two decode",), _median("two decode"), 0.9,
                     beside=_shown("rpc two decode")))  # fmt: skip
    for trip in (0, 10):
        name = f"prefill {trip}"
        title = f"prompt of 768 tokens, 4 x 0.4 core, {trip} ms"
        found.append(Row(f"{title}, against one", (name,), _median(name), 2.8, beside=_shown(f"rpc {name}")))
        over = f"prefill over rpc {trip}"
        found.append(Row(f"{title}, against RPC", (over,), _median(over), 2.5, beside=lambda _: "1"))
    for streams, trip in ((4, 10), (8, 50)):
        name, one = f"streams {streams}", f"streams over one {streams}"
        found.append(Row(f"{streams} streams at {trip} ms, tokens/s against RPC", (name,), _ratio(name, f"rpc {name}"),
                         2.4, beside=lambda _: "1"))  # fmt: skip
        found.append(Row(f"{streams} streams at {trip} ms, against one stream", (one,), _median(one), 3.0))
    for kind, wanted in (("repeats", {0: 1.0, 20: 1.5, 50: 1.8}), ("differs", {0: 0.97, 20: 0.97, 50: 0.97})):
        for trip, least in wanted.items():
            name = f"drafts {kind} {trip}"
            found.append(Row(f"drafts by look-up, text that {kind}, {trip} ms, against none", (name,), _median(name),
                             least))  # fmt: skip
    gap = "gap p99 over median"
    found.append(Row("p99 token gap while a 1,000-token prompt comes, in medians before it", (gap,), _median(gap), 3.0,
                     True, lambda f: f"stands {f.median('rpc stall s'):.1f} s"))  # fmt: skip
    return found


def _failures(kills: int) -> list[Row]:
    found = [
        Row(f"kill -9 of a shard, {kills} runs, deterministic: identical", ("identical",), _median("identical"), kills,
            beside=lambda _: "0"),
        Row(f"kill -9 of a shard, {kills} runs in each mode: whole", ("whole",), lambda f: min(f.seen["whole"]), kills,
            beside=lambda _: "0"),
    ]  # fmt: skip
    for kind, most in (("from disk", 1.5), ("fetched", 5.0)):
        name = f"stall normal, {kind}"
        found.append(Row(f"stall after a kill, p95, slice {kind}, s", (name,), _p95(name), most, True))
    found.append(Row("bytes fetched by a worker, against its slice", ("fetched of slice",),
                     _median("fetched of slice"), 1.02, True, lambda _: "everything"))  # fmt: skip
    again = "fetched after restart"
    found.append(Row("bytes fetched after a restart", (again,), _median(again), 0, True, lambda _: "everything"))
    again = "ready after restart s"
    found.append(Row("loaded after a restart, s", (again,), _median(again), 2, True, _shown("rpc load s")))
    return found


def _amounts() -> list[Row]:
    found = []
    for trip, most in ((0, 30), (5, 42), (20, 72), (50, 135)):
        name = f"decode {trip}"
        found.append(Row(f"decode, 4 shards, {trip} ms: ms/token", (name,), _median(name), most, True,
                         _shown(f"rpc {name}")))  # fmt: skip
    for streams, trip, least in ((4, 10, 52), (8, 50, 45)):
        name = f"streams {streams}"
        found.append(Row(f"{streams} streams at {trip} ms, 4 x 0.4 core: tokens/s", (name,), _median(name), least,
                         beside=_shown(f"rpc {name}")))  # fmt: skip
    name = "wire bytes per token"
    found.append(Row("bytes per token over the coordinator", (name,), _median(name), 1024, True, _shown(f"rpc {name}")))
    return found


def _faster(trip: int, least: float) -> Row:
    name = f"decode {trip}"
    return Row(f"decode, 4 shards, {trip} ms, speed against RPC", (name,), _ratio(f"rpc {name}", name), least,
               beside=lambda _: "1")  # fmt: skip


def _median(name: str) -> Callable[[Figures], float]:
    return lambda figures: figures.median(name)


def _p95(name: str) -> Callable[[Figures], float]:
    return lambda figures: figures.p95(name)


def _ratio(above: str, below: str) -> Callable[[Figures], float]:
    return lambda figures: figures.ratio(above, below)


def _shown(name: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures.median(name):,.4g}" if name in figures.seen else NOTHING


def show(figures: Figures, kills: int) -> bool:
    """Print the table; returns True if every expectation was met."""
    lines, missed = [], 0
    for row in rows(kills):
        if not set(row.needs) <= figures.seen.keys():
            continue
        value = row.value(figures)
        good = value <= row.bound if row.is_most else value >= row.bound
        missed += not good
        mark = "ok" if good else "MISS"
        limit = f"{'at most' if row.is_most else 'at least'} {row.bound:,g}"
        lines.append((row.title, f"{value:,.4g}", row.beside(figures), limit, mark))
    print(markdown(("", "osync", "llama.cpp RPC", "wanted", ""), lines))
    return not missed


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
