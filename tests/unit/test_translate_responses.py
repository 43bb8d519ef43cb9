from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from osync.errors import BadRequest
from osync.wire.translate import Translated, translate
from tests.unit.native_answers import CALL, NDJSON, PIECES, ask, chat_lines, chat_object, events, run, whole

PATH = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}


def respond(stream: bool = False, **fields: Any) -> Translated:
    return ask(PATH, stream, **{"input": "hello", **fields})


def test_request():
    schema = {"type": "object"}
    found = respond(
        instructions="be brief",
        max_output_tokens=5,
        top_p=0.5,
        reasoning={"effort": "low"},
        tools=[TOOL, {"type": "web_search"}],
        text={"format": {"type": "json_schema", "name": "s", "schema": schema}},
    )
    assert found.target == "/api/chat"
    function = {"name": "weather", "description": "", "parameters": {"type": "object"}}
    assert orjson.loads(found.body) == {
        "model": "smol",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "stream": False,
        "options": {"temperature": 1.0, "top_p": 0.5, "num_predict": 5},
        "tools": [{"type": "function", "function": function}],
        "format": schema,
        "think": "low",
    }


def test_items():
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Oslo"}'}
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw=="}
    items = [
        {"role": "developer", "content": "brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "see"}, image]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "let me look"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "web_search_call", "id": "w"},
        {"type": "reasoning", "encrypted_content": "so"},
    ]
    assert orjson.loads(respond(input=items).body)["messages"] == [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "see", "images": ["iVBORw=="]},
        {
            "role": "assistant",
            "content": "let me look",
            "thinking": "hm",
            "tool_calls": [{"id": "c1", **CALL}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "tool_name": "weather"},
        {"role": "assistant", "content": "", "thinking": "so"},
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"input": None}, "input is required"),
        ({"input": 3}, "'input'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unknown input item type"),
        ({"input": [{}]}, "missing required 'type'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "file inputs"),
        ({"input": [{"role": "user", "content": [{"type": "odd"}]}]}, "unknown content type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "image_url"),
        ({"reasoning": {"effort": "vast"}}, "invalid reasoning value"),
        ({"tools": "x"}, "'tools'"),
    ],
)
def test_bad_requests(fields, text):
    with pytest.raises(BadRequest, match=text):
        translate(PATH, orjson.dumps({"model": "m", "input": "x", **fields}))


def test_whole_response():
    found = Response.model_validate(
        whole(
            respond(tools=[{"type": "function", "name": "f"}], instructions="x"),
            chat_object({"content": "Hi", "thinking": "hm", "tool_calls": [CALL]}),
        )
    )
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
    assert found.output_text == "Hi" and found.status == "completed" and found.instructions == "x"
    assert found.usage is not None and found.usage.total_tokens == 10 and found.created_at == 1767323045


def test_an_empty_answer_has_one_empty_message():
    found = Response.model_validate(whole(respond(), chat_object({"content": ""}, "load")))
    assert found.output_text == "" and [item.type for item in found.output] == ["message"]


def test_a_cut_answer_says_why():
    found = Response.model_validate(whole(respond(), chat_object({"content": "Hi"}, "length")))
    assert found.incomplete_details is not None and found.incomplete_details.reason == "max_output_tokens"


def test_stream_order():
    found = events(run(respond(True), chat_lines({"content": "H"}, {"content": "i"})))
    assert [name for name, _ in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


@settings(deadline=None)
@given(PIECES, st.lists(st.integers(0, 10_000), max_size=5).map(tuple))
def test_every_cut_gives_the_same_stream(pieces, cuts):
    lines = chat_lines(*pieces)
    body = run(respond(True), lines)
    assert run(respond(True), lines, cuts=cuts) == body
    found = events(body)
    for number, (name, value) in enumerate(found):
        assert value["sequence_number"] == number and value["type"] == name
        EVENT.validate_python(value)
    text = "".join(piece["content"] for piece in pieces)
    assert "".join(v["delta"] for n, v in found if n == "response.output_text.delta") == text
    final = Response.model_validate(found[-1][1]["response"])
    assert found[-1][0] == "response.completed" and final.output_text == text
    done = [v["item"] for n, v in found if n == "response.output_item.done"]
    assert done == found[-1][1]["response"]["output"]
    assert [v["output_index"] for n, v in found if n == "response.output_item.added"] == list(range(len(done)))


def test_a_broken_stream_is_a_failed_response():
    answer = respond(True).answer
    answer.head(NDJSON)
    answer.feed(chat_lines({"content": "Hi"}).split(b"\n")[0] + b"\n")
    [(name, value)] = events(answer.fail("lost"))
    EVENT.validate_python(value)
    assert name == "response.failed" and value["response"]["error"]["message"] == "lost"
    assert answer.finish() == b""


def test_an_error_line_before_anything_else():
    found = events(run(respond(True), b'{"error":"lost"}\n'))
    assert [name for name, _ in found] == ["response.created", "response.in_progress", "response.failed"]
