"""What happened in the last minute, in a ring of one-second buckets."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SPAN_S = 60
SAMPLES = 512
"""Durations kept for the quantiles: enough for a p99, cheap to sort when somebody asks."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A summary of a window. Times in seconds."""

    requests: int = 0
    errors: int = 0
    requests_per_s: float = 0.0
    error_rate: float = 0.0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0


class Window:
    """Counts of the last minute and the newest durations. `now` is any clock that never goes back."""

    __slots__ = ("_counts", "_durations", "_errors", "_second", "_since", "_sums", "errors", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self._second = -1
        self._since = -1
        self._counts = [0] * SPAN_S
        self._errors = [0] * SPAN_S
        self._sums = [0.0] * SPAN_S
        self._durations: deque[float] = deque(maxlen=SAMPLES)

    def add(self, now: float, seconds: float, is_error: bool) -> None:
        """Count one answered request."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        slot = second % SPAN_S
        self.requests += 1
        self._counts[slot] += 1
        self._sums[slot] += seconds
        if is_error:
            self.errors += 1
            self._errors[slot] += 1
        self._durations.append(seconds)

    def figures(self, now: float) -> Figures:
        """Sum up the last minute; the quantiles are those of the newest requests, however old."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        count, errors = sum(self._counts), sum(self._errors)
        if not count:
            return Figures()
        span = min(SPAN_S, second - self._since + 1)
        ordered = sorted(self._durations)
        last = len(ordered) - 1
        return Figures(
            requests=count,
            errors=errors,
            requests_per_s=count / span,
            error_rate=errors / count,
            mean_s=sum(self._sums) / count,
            p50_s=ordered[last // 2],
            p99_s=ordered[round(last * 0.99)],
        )

    def _advance(self, second: int) -> None:
        if self._since < 0:
            self._since = second
        first = max(self._second + 1, second - SPAN_S + 1)
        for stale in range(first, second + 1):
            slot = stale % SPAN_S
            self._counts[slot] = self._errors[slot] = 0
            self._sums[slot] = 0.0
        self._second = second
