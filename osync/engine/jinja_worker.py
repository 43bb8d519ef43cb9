"""Renders one model's chat template in a process of its own; run by its path, imports nothing of osync.

A template is a program that comes with a model file. jinja2's sandbox keeps it from reaching objects, but not
from looping or from building gigabytes; an address-space limit and an alarm that kills the process do.
Frames both ways: 4 bytes of length, little-endian, then JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

MEMORY_BYTES = 1 << 30
OUTPUT_CHARS = 16 << 20
FRAME_BYTES = 256 << 20


def main() -> None:
    """Serve frames on stdin until it ends. The first loads the template, each other renders it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: Any = None
    while (request := _receive(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, float(request["deadline_s"]))  # unhandled: ends the process
        try:
            if "source" in request:
                template = _compile(request["source"])
                answer = {"text": ""}
            else:
                answer = {"text": _render(template, request["variables"])}
        except _RaisedError as error:
            answer = {"raised": str(error)[:500]}
        except MemoryError:
            answer = {"failed": f"it needs over {MEMORY_BYTES >> 20} MiB of memory"}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = json.dumps(answer).encode()
        sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
        sys.stdout.buffer.flush()


class _RaisedError(Exception):
    """The template itself called raise_exception."""


def _receive(stream: BinaryIO) -> Any:
    prefix = stream.read(4)
    if len(prefix) < 4:
        return None
    (length,) = struct.unpack("<I", prefix)
    data = stream.read(length) if length <= FRAME_BYTES else b""
    return json.loads(data) if len(data) == length else None


def _raise(text: object) -> None:
    raise _RaisedError(str(text))


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _compile(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant said; it has no effect on the text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _render(template: Any, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > OUTPUT_CHARS:
            raise ValueError(f"its output is over {OUTPUT_CHARS >> 20} Mi characters")
        parts.append(part)
    return "".join(parts)


if __name__ == "__main__":
    main()
