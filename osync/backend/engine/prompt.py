"""From a request to the tokens that the model gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from osync.backend.engine.fields import Fields
from osync.backend.engine.runner import EngineRunner
from osync.coordinator.generation import TOO_LONG
from osync.engine.gotemplate import GoTemplate
from osync.engine.store import StoredModel
from osync.engine.template import ChatTemplate, Message, parse_template, render_go
from osync.errors import BadRequest

DEFAULT_KEEP = 4
"""Ollama's num_keep."""


def check_generate(fields: Fields) -> GoTemplate | None:
    """Check what needs no model; returns the request's own template. Raises BadRequest."""
    template, system, context = fields.text("template"), fields.text("system"), fields.integers("context")
    if fields.boolean("raw", False) and (template or system or context):
        raise BadRequest("raw mode does not support template, system, or context")
    return parse_template(template) if template else None


async def generate_prompt(
    fields: Fields, model: StoredModel, runner: EngineRunner, template: ChatTemplate, own: GoTemplate | None
) -> list[int]:
    """Return the tokens of a /api/generate request. Raises BadRequest."""
    prompt = fields.text("prompt")
    if fields.boolean("raw", False):
        return await runner.tokenize(prompt)
    context = fields.integers("context")
    if any(not 0 <= token < runner.vocabulary.size for token in context):
        raise BadRequest("context holds tokens that are not in the model's vocabulary")
    system = fields.text("system") or model.system
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    if not context:
        messages += model.messages
    messages.append({"role": "user", "content": prompt})
    text = await render_go(own, messages) if own else await template.render(messages)
    if context:
        return context + await runner.tokenize(text, False)
    return await tokenize(runner, text)


async def tokenize(runner: EngineRunner, text: str) -> list[int]:
    """Tokenize a rendered prompt; templates that write BOS themselves do not get a second one."""
    bos = runner.vocabulary.bos_text
    return await runner.tokenize(text, not (bos and text.startswith(bos)))


async def chat_prompt(
    messages: Sequence[Message], model: StoredModel, runner: EngineRunner, template: ChatTemplate, truncate: bool
) -> list[int]:
    """Return the tokens of a conversation; where it is too long, the oldest turns are left out.

    System messages and the last message stay, as in Ollama. Raises BadRequest.
    """
    everything = [*model.messages, *messages]
    if model.system and everything[0]["role"] != "system":
        everything.insert(0, {"role": "system", "content": model.system})
    tokens = await tokenize(runner, await template.render(everything))
    if len(tokens) < runner.context_length or not truncate:
        return tokens
    low, high = 1, len(everything) - 1  # the first message to keep: the smallest that fits
    best = await _from(everything, high, runner, template)
    while low < high:
        middle = (low + high) // 2
        tokens = await _from(everything, middle, runner, template)
        if len(tokens) < runner.context_length:
            best, high = tokens, middle
        else:
            low = middle + 1
    return best


async def _from(messages: Sequence[Message], first: int, runner: EngineRunner, template: ChatTemplate) -> list[int]:
    first = max(0, first)
    kept = [m for m in messages[:first] if m["role"] == "system"] + list(messages[first:])
    return await tokenize(runner, await template.render(kept))


def fit(tokens: list[int], context_length: int, sampling: dict[str, Any], truncate: bool) -> list[int]:
    """Cut the middle out of a prompt that leaves no room for an answer: `num_keep` tokens and the end stay.

    A negative `num_keep` keeps as many as it may: half the context. Raises BadRequest without `truncate` for a
    prompt over the context; one that fills it exactly is answered with the one token that it has room for.
    """
    if len(tokens) < context_length or (len(tokens) == context_length and not truncate):
        return tokens
    if not truncate:
        raise BadRequest(TOO_LONG)
    room = max(1, context_length // 4)  # for the answer
    if sampling.get("num_predict", 0) > 0:
        room = min(room, sampling["num_predict"])
    most = context_length // 2
    keep = sampling.get("num_keep", DEFAULT_KEEP)
    keep = most if keep < 0 else min(keep, most)
    last = max(1, context_length - room - keep)
    return tokens[:keep] + tokens[len(tokens) - last :]
