"""The part of Go's template language that Ollama's model templates use. Pure, bounded, no reflection."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SOURCE = 1 << 20
MAX_STEPS = 1_000_000
MAX_OUTPUT = 16 << 20
_MAX_DEPTH = 50
_SPACE = " \t\r\n"

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*(?:\.\w+)*)"""
    r"""|(?P<field>(?:\.\w+)+|\.)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[()|,=]))""",
    re.ASCII,
)


class TemplateError(ValueError):
    """The template cannot be parsed or evaluated here."""


@dataclass(slots=True)
class _Call:
    """A word with its arguments, or a lone value."""

    kind: str
    value: Any = None
    arguments: list[_Call] = field(default_factory=list)


@dataclass(slots=True)
class _Node:
    kind: str  # text, print, set, if, range, with
    value: Any = None
    names: tuple[str, ...] = ()
    is_new: bool = True  # := declares, = assigns
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


class GoTemplate:
    """A parsed template. Raises TemplateError for what is not understood."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError("the template is too long")
        self._root = _Parser(_split(source)).document()
        self.variables = frozenset(_fields(self._root))
        if not self.variables & {"Messages", "Response"}:
            self._root.append(_Node("print", _Call("field", ("Response",))))

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


def _split(source: str) -> list[tuple[str, str]]:
    """Cut into ("text", …) and ("action", …), with the space around `{{-` and `-}}` taken off."""
    pieces: list[tuple[str, str]] = []
    at, trim = 0, False
    while (start := source.find("{{", at)) >= 0:
        end = source.find("}}", start)
        if end < 0:
            raise TemplateError("unclosed action")
        action = source[start + 2 : end]
        text = source[at:start]
        text = text.lstrip(_SPACE) if trim else text
        if action[:1] == "-" and action[1:2] in _SPACE:
            text, action = text.rstrip(_SPACE), action[1:]
        trim = action[-1:] == "-" and (len(action) < 2 or action[-2] in _SPACE)
        action = (action[:-1] if trim else action).strip()
        pieces.append(("text", text))
        if not action.startswith("/*"):
            pieces.append(("action", action))
        at = end + 2
    pieces.append(("text", source[at:].lstrip(_SPACE) if trim else source[at:]))
    return pieces


class _Parser:
    def __init__(self, pieces: list[tuple[str, str]]) -> None:
        self._pieces = pieces
        self._at = 0

    def document(self) -> list[_Node]:
        body, end = self._body(0)
        if end:
            raise TemplateError(f"unexpected {{{{{end}}}}}")
        return body

    def _body(self, depth: int) -> tuple[list[_Node], str]:
        """Parse up to `end`, `else` or `else if …`; returns that, "" at the end of the text."""
        if depth > _MAX_DEPTH:
            raise TemplateError("actions are nested too deeply")
        nodes: list[_Node] = []
        while self._at < len(self._pieces):
            kind, text = self._pieces[self._at]
            self._at += 1
            if kind == "text":
                if text:
                    nodes.append(_Node("text", text))
                continue
            word, _, rest = text.partition(" ")
            if word in {"end", "else"}:
                return nodes, text
            if word in {"if", "with", "range"}:
                nodes.append(self._block(word, rest, depth))
            elif word in {"define", "template", "block", "break", "continue"}:
                raise TemplateError(f"the action {word!r} is not supported")
            else:
                nodes.append(_statement(text))
        return nodes, ""

    def _block(self, word: str, rest: str, depth: int) -> _Node:
        names, is_new, call = _pipeline(rest)
        node = _Node(word, call, names, is_new)
        node.body, end = self._body(depth + 1)
        if end.startswith("else"):
            tail = end[4:].strip()
            if tail.startswith(("if ", "with ")):
                inner, _, rest = tail.partition(" ")
                node.otherwise = [self._block(inner, rest, depth + 1)]
                return node
            if tail:
                raise TemplateError(f"unexpected {tail!r} after else")
            node.otherwise, end = self._body(depth + 1)
        if end != "end":
            raise TemplateError(f"unexpected end of the template in {{{{{word}}}}}")
        return node


def _statement(text: str) -> _Node:
    names, is_new, call = _pipeline(text)
    return _Node("set" if names else "print", call, names, is_new)


def _pipeline(text: str) -> tuple[tuple[str, ...], bool, _Call]:
    tokens: list[tuple[str, str]] = []
    at = 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise TemplateError(f"unexpected {text[at : at + 20]!r}")
        tokens.append((match.lastgroup, match.group(match.lastgroup)))
        at = match.end()
    if len(tokens) > 500:
        raise TemplateError("an action is too long")
    names: tuple[str, ...] = ()
    is_new = True
    for index, (kind, value) in enumerate(tokens):
        if kind == "mark" and value in {":=", "="}:
            left = [t for t in tokens[:index] if t != ("mark", ",")]
            if any(k != "variable" or "." in v for k, v in left) or not 1 <= len(left) <= 2:
                raise TemplateError("only variables can be set")
            names, tokens, is_new = tuple(v for _, v in left), tokens[index + 1 :], value == ":="
            break
    call, rest = _commands(tokens, 0)
    if rest != len(tokens):
        raise TemplateError(f"unexpected {tokens[rest][1]!r}")
    return names, is_new, call


def _commands(tokens: list[tuple[str, str]], at: int) -> tuple[_Call, int]:
    """Parse `command | command …`: each result is the last argument of the next."""
    call, at = _command(tokens, at)
    while at < len(tokens) and tokens[at] == ("mark", "|"):
        following, at = _command(tokens, at + 1)
        if following.kind != "call":
            raise TemplateError("only a function can follow |")
        following.arguments.append(call)
        call = following
    return call, at


def _command(tokens: list[tuple[str, str]], at: int) -> tuple[_Call, int]:
    operands: list[_Call] = []
    while at < len(tokens) and tokens[at] not in {("mark", "|"), ("mark", ")")}:
        kind, value = tokens[at]
        at += 1
        if (kind, value) == ("mark", "("):
            inner, at = _commands(tokens, at)
            if at >= len(tokens) or tokens[at] != ("mark", ")"):
                raise TemplateError("a parenthesis is not closed")
            operands.append(inner)
            at += 1
        else:
            operands.append(_operand(kind, value, is_first=not operands))
    if not operands:
        raise TemplateError("a value is missing")
    first = operands[0]
    if first.kind == "call" and not first.arguments and len(operands) > 1:
        first.arguments = operands[1:]
        return first, at
    if len(operands) > 1:
        raise TemplateError("a value cannot have arguments")
    return first, at


def _operand(kind: str, value: str, is_first: bool) -> _Call:
    if kind == "string":
        if value.startswith("`"):
            return _Call("value", value[1:-1])
        try:
            return _Call("value", json.loads(value))
        except ValueError as error:
            raise TemplateError(f"the string {value} is not understood") from error
    if kind == "number":
        return _Call("value", int(value))
    if kind == "variable":
        name, *path = value.split(".")
        return _Call("variable", (name, tuple(path)))
    if kind == "field":
        return _Call("field", tuple(part for part in value.split(".") if part))
    if kind == "word":
        constants = {"true": True, "false": False, "nil": None}
        if value in constants:
            return _Call("value", constants[value])
        if value in _FUNCTIONS and is_first:
            return _Call("call", value)
        raise TemplateError(f"the function {value!r} is not defined")
    raise TemplateError(f"unexpected {value!r}")


def _fields(nodes: list[_Node]) -> set[str]:
    """Return the names of all top-level fields that a template reads."""
    found: set[str] = set()

    def call(value: _Call) -> None:
        if value.kind == "field" and value.value:
            found.add(value.value[0])
        if value.kind == "variable" and value.value[0] == "$" and value.value[1]:
            found.add(value.value[1][0])
        for argument in value.arguments:
            call(argument)

    for node in nodes:
        if isinstance(node.value, _Call):
            call(node.value)
        found |= _fields(node.body) | _fields(node.otherwise)
    return found


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

    def all(self, nodes: list[_Node]) -> str:
        try:
            self._nodes(nodes, self._root)
        except _CutError:
            pass
        return "".join(self._output)

    def _nodes(self, nodes: list[_Node], dot: Any) -> None:
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

    def _block(self, node: _Node, dot: Any) -> None:
        value = self._value(node.value, dot)
        if node.kind == "range":
            pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value or ()))
            for key, item in pairs:
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

    def _value(self, call: _Call, dot: Any) -> Any:
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
        try:
            return _FUNCTIONS[call.value](*(self._value(a, dot) for a in call.arguments))
        except (TypeError, ValueError, LookupError) as error:
            raise TemplateError(f"error calling {call.value}: {error}") from error

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_OUTPUT:
            raise TemplateError("the template's output is too long")
        self._output.append(text)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateError("the template takes too long")


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
    "print": lambda *values: "".join(_show(v) for v in values),
    "json": _json,
}
