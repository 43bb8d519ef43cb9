"""A bounded reader of GGUF headers: nothing in a file is believed before it is checked.

llama.cpp aborts the process on some malformed files, so whatever it is given goes through here first.
Ranged reads, not a map: a file that shrinks while it is read gives an error instead of a SIGBUS.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from osync.errors import ModelUnusable

Scalar = int | float | bool | str
Read = Callable[[int, int], bytes]
"""Bytes at an offset; fewer than asked only at the end of the file."""

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17  # the largest mixture-of-experts files have a few thousand
MAX_KEY_BYTES = (1 << 16) - 1  # the format's own bound
MAX_STRING_BYTES = 16 << 20  # a chat template is at most some tens of KiB
MAX_HEADER_BYTES = 512 << 20  # 256 k tokens and their merges take about 12 MiB
MAX_ALIGNMENT = 1 << 20
EAGER_ITEMS = 1024  # per-layer arrays are shorter, vocabularies longer
_MAX_TENSOR_NAME = 63  # GGML_MAX_NAME less its NUL
_STEP = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# GGML tensor types: name, elements per block, bytes per block.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType({
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
})  # fmt: skip

# llama_ftype: what `general.file_type` says, as Ollama writes it.
FILE_TYPES: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """A long array left in the file: `read_array` fetches it."""

    item_type: int
    count: int
    offset: int
    size_bytes: int


Value = Scalar | tuple[Scalar, ...] | GGUFArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; `offset` from the start of the file, `shape` innermost first."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a key lies with its value in the file, and its types as the format numbers them."""

    offset: int
    size_bytes: int
    kind: int
    item_kind: int
    """Of an array's items, else -1."""
    value_offset: int
    """Of the value itself; of an array, its first item."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a checked GGUF file says of itself."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    header_bytes: int
    file_size: int
    entries: Mapping[str, Entry] = field(default_factory=lambda: MappingProxyType({}))

    def text(self, key: str, default: str = "") -> str:
        """Return a string value, or the default where it is absent or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else default

    def integer(self, key: str, default: int = 0) -> int:
        """Return an integer value; of a per-layer array, the largest."""
        value = self.metadata.get(key)
        if isinstance(value, tuple):
            value = max((v for v in value if isinstance(v, int)), default=default)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def of_architecture(self, key: str, default: int = 0) -> int:
        """Return the integer `<architecture>.<key>`."""
        return self.integer(f"{self.architecture}.{key}", default)

    @property
    def architecture(self) -> str:
        """The model's architecture, in llama.cpp's name for it."""
        return self.text("general.architecture")

    @property
    def parameter_count(self) -> int:
        """The number of weights: as the file says, else as its tensors add up."""
        return self.integer("general.parameter_count") or sum(math.prod(t.shape) for t in self.tensors)

    @property
    def quantization(self) -> str:
        """Ollama's name of the file type, such as Q4_K_M; without one, the commonest type of the weights."""
        kind = self.metadata.get("general.file_type")
        if isinstance(kind, int) and (kind & ~1024) in FILE_TYPES:  # 1024: guessed from the tensors
            return FILE_TYPES[kind & ~1024]
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size_bytes
        return max(sizes, key=lambda t: sizes[t], default="unknown")

    @property
    def context_length(self) -> int:
        """The context that the model was trained for, 0 if the file does not say."""
        return self.of_architecture("context_length")

    @property
    def embedding_length(self) -> int:
        """The width of the residual stream."""
        return self.of_architecture("embedding_length")

    @property
    def block_count(self) -> int:
        """The number of layers."""
        return self.of_architecture("block_count")

    @property
    def chat_template(self) -> str:
        """The jinja template inside the file, or an empty string."""
        return self.text("tokenizer.chat_template")

    def kv_bytes_per_token(self) -> int:
        """Estimate the KV cache that one token takes over all layers, in f16."""
        heads = self.of_architecture("attention.head_count")
        if not heads:
            return 0
        width = self.embedding_length // heads
        key = self.of_architecture("attention.key_length", width)
        value = self.of_architecture("attention.value_length", width)
        per_layer = self.metadata.get(f"{self.architecture}.attention.head_count_kv")
        if isinstance(per_layer, tuple):
            kv_heads = sum(v for v in per_layer if isinstance(v, int))
        else:
            kv_heads = (per_layer if isinstance(per_layer, int) else heads) * self.block_count
        return kv_heads * (key + value) * 2


