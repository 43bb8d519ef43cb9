"""Running a `Serve` so that whatever it does becomes one of: a clean end, or an OsyncError."""

from __future__ import annotations

import structlog

from osync.errors import OsyncError, StreamBroken, UpstreamUnavailable
from osync.net.exchange import Body, Responder, Serve
from osync.types import RequestHead

log = structlog.get_logger("osync.net")


async def answer(serve: Serve, head: RequestHead, body: Body, responder: Responder) -> OsyncError | None:
    """Serve one request; return why it failed, or None at its clean end. Only cancellation is raised."""
    try:
        await serve(head, body, responder)
    except OsyncError as error:
        return StreamBroken(str(error)) if responder.started else error
    except Exception as error:
        # The text of an unforeseen error may hold anything, a prompt too: it stays on this host.
        log.error("request_failed", method=head.method, path=head.target.partition("?")[0], exc_info=error)
        return (StreamBroken if responder.started else UpstreamUnavailable)("internal error")
    if not responder.started:
        log.error("request_unanswered", method=head.method, path=head.target.partition("?")[0])
        return UpstreamUnavailable("internal error: no answer")
    return None
