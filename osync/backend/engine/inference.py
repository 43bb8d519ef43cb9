"""/api/generate and /api/chat."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import structlog

from osync.backend.engine.answers import NDJSON, dumps, metrics, now_text, respond
from osync.backend.engine.fields import Fields
from osync.backend.engine.prompt import chat_prompt, check_generate, fit, generate_prompt
from osync.backend.engine.runner import EngineRunner
from osync.backend.engine.slot import Slot
from osync.backend.engine.table import Table
from osync.coordinator.request import Final, Piece
from osync.engine.sampling import SamplingOptions
from osync.engine.store import StoredModel
from osync.errors import ModelUnusable, OsyncError
from osync.net.exchange import Responder
from osync.types import ResponseHead
from osync.wire.options import ParsedOptions, parse_keep_alive, parse_options

log = structlog.get_logger("osync.engine")

_UNSUPPORTED = ("images", "tools", "format", "suffix", "think", "logprobs", "top_logprobs", "_debug_render_only")


@dataclass(frozen=True, slots=True)
class Shape:
    """How the two routes differ in what they answer."""

    name: str
    has_context: bool

    def chunk(self, text: str) -> dict[str, Any]:
        """Return the part of a chunk that carries text."""
        if self.name == "chat":
            return {"message": {"role": "assistant", "content": text}}
        return {"response": text}


GENERATE = Shape("generate", True)
CHAT = Shape("chat", False)


async def generate(fields: Fields, model: StoredModel, table: Table, responder: Responder) -> None:
    """Answer /api/generate."""
    call = _Call(GENERATE, fields, model, table, responder)
    own = check_generate(fields)
    prompt = fields.text("prompt")
    if not prompt:
        await call.load_only()
        return
    is_raw = fields.boolean("raw", False)

    async def tokens(slot: Slot, runner: EngineRunner) -> list[int]:
        return await generate_prompt(fields, model, runner, table.template(slot, model), own)

    await call.run(tokens, gives_context=not is_raw, uses_template=not is_raw and own is None)


async def chat(fields: Fields, model: StoredModel, table: Table, responder: Responder) -> None:
    """Answer /api/chat."""
    call = _Call(CHAT, fields, model, table, responder)
    messages = fields.messages()
    if not messages:
        await call.load_only()
        return
    truncate = fields.boolean("truncate", True)

    async def tokens(slot: Slot, runner: EngineRunner) -> list[int]:
        return await chat_prompt(messages, model, runner, table.template(slot, model), truncate)

    await call.run(tokens, gives_context=False, uses_template=True)


class _Call:
    """One inference request, checked at once: whatever is wrong with it is said before any load."""

    def __init__(self, shape: Shape, fields: Fields, model: StoredModel, table: Table, responder: Responder) -> None:
        self._began_ns = time.monotonic_ns()
        self._shape = shape
        self._fields = fields
        self._model = model
        self._table = table
        self._responder = responder
        fields.refuse(*_UNSUPPORTED)
        self._name = fields.model()
        self._is_streamed = fields.boolean("stream", True)
        self._truncate = fields.boolean("truncate", True)
        fields.boolean("shift", True)  # checked; an answer ends where the context does
        self._keep_alive_s = parse_keep_alive(fields.raw("keep_alive"))
        self._options: ParsedOptions = parse_options({**model.parameters, **fields.object("options")})

    def _body(self, text: str) -> dict[str, Any]:
        return {"model": self._name, "created_at": now_text(), **self._shape.chunk(text)}

    async def load_only(self) -> None:
        """An empty prompt loads the model, or unloads it with keep_alive 0."""
        if self._keep_alive_s == 0:
            self._table.expire(self._model)
            reason = "unload"
        else:
            async with self._table.lease(self._model, self._options.runner, self._keep_alive_s):
                reason = "load"
        body = {**self._body(""), "done": True, "done_reason": reason}
        await respond(self._responder, 200, dumps(body))

    async def run(
        self,
        tokens: Callable[[Slot, EngineRunner], Any],
        *,
        gives_context: bool,
        uses_template: bool,
    ) -> None:
        """Load, evaluate, answer."""
        async with self._table.lease(self._model, self._options.runner, self._keep_alive_s) as (slot, runner):
            load_ns = time.monotonic_ns() - self._began_ns
            prompt = await tokens(slot, runner)
            prompt = fit(prompt, runner.context_length, self._options.sampling, self._truncate)
            sampling = dict(self._options.sampling)
            if uses_template:
                stops = self._table.template(slot, self._model).stops
                sampling["stop"] = tuple(sampling.get("stop", ())) + stops
            events = runner.generate(prompt, SamplingOptions(**sampling))
            async with aclosing(events):
                answer = _Answer(events)
                if self._is_streamed:
                    await self._stream(answer, prompt, load_ns, gives_context)
                else:
                    await self._whole(answer, prompt, load_ns, gives_context)

    def _last(self, text: str, final: Final, prompt: list[int], load_ns: int, gives_context: bool) -> dict[str, Any]:
        body = {**self._body(text), "done": True, "done_reason": final.done_reason}
        if gives_context:
            body["context"] = [*prompt, *final.tokens]
        total_ns = time.monotonic_ns() - self._began_ns
        return {**body, **metrics(final, total_ns=total_ns, load_ns=load_ns)}

    async def _whole(self, answer: _Answer, prompt: list[int], load_ns: int, gives_context: bool) -> None:
        parts: list[str] = []
        while isinstance(event := await answer.next(), Piece):
            parts.append(event.text)
        body = self._last("".join(parts), event, prompt, load_ns, gives_context)
        await respond(self._responder, 200, dumps(body))

    async def _stream(self, answer: _Answer, prompt: list[int], load_ns: int, gives_context: bool) -> None:
        """Nothing goes out before the first token; after it, an error is a line of its own."""
        event = await answer.next()
        await self._responder.start(ResponseHead(200, (("Content-Type", NDJSON),)))
        while isinstance(event, Piece):
            if event.text:
                await self._responder.write(dumps({**self._body(event.text), "done": False}) + b"\n")
            try:
                event = await answer.next()
            except OsyncError as error:
                log.warning("stream_failed", model=self._model.info.name, error=str(error))
                await self._responder.write(dumps({"error": str(error)}) + b"\n")
                return
        await self._responder.write(dumps(self._last("", event, prompt, load_ns, gives_context)) + b"\n")


class _Answer:
    """A runner's events; whatever else it raises becomes an OsyncError."""

    def __init__(self, events: Any) -> None:
        self._events = events

    async def next(self) -> Piece | Final:
        """Return the next event. Raises OsyncError."""
        try:
            event: Piece | Final = await anext(self._events)
            return event
        except OsyncError:
            raise
        except StopAsyncIteration:
            raise ModelUnusable("model runner has unexpectedly stopped") from None
        except Exception as error:
            log.error("runner_failed", exc_info=error)
            raise ModelUnusable(f"model runner has unexpectedly stopped: {error!r}") from error