class _Cursor:
    """Reads the header forward, buffered and bounded."""

    def __init__(self, read: Read, size: int, what: str) -> None:
        self._read = read
        self._size = size
        self._what = what
        self._buffer = b""
        self._base = 0
        self.position = 0

    def fault(self, text: str) -> ModelUnusable:
        return ModelUnusable(f"{self._what}: {text}")

    def need(self, count: int) -> int:
        """Make `count` bytes available; returns their place in the buffer."""
        end = self.position + count
        if end > self._size:
            raise self.fault("the file is truncated: its header goes on beyond its end")
        if end > MAX_HEADER_BYTES:
            raise self.fault(f"the header is over {MAX_HEADER_BYTES >> 20} MiB")
        if not (self._base <= self.position and end <= self._base + len(self._buffer)):
            self._buffer = self._read(self.position, min(max(count, _STEP), self._size - self.position))
            self._base = self.position
            if len(self._buffer) < count:
                raise self.fault("the file is truncated: it became shorter while it was read")
        return self.position - self._base

    def scalar(self, code: str) -> int | float | bool:
        at = self.need(struct.calcsize("<" + code))
        (value,) = struct.unpack_from("<" + code, self._buffer, at)
        self.position += struct.calcsize("<" + code)
        return value  # type: ignore[no-any-return]

    def unsigned(self, code: str) -> int:
        return int(self.scalar(code))

    def strings(self, count: int) -> tuple[str, ...]:
        """Read `count` strings; tight, as a vocabulary is 100,000 of them and this holds the interpreter."""
        items: list[str] = []
        unpack, width = struct.Struct("<Q").unpack_from, 8
        while len(items) < count:
            buffer, at, end = self._buffer, self.position - self._base, len(self._buffer)
            while len(items) < count and 0 <= at <= end - width:
                (length,) = unpack(buffer, at)
                if length > end - at - width or length > MAX_STRING_BYTES:
                    break
                items.append(buffer[at + width : at + width + length].decode(errors="replace"))
                at += width + length
            self.position = self._base + at
            if len(items) < count:  # on the buffer's edge: this one fills it again, or says what is wrong
                items.append(self.data(MAX_STRING_BYTES, "a string").decode(errors="replace"))
        return tuple(items)

    def data(self, limit: int, name: str) -> bytes:
        length = self.unsigned("Q")
        if length > limit:
            raise self.fault(f"{name} is {length} bytes long, over {limit}")
        at = self.need(length)
        self.position += length
        return self._buffer[at : at + length]

    def numbers(self, code: str, count: int) -> tuple[Scalar, ...]:
        size = struct.calcsize("<" + code) * count
        at = self.need(size)
        self.position += size
        return struct.unpack_from(f"<{count}{code}", self._buffer, at)

    def skip(self, count: int) -> None:
        if self.position + count > self._size:
            raise self.fault("the file is truncated: its header goes on beyond its end")
        self.position += count

    def kinds(self) -> tuple[int, int]:
        """Return the type of the value that comes next, and of its items if it is an array, else -1."""
        at = self.need(4)
        kind = int.from_bytes(self._buffer[at : at + 4], "little")
        if kind != _ARRAY:
            return kind, -1
        at = self.need(8) + 4
        return kind, int.from_bytes(self._buffer[at : at + 4], "little")

    def skip_strings(self, count: int, name: str) -> None:
        """Pass over strings without keeping them; tight, because vocabularies are long."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at = self.position - self._base
            if at < 0 or at + 8 > len(self._buffer):
                at = self.need(8)
            (length,) = unpack(self._buffer, at)
            if length > MAX_STRING_BYTES:
                raise self.fault(f"a string of {name} is {length} bytes long, over {MAX_STRING_BYTES}")
            self.position += 8 + length
        self.need(0)


def read_header(path: Path) -> GGUFHeader:
    """Read and check a file's header. Raises ModelUnusable with a text that says what is wrong."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return parse_header(_reader(file.fileno()), size, path.name)
    except OSError as error:
        raise ModelUnusable(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _reader(descriptor: int) -> Read:
    def read(offset: int, count: int) -> bytes:
        return os.pread(descriptor, count, offset)

    return read


def parse_header(read: Read, size: int, what: str = "model") -> GGUFHeader:
    """Check the header that `read` gives of a file of `size` bytes. Raises ModelUnusable."""
    cursor = _Cursor(read, size, what)
    if size < 4 or (magic := bytes(cursor.numbers("B", 4))) != b"GGUF":  # type: ignore[arg-type]
        found = "it is empty" if size == 0 else "it does not begin with GGUF"
        if size >= 4 and magic in (b"ggml", b"ggjt", b"lmgg", b"tjgg"):
            found = "it is a GGML file from before GGUF; convert it"
        raise cursor.fault(f"not a GGUF file: {found}")
    version = cursor.unsigned("I")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise cursor.fault("a big-endian GGUF file; only little-endian ones can be read")
        raise cursor.fault(f"GGUF version {version} is not supported, only 2 and 3")
    tensor_count, key_count = cursor.unsigned("Q"), cursor.unsigned("Q")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise cursor.fault(f"the header claims {tensor_count} tensors and {key_count} keys: not plausible")
    metadata, entries = _metadata(cursor, key_count)
    raw = metadata.get("general.alignment", 32)
    if not isinstance(raw, int) or raw < 1 or raw > MAX_ALIGNMENT or raw & (raw - 1):
        raise cursor.fault(f"general.alignment is {raw!r}, not a power of two")
    tensors, header_bytes = _tensors(cursor, tensor_count, raw, size)
    header = GGUFHeader(version, MappingProxyType(metadata), tensors, raw, header_bytes, size, entries)
    if not header.architecture:
        raise cursor.fault("general.architecture is missing")
    return header


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Value], Mapping[str, Entry]]:
    metadata: dict[str, Value] = {}
    entries: dict[str, Entry] = {}
    for _ in range(count):
        start = cursor.position
        try:
            key = cursor.data(MAX_KEY_BYTES, "a key").decode()
        except UnicodeDecodeError as error:
            raise cursor.fault("a key is not UTF-8") from error
        if key in metadata:
            raise cursor.fault(f"the key {key!r} is there twice")
        at = cursor.position
        kind, item = cursor.kinds()
        metadata[key] = _value(cursor, key)
        entries[key] = Entry(start, cursor.position - start, kind, item, at + (4 if item < 0 else 16))
    return metadata, MappingProxyType(entries)


