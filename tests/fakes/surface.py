"""The forms in which the fake Ollama answers: native, OpenAI and Anthropic."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from tests.fakes.model import rfc3339

Metrics = dict[str, Any]
_NDJSON, _SSE = "application/x-ndjson", "text/event-stream"


def _data(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _event(name: str, **fields: object) -> bytes:
    return f"event: {name}\n".encode() + _data({"type": name, **fields})


class Surface:
    """Native generate; the others override what differs. `model` is echoed as asked."""

    content_type = _NDJSON

    def __init__(self, model: str) -> None:
        self.model = model
        self._key = orjson.dumps(model)

    def piece(self, text: str) -> dict[str, Any]:
        """Return the part of a chunk that carries text."""
        return {"response": text}

    def first(self) -> bytes:
        """Return what precedes the first token."""
        return b""

    def token(self, text: str) -> bytes:
        """Return one token's chunk."""
        at = rfc3339(time.time())
        return orjson.dumps({"model": self.model, "created_at": at, **self.piece(text), "done": False}) + b"\n"

    def last(self, count: int, metrics: Metrics) -> bytes:
        """Return what follows the last token."""
        return orjson.dumps(self.final("", metrics)) + b"\n"

    def whole(self, text: str, metrics: Metrics) -> bytes:
        """Return the answer in one piece."""
        return orjson.dumps(self.final(text, metrics))

    def final(self, text: str, metrics: Metrics) -> dict[str, Any]:
        """Return the native final object."""
        at = rfc3339(time.time())
        return {"model": self.model, "created_at": at, **self.piece(text), "done": True, **metrics}

    def broken(self, text: str) -> bytes:
        """Return the line that says that the stream broke."""
        return orjson.dumps({"error": text}) + b"\n"

    def refused(self, status: int, text: str) -> bytes:
        """Return the body of an error before the first token."""
        return orjson.dumps({"error": text})


class Generate(Surface):
    """/api/generate."""

    def final(self, text: str, metrics: Metrics) -> dict[str, Any]:
        """Return the final object, with generate's context."""
        context = {"context": [1, 2, 3]} if metrics.get("eval_count") else {}
        return {**super().final(text, metrics), **context}


class Chat(Surface):
    """/api/chat."""

    def piece(self, text: str) -> dict[str, Any]:
        """Return a message."""
        return {"message": {"role": "assistant", "content": text}}


class _OpenAI(Surface):
    content_type = _SSE
    id = "chatcmpl-1"

    def refused(self, status: int, text: str) -> bytes:
        kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
        return orjson.dumps({"error": {"message": text, "type": kind, "param": None, "code": None}})

    def broken(self, text: str) -> bytes:
        # The real one decodes the error line as an empty answer.
        return self.token("")

    def usage(self, metrics: Metrics) -> dict[str, int]:
        prompt, answer = metrics.get("prompt_eval_count", 0), metrics.get("eval_count", 0)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def base(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model,
                "system_fingerprint": "fp_ollama"}  # fmt: skip


class OpenAIChat(_OpenAI):
    """/v1/chat/completions."""

    def token(self, text: str) -> bytes:
        delta = {"role": "assistant", "content": text}
        choices = [{"index": 0, "delta": delta, "finish_reason": None}]
        return _data({**self.base("chat.completion.chunk"), "choices": choices})

    def last(self, count: int, metrics: Metrics) -> bytes:
        choices = [{"index": 0, "delta": {}, "finish_reason": metrics["done_reason"]}]
        end = _data({**self.base("chat.completion.chunk"), "choices": choices})
        return end + b"data: [DONE]\n\n"

    def whole(self, text: str, metrics: Metrics) -> bytes:
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": metrics["done_reason"]}]
        return orjson.dumps({**self.base("chat.completion"), "choices": choices, "usage": self.usage(metrics)})


