"""A slice: the part of a GGUF model that one stage needs, as a GGUF file of its own. Pure.

Stages that are not last read the residual stream after their last layer, stages that are not first are fed it; neither
needs a vocabulary, so they get one of 32 words that nobody looks up. The embedding of tokens lies behind the first
stage's tensors, where llama.cpp does not see it (`osync.embedding.*` says where): as a tensor of the model it would
have llama.cpp keep room for a row of logits as wide as the vocabulary for every token of a prompt.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from osync.core.stages import SlicePiece as Piece
from osync.engine.cutting import BLOCK, cut_rules, is_of_stage, stage_period, window_period
from osync.engine.gguf import TENSOR_TYPES, GGUFHeader, TensorInfo
from osync.errors import BadRequest, NotSupported

WORDS = 32
"""Of a stage without vocabulary; llama.cpp wants some."""
EMBEDDING = "token_embd.weight"
_U32, _STRING, _U64, _ARRAY = 4, 8, 10, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
_KINDS = {label: kind for kind, (label, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class SliceTensor:
    """One tensor of a slice; offsets from the start of the files."""

    name: str
    source_name: str
    """"" where it is made up."""
    source: int | None
    offset: int
    size: int


@dataclass(frozen=True)
class SlicePlan:
    """How to write the slice of layers [first, last) of a model with `layers` layers."""

    first: int
    last: int
    layers: int
    pieces: tuple[Piece, ...]
    """In order, the whole file."""
    tensors: tuple[SliceTensor, ...]

    @cached_property
    def size_bytes(self) -> int:
        """The length of the slice's file."""
        return sum(piece.size for piece in self.pieces)

    @cached_property
    def stored_bytes(self) -> int:
        """What the file takes on disk where holes take nothing."""
        return sum(piece.size for piece in self.pieces if piece.source is not None or piece.data)

    @cached_property
    def fetch_bytes(self) -> int:
        """Bytes of the source's tensors that it takes."""
        return sum(tensor.size for tensor in self.tensors if tensor.source is not None)

    @cached_property
    def fingerprint(self) -> str:
        """The same for plans that write the same bytes from the same source, and for no others."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(b"%d %d %d;" % (piece.size, -1 if piece.source is None else piece.source, len(piece.data)))
            digest.update(piece.data)
        return digest.hexdigest()


def plan_slice(header: GGUFHeader, first: int, last: int) -> SlicePlan:
    """Plan the slice of layers [first, last). Raises BadRequest for layers that are not there, NotSupported
    where the model cannot be cut so."""
    count = header.block_count
    if not 0 <= first < last <= count:
        raise BadRequest(f"layers {first} to {last} of {count} do not exist")
    if (first, last) == (0, count):
        return _whole(header)
    rules = cut_rules(header)
    if not rules.allows(first, last):
        raise NotSupported(f"layers {first} to {last} of the model cannot be a stage: {rules.reason}")
    tensors = list(_tensors(header, first, last))
    embedding = next(t for t in header.tensors if t.name == EMBEDDING) if first == 0 else None
    extra = {"slice.first": (_U32, first), "slice.last": (_U32, last), "slice.layers": (_U32, count)}
    if embedding is not None:
        kind, rows = _KINDS[embedding.type], embedding.shape[1]
        extra |= {"embedding.offset": (_U64, 0), "embedding.type": (_U32, kind), "embedding.rows": (_U32, rows)}
    keys = list(_keys(header, first, last))
    infos, data_size = _infos(tensors, header.alignment)
    for _ in range(2):  # where the embedding lies is known once the header is written; its length stays the same
        added = [Piece(len(raw), data=raw) for raw in (_key(f"osync.{name}", *pair) for name, pair in extra.items())]
        start = b"GGUF" + struct.pack("<IQQ", header.version, len(tensors), len(keys) + len(added))
        head = [Piece(len(start), data=start), *(piece for key in keys for piece in key), *added]
        head.append(Piece(len(infos), data=infos))
        size = sum(piece.size for piece in head)
        head += _padding(size, header.alignment)
        begin = _up(size, header.alignment)
        if embedding is not None:
            extra["embedding.offset"] = (_U64, begin + data_size)
    pieces, placed, at = head, [], begin
    for name, shape, label, made in tensors:
        source = made if isinstance(made, TensorInfo) else None
        length = _size(shape, label)
        if isinstance(made, TensorInfo):
            pieces.append(Piece(length, source=made.offset, tensor=made.name))
        else:
            pieces.append(Piece(length, data=made))
        placed.append(SliceTensor(name, source.name if source else "", source.offset if source else None, at, length))
        pieces += _padding(length, header.alignment)
        at += _up(length, header.alignment)
    if embedding is not None:
        pieces.append(Piece(embedding.size_bytes, source=embedding.offset, tensor=EMBEDDING))
        placed.append(SliceTensor("", EMBEDDING, embedding.offset, at, embedding.size_bytes))
    return SlicePlan(first, last, count, tuple(pieces), tuple(placed))


def _whole(header: GGUFHeader) -> SlicePlan:
    pieces, placed, at = [], [], 0
    for tensor in sorted(header.tensors, key=lambda t: t.offset):
        if tensor.offset > at:
            pieces.append(Piece(tensor.offset - at, source=at))
        pieces.append(Piece(tensor.size_bytes, source=tensor.offset, tensor=tensor.name))
        placed.append(SliceTensor(tensor.name, tensor.name, tensor.offset, tensor.offset, tensor.size_bytes))
        at = tensor.offset + tensor.size_bytes
    if header.file_size > at:
        pieces.append(Piece(header.file_size - at, source=at))
    return SlicePlan(0, header.block_count, header.block_count, tuple(pieces), tuple(placed))


_Made = tuple[str, tuple[int, ...], str, TensorInfo | bytes]
"""Name, shape, type, and where the bytes come from; b"" stands for zeros."""


def _tensors(header: GGUFHeader, first: int, last: int) -> Iterator[_Made]:
    """Yield the slice's tensors, in the source's order."""
    is_last = last == header.block_count
    names = {tensor.name for tensor in header.tensors}
    is_tied = "output.weight" not in names
    for tensor in header.tensors:
        name, width = tensor.name, tensor.shape[0]
        if is_of_stage(tensor, first, last):
            block = BLOCK.match(name)
            yield (
                (f"blk.{int(block[1]) - first}.{name[block.end() :]}" if block else name),
                tensor.shape,
                tensor.type,
                tensor,
            )
        elif BLOCK.match(name):
            continue
        elif name == EMBEDDING:
            if is_last and is_tied:
                yield name, tensor.shape, tensor.type, tensor
            elif is_last:  # llama.cpp demands it and nobody reads it: of the type that is smallest
                yield name, tensor.shape, "IQ1_S" if width % 256 == 0 else "Q4_0" if width % 32 == 0 else "F16", b""
            else:
                yield name, (width, WORDS), "F32", b""
        elif is_last:
            yield name, tensor.shape, tensor.type, tensor
        elif name == "output_norm.weight":
            yield name, tensor.shape, "F32", struct.pack("<f", 1.0) * math.prod(tensor.shape)
        elif name == "output.weight":
            yield name, (width, WORDS), "F32", b""
        elif name.startswith(("output_norm.", "output.")):
            yield name, (WORDS,) if name.startswith("output.") else tensor.shape, "F32", b""


def _keys(header: GGUFHeader, first: int, last: int) -> Iterator[tuple[Piece, ...]]:
    """Yield the slice's metadata, one key after the other: the source's bytes wherever they stay as they are."""
    arch, count = header.architecture, header.block_count
    is_last = last == count
    for key, value in header.metadata.items():
        entry = header.entries[key]
        if key.startswith(("split.", "osync.")) or (key.startswith("tokenizer.") and not is_last):
            continue
        if key == f"{arch}.block_count":
            yield _made(_key(key, entry.kind, last - first))
        elif key == f"{arch}.leading_dense_block_count" and entry.kind in _FORMS:
            yield _made(_key(key, entry.kind, min(max(header.integer(key) - first, 0), last - first)))
        elif key == f"{arch}.attention.sliding_window_pattern" or (key == f"{arch}.vocab_size" and not is_last):
            continue
        elif (
            isinstance(value, tuple)
            and len(value) == count
            and key.startswith(f"{arch}.")
            and entry.item_kind in _WIDTHS
        ):
            width = _WIDTHS[entry.item_kind]
            raw = _text(key) + struct.pack("<IIQ", _ARRAY, entry.item_kind, last - first)
            items = Piece((last - first) * width, source=entry.value_offset + first * width)
            yield (Piece(len(raw), data=raw), items)
        else:
            yield (Piece(entry.size_bytes, source=entry.offset),)
    if period := window_period(header):
        yield _made(_key(f"{arch}.attention.sliding_window_pattern", _U32, stage_period(period, first, last)))
    if not is_last:
        yield _made(_text("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _text("no_vocab"))
        yield _made(_key(f"{arch}.vocab_size", _U32, WORDS))


def _infos(tensors: list[_Made], alignment: int) -> tuple[bytes, int]:
    """Return the headers of all tensors, and the length of their data with padding."""
    out, at = bytearray(), 0
    for name, shape, label, _ in tensors:
        out += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _KINDS[label], at)
        at += _up(_size(shape, label), alignment)
    return bytes(out), at


def _made(raw: bytes) -> tuple[Piece, ...]:
    return (Piece(len(raw), data=raw),)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _key(key: str, kind: int, value: int) -> bytes:
    form = _FORMS[kind]
    return _text(key) + struct.pack(f"<I{form}", kind, value)


def _size(shape: tuple[int, ...], label: str) -> int:
    _, block, block_bytes = TENSOR_TYPES[_KINDS[label]]
    return math.prod(shape) // block * block_bytes


def _up(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


def _padding(size: int, alignment: int) -> list[Piece]:
    rest = _up(size, alignment) - size
    return [Piece(rest, data=bytes(rest))] if rest else []