def _value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.unsigned("I")
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.data(MAX_STRING_BYTES, key).decode(errors="replace")
    if kind != _ARRAY:
        raise cursor.fault(f"the key {key!r} has the unknown type {kind}")
    item, count = cursor.unsigned("I"), cursor.unsigned("Q")
    if item not in _SCALARS and item != _STRING:
        raise cursor.fault(f"the key {key!r} is an array of the unusable type {item}")
    width = 8 if item == _STRING else struct.calcsize("<" + _SCALARS[item])
    if count * width > min(cursor._size, MAX_HEADER_BYTES):
        raise cursor.fault(f"the key {key!r} claims {count} items, more than the file can hold")
    start = cursor.position
    if count <= EAGER_ITEMS:
        if item != _STRING:
            return cursor.numbers(_SCALARS[item], count)
        return tuple(cursor.data(MAX_STRING_BYTES, key).decode(errors="replace") for _ in range(count))
    if item == _STRING:
        cursor.skip_strings(count, key)
    else:
        cursor.skip(count * width)
    return GGUFArray(item, count, start, cursor.position - start)


def _tensors(cursor: _Cursor, count: int, alignment: int, size: int) -> tuple[tuple[TensorInfo, ...], int]:
    infos: list[TensorInfo] = []
    names: set[str] = set()
    for _ in range(count):
        info = _tensor(cursor, alignment)
        if info.name in names:
            raise cursor.fault(f"the tensor {info.name!r} is there twice")
        names.add(info.name)
        infos.append(info)
    header_bytes = cursor.position
    start = (header_bytes + alignment - 1) // alignment * alignment
    end, last = start, ""
    placed: dict[str, TensorInfo] = {}
    for info in sorted(infos, key=lambda t: t.offset):
        at = start + info.offset
        if at < end:
            raise cursor.fault(f"the tensors {last!r} and {info.name!r} overlap")
        end, last = at + info.size_bytes, info.name
        if end > size:
            raise cursor.fault(
                f"the file is truncated: the tensor {info.name!r} ends at byte {end}, the file at {size}"
            )
        placed[info.name] = TensorInfo(info.name, info.type, info.shape, at, info.size_bytes)
    return tuple(placed[info.name] for info in infos), header_bytes


