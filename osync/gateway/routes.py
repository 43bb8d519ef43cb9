"""The route table: which handler answers which method and path."""

from __future__ import annotations

from osync.gateway import blobs, catalogue, health, inference, manage, nodes, passthrough, plan, status
from osync.gateway.context import Handler

Route = tuple[Handler, str]
"""A handler, and the label that the route has in metrics."""

_INFERENCE = (
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings",
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/audio/transcriptions",
)  # fmt: skip

_EXACT: dict[str, dict[str, Handler]] = {
    "/": {"GET": health.root, "HEAD": health.root},
    "/healthz": {"GET": health.healthz, "HEAD": health.healthz},
    "/readyz": {"GET": health.readyz, "HEAD": health.readyz},
    "/metrics": {"GET": health.metrics, "HEAD": health.metrics},
    "/api/status": {"GET": status.status, "HEAD": status.status},
    "/api/plan": {"GET": plan.plan},
    "/api/version": {"GET": catalogue.version, "HEAD": catalogue.version},
    "/api/tags": {"GET": catalogue.tags, "HEAD": catalogue.tags},
    "/api/ps": {"GET": catalogue.ps},
    "/api/show": {"POST": catalogue.show},
    "/v1/models": {"GET": catalogue.v1_models},
    "/api/pull": {"POST": manage.pull},
    "/api/push": {"POST": manage.push},
    "/api/create": {"POST": manage.create},
    "/api/copy": {"POST": manage.copy},
    "/api/delete": {"DELETE": manage.delete},
    "/api/me": {"POST": passthrough.designated},
    "/api/signout": {"POST": passthrough.designated},
    **{path: {"POST": inference.infer} for path in _INFERENCE},
}

_PREFIX: tuple[tuple[str, dict[str, Handler]], ...] = (
    ("/api/blobs/", {"HEAD": blobs.head, "POST": blobs.post}),
    ("/v1/models/", {"GET": catalogue.v1_model}),
    ("/api/nodes/", {"POST": nodes.admit}),
)

_OWN = frozenset(("/healthz", "/readyz", "/metrics", "/api/status", "/api/plan"))

_TABLE: dict[tuple[str, str], Route] = {
    (method, path): (handler, path) for path, methods in _EXACT.items() for method, handler in methods.items()
}


def find(method: str, path: str) -> Route | None:
    """Return the route that answers here; None: only a node may know."""
    route = _TABLE.get((method, path))
    if route is None:
        for prefix, methods in _PREFIX:
            if path.startswith(prefix) and len(path) > len(prefix) and method in methods:
                return methods[method], prefix + "*"
    return route


def methods_of(path: str) -> tuple[str, ...]:
    """Return the methods that this path is answered for here, () where it is unknown."""
    found = _EXACT.get(path)
    if found is None:
        found = next((methods for prefix, methods in _PREFIX if path.startswith(prefix) and path != prefix), {})
    return tuple(found)


def is_own(path: str) -> bool:
    """Return True if the path is the proxy's alone: no node knows more of its methods."""
    return path in _OWN or path.startswith("/api/nodes/")
