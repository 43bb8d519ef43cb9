"""Channels to other daemons."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from osync.net.options import CHANNEL


@asynccontextmanager
async def open_channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Hold a channel to host:port; it is closed after the tasks that use it have ended."""
    channel = grpc.aio.insecure_channel(address, options=CHANNEL)
    try:
        yield channel
    finally:
        await channel.close()
