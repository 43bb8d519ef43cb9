"""Prometheus metrics of one gateway, in a registry of its own.

Labels are bounded: routes come from the route table, nodes from the cluster view, kinds from the
error tree. Requests bump plain numbers, without prometheus_client's lock for each; the metrics are
made of them when somebody scrapes, in the loop's thread too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from osync.telemetry.lag import BOUNDS_S, LoopLag

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a cached answer on loopback to the longest generation that people wait for.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BOUNDS = (*(str(float(bound)) for bound in _SECONDS), "+Inf")

Reading = Callable[[], Mapping[str, int]]


class Tally:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Add to it."""
        self.value += by


class _Times:
    """Durations by bucket, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total = 0.0


class _Route:
    """What is counted of one route."""

    __slots__ = ("first_byte", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.first_byte = _Times()
        self.seconds = _Times()


class Metrics:
    """Counters that requests bump, and gauges that are read when somebody scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.retries = Tally()
        self.client_gone = Tally()
        self.stream_bytes = Tally()
        self._routes: dict[str, _Route] = {}
        self._errors: dict[str, int] = {}
        self.registry.register(_Counts(self, self._routes, self._errors))

    def answered(self, route: str, status: int, first_byte_s: float, seconds: float, sent: int) -> None:
        """Count one answer."""
        row = self._routes.get(route)
        if row is None:
            row = self._routes[route] = _Route()
        row.statuses[status] = row.statuses.get(status, 0) + 1
        times = row.first_byte
        times.counts[bisect_left(_SECONDS, first_byte_s)] += 1
        times.total += first_byte_s
        times = row.seconds
        times.counts[bisect_left(_SECONDS, seconds)] += 1
        times.total += seconds
        self.stream_bytes.value += sent

    def failed(self, kind: str) -> None:
        """Count one failure; `kind` is an error class's name."""
        self._errors[kind] = self._errors.get(kind, 0) + 1

    def watch(self, in_flight: Reading, nodes: Reading, active: Reading, queued: Reading) -> None:
        """Add the gauges: requests by node, open here, in work there and waiting there; and nodes by state."""
        self.registry.register(_Gauges(in_flight, nodes, active, queued))

    def watch_shards(self, readings: Callable[[], Iterable[ShardReading]]) -> None:
        """Add the figures of shards and pipelines."""
        self.registry.register(_Shards(readings))

    def watch_loop(self, lag: LoopLag) -> None:
        """Add the histogram of the event loop's lateness."""
        self.registry.register(_Lag(lag))

    def text(self) -> bytes:
        """Return all series in Prometheus' text form."""
        return generate_latest(self.registry)


class _Counts(Collector):
    def __init__(self, metrics: Metrics, routes: Mapping[str, _Route], errors: Mapping[str, int]) -> None:
        self._metrics = metrics
        self._routes = routes
        self._errors = errors

    def collect(self) -> Iterator[Metric]:
        """Yield the counters and histograms as they are now."""
        requests = CounterMetricFamily("osync_requests", "Requests answered", labels=("route", "status"))
        seconds = HistogramMetricFamily(
            "osync_request_seconds", "From a request's head to its answer's end", labels=("route",)
        )
        first_byte = HistogramMetricFamily(
            "osync_first_byte_seconds", "From a request's head to its answer's head", labels=("route",)
        )
        for route, row in self._routes.items():
            for status, count in row.statuses.items():
                requests.add_metric((route, str(status)), count)
            for family, times in ((seconds, row.seconds), (first_byte, row.first_byte)):
                buckets = list(zip(_BOUNDS, accumulate(times.counts), strict=True))
                family.add_metric((route,), buckets, times.total)
        yield requests
        yield seconds
        yield first_byte
        metrics = self._metrics
        yield CounterMetricFamily("osync_retries", "Attempts on another node", metrics.retries.value)
        yield CounterMetricFamily(
            "osync_client_gone", "Requests whose client left before the end", metrics.client_gone.value
        )
        yield CounterMetricFamily("osync_stream_bytes", "Body bytes sent to clients", metrics.stream_bytes.value)
        errors = CounterMetricFamily("osync_errors", "Failures by class", labels=("kind",))
        for kind, count in self._errors.items():
            errors.add_metric((kind,), count)
        yield errors


class _Gauges(Collector):
    def __init__(self, in_flight: Reading, nodes: Reading, active: Reading, queued: Reading) -> None:
        self._by_node = (
            ("osync_in_flight", "Open requests", in_flight),
            ("osync_node_active", "Requests that a node's backend works on, by its own account", active),
            ("osync_node_queued", "Requests that wait in a node, for a load or a free place", queued),
        )
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        for name, meaning, reading in self._by_node:
            family = GaugeMetricFamily(name, meaning, labels=("node",))
            for node, count in reading().items():
                family.add_metric((node,), count)
            yield family
        nodes = GaugeMetricFamily("osync_nodes", "Known nodes", labels=("state",))
        for state, count in self._nodes().items():
            nodes.add_metric((state,), count)
        yield nodes


@dataclass(frozen=True, slots=True)
class ShardReading:
    """One figure of a shard or a pipeline; its name is one of those that `_SHARDS` explains."""

    name: str
    labels: tuple[str, ...]
    value: float


_PIPELINE = ("pipeline", "model")
_STAGE = (*_PIPELINE, "stage", "node")
_SHARDS: Mapping[str, tuple[str, tuple[str, ...], bool]] = {
    "shard_memory_bytes": ("Memory that a shard lends", ("node",), False),
    "shard_memory_free_bytes": ("Memory of it that no stage holds", ("node",), False),
    "shard_stages": ("Stages that a shard holds", ("node",), False),
    "shard_round_trip_seconds": ("Time to a shard and back", ("node",), False),
    "pipeline_stages": ("Stages of a pipeline", _PIPELINE, False),
    "pipeline_size_bytes": ("Weights and KV cache of all stages", _PIPELINE, False),
    "pipeline_tokens_per_second": ("Tokens of all sequences together, of late", _PIPELINE, False),
    "pipeline_active": ("Requests that a pipeline works on", _PIPELINE, False),
    "pipeline_queued": ("Requests that wait for a place in it", _PIPELINE, False),
    "pipeline_recoveries": ("Times that it was made anew", _PIPELINE, True),
    "pipeline_stage_rows": ("Tokens that a stage evaluated, once per sequence", _STAGE, True),
    "pipeline_stage_busy_seconds": ("Time that a stage spent in evaluations", _STAGE, True),
    "pipeline_stage_wire_seconds": ("Time that a stage's frames were on their way to the next one", _STAGE, True),
    "pipeline_stage_queued": ("Frames that wait before a stage", _STAGE, False),
}
"""Meaning, labels, and whether the figure only grows."""


class _Shards(Collector):
    def __init__(self, readings: Callable[[], Iterable[ShardReading]]) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, (meaning, labels, grows) in _SHARDS.items():
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            families[name] = kind(f"osync_{name}", meaning, labels=labels)
        for reading in self._readings():
            families[reading.name].add_metric(reading.labels, reading.value)
        yield from (family for family in families.values() if family.samples)


class _Lag(Collector):
    def __init__(self, lag: LoopLag) -> None:
        self._lag = lag

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram as it is now."""
        family = HistogramMetricFamily("osync_event_loop_lag_seconds", "How late timers of the event loop ran")
        bounds = (*map(str, BOUNDS_S), "+Inf")
        family.add_metric((), list(zip(bounds, accumulate(self._lag.counts), strict=True)), self._lag.total_s)
        yield family
