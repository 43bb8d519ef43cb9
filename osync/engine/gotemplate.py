"""Evaluates the part of Go's template language that Ollama's model templates use. Pure, bounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from osync.engine.goparse import Call, Node, TemplateError, fields_of, parse

MAX_STEPS = 300_000
"""Actions, values, turns of loops, and every 64 characters or items that a function works on: about a second."""
MAX_OUTPUT = 16 << 20
_PER_STEP = 64


class GoTemplate:
    """A parsed template. Raises TemplateError for what is not understood."""

    def __init__(self, source: str) -> None:
        self._root = parse(source)
        self.variables = frozenset(fields_of(self._root))
        if not self.variables & {"Messages", "Response"}:
            self._root.append(Node("print", Call("field", ("Response",))))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> str:
        """Render a conversation up to where the assistant speaks. Raises TemplateError."""
        turns = _collate(messages)
        system = "\n\n".join(m["Content"] for m in turns if m["Role"] == "system")
        if "Messages" in self.variables:
            scope = {"System": system, "Messages": turns, "Tools": list(tools), "Response": ""}
            return _Run(scope).all(self._root)
        return self._legacy(turns)

    def _legacy(self, turns: list[dict[str, Any]]) -> str:
        """One pass per turn, the last one cut off after its answer, as Ollama does."""
        output = ""
        turn = {"System": "", "Prompt": "", "Response": ""}
        place = {"system": "System", "user": "Prompt", "assistant": "Response"}
        order = ("System", "Prompt", "Response")
        for message in turns:
            name = place.get(message["Role"])
            if name is None:
                continue
            if any(turn[later] for later in order[order.index(name) + 1 :]):
                output += _Run(turn).all(self._root)
                turn = dict.fromkeys(order, "")
            turn[name] = message["Content"]
        run = _Run(turn)
        run.cut = True
        return output + run.all(self._root)


def _collate(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, content = str(message.get("role", "")), str(message.get("content") or "")
        if turns and turns[-1]["Role"] == role != "tool":
            turns[-1]["Content"] += "\n\n" + content
        else:
            turns.append({"Role": role, "Content": content})
    return turns


class _CutError(Exception):
    """The answer's place is reached."""


class _Run:
    """One evaluation, with a budget."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._variables: list[tuple[str, Any]] = [("$", root)]
        self._root = root
        self._output: list[str] = []
        self._length = 0
        self._steps = 0
        self.cut = False

    def all(self, nodes: list[Node]) -> str:
        try:
            self._nodes(nodes, self._root)
        except _CutError:
            pass
        return "".join(self._output)

    def _nodes(self, nodes: list[Node], dot: Any) -> None:
        for node in nodes:
            self._step()
            if node.kind == "text":
                self._write(node.value)
            elif node.kind == "print":
                self._write(_show(self._value(node.value, dot)))
                if self.cut and node.value.kind == "field" and node.value.value == ("Response",):
                    raise _CutError
            elif node.kind == "set":
                self._set(node.names[-1], self._value(node.value, dot), node.is_new)
            else:
                mark = len(self._variables)
                self._block(node, dot)
                del self._variables[mark:]

    def _block(self, node: Node, dot: Any) -> None:
        value = self._value(node.value, dot)
        if node.kind == "range":
            if not isinstance(value or (), (dict, list, tuple, str)):
                raise TemplateError("range over what is no list")
            self._step(_size(value) // _PER_STEP)
            pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value or ()))
            for key, item in pairs:
                self._step()
                mark = len(self._variables)
                named = dict(zip(node.names, (key, item) if len(node.names) == 2 else (item,), strict=False))
                self._variables += named.items()
                self._nodes(node.body, item)
                del self._variables[mark:]
            if not pairs:
                self._nodes(node.otherwise, dot)
            return
        if node.names:
            self._variables.append((node.names[-1], value))
        if _is_true(value):
            self._nodes(node.body, value if node.kind == "with" else dot)
        else:
            self._nodes(node.otherwise, dot)

    def _set(self, name: str, value: Any, is_new: bool) -> None:
        """Declare in this block, or assign to the nearest declaration."""
        if is_new:
            self._variables.append((name, value))
            return
        for index in range(len(self._variables) - 1, -1, -1):
            if self._variables[index][0] == name:
                self._variables[index] = (name, value)
                return
        raise TemplateError(f"undefined variable {name!r}")

    def _value(self, call: Call, dot: Any) -> Any:
        self._step()
        if call.kind == "value":
            return call.value
        if call.kind == "field":
            return _path(dot, call.value)
        if call.kind == "variable":
            name, path = call.value
            for known, value in reversed(self._variables):
                if known == name:
                    return _path(value, path)
            raise TemplateError(f"undefined variable {name!r}")
        if call.value in {"and", "or"}:  # these two stop early
            result: Any = None
            for argument in call.arguments:
                result = self._value(argument, dot)
                if _is_true(result) == (call.value == "or"):
                    break
            return result
        arguments = [self._value(a, dot) for a in call.arguments]
        self._step(sum(map(_size, arguments)) // _PER_STEP)
        try:
            result = _FUNCTIONS[call.value](*arguments)
        except (TypeError, ValueError, LookupError) as error:
            raise TemplateError(f"error calling {call.value}: {error}") from error
        self._step(_size(result) // _PER_STEP)
        return result

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_OUTPUT:
            raise TemplateError("the template's output is too long")
        self._output.append(text)

    def _step(self, cost: int = 1) -> None:
        self._steps += cost
        if self._steps > MAX_STEPS:
            raise TemplateError("the template takes too long")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _path(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_true(value: Any) -> bool:
    return bool(value)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _print(*values: Any) -> str:
    parts: list[str] = []
    length = 0
    for value in values:
        parts.append(_show(value))
        length += len(parts[-1])
        if length > MAX_OUTPUT:
            raise ValueError("its text is too long")
    return "".join(parts)


def _slice(value: Any, *bounds: int) -> Any:
    return value[slice(*bounds)] if len(bounds) == 2 else value[bounds[0] :] if bounds else value


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value[key]
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *_: None,
    "or": lambda *_: None,
    "not": lambda value: not _is_true(value),
    "eq": lambda first, *rest: any(first == other for other in rest),
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "len": lambda value: len(value or ()),
    "slice": _slice,
    "index": _index,
    "print": _print,
    "json": _json,
}
