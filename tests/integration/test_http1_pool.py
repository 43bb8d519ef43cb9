"""The node's HTTP client on real sockets: what is kept, what is retried, what is broken off, and what is not."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from osync.backend import http1_pool
from osync.backend.http1_connection import Answer, BrokenOff, Connection
from osync.backend.http1_pool import Client, Unreachable
from osync.errors import BadRequest, StreamBroken, UpstreamUnavailable
from osync.net.exchange import WINDOW_BYTES
from tests.fakes.fault import Changes

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The server's end of one connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number, self.reader, self.writer = number, reader, writer

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> tuple[bytes, bytes]:
        head = await self.head()
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
        return head, await self.reader.readexactly(size)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """End with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has left."""
        try:
            while await self.reader.read(1 << 16):
                pass
        except OSError:
            pass


class Server:
    """Runs one script per connection, then closes it."""

    def __init__(self) -> None:
        self.script: Script = answer_all
        self.accepted = 0
        self.changes = Changes()
        self.ended = asyncio.Event()
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        self.changes.notify()
        try:
            await self.script(Peer(self.accepted, reader, writer))
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.ended.set()
            writer.close()


async def answer_all(peer: Peer) -> None:
    while True:
        await peer.request()
        await peer.send(OK)


class Pieces:
    """A `Body`; after its pieces it ends, fails, or waits for ever."""

    def __init__(self, *pieces: bytes, failure: Exception | None = None, stalls: bool = False) -> None:
        self.pieces, self.failure, self.stalls = list(pieces), failure, stalls

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if self.pieces:
            return self.pieces.pop(0)
        if self.stalls:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return b""

    async def read_all(self, limit: int) -> bytes:
        raise AssertionError


class Watched(Client):
    """A client that tells when it loses a connection."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.changes = Changes()

    def lost(self, connection: Connection) -> None:
        super().lost(connection)
        self.changes.notify()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Watched]:
    client = Watched(server.url)
    yield client
    await client.close()


async def fetch(client: Client, method: str = "POST", data: bytes = b"") -> bytes:
    answer = await client.request(method, "/x", data=data)
    try:
        return await rest(answer)
    finally:
        answer.close()


async def rest(answer: Answer) -> bytes:
    pieces = []
    while piece := await answer.read():
        pieces.append(piece)
    return b"".join(pieces)


def script(server: Server) -> Callable[[Script], None]:
    def use(function: Script) -> None:
        server.script = function

    return use


async def test_connections_are_kept_and_the_newest_serves_first(server: Server, client: Watched) -> None:
    release = asyncio.Event()
    served: list[int] = []

    @script(server)
    async def _(peer: Peer) -> None:
        while True:
            await peer.request()
            await release.wait()
            served.append(peer.number)
            await peer.send(OK)

    waiting = [asyncio.create_task(fetch(client)) for _ in range(3)]
    await server.changes.until(lambda: server.accepted == 3)
    release.set()
    assert await asyncio.gather(*waiting) == [b"ok"] * 3
    for _again in range(5):
        assert await fetch(client) == b"ok"
    assert server.accepted == 3 and len(set(served[3:])) == 1


async def test_idle_connections_are_bounded_and_age(
    server: Server, client: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1_pool, "IDLE_LIMIT", 2)
    await asyncio.gather(*(fetch(client) for _ in range(5)))
    assert len(client._idle) == 2
    monkeypatch.setattr(http1_pool, "IDLE_S", -1.0)
    before = server.accepted
    await fetch(client)
    assert server.accepted == before + 1


