"""Prompts over the context: cut in the middle, or refused in Ollama's words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.backend.engine.prompt import fit
from osync.errors import BadRequest


def test_what_fits_stays_as_it_is():
    tokens = list(range(99))
    assert fit(tokens, 100, {}, True) is tokens
    assert fit(tokens, 100, {}, False) is tokens


def test_without_truncate_only_what_is_over_the_context_is_refused():
    assert len(fit(list(range(100)), 100, {}, False)) == 100
    with pytest.raises(BadRequest, match="the input length exceeds the context length") as caught:
        fit(list(range(101)), 100, {}, False)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("sampling", "first", "length"),
    [
        ({}, [0, 1, 2, 3, 929], 75),  # a quarter is left to the answer
        ({"num_keep": 0}, [925], 75),
        ({"num_keep": 2}, [0, 1, 927], 75),
        ({"num_keep": -1}, list(range(50)), 75),
        ({"num_keep": 5000}, list(range(50)), 75),
        ({"num_predict": 10}, [0, 1, 2, 3, 914], 90),
        ({"num_predict": 999}, [0, 1, 2, 3, 929], 75),
        ({"num_predict": -1}, [0, 1, 2, 3, 929], 75),
    ],
)
def test_the_first_num_keep_and_the_end_stay(sampling, first, length):
    cut = fit(list(range(1000)), 100, sampling, True)
    assert cut[: len(first)] == first
    assert cut[-1] == 999
    assert len(cut) == length


@given(st.integers(4, 300), st.integers(0, 900), st.integers(-5, 400), st.integers(-5, 400))
def test_a_cut_prompt_always_leaves_room_and_keeps_its_order(context, length, keep, predict):
    tokens = list(range(length))
    cut = fit(tokens, context, {"num_keep": keep, "num_predict": predict}, True)
    assert len(cut) < context
    assert cut == sorted(set(cut))
    assert cut[-1:] == tokens[-1:]
