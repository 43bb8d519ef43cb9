"""The event loop's lateness: counting, quantiles, and its histogram in the metrics."""

from __future__ import annotations

import asyncio
import time

from osync.telemetry.lag import BOUNDS_S, LoopLag, quantile
from osync.telemetry.metrics import Metrics


def test_quantiles_are_bucket_bounds_and_never_above_the_largest():
    lag = LoopLag()
    assert lag.quantile(0.99) == 0.0
    for _ in range(98):
        lag.add(0.0005)
    lag.add(0.018)
    lag.add(0.018)
    assert lag.quantile(0.5) == 0.001
    assert lag.quantile(0.98) == 0.001
    assert lag.quantile(0.99) == 0.018
    assert abs(lag.total_s - 0.085) < 1e-9


def test_an_early_timer_counts_as_on_time_and_a_very_late_one_in_the_last_bucket():
    lag = LoopLag()
    lag.add(-0.5)
    lag.add(BOUNDS_S[-1] + 1)
    assert lag.counts[0] == lag.counts[-1] == 1
    assert lag.quantile(1.0) == BOUNDS_S[-1] + 1
    assert quantile(lag.counts, 1.0) == float("inf")


async def test_a_callback_that_holds_the_loop_up_is_seen():
    lag = LoopLag()
    task = asyncio.create_task(lag.watch())
    async with asyncio.timeout(20):
        while not sum(lag.counts):
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(time.sleep, 0.2)
        while lag.most_s < 0.1:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert lag.most_s >= 0.1


def test_the_histogram_is_in_the_metrics():
    metrics, lag = Metrics(), LoopLag()
    metrics.watch_loop(lag)
    lag.add(0.004)
    lag.add(0.3)
    text = metrics.text().decode()
    assert 'osync_event_loop_lag_seconds_bucket{le="0.003"} 0.0' in text
    assert 'osync_event_loop_lag_seconds_bucket{le="0.005"} 1.0' in text
    assert 'osync_event_loop_lag_seconds_bucket{le="+Inf"} 2.0' in text
    assert "osync_event_loop_lag_seconds_sum 0.304" in text
