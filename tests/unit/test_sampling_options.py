"""Ollama's sampling options, and text out of bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.sampling import SamplingOptions
from osync.engine.vocabulary import TextDecoder
from osync.errors import BadRequest


def test_defaults_are_ollamas():
    options = SamplingOptions()
    assert (options.num_keep, options.seed, options.num_predict) == (4, -1, -1)
    assert (options.top_k, options.top_p, options.min_p, options.typical_p) == (40, 0.9, 0.0, 1.0)
    assert (options.temperature, options.repeat_penalty, options.repeat_last_n) == (0.8, 1.0, 64)
    assert (options.presence_penalty, options.frequency_penalty, options.stop) == (0.0, 0.0, ())


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"top_p": float("inf")}])
def test_refuses_what_llama_cpp_would_die_of(wrong: dict[str, float]):
    with pytest.raises(BadRequest):
        SamplingOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"repeat_penalty": 0.0}, {"repeat_penalty": 1.0}),
        ({"repeat_penalty": -2.0}, {"repeat_penalty": 1.0}),
        ({"repeat_penalty": 1e-45}, {"repeat_penalty": 1e-6}),
        ({"repeat_penalty": 3e38}, {"repeat_penalty": 1e6}),
        ({"temperature": 1e-45}, {"temperature": 1e-7}),
        ({"temperature": -1.0}, {"temperature": 0.0}),
        ({"temperature": 1e-6}, {"temperature": 1e-6}),
        ({"top_p": -1.0, "min_p": 2.0, "typical_p": 5.0}, {"top_p": 0.0, "min_p": 1.0, "typical_p": 1.0}),
        ({"presence_penalty": -3e38, "frequency_penalty": 3e38},
         {"presence_penalty": -1e6, "frequency_penalty": 1e6}),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_compute_with_becomes_what_it_can(given: dict[str, float], taken: dict[str, float]):
    options = SamplingOptions(**given)  # type: ignore[arg-type]
    assert {name: getattr(options, name) for name in taken} == taken


def test_a_random_seed_is_drawn_once_and_a_fixed_one_stays():
    assert SamplingOptions(seed=7).with_seed().seed == 7
    drawn = SamplingOptions().with_seed()
    assert 0 <= drawn.seed < 0xFFFFFFFF
    assert drawn.with_seed() is drawn


def test_history_is_only_kept_for_penalties():
    tokens = list(range(100))
    assert SamplingOptions().recent(tokens) == ()
    assert SamplingOptions(repeat_penalty=1.1, repeat_last_n=3).recent(tokens) == (97, 98, 99)
    assert SamplingOptions(presence_penalty=1, repeat_last_n=-1).recent(tokens) == tuple(tokens)
    assert SamplingOptions(presence_penalty=1, repeat_last_n=0).recent(tokens) == ()


@given(st.text(), st.lists(st.integers(0, 60), max_size=10))
def test_characters_come_out_whole(text: str, cuts: list[int]):
    raw = text.encode("utf-8", "replace")
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    decoder = TextDecoder()
    parts = [decoder.feed(raw[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join(parts) + decoder.finish() == raw.decode()


def test_bytes_that_never_become_a_character():
    decoder = TextDecoder()
    assert decoder.feed(b"a\xff") == "a\ufffd"
    assert decoder.feed(b"\xe2\x82") == ""
    assert decoder.feed(b"x") == "\ufffdx"
    assert decoder.feed(b"\xf0\x9f") == ""
    assert decoder.finish() == "\ufffd"
