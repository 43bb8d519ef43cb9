"""Small GGUF files for tests, written by hand: no numpy, no gguf package."""

from __future__ import annotations

import struct
from pathlib import Path

_TYPES = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: object) -> bytes:
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, list):
        kind = 8 if isinstance(item[0], str) else 5
        body = b"".join(text(i) if isinstance(i, str) else struct.pack("<i", i) for i in item)
        return struct.pack("<IIQ", 9, kind, len(item)) + body
    kind, form = _TYPES[type(item)]
    return struct.pack("<I", kind) + struct.pack(form, item)


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
    return head + struct.pack("<IQ", kind, offset)


METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 3,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": [f"token{i}" for i in range(2000)],
}


def gguf(
    metadata: dict[str, object] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(512),
    version: int = 3,
) -> bytes:
    """Return a whole file; by default a tiny valid one with two tensors of 32 floats."""
    metadata = METADATA if metadata is None else metadata
    if tensors is None:
        tensors = [tensor("a.weight", (32,), 0), tensor("b.weight", (32,), 128)]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(k) + value(v) for k, v in metadata.items()) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def write(path: Path, **changes: object) -> Path:
    """Write a file whose metadata differs from METADATA in `changes`; `__` stands for a dot."""
    metadata = {**METADATA, **{k.replace("__", "."): v for k, v in changes.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf(metadata))
    return path
