"""Frames between the stages of a pipeline, and the outcomes that come back: bytes with a fixed, checked header.

A frame is: header, operations, heads of runs of rows, token ids, activations. All little-endian, every part a
multiple of 4 bytes long, so that f32 activations can be read where they lie. The CRC-32 covers everything but itself.

    offset  0  magic "OSYA"     4  version        5  kind (1 frame, 2 outcome)
            6  dtype            7  flags          8  epoch (u64)            16  number (u64)
           24  width            28  rows          32  runs                  36  bytes of operations
           40  bytes of activations               44  CRC-32

In an outcome, `rows` counts the sampled tokens, `runs` the sequences that they belong to, `width` the sequences undone.
A frame that came to nothing at some stage carries why in place of activations: flag 2, an error's text; flag 1, the
lengths of the sequences that were undone. An outcome tells its error in the same way.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from osync.errors import FrameTooLarge, WireError
from osync.wire.activation_dtype import CODES, DTYPES, Activations, Buffer, byte_count

MAGIC: Final = b"OSYA"
VERSION: Final = 1
MAX_FRAME: Final = 64 << 20
PIECE: Final = 1 << 20
"""Frames go over the network in pieces of so many bytes."""
MAX_ROWS: Final = 1 << 16
MAX_WIDTH: Final = 1 << 16
MAX_SEQUENCES: Final = 1 << 12
MAX_ERROR: Final = 4096
MAX_TOKENS: Final = 1 << 24
"""Of a sequence, and of the history that an Open carries."""
_FRAME, _OUTCOME = 1, 2
_UNDONE, _FAILED = 1, 2
SAMPLED: Final = -1
"""In place of a run's first token: the one that was sampled last for its sequence. Only the first stage sees it."""
_HEADER = struct.Struct("<4sBBBBQQIIIIII")
_CHECKED = _HEADER.size - 4
_RUN = struct.Struct("<IIII")
_PAIR = struct.Struct("<II")
_OPERATION = struct.Struct("<IIII")
_OPEN, _CLOSE, _TRUNCATE, _COPY = 1, 2, 3, 4
_INT31: Final = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Open:
    """A sequence starts. `sampling` is the engine's own text for its options; nothing here reads it."""

    sequence: int
    sampling: bytes = b""
    history: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """A sequence ended."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep only the first `length` tokens of a sequence."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Make the first `length` tokens of `source` those of `target`."""

    source: int
    target: int
    length: int


Operation = Open | Close | Truncate | Copy


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence; the first is at `position`, the last `sample` rows are sampled."""

    sequence: int
    position: int
    tokens: tuple[int, ...]
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One evaluation of one stage. `activations` has a row per token of `rows`, in order; a first stage gets none."""

    epoch: int
    number: int
    rows: tuple[Rows, ...] = ()
    operations: tuple[Operation, ...] = ()
    activations: Activations | None = None
    error: str = ""
    """A stage before could not evaluate it: nobody does any more."""
    undone: Mapping[int, int] | None = None
    """A stage before undid its rows: only its operations are applied."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the last stage gave for the frame of this number: token ids by sequence; `undone` as in the engine's."""

    epoch: int
    number: int
    sampled: Mapping[int, tuple[int, ...]]
    undone: Mapping[int, int] | None = None
    error: str = ""
    """A stage could not evaluate the frame."""


def encode(message: Frame | Outcome) -> list[Buffer]:
    """Return a message as buffers to be sent one after the other; activations are not copied.

    Raises WireError where a number is out of its range, FrameTooLarge where all is over the bound.
    """
    try:
        buffers = _encode_frame(message) if isinstance(message, Frame) else _encode_outcome(message)
    except struct.error as error:
        raise WireError(f"activation frame: a number is out of range: {error}") from None
    if sum(map(len, buffers)) > MAX_FRAME:
        raise FrameTooLarge(f"activation frame of {sum(map(len, buffers))} bytes is over {MAX_FRAME}")
    return buffers


