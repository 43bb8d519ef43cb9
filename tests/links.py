"""Nodes and links for tests: what a proxy and a node need to meet, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from osync.net.downlink import NodeService, add_node_service
from osync.net.exchange import Body, Exchange, Link, Responder, Serve
from osync.net.server import RpcServer
from osync.net.uplink import RemoteLink
from osync.types import BackendState, ModelInfo, NodeId, NodeState, RequestHead, ResponseHead

ROOT = Path(__file__).resolve().parents[1]
OK = ResponseHead(200, (("Content-Type", "application/x-ndjson"),))
GET = RequestHead("GET", "/")


def node_state(node_id: str = "node-1") -> NodeState:
    """Return the state of a node with one model."""
    backend = BackendState("ollama", ok=True, version="0.12.0", models=(ModelInfo("m:latest"),))
    return NodeState(NodeId(node_id), backend, hostname="host-1", roles=("node",))


@dataclass
class FakeNode:
    """A node role whose answers the test gives."""

    answer: Serve
    current: NodeState = field(default_factory=node_state)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        await self.answer(head, body, responder)

    def state(self) -> NodeState:
        return self.current

    def on_change(self, notify: Callable[[], None]) -> None:
        self.listeners.append(notify)

    def change(self, **fields: object) -> None:
        self.current = replace(self.current, **fields)  # type: ignore[arg-type]
        for notify in self.listeners:
            notify()


@asynccontextmanager
async def serving(node: FakeNode, port: int = 0) -> AsyncIterator[tuple[int, NodeService]]:
    """Serve a node's door on loopback."""
    server = RpcServer("127.0.0.1", port)
    service = add_node_service(server, node)
    bound = await server.start()
    try:
        yield bound, service
    finally:
        await server.stop(0.1)


@asynccontextmanager
async def linked(port: int) -> AsyncIterator[RemoteLink]:
    """Hold a link to a node that is up."""
    link = RemoteLink(f"127.0.0.1:{port}", "proxy-1")
    link.start()
    try:
        await until(lambda: link.state is not None)
        yield link
    finally:
        await link.close()


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def fetch(link: Link, head: RequestHead = GET, body: bytes | None = b"") -> tuple[ResponseHead, bytes]:
    """Make one request and read all of its answer."""
    exchange = link.open(head, body)
    try:
        answer = await exchange.head()
        return answer, await rest(exchange)
    finally:
        exchange.close()


async def rest(exchange: Exchange) -> bytes:
    """Read an answer to its end."""
    parts = []
    while data := await exchange.read():
        parts.append(data)
    return b"".join(parts)


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that no other place has."""
    return hashlib.shake_128(seed.to_bytes(8, "big")).digest(size)


NODE_PROGRAM = """
import asyncio, sys
from tests.links import FakeNode, serving, OK
async def answer(head, body, responder):
    if head.target == "/silent":
        await asyncio.Event().wait()
    await responder.start(OK)
    while True:
        await responder.write(b"token ")
        await asyncio.sleep(0.01)
async def main():
    async with serving(FakeNode(answer), int(sys.argv[1])) as (port, _):
        print(port, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def node_process(port: int = 0) -> AsyncIterator[tuple[int, subprocess.Popen[str]]]:
    """Run a node in a process of its own: `/silent` never answers, anything else streams for ever."""
    command = [sys.executable, "-c", NODE_PROGRAM, str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        yield int(line), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
