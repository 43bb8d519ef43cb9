"""Tables for people on a terminal, plain columns and JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import typer


def is_terminal() -> bool:
    """Return whether a person looks at the output."""
    return sys.stdout.isatty()


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=dict))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table on a terminal, else aligned columns that `awk` can cut."""
    body = [tuple(row) for row in rows]
    if is_terminal():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headings, box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
        for row in body:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    upper = tuple(heading.upper() for heading in headings)
    widths = [max(len(row[i]) for row in (upper, *body)) for i in range(len(upper))]
    for row in (upper, *body):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def size(count: float) -> str:
    """Return bytes as people read them, in powers of 1000 as Ollama prints them."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def ago(timestamp: str, now: datetime | None = None) -> str:
    """Return how long ago, or in what time, an RFC 3339 time is; "-" for none."""
    moment = _moment(timestamp)
    if moment is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < -10 * 365 * 86400:
        return "forever"
    words = _span(abs(seconds))
    return f"{words} ago" if seconds >= 0 else f"in {words}"


def _moment(timestamp: str) -> datetime | None:
    head, dot, tail = timestamp.partition(".")
    if dot:  # nanoseconds are more than Python reads
        digits = len(tail) - len(tail.lstrip("0123456789"))
        timestamp = f"{head}.{tail[: min(digits, 6)]}{tail[digits:]}"
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        return None
    if moment.year <= 1:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _span(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "0 seconds"
