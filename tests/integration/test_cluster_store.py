"""Models of other hosts, as a coordinator gets to know them: by their header and what their node tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from osync.backend.pipelines.peers import Shards, own_address
from osync.backend.pipelines.store import ClusterStore, parameters
from osync.cluster.view import ClusterView, Peer
from osync.config import Settings
from osync.engine.gguf import read_header
from osync.engine.store import ModelStore
from osync.errors import ModelNotFound, ModelUnusable, UpstreamError
from osync.net.blob import add_blob_service
from osync.net.memory import MemoryLink
from osync.net.server import RpcServer
from osync.types import BackendState, ModelInfo, NodeId, NodeState, ShardState
from tests.fakes.architectures import write_model
from tests.fakes.cluster import ScriptedNode, reply
from tests.links import FakeNode, linked, serving, until

DIGEST = "c" * 64


@dataclass
class Holder(ScriptedNode):
    """A node that has one model, and tells what its store knows of it."""

    told: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    digest: str = DIGEST

    def state(self) -> NodeState | None:
        state = super().state()
        model = ModelInfo("big:latest", digest=self.digest, size=5, modified_at="2026-01-01T00:00:00Z")
        return state and replace(state, backend=replace(state.backend, models=(model,)))

    async def answer(self, head, data, responder):
        assert (head.method, head.target) == ("POST", "/api/show")
        await reply(responder, self.status, self.told)


@asynccontextmanager
async def files(path: Path | None) -> AsyncIterator[str]:
    """Serve one file by DIGEST; yields the address."""
    server = RpcServer("127.0.0.1", 0)
    add_blob_service(server, lambda digest: path if digest == DIGEST else None)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def view_of(address: str, *holders: Holder) -> ClusterView:
    shard = NodeState(NodeId("s"), BackendState("none"), shard=ShardState("e", digests=(DIGEST,)))
    peers = [Peer(MemoryLink(holder.serve, holder.state, "local")) for holder in holders]
    return ClusterView([Peer(MemoryLink(holders[0].serve, lambda: shard, address)), *peers])


def store_of(view: ClusterView, folder: Path, *, local: Path | None = None) -> ClusterStore:
    models = ModelStore((local,) if local else ())
    models.scan()
    return ClusterStore(models, view, Shards(view, NodeId("proxy"), ""), folder / "headers")


async def test_a_model_elsewhere_is_known_by_its_header_and_by_what_its_node_tells(tmp_path):
    path = write_model(tmp_path / "big.gguf", "llama", 4, vocabulary="gpt2")
    told = {
        "template": "{{ .Prompt }}", "system": "Be kind.", "license": "MIT",
        "parameters": 'stop                           "<a>"\nstop                           "<b>"\ntemperature 0.5',
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    silent, holder = Holder("a", status=500), Holder("b", told=told)
    async with files(path) as address:
        store = store_of(view_of(address, silent, holder), tmp_path)
        one, two = await asyncio.gather(store.find("big"), store.find("BIG:latest"))
        assert one is two
        assert len(holder.requests) == 1
    assert (one.template, one.system, one.licenses) == ("{{ .Prompt }}", "Be kind.", ("MIT",))
    assert one.parameters == {"stop": ["<a>", "<b>"], "temperature": 0.5}
    assert one.messages == ({"role": "user", "content": "hi"},)
    assert one.header == read_header(path)
    assert one.path == tmp_path / "headers" / f"{DIGEST}.gguf"
    assert one.path.stat().st_size == path.stat().st_size
    assert read_header(one.path) == one.header
    source = store.source(one)
    assert (source.name, source.digest, source.sources) == ("big:latest", DIGEST, (address,))
    assert (source.size, source.vocabulary) == (path.stat().st_size, one.path)
    assert store.at(one.path) is one
    assert store.paths == {one.path}
    # The next start reads nothing over the network.
    again = store_of(view_of("127.0.0.1:1", holder), tmp_path)
    assert (await again.find("big")).header == one.header


async def test_this_hosts_models_come_first(tmp_path):
    (tmp_path / "here").mkdir()
    write_model(tmp_path / "here" / "big.gguf", "llama", 4, vocabulary="gpt2")
    store = store_of(view_of("127.0.0.1:1", Holder("a")), tmp_path, local=tmp_path / "here")
    found = await store.find("big")
    assert found.path == tmp_path / "here" / "big.gguf"
    info = store.info("big")
    assert info is not None
    assert info.digest == found.info.digest


async def test_what_nobody_gives_away_cannot_be_split(tmp_path):
    async with files(None) as address:
        store = store_of(view_of(address, Holder("a")), tmp_path)
        with pytest.raises(ModelUnusable, match="nobody gives its file away"):
            await store.find("big")
        with pytest.raises(ModelNotFound):
            await store.find("other")
    store = store_of(view_of("127.0.0.1:1", Holder("a", digest="odd")), tmp_path)
    with pytest.raises(ModelUnusable, match="no digest"):
        await store.find("big")


async def test_a_node_that_does_not_tell_is_an_error(tmp_path):
    path = write_model(tmp_path / "big.gguf", "llama", 4, vocabulary="gpt2")
    async with files(path) as address:
        store = store_of(view_of(address, Holder("a", status=404, told={"error": "gone"})), tmp_path)
        with pytest.raises(UpstreamError, match="answers 404"):
            await store.find("big")


async def test_the_files_own_template_is_no_go_template(tmp_path):
    path = write_model(tmp_path / "big.gguf", "llama", 4, vocabulary="gpt2")
    async with files(path) as address:
        store = store_of(view_of(address, Holder("a", told={"template": "", "parameters": 7})), tmp_path)
        found = await store.find("big")
    assert (found.template, found.parameters) == ("", {})


def test_parameters_that_are_odd_stay_text():
    assert parameters("stop <|x|>\nnum_ctx 4096\nodd\n  top_p   0.9") == {
        "stop": ["<|x|>"],
        "num_ctx": 4096,
        "top_p": 0.9,
    }


def test_a_wildcard_listener_is_reached_by_the_address_that_faces_the_peers():
    assert own_address(Settings(), 5) == "127.0.0.1:5"
    assert own_address(Settings(host="0.0.0.0", insecure=True, servers=("127.0.0.1:9",)), 5) == "127.0.0.1:5"
    assert own_address(Settings(host="::1"), 5) == "[::1]:5"


def test_a_shard_that_only_this_host_reaches_is_left_out_beside_others():
    def peer(name: str, address: str) -> Peer:
        state = NodeState(NodeId(name), BackendState("none"), shard=ShardState())

        async def serve(*_: object) -> None:
            raise AssertionError

        return Peer(MemoryLink(serve, lambda: state, address))

    local, near, far = peer("l", "local"), peer("n", "127.0.0.1:2"), peer("f", "10.0.0.9:2")
    own = "127.0.0.1:1"
    assert [s.address for s in Shards(ClusterView([local, near]), NodeId("p"), own).up()] == [own, "127.0.0.1:2"]
    addresses = [s.address for s in Shards(ClusterView([local, near, far]), NodeId("p"), own).up()]
    assert addresses == ["127.0.0.1:2", "10.0.0.9:2"]
    assert [s.address for s in Shards(ClusterView([local]), NodeId("p"), "").up()] == []


async def test_a_links_round_trip_is_measured():
    async def answer(head, body, responder):
        raise AssertionError

    async with serving(FakeNode(answer)) as (port, _), linked(port) as link:
        await until(lambda: link.round_trip_s > 0)
        assert link.round_trip_s < 1.0
