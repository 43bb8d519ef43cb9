"""Routing fields of inference requests."""

from __future__ import annotations

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from osync.errors import BadRequest, FrameTooLarge
from osync.wire.body import parse_object
from osync.wire.request import Inference, decompress, multipart_field, parse


def read(path: str, body: bytes, **headers: str) -> Inference:
    return parse(path, body, lambda name: headers.get(name.replace("-", "_"), ""))


def test_bytes_are_untouched():
    body = b'{ "model" : "a:b",  "prompt":"x", "unknown": [1.0, 1e2] }'
    request = read("/api/generate", body)
    assert (request.model, request.body, request.plain) == ("a:b", body, body)
    assert request.stream
    assert not request.is_rewritten


def test_stream_defaults():
    assert read("/api/chat", b'{"model":"m","messages":[{}]}').stream
    assert not read("/api/chat", b'{"model":"m","messages":[{}],"stream":false}').stream
    assert not read("/api/embed", b'{"model":"m"}').stream
    assert not read("/v1/chat/completions", b'{"model":"m"}').stream
    assert read("/v1/chat/completions", b'{"model":"m","stream":true}').stream


@pytest.mark.parametrize(
    ("path", "body", "load", "unload"),
    [
        ("/api/generate", {"prompt": "x", "keep_alive": 0}, False, False),
        ("/api/generate", {}, True, False),
        ("/api/generate", {"prompt": "", "keep_alive": 0}, True, True),
        ("/api/generate", {"keep_alive": "0s"}, True, True),
        ("/api/generate", {"keep_alive": "5m"}, True, False),
        ("/api/generate", {"keep_alive": -1}, True, False),
        ("/api/chat", {"messages": [], "keep_alive": "0s"}, True, True),
        ("/api/chat", {"messages": None}, True, False),
        ("/api/embed", {"input": "", "keep_alive": 0}, False, False),
        ("/v1/chat/completions", {"messages": [], "keep_alive": 0}, False, False),
    ],
)
def test_loads_and_unloads(path, body, load, unload):
    request = read(path, orjson.dumps({"model": "m", **body}))
    assert (request.is_load, request.is_unload) == (load, unload)


def test_extensions_are_taken_out():
    body = {
        "model": "m",
        "prompt": "x",
        "options": {"seed": 1, "distributed": True, "session_id": "s", "quantize": "q8_0"},
    }
    request = read("/api/generate", orjson.dumps(body))
    assert (request.distributed, request.session_id, request.quantize) == (True, "s", "q8_0")
    assert request.is_rewritten
    assert orjson.loads(request.body) == {"model": "m", "prompt": "x", "options": {"seed": 1}}
    assert read("/api/generate", b'{"model":"m"}', x_osync_session="h").session_id == "h"


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/api/generate", b"", "missing request body"),
        ("/api/generate", b" \n", "missing request body"),
        ("/api/generate", b'{"model":"m"', "unexpected EOF"),
        ("/api/generate", b'{"model":"m', "unexpected EOF"),
        ("/api/generate", b"hello", "invalid character 'h' looking for beginning of value"),
        ("/api/generate", b"{model:1}", "invalid character 'm' looking for beginning of object key string"),
        ("/api/generate", b'{"a" 1}', "invalid character '1' after object key"),
        ("/api/generate", b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
        ("/api/generate", b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        ("/api/chat", b"[]", "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        ("/api/chat", b"7", "json: cannot unmarshal number into Go value of type api.ChatRequest"),
        (
            "/api/generate",
            b'{"model":1}',
            "json: cannot unmarshal number into Go struct field GenerateRequest.model of type string",
        ),
        (
            "/api/chat",
            b'{"model":"m","messages":"x"}',
            "json: cannot unmarshal string into Go struct field ChatRequest.messages of type []api.Message",
        ),
        (
            "/api/chat",
            b'{"model":"m","stream":"no"}',
            "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool",
        ),
        (
            "/api/chat",
            b'{"model":"m","options":[]}',
            "json: cannot unmarshal array into Go struct field ChatRequest.options of type map[string]interface {}",
        ),
        ("/api/chat", b"{}", "model is required"),
        ("/api/embeddings", b'{"model":null}', "model is required"),
        ("/v1/messages", b"null", "model is required"),
    ],
)
def test_errors_in_ollamas_words(path, body, text):
    with pytest.raises(BadRequest) as caught:
        read(path, body)
    assert str(caught.value) == text


def test_what_go_accepts_is_accepted():
    assert read("/api/generate", b'{"model":"m"} trailing').model == "m"
    assert read("/api/generate", b'{"MODEL":"m"}').model == "m"
    assert read("/api/generate", b'{"model":"m","prompt":"\xff"}').model == "m"
    request = read("/api/generate", b'{"model":"m","prompt":"\\ud800","options":{"session_id":"s"}}')
    assert orjson.loads(request.body)["model"] == "m"
    assert read("/api/generate", b"{}").model == ""


def test_deep_nesting_is_an_error_not_a_crash():
    with pytest.raises(BadRequest):
        parse_object(b'{"a":' * 100_000, "GenerateRequest")


def test_zstd_is_read_and_goes_on_as_it_came():
    plain = b'{"model":"m","input":"x"}'
    packed = zstandard.compress(plain)
    request = read("/v1/responses", packed, content_encoding="zstd")
    assert (request.model, request.body, request.plain) == ("m", packed, plain)


def test_zstd_is_bounded():
    with pytest.raises(FrameTooLarge):
        decompress(zstandard.compress(b"\0" * (3 << 20)), limit=1 << 20)
    with pytest.raises(BadRequest):
        decompress(b"not zstd")


FORM = (
    b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00--X\r\n\r\n'
    b'\r\n--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper:1\r\n--XX--\r\n'
)


def test_multipart_model():
    request = read("/v1/audio/transcriptions", FORM, content_type='multipart/form-data; boundary="XX"')
    assert (request.model, request.body) == ("whisper:1", FORM)
    assert multipart_field(FORM, "multipart/form-data; boundary=XX", "language") == ""
    with pytest.raises(BadRequest):
        multipart_field(FORM, "application/json", "model")


@given(st.binary(max_size=200))
def test_any_bytes_give_a_request_or_a_wire_error(body):
    for path in ("/api/generate", "/api/chat", "/v1/messages"):
        try:
            read(path, body)
        except BadRequest:
            pass
    try:
        multipart_field(body, "multipart/form-data; boundary=a", "model")
        decompress(body, 1 << 16)
    except (BadRequest, FrameTooLarge):
        pass


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: (
            st.lists(v)
            | st.dictionaries(st.sampled_from(["model", "stream", "options", "messages", "prompt", "keep_alive"]), v)
        ),
        max_leaves=8,
    )
)
def test_any_json_gives_a_request_or_a_wire_error(value):
    try:
        read("/api/chat", orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
    except (BadRequest, TypeError):
        pass
