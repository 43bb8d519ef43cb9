from __future__ import annotations

import orjson
import pytest

from osync import errors
from osync.wire.errors import Surface, error_body, stream_error, surface_of
from tests.unit.native_answers import events

SURFACES: list[Surface] = ["native", "openai", "anthropic"]


def classes(root: type[errors.OsyncError]) -> list[type[errors.OsyncError]]:
    return [root, *(found for child in root.__subclasses__() for found in classes(child))]


def text_in(surface: Surface, value):
    return value["error"] if surface == "native" else value["error"]["message"]


@pytest.mark.parametrize(
    ("path", "surface"),
    [
        ("/api/chat", "native"),
        ("/", "native"),
        ("/v1", "native"),
        ("/v1/models", "openai"),
        ("/v1/chat/completions?x=1", "openai"),
        ("/v1/audio/transcriptions", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages?beta=true", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messagesx", "openai"),
    ],
)
def test_surface_of(path, surface):
    assert surface_of(path) == surface


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("kind", classes(errors.OsyncError), ids=lambda kind: kind.__name__)
def test_every_error_has_a_body(kind, surface):
    # Errors of other packages, known here once something imported them, may want more than their text.
    error = kind("why not") if kind.__module__ == errors.__name__ else kind.__new__(kind, "why not")
    value = orjson.loads(error_body(surface, kind.status, str(error), "req_1"))
    assert text_in(surface, value) == "why not"
    if surface == "anthropic":
        assert value["type"] == "error" and value["request_id"] == "req_1"
    if surface == "openai":
        assert set(value["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "invalid_request_error", "authentication_error"),
        (403, "invalid_request_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "api_error", "rate_limit_error"),
        (500, "api_error", "api_error"),
        (502, "api_error", "api_error"),
        (503, "api_error", "overloaded_error"),
        (529, "api_error", "overloaded_error"),
    ],
)
def test_types(status, openai, anthropic):
    assert orjson.loads(error_body("openai", status, "x"))["error"]["type"] == openai
    assert orjson.loads(error_body("anthropic", status, "x"))["error"]["type"] == anthropic


def test_no_request_id_no_key():
    assert "request_id" not in orjson.loads(error_body("anthropic", 500, "x"))


def test_stream_errors():
    assert stream_error("native", "lost") == b'{"error":"lost"}\n'
    assert stream_error("native", "lost", midline=True) == b'\n{"error":"lost"}\n'
    assert stream_error("openai", "lost", sse=False).endswith(b"}\n")
    [(name, value)] = events(stream_error("openai", "lost"))
    assert name is None and value["error"]["message"] == "lost"
    [(name, value)] = events(stream_error("anthropic", "lost"))
    assert name == "error" and value == {"type": "error", "error": {"type": "api_error", "message": "lost"}}


@pytest.mark.parametrize("surface", ["openai", "anthropic"])
def test_an_error_after_half_a_line_is_an_event_of_its_own(surface):
    lines = (b'data: {"a"' + stream_error(surface, "lost", midline=True)).split(b"\n\n")
    assert b"lost" in lines[1] and lines[0] == b'data: {"a"'
