"""The answering side of /v1/messages: messages and their event stream."""

from __future__ import annotations

from typing import Any, ClassVar

from osync.wire import sse
from osync.wire.answer import Codec, Ids, Reply, read_reply
from osync.wire.body import Object
from osync.wire.errors import Surface
from osync.wire.fields import model_of


class MessagesCodec(Codec):
    """Writes a message as content blocks, whole or as events."""

    surface: ClassVar[Surface] = "anthropic"

    def __init__(self, request: Object, ids: Ids, prompt_estimate: int) -> None:
        self._model = model_of(request)
        self._ids = ids
        self._prompt_estimate = prompt_estimate
        self._id = ""
        self._index = 0
        self._open = ""
        self._has_calls = False

    def whole(self, native: Object) -> Object:
        """Return one message."""
        reply = self._read(native)
        content: list[Object] = []
        if reply.thinking:
            content.append({"type": "thinking", "thinking": reply.thinking, "signature": ""})
        if reply.text:
            content.append({"type": "text", "text": reply.text})
        for call in reply.tool_calls:
            use = {"id": call.id or self._ids.make("toolu_"), "name": call.name, "input": call.arguments}
            content.append({"type": "tool_use", **use})
        self._has_calls = bool(reply.tool_calls)
        usage = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.output_tokens}
        return self._message(usage) | {"content": content, "stop_reason": self._stop_reason(reply)}

    def step(self, native: Object) -> bytes:
        """Return the events for one line."""
        is_first = not self._id
        reply = self._read(native)
        out = b""
        if is_first:
            # The true count comes with the end; until then an estimate, as Ollama gives.
            usage = {"input_tokens": reply.prompt_tokens or self._prompt_estimate, "output_tokens": 0}
            out += _event("message_start", message=self._message(usage))
        if reply.thinking:
            out += self._block("thinking", {"thinking": "", "signature": ""})
            out += self._delta({"type": "thinking_delta", "thinking": reply.thinking})
        if reply.text:
            out += self._block("text", {"text": ""})
            out += self._delta({"type": "text_delta", "text": reply.text})
        for call in reply.tool_calls:
            self._has_calls = True
            use = {"id": call.id or self._ids.make("toolu_"), "name": call.name, "input": {}}
            out += self._close() + self._block("tool_use", use)
            out += self._delta({"type": "input_json_delta", "partial_json": call.arguments_json})
            out += self._close()
        return out + self._end(reply) if reply.done else out

    def _end(self, reply: Reply) -> bytes:
        usage = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.output_tokens}
        delta = {"stop_reason": self._stop_reason(reply), "stop_sequence": None}
        return self._close() + _event("message_delta", delta=delta, usage=usage) + _event("message_stop")

    def _block(self, kind: str, empty: Object) -> bytes:
        if self._open == kind:
            return b""
        out = self._close()
        self._open = kind
        return out + _event("content_block_start", index=self._index, content_block={"type": kind, **empty})

    def _delta(self, delta: Object) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        out = _event("content_block_stop", index=self._index)
        self._open = ""
        self._index += 1
        return out

    def _read(self, native: Object) -> Reply:
        reply = read_reply(native)
        if not self._id:
            self._ids.stamp(reply.created_at)
            self._id = self._ids.make("msg_")
        return reply

    def _message(self, usage: Object) -> Object:
        message: Object = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return message | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _stop_reason(self, reply: Reply) -> str:
        if self._has_calls:
            return "tool_use"
        # Natively a stop string and the model's own end are one reason, so neither names stop_sequence.
        return {"length": "max_tokens", "stop_sequence": "stop_sequence"}.get(reply.reason, "end_turn")


def _event(kind: str, **data: Any) -> bytes:
    return sse.frame({"type": kind, **data}, kind)
