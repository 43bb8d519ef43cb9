"""Anthropic's /v1/messages over /api/chat: the request."""

from __future__ import annotations

from typing import Any

from osync.errors import BadRequest
from osync.wire.body import Object
from osync.wire.fields import (
    flag,
    image_data,
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

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "max"}


def messages_request(request: Object) -> Object:
    """Return the /api/chat body for a Messages request."""
    model = model_of(request)
    limit = integer(request, "max_tokens")
    if limit is None or limit <= 0:
        raise BadRequest("max_tokens is required and must be positive")
    given = objects(request, "messages")
    if not given:
        raise BadRequest("messages is required")
    messages: list[Object] = []
    system = _system(request.get("system"))
    if system:
        messages.append({"role": "system", "content": system})
    names: dict[str, str] = {}
    for message in given:
        messages.extend(_messages(message, names))
    options: Object = {"num_predict": limit}
    found = {
        "temperature": number(request, "temperature"),
        "top_p": number(request, "top_p"),
        "top_k": integer(request, "top_k"),
        "stop": strings(request, "stop_sequences") or None,
    }
    options |= {key: value for key, value in found.items() if value is not None}
    native: Object = {
        "model": model,
        "messages": messages,
        "stream": flag(request, "stream"),
        "options": options,
    }
    # Anthropic's own server tools have a type and no schema: the backend cannot run them.
    tools = [_tool(tool) for tool in objects(request, "tools") if text(tool, "type") in ("", "custom")]
    if tools:
        native["tools"] = tools
    think = _think(request)
    if think is not None:
        native["think"] = think
    return native


def _think(request: Object) -> Any:
    kind = text(member(request, "thinking") or {}, "type")
    if kind in ("enabled", "disabled"):
        return kind == "enabled"
    return _EFFORTS.get(text(member(request, "output_config") or {}, "effort").strip().lower())


def _tool(tool: Object) -> Object:
    function = {"name": text(tool, "name"), "description": text(tool, "description")}
    return {"type": "function", "function": {**function, "parameters": member(tool, "input_schema") or {}}}


def _system(system: Any) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    blocks = objects({"system": system}, "system")
    return "".join(text(block, "text") for block in blocks if block.get("type") == "text")


def _messages(message: Object, names: dict[str, str]) -> list[Object]:
    """Return the native messages for one of Anthropic's; tool results come before a user's own words."""
    role = text(message, "role").lower()
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"invalid message role: {role!r}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise wrong_type("content", "a string or a list of blocks")
    own: Object = {"role": role, "content": ""}
    results: list[Object] = []
    for block in objects(message, "content"):
        kind = block.get("type")
        if kind == "text":
            own["content"] += text(block, "text")
        elif kind == "image":
            own.setdefault("images", []).append(_image(block))
        elif kind == "thinking":
            own["thinking"] = text(block, "thinking")
        elif kind in ("tool_use", "server_tool_use"):
            own.setdefault("tool_calls", []).append(_tool_use(block, names))
        elif kind in ("tool_result", "web_search_tool_result"):
            results.append(_tool_result(block, names))
    if not own["content"] and len(own) == 2:
        return results
    return [*results, own] if role == "user" else [own, *results]


def _tool_use(block: Object, names: dict[str, str]) -> Object:
    for key in ("id", "name"):
        if not text(block, key):
            raise BadRequest(f"tool_use block missing required '{key}' field")
    names[block["id"]] = block["name"]
    function = {"name": block["name"], "arguments": tool_arguments(block.get("input"))}
    return {"id": block["id"], "function": function}


def _tool_result(block: Object, names: dict[str, str]) -> Object:
    call_id = text(block, "tool_use_id")
    result: Object = {"role": "tool", "content": "", "tool_call_id": call_id}
    if call_id in names:
        result["tool_name"] = names[call_id]
    content = block.get("content")
    if isinstance(content, str):
        return result | {"content": content}
    for part in objects({"content": content}, "content") if isinstance(content, list) else ():
        kind = part.get("type")
        if kind == "text":
            result["content"] += text(part, "text")
        elif kind == "image":
            result.setdefault("images", []).append(_image(part))
        elif kind == "web_search_result":
            result["content"] += f"- {text(part, 'title')}: {text(part, 'url')}\n"
    return result


def _image(block: Object) -> str:
    source = member(block, "source")
    if source is None:
        raise BadRequest("invalid image source")
    kind = text(source, "type")
    if kind != "base64":
        raise BadRequest(f"invalid image source type: {kind}. Only base64 images are supported.")
    return image_data(text(source, "data"))
