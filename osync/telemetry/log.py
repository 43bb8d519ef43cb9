"""structlog set-up: one line per event, readable on a terminal, JSON elsewhere, always to stderr.

What libraries say through the standard library's logging comes out in the same form.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter


class LibraryHandler(logging.StreamHandler[Any]):
    """Writes the records of the standard library's logging; one that cannot be rendered is an event too."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Log the failure instead of the record, whose message may not fit its arguments."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ValueError)) or not getattr(self.stream, "closed", False):
            structlog.get_logger("osync.log").error("record_lost", logger=record.name, error=repr(error))


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
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    last: list[Any] = [renderer] if console else [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = LibraryHandler(sys.stderr)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.add_logger_name],
            processors=[ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, LibraryHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))  # only what matters of what libraries say
    logging.captureWarnings(True)


def _to_json(value: Any, default: Any = None, **_: Any) -> str:
    # Keys that are no strings and integers over 64 bits come from libraries; neither may cost the line.
    try:
        return orjson.dumps(value, default=default or repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, ValueError):
        return orjson.dumps({str(key): _plain(item) for key, item in value.items()}).decode()


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text.encode("utf-8", "replace").decode()
