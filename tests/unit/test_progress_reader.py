"""A slow reader of shared progress: bounded, and never behind on what matters."""

from __future__ import annotations

from osync.gateway.progress import MAX_PENDING, Reader


async def _drain(reader: Reader) -> list[bytes]:
    reader.end()
    return [line async for line in reader.lines()]


async def test_a_reader_that_keeps_up_gets_every_line() -> None:
    reader = Reader({"a": b"0"})
    for number in range(1, MAX_PENDING):
        reader.push("a", b"%d" % number)
    assert await _drain(reader) == [b"%d" % number for number in range(MAX_PENDING)]


async def test_a_slow_reader_gets_the_newest_line_of_each_layer() -> None:
    reader = Reader({})
    reader.push("manifest", b"manifest")
    for number in range(10 * MAX_PENDING):
        reader.push(f"layer {number % 3}", b"%d" % number)
    reader.push("success", b"success")
    lines = await _drain(reader)
    assert len(lines) <= MAX_PENDING + 1
    assert lines[0] == b"manifest"
    assert lines[-2:] == [b"%d" % (10 * MAX_PENDING - 1), b"success"]


async def test_many_different_lines_stay_bounded() -> None:
    reader = Reader({})
    for number in range(5 * MAX_PENDING):
        reader.push(str(number), b"x")
    reader.push("success", b"success")
    lines = await _drain(reader)
    assert len(lines) <= MAX_PENDING + 1
    assert lines[-1] == b"success"
