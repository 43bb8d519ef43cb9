"""Requests as the clients build them, and which server they go to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from osync.client import calls
from osync.client.answers import Message
from osync.client.servers import Servers, base_url, checked, may_move
from osync.errors import (
    BadRequest,
    CapacityError,
    ConfigError,
    ModelNotFound,
    NoNodes,
    UpstreamTimeout,
    UpstreamUnavailable,
)


def body(call: calls.Call) -> Any:
    assert call.body is not None
    return json.loads(call.body)


def test_keywords_go_where_ollama_has_them():
    call = calls.generate(
        "m", "hi", True,
        {"system": "s", "keep_alive": 0, "temperature": 0, "options": {"top_k": 3}, "session_id": "x", "seed": None},
    )  # fmt: skip
    assert (call.method, call.path) == ("POST", "/api/generate")
    assert body(call) == {
        "model": "m", "prompt": "hi", "stream": True, "system": "s", "keep_alive": 0,
        "options": {"top_k": 3, "temperature": 0, "session_id": "x"},
    }  # fmt: skip


def test_without_options_there_is_no_options_field():
    assert body(calls.generate("m", "", False, {})) == {"model": "m", "prompt": "", "stream": False}


def test_images_are_sent_as_base64():
    assert body(calls.generate("m", "", True, {"images": [b"\x00\x01", "QUJD"]}))["images"] == ["AAE=", "QUJD"]
    row = {"role": "user", "content": "", "images": [b"A"]}
    assert body(calls.chat("m", [row], True, {}))["messages"][0]["images"] == ["QQ=="]
    assert row["images"] == [b"A"]


def test_an_answered_message_can_be_sent_back():
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    message = Message.of({"role": "assistant", "content": "x", "tool_calls": [call], "extra": 5})
    sent = body(calls.chat("m", [message], True, {}))["messages"]
    assert sent == [{"role": "assistant", "content": "x", "tool_calls": [call], "extra": 5}]


def test_a_message_made_by_hand_can_be_sent():
    sent = body(calls.chat("m", [Message(role="user", content="x")], True, {}))["messages"]
    assert sent == [{"role": "user", "content": "x"}]


def test_create_renames_from():
    assert body(calls.create("m", True, {"from_": "b", "system": None, "quantize": "q4_0"})) == {
        "model": "m", "stream": True, "from": "b", "quantize": "q4_0",
    }  # fmt: skip


def test_what_is_no_json_is_a_bad_request():
    with pytest.raises(BadRequest, match="JSON"):
        calls.generate("m", "", True, {"temperature": object()})
    with pytest.raises(BadRequest, match="mapping"):
        calls.generate("m", "", True, {"options": [1]})


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("localhost", 8000, "http://localhost:8000"),
        ("::1", 80, "http://[::1]:80"),
        ("https://a.b/ollama/", 8000, "https://a.b/ollama"),
    ],
)
def test_base_url(host, port, url):
    assert base_url(host, port) == url


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:x", "http://a/?q=1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="not a server's address"):
        checked(url)


def test_servers_stay_with_the_one_that_answered():
    servers = Servers(["http://a", "http://b/", "http://c"])
    assert servers.order() == ("http://a", "http://b", "http://c")
    servers.answered("http://b")
    assert servers.order() == ("http://b", "http://c", "http://a")


@pytest.mark.parametrize("urls", [[], "http://a"])
def test_servers_wants_a_list(urls):
    with pytest.raises(ConfigError):
        Servers(urls)


def test_only_what_was_surely_not_done_moves():
    ask, change = calls.generate("m", "", True, {}), calls.delete("m")
    away = UpstreamUnavailable("x")
    assert may_move(ask, away, sent=True)
    assert may_move(change, away, sent=False)
    assert not may_move(change, away, sent=True)
    assert may_move(change, CapacityError("x"), sent=True)
    assert may_move(change, NoNodes("x"), sent=True)
    assert not may_move(ask, ModelNotFound("x"), sent=True)
    assert not may_move(ask, UpstreamTimeout("x"), sent=True)
