"""Slices on disk: checked, resumed, bounded."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from osync.engine import slice_file
from osync.engine.gguf import read_header
from osync.engine.slice import SlicePlan, plan_slice
from osync.engine.slice_file import file_reader, tensor_digests, write_slice
from osync.engine.slices import SliceCache
from osync.errors import CapacityError, ModelUnusable
from tests.fakes.architectures import write_model

pytest.importorskip("gguf")
pytest.importorskip("numpy")

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_file, "CHUNK", 8 << 10)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", "llama", 6, tied=False)


def plan_of(source: Path, first: int, last: int) -> SlicePlan:
    return plan_slice(read_header(source), first, last)


def expected(plan: SlicePlan, source: Path) -> bytes:
    raw = source.read_bytes()
    return b"".join(
        raw[p.source : p.source + p.size] if p.source is not None else p.data or bytes(p.size) for p in plan.pieces
    )


class Source:
    """A file read over a network that counts, breaks and lies."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.read_bytes = 0
        self.reads: list[tuple[int, int]] = []
        self.breaks_after = -1

    async def __call__(self, offset: int, size: int) -> bytes:
        if self.breaks_after == 0:
            raise ConnectionResetError("gone")
        self.breaks_after -= 1
        await asyncio.sleep(0)
        self.reads.append((offset, size))
        self.read_bytes += size
        return bytes(self.data[offset : offset + size])


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 4), (4, 6), (0, 6)])
async def test_a_slice_is_written_as_planned(source, tmp_path, first, last):
    plan, target = plan_of(source, first, last), tmp_path / "out" / "slice.gguf"
    steps: list[tuple[int, int]] = []
    remote = Source(source)
    digests = tensor_digests(source, read_header(source))
    fetched = await write_slice(
        plan, remote, target, digests=digests, progress=lambda done, total: steps.append((done, total))
    )
    assert target.read_bytes() == expected(plan, source)
    assert [path.name for path in target.parent.iterdir()] == ["slice.gguf"]
    assert fetched == remote.read_bytes <= plan.stored_bytes + 4096 * len(remote.reads)
    assert steps[-1] == (plan.stored_bytes, plan.stored_bytes)
    assert steps == sorted(steps)
    assert max(size for _, size in remote.reads) <= slice_file.CHUNK


async def test_neighbours_are_read_at_once(source, tmp_path):
    plan = plan_of(source, 2, 4)
    remote = Source(source)
    await write_slice(plan, remote, tmp_path / "slice.gguf")
    assert len(remote.reads) < len(plan.tensors) + plan.fetch_bytes / slice_file.CHUNK


async def test_a_cut_slice_goes_on_where_it_was(source, tmp_path):
    plan, target = plan_of(source, 0, 3), tmp_path / "slice.gguf"
    total = Source(source)
    await write_slice(plan, total, tmp_path / "other.gguf")
    remote = Source(source)
    remote.breaks_after = 12
    with pytest.raises(ConnectionResetError):
        await write_slice(plan, remote, target)
    assert not target.exists()
    before, remote.breaks_after = remote.read_bytes, -1
    await write_slice(plan, remote, target)
    assert target.read_bytes() == expected(plan, source)
    # At most what was read ahead and not yet written is read twice.
    assert remote.read_bytes - total.read_bytes <= slice_file._AHEAD * slice_file.CHUNK
    assert before > slice_file._AHEAD * slice_file.CHUNK


async def test_what_was_damaged_on_disk_meanwhile_is_fetched_again(source, tmp_path):
    plan, target = plan_of(source, 0, 3), tmp_path / "slice.gguf"
    remote = Source(source)
    remote.breaks_after = 12
    with pytest.raises(ConnectionResetError):
        await write_slice(plan, remote, target)
    part = target.with_name("slice.gguf.part")
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(b"\xee" * 64)
    remote.breaks_after = -1
    await write_slice(plan, remote, target)
    assert target.read_bytes() == expected(plan, source)


async def test_the_rest_of_another_slice_is_not_mixed_in(source, tmp_path):
    target = tmp_path / "slice.gguf"
    remote = Source(source)
    remote.breaks_after = 8
    with pytest.raises(ConnectionResetError):
        await write_slice(plan_of(source, 0, 3), remote, target)
    remote.breaks_after = -1
    plan = plan_of(source, 1, 3)
    await write_slice(plan, remote, target)
    assert target.read_bytes() == expected(plan, source)


