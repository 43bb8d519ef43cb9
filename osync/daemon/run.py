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

from osync.backend.absent import NoBackend
from osync.backend.base import Backend
from osync.backend.choose import choose
from osync.cluster.membership import Membership
from osync.config import Settings, default_state_dir
from osync.daemon.identity import node_id
from osync.daemon.notify import notify
from osync.daemon.pipelines import Distribution
from osync.daemon.shard import blobs_of, make_shard
from osync.errors import OsyncError
from osync.gateway.app import Gateway
from osync.gateway.http import HttpServer
from osync.net.blob import Find, add_blob_service
from osync.net.downlink import add_node_service
from osync.net.exchange import Serve
from osync.net.inference import add_inference
from osync.net.memory import MemoryLink
from osync.net.server import RpcServer
from osync.net.shard_service import add_shard_service
from osync.net.tasks import Tasks
from osync.node.role import NodeRole
from osync.shard.role import ShardRole
from osync.telemetry import log as logging
from osync.telemetry.lag import LoopLag
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
            # A daemon without HTTP has no metrics to be scraped: it says it here.
            lag_ms = round(daemon.lag.quantile(0.99) * 1e3, 1)
            log.info("stopping", drain_s=settings.drain_timeout, loop_lag_p99_ms=lag_ms)
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
        self.shard: ShardRole | None = None
        self.http: HttpServer | None = None
        self.http_port = 0
        self.distribution: Distribution | None = None
        self.lag = LoopLag()
        self._tasks = Tasks("daemon")

    async def start(self) -> None:
        """Bring up backend, gRPC, links and HTTP, in that order. Raises OsyncError."""
        settings = self.settings
        self._tasks.spawn("lag", self.lag.watch())
        serve: Serve | None = None
        backend: Backend | None = None
        finders: list[Find] = []
        if "node" in settings.role or "shard" in settings.role:
            backend = await choose(settings) if "node" in settings.role else NoBackend()
            if "shard" in settings.role:
                self.shard = await make_shard(settings, backend)
                add_shard_service(self.rpc, self.shard)
            self.node = NodeRole(settings, backend, self.node_id, shard=self.shard)
            serve = self.node.serve
            add_node_service(self.rpc, self.node)
            finders.append(blobs_of(settings, backend, self.shard))
        if "proxy" in settings.role:
            local = MemoryLink(self.node.serve, self.node.state) if self.node else None
            self.membership = Membership(settings, self.node_id, local)
            gateway = Gateway(settings, self.membership.view, self.node_id)
            gateway.context.metrics.watch_loop(self.lag)
            if settings.distributed:
                self.distribution = Distribution(settings, self.node_id, self.membership, gateway.context)
                finders.append(self.distribution.find_blob)
            serve = gateway.serve
            self.http = HttpServer(gateway, settings)
        assert serve is not None, "settings are checked to have a role"
        add_inference(self.rpc, serve)
        add_blob_service(self.rpc, lambda digest: next(filter(None, (find(digest) for find in finders)), None))
        if self.shard:
            await self.shard.start()
        grpc_port = await self.rpc.start()
        if self.node:
            await self.node.start(grpc_port)
        if self.membership and self.http:
            await self.membership.start()
            if self.distribution:
                await self.distribution.start(grpc_port, backend, self.shard)
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
        if self.shard:
            self.shard.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                if self.http:
                    await self.http.stop(drain_s)
                if self.node:
                    await self.node.idle()
                if self.shard:
                    await self.shard.idle()

    async def close(self) -> None:
        """End everything, whatever state it is in; a part that fails to end is logged."""
        parts = [self._tasks.close()]
        if self.http:
            parts.append(self.http.stop(0))
        if self.distribution:
            parts.append(self.distribution.close())
        if self.membership:
            parts.append(self.membership.close())
        parts.append(self.rpc.stop(1.0))
        if self.shard:
            parts.append(self.shard.close())
        if self.node:
            parts.append(self.node.close())
        for part in parts:
            try:
                await part
            except (OsyncError, OSError) as error:
                log.warning("close_failed", error=repr(error))
