"""OpenAI's /v1/chat/completions over /api/chat."""

from __future__ import annotations

from typing import Any

from osync.errors import BadRequest
from osync.wire import sse
from osync.wire.answer import Codec, Ids, Reply, ToolCall, read_reply
from osync.wire.body import Object
from osync.wire.fields import (
    flag,
    image_of_url,
    integer,
    member,
    model_of,
    number,
    objects,
    strings,
    text,
    tool_arguments,
    wrong_type,
)

FINGERPRINT = "fp_ollama"

_EFFORTS: dict[str, Any] = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high"}
_EFFORTS |= {"xhigh": "max", "max": "max"}


def chat_request(request: Object) -> Object:
    """Return the /api/chat body for a chat completion request."""
    messages = objects(request, "messages")
    if not messages:
        raise BadRequest("[] is too short - 'messages'")
    tool_names = {
        text(call, "id"): text(member(call, "function") or {}, "name")
        for message in messages
        for call in objects(message, "tool_calls")
    }
    native: Object = {
        "model": model_of(request),
        "messages": [_message(message, tool_names) for message in messages],
        "stream": flag(request, "stream"),
        "options": sampling_options(request),
    }
    tools = objects(request, "tools")
    if tools:
        native["tools"] = tools
    wanted = response_format(member(request, "response_format"))
    if wanted is not None:
        native["format"] = wanted
    reasoning = member(request, "reasoning") or {}
    think = thinking(text(reasoning, "effort") or text(request, "reasoning_effort"))
    if think is not None:
        native["think"] = think
    if flag(request, "logprobs"):
        native["logprobs"] = True
        native["top_logprobs"] = integer(request, "top_logprobs") or 0
    return native


def sampling_options(request: Object) -> Object:
    """Return Ollama's options for OpenAI's sampling fields, with OpenAI's defaults."""
    temperature, top_p = number(request, "temperature"), number(request, "top_p")
    options: Object = {
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
    }
    limit = integer(request, "max_completion_tokens")
    limit = integer(request, "max_tokens") if limit is None else limit
    found = {
        "num_predict": limit,
        "seed": integer(request, "seed"),
        "frequency_penalty": number(request, "frequency_penalty"),
        "presence_penalty": number(request, "presence_penalty"),
        "stop": strings(request, "stop") or None,
    }
    return options | {key: value for key, value in found.items() if value is not None}


def response_format(wanted: Object | None) -> Any:
    """Return Ollama's format ("json" or a schema) for a response_format, None for text."""
    kind = text(wanted or {}, "type").strip().lower()
    if kind == "json_object":
        return "json"
    if kind == "json_schema" and wanted is not None:
        return member(member(wanted, "json_schema") or wanted, "schema")
    return None


def thinking(effort: str) -> Any:
    """Return Ollama's think for a reasoning effort, None where the model decides."""
    if effort and effort not in _EFFORTS:
        raise BadRequest(f"invalid reasoning value: '{effort}' (must be one of {', '.join(_EFFORTS)})")
    return _EFFORTS.get(effort)


def native_role(role: str) -> str:
    """Return the role that a chat template knows."""
    return "system" if role == "developer" else role


def _message(message: Object, tool_names: dict[str, str]) -> Object:
    role = text(message, "role").lower()
    if not role:
        raise BadRequest("a message has no role")
    native: Object = {"role": native_role(role)}
    thought = text(message, "reasoning") or text(message, "reasoning_content")
    calls = [_tool_call(call) for call in objects(message, "tool_calls")]
    native["content"], images = _content(message.get("content"), optional=bool(calls or thought))
    if images:
        native["images"] = images
    if thought:
        native["thinking"] = thought
    if calls:
        native["tool_calls"] = calls
    if role == "tool":
        call_id = text(message, "tool_call_id")
        native["tool_name"] = text(message, "name") or tool_names.get(call_id, "")
        native["tool_call_id"] = call_id
    return native


