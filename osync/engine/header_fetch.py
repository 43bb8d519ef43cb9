"""The header of a GGUF file on another host: by reads that grow until it is whole."""

from __future__ import annotations

import asyncio

from osync.engine.gguf import GGUFHeader, parse_header
from osync.engine.slice_file import Read
from osync.errors import ModelUnusable

_STEP = 256 << 10
_MOST = 256 << 20


class _More(Exception):
    """The header goes on beyond what is here."""


async def fetch_header(read: Read, size: int, name: str) -> tuple[GGUFHeader, bytes]:
    """Return a file's header, checked, and the bytes from the file's start that it takes.

    `size` is the file's. Raises ModelUnusable, and what `read` raises.
    """
    data = b""
    wanted = min(_STEP, size)
    while True:
        data += await read(len(data), wanted - len(data))
        start = data

        def piece(offset: int, count: int, start: bytes = start) -> bytes:
            if offset + count > len(start) < size:
                raise _More
            return start[offset : offset + count]

        try:
            header = await asyncio.to_thread(parse_header, piece, size, name)
        except _More:
            if wanted >= min(size, _MOST):
                raise ModelUnusable(f"{name}: its header is over {_MOST} bytes") from None
            # By a quarter: some more round trips, and little that is read for nothing.
            wanted = min(wanted + max(_STEP, wanted // 4), size, _MOST)
            continue
        return header, data[: header.header_bytes]
