"""A gateway over several fake Ollamas, each behind its own node, linked in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from osync.backend.ollama import OllamaBackend
from osync.cluster.view import ClusterView, Peer
from osync.config import Settings
from osync.errors import FrameTooLarge, NotSupported
from osync.gateway.app import Gateway
from osync.net.exchange import Body, Responder
from osync.net.memory import MemoryLink
from osync.types import BackendState, Headers, HostLoad, ModelInfo, NodeId, NodeState, RequestHead, ResponseHead
from tests.fakes.fault import Changes
from tests.fakes.ollama import FakeOllama


class Pieces:
    """A request body that comes in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return self._pieces.pop(0) if self._pieces else b""

    async def read_all(self, limit: int) -> bytes:
        data, self._pieces = b"".join(self._pieces), []
        if len(data) > limit:
            raise FrameTooLarge(f"request body over {limit} bytes")
        return data


@dataclass
class Reply:
    """An answer as it comes."""

    head: ResponseHead | None = None
    body: bytes = b""
    changes: Changes = field(default_factory=Changes)

    @property
    def started(self) -> bool:
        return self.head is not None

    async def start(self, head: ResponseHead) -> None:
        assert self.head is None
        self.head = head
        self.changes.notify()

    async def write(self, data: bytes) -> None:
        assert self.head is not None
        self.body += data
        self.changes.notify()

    @property
    def status(self) -> int:
        assert self.head is not None
        return self.head.status

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [orjson.loads(line) for line in self.body.splitlines()]

    @property
    def node(self) -> str:
        return self.header("x-osync-node")

    def header(self, name: str) -> str:
        assert self.head is not None
        return next((v for k, v in self.head.headers if k.lower() == name), "")


class EngineBackend:
    """An engine node as the gateway meets it: tags and show, and 501 for what changes models."""

    def __init__(self, *models: str) -> None:
        self.infos = tuple(ModelInfo(m, digest="e", modified_at="2026-05-05T00:00:00Z") for m in models)

    def state(self) -> BackendState:
        return BackendState("engine", ok=True, version="0.1.0", models=self.infos)

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        if head.target == "/api/tags":
            rows = [{"name": m.name, "model": m.name, "modified_at": m.modified_at, "digest": "e"} for m in self.infos]
            await responder.start(ResponseHead(200, (("Content-Type", "application/json"),)))
            await responder.write(orjson.dumps({"models": rows}))
            return
        raise NotSupported("the engine backend cannot do this")


class Rig:
    """The gateway and what is behind it."""

    def __init__(self, gateway: Gateway, fakes: list[FakeOllama], view: ClusterView) -> None:
        self.gateway, self.fakes, self.view = gateway, fakes, view

    async def ask(self, method: str, target: str, body: Any = b"", *, reply: Reply | None = None,
                  headers: Headers = ()) -> Reply:  # fmt: skip
        """Send one request and wait for its end."""
        reply = reply or Reply()
        if not isinstance(body, (bytes, Pieces)):
            body = orjson.dumps(body)
        stream = body if isinstance(body, Pieces) else Pieces(body)
        head = RequestHead(method, target, (("Host", "localhost:8000"), ("User-Agent", "test"), *headers))
        async with asyncio.timeout(15):
            await self.gateway.serve(head, stream, reply)
        return reply

    def begin(self, method: str, target: str, body: Any = b"", **more: Any) -> tuple[Reply, asyncio.Task[Reply]]:
        """Send one request and return at once."""
        reply = Reply()
        return reply, asyncio.create_task(self.ask(method, target, body, reply=reply, **more))

    async def settled(self, condition: Callable[[], object]) -> None:
        """Wait until what the nodes say of themselves fulfils `condition`."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)

    def having(self, name: str) -> list[int]:
        """Return which fakes have the model."""
        return [i for i, fake in enumerate(self.fakes) if fake.store.find(name) is not None]

    def stop(self, index: int) -> None:
        """Take a node out of the cluster, as a dead daemon is."""
        self.view.peers.pop(index)


@asynccontextmanager
async def rig(*fakes: FakeOllama, engines: tuple[EngineBackend, ...] = ()) -> AsyncIterator[Rig]:
    """Run fakes, their nodes n0, n1, … and a gateway; engines are e0, e1, …"""
    async with AsyncExitStack() as stack:
        view = ClusterView()

        def join(node_id: str, backend: Any, free: int) -> None:
            def state() -> NodeState:
                load = HostLoad(memory_free=free)
                return NodeState(NodeId(node_id), backend.state(), hostname=node_id, load=load)

            link = MemoryLink(backend.serve, state, address=node_id)
            stack.push_async_callback(link.close)
            view.peers.append(Peer(link))

        for index, fake in enumerate(fakes):
            await stack.enter_async_context(fake)
            backend = OllamaBackend(fake.url)
            ready = asyncio.Event()
            backend.on_change(ready.set)
            await backend.start()
            stack.push_async_callback(backend.close)
            async with asyncio.timeout(10):
                while not backend.state().ok:
                    ready.clear()
                    await ready.wait()
            join(f"n{index}", backend, free=index)
        for index, engine in enumerate(engines):
            join(f"e{index}", engine, free=99)
        yield Rig(Gateway(Settings(), view, NodeId("proxy")), list(fakes), view)
