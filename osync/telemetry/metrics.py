"""Prometheus metrics of one gateway, in a registry of its own.

Labels are bounded: routes come from the route table, nodes from the cluster view, kinds from the
error tree. Series that a request touches are looked up once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a cached answer on loopback to the longest generation that people wait for.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Reading = Callable[[], Mapping[str, int]]


class Metrics:
    """Counters that requests bump, and gauges that are read when somebody scrapes."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Counter("osync_requests", "Requests answered", ("route", "status"), registry=registry)
        self._seconds = Histogram(
            "osync_request_seconds",
            "From a request's head to its answer's end",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_byte = Histogram(
            "osync_first_byte_seconds",
            "From a request's head to its answer's head",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.retries = Counter("osync_retries", "Attempts on another node", registry=registry)
        self.client_gone = Counter("osync_client_gone", "Requests whose client left before the end", registry=registry)
        self.stream_bytes = Counter("osync_stream_bytes", "Body bytes sent to clients", registry=registry)
        self._errors = Counter("osync_errors", "Failures by class", ("kind",), registry=registry)
        self._by_answer: dict[tuple[str, int], Counter] = {}
        self._by_route: dict[str, tuple[Histogram, Histogram]] = {}
        self._by_kind: dict[str, Counter] = {}

    def answered(self, route: str, status: int, first_byte_s: float, seconds: float, sent: int) -> None:
        """Count one answer."""
        counter = self._by_answer.get((route, status))
        if counter is None:
            counter = self._by_answer[route, status] = self._requests.labels(route, str(status))
        counter.inc()
        times = self._by_route.get(route)
        if times is None:
            times = self._by_route[route] = (self._first_byte.labels(route), self._seconds.labels(route))
        times[0].observe(first_byte_s)
        times[1].observe(seconds)
        if sent:
            self.stream_bytes.inc(sent)

    def failed(self, kind: str) -> None:
        """Count one failure; `kind` is an error class's name."""
        counter = self._by_kind.get(kind)
        if counter is None:
            counter = self._by_kind[kind] = self._errors.labels(kind)
        counter.inc()

    def watch(self, in_flight: Reading, nodes: Reading) -> None:
        """Add the gauges: open requests by node, and nodes by state."""
        self.registry.register(_Gauges(in_flight, nodes))

    def text(self) -> bytes:
        """Return all series in Prometheus' text form."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, in_flight: Reading, nodes: Reading) -> None:
        self._in_flight = in_flight
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        open_now = GaugeMetricFamily("osync_in_flight", "Open requests", labels=("node",))
        for node, count in self._in_flight().items():
            open_now.add_metric((node,), count)
        yield open_now
        nodes = GaugeMetricFamily("osync_nodes", "Known nodes", labels=("state",))
        for state, count in self._nodes().items():
            nodes.add_metric((state,), count)
        yield nodes