def pieces(buffers: Sequence[Buffer], limit: int = PIECE) -> Iterator[bytes]:
    """Yield what `encode` gave in pieces of `limit` bytes at most: each byte is copied once. Never yields nothing."""
    total = sum(map(len, buffers))
    if total <= limit:
        yield b"".join(buffers)
        return
    held: list[Buffer] = []
    room = limit
    for buffer in buffers:
        view, at = memoryview(buffer).cast("B"), 0
        while at < len(view):
            part = view[at : at + room]
            held.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield b"".join(held)
                held, room = [], limit
    if held:
        yield b"".join(held)


class Assembler:
    """Puts the pieces of one stream together. Holds what came, never what a header merely announces."""

    __slots__ = ("_announced", "_held", "_limit", "_pieces")

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0
        self._announced = 0

    def add(self, piece: bytes, end: bool) -> bytes | None:
        """Return the whole message with its last piece, else None.

        Raises FrameTooLarge and WireError as soon as pieces are more than the first one announces, or than the bound.
        """
        if not self._pieces:
            if end:
                return piece
            if len(piece) < _HEADER.size:
                raise WireError("activation frame: the first piece is shorter than the header")
            self._announced = announced_length(piece)
            if self._announced > self._limit:
                raise FrameTooLarge(f"activation frame announces {self._announced} bytes, over {self._limit}")
        if not piece:
            raise WireError("activation frame: an empty piece")
        self._pieces.append(piece)
        self._held += len(piece)
        if self._held > self._announced or (not end and self._held == self._announced):
            raise WireError(f"activation frame: more than the {self._announced} bytes that its header announces")
        if not end:
            return None
        whole = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        return whole


