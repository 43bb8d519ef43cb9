"""Which nodes a request about models goes to, and the request as it goes there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from osync.cluster.view import Peer
from osync.core.merge import instant, majority
from osync.errors import NoNodes
from osync.gateway.context import Call, Context
from osync.gateway.health import why_no_node
from osync.gateway.pipelines import as_node
from osync.gateway.relay import upstream_head
from osync.types import ModelInfo, NodeState, RequestHead
from osync.wire import names

Node = tuple[NodeState, Peer]

_MERGED = frozenset(("accept-encoding", "range", "if-none-match", "if-modified-since"))


def label(state: NodeState) -> str:
    """Return what to call a node in a text for a person."""
    if state.hostname and state.hostname != state.node_id:
        return f"{state.hostname} ({state.node_id})"
    return state.node_id


def usable(ctx: Context, call: Call | None = None) -> list[Node]:
    """Return the nodes that may get requests, or the one that X-Osync-Node pins. Raises NoNodes."""
    pin = call.header("x-osync-node") if call else ""
    if pin:
        found = ctx.view.find(pin)
        if found is None or not found[1].usable:
            raise NoNodes(f"node {pin} is not up")
        return [found]
    nodes = [node for node in ctx.view.usable() if node[0].node_id not in ctx.drained]
    if not nodes:
        raise NoNodes(why_no_node(ctx))
    return nodes


def readable(ctx: Context, call: Call) -> list[Node]:
    """Return the nodes to ask what there is: those that may get requests, and this proxy's pipelines.

    Raises NoNodes where there is none of either.
    """
    split = None if call.header("x-osync-node") else as_node(ctx)
    if split is None:
        return usable(ctx, call)
    return [*(node for node in ctx.view.usable() if node[0].node_id not in ctx.drained), split]


def ollamas(nodes: Iterable[Node]) -> list[Node]:
    """Return those nodes that front an Ollama."""
    return [node for node in nodes if node[0].backend.kind == "ollama"]


def designated_node(nodes: Sequence[Node]) -> Node:
    """Return the one node for what only one may answer: always the same while it is up."""
    return min(ollamas(nodes) or nodes, key=lambda node: node[0].node_id)


def replicas(nodes: Iterable[Node], name: str) -> list[Node]:
    """Return the nodes that say they have the model: those with the majority digest first, then the newest."""
    key = names.key(name)
    held: list[tuple[Node, ModelInfo]] = []
    for node in nodes:
        model = next((m for m in node[0].backend.models if names.key(m.name) == key), None)
        if model is not None:
            held.append((node, model))
    digest = majority(model.digest for _, model in held)
    held.sort(key=lambda item: (item[1].digest != digest, -instant(item[1].modified_at)))
    return [node for node, _ in held]


def read_head(call: Call, method: str, target: str, *, body: bool = False) -> RequestHead:
    """Return a request that the gateway makes on behalf of `call`, to read its answer itself."""
    headers = upstream_head(call, drop=_MERGED if body else _MERGED | {"content-type", "content-encoding"}).headers
    return RequestHead(method, target, headers)
