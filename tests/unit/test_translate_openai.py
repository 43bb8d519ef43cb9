from __future__ import annotations

import base64
import struct
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from osync.errors import BadRequest, FrameTooLarge, StreamBroken
from osync.types import ResponseHead
from osync.wire import answer as answer_module
from osync.wire.translate import Translated, translate
from tests.unit.native_answers import (
    CALL,
    JSON,
    NDJSON,
    PIECES,
    STAMP,
    ask,
    chat_lines,
    chat_object,
    events,
    run,
    whole,
)

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
PIXEL = base64.b64encode(b"\x89PNG").decode()


def chat(stream: bool = False, **fields: Any) -> Translated:
    return ask(CHAT, stream, **{"messages": HELLO, **fields})


def native(path: str = CHAT, **fields: Any) -> Any:
    return orjson.loads(ask(path, **fields).body)


def generate_lines(*texts: str, **end: Any) -> bytes:
    common = {"model": "smol", "created_at": STAMP}
    lines: list[dict[str, Any]] = [{**common, "response": text, "done": False} for text in texts]
    lines.append({**common, "response": "", "done": True, "done_reason": "stop", "eval_count": 2, **end})
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def test_other_routes_are_not_translated():
    assert translate("/v1/audio/transcriptions", b"x") is None
    assert translate("/api/chat", b"{}") is None


def test_chat_request_defaults():
    found = chat()
    assert found.target == "/api/chat"
    assert orjson.loads(found.body) == {
        "model": "smol",
        "messages": HELLO,
        "stream": False,
        "options": {"temperature": 1.0, "top_p": 1.0},
    }


def test_chat_options():
    fields: dict[str, Any] = {"max_tokens": 9, "temperature": 0, "top_p": 0.5, "seed": 4, "stop": "x", "n": 3}
    body = native(messages=HELLO, frequency_penalty=1, presence_penalty=0.5, **fields)
    assert body["options"] == {
        "num_predict": 9,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 4,
        "stop": ["x"],
        "frequency_penalty": 1,
        "presence_penalty": 0.5,
    }
    body = native(messages=HELLO, max_completion_tokens=5, max_tokens=9, stop=["a", "b"])
    assert body["options"]["num_predict"] == 5 and body["options"]["stop"] == ["a", "b"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "key", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, "format", "json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "format", SCHEMA),
        ({"response_format": {"type": "text"}}, "format", None),
        ({"reasoning_effort": "low"}, "think", "low"),
        ({"reasoning": {"effort": "none"}}, "think", False),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", 2),
        ({"logprobs": False}, "logprobs", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", [
            {"type": "function", "function": {"name": "f"}}
        ]),
    ],
)  # fmt: skip
def test_chat_fields(fields, key, wanted):
    assert native(messages=HELLO, **fields).get(key) == wanted


def test_messages_with_tools_images_and_roles():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    url = {"url": f"data:image/png;base64,{PIXEL}"}
    body = native(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": url}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
    )
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "see", "images": [PIXEL]},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "content": "rain", "tool_name": "weather", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (CHAT, b"", "missing request body"),
        (CHAT, b"{", "unexpected EOF"),
        (CHAT, b"[]", "cannot unmarshal array into Go value of type api.ChatCompletionRequest"),
        (CHAT, b'{"messages":[{"role":"user","content":"x"}]}', "model is required"),
        (CHAT, b'{"model":"m"}', "too short - 'messages'"),
        (CHAT, b'{"model":"m","messages":"x"}', "invalid type for 'messages'"),
        (CHAT, b'{"model":"m","messages":[{"content":"x"}]}', "no role"),
        (CHAT, b'{"model":"m","messages":[{"role":"user","content":null}]}', "'content'"),
        (CHAT, b'{"model":"m","messages":[{"role":"user","content":[{"type":"video"}]}]}', "video"),
        (CHAT, b'{"model":"m","messages":[{"role":"user","content":[1]}]}', "invalid message format"),
        (CHAT, b'{"model":1,"messages":[{"role":"user","content":"x"}]}', "'model'"),
        ("/v1/completions", b'{"model":"m","prompt":["a","b"]}', "only one prompt"),
        ("/v1/completions", b'{"model":"m","prompt":7}', "'prompt'"),
        ("/v1/embeddings", b'{"model":"m"}', "invalid input"),
        ("/v1/embeddings", b'{"model":"m","input":[]}', "invalid input"),
        ("/v1/embeddings", b'{"model":"m","input":[1,2]}', "invalid input type"),
        ("/v1/embeddings", b'{"model":"m","input":"x","encoding_format":"int8"}', "encoding_format"),
    ],
)
def test_bad_requests(path, body, text):
    with pytest.raises(BadRequest, match=text):
        translate(path, body)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"seed": 1.5},
        {"max_tokens": True},
        {"stop": [1]},
        {"stream": "yes"},
        {"tools": {}},
        {"response_format": "json"},
        {"reasoning_effort": "enormous"},
        {"stream_options": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": [1]}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,?"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
    ],
)
def test_wrong_types(fields):
    with pytest.raises(BadRequest):
        translate(CHAT, orjson.dumps({"model": "m", "messages": HELLO, **fields}))


