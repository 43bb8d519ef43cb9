"""Long runs are cut, special tokens are not, and nothing is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.runs import MAX_RUN, cut_runs

parts = st.lists(
    st.tuples(st.sampled_from(["a", " ", "\n", "\u4e16", "<", "!", "ab ", "<|im_end|>"]), st.integers(1, 3 * MAX_RUN)),
    max_size=5,
).map(lambda rows: "".join(part * count for part, count in rows))  # fmt: skip


@given(parts)
def test_no_piece_has_a_long_run_and_joined_they_are_the_text(text):
    pieces = cut_runs(text)
    assert "".join(pieces) == text
    assert all(len(run) <= MAX_RUN for piece in pieces for run in re.findall(r"\S+|\s+", piece))


def test_a_common_text_stays_whole():
    text = "word " * 10_000 + "\n" * (MAX_RUN - 1) + "x" * MAX_RUN
    assert cut_runs(text) == [text]


@pytest.mark.parametrize("before", [0, 1, 3, 5, 9, 10, 60, 500])
def test_special_tokens_stay_whole(before):
    text = "a" * (MAX_RUN - before) + "<|im_end|>" + "b" * 100
    assert any("<|im_end|>" in piece for piece in cut_runs(text))
    text = "a" * (MAX_RUN - before) + "<|im_end|><|im_start|>" * 3 + "b" * MAX_RUN
    pieces = cut_runs(text)
    assert sum(piece.count("<|im_end|>") for piece in pieces) == 3
    assert sum(piece.count("<|im_start|>") for piece in pieces) == 3
