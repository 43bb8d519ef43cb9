"""The gRPC server: health, reflection, errors, ports, and its end."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from osync.errors import CapacityError, ConfigError, ModelNotFound
from osync.net.guard import rpc_guard
from osync.net.server import RpcServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Methods:
    """Handlers of the four kinds under test, registered by hand."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.started = asyncio.Event()

    async def fails(self, request: bytes, context: object) -> bytes:
        if request == b"model":
            raise ModelNotFound("model 'x' not found")
        if request == b"full":
            raise CapacityError("busy", 2.5)
        raise ValueError("a secret prompt")

    async def streams(self, request: bytes, context: object):
        yield b"one"
        await self.fails(request, context)

    async def hangs(self, request: bytes, context: object) -> bytes:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            self.cancelled += 1
        return b""

    def add(self, servicer: object, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {
            "Fails": grpc.unary_unary_rpc_method_handler(self.fails),
            "Streams": grpc.unary_stream_rpc_method_handler(self.streams),
            "Hangs": grpc.unary_unary_rpc_method_handler(self.hangs),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("osync.test.T", handlers),))


class Running:
    """A server with those methods, and a channel to it."""

    async def __aenter__(self) -> Running:
        self.methods = Methods()
        self.server = RpcServer("127.0.0.1", 0)
        self.server.add_service(self.methods.add, self, "osync.test.T")
        self.port = await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()
        await self.server.stop(0.1)


@pytest.fixture
async def running():
    async with Running() as running:
        yield running


async def test_health_is_served_for_the_server_and_each_service(running):
    stub = health_pb2_grpc.HealthStub(running.channel)
    for service in ("", "osync.test.T"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == SERVING
    await running.server.serving(False)
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == NOT_SERVING


async def test_reflection_lists_the_services(running):
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    async with rpc_guard(stub.ServerReflectionInfo(timeout=5)) as call:
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
    assert {"osync.test.T", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (b"model", grpc.StatusCode.NOT_FOUND, "model 'x' not found"),
        (b"full", grpc.StatusCode.RESOURCE_EXHAUSTED, "busy"),
        (b"bug", grpc.StatusCode.INTERNAL, "internal error"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_errors_have_their_code_and_bugs_no_text(running, request_, code, details, streaming):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if streaming:
            async with rpc_guard(running.channel.unary_stream("/osync.test.T/Streams")(request_, timeout=5)) as call:
                async for _ in call:
                    pass
        else:
            await running.channel.unary_unary("/osync.test.T/Fails")(request_, timeout=5)
    assert (caught.value.code(), caught.value.details()) == (code, details)
    pushback = dict(caught.value.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
    assert pushback == ("2500" if request_ == b"full" else None)


async def test_a_guarded_call_is_cancelled_when_its_owner_leaves(running):
    async with rpc_guard(running.channel.unary_unary("/osync.test.T/Hangs")(b"", timeout=30)) as call:
        await running.methods.started.wait()
        assert not call.done()
    async with asyncio.timeout(5):
        while not running.methods.cancelled:
            await asyncio.sleep(0.01)


async def test_stop_waits_until_handlers_saw_their_cancellation(running):
    call = running.channel.unary_unary("/osync.test.T/Hangs")(b"", timeout=30)
    async with rpc_guard(call):
        await running.methods.started.wait()
        await running.server.stop(0.05)
        assert running.methods.cancelled == 1


async def test_a_watcher_of_health_does_not_hold_up_the_end(running):
    stub = health_pb2_grpc.HealthStub(running.channel)
    async with rpc_guard(stub.Watch(health_pb2.HealthCheckRequest())) as call:
        assert (await call.read()).status == SERVING
        began = time.monotonic()
        await running.server.stop(20)
        assert time.monotonic() - began < 5


async def test_a_taken_port_is_named(running):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{running.port} for gRPC"):
        await RpcServer("127.0.0.1", running.port).start()


async def test_a_server_that_never_started_can_be_stopped():
    await RpcServer("127.0.0.1", 0).stop(0)


class Departed:
    """A handler that fails only after its client has gone."""

    def __init__(self, how: str) -> None:
        self._how = how
        self.started = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None

    async def serve(self, requests: object, context: Any) -> None:
        self.task = asyncio.current_task()
        self.started.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if self._how == "abort":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        if self._how == "write":
            await context.write(b"late")
        raise ModelNotFound("model 'x' not found")

    def add(self, servicer: object, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {"Serve": grpc.stream_stream_rpc_method_handler(self.serve)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("osync.test.D", handlers),))


@pytest.mark.parametrize("how", ["abort", "write", "raise"])
async def test_a_call_whose_client_has_gone_fails_without_a_traceback(how, caplog):
    departed = Departed(how)
    server = RpcServer("127.0.0.1", 0)
    server.add_service(departed.add, departed, "osync.test.D")
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with capture_logs() as logs:
                begun: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/osync.test.D/Serve")()
                async with rpc_guard(begun) as call:
                    await call.write(b"")
                    await departed.started.wait()
                assert departed.task is not None
                await asyncio.wait({departed.task}, timeout=5)
                assert departed.task.done()
    finally:
        await server.stop(0.1)
    assert [log for log in logs if log["log_level"] in {"warning", "error"}] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
