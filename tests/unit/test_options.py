"""Ollama's options, durations and keep_alive."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.errors import BadRequest
from osync.wire.options import (
    FOREVER,
    InvalidOption,
    RunnerOptions,
    parse_duration,
    parse_keep_alive,
    parse_lifetime,
    parse_options,
)


def test_options_go_where_they_belong():
    parsed = parse_options(
        {"temperature": 0, "top_k": 5.0, "stop": ["a", ""], "num_ctx": 512, "use_mmap": False, "new": 1, "seed": None}
    )
    assert parsed.sampling == {"temperature": 0.0, "top_k": 5, "stop": ("a",)}
    assert parsed.runner == RunnerOptions(num_ctx=512, use_mmap=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_ctx": "x"}, 'option "num_ctx" must be of type integer'),
        ({"top_k": True}, 'option "top_k" must be of type integer'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
    ],
)
def test_wrong_types_get_ollamas_words_and_status(options, text):
    with pytest.raises(InvalidOption) as caught:
        parse_options(options)
    assert str(caught.value) == text
    assert caught.value.status == 500


INTEGERS = [
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
    "num_thread", "draft_num_predict",
]  # fmt: skip
FLOATS = [
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty",
]  # fmt: skip
KINDS: dict[str, str] = {
    **dict.fromkeys(INTEGERS, "integer"),
    **dict.fromkeys(FLOATS, "float32"),
    "use_mmap": "boolean",
    "stop": "array",
}
RIGHT: dict[str, list[object]] = {
    "integer": [0, -1, 3, 3.9, 10**12, -(10**30), 1e308, -1e308],
    "float32": [0, -1, 1, 0.5, 1e308, -1e308, 1e-45],
    "boolean": [True, False],
    "array": [[], ["a"], [""]],
}
WRONG: dict[str, list[object]] = {
    "integer": [True, "1", [1], {}],
    "float32": [True, "0.5", [0.5], {}],
    "boolean": [0, 1, "true", []],
    "array": ["a", 1, True, {}],
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_option_is_checked_for_its_type_and_for_no_range(name: str, kind: str):
    for value in RIGHT[kind]:
        parse_options({name: value})
    for value in WRONG[kind]:
        with pytest.raises(InvalidOption) as caught:
            parse_options({name: value})
        assert str(caught.value) == f'option "{name}" must be of type {kind}'


@pytest.mark.parametrize("name", ["num_ctx", "num_batch", "num_thread"])
def test_a_size_of_nothing_leaves_the_choice_to_the_runner(name: str):
    assert parse_options({name: 0}).runner == parse_options({name: -1}).runner == RunnerOptions()


@pytest.mark.parametrize(
    ("seed", "kept"), [(7, 7), (-1, -1), (2**31, -(2**31)), (2**40 + 9, 9), (2**64 - 2, -2), (3.9, 3)]
)
def test_seeds_keep_their_low_32_bits(seed: float, kept: int):
    assert parse_options({"seed": seed}).sampling == {"seed": kept}


@given(
    st.dictionaries(st.sampled_from(["num_ctx", "top_k", "seed", "temperature", "top_p"]), st.floats() | st.integers())
)
def test_numbers_of_any_size_are_bounded_or_refused(options):
    try:
        parsed = parse_options(options)
    except InvalidOption:
        return
    assert all(math.isfinite(v) and abs(v) < 1e39 for v in parsed.sampling.values())
    assert parsed.runner.num_ctx is None or abs(parsed.runner.num_ctx) < 2**31


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("-1s", -1), ("300ms", 0.3), ("1.5h", 5400), ("0", 0), (".5s", 0.5), ("2µs", 2e-6)],
)
def test_go_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10", 'time: missing unit in duration "10"'),
        ("", 'time: invalid duration ""'),
        ("5 m", 'time: unknown unit " m" in duration "5 m"'),
        ("x", 'time: invalid duration "x"'),
        ("-", 'time: invalid duration "-"'),
        ("1e9h", 'time: unknown unit "e" in duration "1e9h"'),
        ("9999999999h", 'time: invalid duration "9999999999h"'),
    ],
)
def test_bad_durations_get_gos_words(text, words):
    with pytest.raises(BadRequest) as caught:
        parse_duration(text)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        (10, 10),
        (1.5, 1.5),
        (-1, FOREVER),
        ("-1m", FOREVER),
        ("0s", 0),
        ("2m", 120),
        (1e300, FOREVER),
    ],
)
def test_keep_alive_in_all_forms(value, seconds):
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize("value", ["10", [], {}, True, "soon"])
def test_bad_keep_alives(value):
    with pytest.raises(BadRequest):
        parse_keep_alive(value)


def test_the_settings_lifetime_may_be_bare_seconds():
    assert parse_lifetime("30") == 30
    assert parse_lifetime("-1") == FOREVER
    assert parse_lifetime("5m") == 300


@given(st.text(max_size=30))
def test_any_text_is_a_duration_or_a_bad_request(text):
    try:
        assert math.isfinite(parse_duration(text))
    except BadRequest:
        pass
