"""structlog set-up: one line per event, readable on a terminal, JSON elsewhere, always to stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import orjson
import structlog


def setup(level: str, log_format: str) -> None:
    """Configure logging of the process; `log_format` is console, json, or auto."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level]
    renderer: Any
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ,
            exception_formatter=structlog.dev.plain_traceback,  # rich's shows locals: prompts, that is
        )
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_to_json)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What libraries have to say goes to the same place; only what matters of it.
    logging.basicConfig(level=max(number, logging.WARNING), format="%(name)s: %(message)s", stream=sys.stderr)


def _to_json(value: Any, default: Any = None, **_: Any) -> str:
    return orjson.dumps(value, default=default or repr).decode()
