"""A model's chat template: Ollama's Go template, the file's own jinja template, or ChatML."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from osync.engine import jinja_worker
from osync.engine.child import Child, spawn
from osync.engine.goparse import TemplateError
from osync.engine.gotemplate import GoTemplate
from osync.errors import BadRequest, ModelUnusable

log = structlog.get_logger("osync.engine")

Message = Mapping[str, Any]

DEADLINE_S = 5.0
"""For one rendering: honest templates take a few ms, also for long conversations on a busy host."""
START_DEADLINE_S = 30.0
"""For a new process to import jinja2 and compile the template."""


class ChatTemplate:
    """Turns a conversation into a prompt. `close()` ends the process that renders jinja."""

    def __init__(
        self, *, jinja: str = "", go: str = "", bos: str = "", eos: str = "", deadline_s: float = DEADLINE_S
    ) -> None:
        self._go = _parse_go(go)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._process = None if self._go or not jinja else _Renderer(jinja, deadline_s)
        self.kind = "go" if self._go else "jinja" if self._process else "chatml"

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings that the template calls for, beyond the model's own end token."""
        return ("<|im_end|>",) if self.kind == "chatml" else ()

    async def start(self) -> None:
        """Prepare; raises ModelUnusable where the file's template is not valid."""
        if self._process:
            await self._process.start()

    async def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """Return the prompt. Raises BadRequest where the template refuses the conversation."""
        if self._go:
            return await render_go(self._go, messages)
        prefill = ""
        if messages and messages[-1]["role"] == "assistant":  # to be continued
            prefill, messages = str(messages[-1].get("content") or ""), messages[:-1]
        if self._process is None:
            return chatml(messages) + prefill
        try:
            return await self._render(messages, tools) + prefill
        except BadRequest:
            merged = _without_system(messages)
            if merged is None:
                raise
            return await self._render(merged, tools) + prefill

    async def _render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        assert self._process is not None
        variables: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True, **self._tokens}
        if tools:
            variables["tools"] = list(tools)
        return await self._process.render(variables)

    async def close(self) -> None:
        """End the rendering process. May be called twice."""
        if self._process:
            await self._process.close()


def _parse_go(source: str) -> GoTemplate | None:
    if not source:
        return None
    try:
        return GoTemplate(source)
    except TemplateError as error:
        log.info("go_template_not_understood", reason=str(error))
        return None


def parse_template(source: str) -> GoTemplate:
    """Parse a template that came with a request. Raises BadRequest."""
    try:
        return GoTemplate(source)
    except TemplateError as error:
        raise BadRequest(f"template: {error}") from error


async def render_go(template: GoTemplate, messages: Sequence[Message]) -> str:
    """Render a Go template beside the event loop. Raises BadRequest where that fails."""
    try:
        return await asyncio.to_thread(template.render, messages)
    except TemplateError as error:
        raise BadRequest(f"template: {error}") from error


def chatml(messages: Sequence[Message]) -> str:
    """Render ChatML: what a model without any template most likely understands."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """Put the system message before the first user's, for templates that refuse a system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    content = f"{messages[0].get('content') or ''}\n\n{messages[1].get('content') or ''}"
    return [{**messages[1], "content": content}, *messages[2:]]


class _Renderer:
    """Owns one `jinja_worker` process; one rendering at a time; a process that died is replaced."""

    def __init__(self, source: str, deadline_s: float) -> None:
        self._source = source
        self._deadline_s = deadline_s
        self._process: Child | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        async with self._lock:
            await self._ready()

    async def render(self, variables: Mapping[str, Any]) -> str:
        async with self._lock:
            process = await self._ready()
            answer = await self._ask(process, {"variables": variables}, self._deadline_s)
        if "raised" in answer:
            raise BadRequest(f"the model's chat template refuses this conversation: {answer['raised']}")
        if "failed" in answer:
            raise ModelUnusable(f"the model's chat template failed: {answer['failed']}")
        return str(answer["text"])

    async def _ready(self) -> Child:
        if self._closed:
            raise ModelUnusable("the model was unloaded")
        if self._process is None:
            try:
                self._process = await spawn(sys.executable, "-I", str(Path(jinja_worker.__file__)))
            except OSError as error:
                raise ModelUnusable(f"no process for the chat template: {error}") from error
            answer = await self._ask(self._process, {"source": self._source}, START_DEADLINE_S)
            if "text" not in answer:
                await self._end()
                reason = answer.get("failed") or answer.get("raised")
                raise ModelUnusable(f"the model's chat template is not valid: {reason}")
        return self._process

    async def _ask(self, process: Child, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Exchange one frame. Whatever goes wrong, also a cancellation, ends the process."""
        data = orjson.dumps({**request, "deadline_s": deadline_s})
        answer: dict[str, Any] | None = None
        try:
            async with asyncio.timeout(deadline_s + 1):  # the worker's own alarm comes first
                process.stdin.write(struct.pack("<I", len(data)) + data)
                await process.stdin.drain()
                (length,) = struct.unpack("<I", await process.stdout.readexactly(4))
                answer = orjson.loads(await process.stdout.readexactly(length))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            await self._end()
            raise ModelUnusable(f"the model's chat template did not come to an end within {deadline_s:g} s") from error
        finally:
            if answer is None:  # cancelled: the frames would no longer match
                await self._end(grace_s=0)
        return answer

    async def _end(self, grace_s: float = 0.5) -> None:
        """End the process: it leaves at the end of its input, unless the template holds it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        finally:
            process.close()

    async def close(self) -> None:
        self._closed = True
        await self._end()