def test_numbers_beyond_floats_are_refused():
    with pytest.raises(BadRequest):
        translate(CHAT, b'{"model":"m","messages":[{"role":"user","content":"x"}],"seed":1e999}')


def test_whole_chat():
    value = whole(chat(), chat_object({"content": "Hi", "thinking": "hm"}))
    found = ChatCompletion.model_validate(value)
    assert found.choices[0].message.content == "Hi" and value["choices"][0]["message"]["reasoning"] == "hm"
    assert found.choices[0].finish_reason == "stop" and found.created == 1767323045
    assert found.usage is not None and found.usage.total_tokens == 10
    assert found.id.startswith("chatcmpl-") and found.system_fingerprint == "fp_ollama" and found.model == "smol"


def test_whole_chat_with_tool_calls_and_length():
    found = ChatCompletion.model_validate(whole(chat(), chat_object({"content": "", "tool_calls": [CALL]})))
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city":"Oslo"}'
    value = whole(chat(), chat_object({"content": "a"}, "length"))
    assert value["choices"][0]["finish_reason"] == "length"
    value = whole(chat(), chat_object({"content": ""}, "load"))
    assert ChatCompletion.model_validate(value).choices[0].finish_reason == "stop"


def test_logprobs():
    item = {"token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}]}
    lines = chat_lines({"content": "Hi"}).replace(b'"done":false', b'"done":false,"logprobs":' + orjson.dumps([item]))
    first = events(run(chat(True, logprobs=True), lines))[0][1]
    chunk = ChatCompletionChunk.model_validate(first)
    assert chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.content is not None
    assert chunk.choices[0].logprobs.content[0].logprob == -0.5


def test_stream_order():
    found = events(
        run(chat(True, stream_options={"include_usage": True}), chat_lines({"content": "Hi"}, {"content": "!"}))
    )
    assert found[-1] == (None, "[DONE]")
    chunks = [value for _, value in found[:-1]]
    for value in chunks:
        ChatCompletionChunk.model_validate(value)
    assert [c["choices"][0]["delta"] if c["choices"] else None for c in chunks] == [
        {"role": "assistant", "content": "Hi"},
        {"content": "!"},
        {},
        None,
    ]
    assert chunks[2]["choices"][0]["finish_reason"] == "stop" and chunks[2]["usage"] is None
    assert chunks[3]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert len({c["id"] for c in chunks}) == 1


def test_a_load_answer_is_a_whole_stream():
    found = events(run(chat(True), chat_object({"content": ""}, "load"), JSON))
    assert [v if n or v == "[DONE]" else v["choices"][0]["delta"] for n, v in found] == [
        {"role": "assistant", "content": ""},
        {},
        "[DONE]",
    ]


def test_content_in_the_last_line_comes_before_the_finish():
    body = run(chat(True), chat_lines(message={"content": "end", "tool_calls": [CALL]}))
    chunks = [value for _, value in events(body)[:-1]]
    assert chunks[0]["choices"][0]["delta"]["content"] == "end"
    assert chunks[1]["choices"][0]["finish_reason"] == "tool_calls"


@settings(deadline=None)
@given(PIECES, st.lists(st.integers(0, 10_000), max_size=5).map(tuple), st.booleans())
def test_every_cut_gives_the_same_stream(pieces, cuts, usage):
    fields = {"stream_options": {"include_usage": usage}}
    lines = chat_lines(*pieces)
    body = run(chat(True, **fields), lines)
    assert run(chat(True, **fields), lines, cuts=cuts) == body
    assert run(chat(True, **fields), lines.rstrip(b"\n")) == body
    *chunks, (_, done) = events(body)
    assert done == "[DONE]"
    deltas = [choice["delta"] for _, value in chunks for choice in value["choices"]]
    for _, value in chunks:
        ChatCompletionChunk.model_validate(value)
    assert "".join(d.get("content", "") for d in deltas) == "".join(p["content"] for p in pieces)
    assert "".join(d.get("reasoning", "") for d in deltas) == "".join(p.get("thinking", "") for p in pieces)
    calls = [call for d in deltas for call in d.get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    assert len(calls) == sum(len(p.get("tool_calls", [])) for p in pieces)
    assert len({call["id"] for call in calls}) == len(calls)
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"]


def test_heads():
    found = chat(True)
    assert found.answer.head(NDJSON).headers == (("Content-Type", "text/event-stream"), ("X-Osync-Node", "n1"))
    assert found.answer.streaming
    found = chat()
    assert found.answer.head(JSON) == ResponseHead(200, (("Content-Type", "application/json"),))
    assert not found.answer.streaming


@pytest.mark.parametrize("stream", [True, False])
def test_native_errors_keep_their_status(stream):
    found = chat(stream)
    head = found.answer.head(ResponseHead(404, (("Content-Type", "application/json"), ("Retry-After", "1"))))
    assert head == ResponseHead(404, (("Content-Type", "application/json"), ("Retry-After", "1")))
    assert found.answer.feed(b'{"error":"model ') + found.answer.feed(b"'m' not found\"}") == b""
    value = orjson.loads(found.answer.finish())
    assert value["error"] == {
        "message": "model 'm' not found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }


def test_errors_that_are_not_json_keep_their_text():
    body = run(chat(), b"404 page not found", ResponseHead(404))
    assert orjson.loads(body)["error"]["message"] == "404 page not found"


def test_an_error_line_ends_the_stream_without_done():
    lines = chat_lines({"content": "Hi"}).split(b"\n")[0] + b'\n{"error":"out of memory"}\n'
    found = events(run(chat(True), lines + chat_lines({"content": "later"})))
    assert found[-1][1]["error"]["message"] == "out of memory" and len(found) == 2


@pytest.mark.parametrize("tail", [b"", b'{"message":', b"[1]\n"])
def test_a_stream_that_ends_early_says_so(tail):
    found = events(run(chat(True), chat_lines({"content": "Hi"}).split(b"\n")[0] + b"\n" + tail))
    assert "error" in found[-1][1] and "[DONE]" not in [value for _, value in found]


def test_fail():
    found = chat(True).answer
    found.head(NDJSON)
    found.feed(chat_lines({"content": "Hi"}).split(b"\n")[0] + b"\n")
    assert events(found.fail("node n1 is gone"))[0][1]["error"]["message"] == "node n1 is gone"
    assert found.fail("again") == found.finish() == found.feed(chat_lines()) == b""
    found = chat().answer
    found.head(JSON)
    assert orjson.loads(found.fail("node n1 is gone"))["error"]["type"] == "api_error"


def test_fail_after_the_end_adds_nothing():
    found = chat(True).answer
    found.head(NDJSON)
    assert found.feed(chat_lines()).endswith(b"data: [DONE]\n\n")
    assert found.fail("late") == b""


def test_an_answer_has_a_bound(monkeypatch):
    monkeypatch.setattr(answer_module, "MAX_WHOLE", 10)
    found = chat().answer
    found.head(JSON)
    with pytest.raises(FrameTooLarge):
        found.feed(b"x" * 11)


def test_arguments_nested_too_deeply_are_an_error_not_a_crash():
    deep = b'{"a":' * 300 + b"1" + b"}" * 300
    line = b'{"message":{"tool_calls":[{"function":{"name":"f","arguments":' + deep + b"}}]}}"
    assert b"too deeply" in run(chat(True), line + b"\n")
    with pytest.raises(StreamBroken, match="too deeply"):
        run(chat(), line, JSON)


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"error":"lost"}', b'{"done"'])
def test_a_whole_answer_that_is_none_can_still_become_an_error_status(body):
    with pytest.raises(StreamBroken):
        run(chat(), body, JSON)


def test_ids_differ_by_seed_time_and_body():
    body = orjson.dumps({"model": "m", "messages": HELLO})
    seen = set()
    for seed, stamp in (("", STAMP), ("r1", STAMP), ("", "2026-01-02T03:04:05.2Z"), ("", STAMP)):
        found = translate(CHAT, body, seed)
        assert found is not None
        seen.add(whole(found, chat_object({"content": ""}).replace(STAMP.encode(), stamp.encode()))["id"])
    assert len(seen) == 3


def test_completion_request():
    found = ask("/v1/completions", prompt="def f(", suffix="return", logprobs=2, max_tokens=3)
    assert found.target == "/api/generate"
    assert orjson.loads(found.body) == {
        "model": "smol",
        "prompt": "def f(",
        "suffix": "return",
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
        "options": {"temperature": 1.0, "top_p": 1.0, "num_predict": 3},
    }
    assert native("/v1/completions", prompt=["one"])["prompt"] == "one"


def test_whole_completion():
    logprobs = [{"token": "a", "logprob": -1, "top_logprobs": [{"token": "a", "logprob": -1}]}]
    line = {"created_at": STAMP, "response": "a", "done": True, "done_reason": "length", "logprobs": logprobs}
    found = Completion.model_validate(whole(ask("/v1/completions", prompt="x"), orjson.dumps(line)))
    assert found.choices[0].text == "a" and found.choices[0].finish_reason == "length"
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.token_logprobs == [-1]
    assert found.choices[0].logprobs.top_logprobs == [{"a": -1}]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=5), st.integers(0, 999))
def test_completion_stream(texts, cut):
    fields = {"prompt": "x", "stream_options": {"include_usage": True}}
    lines = generate_lines(*texts)
    body = run(ask("/v1/completions", True, **fields), lines, cuts=(cut,))
    assert body == run(ask("/v1/completions", True, **fields), lines)
    *chunks, last, usage, (_, done) = events(body)
    assert "".join(value["choices"][0]["text"] for _, value in chunks) == "".join(texts)
    assert Completion.model_validate(last[1]).choices[0].finish_reason == "stop"
    assert Completion.model_validate(usage[1]).usage is not None and done == "[DONE]"


def test_embeddings():
    found = ask("/v1/embeddings", input=["a", "b"], dimensions=2)
    assert found.target == "/api/embed"
    assert orjson.loads(found.body) == {"model": "smol", "input": ["a", "b"], "dimensions": 2}
    answer = orjson.dumps({"embeddings": [[0.5, 1], [0, -1]], "prompt_eval_count": 4})
    value = CreateEmbeddingResponse.model_validate(whole(found, answer))
    assert [row.embedding for row in value.data] == [[0.5, 1], [0, -1]]
    assert value.usage.prompt_tokens == value.usage.total_tokens == 4
    packed = whole(ask("/v1/embeddings", input="a", encoding_format="base64"), answer)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (0.5, 1)


def test_embeddings_that_are_no_numbers():
    found = ask("/v1/embeddings", input="a", encoding_format="base64")
    with pytest.raises(StreamBroken):
        whole(found, b'{"embeddings":[["x"]]}')


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["type", "text", "role", "content", "function", "id", "url", "schema"]), inner),
    max_leaves=6,
), st.sampled_from([
    "model", "messages", "stream", "stop", "tools", "response_format", "reasoning", "logprobs", "input", "prompt",
    "max_tokens", "system", "thinking", "text", "instructions", "stream_options", "output_config", "metadata",
]), st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"]))  # fmt: skip
def test_any_field_gives_a_request_or_a_bad_request(value, key, path):
    body = {"model": "m", "messages": HELLO, "input": "x", "prompt": "x", "max_tokens": 1, key: value}
    try:
        found = translate(path, orjson.dumps(body))
    except BadRequest:
        return
    assert found is not None
    run(found, chat_lines({"content": "x"}) if found.answer.streaming else chat_object({"content": "x"}))


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["content", "tool_calls", "function", "arguments", "done", "thinking"]), inner),
    max_leaves=6,
), st.sampled_from(["message", "response", "created_at", "logprobs", "done", "eval_count", "error"]),
   st.sampled_from([CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]), st.booleans())  # fmt: skip
def test_any_native_value_is_survived(value, key, path, stream):
    found = ask(path, stream, messages=HELLO, input="x", prompt="x", max_tokens=1)
    try:
        assert run(found, orjson.dumps({"done": True, key: value}))
    except StreamBroken:
        assert key == "error" and not stream


def test_an_empty_text_is_embedded():
    """Ollama's own route would only load the model."""
    assert orjson.loads(ask("/v1/embeddings", input="").body)["input"] == [""]
