"""`osync run`: one answer, or a chat on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import typer

from osync.client.answers import ChatResponse
from osync.client.synchronous import OllamaClient, Stream
from osync.errors import OsyncError

_HELP = """\
  /bye         end (also Ctrl-D)
  /clear       forget the conversation
  \"\"\"          begin and end a text of several lines
  Ctrl-C       stop an answer"""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def answer_once(client: OllamaClient, model: str, prompt: str, options: Mapping[str, Any]) -> None:
    """Stream one completion to stdout."""
    printer = _Printer()
    with client.generate(model, prompt, options=options) as stream:
        for piece in stream:
            printer.show(piece.thinking, piece.response)
    printer.end()


def converse(client: OllamaClient, model: str, options: Mapping[str, Any]) -> None:
    """Chat on the terminal until the end of input or /bye."""
    try:
        import readline  # noqa: F401 - gives input() its line editing
    except ImportError:
        pass
    with closing(client.chat(model, [], options=options)) as loading:  # loads; fails here if it cannot
        for _ in loading:
            pass
    history: list[dict[str, Any]] = []
    for text in _texts():
        if text == "/clear":
            history.clear()
            continue
        history.append({"role": "user", "content": text})
        try:
            said = _say(client.chat(model, history, options=options))
        except OsyncError as error:
            typer.echo(f"Error: {error}", err=True)
            history.pop()
            continue
        history.append({"role": "assistant", "content": said})


def _say(stream: Stream[ChatResponse]) -> str:
    """Print an answer; Ctrl-C stops it there. Returns what was said."""
    printer = _Printer()
    said = []
    with stream:
        try:
            for piece in stream:
                said.append(piece.message.content)
                printer.show(piece.message.thinking, piece.message.content)
        except KeyboardInterrupt:
            pass
    printer.end()
    return "".join(said)


def _texts() -> Iterator[str]:
    """Yield what the user says; ends at /bye and at the end of input."""
    while True:
        try:
            text = input(">>> ").strip()
            if text.startswith('"""'):
                text = _several_lines(text[3:])
        except KeyboardInterrupt:
            typer.echo("\nUse Ctrl-D or /bye to end.")
            continue
        except EOFError:
            typer.echo()
            return
        if text in {"/bye", "/exit", "/quit"}:
            return
        if text in {"/help", "/?"}:
            typer.echo(_HELP)
        elif text:
            yield text


def _several_lines(first: str) -> str:
    lines = [first]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    return "\n".join(lines)[:-3].strip()


class _Printer:
    """Writes pieces as they come: thoughts dimmed and only on a terminal, the answer always."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._thinking = False

    def show(self, thinking: str, text: str) -> None:
        if thinking and self._terminal:
            self._write(thinking if self._thinking else _DIM + thinking)
            self._thinking = True
        if text:
            if self._thinking:
                self._write(_PLAIN + "\n\n")
                self._thinking = False
            self._write(text)

    def end(self) -> None:
        self._write((_PLAIN if self._thinking else "") + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
