"""Which quantization may stand in for which."""

from __future__ import annotations

import pytest

from osync.config import QUANTIZATIONS
from osync.core.quantization import FULL, compatible, is_asked_by_name, pick, serves, source
from osync.engine.quantize_worker import FILE_TYPES


@pytest.mark.parametrize(
    ("asked", "by"),
    [
        ("q4_0", "q4_0 q4_1 q5_0 q5_1 q8_0"),
        ("q5_0", "q5_0 q5_1 q8_0"),
        ("q8_0", "q8_0"),
        ("f16", "f16"),
        ("q4_k_m", "q4_k_m q5_k_s q5_k_m q6_k"),
        ("q6_k", "q6_k"),
    ],
)
def test_the_table_of_the_design(asked: str, by: str):
    assert compatible(asked) == tuple(by.split())
    for kind in QUANTIZATIONS:
        assert serves(asked, kind.upper()) == (kind in by.split())


def test_the_best_of_what_is_there():
    assert pick("q4_0", ["Q8_0", "Q5_0", "F16"]) == "Q5_0"
    assert pick("q4_0", ["Q8_0", "Q4_0"]) == "Q4_0"
    assert pick("q4_k_m", ["Q4_0", "Q3_K_M"]) is None
    assert source(["Q4_0", "F16", "F32"]) == "F32"
    assert source(["Q4_0"]) is None


def test_each_quantization_can_be_asked_for_and_made():
    assert set(FILE_TYPES) == set(QUANTIZATIONS)
    assert all(serves(kind, kind) for kind in (*QUANTIZATIONS, *FULL))


@pytest.mark.parametrize(
    ("name", "asked"),
    [("llama3:8b-instruct-fp16", True), ("x:f16", True), ("x:bf16", True), ("x:latest", False), ("f16", False)],
)
def test_a_tag_may_ask_for_full_precision(name: str, asked: bool):
    assert is_asked_by_name(name) is asked
