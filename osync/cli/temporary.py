"""A proxy in this very process, for one answer over shards that the caller names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from osync.client.asynchronous import AsyncOllamaClient
from osync.config import Settings
from osync.daemon.run import Daemon
from osync.errors import NoNodes
from osync.telemetry import log as logging

FOUND_S: Final = 10.0
"""How long servers are waited for; an answer is tried with those that are there then."""


async def answer(
    settings: Settings, model: str, prompt: str, options: Mapping[str, Any], write: Callable[[str], None]
) -> None:
    """Write one answer, piece by piece. Raises OsyncError."""
    logging.setup("WARNING", settings.log_format)
    daemon = Daemon(settings)
    try:
        await daemon.start()
        await _found(daemon)
        url = f"http://127.0.0.1:{daemon.http_port}"
        async with (
            AsyncOllamaClient(base_urls=[url]) as client,
            client.generate(model, prompt, options=dict(options)) as stream,
        ):
            async for piece in stream:
                write(piece.response)
    finally:
        await daemon.close()


async def _found(daemon: Daemon) -> None:
    """Wait until all servers have answered, or the time is over, and the first shard among them is taken in."""
    assert daemon.membership is not None and daemon.distribution is not None, "the settings say so"
    view, changed = daemon.membership.view, asyncio.Event()
    daemon.membership.on_change(changed.set)
    try:
        async with asyncio.timeout(FOUND_S):
            while not all(peer.state for peer in view.peers):
                changed.clear()
                await changed.wait()
    except TimeoutError:
        pass
    if not view.shards():
        down = [f"{peer.link.address} is down ({peer.error})" for peer in view.peers if peer.state is None]
        others = [f"{peer.link.address} is no shard" for peer in view.peers if peer.state is not None]
        raise NoNodes("no shard among the servers: " + "; ".join(down + others))
    await daemon.distribution.ready()
