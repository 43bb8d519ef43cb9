"""Request bodies as the serving side reads them (`Body`)."""

from __future__ import annotations

from osync.errors import FrameTooLarge
from osync.net.pipe import Pipe


def _too_large(limit: int) -> FrameTooLarge:
    return FrameTooLarge(f"the request's body is larger than {limit} bytes")


class BytesBody:
    """A body that is there as a whole."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        """Return the whole, then b""."""
        data, self._data = self._data, b""
        return data

    async def read_all(self, limit: int) -> bytes:
        """Return the whole. Raises FrameTooLarge over `limit` bytes."""
        if len(self._data) > limit:
            raise _too_large(limit)
        return await self.read()


class PipeBody:
    """A body that is still coming in."""

    __slots__ = ("_pipe",)

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    async def read(self) -> bytes:
        """Return what is there, b"" at the end. Raises StreamBroken."""
        return await self._pipe.read()

    async def read_all(self, limit: int) -> bytes:
        """Return all that is left. Raises FrameTooLarge over `limit` bytes."""
        chunks: list[bytes] = []
        size = 0
        while data := await self._pipe.read():
            size += len(data)
            if size > limit:
                raise _too_large(limit)
            chunks.append(data)
        return b"".join(chunks)
