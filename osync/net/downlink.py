"""The node's door for proxies: the servicer of osync.v1.Node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
import structlog

from osync.errors import WireError
from osync.net.convert import PROTOCOL, fill_state
from osync.net.exchange import Body, Responder, Serve
from osync.net.served import ServingSession
from osync.net.server import RpcServer
from osync.net.tasks import Tasks
from osync.pb import node_pb2 as pb
from osync.pb import node_pb2_grpc
from osync.types import NodeState, RequestHead

log = structlog.get_logger("osync.net")

STATE_EVERY_S: Final = 1.0
STATE_GAP_S: Final = 0.05
"""Least time between two states, however often they change: counts of active requests do with each one."""
HELLO_S: Final = 5.0
FLUSH_S: Final = 1.0


FULL_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Node"].full_name


class Served(Protocol):
    """What the node role offers to its door."""

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        """Answer one request (a `Serve`)."""
        ...

    def state(self) -> NodeState:
        """Return what to tell proxies now."""
        ...

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever `state()` would answer something new."""
        ...


def add_node_service(server: RpcServer, node: Served) -> NodeService:
    """Open the node's door on a server, which closes it when it stops."""
    service = NodeService(node.serve, node.state, node.on_change)
    server.add_service(node_pb2_grpc.add_NodeServicer_to_server, service, FULL_NAME)
    server.on_stop(service.close)
    return service


class NodeService(node_pb2_grpc.NodeServicer):
    """Serves every proxy that connects: state up, requests down, answers up."""

    def __init__(
        self,
        serve: Serve,
        state: Callable[[], NodeState],
        register_change: Callable[[Callable[[], None]], None],
    ) -> None:
        self._serve = serve
        self._state = state
        self._links: set[_ProxyLink] = set()
        self._closing = asyncio.Event()
        register_change(self._changed)

    def __len__(self) -> int:
        return len(self._links)

    @property
    def active(self) -> int:
        """Requests that are being served, over all proxies."""
        return sum(len(link.session) for link in self._links)

    async def Link(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve one proxy until it goes, or this service closes."""
        hello = await self._hello(context)
        link = _ProxyLink(ServingSession(self._serve, hello.node_id), self._state, context)
        self._links.add(link)
        log.info("proxy_connected", proxy=hello.node_id, version=hello.version, address=context.peer())
        try:
            await link.run(self._closing)
        finally:
            self._links.discard(link)
            log.info("proxy_gone", proxy=hello.node_id, address=context.peer())

    async def close(self, grace_s: float = 0.0) -> None:
        """End all links: no new requests, `grace_s` for those that run, and proxies see the streams end."""
        await asyncio.gather(*(link.session.drain(grace_s) for link in self._links))
        self._closing.set()

    async def _hello(self, context: Any) -> pb.Hello:
        try:
            async with asyncio.timeout(HELLO_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came")
        if first is grpc.aio.EOF or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        if first.hello.protocol != PROTOCOL:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the proxy speaks protocol {first.hello.protocol}, this node {PROTOCOL}: "
                "run the same osync version on both",
            )
        hello: pb.Hello = first.hello
        return hello

    def _changed(self) -> None:
        for link in self._links:
            link.changed()


class _ProxyLink:
    """One connected proxy: a task that reads, one that writes, and the timer of its state."""

    def __init__(self, session: ServingSession, state: Callable[[], NodeState], context: Any) -> None:
        self.session = session
        self._state = state
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._sent_at = 0.0
        self._state_due = True
        self._soon = False
        self._pong = 0
        self._timer: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """Send the state: at once, or where one has just gone, a moment later."""
        if not self._state_due and not self._soon:
            self._soon = True
            self._arm(max(self._sent_at + STATE_GAP_S - self._loop.time(), 0.0))

    async def run(self, closing: asyncio.Event) -> None:
        """Carry frames until either side ends it."""
        tasks = Tasks("link")
        writer = tasks.spawn("write", self._write())
        work = {writer, tasks.spawn("read", self._read()), tasks.spawn("closing", closing.wait())}
        self.session.outbox.wake()
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            if closing.is_set():
                self.session.outbox.close()
                await asyncio.wait({writer}, timeout=FLUSH_S)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            # All is cancelled before anything is awaited: the library may cancel this handler twice, once for
            # the proxy that left and once for the server that stops.
            for task in work:
                task.cancel()
            await self.session.close()
            await tasks.close()

    async def _read(self) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            if message.ping:
                self._pong = message.ping
                self.session.outbox.wake()
            try:
                self.session.receive(message.frames)
            except WireError as error:
                log.warning("proxy_misbehaved", address=self._context.peer(), error=str(error))
                return

    async def _write(self) -> None:
        outbox = self.session.outbox
        while not outbox.done:
            await outbox.wait()
            message = pb.LinkDown()
            due = self._state_due
            if due:
                fill_state(message.state, self._state())
                self._state_due = self._soon = False
                self._sent_at = self._loop.time()
                self._arm(STATE_EVERY_S)
            frames = message.frames
            outbox.fill(frames)
            if pong := self._pong:
                message.pong, self._pong = pong, 0
            if frames or due or pong:
                try:
                    await self._context.write(message)
                except (grpc.aio.BaseError, asyncio.InvalidStateError):
                    return  # the proxy is gone

    def _arm(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, self._due)

    def _due(self) -> None:
        self._state_due = True
        self.session.outbox.wake()
