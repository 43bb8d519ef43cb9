"""Activation frames: what goes in comes out, and nothing that comes in breaks anything."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine import frame as engine
from osync.engine.frame_codec import from_wire, outcome_from_wire, outcome_to_wire, to_wire
from osync.engine.sampling import SamplingOptions
from osync.errors import FrameTooLarge, OsyncError, WireError
from osync.wire import activation_dtype
from osync.wire.activation import (
    MAX_SEQUENCES,
    SAMPLED,
    Assembler,
    Close,
    Copy,
    Frame,
    Open,
    Outcome,
    Rows,
    Truncate,
    announced_length,
    decode,
    encode,
    pieces,
)
from osync.wire.activation_dtype import Activations, Dtype, byte_count, pack, unpack

numpy = pytest.importorskip("numpy")

sequences = st.integers(0, MAX_SEQUENCES - 1)
token = st.integers(0, (1 << 31) - 1)
lengths = st.integers(0, 1 << 24)
u64 = st.integers(0, (1 << 64) - 1)
operations = st.one_of(
    st.builds(Open, sequences, st.binary(max_size=40), st.lists(token, max_size=8).map(tuple)),
    st.builds(Close, sequences),
    st.builds(Truncate, sequences, lengths),
    st.builds(Copy, sequences, sequences, lengths),
)


@st.composite
def runs(draw: st.DrawFn) -> Rows:
    tokens = tuple(draw(st.lists(token, min_size=1, max_size=6)))
    return Rows(draw(sequences), draw(st.integers(0, 1 << 20)), tokens, draw(st.integers(0, len(tokens))))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    rows = tuple(draw(st.lists(runs(), max_size=4)))
    count = sum(len(run.tokens) for run in rows)
    dtype: Dtype | None = draw(st.sampled_from([None, "f32", "f16", "q8"]))
    activations = None
    if dtype is not None:
        width = draw(st.sampled_from([32, 64]))
        size = byte_count(dtype, width, count)
        activations = Activations(dtype, width, draw(st.binary(min_size=size, max_size=size)))
    return Frame(draw(u64), draw(u64), rows, tuple(draw(st.lists(operations, max_size=4))), activations)


outcomes = st.builds(
    Outcome,
    u64,
    u64,
    st.dictionaries(sequences, st.lists(token, max_size=5).map(tuple), max_size=4),
    st.none() | st.dictionaries(sequences, lengths, max_size=4),
)
ONE = Frame(3, 7, (Rows(2, 40, (11,), 1),), (Truncate(2, 40),), Activations("f32", 2, struct.pack("<2f", 0.5, -1.0)))


def whole(message: Frame | Outcome) -> bytes:
    return b"".join(encode(message))


def resealed(message: bytes | bytearray) -> bytes:
    """The same bytes with a CRC that fits: a liar, not a bad cable."""
    crc = zlib.crc32(message[48:], zlib.crc32(message[:44]))
    return bytes(message[:44]) + crc.to_bytes(4, "little") + bytes(message[48:])


@given(st.one_of(frames(), outcomes))
def test_round_trip(message: Frame | Outcome) -> None:
    assert decode(whole(message)) == message
    assert announced_length(whole(message)) == len(whole(message))


@given(st.one_of(frames(), outcomes), st.data())
def test_every_truncation_is_an_error(message: Frame | Outcome, data: st.DataObject) -> None:
    encoded = whole(message)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(WireError):
        decode(encoded[:cut])
    with pytest.raises(WireError):
        decode(encoded + b"\0")


@given(st.one_of(frames(), outcomes), st.data())
def test_one_flipped_bit_is_an_error(message: Frame | Outcome, data: st.DataObject) -> None:
    encoded = bytearray(whole(message))
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode(bytes(encoded))


@given(st.one_of(frames(), outcomes), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_lies_with_the_right_checksum_are_errors_or_valid(
    message: Frame | Outcome, changes: list[tuple[int, int]]
) -> None:
    encoded = bytearray(whole(message))
    for at, value in changes:
        encoded[at % len(encoded)] = value
    try:
        found = decode(resealed(encoded))
    except OsyncError:
        return
    assert decode(whole(found)) == found


@given(st.binary(max_size=300))
def test_noise_is_an_error(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode(noise)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"GGUF", "starts with"),
        (4, b"\x09", "version 9"),
        (5, b"\x07", "unknown kind"),
        (6, b"\x09", "unknown dtype"),
        (7, b"\x04", "flags"),
        (24, b"\xff\xff\xff\xff", "rows of 4294967295"),
        (28, b"\xff\xff\xff\xff", "announces"),
        (32, b"\xff\xff\xff\xff", "announces"),
        (36, b"\xff\xff\xff\xff", "announces"),
        (40, b"\xff\xff\xff\xff", "announces"),
        (48, b"\x09", "unknown operation"),
        (52, b"\xff\xff", "impossible Truncate"),
        (64, b"\xff\xff", "impossible rows"),
        (72, b"\x02", "do not have 1 rows"),
        (76, b"\x02", "impossible rows"),
        (80, b"\xfe\xff\xff\xff", "impossible rows"),
    ],
)
def test_what_is_wrong_is_said(at: int, value: bytes, says: str) -> None:
    encoded = bytearray(whole(ONE))
    encoded[at : at + len(value)] = value
    with pytest.raises(WireError, match=says):
        decode(resealed(encoded))


def test_an_open_cannot_claim_more_than_there_is() -> None:
    encoded = bytearray(whole(Frame(1, 1, operations=(Open(0, b"abcd", (1, 2)),))))
    for offset in (8, 12):  # bytes of options, tokens of history
        lie = bytearray(encoded)
        struct.pack_into("<I", lie, 48 + offset, 0xFFFFFFFF)
        with pytest.raises(WireError, match="longer than the operations"):
            decode(resealed(lie))


@pytest.mark.parametrize(
    "frame",
    [
        Frame(-1, 0),
        Frame(1, 1 << 64),
        Frame(1, 1, (Rows(0, 0, ()),)),
        Frame(1, 1, (Rows(0, 0, (1 << 31,)),)),
        Frame(1, 1, (Rows(0, 0, (1,), 2),)),
        Frame(1, 1, (Rows(MAX_SEQUENCES, 0, (1,)),)),
        Frame(1, 1, operations=(Copy(0, -1, 1),)),
        Frame(1, 1, (Rows(0, 0, (1,)),), (), Activations("f32", 4, bytes(12))),
        Frame(1, 1, (Rows(0, 0, (1,)),), (), Activations("q8", 33, bytes(35))),
        Outcome(1, 1, {0: (-1,)}),
    ],
)
def test_what_cannot_be_said_is_not_encoded(frame: Frame | Outcome) -> None:
    with pytest.raises(WireError):
        encode(frame)


def test_activations_are_not_copied() -> None:
    values = bytearray(struct.pack("<2f", 0.5, -1.0))
    message = Frame(3, 7, ONE.rows, (), Activations("f32", 2, values))
    _, data = encode(message)
    assert isinstance(data, memoryview)
    assert data.obj is values
    encoded = whole(message)
    found = decode(encoded)
    assert isinstance(found, Frame)
    assert found.activations is not None
    assert isinstance(found.activations.data, memoryview)
    assert found.activations.data.obj is encoded


@given(frames(), st.integers(1, 200))
def test_pieces_make_the_whole_again(frame: Frame, limit: int) -> None:
    cut = list(pieces(encode(frame), limit))
    assert all(len(piece) <= limit for piece in cut)
    assert b"".join(cut) == whole(frame)
    if len(cut[0]) >= 48 or len(cut) == 1:
        assembler = Assembler()
        for _ in range(2):
            found = [assembler.add(piece, piece is cut[-1]) for piece in cut]
            assert found[:-1] == [None] * (len(cut) - 1)
            assert found[-1] == whole(frame)


def test_a_large_frame_comes_in_pieces_of_a_mebibyte() -> None:
    rows = tuple(Rows(0, at, (5,)) for at in range(300))
    frame = Frame(1, 1, rows, (), Activations("f32", 1024, bytes(300 * 4096)))
    assert [len(piece) for piece in pieces(encode(frame))] == [1 << 20, len(whole(frame)) - (1 << 20)]


@pytest.mark.parametrize(
    ("cut", "error"),
    [
        ([(b"OSYA", False)], WireError),
        ([(whole(ONE), False)], WireError),
        ([(whole(ONE)[:60], False), (b"", False)], WireError),
        ([(whole(ONE)[:60], False), (whole(ONE)[60:] + b"x", True)], WireError),
        ([(whole(ONE)[:40] + b"\xff" * 20, False)], FrameTooLarge),
    ],
)
def test_pieces_that_lie_end_at_once(cut: list[tuple[bytes, bool]], error: type[Exception]) -> None:
    assembler = Assembler()
    *early, (piece, end) = cut
    for part, last in early:
        assert assembler.add(part, last) is None
    with pytest.raises(error):
        assembler.add(piece, end)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64))
def test_dtypes_lose_no_more_than_they_must(values: list[float]) -> None:
    raw = struct.pack("<64f", *values)
    assert unpack(pack(raw, 64, "f32")) == raw
    half = struct.unpack("<64f", unpack(pack(raw, 64, "f16")))
    for before, after in zip(values, half, strict=True):
        assert math.isclose(before, after, rel_tol=1e-3, abs_tol=1e-7)
    packed = pack(raw, 64, "q8")
    assert len(packed.data) == byte_count("q8", 64, 1) == 68
    eighth = struct.unpack("<64f", unpack(packed))
    for block in (0, 32):
        largest = max(map(abs, values[block : block + 32]))
        for before, after in zip(values[block : block + 32], eighth[block : block + 32], strict=True):
            assert abs(before - after) <= largest / 127 * 0.6 + 1e-5


def test_numbers_that_do_not_fit_become_the_largest() -> None:
    values = [1e9, -1e9, math.inf, *[0.0] * 29]
    raw = struct.pack("<32f", *values)
    assert struct.unpack("<32f", unpack(pack(raw, 32, "f16")))[:3] == (65504, -65504, 65504)
    eighth = struct.unpack("<32f", unpack(pack(struct.pack("<32f", math.nan, *values[1:]), 32, "q8")))
    assert eighth[:3] == (0, -65504 * 127, 65504 * 127)


def test_only_f32_goes_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    assert activation_dtype.pack(bytes(128), 32, "f32").data == bytes(128)
    with pytest.raises(OsyncError, match="numpy"):
        pack(bytes(128), 32, "f16")


def test_the_engines_frames_survive() -> None:
    options = SamplingOptions(seed=7, temperature=0.0, stop=("\n", "ü"), repeat_penalty=1.25)
    frame = engine.Frame(
        (engine.Rows(1, 9, (4, 5), 1),),
        (engine.Open(1, options, (3, 3)), engine.Close(2), engine.Truncate(1, 4), engine.Copy(1, 2, 3)),
    )
    message = decode(whole(to_wire(frame, 5, 6)))
    assert isinstance(message, Frame)
    assert (message.epoch, message.number) == (5, 6)
    assert from_wire(message) == frame
    outcome = engine.Outcome({1: (4, 5)}, {1: 3})
    back = decode(whole(outcome_to_wire(outcome, 5, 6)))
    assert isinstance(back, Outcome)
    assert outcome_from_wire(back) == outcome


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b'{"new": 1}', b'{"top_k": "1"}', b'{"top_k": true}', b'{"stop": [1]}', b'{"temperature": null}'],
)
def test_sampling_options_of_others_are_checked(text: bytes) -> None:
    with pytest.raises(WireError):
        from_wire(Frame(1, 1, operations=(Open(0, text),)))


@given(frames(), st.text(min_size=1, max_size=200), st.dictionaries(sequences, lengths, max_size=4))
def test_a_frame_that_came_to_nothing_says_why(frame: Frame, error: str, undone: dict[int, int]) -> None:
    bare = replace(frame, activations=None)
    assert decode(whole(replace(bare, error=error))) == replace(bare, error=error)
    assert decode(whole(replace(bare, undone=undone))) == replace(bare, undone=undone)


@given(u64, u64, st.text(min_size=1, max_size=200))
def test_an_outcome_tells_its_error(epoch: int, number: int, error: str) -> None:
    outcome = Outcome(epoch, number, {}, None, error)
    assert decode(whole(outcome)) == outcome


def test_the_first_token_of_a_run_may_be_the_one_sampled_last() -> None:
    frame = Frame(1, 1, (Rows(3, 9, (SAMPLED,), 1), Rows(4, 2, (SAMPLED, 5, 6), 3)))
    assert decode(whole(frame)) == frame
    with pytest.raises(WireError, match="impossible rows"):
        encode(Frame(1, 1, (Rows(3, 9, (5, SAMPLED), 1),)))
