"""POST /api/nodes/{id}/drain and /undrain: take a node out of this proxy's choice, and back."""

from __future__ import annotations

from osync.errors import BadRequest
from osync.gateway import relay
from osync.gateway.context import Call, Context
from osync.types import NodeId


class NodeUnknown(BadRequest):
    """No node of that id or host name is known here."""

    status = 404
    grpc_code = "NOT_FOUND"


async def admit(ctx: Context, call: Call) -> None:
    """Drain or undrain a node, for this proxy."""
    name, _, verb = call.path.removeprefix("/api/nodes/").rpartition("/")
    if verb not in ("drain", "undrain") or not name:
        raise NodeUnknown("say /api/nodes/ID/drain or /api/nodes/ID/undrain")
    found = ctx.view.find(name)
    if found is None and name not in ctx.drained:
        raise NodeUnknown(f"node {name!r} is not known to this proxy, or it is down")
    node_id = found[0].node_id if found else NodeId(name)
    if verb == "drain":
        ctx.drained.add(node_id)
        note = "this proxy sends the node no new requests; running ones end; other proxies are not told"
    else:
        ctx.drained.discard(node_id)
        note = "this proxy picks the node again"
    answer = {"node_id": node_id, "draining": verb == "drain", "scope": "proxy", "note": note}
    await relay.send_json(call, 200, {**answer, "in_flight": ctx.in_flight[node_id]})
