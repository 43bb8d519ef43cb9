"""The answering side of /v1/responses: response objects and their event stream."""

from __future__ import annotations

from typing import Any

from osync.wire import sse
from osync.wire.answer import Codec, Ids, Reply, ToolCall, read_reply
from osync.wire.body import Object
from osync.wire.fields import flag, model_of, number, objects


class ResponsesCodec(Codec):
    """Writes a response as events; the whole object is the last event's."""

    def __init__(self, request: Object, ids: Ids) -> None:
        self._request = request
        self._ids = ids
        self._model = model_of(request)
        self._sampling = {key: number(request, key) for key in ("temperature", "top_p")}
        self._background = flag(request, "background")
        self._id = ""
        self._created = 0
        self._sequence = 0
        self._output: list[Object] = []
        self._open: Object | None = None
        self._pieces: list[str] = []

    def whole(self, native: Object) -> Object:
        """Return one response object."""
        reply = read_reply(native)
        self._take(reply)
        return self._completed(reply)

    def step(self, native: Object) -> bytes:
        """Return the events for one line."""
        reply = read_reply(native)
        out = self._take(reply)
        if reply.done:
            out += self._event("response.completed", response=self._completed(reply))
        return out

    def error(self, text: str) -> bytes:
        """Return the failed response, which is how this stream says that it broke."""
        out = self._start("", 0)
        failed = self._response("failed") | {"error": {"code": "server_error", "message": text}}
        return out + self._event("response.failed", response=failed)

    def _take(self, reply: Reply) -> bytes:
        out = self._start(reply.created_at, reply.created)
        if reply.thinking:
            out += self._more("reasoning", reply.thinking)
        if reply.text:
            out += self._more("message", reply.text)
        for call in reply.tool_calls:
            out += self._close() + self._call(call)
        if reply.done:
            if not self._output and self._open is None:
                out += self._begin("message")
            out += self._close()
        return out

    def _start(self, created_at: str, created: int) -> bytes:
        if self._id:
            return b""
        self._ids.stamp(created_at)
        self._id, self._created = self._ids.make("resp_"), created
        first = self._event("response.created", response=self._response("in_progress"))
        return first + self._event("response.in_progress", response=self._response("in_progress"))

    def _more(self, kind: str, piece: str) -> bytes:
        out = b""
        if self._open is None or self._open["type"] != kind:
            out = self._close() + self._begin(kind)
        self._pieces.append(piece)
        if kind == "reasoning":
            return out + self._part("response.reasoning_summary_text.delta", "summary_index", delta=piece)
        return out + self._part("response.output_text.delta", "content_index", delta=piece, logprobs=[])

    def _begin(self, kind: str) -> bytes:
        if kind == "reasoning":
            self._open = {"id": self._ids.make("rs_"), "type": kind, "summary": []}
            out = self._item("response.output_item.added", self._open)
            empty = {"type": "summary_text", "text": ""}
            return out + self._part("response.reasoning_summary_part.added", "summary_index", part=empty)
        self._open = {"id": self._ids.make("msg_"), "type": kind, "role": "assistant", "content": []}
        out = self._item("response.output_item.added", self._open | {"status": "in_progress"})
        return out + self._part("response.content_part.added", "content_index", part=_text_part(""))

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        whole = "".join(self._pieces)
        if self._open["type"] == "reasoning":
            part: Object = {"type": "summary_text", "text": whole}
            # Plain text, as Ollama does it: clients hand this field back with the history.
            item = self._open | {"summary": [part], "encrypted_content": whole}
            out = self._part("response.reasoning_summary_text.done", "summary_index", text=whole)
            out += self._part("response.reasoning_summary_part.done", "summary_index", part=part)
        else:
            part = _text_part(whole)
            item = self._open | {"status": "completed", "content": [part]}
            out = self._part("response.output_text.done", "content_index", text=whole, logprobs=[])
            out += self._part("response.content_part.done", "content_index", part=part)
        out += self._item("response.output_item.done", item)
        self._output.append(item)
        self._open = None
        self._pieces.clear()
        return out

    def _call(self, call: ToolCall) -> bytes:
        arguments = call.arguments_json
        names = {"call_id": call.id or self._ids.make("call_"), "name": call.name}
        item = {"id": self._ids.make("fc_"), "type": "function_call", "status": "completed", **names}
        place: Object = {"item_id": item["id"], "output_index": len(self._output)}
        begun = item | {"status": "in_progress", "arguments": ""}
        out = self._item("response.output_item.added", begun)
        out += self._event("response.function_call_arguments.delta", **place, delta=arguments)
        done = {**place, "name": call.name, "arguments": arguments}
        out += self._event("response.function_call_arguments.done", **done)
        out += self._item("response.output_item.done", item | {"arguments": arguments})
        self._output.append(item | {"arguments": arguments})
        return out

    def _part(self, kind: str, index: str, **data: Any) -> bytes:
        item_id = self._open["id"] if self._open else ""
        place = {"item_id": item_id, "output_index": len(self._output), index: 0}
        return self._event(kind, **place, **data)

    def _item(self, kind: str, item: Object) -> bytes:
        return self._event(kind, output_index=len(self._output), item=item)

    def _event(self, kind: str, **data: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._sequence, **data}
        self._sequence += 1
        return sse.frame(value, kind)

    def _completed(self, reply: Reply) -> Object:
        response = self._response("completed")
        response["completed_at"] = reply.created or self._created
        response["usage"] = {
            "input_tokens": reply.prompt_tokens,
            "output_tokens": reply.output_tokens,
            "total_tokens": reply.prompt_tokens + reply.output_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        if reply.reason == "length":
            # Ollama says "completed" for a cut answer too, and clients wait for that event.
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _response(self, status: str) -> Object:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "incomplete_details": None,
            "model": self._model,
            "previous_response_id": None,
            "instructions": request.get("instructions"),
            "output": list(self._output),
            "error": None,
            "tools": [_echo_tool(tool) for tool in objects(request, "tools")],
            "tool_choice": "auto",
            "truncation": request.get("truncation") or "disabled",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}} | (request.get("text") or {}),
            "top_p": 1.0 if self._sampling["top_p"] is None else self._sampling["top_p"],
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": 0,
            "temperature": 1.0 if self._sampling["temperature"] is None else self._sampling["temperature"],
            "reasoning": request.get("reasoning"),
            "usage": None,
            "max_output_tokens": request.get("max_output_tokens"),
            "max_tool_calls": None,
            "store": False,
            "background": self._background,
            "service_tier": "default",
            "metadata": request.get("metadata") or {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }


def _text_part(text: str) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _echo_tool(tool: Object) -> Object:
    if tool.get("type") != "function":
        return tool
    return {"description": None, "strict": None, "parameters": None} | tool
