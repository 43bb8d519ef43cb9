"""A proxy's link to a node on another host: one stream, kept up for as long as the link lives."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
import structlog

from osync.errors import UpstreamUnavailable, WireError
from osync.net.channel import open_channel
from osync.net.convert import PROTOCOL, state_from
from osync.net.guard import rpc_guard
from osync.net.options import describe
from osync.net.remote import RemoteExchange, Session
from osync.net.round_trip import RoundTrip
from osync.net.tasks import Tasks
from osync.pb import node_pb2 as pb
from osync.pb import node_pb2_grpc
from osync.types import NodeState, RequestHead
from osync.version import __version__

log = structlog.get_logger("osync.net")

SILENCE_S: Final = 3.0
"""A node pushes its state every second; one that is silent this long is taken for dead."""
BACKOFF_S: Final = (0.2, 2.0)
"""First and longest wait between attempts to connect."""
PING_EVERY_S: Final = 1.0


class RemoteLink:
    """Keeps one node connected (a `Link`), and says what it knows of it."""

    def __init__(self, address: str, proxy_id: str) -> None:
        self.error = "not connected yet"
        """Why the link is down, in words for a person; "" while it is up."""
        self.failures = 0
        """Attempts that failed since the node last answered."""
        self.last_seen = 0.0
        """Unix time of the newest state; 0 before the first."""
        self._address = address
        self._proxy_id = proxy_id
        self._state: NodeState | None = None
        self._session: Session | None = None
        self._heard_at = 0.0
        self._round_trip = RoundTrip()
        self._tasks = Tasks(f"link.{address}")
        self._listeners: list[Callable[[], None]] = []

    @property
    def address(self) -> str:
        """host:port as configured or discovered."""
        return self._address

    @property
    def state(self) -> NodeState | None:
        """The newest state that the node pushed; None before the first and while it is down."""
        return self._state

    @property
    def round_trip_s(self) -> float:
        """Measured time there and back; 0.0 before the first measurement."""
        return self._round_trip.seconds

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` in the loop whenever a state came in, or the link went down or failed again."""
        self._listeners.append(notify)

    def start(self) -> None:
        """Begin to connect, and to reconnect until `close`."""
        self._tasks.spawn("keep", self._keep())

    async def close(self) -> None:
        """Break all exchanges and disconnect. Listeners hear nothing of it: it is no failure."""
        self._listeners.clear()
        await self._tasks.close()

    def open(self, head: RequestHead, body: bytes | None) -> RemoteExchange:
        """Start an exchange. Raises UpstreamUnavailable while the link is down."""
        if self._session is None or self._state is None:
            raise UpstreamUnavailable(f"node {self._address} is down: {self.error}")
        return self._session.open(head, body)

    async def _keep(self) -> None:
        async with open_channel(self._address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            while True:
                await self._connected(stub)
                # A link that was up tries again soon; one that fails again and again waits longer.
                first, longest = BACKOFF_S
                delay = min(longest, first * 1.6 ** min(self.failures - 1, 10))
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311

    async def _connected(self, stub: Any) -> None:
        """Hold one stream until it ends."""
        session = Session(self._address)
        reason = "the link was closed"
        self._round_trip.reset()
        tasks = Tasks(f"link.{self._address}")
        async with rpc_guard(stub.Link()) as call:
            try:
                self._heard_at = time.monotonic()
                reader = tasks.spawn("read", self._read(call, session))
                writer = tasks.spawn("write", self._write(call, session))
                tasks.spawn("ping", self._ping(session))
                reason = await self._watch(reader, writer)
            finally:
                session.broke(reason)
                self._down(reason)
                await tasks.close()

    async def _watch(self, reader: asyncio.Task[str], writer: asyncio.Task[None]) -> str:
        """Wait for the end of the stream, or for too long a silence; return the reason."""
        while (left := self._heard_at + SILENCE_S - time.monotonic()) > 0:
            done, _ = await asyncio.wait({reader, writer}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if reader in done:
                return "internal error" if reader.exception() else reader.result()
            if writer in done:  # it fails when the stream has ended, and the reader knows why
                done, _ = await asyncio.wait({reader}, timeout=1.0)
                return reader.result() if done and not reader.exception() else "connection closed"
        return f"no sign of life for {SILENCE_S:.0f} s"

    async def _read(self, call: Any, session: Session) -> str:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._heard_at = time.monotonic()
                session.receive(message.frames)
                if message.pong:
                    self._round_trip.returned(message.pong, self._heard_at)
                if message.HasField("state"):
                    self._up(session, state_from(message.state))
        except grpc.RpcError as error:
            return describe(error)
        except WireError as error:
            return str(error)
        code, details = await call.code(), await call.details()
        return "the node closed the link" if code is grpc.StatusCode.OK else str(details or code)

    async def _write(self, call: Any, session: Session) -> None:
        try:
            hello = pb.Hello(protocol=PROTOCOL, node_id=self._proxy_id, version=__version__)
            await call.write(pb.LinkUp(hello=hello))
            while True:
                await session.outbox.wait()
                message = pb.LinkUp()
                frames = message.frames
                session.outbox.fill(frames)
                if ping := self._round_trip.due:
                    message.ping = ping
                    self._round_trip.sent(time.monotonic())
                if frames or ping:
                    await call.write(message)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            return  # the stream has ended; the reader says why

    async def _ping(self, session: Session) -> None:
        while True:
            self._round_trip.ask()
            session.outbox.wake()
            await asyncio.sleep(PING_EVERY_S)

    def _up(self, session: Session, state: NodeState) -> None:
        self._session, self._state = session, state
        self.error, self.failures, self.last_seen = "", 0, time.time()
        self._notify()

    def _down(self, reason: str) -> None:
        self._session = self._state = None
        self.error = reason
        self.failures += 1
        self._notify()

    def _notify(self) -> None:
        for notify in self._listeners:
            notify()
