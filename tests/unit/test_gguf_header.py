"""The GGUF header reader: true for valid files, a clear fault for every other."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.gguf import (
    GGUFArray,
    GGUFHeader,
    human_count,
    parse_header,
    read_array,
    read_header,
)
from osync.errors import ModelUnusable
from tests.fakes.gguf import METADATA, gguf, tensor, text, write


def parse(data: bytes) -> GGUFHeader:
    return parse_header(lambda at, count: data[at : at + count], len(data), "x.gguf")


def test_a_valid_file_tells_what_it_is():
    header = parse(gguf())
    assert (header.architecture, header.quantization) == ("llama", "Q4_1")
    assert (header.context_length, header.embedding_length, header.block_count) == (4096, 64, 2)
    assert header.parameter_count == 64
    assert header.kv_bytes_per_token() == 2 * 2 * (16 + 16) * 2
    assert [t.name for t in header.tensors] == ["a.weight", "b.weight"]
    assert header.tensors[0].offset % 32 == 0
    assert header.tensors[1].offset == header.tensors[0].offset + 128


def test_long_arrays_stay_in_the_file(tmp_path):
    path = write(tmp_path / "x.gguf")
    header = read_header(path)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    assert tokens.count == 2000
    assert read_array(path, tokens, 2) == ("token0", "token1")
    assert read_array(path, tokens)[-1] == "token1999"


def test_what_the_gguf_package_writes_is_read(tmp_path):
    package = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = package.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_context_length(77)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("t", numpy.zeros((3, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "w.gguf")
    assert header.context_length == 77
    assert header.chat_template == "{{ messages }}"
    assert header.tensors[0].shape == (32, 3)
    assert header.quantization == "F32"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
        (b"ggjt" + bytes(100), "before GGUF"),
        (gguf(version=1), "version 1 is not supported"),
        (gguf(version=9), "version 9 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "not plausible"),
        (gguf()[:200], "truncated"),
        (gguf()[:-400], "truncated: the tensor"),
        (gguf({"general.name": "x"}), "general.architecture is missing"),
        (gguf({**METADATA, "general.alignment": 3}), "alignment"),
        (gguf(tensors=[tensor("a", (32,), 0), tensor("a", (32,), 128)]), "twice"),
        (gguf(tensors=[tensor("a", (32,), 0), tensor("b", (32,), 64)]), "overlap"),
        (gguf(tensors=[tensor("a", (32,), 7)]), "not aligned"),
        (gguf(tensors=[tensor("a", (1, 1, 1, 1, 1), 0)]), "5 dimensions"),
        (gguf(tensors=[tensor("a", (32,), 0, kind=250)]), "unknown type 250"),
        (gguf(tensors=[tensor("a", (33,), 0, kind=2)]), "do not fit Q4_0"),
        (gguf(tensors=[tensor("a", (1 << 39, 1 << 39), 0)]), "implausible shape"),
        (gguf(tensors=[tensor("n" * 64, (32,), 0)]), "name is 64 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "unusable type"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 50), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IQ", 8, 1 << 50), "over"),
    ],
)
def test_every_fault_has_a_clear_text(data, words):
    with pytest.raises(ModelUnusable, match=words):
        parse(data)


def test_a_missing_file_is_a_fault_too(tmp_path):
    with pytest.raises(ModelUnusable, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


SMALL = gguf({k: v for k, v in METADATA.items() if k != "tokenizer.ggml.tokens"})


@given(st.integers(0, len(SMALL) - 1))
def test_truncated_anywhere_it_is_never_believed(cut):
    if cut < len(SMALL) - 256:  # the last tensor ends there; what follows is padding
        with pytest.raises(ModelUnusable):
            parse(SMALL[:cut])


@given(st.dictionaries(st.integers(0, len(SMALL) - 1), st.integers(0, 255), max_size=8))
def test_lying_headers_give_a_header_or_a_fault_and_nothing_else(changes):
    data = bytearray(SMALL)
    for at, byte in changes.items():
        data[at] = byte
    try:
        header = parse(bytes(data))
    except ModelUnusable:
        return
    assert all(t.offset + t.size_bytes <= len(data) for t in header.tensors)


@given(st.binary(max_size=300))
def test_noise_after_the_magic(noise):
    try:
        parse(b"GGUF" + noise)
    except ModelUnusable:
        pass


def test_counts_are_written_as_ollama_writes_them():
    assert [human_count(n) for n in (134515008, 8030261248, 7_000_000_000, 999, 4500)] == [
        "134.52M", "8.0B", "7B", "999", "4K",
    ]  # fmt: skip
