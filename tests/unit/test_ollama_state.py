"""Reading Ollama's lists: what is odd is left out, never fatal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.backend.ollama_state import answered_model, parse_ps, parse_tags, parse_version
from osync.errors import WireError
from tests.fakes.model import FakeModel

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["models", "name", "details", "size", "families"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def test_tags_row_is_read_whole() -> None:
    model = FakeModel("q:0.5b", quantization="Q5_0", family="qwen2")
    (info,) = parse_tags(json.dumps({"models": [model.tag_row()]}).encode())
    assert (info.name, info.digest, info.size) == ("q:0.5b", model.digest, model.size)
    assert (info.quantization, info.family, info.architecture, info.families) == ("Q5_0", "qwen2", "qwen2", ("qwen2",))
    assert (info.context_length, info.embedding_length) == (8192, 576)
    assert info.capabilities == ("completion", "tools")


def test_rows_of_older_versions_and_odd_ones_do_not_hurt() -> None:
    rows = [{"name": "old:latest", "size": "big", "details": None}, 7, {"size": 3}]
    (info,) = parse_tags(json.dumps({"models": rows}).encode())
    assert (info.name, info.size, info.capabilities) == ("old:latest", 0, ())
    assert parse_ps(b'{"models":null}') == ()


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"version":7}', b"{}"])
def test_what_is_no_ollama_is_said(body: bytes) -> None:
    with pytest.raises(WireError, match="not an Ollama"):
        parse_version(body)


@given(_JSON)
def test_any_json_gives_models_or_a_wire_error(value: object) -> None:
    for parse in (parse_tags, parse_ps, parse_version):
        try:
            parse(json.dumps(value).encode())
        except WireError:
            pass


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (b'{"model":"a:7b","created_at":"x"', "a:7b"),
        (b'data: {"id":"chatcmpl-1","model":"b"}', "b"),
        (b'{"embedding":[1]}', ""),
        (b'{"model":"cut', ""),
    ],
)
def test_model_of_an_answer(piece: bytes, name: str) -> None:
    assert answered_model(piece) == name
