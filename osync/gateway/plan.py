"""GET /api/plan: how a model would be split over the shards now, and whether it would be."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from osync.core.plan import NoPlan, Plan
from osync.core.planner import HEADER, Decision
from osync.core.planner import explain as rows_of
from osync.errors import BadRequest, NotSupported
from osync.gateway import pipelines, relay
from osync.gateway.context import Call, Context
from osync.wire import names
from osync.wire.options import parse_options


async def plan(ctx: Context, call: Call) -> None:
    """Answer ?model=NAME&stages=N&shards=A,B&context=N with the plan, its reason, and who would get a request."""
    query = {name: values[-1] for name, values in parse_qs(call.query, keep_blank_values=True).items()}
    name = query.get("model", "")
    if not name:
        raise BadRequest("model is required")
    options = parse_options(
        {
            "stages": _number(query, "stages"),
            "num_ctx": _number(query, "context"),
            "shards": query.get("shards") or None,
        }
    ).runner
    model = names.canonical(name)
    if ctx.pipelines is None:
        raise NotSupported(ctx.no_pipelines)
    held = pipelines.holders(ctx, model)
    found, decision = await ctx.pipelines.explain(name, None, options, held)
    info = ctx.pipelines.info(model)
    if info is not None and pipelines.stays_whole(ctx, info, held):
        decision = Decision(False, "it is small, and a node has it loaded or has room for it", held[0].id)
    await relay.send_json(call, 200, {"model": info.name if info else name, **_answer(found, decision)})


def _answer(found: Plan | NoPlan, decision: Decision) -> dict[str, Any]:
    verdict = {"is_split": decision.is_split, "reason": decision.reason, "node": decision.host}
    if isinstance(found, NoPlan):
        return {
            "decision": verdict,
            "plan": None,
            "reason": found.reason,
            "needed_bytes": found.needed_bytes,
            "lent_bytes": found.lent_bytes,
        }
    return {
        "decision": verdict,
        "plan": asdict(found),
        "reason": found.reason,
        "table": {"header": HEADER, "rows": rows_of(found)},
    }


def _number(query: dict[str, str], name: str) -> int | None:
    text = query.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)
