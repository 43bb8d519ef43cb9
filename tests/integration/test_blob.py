"""Ranged reads of blobs: exact bytes, other sources where one fails, clear errors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from osync.errors import ModelNotFound, UpstreamUnavailable
from osync.net import blob
from osync.net.blob import BlobReader, BlobService, add_blob_service
from osync.net.server import RpcServer
from osync.pb import blob_pb2 as pb
from osync.pb import blob_pb2_grpc

DATA = os.urandom(3 << 20) + b"the end"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


@asynccontextmanager
async def serving(path: Path | None) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1", 0)
    add_blob_service(server, lambda digest: path if digest == DIGEST else None)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.mark.parametrize("prefix", ["", "sha256:"])
async def test_a_range_comes_exactly(file: Path, prefix: str) -> None:
    async with serving(file) as source, BlobReader(prefix + DIGEST, [source]) as reader:
        assert await reader.size() == len(DATA)
        assert await reader.read(5, 10) == DATA[5:15]
        assert await reader.read(0, len(DATA)) == DATA
        assert await reader.read(len(DATA) - 7, 7) == b"the end"
        assert await reader.read(9, 0) == b""
        assert reader.fetched == 10 + len(DATA) + 7


async def test_a_daemon_without_the_blob_is_passed_over(file: Path) -> None:
    async with serving(None) as empty, serving(file) as full, BlobReader(DIGEST, [empty, full]) as reader:
        assert await reader.size() == len(DATA)
        assert await reader.read(1, 2) == DATA[1:3]


async def test_nobody_has_it() -> None:
    async with serving(None) as source, BlobReader(DIGEST, [source]) as reader:
        with pytest.raises(ModelNotFound, match=r"is not on this host"):
            await reader.read(0, 1)


async def test_a_dead_source_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob, "_PAUSE_S", 0.0)
    async with serving(file) as source:
        pass
    async with BlobReader(DIGEST, [source]) as reader:
        with pytest.raises(UpstreamUnavailable, match=source):
            await reader.read(0, 1)


async def test_a_range_beyond_the_end_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob, "_PAUSE_S", 0.0)
    async with serving(file) as source, BlobReader(DIGEST, [source]) as reader:
        with pytest.raises(UpstreamUnavailable, match="not within the blob"):
            await reader.read(len(DATA) - 1, 2)


class Breaks(BlobService):
    """Sends one good piece of each range, then a bad one."""

    def __init__(self, path: Path, damage: dict[str, Any]) -> None:
        super().__init__(lambda _: path)
        self._damage = damage

    async def Read(self, request: Any, context: Any) -> AsyncIterator[pb.BlobPiece]:
        count = 0
        async for piece in super().Read(request, context):
            count += 1
            if count == 2:
                for name, value in self._damage.items():
                    setattr(piece, name, value)
                yield piece
                return
            yield piece


@pytest.mark.parametrize("damage", [{"data": b"other"}, {"offset": 1}, {"crc32": 1}, {"data": b""}])
async def test_damage_is_noticed_and_the_rest_comes_from_elsewhere(file: Path, damage: dict[str, Any]) -> None:
    bad = RpcServer("127.0.0.1", 0)
    bad.add_service(blob_pb2_grpc.add_BlobServicer_to_server, Breaks(file, damage), blob.FULL_NAME)
    port = await bad.start()
    try:
        async with serving(file) as good, BlobReader(DIGEST, [f"127.0.0.1:{port}", good]) as reader:
            assert await reader.read(0, len(DATA)) == DATA
    finally:
        await bad.stop(0)
