"""OpenAI's /v1/responses over /api/chat. Stateless, as in Ollama: previous_response_id is not read."""

from __future__ import annotations

from typing import Any

from osync.errors import BadRequest
from osync.wire.body import Object
from osync.wire.fields import (
    flag,
    image_of_url,
    integer,
    member,
    model_of,
    number,
    objects,
    text,
    tool_arguments,
    wrong_type,
)
from osync.wire.openai_chat import native_role, response_format, thinking

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


def responses_request(request: Object) -> Object:
    """Return the /api/chat body for a Responses request."""
    temperature, top_p = number(request, "temperature"), number(request, "top_p")
    options: Object = {"temperature": 1.0 if temperature is None else temperature}
    # No default of 1.0 here: Ollama leaves top_p to the model on this route.
    if top_p is not None:
        options["top_p"] = top_p
    limit = integer(request, "max_output_tokens")
    if limit is not None:
        options["num_predict"] = limit
    native: Object = {
        "model": model_of(request),
        "messages": _messages(request),
        "stream": flag(request, "stream"),
        "options": options,
    }
    tools = [_tool(tool) for tool in objects(request, "tools") if text(tool, "type") == "function"]
    if tools:
        native["tools"] = tools
    wanted = response_format(member(member(request, "text") or {}, "format"))
    if wanted is not None:
        native["format"] = wanted
    think = thinking(text(member(request, "reasoning") or {}, "effort"))
    if think is not None:
        native["think"] = think
    return native


def _tool(tool: Object) -> Object:
    function = {"name": text(tool, "name"), "description": text(tool, "description")}
    return {"type": "function", "function": {**function, "parameters": member(tool, "parameters") or {}}}


def _messages(request: Object) -> list[Object]:
    messages: list[Object] = []
    instructions = text(request, "instructions")
    if instructions:
        messages.append({"role": "system", "content": instructions})
    given = request.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if given is None:
        raise BadRequest("input is required")
    if not isinstance(given, list):
        raise wrong_type("input", "a string or a list of items")
    thought = ""
    for item in objects(request, "input"):
        thought = _add(messages, item, thought)
    if thought:
        messages.append({"role": "assistant", "content": "", "thinking": thought})
    return messages


def _add(messages: list[Object], item: Object, thought: str) -> str:
    """Add one input item; return the reasoning that waits for the assistant's next message."""
    kind = text(item, "type") or ("message" if "role" in item else "")
    if kind == "reasoning":
        return text(item, "encrypted_content") or _content(item.get("summary"))[0]
    if kind == "message":
        role = native_role(text(item, "role"))
        content, images = _content(item.get("content"))
        message: Object = {"role": role, "content": content}
        if images:
            message["images"] = images
        messages.append(message)
        return _think(message, thought) if role == "assistant" else thought
    if kind == "function_call":
        function = {"name": text(item, "name"), "arguments": tool_arguments(item.get("arguments"))}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append({"id": text(item, "call_id"), "function": function})
        return _think(messages[-1], thought)
    if kind == "function_call_output":
        messages.append(_tool_result(messages, item))
        return thought
    if kind == "web_search_call":
        return thought
    raise BadRequest(f"unknown input item type: {kind!r}" if kind else "input item missing required 'type' field")


def _think(message: Object, thought: str) -> str:
    if thought:
        message["thinking"] = thought
    return ""


def _tool_result(messages: list[Object], item: Object) -> Object:
    call_id = text(item, "call_id")
    content, images = _content(item.get("output"))
    message: Object = {"role": "tool", "content": content, "tool_call_id": call_id}
    if images:
        message["images"] = images
    for earlier in reversed(messages):
        for call in earlier.get("tool_calls", ()):
            if call["id"] == call_id:
                return message | {"tool_name": call["function"]["name"]}
    return message


def _content(content: Any) -> tuple[str, list[str]]:
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise wrong_type("content", "a string or a list of parts")
    texts: list[str] = []
    images: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS:
            texts.append(text(part, "text"))
        elif kind == "refusal":
            texts.append(text(part, "refusal"))
        elif kind == "input_image":
            url = text(part, "image_url")
            if not url:
                raise BadRequest("input_image needs an image_url with a base64 data URI")
            images.append(image_of_url(url))
        elif kind == "input_file":
            raise BadRequest("file inputs are not currently supported")
        else:
            raise BadRequest(f"unknown content type: {kind!r}")
    return "".join(texts), images
