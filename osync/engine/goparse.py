"""Parses the part of Go's template language that Ollama's model templates use."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

MAX_SOURCE = 1 << 20
_MAX_DEPTH = 50
_SPACE = " \t\r\n"

FUNCTIONS = frozenset(
    {"and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "slice", "index", "print", "json"}
)

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*(?:\.\w+)*)"""
    r"""|(?P<field>(?:\.\w+)+|\.)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[()|,=]))""",
    re.ASCII,
)


class TemplateError(ValueError):
    """The template cannot be parsed or evaluated here."""


@dataclass(slots=True)
class Call:
    """A word with its arguments, or a lone value."""

    kind: str
    value: Any = None
    arguments: list[Call] = field(default_factory=list)


@dataclass(slots=True)
class Node:
    """One action, or the text between two."""

    kind: str  # text, print, set, if, range, with
    value: Any = None
    names: tuple[str, ...] = ()
    is_new: bool = True  # := declares, = assigns
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def parse(source: str) -> list[Node]:
    """Return a template's nodes. Raises TemplateError for what is not understood."""
    if len(source) > MAX_SOURCE:
        raise TemplateError("the template is too long")
    return _Parser(_split(source)).document()


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

    def document(self) -> list[Node]:
        body, end = self._body(0)
        if end:
            raise TemplateError(f"unexpected {{{{{end}}}}}")
        return body

    def _body(self, depth: int) -> tuple[list[Node], str]:
        """Parse up to `end`, `else` or `else if …`; returns that, "" at the end of the text."""
        if depth > _MAX_DEPTH:
            raise TemplateError("actions are nested too deeply")
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            kind, text = self._pieces[self._at]
            self._at += 1
            if kind == "text":
                if text:
                    nodes.append(Node("text", text))
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

    def _block(self, word: str, rest: str, depth: int) -> Node:
        names, is_new, call = _pipeline(rest)
        node = Node(word, call, names, is_new)
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


def _statement(text: str) -> Node:
    names, is_new, call = _pipeline(text)
    return Node("set" if names else "print", call, names, is_new)


def _pipeline(text: str) -> tuple[tuple[str, ...], bool, Call]:
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
    call, rest = _commands(tokens, 0, 0)
    if rest != len(tokens):
        raise TemplateError(f"unexpected {tokens[rest][1]!r}")
    return names, is_new, call


def _commands(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Call, int]:
    """Parse `command | command …`: each result is the last argument of the next."""
    if depth > _MAX_DEPTH:
        raise TemplateError("parentheses are nested too deeply")
    call, at = _command(tokens, at, depth)
    stages = 1
    while at < len(tokens) and tokens[at] == ("mark", "|"):
        following, at = _command(tokens, at + 1, depth)
        stages += 1
        if stages > _MAX_DEPTH:
            raise TemplateError("a pipeline is too long")
        if following.kind != "call":
            raise TemplateError("only a function can follow |")
        following.arguments.append(call)
        call = following
    return call, at


def _command(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Call, int]:
    operands: list[Call] = []
    while at < len(tokens) and tokens[at] not in {("mark", "|"), ("mark", ")")}:
        kind, value = tokens[at]
        at += 1
        if (kind, value) == ("mark", "("):
            inner, at = _commands(tokens, at, depth + 1)
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


def _operand(kind: str, value: str, is_first: bool) -> Call:
    if kind == "string":
        if value.startswith("`"):
            return Call("value", value[1:-1])
        try:
            return Call("value", json.loads(value))
        except ValueError as error:
            raise TemplateError(f"the string {value} is not understood") from error
    if kind == "number":
        if len(value) > 19:  # Go's int has 64 bits
            raise TemplateError(f"the number {value[:30]} is out of range")
        return Call("value", int(value))
    if kind == "variable":
        name, *path = value.split(".")
        return Call("variable", (name, tuple(path)))
    if kind == "field":
        return Call("field", tuple(part for part in value.split(".") if part))
    if kind == "word":
        constants = {"true": True, "false": False, "nil": None}
        if value in constants:
            return Call("value", constants[value])
        if value in FUNCTIONS and is_first:
            return Call("call", value)
        raise TemplateError(f"the function {value!r} is not defined")
    raise TemplateError(f"unexpected {value!r}")


def fields_of(nodes: list[Node]) -> set[str]:
    """Return the names of all top-level fields that a template reads."""
    found: set[str] = set()

    def call(value: Call) -> None:
        if value.kind == "field" and value.value:
            found.add(value.value[0])
        if value.kind == "variable" and value.value[0] == "$" and value.value[1]:
            found.add(value.value[1][0])
        for argument in value.arguments:
            call(argument)

    for node in nodes:
        if isinstance(node.value, Call):
            call(node.value)
        found |= fields_of(node.body) | fields_of(node.otherwise)
    return found
