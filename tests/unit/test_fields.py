"""A request's fields, found and refused as Ollama's Go decoder does."""

from __future__ import annotations

import pytest

from osync.errors import BadRequest
from osync.wire.body import dump_object, parse_object
from osync.wire.fields import Fields


def fields(**data: object) -> Fields:
    return Fields(data, "ChatRequest")


def test_names_are_found_in_any_case_and_null_is_absent():
    given = fields(Model="a", model="b", STREAM=False, system=None)
    assert given.model() == "b"
    assert given.boolean("stream", True) is False
    assert (given.text("system"), given.has("system"), given.raw("none")) == ("", False, None)
    assert given.data == {"Model": "a", "model": "b", "STREAM": False, "system": None}


def test_the_old_name_of_the_model_counts_where_the_new_one_is_empty():
    assert fields(name="a").model() == fields(model="", name="a").model() == "a"
    with pytest.raises(BadRequest):
        fields(model="a", name=1).model()


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (lambda f: f.text("x"), 1, "number into Go struct field ChatRequest.x of type string"),
        (lambda f: f.boolean("x", False), "no", "string into Go struct field ChatRequest.x of type bool"),
        (lambda f: f.boolean("x", False), 0, "number into Go struct field ChatRequest.x of type bool"),
        (lambda f: f.object("x"), [], "array into Go struct field ChatRequest.x of type map[string]interface {}"),
        (lambda f: f.array("x", "[]string"), {}, "object into Go struct field ChatRequest.x of type []string"),
        (lambda f: f.integers("x"), [True], "bool into Go struct field ChatRequest.x of type int"),
    ],
)
def test_wrong_types_in_gos_words(read, value, words):
    with pytest.raises(BadRequest) as caught:
        read(fields(x=value))
    assert str(caught.value) == f"json: cannot unmarshal {words}"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b" \n", "missing request body"),
        (b'{"a":1e400}', "json: cannot unmarshal number 1e400 into Go value of type float64"),
        (b'{"a":-1e999}', "json: cannot unmarshal number -1e999 into Go value of type float64"),
        (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        (b'{"a":' * 5000, "json: exceeded max depth"),
    ],
)
def test_bodies_that_go_refuses(body, words):
    with pytest.raises(BadRequest) as caught:
        parse_object(body, "ChatRequest")
    assert str(caught.value) == words


def test_what_only_the_lenient_reader_takes_is_written_again():
    body = b'{"n":' + b"9" * 25 + b',"d":' + b"[" * 300 + b"]" * 300 + b',"s":"\xff"}'
    value = parse_object(body, "ChatRequest")
    written = dump_object(value)
    assert b"9" * 25 in written
    assert parse_object(written, "ChatRequest") == {**value, "n": 1e25}
    with pytest.raises(BadRequest):
        parse_object(b'{"n":' + b"9" * 5000 + b',"s":"\xff"}', "ChatRequest")
