"""Ownership of gRPC calls: an abandoned one is never cancelled by the library, so its owner does it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar


class Cancellable(Protocol):
    """Any call of grpc.aio."""

    def cancel(self) -> bool:
        """End it locally and tell the other side."""
        ...


CallT = TypeVar("CallT", bound=Cancellable)


@asynccontextmanager
async def rpc_guard(call: CallT) -> AsyncIterator[CallT]:
    """Hold a call and cancel it at the end, however that comes; harmless where it has ended."""
    try:
        yield call
    finally:
        call.cancel()
