"""The link within one process: the same promises as over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from osync.errors import CapacityError, FrameTooLarge, StreamBroken, UpstreamUnavailable
from osync.net.exchange import WINDOW_BYTES, Body, Responder, Serve
from osync.net.memory import MemoryLink
from osync.types import RequestHead, ResponseHead
from tests.links import GET, OK, fetch, node_state, noise, rest


async def echo(head: RequestHead, body: Body, responder: Responder) -> None:
    """Answer with the body, as it comes."""
    await responder.start(OK)
    while data := await body.read():
        await responder.write(data)


def link_to(serve: Serve) -> MemoryLink:
    return MemoryLink(serve, node_state)


async def test_a_request_and_its_answer_cross_unchanged():
    link = link_to(echo)
    assert (link.address, link.state) == ("local", node_state())
    assert await fetch(link, GET, b"body") == (OK, b"body")
    assert await fetch(link, GET, b"") == (OK, b"")


async def test_a_streamed_body_of_many_windows_comes_back_whole():
    pieces = [noise(300_000, n) for n in range(20)] + [noise(3 << 20, 99)]
    exchange = link_to(echo).open(GET, None)

    async def upload() -> None:
        for piece in pieces:
            await exchange.send(piece)
        await exchange.finish()

    async with asyncio.TaskGroup() as group:
        group.create_task(upload())
        assert await rest(exchange) == b"".join(pieces)
    exchange.close()


async def test_a_slow_reader_holds_one_window():
    written = 0

    async def flood(head: RequestHead, body: Body, responder: Responder) -> None:
        nonlocal written
        await responder.start(OK)
        for _ in range(64):
            await responder.write(bytes(100_000))
            written += 100_000

    exchange = link_to(flood).open(GET, b"")
    await exchange.head()
    for _ in range(20):
        await asyncio.sleep(0)
    assert WINDOW_BYTES - 100_000 < written <= WINDOW_BYTES
    assert len(await exchange.read()) == WINDOW_BYTES
    assert len(await rest(exchange)) == 6_400_000 - WINDOW_BYTES
    exchange.close()


async def test_read_all_bounds_both_kinds_of_body():
    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await body.read_all(10)
        await responder.start(OK)

    link = link_to(answer)
    with pytest.raises(FrameTooLarge):
        await fetch(link, GET, bytes(11))
    exchange = link.open(GET, None)
    await exchange.send(bytes(11))
    with pytest.raises(FrameTooLarge):
        await exchange.head()
    await exchange.send(bytes(2 * WINDOW_BYTES))  # nobody reads it any more, and nobody waits
    exchange.close()


async def test_close_cancels_the_work():
    cancelled = asyncio.Event()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    exchange = link_to(answer).open(GET, b"")
    await exchange.head()
    exchange.close()
    exchange.close()
    async with asyncio.timeout(0.1):
        await cancelled.wait()
    with pytest.raises(StreamBroken):
        await exchange.read()


async def test_closing_the_link_ends_what_runs():
    async def hang(head: RequestHead, body: Body, responder: Responder) -> None:
        await asyncio.Event().wait()

    link = link_to(hang)
    exchange = link.open(GET, b"")
    waiting = asyncio.create_task(exchange.head())
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(StreamBroken):
        await waiting


async def _raise(error: Exception, responder: Responder, late: bool) -> None:
    if late:
        await responder.start(OK)
        await responder.write(b"half")
    raise error


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (CapacityError("full", 3.0), CapacityError, "full"),
        (RuntimeError("a secret prompt"), UpstreamUnavailable, "internal error"),
    ],
)
async def test_errors_keep_their_kind_before_the_head_and_break_the_stream_after(raised, kind, said):
    early = link_to(lambda head, body, responder: _raise(raised, responder, False)).open(GET, b"")
    with pytest.raises(kind, match=said):
        await early.head()
    early.close()
    late = link_to(lambda head, body, responder: _raise(raised, responder, True)).open(GET, b"")
    assert (await late.head(), await late.read()) == (OK, b"half")
    with pytest.raises(StreamBroken, match=said):
        await late.read()
    late.close()


async def test_no_answer_at_all_is_an_error():
    async def mute(head: RequestHead, body: Body, responder: Responder) -> None:
        return

    with pytest.raises(UpstreamUnavailable):
        await fetch(link_to(mute))


async def test_a_head_comes_once_and_first():
    async def twice(head: RequestHead, body: Body, responder: Responder) -> None:
        with pytest.raises(RuntimeError):
            await responder.write(b"early")
        await responder.start(OK)
        with pytest.raises(RuntimeError):
            await responder.start(ResponseHead(500))

    assert await fetch(link_to(twice)) == (OK, b"")


async def test_tokens_arrive_one_by_one():
    async def tokens() -> AsyncIterator[bytes]:
        for token in (b"a", b"b", b"c"):
            yield token
            await reads.acquire()

    async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        async for token in tokens():
            await responder.write(token)

    reads = asyncio.Semaphore(0)
    exchange = link_to(answer).open(GET, b"")
    seen = []
    while data := await exchange.read():
        seen.append(data)
        reads.release()
    assert seen == [b"a", b"b", b"c"]
    exchange.close()
