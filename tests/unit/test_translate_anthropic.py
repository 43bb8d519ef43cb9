from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from osync.errors import BadRequest
from osync.types import ResponseHead
from osync.wire.translate import Translated, translate
from tests.unit.native_answers import CALL, NDJSON, PIECES, ask, chat_lines, chat_object, events, run, whole

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
PIXEL = base64.b64encode(b"\x89PNG").decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def messages(stream: bool = False, **fields: Any) -> Translated:
    return ask(PATH, stream, **{"messages": HELLO, "max_tokens": 64, **fields})


def test_request():
    found = messages(
        system=[{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop_sequences=["x"],
        tools=[
            {"name": "weather", "description": "d", "input_schema": {"type": "object"}},
            {"type": "web_search_20250305", "name": "web_search"},
        ],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert found.target == "/api/chat"
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    assert orjson.loads(found.body) == {
        "model": "smol",
        "messages": [{"role": "system", "content": "be brief"}, *HELLO],
        "stream": False,
        "options": {"num_predict": 64, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["x"]},
        "tools": [{"type": "function", "function": function}],
        "think": True,
    }


def test_sampling_stays_the_models_own_by_default():
    assert orjson.loads(messages().body)["options"] == {"num_predict": 64}


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({"thinking": {"type": "disabled"}}, False),
        ({"output_config": {"effort": "xhigh"}}, "high"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
    ],
)
def test_think(fields, think):
    assert orjson.loads(messages(**fields).body).get("think") == think


def test_blocks():
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}, IMAGE]}
    found = messages(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, use]},
            {"role": "user", "content": [{"type": "text", "text": "well?"}, result]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t2", "content": "sun"}]},
        ]
    )
    assert orjson.loads(found.body)["messages"] == [
        {"role": "user", "content": "see", "images": [PIXEL]},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"id": "t1", **CALL}]},
        {"role": "tool", "content": "rain", "tool_call_id": "t1", "tool_name": "weather", "images": [PIXEL]},
        {"role": "user", "content": "well?"},
        {"role": "tool", "content": "sun", "tool_call_id": "t2"},
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 0}, "max_tokens is required and must be positive"),
        ({"max_tokens": None}, "max_tokens is required"),
        ({"messages": []}, "messages is required"),
        ({"model": ""}, "model is required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "invalid image source"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]}, "Only base64"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, "'id'"),
        ({"system": 7}, "'system'"),
        ({"stop_sequences": [1]}, "'stop_sequences'"),
    ],
)
def test_bad_requests(fields, text):
    with pytest.raises(BadRequest, match=text):
        translate(PATH, orjson.dumps({"model": "m", "max_tokens": 1, "messages": HELLO, **fields}))


def test_whole_message():
    found = Message.model_validate(
        whole(messages(), chat_object({"content": "Hi", "thinking": "hm", "tool_calls": [CALL]}))
    )
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]
    assert found.stop_reason == "tool_use" and found.usage.input_tokens == 7 and found.usage.output_tokens == 3
    assert found.id.startswith("msg_") and found.model == "smol"


@pytest.mark.parametrize(("native", "reason"), [("stop", "end_turn"), ("length", "max_tokens"), ("load", "end_turn")])
def test_stop_reasons(native, reason):
    assert whole(messages(), chat_object({"content": "Hi"}, native))["stop_reason"] == reason
    found = events(run(messages(True), chat_lines({"content": "Hi"}, done_reason=native)))
    assert found[-2][1]["delta"] == {"stop_reason": reason, "stop_sequence": None}


def test_stream_order():
    lines = chat_lines({"content": "", "thinking": "hm"}, {"content": "Hi"}, {"content": "", "tool_calls": [CALL]})
    found = events(run(messages(True), lines))
    assert all(name == value["type"] for name, value in found)
    assert [name for name, _ in found] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    assert [value["index"] for _, value in found if "index" in value] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found[-2][1]["usage"] == {"input_tokens": 7, "output_tokens": 3}


@settings(deadline=None)
@given(PIECES, st.lists(st.integers(0, 10_000), max_size=5).map(tuple))
def test_every_cut_gives_the_same_stream(pieces, cuts):
    lines = chat_lines(*pieces)
    body = run(messages(True), lines)
    assert run(messages(True), lines, cuts=cuts) == body
    found = [value for _, value in events(body)]
    deltas: list[dict[str, Any]] = []
    open_blocks: list[bool] = []
    for value in found:
        EVENT.validate_python(value)
        if value["type"] == "content_block_start":
            assert value["index"] == len(open_blocks)
            open_blocks.append(True)
        elif value["type"] == "content_block_delta":
            assert open_blocks[value["index"]]
            deltas.append(value["delta"])
        elif value["type"] == "content_block_stop":
            open_blocks[value["index"]] = False
    assert not any(open_blocks) and found[-1] == {"type": "message_stop"}
    assert "".join(d.get("text", "") for d in deltas) == "".join(p["content"] for p in pieces)
    assert "".join(d.get("thinking", "") for d in deltas) == "".join(p.get("thinking", "") for p in pieces)


def test_errors():
    body = run(messages(True), b'{"error":"server busy"}', ResponseHead(503))
    value = orjson.loads(body)
    assert value["error"] == {"type": "overloaded_error", "message": "server busy"}
    assert value["request_id"].startswith("req_")


def test_an_error_line_ends_the_stream():
    found = events(run(messages(True), chat_lines({"content": "Hi"}).split(b"\n")[0] + b'\n{"error":"lost"}\n'))
    assert found[-1] == ("error", {"type": "error", "error": {"type": "api_error", "message": "lost"}})
    assert "message_stop" not in [name for name, _ in found]


def test_fail_is_an_error_event():
    answer = messages(True).answer
    answer.head(NDJSON)
    assert events(answer.fail("lost"))[0][0] == "error"
