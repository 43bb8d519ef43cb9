"""The composition root: what runs in a daemon of which role, and in which order it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from osync.backend.choose import choose
from osync.cluster.membership import Membership
from osync.config import Settings, default_state_dir
from osync.daemon.identity import node_id
from osync.daemon.notify import notify
from osync.errors import OsyncError
from osync.gateway.app import Gateway
from osync.gateway.http import HttpServer
from osync.net.downlink import add_node_service
from osync.net.exchange import Serve
from osync.net.inference import add_inference
from osync.net.memory import MemoryLink
from osync.net.server import RpcServer
from osync.node.role import NodeRole
from osync.telemetry import log as logging
from osync.types import NodeId
from osync.version import __version__

log = structlog.get_logger("osync.daemon")


def run_daemon(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit status. Raises OsyncError if it cannot start."""
    logging.setup(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(settings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32" or os.environ.get("OSYNC_LOOP") == "asyncio":
        return None
    import uvloop

    return uvloop.new_event_loop


async def _run(settings: Settings) -> int:
    stop = Stop()
    async with contextlib.AsyncExitStack() as stack:
        daemon = Daemon(settings)
        stack.push_async_callback(daemon.close)
        with stop.installed():
            await daemon.start()
            notify("READY=1")
            await stop.asked.wait()
            notify("STOPPING=1")
            log.info("stopping", drain_s=settings.drain_timeout)
            await daemon.drain()
    log.info("stopped")
    return 0


@dataclass(slots=True)
class Stop:
    """Turns the first SIGTERM or SIGINT into an event; the second ends the process at once."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to the signals while inside."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _received(self, number: int) -> None:
        if self.asked.is_set():
            os._exit(128 + number)
        self.asked.set()


class Daemon:
    """The parts of one daemon. `start` brings up what its roles need; `close` takes it down in reverse."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started_at = time.time()
        state_dir = settings.state_dir or default_state_dir()
        self.node_id: NodeId = node_id(state_dir, settings.host, settings.grpc_port)
        self.rpc = RpcServer(settings.host, settings.grpc_port)
        self.node: NodeRole | None = None
        self.membership: Membership | None = None
        self.http: HttpServer | None = None
        self.http_port = 0

    async def start(self) -> None:
        """Bring up backend, gRPC, links and HTTP, in that order. Raises OsyncError."""
        settings = self.settings
        serve: Serve | None = None
        if "node" in settings.role:
            self.node = NodeRole(settings, await choose(settings), self.node_id)
            serve = self.node.serve
            add_node_service(self.rpc, self.node)
        if "proxy" in settings.role:
            local = MemoryLink(self.node.serve, self.node.state) if self.node else None
            self.membership = Membership(settings, self.node_id, local)
            gateway = Gateway(settings, self.membership.view, self.node_id)
            serve = gateway.serve
            self.http = HttpServer(gateway, settings)
        assert serve is not None, "settings are checked to have a role"
        add_inference(self.rpc, serve)
        grpc_port = await self.rpc.start()
        if self.node:
            await self.node.start(grpc_port)
        if self.membership and self.http:
            await self.membership.start()
            self.http_port = await self.http.start()
        self._announce(grpc_port)

    def _announce(self, grpc_port: int) -> None:
        settings = self.settings
        backend = self.node.state().backend if self.node else None
        log.info(
            "started",
            version=__version__,
            node_id=self.node_id,
            roles=",".join(settings.role),
            http=f"http://{settings.host}:{self.http_port}" if self.http else None,
            grpc=f"{settings.host}:{grpc_port}",
            backend=backend.kind if backend else None,
            peers=",".join(settings.peers) or None,
            security="insecure" if settings.insecure else "loopback only",
        )
        if settings.insecure and not settings.is_loopback:
            log.warning("insecure", text="no authentication: anyone who reaches this host can use and manage it")

    async def drain(self) -> None:
        """Take nothing new, and let running streams end within the drain timeout."""
        drain_s = self.settings.drain_timeout
        if self.node:
            self.node.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                if self.http:
                    await self.http.stop(drain_s)
                if self.node:
                    await self.node.idle()

    async def close(self) -> None:
        """End everything, whatever state it is in; a part that fails to end is logged."""
        parts = []
        if self.http:
            parts.append(self.http.stop(0))
        if self.membership:
            parts.append(self.membership.close())
        parts.append(self.rpc.stop(1.0))
        if self.node:
            parts.append(self.node.close())
        for part in parts:
            try:
                await part
            except (OsyncError, OSError) as error:
                log.warning("close_failed", error=repr(error))