class OpenAICompletion(_OpenAI):
    """/v1/completions."""

    id = "cmpl-1"

    def token(self, text: str) -> bytes:
        choices = [{"index": 0, "text": text, "finish_reason": None}]
        return _data({**self.base("text_completion"), "choices": choices})

    def last(self, count: int, metrics: Metrics) -> bytes:
        choices = [{"index": 0, "text": "", "finish_reason": metrics["done_reason"]}]
        return _data({**self.base("text_completion"), "choices": choices}) + b"data: [DONE]\n\n"

    def whole(self, text: str, metrics: Metrics) -> bytes:
        choices = [{"index": 0, "text": text, "finish_reason": metrics["done_reason"]}]
        return orjson.dumps({**self.base("text_completion"), "choices": choices, "usage": self.usage(metrics)})


class Responses(_OpenAI):
    """/v1/responses."""

    id = "resp_1"

    def _response(self, status: str, text: str, metrics: Metrics | None) -> dict[str, Any]:
        output = [self._item("completed", text)] if metrics else []
        usage = None
        if metrics:
            counts = self.usage(metrics)
            usage = {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
                     "total_tokens": counts["total_tokens"]}  # fmt: skip
        return {"id": self.id, "object": "response", "created_at": int(time.time()), "status": status,
                "model": self.model, "output": output, "usage": usage}  # fmt: skip

    def _item(self, status: str, text: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": "msg_1", "type": "message", "status": status, "role": "assistant", "content": content}

    def first(self) -> bytes:
        self._sent: list[str] = []
        start = self._response("in_progress", "", None)
        part = {"type": "output_text", "text": "", "annotations": []}
        return (
            _event("response.created", response=start)
            + _event("response.in_progress", response=start)
            + _event("response.output_item.added", output_index=0, item=self._item("in_progress", ""))
            + _event("response.content_part.added", item_id="msg_1", output_index=0, content_index=0, part=part)
        )

    def token(self, text: str) -> bytes:
        self._sent.append(text)
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        return _event("response.output_text.delta", delta=text, **place)

    def last(self, count: int, metrics: Metrics) -> bytes:
        text = "".join(self._sent)
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": text, "annotations": []}
        return (
            _event("response.output_text.done", text=text, **place)
            + _event("response.content_part.done", part=part, **place)
            + _event("response.output_item.done", output_index=0, item=self._item("completed", text))
            + _event("response.completed", response=self._response("completed", text, metrics))
        )

    def whole(self, text: str, metrics: Metrics) -> bytes:
        return orjson.dumps(self._response("completed", text, metrics))


class Messages(Surface):
    """/v1/messages, Anthropic's."""

    content_type = _SSE

    def refused(self, status: int, text: str) -> bytes:
        kinds = {400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error"}
        error = {"type": kinds.get(status, "api_error"), "message": text}
        return orjson.dumps({"type": "error", "error": error, "request_id": "req_1"})

    def broken(self, text: str) -> bytes:
        return b""

    def _message(self, content: list[dict[str, Any]], metrics: Metrics | None) -> dict[str, Any]:
        usage = {"input_tokens": (metrics or {}).get("prompt_eval_count", 0),
                 "output_tokens": (metrics or {}).get("eval_count", 0)}  # fmt: skip
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model,
                "content": content, "stop_reason": self._reason(metrics), "usage": usage}  # fmt: skip

    def _reason(self, metrics: Metrics | None) -> str | None:
        return {"length": "max_tokens"}.get(metrics["done_reason"], "end_turn") if metrics else None

    def first(self) -> bytes:
        block = {"type": "text", "text": ""}
        return _event("message_start", message=self._message([], None)) + _event(
            "content_block_start", index=0, content_block=block
        )

    def token(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def last(self, count: int, metrics: Metrics) -> bytes:
        usage = {"output_tokens": count}
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta={"stop_reason": self._reason(metrics)}, usage=usage)
            + _event("message_stop")
        )

    def whole(self, text: str, metrics: Metrics) -> bytes:
        return orjson.dumps(self._message([{"type": "text", "text": text}], metrics))


SURFACES: dict[str, Callable[[str], Surface]] = {
    "/api/generate": Generate,
    "/api/chat": Chat,
    "/v1/chat/completions": OpenAIChat,
    "/v1/completions": OpenAICompletion,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}
