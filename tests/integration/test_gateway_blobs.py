"""Blobs: uploaded to every node that may create a model, never held whole."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from osync.errors import StreamBroken
from osync.net.exchange import Body, Responder
from osync.types import BackendState, RequestHead
from tests.fakes.ollama import FakeOllama
from tests.integration.rig import EngineBackend, Pieces, rig

DATA = [bytes([i]) * 60_000 for i in range(100)]
DIGEST = "sha256:" + hashlib.sha256(b"".join(DATA)).hexdigest()
PATH = f"/api/blobs/{DIGEST}"


def ollama() -> FakeOllama:
    return FakeOllama(models=("base",))


async def test_a_blob_is_created_on_every_ollama_and_then_found() -> None:
    async with rig(ollama(), ollama(), engines=(EngineBackend("m"),)) as cluster:
        assert (await cluster.ask("HEAD", PATH)).status == 404
        reply = await cluster.ask("POST", PATH, Pieces(*DATA))
        assert (reply.status, reply.body) == (201, b"")
        assert [fake.store.blobs for fake in cluster.fakes] == [{DIGEST: 6_000_000}] * 2
        assert (await cluster.ask("HEAD", PATH)).status == 200
        assert (await cluster.ask("POST", PATH, Pieces(*DATA))).status == 200


async def test_head_wants_it_on_all_and_post_fills_the_gap() -> None:
    async with rig(ollama(), ollama()) as cluster:
        cluster.fakes[0].store.blobs[DIGEST] = 1
        assert (await cluster.ask("HEAD", PATH.replace("sha256:", "sha256-"))).status == 404
        assert (await cluster.ask("POST", PATH, Pieces(*DATA))).status == 201
        assert DIGEST in cluster.fakes[1].store.blobs
        assert (await cluster.ask("HEAD", PATH)).status == 200


async def test_a_wrong_digest_is_refused_in_ollamas_words() -> None:
    async with rig(ollama(), ollama()) as cluster:
        reply = await cluster.ask("POST", PATH, Pieces(b"something else"))
        assert reply.status == 400
        assert reply.json["error"].startswith(f"digest mismatch, expected {DIGEST}, got sha256:")


@pytest.mark.parametrize("name", ["sha256:12", "md5:" + "0" * 64, "x", "sha256:" + "g" * 64])
async def test_what_is_no_digest_is_refused(name: str) -> None:
    async with rig(ollama()) as cluster:
        for method in ("HEAD", "POST"):
            assert (await cluster.ask(method, f"/api/blobs/{name}", b"x")).status == 400


async def test_a_node_that_dies_during_an_upload_does_not_break_the_others() -> None:
    async with rig(ollama(), ollama()) as cluster:
        dying = cluster.fakes[0]
        body = Pieces(*DATA)
        _, task = cluster.begin("POST", PATH, _Halting(body, after=20, gate=(gate := asyncio.Event())))
        await dying.changes.until(lambda: dying.blob_bytes > 0)
        await dying.close()
        gate.set()
        assert (await task).status == 201
        assert DIGEST in cluster.fakes[1].store.blobs


async def test_an_upload_that_no_node_takes_fails_naming_them() -> None:
    async with rig(ollama(), ollama()) as cluster:
        for fake in cluster.fakes:
            await fake.close()
        reply = await cluster.ask("POST", PATH, Pieces(*DATA))
        assert reply.status in {502, 503}
        assert "n0" in reply.json["error"] or "no usable node" in reply.json["error"]


async def test_a_client_that_leaves_ends_the_upload_everywhere() -> None:
    async with rig(ollama(), ollama()) as cluster:
        _, task = cluster.begin("POST", PATH, _Halting(Pieces(*DATA), after=20, gate=asyncio.Event()))
        for fake in cluster.fakes:
            await fake.changes.until(lambda fake=fake: fake.blob_bytes > 0)  # type: ignore[misc]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for fake in cluster.fakes:
            await fake.changes.until(lambda fake=fake: fake.cancelled == 1)  # type: ignore[misc]
            assert fake.store.blobs == {}


async def test_a_request_that_breaks_off_leaves_no_blob() -> None:
    gate = asyncio.Event()

    class Breaking(Pieces):
        async def read(self) -> bytes:
            if piece := await super().read():
                return piece
            await gate.wait()
            raise StreamBroken("the client went away")

    async with rig(ollama()) as cluster:
        fake = cluster.fakes[0]
        reply, task = cluster.begin("POST", PATH, Breaking(*DATA[:40]))
        await fake.changes.until(lambda: fake.blob_bytes > 0)
        gate.set()
        await task
        assert reply.status == 502
        await fake.changes.until(lambda: fake.cancelled == 1)
        assert fake.store.blobs == {}


async def test_create_goes_to_the_nodes_that_have_the_blobs() -> None:
    async with rig(ollama(), ollama()) as cluster:
        cluster.fakes[1].store.blobs[DIGEST] = 1
        reply = await cluster.ask("POST", "/api/create", {"model": "mine", "files": {"a.gguf": DIGEST}})
        assert reply.node == "n1"
        assert reply.lines[-1] == {"status": "success"}
        assert cluster.having("mine") == [1]


async def test_a_digest_that_is_none_is_left_to_ollama_to_refuse() -> None:
    async with rig(ollama(), ollama()) as cluster:
        reply = await cluster.ask("POST", "/api/create", {"model": "mine", "files": {"a": "../../api/tags"}})
        assert reply.status == 400
        assert all(r.method != "HEAD" for fake in cluster.fakes for r in fake.requests)


async def test_a_node_that_takes_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osync.gateway.blobs.STALL_S", 0.2)

    class Stuck(EngineBackend):
        def state(self) -> BackendState:
            return BackendState("ollama", ok=True)

        async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
            await asyncio.Event().wait()

    async with rig(ollama(), engines=(Stuck(),)) as cluster:
        assert (await cluster.ask("POST", PATH, Pieces(*DATA))).status == 201
        assert DIGEST in cluster.fakes[0].store.blobs


async def test_an_engine_alone_says_that_it_takes_no_blobs() -> None:
    async with rig(engines=(EngineBackend("m"),)) as cluster:
        assert (await cluster.ask("POST", PATH, Pieces(*DATA))).status == 501


class _Halting(Pieces):
    """Stops after some pieces until a gate opens."""

    def __init__(self, body: Pieces, after: int, gate: asyncio.Event) -> None:
        super().__init__(*body._pieces)
        self._left, self._gate = after, gate

    async def read(self) -> bytes:
        if self._left == 0:
            await self._gate.wait()
        self._left -= 1
        return await super().read()