def _tensor(cursor: _Cursor, alignment: int) -> TensorInfo:
    try:
        name = cursor.data(_MAX_TENSOR_NAME, "a tensor's name").decode()
    except UnicodeDecodeError as error:
        raise cursor.fault("a tensor's name is not UTF-8") from error
    dimensions = cursor.unsigned("I")
    if not 1 <= dimensions <= 4:
        raise cursor.fault(f"the tensor {name!r} has {dimensions} dimensions, not 1 to 4")
    shape = tuple(cursor.unsigned("Q") for _ in range(dimensions))
    kind, offset = cursor.unsigned("I"), cursor.unsigned("Q")
    if kind not in TENSOR_TYPES:
        raise cursor.fault(f"the tensor {name!r} has the unknown type {kind}")
    label, block, block_bytes = TENSOR_TYPES[kind]
    elements = math.prod(shape)
    if not 0 < elements < 1 << 48 or max(shape) >= 1 << 40:
        raise cursor.fault(f"the tensor {name!r} has the implausible shape {list(shape)}")
    if shape[0] % block:
        raise cursor.fault(f"the tensor {name!r}: rows of {shape[0]} do not fit {label} blocks of {block}")
    if offset % alignment:
        raise cursor.fault(f"the tensor {name!r} is not aligned to {alignment} bytes")
    return TensorInfo(name, label, shape, offset, elements // block * block_bytes)


def read_array(path: Path, array: GGUFArray, limit: int | None = None) -> tuple[Scalar, ...]:
    """Fetch a long array, or its first `limit` items, from the file whose header named it."""
    count = array.count if limit is None else min(limit, array.count)
    try:
        with path.open("rb", buffering=0) as file:
            cursor = _Cursor(_reader(file.fileno()), os.fstat(file.fileno()).st_size, path.name)
            cursor.position = array.offset
            if array.item_type == _STRING:
                return cursor.strings(count)
            return cursor.numbers(_SCALARS[array.item_type], count)
    except OSError as error:
        raise ModelUnusable(f"{path.name}: cannot be read: {error.strerror or error}") from error


def human_count(count: int) -> str:
    """Write a parameter count as Ollama does: 134.52M, 8.0B."""
    for unit, name, digits in ((10**12, "T", 1), (10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            number = count / unit
            return f"{number:.0f}{name}" if number == int(number) else f"{number:.{digits}f}{name}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)
