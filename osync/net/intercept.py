"""Around every gRPC handler of this process: errors become statuses, and none is forgotten at the end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import structlog

from osync.errors import CapacityError, OsyncError

log = structlog.get_logger("osync.net")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its types only, not at run time


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps OsyncErrors to their gRPC codes; what else a handler raises stays here, and is logged."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], str] = {}
        self._ending: set[asyncio.Task[Any]] = set()

    def end(self, which: Callable[[str], bool]) -> None:
        """End the running handlers of those methods; their callers see UNAVAILABLE."""
        for task, method in list(self._running.items()):
            if which(method):
                self._ending.add(task)
                task.cancel()

    async def wait(self, timeout_s: float) -> None:
        """Wait until no handler runs, at most that long."""
        if self._running:
            _, late = await asyncio.wait(list(self._running), timeout=timeout_s)
            if late:
                log.warning("handlers_hang", methods=sorted({self._running.get(task, "?") for task in late}))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that would run."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if handler.request_streaming:
            if handler.response_streaming:
                wrapped = self._wrap(method, handler.stream_stream)
                return grpc.stream_stream_rpc_method_handler(
                    wrapped, handler.request_deserializer, handler.response_serializer
                )
            wrapped = self._wrap(method, handler.stream_unary)
            return grpc.stream_unary_rpc_method_handler(
                wrapped, handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            wrapped = self._wrap(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(
                wrapped, handler.request_deserializer, handler.response_serializer
            )
        wrapped = self._wrap(method, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap(self, method: str, behaviour: Any) -> Any:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                self._begin(method)
                try:
                    async with aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            yield response
                except asyncio.CancelledError:
                    await self._abort_ending(context)
                    raise
                except Exception as error:
                    await _abort(context, method, error)

            return stream

        async def call(request: Any, context: Any) -> Any:
            self._begin(method)
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                await self._abort_ending(context)
                raise
            except Exception as error:
                await _abort(context, method, error)
                return None

        return call

    def _begin(self, method: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = method
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        self._ending.discard(task)

    async def _abort_ending(self, context: Any) -> None:
        # A handler that is merely cancelled sends no status, and its call stays open until the grace is over.
        if asyncio.current_task() in self._ending:
            await _send_status(context, grpc.StatusCode.UNAVAILABLE, "the server is stopping")


async def _abort(context: Any, method: str, error: Exception) -> None:
    """End a call that failed; returns where its client has gone meanwhile: then the library needs no more."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, OsyncError):
        if isinstance(error, CapacityError):
            pushback = str(int(error.retry_after_s * 1000))
            context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
        await _send_status(context, grpc.StatusCode[error.grpc_code], str(error))
        return
    if context.done() and isinstance(error, grpc.aio.BaseError):
        return  # the handler's own abort found nobody there
    if isinstance(error, grpc.aio.InternalError):  # a write that failed: as a rule its client has gone
        log.info("rpc_broke", method=method, error=str(error))
    else:
        log.error("rpc_failed", method=method, exc_info=error)
    await _send_status(context, grpc.StatusCode.INTERNAL, "internal error")


async def _send_status(context: Any, code: grpc.StatusCode, text: str) -> None:
    """Abort the call. Raises AbortError, which the library expects; returns where nobody is there to hear it."""
    try:
        await context.abort(code, text)
    except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
        log.debug("status_unsent", code=code.name, error=str(error))
