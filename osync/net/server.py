"""The daemon's one gRPC server: services of all roles, health, reflection, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from osync.errors import ConfigError
from osync.net.intercept import ErrorInterceptor
from osync.net.options import SERVER

log = structlog.get_logger("osync.net")

UNWIND_S: Final = 5.0
"""What handlers get to see their cancellation; the library itself does not wait for that."""

ServicerT = TypeVar("ServicerT")


class RpcServer:
    """Binds one port. Not usable again after `stop`."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._interceptor = ErrorInterceptor()
        self._server = grpc.aio.server(interceptors=(self._interceptor,), options=SERVER)
        self._health = health.aio.HealthServicer()
        self._names = [reflection.SERVICE_NAME]
        self._closers: list[Callable[[float], Awaitable[None]]] = []
        self.add_service(health_pb2_grpc.add_HealthServicer_to_server, self._health, health.SERVICE_NAME)

    def add_service(
        self, add: Callable[[ServicerT, grpc.aio.Server], None], servicer: ServicerT, full_name: str
    ) -> None:
        """Add a service before `start`; `add` is the generated add_…_to_server."""
        add(servicer, self._server)
        self._names.append(full_name)

    def on_stop(self, close: Callable[[float], Awaitable[None]]) -> None:
        """Await `close(grace_s)` when `stop` begins: for services whose calls never end on their own."""
        self._closers.append(close)

    async def start(self) -> int:
        """Listen; return the port. Raises ConfigError where it cannot be bound."""
        reflection.enable_server_reflection(self._names, self._server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            await self._probe()
            port = self._server.add_insecure_port(f"{host}:{self._port}")
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot listen on {host}:{self._port} for gRPC ({error}): is another osyncd running? "
                "Choose another --grpc-port, or 0 for a free one"
            ) from error
        await self._server.start()
        await self.serving(True)
        return port

    async def serving(self, ok: bool) -> None:
        """Say by the standard health service, of the server and of each service, whether it takes work."""
        status = health_pb2.HealthCheckResponse.SERVING if ok else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let running ones finish for `grace_s`, cancel the rest, and wait for them."""
        await self.serving(False)
        until = time.monotonic() + grace_s
        for close in self._closers:
            await close(max(0.0, until - time.monotonic()))
        grace_s = max(0.0, until - time.monotonic())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.stop(grace_s), name="grpc.stop")
            # Watchers of health would use up the grace: they never end on their own.
            self._interceptor.end(lambda method: method.startswith("/grpc."))
        await self._interceptor.wait(UNWIND_S)

    async def _probe(self) -> None:
        """Bind and let go. Raises OSError; the library would print to stderr and hide the reason."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
