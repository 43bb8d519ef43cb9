"""/api/blobs: files of models to be created, kept on every node that may create one."""

from __future__ import annotations

import asyncio
import re

import structlog

from osync.errors import BadRequest, OsyncError, UpstreamError, UpstreamTimeout
from osync.gateway.context import Call, Context
from osync.gateway.fetch import Answer, fan_out, reason
from osync.gateway.relay import collect, downstream_head, send_empty, upstream_head
from osync.gateway.targets import Node, designated_node, label, ollamas, read_head, usable
from osync.net.exchange import Exchange
from osync.types import RequestHead, ResponseHead

log = structlog.get_logger("osync.gateway")

QUEUE_PIECES = 4
"""Pieces that one node may be behind before the upload waits for it."""

STALL_S = 60.0
"""A node that takes no byte for so long is left behind, so that it does not hold the others."""

VERIFY_S = 600.0
"""How long a node may take to answer after the last byte: it may hash many gigabytes again."""

_ERROR_BODY_LIMIT = 1 << 20
_DIGEST = re.compile(r"sha256[-:][0-9a-fA-F]{64}\Z")


def is_digest(text: str) -> bool:
    """Return True for a blob's digest, in either of the forms that Ollama takes."""
    return _DIGEST.match(text) is not None


async def head(ctx: Context, call: Call) -> None:
    """HEAD /api/blobs/{digest}: 200 only if every node that may create a model has it."""
    _check_digest(call)
    nodes = usable(ctx, call)
    targets = ollamas(nodes) or [designated_node(nodes)]
    results = await fan_out(targets, read_head(call, "HEAD", call.head.target))
    answers = [outcome for _, _, outcome in results if isinstance(outcome, Answer)]
    if not answers:
        raise UpstreamError("no node answered: " + "; ".join(f"{label(s)}: {reason(o)}" for s, _, o in results))
    status = next((answer.status for answer in answers if answer.status != 200), 200)
    await send_empty(call, status)


async def post(ctx: Context, call: Call) -> None:
    """POST /api/blobs/{digest}: to every node that may create a model, as the bytes come.

    201 if any node made it, 200 if all had it; a node that fails is left out unless all do.
    """
    _check_digest(call)
    nodes = usable(ctx, call)
    targets = ollamas(nodes) or [designated_node(nodes)]
    request = upstream_head(call)
    uploads = [_Upload(node, request) for node in targets]
    try:
        async with asyncio.TaskGroup() as group:
            for upload in uploads:
                group.create_task(upload.run(), name=f"gateway.blob[{upload.state.node_id}]")
            await _tee(call, uploads)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    await _conclude(call, uploads)


async def _tee(call: Call, uploads: list[_Upload]) -> None:
    while True:
        open_ones = [upload for upload in uploads if not upload.closed]
        if not open_ones:
            # Every node has answered: those that have the blob do so without reading it.
            return
        piece = await call.body.read()
        for upload in open_ones:
            await upload.put(piece)
        if not piece:
            return


async def _conclude(call: Call, uploads: list[_Upload]) -> None:
    stored = [upload for upload in uploads if upload.status in {200, 201}]
    for upload in uploads:
        if upload not in stored:
            log.warning("blob_upload_failed", node=upload.state.node_id, error=upload.why, path=call.path)
    if stored:
        await send_empty(call, max(upload.status for upload in stored))
        return
    answered = next((upload for upload in uploads if upload.response is not None), None)
    if answered is not None and answered.response is not None:
        await call.responder.start(downstream_head(answered.response, answered.state.node_id))
        await call.responder.write(answered.body)
        return
    kinds = {type(upload.error) for upload in uploads if upload.error is not None}
    kind = kinds.pop() if len(kinds) == 1 else UpstreamError
    raise kind("no node took the blob: " + "; ".join(f"{label(u.state)}: {u.why}" for u in uploads))


def _check_digest(call: Call) -> None:
    if not is_digest(call.path.removeprefix("/api/blobs/")):
        raise BadRequest("invalid digest format")


class _Upload:
    """One node's copy of an upload, with the few pieces that it may be behind."""

    def __init__(self, node: Node, request: RequestHead) -> None:
        self.state, self._peer = node
        self._request = request
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue(QUEUE_PIECES)
        self.closed = False
        self.response: ResponseHead | None = None
        self.body = b""
        self.error: OsyncError | None = None

    @property
    def status(self) -> int:
        """The node's status, 0 where it gave none."""
        return self.response.status if self.response else 0

    @property
    def why(self) -> str:
        """Why the blob is not there."""
        if self.response is not None:
            return reason(Answer(self.response.status, self.response.headers, self.body))
        return str(self.error) if self.error else "no answer"

    async def put(self, piece: bytes) -> None:
        """Hand over the next piece, b"" for the end; waits while the node is behind."""
        if not self.closed:
            await self._pieces.put(piece)

    async def run(self) -> None:
        """Send pieces until the node answers, which may be before the last; errors stay in `error`."""
        try:
            exchange = self._peer.link.open(self._request, None)
            try:
                response = await self._exchange(exchange)
                self.body = await collect(exchange, _ERROR_BODY_LIMIT)
                self.response = response
            finally:
                exchange.close()
        except OsyncError as error:
            self.error = error
        finally:
            self.closed = True
            while not self._pieces.empty():
                # Wakes whoever waits to put: nothing is taken from here on.
                self._pieces.get_nowait()

    async def _exchange(self, exchange: Exchange) -> ResponseHead:
        try:
            async with asyncio.timeout(None) as deadline, asyncio.TaskGroup() as group:
                name = f"gateway.blob.feed[{self.state.node_id}]"
                feeder = group.create_task(self._feed(exchange, deadline), name=name)
                response = await exchange.head()
                feeder.cancel()
            return response
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except TimeoutError as error:
            raise UpstreamTimeout("it took no byte, or gave no answer, for too long") from error

    async def _feed(self, exchange: Exchange, deadline: asyncio.Timeout) -> None:
        clock = asyncio.get_running_loop().time
        while piece := await self._pieces.get():
            deadline.reschedule(clock() + STALL_S)
            await exchange.send(piece)
            deadline.reschedule(None)
        await exchange.finish()
        deadline.reschedule(clock() + VERIFY_S)