def _content(content: Any, optional: bool) -> tuple[str, list[str]]:
    if isinstance(content, str):
        return content, []
    if content is None and optional:
        return "", []
    if not isinstance(content, list):
        raise wrong_type("content", "a string or a list of parts")
    texts: list[str] = []
    images: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(text(part, "text"))
        elif kind == "refusal":
            texts.append(text(part, "refusal"))
        elif kind == "image_url":
            image = part.get("image_url")
            url = image if isinstance(image, str) else text(member(part, "image_url") or {}, "url")
            images.append(image_of_url(url))
        else:
            raise BadRequest(f"invalid message format: content part of type {kind!r} is not supported")
    return "\n".join(texts), images


def _tool_call(call: Object) -> Object:
    function = member(call, "function") or {}
    arguments = tool_arguments(function.get("arguments"))
    return {"id": text(call, "id"), "function": {"name": text(function, "name"), "arguments": arguments}}


def include_usage(request: Object) -> bool:
    """Return whether the client wants a usage chunk at a stream's end."""
    return flag(member(request, "stream_options") or {}, "include_usage")


def usage_of(reply: Reply) -> Object:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.output_tokens,
        "total_tokens": reply.prompt_tokens + reply.output_tokens,
    }


def finish_reason(reply: Reply, has_tool_calls: bool) -> str:
    """Return why the answer ended; a mere load or unload counts as a stop."""
    if has_tool_calls:
        return "tool_calls"
    return "length" if reply.reason == "length" else "stop"


def token_logprobs(reply: Reply) -> list[Object]:
    """Return native log probabilities with the fields that OpenAI's clients require."""
    return [{"bytes": None, "top_logprobs": []} | item for item in reply.logprobs]


class ChatCodec(Codec):
    """Writes chat.completion objects and their chunks."""

    def __init__(self, request: Object, ids: Ids) -> None:
        self._model = model_of(request)
        self._ids = ids
        self._usage = include_usage(request)
        self._id = ""
        self._created = 0
        self._calls = 0

    def whole(self, native: Object) -> Object:
        """Return one chat.completion."""
        reply = self._read(native)
        message: Object = {"role": "assistant", "content": reply.text}
        if reply.thinking:
            message["reasoning"] = reply.thinking
        if reply.tool_calls:
            message["tool_calls"] = [self._tool_call(call) for call in reply.tool_calls]
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(reply, self._calls > 0)}
        return {
            **self._base("chat.completion"),
            "choices": [choice | self._logprobs(reply)],
            "usage": usage_of(reply),
        }

    def step(self, native: Object) -> bytes:
        """Return the chunks for one line: content, then at the end finish, usage and [DONE]."""
        is_first = not self._id
        reply = self._read(native)
        delta: Object = {"role": "assistant", "content": reply.text} if is_first else {}
        if reply.text:
            delta["content"] = reply.text
        if reply.thinking:
            delta["reasoning"] = reply.thinking
        if reply.tool_calls:
            delta["tool_calls"] = [self._tool_call(call) for call in reply.tool_calls]
        out = self._chunk(delta, None, self._logprobs(reply)) if delta or reply.logprobs else b""
        if not reply.done:
            return out
        out += self._chunk({}, finish_reason(reply, self._calls > 0))
        if self._usage:
            base = self._base("chat.completion.chunk")
            out += sse.frame({**base, "choices": [], "usage": usage_of(reply)})
        return out + sse.DONE

    def _read(self, native: Object) -> Reply:
        reply = read_reply(native)
        if not self._id:
            self._ids.stamp(reply.created_at)
            self._id, self._created = self._ids.make("chatcmpl-"), reply.created
        return reply

    def _base(self, kind: str) -> Object:
        base = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return base | {"system_fingerprint": FINGERPRINT}

    def _chunk(self, delta: Object, reason: str | None, more: Object | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason} | (more or {})
        usage = {"usage": None} if self._usage else {}
        return sse.frame({**self._base("chat.completion.chunk"), "choices": [choice], **usage})

    def _tool_call(self, call: ToolCall) -> Object:
        index = self._calls
        self._calls += 1
        return {
            "id": call.id or self._ids.make("call_"),
            "index": index,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }

    @staticmethod
    def _logprobs(reply: Reply) -> Object:
        return {"logprobs": {"content": token_logprobs(reply)}} if reply.logprobs else {}
