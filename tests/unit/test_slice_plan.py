"""Slices of GGUF models: what they hold, and where a model may be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.cutting import ARCHITECTURES, cut_rules, layer_costs, stage_period
from osync.engine.gguf import GGUFArray, GGUFHeader, parse_header, read_array, read_header
from osync.engine.slice import SlicePlan, plan_slice
from osync.errors import BadRequest, NotSupported
from tests.fakes.architectures import HEAD, KV_HEADS, WIDTH, WINDOW, WORDS, write_model

pytest.importorskip("gguf")
pytest.importorskip("numpy")


def model(path: Path, arch: str = "llama", layers: int = 6, **changes: Any) -> tuple[GGUFHeader, bytes]:
    write_model(path / "model.gguf", arch, layers, **changes)
    return read_header(path / "model.gguf"), (path / "model.gguf").read_bytes()


def assemble(plan: SlicePlan, source: bytes) -> bytes:
    return b"".join(
        source[p.source : p.source + p.size] if p.source is not None else p.data or bytes(p.size) for p in plan.pieces
    )


def parsed(data: bytes) -> GGUFHeader:
    return parse_header(lambda at, count: data[at : at + count], len(data))


def test_a_middle_slice_has_its_layers_and_a_stand_in_for_the_rest(tmp_path):
    header, source = model(tmp_path)
    plan = plan_slice(header, 2, 4)
    data = assemble(plan, source)
    assert len(data) == plan.size_bytes
    part = parsed(data)
    assert part.block_count == 2
    assert part.text("tokenizer.ggml.model") == "no_vocab"
    assert part.integer("llama.vocab_size") == 32
    assert "tokenizer.ggml.words" not in part.metadata
    here = {tensor.name: tensor for tensor in part.tensors}
    there = {tensor.name: tensor for tensor in header.tensors}
    assert here["token_embd.weight"].shape == (WIDTH, 32)
    norm = here.pop("output_norm.weight")
    assert data[norm.offset : norm.offset + norm.size_bytes] == b"\0\0\x80\x3f" * WIDTH
    del here["token_embd.weight"]
    assert len(here) == 18
    for name, tensor in here.items():
        _, layer, rest = name.split(".", 2)
        original = there[f"blk.{int(layer) + 2}.{rest}"]
        assert (tensor.shape, tensor.type) == (original.shape, original.type)
        assert data[tensor.offset :][: tensor.size_bytes] == source[original.offset :][: original.size_bytes]
    assert plan.fetch_bytes == sum(tensor.size_bytes for tensor in here.values())
    assert [tensor.offset for tensor in plan.tensors] == [tensor.offset for tensor in part.tensors]


def test_the_first_slice_carries_the_embedding_behind_its_tensors(tmp_path):
    header, source = model(tmp_path)
    data = assemble(plan_slice(header, 0, 2), source)
    part = parsed(data)
    embedding = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    offset = part.integer("osync.embedding.offset")
    assert offset % header.alignment == 0
    assert (part.integer("osync.embedding.type"), part.integer("osync.embedding.rows")) == (0, WORDS)
    assert data[offset:] == source[embedding.offset :][: embedding.size_bytes]


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_slice_keeps_vocabulary_and_output(tmp_path, tied):
    header, source = model(tmp_path, tied=tied)
    plan = plan_slice(header, 4, 6)
    (tmp_path / "part.gguf").write_bytes(assemble(plan, source))
    part = read_header(tmp_path / "part.gguf")
    words = part.metadata["tokenizer.ggml.words"]
    assert isinstance(words, GGUFArray)
    assert read_array(tmp_path / "part.gguf", words)[-1] == "word1999"
    sources = {tensor.name: tensor.source_name for tensor in plan.tensors}
    assert sources["token_embd.weight"] == ("token_embd.weight" if tied else "")
    assert ("output.weight" in sources) is not tied
    embedding = next(tensor for tensor in part.tensors if tensor.name == "token_embd.weight")
    assert embedding.shape == (WIDTH, WORDS)
    if not tied:
        assert embedding.type == "Q4_0"  # zeros that nobody reads: the smallest type that fits
        assert plan.stored_bytes == plan.size_bytes - embedding.size_bytes


def test_arrays_with_an_item_a_layer_are_cut(tmp_path):
    changes: dict[str, Any] = {"attention__head_count_kv": [1, 2, 1, 2, 4, 1], "rope__other": [1, 2, 3]}
    header, source = model(tmp_path, **changes)
    part = parsed(assemble(plan_slice(header, 3, 5), source))
    assert part.metadata["llama.attention.head_count_kv"] == (2, 4)
    assert part.metadata["llama.rope.other"] == (1, 2, 3)


def test_slices_of_all_layers_together_take_each_layer_once(tmp_path):
    header, source = model(tmp_path, "qwen3moe", 5, tied=False)
    names = [t.source_name for a, b in ((0, 2), (2, 3), (3, 5)) for t in plan_slice(header, a, b).tensors]
    assert sorted(name for name in names if name) == sorted(tensor.name for tensor in header.tensors)
    assert assemble(plan_slice(header, 0, 5), source) == source


def test_what_cannot_be_cut_says_why(tmp_path):
    header, _ = model(tmp_path, "gemma2", 4)
    rules = cut_rules(header)
    assert rules.is_whole
    assert "gemma2" in rules.reason
    assert rules.allows(0, 4)
    assert not rules.allows(0, 2)
    with pytest.raises(NotSupported, match="gemma2"):
        plan_slice(header, 0, 2)
    assert plan_slice(header, 0, 4).fetch_bytes == sum(tensor.size_bytes for tensor in header.tensors)
    for first, last in ((2, 2), (-1, 2), (0, 5)):
        with pytest.raises(BadRequest, match="do not exist"):
            plan_slice(header, first, last)
    assert "predict" in cut_rules(model(tmp_path, nextn_predict_layers=1)[0]).reason
    assert "62" not in cut_rules(model(tmp_path, "gemma3", 12)[0]).reason
    assert "scale of attention" in cut_rules(model(tmp_path, "gemma3", 62)[0]).reason


def test_sliding_windows_are_cut_at_their_period(tmp_path):
    header, source = model(tmp_path, "gemma3", 18)
    rules = cut_rules(header)
    assert rules.points == (6, 12)
    assert "period of 6" in rules.reason
    assert rules.allows(12, 15)
    assert rules.allows(15, 18)
    assert not rules.allows(3, 12)
    assert not rules.allows(17, 18)  # llama.cpp aborts where no layer has a window
    for (first, last), period in (((6, 12), 6), ((13, 17), 5), ((15, 18), 3)):
        part = parsed(assemble(plan_slice(header, first, last), source))
        assert part.integer("gemma3.attention.sliding_window_pattern") == period


@given(st.integers(2, 8), st.integers(0, 40), st.integers(1, 40))
def test_a_stages_period_gives_each_layer_the_window_it_had(period, first, count):
    own = stage_period(period, first, first + count)
    if own:
        assert own > 1
        for layer in range(count):
            assert ((first + layer) % period == period - 1) == (layer % own == own - 1)
    else:
        assert first % period


def test_costs_add_up_to_the_file_and_count_windows(tmp_path):
    for arch in ARCHITECTURES:
        header, _ = model(tmp_path, arch, 6, tied=False)
        costs = layer_costs(header)
        assert sum(costs.layers) + costs.embedding + costs.output == sum(t.size_bytes for t in header.tensors)
        assert len(set(costs.layers)) == 1
        assert costs.cache_values == (KV_HEADS * 2 * HEAD,) * 6
        assert costs.stage_bytes(0, 6, 100) == costs.stage_bytes(0, 2, 100) + costs.stage_bytes(2, 6, 100)
    costs = layer_costs(model(tmp_path, "gemma3", 6)[0])
    assert costs.windows == (WINDOW,) * 5 + (0,)
    assert costs.cache_bytes(0, 100) == WINDOW * KV_HEADS * 2 * HEAD * 2
    assert costs.cache_bytes(5, 100) == 100 * KV_HEADS * 2 * HEAD * 2
    heads = layer_costs(model(tmp_path, attention__head_count_kv=[1, 2, 1, 2, 4, 1])[0]).cache_values
    assert heads == tuple(n * 2 * HEAD for n in (1, 2, 1, 2, 4, 1))
