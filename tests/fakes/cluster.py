"""A proxy in memory: nodes are plain `Serve` functions behind memory links, the listener is real."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from osync.cluster.view import ClusterView, Peer
from osync.config import Settings
from osync.gateway.app import Gateway
from osync.gateway.http import HttpServer
from osync.net.exchange import Body, Responder
from osync.net.memory import MemoryLink
from osync.types import (
    BackendKind,
    BackendState,
    LoadedModel,
    ModelInfo,
    NodeId,
    NodeState,
    RequestHead,
    ResponseHead,
)


@dataclass
class ScriptedNode:
    """A node whose answers a test writes: override `serve`."""

    name: str
    models: tuple[str, ...] = ("m:latest",)
    loaded: tuple[str, ...] = ()
    kind: BackendKind = "ollama"
    ok: bool = True
    draining: bool = False
    up: bool = True
    requests: list[tuple[RequestHead, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """For tests' own state."""

    def state(self) -> NodeState | None:
        """What it pushes."""
        if not self.up:
            return None
        models = tuple(ModelInfo(name, digest=f"digest-{name}", size=7, family="llama") for name in self.models)
        loaded = tuple(LoadedModel(name, digest=f"digest-{name}") for name in self.loaded)
        backend = BackendState(self.kind, self.ok, "" if self.ok else "refused", "0.1", models, loaded)
        node_id = NodeId(self.name)
        return NodeState(node_id, backend, f"host-{self.name}", "0", ("node",), draining=self.draining)

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request."""
        data = await body.read_all(1 << 27)
        self.requests.append((head, data))
        await self.answer(head, data, responder)

    async def answer(self, head: RequestHead, data: bytes, responder: Responder) -> None:
        """Say who it is."""
        await reply(responder, 200, {"node": self.name, "target": head.target})


async def reply(responder: Responder, status: int, value: object) -> None:
    """Answer with JSON of known length."""
    data = orjson.dumps(value)
    headers = (("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(len(data))))
    await responder.start(ResponseHead(status, headers))
    await responder.write(data)


class Proxy:
    """A gateway over scripted nodes, listening on a free port."""

    def __init__(self, *nodes: ScriptedNode, settings: Settings | None = None) -> None:
        self.nodes = nodes
        self.links = [MemoryLink(node.serve, node.state, f"{node.name}:50051") for node in nodes]
        self.settings = replace(settings or Settings(), port=0)
        self.view = ClusterView([Peer(link) for link in self.links])
        self.gateway = Gateway(self.settings, self.view, NodeId("proxy"))
        self.server = HttpServer(self.gateway, self.settings)
        self.url = ""
        self.port = 0

    async def __aenter__(self) -> Self:
        self.port = await self.server.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = aiohttp.ClientSession(self.url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()
        await self.server.stop(1.0)
        for link in self.links:
            await link.close()

    def post(self, path: str, value: object, **headers: str) -> aiohttp.client._RequestContextManager:
        """POST JSON; header names with underscores."""
        data = io.BytesIO(value if isinstance(value, bytes) else orjson.dumps(value))
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.client.post(path, data=data, headers={"Content-Type": "application/json", **named})

    @property
    def in_flight(self) -> int:
        """Requests that the gateway has open on nodes."""
        return sum(self.gateway.context.in_flight.values())


@asynccontextmanager
async def proxy(*nodes: ScriptedNode, settings: Settings | None = None) -> AsyncIterator[Proxy]:
    """Run a proxy over these nodes."""
    async with Proxy(*nodes, settings=settings) as running:
        yield running