def announced_length(message: Buffer) -> int:
    """Return how long a message says it is, header included. Raises WireError where it is none of ours."""
    if len(message) < _HEADER.size:
        raise WireError(f"activation frame: {len(message)} bytes are fewer than a header's {_HEADER.size}")
    magic, version, kind, _, _, _, _, width, rows, runs, operations, data, _ = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise WireError(f"activation frame: starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"activation frame: version {version}, this build speaks {VERSION}: update the older daemon")
    if kind == _FRAME:
        return int(_HEADER.size + operations + runs * _RUN.size + rows * 4 + data)
    if kind == _OUTCOME:
        return int(_HEADER.size + runs * _PAIR.size + rows * 4 + width * _PAIR.size + data)
    raise WireError(f"activation frame: unknown kind {kind}")


def decode(message: Buffer) -> Frame | Outcome:
    """Read one message; activations stay a view of it. Raises WireError for everything that is not as it should be."""
    if (length := announced_length(message)) != len(message):
        raise WireError(f"activation frame: announces {length} bytes and has {len(message)}")
    if length > MAX_FRAME:
        raise FrameTooLarge(f"activation frame of {length} bytes is over {MAX_FRAME}")
    view = memoryview(message).cast("B").toreadonly()
    *_, crc = _HEADER.unpack_from(view)
    if zlib.crc32(view[_HEADER.size :], zlib.crc32(view[:_CHECKED])) != crc:
        raise WireError("activation frame: damaged on its way (CRC-32)")
    try:
        return _decode_frame(view) if view[5] == _FRAME else _decode_outcome(view)
    except struct.error as error:
        raise WireError(f"activation frame: cut off: {error}") from None


def _encode_frame(frame: Frame) -> list[Buffer]:
    operations = b"".join(map(_encode_operation, frame.operations))
    rows = frame.rows
    for run in rows:
        _check_run(run)
    tokens = rows[0].tokens if len(rows) == 1 else list(chain.from_iterable(run.tokens for run in rows))
    count = len(tokens)
    heads = b"".join([_RUN.pack(run.sequence, run.position, len(run.tokens), run.sample) for run in rows])
    activations = frame.activations
    code = width = 0
    data: Buffer = b""
    flags = 0
    if frame.error:
        flags, data = _FAILED, frame.error.encode()[:MAX_ERROR]
    elif frame.undone is not None:
        flags, data = _UNDONE, b"".join([_PAIR.pack(*pair) for pair in frame.undone.items()])
    elif activations is not None:
        code, width, data = CODES[activations.dtype], activations.width, memoryview(activations.data).cast("B")
        _check_activations(activations.dtype, width, count, len(data))
    if count > MAX_ROWS:
        raise FrameTooLarge(f"activation frame: {count} rows are over {MAX_ROWS}")
    body = b"".join((operations, heads, struct.pack(f"<{count}i", *tokens)))
    checked = (MAGIC, VERSION, _FRAME, code, flags, frame.epoch, frame.number, width, count, len(rows), len(operations),
               len(data))  # fmt: skip
    head = _seal(checked, body, data)
    return [head, data] if len(data) else [head]


def _encode_outcome(outcome: Outcome) -> list[Buffer]:
    sampled, undone = outcome.sampled, outcome.undone or {}
    tokens = list(chain.from_iterable(sampled.values()))
    if tokens and min(tokens) < 0:
        raise WireError("activation frame: a token id is negative")
    body = b"".join(
        (
            *[_PAIR.pack(sequence, len(ids)) for sequence, ids in sampled.items()],
            struct.pack(f"<{len(tokens)}i", *tokens),
            *[_PAIR.pack(sequence, length) for sequence, length in undone.items()],
        )
    )
    flags = (0 if outcome.undone is None else _UNDONE) | (_FAILED if outcome.error else 0)
    data = outcome.error.encode()[:MAX_ERROR]
    checked = (MAGIC, VERSION, _OUTCOME, 0, flags, outcome.epoch, outcome.number, len(undone), len(tokens),
               len(sampled), 0, len(data))  # fmt: skip
    return [_seal(checked, body, data), data] if data else [_seal(checked, body, b"")]


def _seal(checked: tuple[object, ...], body: bytes, data: Buffer) -> bytes:
    header = _HEADER.pack(*checked, 0)[:_CHECKED]
    crc = zlib.crc32(data, zlib.crc32(body, zlib.crc32(header)))
    return b"".join((header, crc.to_bytes(4, "little"), body))


def _encode_operation(operation: Operation) -> bytes:
    match operation:
        case Close(sequence):
            packed = _OPERATION.pack(_CLOSE, sequence, 0, 0)
        case Truncate(sequence, length):
            packed = _OPERATION.pack(_TRUNCATE, sequence, length, 0)
        case Copy(source, target, length):
            packed = _OPERATION.pack(_COPY, source, target, length)
        case Open(sequence, sampling, history):
            padding = bytes(-len(sampling) % 4)
            head = _OPERATION.pack(_OPEN, sequence, len(sampling), len(history))
            packed = b"".join((head, sampling, padding, struct.pack(f"<{len(history)}i", *history)))
    _check_operation(operation)
    return packed


def _decode_frame(view: memoryview) -> Frame:
    _, _, _, code, flags, epoch, number, width, count, runs, operations_size, data_size, _ = _HEADER.unpack_from(view)
    if code >= len(DTYPES) or flags not in (0, _UNDONE, _FAILED):
        raise WireError(f"activation frame: unknown dtype {code} or flags {flags:#x}")
    if count > MAX_ROWS or runs > count or operations_size % 4:
        raise WireError(f"activation frame: {runs} runs of {count} rows, {operations_size} bytes of operations")
    at = _HEADER.size + operations_size
    operations = _decode_operations(view[_HEADER.size : at])
    tokens_at = at + runs * _RUN.size
    tokens = struct.unpack_from(f"<{count}i", view, tokens_at)
    rows, used = [], 0
    for sequence, position, length, sample in _RUN.iter_unpack(view[at:tokens_at]):
        run = Rows(sequence, position, tokens[used : used + length], sample)
        used += length
        if used > count:
            break
        _check_run(run)
        rows.append(run)
    if used != count:
        raise WireError(f"activation frame: the runs do not have {count} rows together")
    data = view[tokens_at + count * 4 :]
    dtype = DTYPES[code]
    if dtype is not None and not flags:
        _check_activations(dtype, width, count, data_size)
        return Frame(epoch, number, tuple(rows), operations, Activations(dtype, width, data))
    if width or code or (data_size and not flags):
        raise WireError("activation frame: activations without a dtype, or beside an error")
    error = _text(data) if flags == _FAILED else ""
    undone = dict(_PAIR.iter_unpack(data)) if flags == _UNDONE else None
    return Frame(epoch, number, tuple(rows), operations, None, error, undone)


def _decode_operations(view: memoryview) -> tuple[Operation, ...]:
    found: list[Operation] = []
    at = 0
    while at < len(view):
        tag, first, second, third = _OPERATION.unpack_from(view, at)
        at += _OPERATION.size
        operation: Operation
        if tag == _CLOSE:
            operation = Close(first)
        elif tag == _TRUNCATE:
            operation = Truncate(first, second)
        elif tag == _COPY:
            operation = Copy(first, second, third)
        elif tag == _OPEN:
            history_at = at + second + -second % 4
            if history_at + third * 4 > len(view):
                raise WireError("activation frame: an Open is longer than the operations")
            history = struct.unpack_from(f"<{third}i", view, history_at)
            operation = Open(first, bytes(view[at : at + second]), history)
            at = history_at + third * 4
        else:
            raise WireError(f"activation frame: unknown operation {tag}")
        _check_operation(operation)
        found.append(operation)
    return tuple(found)


def _decode_outcome(view: memoryview) -> Outcome:
    _, _, _, code, flags, epoch, number, undone_count, count, runs, operations, data, _ = _HEADER.unpack_from(view)
    if code or flags & ~(_UNDONE | _FAILED) or operations or (undone_count and not flags & _UNDONE):
        raise WireError("activation frame: an outcome with parts that only frames have")
    tokens_at = _HEADER.size + runs * _PAIR.size
    undone_at = tokens_at + count * 4
    error_at = len(view) - data
    tokens = struct.unpack_from(f"<{count}i", view, tokens_at)
    if count and min(tokens) < 0:
        raise WireError("activation frame: a token id is negative")
    sampled, used = {}, 0
    for sequence, length in _PAIR.iter_unpack(view[_HEADER.size : tokens_at]):
        sampled[sequence] = tokens[used : used + length]
        used += length
    undone = dict(_PAIR.iter_unpack(view[undone_at:error_at]))
    if used != count or len(sampled) != runs or len(undone) != undone_count:
        raise WireError("activation frame: an outcome's counts contradict each other")
    error = _text(view[error_at:]) if flags & _FAILED else ""
    return Outcome(epoch, number, sampled, undone if flags & _UNDONE else None, error)


def _text(data: memoryview) -> str:
    if not 0 < len(data) <= MAX_ERROR:
        raise WireError(f"activation frame: an error of {len(data)} bytes")
    return bytes(data).decode("utf-8", "replace")


def _check_run(run: Rows) -> None:
    length = len(run.tokens)
    if not (0 <= run.sequence < MAX_SEQUENCES and length > 0 and 0 <= run.sample <= length
            and 0 <= run.position <= MAX_TOKENS - length
            and run.tokens[0] >= SAMPLED and min(run.tokens[1:], default=0) >= 0):  # fmt: skip
        raise WireError(f"activation frame: impossible rows of sequence {run.sequence} at position {run.position}")


def _check_operation(operation: Operation) -> None:
    length = 0
    match operation:
        case Copy(source, target, length):
            sequences = (source, target)
        case Truncate(sequence, length):
            sequences = (sequence, 0)
        case Open(sequence, _, history):
            sequences, length = (sequence, 0), len(history)
            if history and min(history) < 0:
                raise WireError("activation frame: a token id of a history is negative")
        case Close(sequence):
            sequences = (sequence, 0)
    if not (min(sequences) >= 0 and max(sequences) < MAX_SEQUENCES and 0 <= length <= MAX_TOKENS):
        raise WireError(f"activation frame: impossible {type(operation).__name__}, sequence or length out of range")


def _check_activations(dtype: str, width: int, count: int, size: int) -> None:
    if not 0 < width <= MAX_WIDTH:
        raise WireError(f"activation frame: rows of {width} numbers")
    if byte_count(dtype, width, count) != size:
        raise WireError(f"activation frame: {size} bytes are not {count} rows of {width} numbers in {dtype}")
