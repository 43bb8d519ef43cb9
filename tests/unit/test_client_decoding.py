"""Answers as the clients type them, at arbitrary cuts, and errors as they map them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync import errors
from osync.client.answers import ChatResponse, GenerateResponse, ListResponse, Progress, ShowResponse, StatusResponse
from osync.client.decoding import Decoder, decode, error_of, with_node

URL = "http://p:8000"


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def drain(decoder: Decoder[Any]) -> list[Any]:
    out = []
    while (item := decoder.pop()) is not None:
        out.append(item)
    return out


@given(st.lists(st.text(), max_size=8), st.lists(st.integers(1, 20), max_size=40))
def test_cuts_do_not_matter(texts, cuts):
    data = lines(*({"response": text, "done": False} for text in texts), {"done": True, "response": ""})
    decoder: Decoder[GenerateResponse] = Decoder(GenerateResponse.of, URL)
    out = []
    for cut in cuts:
        decoder.feed(data[:cut])
        data = data[cut:]
        out += drain(decoder)
    decoder.feed(data)
    decoder.end()
    out += drain(decoder)
    assert [item.response for item in out] == [*texts, ""]
    assert decoder.complete


def test_an_end_without_the_last_line_is_broken():
    decoder = Decoder(GenerateResponse.of, URL)
    decoder.feed(lines({"response": "a", "done": False}))
    decoder.end()
    item = decoder.pop()
    assert item is not None
    assert item.response == "a"
    with pytest.raises(errors.StreamBroken, match="broke off"):
        decoder.pop()


def test_an_error_line_comes_after_what_was_said_before_it():
    decoder = Decoder(Progress.of, URL)
    decoder.feed(lines({"status": "pulling manifest"}, {"error": "file does not exist"}))
    assert decoder.pop() == Progress(status="pulling manifest")
    with pytest.raises(errors.StreamBroken, match=r"^file does not exist$"):
        decoder.pop()


def test_one_object_without_a_newline_is_a_whole_answer():
    decoder = Decoder(GenerateResponse.of, URL)
    decoder.feed(b'{"done": true, "done_reason": "load"}')
    decoder.end()
    assert [item.done_reason for item in drain(decoder)] == ["load"]


def test_a_line_that_is_no_object_is_broken():
    for text in (b"<html>\n", b"[]\n", b"\xff\n"):
        decoder = Decoder(GenerateResponse.of, URL)
        decoder.feed(text)
        with pytest.raises(errors.StreamBroken):
            decoder.pop()


def test_a_line_has_a_bound():
    decoder = Decoder(GenerateResponse.of, URL)
    with pytest.raises(errors.FrameTooLarge):
        for _ in range(9):
            decoder.feed(b"x" * (1 << 20))


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": "bad"}', errors.BadRequest),
        (401, b'{"error": "who"}', errors.Unauthenticated),
        (403, b"", errors.Forbidden),
        (404, b'{"error": "model \'x\' not found"}', errors.ModelNotFound),
        (405, b"405 method not allowed", errors.BadRequest),
        (413, b"", errors.FrameTooLarge),
        (500, b'{"error": {"message": "no"}}', errors.UpstreamError),
        (501, b'{"error": "not yet"}', errors.NotSupported),
        (502, b"<html>", errors.UpstreamUnavailable),
        (503, b'{"error": "server busy"}', errors.CapacityError),
        (503, b'{"error": "no node is up; add one"}', errors.NoNodes),
        (504, b"", errors.UpstreamTimeout),
    ],
)
def test_errors_by_status(status, body, kind):
    error = error_of(status, "7", body, URL)
    assert type(error) is kind
    assert str(error)
    if isinstance(error, errors.CapacityError):
        assert error.retry_after_s == 7


def test_unknown_fields_survive_and_wrong_types_do_no_harm():
    raw = {"response": 5, "eval_count": "x", "done": 1, "context": [1, 2], "osync": {"resumed": 1}}
    item = GenerateResponse.of(raw, node="n1")
    assert (item.response, item.eval_count, item.done, item.context, item.node) == ("", 0, False, (1, 2), "n1")
    assert item.raw["osync"] == {"resumed": 1}


def test_a_chat_answer_is_typed_to_its_tool_calls():
    call = {"function": {"index": 0, "name": "weather", "arguments": {"city": "Ulm"}}}
    item = ChatResponse.of({"message": {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]}})
    assert item.message.thinking == "hm"
    assert (item.message.tool_calls[0].name, item.message.tool_calls[0].arguments) == ("weather", {"city": "Ulm"})


def test_nested_answers():
    row = {"name": "m:latest", "size": 3, "details": {"family": "llama", "families": ["llama"]}}
    model = ListResponse.of({"models": [row]}).models[0]
    assert (model.name, model.size, model.details.family, model.details.families) == (
        "m:latest",
        3,
        "llama",
        ("llama",),
    )
    assert ListResponse.of({"models": None}).models == ()
    assert ShowResponse.of({"model_info": {"a": 1}}).model_info == {"a": 1}
    assert StatusResponse.of({"version": "1", "nodes": [{"host": "a"}]}).nodes[0]["host"] == "a"
    assert StatusResponse.of(None).nodes == ()


def test_the_node_is_filled_in_where_there_is_a_place_for_it():
    assert with_node(GenerateResponse.of, "n")({}).node == "n"
    assert with_node(Progress.of, "n")({"status": "x"}).status == "x"


def test_decode_wants_an_object():
    with pytest.raises(errors.StreamBroken):
        decode(b"[1]", URL)
