"""Ranged reads of model files over gRPC: the servicer, and a reader that turns to other daemons when one fails."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc
import structlog

from osync.errors import ModelNotFound, UpstreamUnavailable, WireError
from osync.net.channel import open_channel
from osync.net.guard import rpc_guard
from osync.net.options import describe
from osync.net.server import RpcServer
from osync.pb import blob_pb2 as pb
from osync.pb import blob_pb2_grpc

log = structlog.get_logger("osync.net")

PIECE_BYTES: Final = 1 << 20
SILENCE_S: Final = 10.0
"""Longest wait for the next piece of a range."""
ROUNDS: Final = 3
"""How often every source is tried before a read fails."""
_PAUSE_S: Final = 0.3
FULL_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Blob"].full_name

Find = Callable[[str], Path | None]
"""From a digest's 64 hexadecimal digits to the file on this host; called in a thread."""


class BlobService(blob_pb2_grpc.BlobServicer):
    """Serves the files that `find` knows."""

    def __init__(self, find: Find) -> None:
        self._find = find

    async def Stat(self, request: pb.BlobStatRequest, context: Any) -> pb.BlobStat:
        """Say how large a blob is."""
        path = await self._path(request.digest, context)
        return pb.BlobStat(size=(await asyncio.to_thread(path.stat)).st_size)

    async def Read(self, request: pb.BlobReadRequest, context: Any) -> AsyncIterator[pb.BlobPiece]:
        """Send a range in pieces."""
        path = await self._path(request.digest, context)
        file = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            offset, end = request.offset, request.offset + request.length if request.length else size
            if not 0 <= offset <= end <= size:
                await context.abort(
                    grpc.StatusCode.OUT_OF_RANGE, f"bytes {offset} to {end} are not within the blob's {size}"
                )
            while offset < end:
                piece = await asyncio.to_thread(_read, file, offset, min(PIECE_BYTES, end - offset))
                if not piece.data:
                    await context.abort(grpc.StatusCode.DATA_LOSS, f"the blob ends at byte {offset}, not at {end}")
                yield piece
                offset += len(piece.data)
        finally:
            os.close(file)

    async def _path(self, digest: str, context: Any) -> Path:
        # In a thread: it may have to look at the directories.
        path = await asyncio.to_thread(self._find, digest.removeprefix("sha256:").lower())
        if path is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"blob {digest[:80]!r} is not on this host")
        assert path is not None
        return path


def _read(file: int, offset: int, length: int) -> pb.BlobPiece:
    data = os.pread(file, length, offset)
    return pb.BlobPiece(offset=offset, data=data, crc32=zlib.crc32(data))


def add_blob_service(server: RpcServer, find: Find) -> None:
    """Serve blobs on a daemon's gRPC server."""
    server.add_service(blob_pb2_grpc.add_BlobServicer_to_server, BlobService(find), FULL_NAME)


class BlobReader:
    """One blob on several daemons, each `host:port`. A context manager: it holds their connections."""

    def __init__(self, digest: str, sources: Sequence[str]) -> None:
        self._digest = digest
        self._sources = list(dict.fromkeys(sources))
        self._stubs: dict[str, Any] = {}
        self._stack = AsyncExitStack()
        self._turn = 0
        self.fetched = 0
        """Bytes that came over the network, also those that were read twice."""

    async def __aenter__(self) -> BlobReader:
        for source in self._sources:
            channel = await self._stack.enter_async_context(open_channel(source))
            self._stubs[source] = blob_pb2_grpc.BlobStub(channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def size(self) -> int:
        """Return the blob's size in bytes. Raises ModelNotFound if no source has it, UpstreamUnavailable."""
        reasons: list[str] = []
        for source in list(self._sources):
            try:
                stat = await self._stubs[source].Stat(pb.BlobStatRequest(digest=self._digest), timeout=SILENCE_S)
                return int(stat.size)
            except grpc.aio.AioRpcError as error:
                reasons.append(self._failed(source, error))
        raise self._nobody(reasons)

    async def read(self, offset: int, length: int) -> bytes:
        """Return exactly that range. Raises ModelNotFound, UpstreamUnavailable."""
        return b"".join([piece async for piece in self.pieces(offset, length)])

    async def pieces(self, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield a range in order, each byte once; goes on with another source where one breaks off."""
        end = offset + length
        reasons: list[str] = []
        fruitless = 0
        while offset < end:
            if not self._sources or fruitless >= ROUNDS * len(self._sources):
                raise self._nobody(reasons)
            source = self._sources[self._turn % len(self._sources)]
            self._turn += 1
            fruitless += 1
            try:
                async with aclosing(self._range(source, offset, end - offset)) as pieces:
                    async for data in pieces:
                        offset += len(data)
                        fruitless = 0
                        yield data
            except (grpc.aio.AioRpcError, WireError, TimeoutError) as error:
                reasons.append(self._failed(source, error))
                log.warning("blob_read_failed", source=source, offset=offset, error=reasons[-1])
                if fruitless > len(self._sources):
                    await asyncio.sleep(_PAUSE_S)

    async def _range(self, source: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        request = pb.BlobReadRequest(digest=self._digest, offset=offset, length=length)
        async with rpc_guard(self._stubs[source].Read(request)) as call:
            while length:
                async with asyncio.timeout(SILENCE_S):
                    piece = await call.read()
                if piece is grpc.aio.EOF:
                    code, details = await call.code(), await call.details()
                    raise WireError(str(details or f"ended {length} bytes early ({code.name})"))
                data: bytes = piece.data
                if piece.offset != offset or not data or len(data) > length:
                    raise WireError(f"sent {len(data)} bytes at {piece.offset}, not {length} at {offset}")
                if zlib.crc32(data) != piece.crc32:
                    raise WireError(f"the bytes at {offset} are damaged")
                self.fetched += len(data)
                offset += len(data)
                length -= len(data)
                yield data

    def _failed(self, source: str, error: Exception) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                self._sources.remove(source)
            return f"{source}: {describe(error)}"
        return f"{source}: {error or 'silent'}"

    def _nobody(self, reasons: Sequence[str]) -> ModelNotFound | UpstreamUnavailable:
        if not self._sources:
            return ModelNotFound(f"no daemon has blob {self._digest[:19]}…: {'; '.join(reasons) or 'none was given'}")
        return UpstreamUnavailable(f"cannot read blob {self._digest[:19]}…: {'; '.join(dict.fromkeys(reasons))}")
