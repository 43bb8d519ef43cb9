"""Truncated, overlong, overlapping and lying files: refused with a clear error, or read; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.gguf import GGUFHeader, parse_header
from osync.engine.plausible import check_plausible
from osync.engine.store import ModelStore
from osync.errors import ModelUnusable
from tests.fakes.tiny import Tensor, Tiny, lies, scrambled, tiny


def accept(data: bytes) -> GGUFHeader | None:
    """Return a file's header as the store takes it, None where it is refused in words."""
    try:
        header = parse_header(lambda at, count: data[at : at + count], len(data), "x.gguf")
        check_plausible(header, "x.gguf")
    except ModelUnusable as error:
        assert str(error).startswith("x.gguf: ")
        return None
    assert all(t.offset + t.size_bytes <= len(data) for t in header.tensors)
    spans = sorted((t.offset, t.offset + t.size_bytes) for t in header.tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert 1 <= (header.block_count or 1) <= 512
    assert header.kv_bytes_per_token() >= 0
    assert header.quantization
    return header


@pytest.mark.parametrize("vocabulary", ["llama", "gpt2"])
def test_an_honest_file_is_accepted(vocabulary):
    header = accept(tiny(vocabulary=vocabulary).data())
    assert header is not None
    assert (header.architecture, header.block_count, header.quantization) == ("llama", 2, "F32")


def test_lies_are_refused_or_harmless():
    taken = {name: accept(data) is not None for name, data in lies()}
    assert len(taken) > 1100
    assert 400 < sum(taken.values()) < len(taken) - 400
    assert not any(taken[name] for name in taken if name.startswith("cut at"))


@given(st.integers(0, 2**63))
def test_changed_bytes_are_refused_or_harmless(seed):
    accept(scrambled(seed))


@given(st.binary(max_size=64), st.integers(0, 2000), st.integers(0, 200))
def test_spliced_bytes_are_refused_or_harmless(piece, at, drop):
    whole = tiny().data()
    accept(whole[:at] + piece + whole[at + drop :])


def with_key(key: str, kind: str, value: object) -> Callable[[Tiny], None]:
    return lambda model: model.metadata.__setitem__(key, (kind, value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_key("llama.block_count", "u32", 0), "block_count is 0, not 1 to 512"),
        (with_key("llama.block_count", "u32", 4096), "block_count is 4096"),
        (with_key("llama.block_count", "bool", True), "block_count is True"),
        (with_key("llama.attention.head_count_kv", "i32", -1), "head_count_kv is -1"),
        (with_key("llama.attention.head_count_kv", "[i32]", [2, -1]), "head_count_kv is"),
        (with_key("llama.embedding_length", "u64", 1 << 40), "embedding_length"),
        (with_key("llama.expert_count", "u32", 8), "expert_used_count is 0, of 8 experts"),
        (with_key("llama.expert_used_count", "u32", 2), "expert_used_count is 2, of 0 experts"),
        (with_key("llama.expert_group_count", "u32", 2), "there are no experts"),
        (with_key("llama.nextn_predict_layers", "u32", 3), "nextn_predict_layers"),
        (with_key("llama.attention.layer_norm_rms_epsilon", "f32", -1.0), "epsilon is -1.0"),
        (with_key("llama.attention.layer_norm_rms_epsilon", "f32", float("nan")), "epsilon is nan"),
        (with_key("tokenizer.ggml.scores", "[f32]", [0.0]), "scores has 1 items for 320 tokens"),
        (with_key("tokenizer.ggml.scores", "[u8]", [0] * 320), "no array of the type"),
        (with_key("tokenizer.ggml.token_type", "[u8]", [1] * 320), "no array of the type"),
        (with_key("tokenizer.ggml.tokens", "[u32]", [1, 2]), "no array of the type"),
        (with_key("tokenizer.ggml.tokens", "str", "all"), "no array of the type"),
        (lambda m: setattr(m.tensors[-1], "offset", 32), "overlap"),
        (lambda m: setattr(m.tensors[-1], "offset", 1 << 40), "truncated"),
        (lambda m: setattr(m.tensors[-1], "offset", 7), "not aligned"),
        (lambda m: setattr(m.tensors[-1], "shape", (32, 0)), "implausible shape"),
        (lambda m: m.tensors.append(Tensor("x", (1, 1, 1, 1, 1))), "5 dimensions"),
        (lambda m: setattr(m, "tensor_count", 1 << 63), "not plausible"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_abort_on_has_a_clear_text(change, words):
    model = tiny()
    change(model)
    data = model.data()
    with pytest.raises(ModelUnusable, match=words):
        check_plausible(parse_header(lambda at, count: data[at : at + count], len(data), "x.gguf"), "x.gguf")


def test_small_alignment_is_refused_where_the_data_lies_badly():
    model = tiny()
    model.metadata["general.alignment"] = ("u32", 8)
    model.alignment = 8
    offsets = set()
    for length in range(4):
        model.metadata["general.name"] = ("str", "x" * 8 * length)
        offsets.add(accept(model.data()) is not None)
    assert offsets == {True, False}


def test_the_store_serves_no_model_without_a_vocabulary(tmp_path: Path):
    model = tiny()
    model.metadata["tokenizer.ggml.model"] = ("str", "no_vocab")
    (tmp_path / "bare-F32.gguf").write_bytes(model.data())
    (tmp_path / "good-F32.gguf").write_bytes(tiny().data())
    store = ModelStore((tmp_path,))
    store.scan()
    assert store.find("good").info.name == "good:latest"
    with pytest.raises(ModelUnusable, match="no vocabulary"):
        store.find("bare")
