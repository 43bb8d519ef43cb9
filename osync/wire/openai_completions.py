"""OpenAI's /v1/completions over /api/generate."""

from __future__ import annotations

from osync.errors import BadRequest
from osync.wire import sse
from osync.wire.answer import Codec, Ids, Reply, read_reply
from osync.wire.body import Object
from osync.wire.fields import flag, integer, model_of, strings, text
from osync.wire.openai_chat import (
    FINGERPRINT,
    finish_reason,
    include_usage,
    sampling_options,
    token_logprobs,
    usage_of,
)


def generate_request(request: Object) -> Object:
    """Return the /api/generate body for a completion request."""
    prompts = strings(request, "prompt")
    if len(prompts) > 1:
        raise BadRequest("invalid type for 'prompt': only one prompt per request is supported")
    native: Object = {
        "model": model_of(request),
        "prompt": prompts[0] if prompts else "",
        "stream": flag(request, "stream"),
        "options": sampling_options(request),
    }
    suffix = text(request, "suffix")
    if suffix:
        native["suffix"] = suffix
    logprobs = integer(request, "logprobs")
    if logprobs:
        native["logprobs"] = True
        native["top_logprobs"] = logprobs
    return native


class CompletionCodec(Codec):
    """Writes text_completion objects, whole or one per piece of text."""

    def __init__(self, request: Object, ids: Ids) -> None:
        self._model = model_of(request)
        self._ids = ids
        self._usage = include_usage(request)
        self._id = ""
        self._created = 0
        self._offset = 0

    def whole(self, native: Object) -> Object:
        """Return one text_completion."""
        reply = self._read(native)
        choice = self._choice(reply, reply.text, finish_reason(reply, False))
        return {**self._base(), "choices": [choice], "usage": usage_of(reply)}

    def step(self, native: Object) -> bytes:
        """Return the chunks for one line: text, then at the end finish, usage and [DONE]."""
        reply = self._read(native)
        out = self._chunk(self._choice(reply, reply.text, None)) if reply.text or reply.logprobs else b""
        if not reply.done:
            return out
        last: Object = {"text": "", "index": 0, "logprobs": None, "finish_reason": finish_reason(reply, False)}
        out += self._chunk(last)
        if self._usage:
            out += sse.frame({**self._base(), "choices": [], "usage": usage_of(reply)})
        return out + sse.DONE

    def _read(self, native: Object) -> Reply:
        reply = read_reply(native)
        if not self._id:
            self._ids.stamp(reply.created_at)
            self._id, self._created = self._ids.make("cmpl-"), reply.created
        return reply

    def _base(self) -> Object:
        base = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        return base | {"system_fingerprint": FINGERPRINT}

    def _chunk(self, choice: Object) -> bytes:
        usage = {"usage": None} if self._usage else {}
        return sse.frame({**self._base(), "choices": [choice], **usage})

    def _choice(self, reply: Reply, content: str, reason: str | None) -> Object:
        logprobs = self._logprobs(reply)
        return {"text": content, "index": 0, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, reply: Reply) -> Object | None:
        """Both of the forms in use: OpenAI's parallel lists, and Ollama's `content` as in chats."""
        tokens = token_logprobs(reply)
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(str(token.get("token", "")))
        return {
            "tokens": [token.get("token") for token in tokens],
            "token_logprobs": [token.get("logprob") for token in tokens],
            "top_logprobs": [_likeliest(token) for token in tokens],
            "text_offset": offsets,
            "content": tokens,
        }


def _likeliest(token: Object) -> Object:
    found = token.get("top_logprobs")
    items = found if isinstance(found, list) else []
    return {str(item.get("token")): item.get("logprob") for item in items if isinstance(item, dict)}
