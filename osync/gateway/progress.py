"""Progress of one long operation on a node, shared by all clients that asked for the same."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import orjson

from osync.errors import OsyncError, UpstreamError
from osync.gateway.relay import collect
from osync.net.exchange import Exchange
from osync.net.tasks import Tasks
from osync.types import NodeState, ResponseHead
from osync.wire import ndjson

MAX_PENDING = 512
"""Lines that a slow reader may be behind before older ones of the same layer are left out."""

ERROR_BODY_LIMIT = 1 << 20

Target = tuple[NodeState, Callable[[], Exchange]]
"""A node, and what asks it."""


class Reader:
    """One client's place in a shared stream: every line, and where it is too slow, the newest of each layer."""

    def __init__(self, seen: dict[str, bytes]) -> None:
        self._pending = deque(seen.items())
        self._wake = asyncio.Event()
        self._ended = False

    def push(self, key: str, line: bytes) -> None:
        """Hold a line until it is read."""
        self._pending.append((key, line))
        if len(self._pending) > MAX_PENDING:
            newest: dict[str, bytes] = {}
            for each, held in self._pending:
                newest.pop(each, None)
                newest[each] = held
            self._pending = deque(list(newest.items())[-MAX_PENDING // 2 :])
        self._wake.set()

    def end(self) -> None:
        """No more lines will come."""
        self._ended = True
        self._wake.set()

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield lines without their end, oldest first, until the stream has ended."""
        while True:
            while self._pending:
                yield self._pending.popleft()[1]
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()


class Progress:
    """One exchange with a node that answers progress lines; it runs while anyone reads it.

    Where a node breaks before it answers, the next one is asked.
    """

    def __init__(self, targets: Sequence[Target], ended: Callable[[Progress], None]) -> None:
        self.state = targets[0][0]
        """The node that is asked; from the head on, the one that answered."""
        self.head: ResponseHead | None = None
        self.body = b""
        """The whole answer where its status is not 200."""
        self.error: OsyncError | None = None
        self._ended = ended
        self._started = asyncio.Event()
        self._done = False
        self._latest: dict[str, bytes] = {}
        self._readers: set[Reader] = set()
        self._tasks = Tasks("gateway")
        self._task = self._tasks.spawn(f"progress[{self.state.node_id}]", self._run(targets))

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Read along from the newest line of each layer on. The last to leave cancels the node's work."""
        reader = Reader(self._latest)
        if self._done:
            reader.end()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            if not self._readers:
                self._task.cancel()
                self._ended(self)

    async def wait_head(self) -> ResponseHead:
        """Wait for the answer's head; `body` is complete where it is not 200. Raises UpstreamError."""
        await self._started.wait()
        if self.head is not None:
            return self.head
        raise self.error or UpstreamError("the node gave no answer")

    async def _run(self, targets: Sequence[Target]) -> None:
        left = len(targets)
        try:
            for self.state, start in targets:
                left -= 1
                try:
                    await self._follow(start())
                    return
                except UpstreamError as error:
                    if self.head is not None or not error.retryable or not left:
                        raise
        except OsyncError as error:
            self.error = error
        except Exception as error:
            self.error = UpstreamError(f"internal error of the proxy: {error!r}")
            raise
        finally:
            self._done = True
            self._started.set()
            self._ended(self)
            for reader in self._readers:
                reader.end()

    async def _follow(self, exchange: Exchange) -> None:
        try:
            head = await exchange.head()
            if head.status != 200:
                self.body = await collect(exchange, ERROR_BODY_LIMIT)
                self.head = head
                return
            self.head = head
            self._started.set()
            async for line in read_lines(exchange):
                self._publish(line)
        finally:
            exchange.close()

    def _publish(self, line: bytes) -> None:
        key = _key(line)
        self._latest.pop(key, None)
        self._latest[key] = line
        if len(self._latest) > MAX_PENDING:
            del self._latest[next(iter(self._latest))]
        for reader in self._readers:
            reader.push(key, line)


async def read_lines(exchange: Exchange) -> AsyncIterator[bytes]:
    """Yield the lines of an answer, without their end. Raises StreamBroken, FrameTooLarge."""
    splitter = ndjson.LineSplitter()
    while data := await exchange.read():
        for line in splitter.feed(data):
            yield line
    if last := splitter.finish():
        yield last


def is_success(line: bytes) -> bool:
    """Return True for the line that ends a progress stream well."""
    if b'"success"' not in line:
        return False
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and value.get("status") == "success"


def _key(line: bytes) -> str:
    """Lines of one key report the same thing, the later one more of it."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return line[:200].decode("utf-8", "replace")
    if not isinstance(value, dict):
        return "?"
    return "error" if "error" in value else f"{value.get('status')} {value.get('digest', '')}"