async def test_a_damaged_tensor_is_refused_and_fetched_again(source, tmp_path):
    plan, target = plan_of(source, 2, 4), tmp_path / "slice.gguf"
    digests = tensor_digests(source, read_header(source))
    bad = next(tensor for tensor in plan.tensors if tensor.source_name == "blk.3.ffn_up.weight")
    assert bad.source is not None
    assert bad.size > slice_file.CHUNK
    remote = Source(source)
    remote.data[bad.source + 5] ^= 1
    with pytest.raises(ModelUnusable, match=r"blk\.3\.ffn_up\.weight came damaged"):
        await write_slice(plan, remote, target, digests=digests)
    assert not target.exists()
    remote.data[bad.source + 5] ^= 1
    fetched = await write_slice(plan, remote, target, digests=digests)
    assert target.read_bytes() == expected(plan, source)
    assert fetched < plan.fetch_bytes / 2


async def test_a_source_that_gives_too_little_is_refused(source, tmp_path):
    remote = Source(source)
    del remote.data[-100:]
    with pytest.raises(ModelUnusable, match="the source gave"):
        await write_slice(plan_of(source, 4, 6), remote, tmp_path / "slice.gguf")


async def test_a_directory_that_cannot_be_written_is_an_error_with_words(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnusable, match="cannot write"):
        await write_slice(plan_of(source, 4, 6), file_reader(source), tmp_path / "file" / "slice.gguf")


async def test_a_kept_slice_is_not_fetched_again(source, tmp_path):
    remote, plan = Source(source), plan_of(source, 2, 4)
    async with SliceCache(tmp_path / "slices", 1 << 30).use(DIGEST, plan, remote) as path:
        assert path.read_bytes() == expected(plan, source)
    count = len(remote.reads)
    cache = SliceCache(tmp_path / "slices", 1 << 30)
    (entry,) = cache.entries()
    assert (entry.digest, entry.first, entry.last, entry.path) == (DIGEST, 2, 4, path)
    assert cache.find(f"sha256:{DIGEST}", 2, 4) == entry
    assert cache.find(DIGEST, 0, 2) is None
    async with cache.use(f"sha256:{DIGEST}", plan, remote) as again:
        assert again == path
    assert len(remote.reads) == count


async def test_two_users_at_once_fetch_once(source, tmp_path):
    remote, plan = Source(source), plan_of(source, 2, 4)
    cache = SliceCache(tmp_path / "slices", 1 << 30)

    async def use() -> Path:
        async with cache.use(DIGEST, plan, remote) as path:
            return path

    paths = await asyncio.gather(use(), use())
    assert paths[0] == paths[1]
    assert len(remote.reads) == len(set(remote.reads))


async def test_the_longest_unused_slice_goes_first_and_none_in_use(source, tmp_path):
    plans = [plan_of(source, first, first + 1) for first in (1, 2, 3, 4)]
    size = max(plan.stored_bytes for plan in plans)
    cache = SliceCache(tmp_path / "slices", int(3.6 * size))
    remote = Source(source)
    for age, plan in enumerate(plans[:3]):
        async with cache.use(DIGEST, plan, remote) as path:
            pass
        os.utime(path, (1000 + age, 1000 + age))
    async with cache.use(DIGEST, plans[0], remote):  # used again: now the newest
        pass
    async with cache.use(DIGEST, plans[3], remote):
        assert [entry.first for entry in cache.entries()] == [3, 1, 4]
        small = SliceCache(tmp_path / "slices", int(2.5 * size))
        await small.trim()
    assert {entry.first for entry in cache.entries()} == {1, 4}


async def test_a_slice_that_does_not_fit_beside_those_in_use_is_an_error_with_the_numbers(source, tmp_path):
    plans = [plan_of(source, first, first + 1) for first in (1, 2)]
    cache = SliceCache(tmp_path / "slices", int(1.5 * plans[0].stored_bytes))
    remote = Source(source)
    async with cache.use(DIGEST, plans[0], remote) as path:
        with pytest.raises(CapacityError, match="does not fit"):
            async with cache.use(DIGEST, plans[1], remote):
                pass
        assert path.exists()
    async with cache.use(DIGEST, plans[1], remote):
        assert not path.exists()


async def test_unfinished_and_outdated_files_make_room_too(source, tmp_path):
    directory = tmp_path / "slices"
    directory.mkdir()
    plan = plan_of(source, 1, 2)
    old = directory / f"{DIGEST}.0-1.v0.gguf"
    unfinished = directory / f"{DIGEST}.5-6.v1.gguf.part"
    for path in (old, unfinished):
        path.write_bytes(b"x" * plan.stored_bytes)
    (directory / "unrelated.txt").write_text("kept")
    cache = SliceCache(directory, int(1.5 * plan.stored_bytes))
    assert cache.entries() == []
    async with cache.use(DIGEST, plan, Source(source)):
        assert not old.exists()
        assert not unfinished.exists()
    assert (directory / "unrelated.txt").exists()
