"""The link between a proxy and a node over gRPC, on real sockets."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from osync.errors import (
    BadRequest,
    CapacityError,
    FrameTooLarge,
    ModelNotFound,
    StreamBroken,
    UpstreamUnavailable,
    WireError,
)
from osync.net.exchange import WINDOW_BYTES, Body, Responder
from osync.net.remote import Session
from osync.net.uplink import RemoteLink
from osync.pb import node_pb2 as pb
from osync.types import HostLoad, RequestHead, ResponseHead
from tests.links import GET, OK, FakeNode, fetch, linked, node_process, node_state, noise, rest, serving, until


async def echo(head: RequestHead, body: Body, responder: Responder) -> None:
    """Answer with the body, as it comes."""
    await responder.start(ResponseHead(200, head.headers))
    while data := await body.read():
        await responder.write(data)


async def test_a_request_and_its_answer_cross_unchanged():
    seen: list[RequestHead] = []

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        seen.append(head)
        assert await body.read_all(100) == b'{"model": "m"}'
        await responder.start(ResponseHead(418, (("X-A", "1"), ("X-A", "2"), ("X-Raw", "caf\udce9"))))
        await responder.write(b"short")

    head = RequestHead("POST", "/api/chat?a=%2F&b=\udcff", (("Host", "x"), ("X-Latin", "\udce9")))
    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        answer_head, body = await fetch(link, head, b'{"model": "m"}')
    assert seen == [head]
    assert answer_head == ResponseHead(418, (("X-A", "1"), ("X-A", "2"), ("X-Raw", "caf\udce9")))
    assert body == b"short"


async def test_many_interleaved_streams_keep_their_bytes_and_order():
    draw = random.Random(7)
    pieces = {n: [draw.choice((1, 3, 90, 5_000, 70_000, 600_000)) for _ in range(8)] for n in range(40)}

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        number = int(head.target[1:])
        assert await body.read_all(10 << 20) == noise(number * 40_000, number)
        await responder.start(OK)
        for index, size in enumerate(pieces[number]):
            await responder.write(noise(size, number * 100 + index))
            await asyncio.sleep(0)

    async def check(link: RemoteLink, number: int) -> None:
        _, body = await fetch(link, RequestHead("POST", f"/{number}"), noise(number * 40_000, number))
        assert body == b"".join(noise(size, number * 100 + i) for i, size in enumerate(pieces[number]))

    async with serving(FakeNode(answer)) as (port, service), linked(port) as link:
        await asyncio.gather(*(check(link, number) for number in pieces))
        await until(lambda: service.active == 0)


async def test_a_streamed_body_of_many_windows_comes_back_whole():
    pieces = [noise(300_000, n) for n in range(20)]
    async with serving(FakeNode(echo)) as (port, _), linked(port) as link:
        exchange = link.open(RequestHead("POST", "/"), None)

        async def upload() -> None:
            for piece in pieces:
                await exchange.send(piece)
            await exchange.finish()

        async with asyncio.TaskGroup() as group:
            group.create_task(upload())
            await exchange.head()
            assert await rest(exchange) == b"".join(pieces)
        exchange.close()


async def test_tokens_arrive_one_by_one():
    more = asyncio.Event()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        for token in (b"a", b"b", b"c"):
            await responder.write(token)
            await more.wait()
            more.clear()

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        exchange = link.open(GET, b"")
        for token in (b"a", b"b", b"c"):
            assert await exchange.read() == token
            more.set()
        assert await exchange.read() == b""
        exchange.close()


async def test_a_slow_reader_stalls_only_itself_and_holds_one_window():
    written = 0

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        nonlocal written
        await responder.start(OK)
        if head.target == "/flood":
            for _ in range(64):
                await responder.write(bytes(256 << 10))
                written += 256 << 10

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        slow = link.open(RequestHead("GET", "/flood"), b"")
        await slow.head()
        await until(lambda: written >= WINDOW_BYTES)
        for _ in range(50):
            await fetch(link)
        assert written <= WINDOW_BYTES
        assert len(await rest(slow)) == 16 << 20
        slow.close()


async def test_a_body_that_nobody_reads_stalls_only_its_sender():
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        if head.target == "/deaf":
            await asyncio.Event().wait()

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        exchange = link.open(RequestHead("POST", "/deaf"), None)
        await exchange.send(bytes(WINDOW_BYTES))
        stuck = asyncio.create_task(exchange.send(b"more"))
        await fetch(link)
        assert not stuck.done()
        exchange.close()
        with pytest.raises(StreamBroken):
            await stuck
        await asyncio.sleep(0)


async def test_close_cancels_the_nodes_work_within_100_ms():
    cancelled_at = 0.0

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        nonlocal cancelled_at
        await responder.start(OK)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled_at = time.monotonic()

    async with serving(FakeNode(answer)) as (port, service), linked(port) as link:
        exchange = link.open(GET, b"")
        await exchange.head()
        closed_at = time.monotonic()
        exchange.close()
        exchange.close()
        await until(lambda: cancelled_at)
        assert cancelled_at - closed_at < 0.1
        await until(lambda: service.active == 0)


async def test_an_exchange_closed_before_it_went_out_reaches_nobody():
    calls = 0

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        nonlocal calls
        calls += 1
        await responder.start(OK)

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        link.open(GET, b"").close()
        await fetch(link)
    assert calls == 1


async def test_a_proxy_that_goes_cancels_its_requests():
    cancelled = asyncio.Event()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(FakeNode(answer)) as (port, service):
        async with linked(port) as link:
            exchange = link.open(GET, b"")
            await exchange.head()
        with pytest.raises(StreamBroken, match="the link was closed"):
            await exchange.read()
        async with asyncio.timeout(0.1):
            await cancelled.wait()
        await until(lambda: len(service) == 0)


async def test_closing_ones_own_link_is_no_news():
    news: list[str] = []
    async with serving(FakeNode(echo)) as (port, _):
        async with linked(port) as link:
            link.on_change(lambda: news.append(link.error))
        assert link.state is None
    assert [error for error in news if error] == []


async def test_a_small_answer_is_one_message_from_the_node(monkeypatch):
    sizes: list[int] = []
    receive = Session.receive

    def count(self: Session, frames: Collection[pb.Frame]) -> None:
        sizes.append(len(frames))
        receive(self, frames)

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await body.read_all(100)
        await responder.start(OK)
        await responder.write(b"small ")
        await responder.write(b"answer")

    monkeypatch.setattr(Session, "receive", count)
    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        assert await fetch(link, RequestHead("POST", "/"), b"small") == (OK, b"small answer")
    assert [size for size in sizes if size] == [1]


async def test_a_head_that_cannot_be_sent_is_refused_where_it_is_made():
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(ResponseHead(200, (("X", "1\nY: 2"),)))

    async with serving(FakeNode(answer)) as (port, service), linked(port) as link:
        with pytest.raises(WireError, match="line feed"):
            link.open(RequestHead("GET", "/", (("X", "1\nY"),)), b"")
        with pytest.raises((WireError, StreamBroken), match="line feed"):
            await fetch(link)
        await until(lambda: service.active == 0)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ModelNotFound("model 'x' not found"), ModelNotFound("model 'x' not found")),
        (CapacityError("busy", 7.5), CapacityError("busy", 7.5)),
        (BadRequest("no"), BadRequest("no")),
        (UpstreamUnavailable("ollama is down"), UpstreamUnavailable("ollama is down")),
        (ValueError("a secret prompt"), UpstreamUnavailable("internal error")),
    ],
)
async def test_an_error_before_the_head_keeps_its_kind_and_one_unforeseen_its_secrets(raised, seen):
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        raise raised

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        exchange = link.open(GET, b"")
        with pytest.raises(type(seen)) as caught:
            await exchange.head()
        exchange.close()
    assert type(caught.value) is type(seen)
    assert str(caught.value) == str(seen)
    assert getattr(caught.value, "retry_after_s", None) == getattr(seen, "retry_after_s", None)


async def test_an_error_after_the_head_breaks_the_stream_behind_what_was_written():
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        await responder.write(b"half ")
        raise UpstreamUnavailable("ollama reset the connection")

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        exchange = link.open(GET, b"")
        assert await exchange.head() == OK
        assert await exchange.read() == b"half "
        with pytest.raises(StreamBroken, match="ollama reset the connection"):
            await exchange.read()
        exchange.close()


async def test_an_answer_that_comes_before_the_body_ends_is_not_lost():
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        try:
            await body.read_all(1000)
        except FrameTooLarge:
            await responder.start(ResponseHead(413))

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        exchange = link.open(RequestHead("POST", "/"), None)
        for _ in range(20):
            await exchange.send(bytes(256 << 10))
        await exchange.finish()
        assert (await exchange.head()).status == 413
        assert await exchange.read() == b""
        exchange.close()


async def test_more_requests_than_the_bound_are_refused_and_the_link_lives(monkeypatch):
    monkeypatch.setattr("osync.net.served.MAX_EXCHANGES", 3)
    release = asyncio.Event()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        await release.wait()

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        held = [link.open(GET, b"") for _ in range(3)]
        for exchange in held:
            await exchange.head()
        with pytest.raises(CapacityError):
            await fetch(link)
        release.set()
        for exchange in held:
            assert await rest(exchange) == b""
            exchange.close()
        await fetch(link)


async def test_state_comes_first_and_at_once_when_it_changes():
    node = FakeNode(echo)
    async with serving(node) as (port, _), linked(port) as link:
        assert link.state == node_state()
        assert time.time() - link.last_seen < 5
        changed_at = time.monotonic()
        node.change(draining=True, load=HostLoad(cpu_percent=12.5, cpu_count=2))
        await until(lambda: link.state == node.current)
        assert time.monotonic() - changed_at < 0.5


async def test_a_node_that_stops_finishes_what_runs_and_takes_nothing_new():
    release = asyncio.Event()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        await release.wait()
        await responder.write(bytes(WINDOW_BYTES))

    async with serving(FakeNode(answer)) as (port, service), linked(port) as link:
        running = link.open(GET, b"")
        await running.head()
        closing = asyncio.create_task(service.close(10))
        await asyncio.sleep(0)
        with pytest.raises(UpstreamUnavailable, match="stopping"):
            await fetch(link)
        release.set()
        assert len(await rest(running)) == WINDOW_BYTES
        running.close()
        await closing
        await until(lambda: link.state is None)
        # The second where a frame of ours met the end of the stream.
        assert link.error in ("the node closed the link", "connection closed")


async def test_a_killed_node_breaks_its_streams_at_once_and_comes_back_on_the_same_port():
    async with node_process() as (port, process), linked(port) as link:
        streaming, silent = link.open(GET, b""), link.open(RequestHead("GET", "/silent"), b"")
        await streaming.head()
        waiting = asyncio.create_task(silent.head())
        await streaming.read()
        killed_at = time.monotonic()
        process.kill()
        with pytest.raises(UpstreamUnavailable, match=f"127.0.0.1:{port}"):
            await waiting
        with pytest.raises(StreamBroken, match=f"127.0.0.1:{port}"):
            await rest(streaming)
        assert time.monotonic() - killed_at < 1
        assert link.state is None
        with pytest.raises(UpstreamUnavailable, match=f"127.0.0.1:{port} is down"):
            link.open(GET, b"")
        streaming.close()
        silent.close()
        async with node_process(port):
            await until(lambda: link.state is not None)
            assert (link.error, link.failures) == ("", 0)
            exchange = link.open(GET, b"")
            assert await exchange.read()
            exchange.close()


async def test_a_frozen_node_is_dead_after_its_silence(monkeypatch):
    monkeypatch.setattr("osync.net.uplink.SILENCE_S", 1.5)
    async with node_process() as (port, process), linked(port) as link:
        exchange = link.open(GET, b"")
        await exchange.head()
        os.kill(process.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(StreamBroken, match="no sign of life"):
            await rest(exchange)
        assert 0.4 < time.monotonic() - stopped_at < 2.5
        exchange.close()


async def test_a_refused_connection_is_told_within_a_second():
    link = RemoteLink("127.0.0.1:1", "proxy-1")
    link.start()
    try:
        async with asyncio.timeout(1):
            await until(lambda: link.failures)
        with pytest.raises(UpstreamUnavailable, match=r"127\.0\.0\.1:1 is down: connection refused"):
            link.open(GET, b"")
    finally:
        await link.close()


async def test_another_protocol_version_is_refused_in_words(monkeypatch):
    monkeypatch.setattr("osync.net.uplink.PROTOCOL", 2)
    async with serving(FakeNode(echo)) as (port, _):
        link = RemoteLink(f"127.0.0.1:{port}", "proxy-1")
        link.start()
        try:
            await until(lambda: "protocol" in link.error)
            assert "the proxy speaks protocol 2, this node 1" in link.error
            assert link.state is None
        finally:
            await link.close()


def test_only_net_touches_channels_and_stubs():
    raw = re.compile(r"insecure_channel|secure_channel|Stub\(|grpc\.aio\.server|import grpc\b|from grpc\b")
    package = Path(__file__).resolve().parents[2] / "osync"
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        if path.parent.name not in {"net", "pb"}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if raw.search(line)
    ]
    assert not found, "grpc outside osync/net: " + ", ".join(found)