@pytest.mark.parametrize("late", [b"", b"junk", OK])
async def test_idle_connection_goes_with_its_server_or_with_unasked_bytes(
    server: Server, client: Watched, late: bytes
) -> None:
    poke = asyncio.Event()

    @script(server)
    async def _(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await poke.wait()
        await peer.send(late)

    await fetch(client)
    assert len(client._idle) == 1
    poke.set()
    await client.changes.until(lambda: not client._open)
    assert not client._idle
    await fetch(client)
    assert server.accepted == 2


async def test_leftover_bytes_in_one_piece_spoil_the_connection(server: Server, client: Watched) -> None:
    @script(server)
    async def _(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + OK)
        await peer.gone()

    assert [await fetch(client), await fetch(client)] == [b"ok", b"ok"]
    assert server.accepted == 2


@pytest.mark.parametrize(("partial", "is_retried"), [(b"", True), (b"HTTP/1.1 2", False)])
async def test_only_a_kept_connection_without_a_byte_is_retried(
    server: Server, client: Watched, partial: bytes, is_retried: bool
) -> None:
    @script(server)
    async def _(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(partial)

    await fetch(client)
    if is_retried:
        assert await fetch(client, data=b"d") == b"ok"
    else:
        with pytest.raises(BrokenOff):
            await fetch(client)
    assert server.accepted == 1 + is_retried


async def test_fresh_connection_is_not_retried_and_uploads_are_always_fresh(server: Server, client: Watched) -> None:
    await fetch(client)

    @script(server)
    async def _(peer: Peer) -> None:
        await peer.head()

    with pytest.raises(BrokenOff, match=r"closed the connection|reset"):
        await client.request("POST", "/x", data=b"a", rest=Pieces(b"b"))
    assert server.accepted == 2


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize(
    "head", [CHUNKED, b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]
)
async def test_what_came_is_read_before_the_break(server: Server, client: Watched, head: bytes, is_reset: bool) -> None:
    go = asyncio.Event()

    @script(server)
    async def _(peer: Peer) -> None:
        await peer.request()
        await peer.send(head + b"3\r\nabc\r\n")
        await go.wait()
        if is_reset:
            peer.reset()

    answer = await client.request("GET", "/")
    go.set()
    await client.changes.until(lambda: not client._open)
    assert await answer.read() == (b"abc" if head is CHUNKED else b"3\r\nabc\r\n")
    if not is_reset and b"Length" not in head and head is not CHUNKED:
        assert await answer.read() == b""
    else:
        with pytest.raises(BrokenOff):
            await answer.read()


def noted(monkeypatch: pytest.MonkeyPatch, method: str) -> asyncio.Event:
    """Return an event that is set once a connection's `method` has run."""
    event, before = asyncio.Event(), getattr(Connection, method)

    def run(connection: Connection) -> None:
        before(connection)
        event.set()

    monkeypatch.setattr(Connection, method, run)
    return event


async def turns() -> None:
    """Let the loop turn often enough for 64 more pieces to pass, were nothing in their way."""
    for _ in range(500):
        await asyncio.sleep(0)


async def test_reading_stops_at_the_window_and_goes_on(
    server: Server, client: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 24 << 20
    sent = 0

    @script(server)
    async def _(peer: Peer) -> None:
        nonlocal sent
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            await peer.send(bytes(1 << 16))
            sent += 1 << 16
        await peer.request()
        await peer.send(OK)

    stopped = noted(monkeypatch, "pause")
    answer = await client.request("GET", "/")
    await stopped.wait()
    await turns()
    assert sent < size
    assert WINDOW_BYTES < answer.parser.size < WINDOW_BYTES + (1 << 19)
    assert len(await rest(answer)) == size
    assert await fetch(client) == b"ok"
    assert server.accepted == 1


async def test_upload_waits_for_the_server(server: Server, client: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    go = asyncio.Event()
    got = b""

    @script(server)
    async def _(peer: Peer) -> None:
        nonlocal got
        await peer.head()
        await go.wait()
        got = await peer.reader.readexactly(64 << 20)
        await peer.send(OK)
        await peer.gone()

    full = noted(monkeypatch, "pause_writing")
    body = Pieces(*[bytes([i]) * (1 << 20) for i in range(64)])
    task = asyncio.create_task(client.request("POST", "/", rest=body, length=64 << 20))
    await full.wait()
    await turns()
    assert len(body.pieces) > 30
    go.set()
    answer = await task
    assert await rest(answer) == b"ok"
    assert got == b"".join(bytes([i]) * (1 << 20) for i in range(64))
    assert len(client._idle) == 1


async def test_chunked_upload_on_the_wire(server: Server, client: Watched) -> None:
    got: list[bytes] = []

    @script(server)
    async def _(peer: Peer) -> None:
        got.append(await peer.head())
        got.append(await peer.reader.readuntil(b"0\r\n\r\n"))
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        await peer.gone()

    answer = await client.request("POST", "/p", (("A", "b"),), b"first", Pieces(b"second", b"x" * 20))
    assert await rest(answer) == b"ok"
    host = client._url.removeprefix("http://").encode()
    assert got[0] == b"POST /p HTTP/1.1\r\nHost: " + host + b"\r\nA: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert got[1] == b"5\r\nfirst\r\n6\r\nsecond\r\n14\r\n" + b"x" * 20 + b"\r\n0\r\n\r\n"


async def test_early_answer_ends_the_upload(server: Server, client: Watched) -> None:
    @script(server)
    async def _(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await peer.gone()

    async with asyncio.timeout(5):
        answer = await client.request("POST", "/", data=b"a", rest=Pieces(stalls=True), length=9)
        assert (await answer.head()).status == 413
        assert await rest(answer) == b"no"
        await server.ended.wait()
    assert not client._idle and not len(client._uploads)


@pytest.mark.parametrize(("pieces", "length"), [((b"abc",), 9), ((b"abc", b"defg"), 5)])
async def test_upload_that_is_not_as_long_as_it_says(
    server: Server, client: Watched, pieces: tuple[bytes, ...], length: int
) -> None:
    @script(server)
    async def _(peer: Peer) -> None:
        await peer.head()
        await peer.gone()

    with pytest.raises(StreamBroken, match="not as long"):
        await client.request("POST", "/", rest=Pieces(*pieces), length=length)
    with pytest.raises(StreamBroken, match="left"):
        await client.request("POST", "/", rest=Pieces(*pieces, failure=StreamBroken("it left")))
    async with asyncio.timeout(5):
        await server.ended.wait()


@pytest.mark.parametrize("how", ["cancel", "close", "client"])
@pytest.mark.parametrize("has_head", [False, True])
async def test_leaving_closes_the_socket_at_once(server: Server, client: Watched, how: str, has_head: bool) -> None:
    seen = asyncio.Event()

    @script(server)
    async def _(peer: Peer) -> None:
        await peer.request()
        if has_head:
            await peer.send(CHUNKED)
        seen.set()
        await peer.gone()

    async def work() -> None:
        answer = await client.request("POST", "/", data=b"x" * 100_000)
        try:
            if how == "close":
                return
            await answer.read()
        finally:
            answer.close()

    if how == "close" and not has_head:
        return
    task = asyncio.create_task(work())
    await seen.wait()
    if how == "cancel":
        task.cancel()
    elif how == "client":
        await client.close()
    async with asyncio.timeout(0.5):
        await server.ended.wait()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if how != "close":
        assert isinstance(outcome, asyncio.CancelledError if how == "cancel" else BrokenOff)


async def test_head_without_body_and_interim_answers(server: Server, client: Watched) -> None:
    @script(server)
    async def _(peer: Peer) -> None:
        head, _ = await peer.request()
        await peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + (OK[:-2] if head.startswith(b"HEAD") else OK))
        await peer.gone()

    assert await fetch(client, "HEAD") == b""
    assert await fetch(client) == b"ok"


async def test_nothing_listens_and_nothing_unsafe_is_sent(server: Server, client: Watched) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nowhere = Client(f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(Unreachable):
            await nowhere.request("GET", "/")
        await nowhere.close()
        with pytest.raises(UpstreamUnavailable, match="closing"):
            await nowhere.request("GET", "/")
    for headers in ((("X", "a\r\nY: b"),), (("X: y\r\nZ", "a"),)):
        with pytest.raises(BadRequest):
            await client.request("GET", "/", headers)
    with pytest.raises(BadRequest):
        await client.request("GET", "/ HTTP/1.1\r\nX: y")
    assert not server.accepted


async def test_connecting_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1_pool, "CONNECT_TIMEOUT_S", 0.05)

    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
    client = Client("http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="no answer in time"):
        await client.request("GET", "/")
    await client.close()


def test_what_the_url_says() -> None:
    client = Client("https://me:s%40x@[::1]:8443/pre/")
    assert (client._host, client._port, client._prefix) == ("::1", 8443, "/pre")
    assert client._first == (("Host", "[::1]:8443"), ("Authorization", "Basic bWU6c0B4"))
    assert client._ssl is not None
    assert Client("http://ollama.example")._first == (("Host", "ollama.example"),)
