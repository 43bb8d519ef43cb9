"""Every integration test ends with the tasks, descriptors and child processes that it began with."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.leaks import children, leaks, open_fds

# gRPC opens a few descriptors with its first channel and closes them with the last one, whenever that is
# collected. One that is held, closed, keeps their number steady.
_held: list[grpc.aio.Channel] = []


@pytest.fixture(autouse=True)
async def _no_leaks(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    if not _held:
        _held.append(grpc.aio.insecure_channel("127.0.0.1:1"))
        await _held[0].close()
    fds, pids = open_fds(), children()
    yield
    left = await leaks(fds, pids)
    assert not left, "left behind:\n" + "\n".join(left)
