"""Lines out of arbitrary cuts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.errors import FrameTooLarge
from osync.wire.ndjson import LineSplitter, error_of, format_line

LINE = st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b and b == b.strip(b" \t\r") and b)


@given(st.lists(LINE, max_size=8), st.lists(st.integers(1, 60), max_size=20), st.booleans())
def test_lines_come_out_whole_however_they_are_cut(lines: list[bytes], cuts: list[int], ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    splitter = LineSplitter()
    found: list[bytes] = []
    for size in cuts:
        found += splitter.feed(data[:size])
        data = data[size:]
    found += splitter.feed(data)
    if last := splitter.finish():
        found.append(last)
    assert found == lines


def test_blank_lines_and_carriage_returns_are_left_out() -> None:
    assert list(LineSplitter().feed(b'\n{"a":1}\r\n  \n\n{"b":2}\n')) == [b'{"a":1}', b'{"b":2}']


@pytest.mark.parametrize("pieces", [[b"x" * 11], [b"x" * 6, b"x" * 6], [b"ok\n" + b"x" * 11 + b"\n"]])
def test_a_line_over_the_bound_is_refused(pieces: list[bytes]) -> None:
    splitter = LineSplitter(limit=10)
    with pytest.raises(FrameTooLarge):
        for piece in pieces:
            list(splitter.feed(piece))


def test_a_line_at_the_bound_is_taken() -> None:
    assert list(LineSplitter(limit=10).feed(b"x" * 10 + b"\n")) == [b"x" * 10]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"error":"gone"}', "gone"),
        (b'{"status":"pulling manifest"}', ""),
        (b'{"status":"error"}', ""),
        (b'{"error":{"a":1}}', ""),
        (b'"error"', ""),
        (b'{"error"', ""),
    ],
)
def test_errors_are_found(line: bytes, text: str) -> None:
    assert error_of(line) == text


def test_a_formatted_line_ends_with_its_newline() -> None:
    assert format_line({"status": "success"}) == b'{"status":"success"}\n'
