"""How late the event loop is: a timer every 50 ms, and by how much it missed its time."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from typing import Final

BOUNDS_S: Final = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
INTERVAL_S: Final = 0.05  # a wake-up costs some 10 µs: 0.02 % of a core


class LoopLag:
    """Lateness by bucket, the last one for all above `BOUNDS_S`; used in the loop's thread only."""

    __slots__ = ("counts", "most_s", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0
        self.most_s = 0.0

    def add(self, late_s: float) -> None:
        """Count one timer; one that came early, as clocks are coarse, was on time."""
        late_s = max(0.0, late_s)
        self.counts[bisect_left(BOUNDS_S, late_s)] += 1
        self.total_s += late_s
        self.most_s = max(self.most_s, late_s)

    def quantile(self, q: float) -> float:
        """Return the upper bound in seconds of the bucket with the q-quantile, never more than the largest
        lateness seen; 0 before the first."""
        return min(quantile(self.counts, q), self.most_s)

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            due = time.monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.add(time.monotonic() - due)


def quantile(counts: list[int], q: float) -> float:
    """Return the upper bound in seconds of the bucket with the q-quantile: inf above `BOUNDS_S`, 0 without any."""
    wanted, seen = q * sum(counts), 0
    for bound, count in zip((*BOUNDS_S, float("inf")), counts, strict=True):
        seen += count
        if seen and seen >= wanted:
            return bound
    return 0.0
