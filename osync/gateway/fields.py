"""Bodies of the routes that manage models."""

from __future__ import annotations

from osync.gateway.context import Call, Context
from osync.wire.fields import Fields


async def read_fields(ctx: Context, call: Call, struct: str) -> tuple[bytes, Fields]:
    """Return the body as it came, and decoded as Go's `struct`. Raises BadRequest."""
    raw = await call.body.read_all(ctx.settings.max_body)
    return raw, Fields.decode(raw, struct)
