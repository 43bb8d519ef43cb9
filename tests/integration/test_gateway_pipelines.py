"""Models over shards, as the gateway serves, refuses and shows them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from osync.config import Settings
from osync.errors import ModelUnusable
from osync.types import NodeState, ShardState
from tests.fakes.architectures import write_model
from tests.fakes.cluster import ScriptedNode, proxy
from tests.fakes.split import Shard, Sized, Split, split

GENERATE = {"model": "big", "prompt": "hi", "stream": False}
PIPELINES = "proxy-pipelines"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_model(folder / "big.gguf", "llama", 4, vocabulary="gpt2")
    return folder


@asynccontextmanager
async def cluster(tmp_path: Path, *nodes: ScriptedNode, **settings: Any) -> AsyncIterator[Split]:
    given = Settings(models_dir=(tmp_path / "models",), state_dir=tmp_path / "state", parallel=2, **settings)
    async with proxy(*nodes, settings=given) as running:
        made = await split(running, given)
        try:
            yield made
        finally:
            await made.node.close()


async def ask(made: Split, path: str = "/api/generate", **body: Any) -> tuple[int, dict[str, Any], str]:
    async with made.proxy.post(path, {**GENERATE, **body}) as answer:
        return answer.status, await answer.json(), answer.headers.get("X-Osync-Node", "")


async def test_a_small_model_stays_on_its_node_without_any_plan(tmp_path, models):
    node = Sized("a", models=("big:latest",))
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        for _ in range(3):
            assert (await ask(made))[2] == "a"
        assert made.planner.plans == made.coordinator.plans == 0


async def test_a_request_decides_itself(tmp_path, models):
    node = Sized("a", models=("big:latest",))
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        status, body, where = await ask(made, options={"distributed": True, "seed": 1})
        assert (status, where, body["response"]) == (200, PIPELINES, "Hello")
        status, _, where = await ask(made, options={"distributed": False, "seed": 1, "stages": 2, "shards": "s1"})
        assert (status, where) == (200, "a")
    assert orjson.loads(node.requests[-1][1])["options"] == {"seed": 1}


async def test_options_of_a_pipeline_reach_it_and_a_change_makes_another(tmp_path, models):
    async with cluster(tmp_path, Shard("s1"), Shard("s2"), Shard("s3")) as made:
        options = {"stages": 2, "shards": ["s2", "s1"], "activation_dtype": "f16", "num_ctx": 512}
        assert (await ask(made, options=options))[0] == 200
        await ask(made, options=options)
        await ask(made)
        (model, settings, runner), *more = made.coordinator.loaded
        assert not more
        assert (settings.stages, settings.shards, settings.activation_dtype) == (2, ("s1", "s2"), "f16")
        assert settings.context_length == 512
        assert (model.name, model.size) == ("big:latest", (models / "big.gguf").stat().st_size)
        assert model.sources == ("me:1",)
        assert (await ask(made, options={"stages": 3}))[0] == 200
        assert runner.closed
        assert made.coordinator.loaded[1][1].stages == 3
        status, body, _ = await ask(made, options={"activation_dtype": "f64"})
        assert status == 500
        assert "f32, f16, q8" in body["error"]


async def test_other_surfaces_reach_it_with_their_options(tmp_path, models):
    async with cluster(tmp_path, Shard("s1"), Shard("s2")) as made:
        chat = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "options": {"stages": 2}}
        async with made.proxy.post("/v1/chat/completions", chat) as answer:
            assert answer.headers["X-Osync-Node"] == PIPELINES
            assert (await answer.json())["choices"][0]["message"]["content"] == "Hello"
        assert made.coordinator.loaded[0][1].stages == 2


async def test_without_any_node_it_is_ready_and_lists_what_it_could_serve(tmp_path, models):
    async with cluster(tmp_path, Shard("s1"), Shard("s2")) as made:
        client = made.proxy.client
        async with client.get("/readyz") as answer:
            assert answer.status == 200
        async with client.get("/api/tags") as answer:
            assert "big:latest" in [row["name"] for row in (await answer.json())["models"]]
        async with client.get("/v1/models") as answer:
            assert "big:latest" in [row["id"] for row in (await answer.json())["data"]]
        async with made.proxy.post("/api/show", {"model": "big"}) as answer:
            assert (await answer.json())["details"]["family"] == "llama"
        assert (await ask(made))[2] == PIPELINES
        status, body, _ = await ask(made, model="nothing")
        assert (status, body["error"]) == (404, "model 'nothing' not found")


async def test_ps_lists_it_once_and_unloading_frees_it(tmp_path, models):
    async with cluster(tmp_path, Sized("a", models=("other:latest",)), Shard("s1"), Shard("s2")) as made:
        await ask(made)
        node = Ps("b")
        made.proxy.view.peers[0].link._serve = node.serve  # type: ignore[attr-defined]
        async with made.proxy.client.get("/api/ps") as answer:
            rows = (await answer.json())["models"]
        assert [(row["name"], row["size"]) for row in rows] == [("big:latest", 1000)]
        status, body, where = await ask(made, prompt="", keep_alive=0)
        assert (status, body["done_reason"], where) == (200, "unload", PIPELINES)
        assert not made.node.state().backend.loaded


class Ps(ScriptedNode):
    """Has nothing in memory."""

    async def answer(self, head, data, responder):
        from tests.fakes.cluster import reply

        await reply(responder, 200, {"models": []})


async def test_what_no_node_can_hold_is_split(tmp_path, models):
    node = Sized("a", models=("big:latest",), size=1 << 20, memory=1 << 16)
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        assert (await ask(made))[2] == PIPELINES
        assert (await ask(made))[2] == PIPELINES
        assert made.planner.plans == 1, "the second request is decided as the first"


async def test_what_nothing_can_hold_is_an_error_with_the_numbers(tmp_path, models):
    node = Sized("a", models=("big:latest",), size=1 << 20, memory=1 << 16)
    async with cluster(tmp_path, node, Shard("s1", memory=1000), Shard("s2", memory=2000)) as made:
        status, body, _ = await ask(made)
        assert status == 500
        assert "fits no node, and not all shards together" in body["error"]
        assert "2 shards together lend" in body["error"]
        assert (await ask(made, options={"distributed": True}))[0] == 500
        node.memory = 0  # it does not say: it may try
        made.proxy.view.peers[1].link.state  # noqa: B018
        assert (await ask(made, options={"distributed": False}))[2] == "a"


async def test_a_pipeline_that_cannot_be_made_leaves_the_request_to_a_node(tmp_path, models):
    node = Sized("a", models=("big:latest",), size=1 << 20, memory=1 << 16)
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        made.coordinator.error = ModelUnusable("a shard is broken")
        made.planner.real._shards = list  # none is left that could help
        assert (await ask(made, options={"num_ctx": 32}))[0] == 500
        made.planner.real._shards = made.coordinator.real._shards
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        await ask(made)
        made.coordinator.engine.refuses = ModelUnusable("the pipeline was given up")
        assert (await ask(made))[2] == "a"
        status, body, _ = await ask(made, options={"distributed": True})
        assert (status, body["error"]) == (500, "the pipeline was given up")


async def test_embeddings_are_never_split(tmp_path, models):
    node = Sized("a", models=("big:latest",), size=1 << 20, memory=1 << 16)
    async with cluster(tmp_path, node, Shard("s1")) as made:
        assert (await ask(made, "/api/embed", input="x"))[2] == "a"


async def test_a_model_of_one_piece_is_served_whole_or_refused(tmp_path):
    (tmp_path / "models").mkdir()
    write_model(tmp_path / "models" / "big.gguf", "bert", 2, vocabulary="bert")
    node = Sized("a", models=("big:latest",))
    async with cluster(tmp_path, node, Shard("s1")) as made:
        assert (await ask(made, options={"distributed": True}))[2] == "a"
    async with cluster(tmp_path, Shard("s1")) as made:
        assert (await ask(made, options={"distributed": True}))[0] == 501


async def test_a_pin_decides(tmp_path, models):
    node = Sized("a", models=("big:latest",))
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        for pin, where in (("a", "a"), ("pipelines", PIPELINES), (PIPELINES, PIPELINES)):
            async with made.proxy.post("/api/generate", GENERATE, X_Osync_Node=pin) as answer:
                assert (answer.status, answer.headers["X-Osync-Node"]) == (200, where)


async def test_without_shards_a_wish_for_them_is_an_error_that_helps():
    async with proxy(ScriptedNode("a")) as running:
        async with running.post("/api/generate", {"model": "m", "prompt": "x", "options": {"distributed": True}}) as r:
            assert r.status == 501
            assert "osyncd --role shard" in (await r.json())["error"]
        async with running.client.get("/api/plan?model=m") as r:
            assert r.status == 501
    async with proxy(ScriptedNode("a"), settings=Settings(distributed=False)) as running:
        body = {"model": "m", "prompt": "x", "options": {"distributed": True}}
        async with running.post("/api/generate", body) as r:
            assert "--no-distributed" in (await r.json())["error"]


async def test_shards_are_shown_as_such_and_never_as_nodes_that_fail(tmp_path, models):
    async with cluster(tmp_path, Sized("a", models=("big:latest",)), Shard("s1"), Shard("s2")) as made:
        await ask(made, options={"distributed": True})
        made.proxy.view.peers[2].last = made.proxy.nodes[2].state()
        made.proxy.nodes[2].up = False
        made.proxy.view.peers[2].error = "connection refused"
        async with made.proxy.client.get("/api/status") as answer:
            osync = (await answer.json())["osync"]
        assert [node["node_id"] for node in osync["nodes"]] == ["a"]
        first, second = osync["shards"]
        assert (first["node_id"], first["online"], first["memory"]["free"]) == ("s1", True, 1 << 30)
        assert (second["node_id"], second["online"], second["error"]) == ("s2", False, "connection refused")
        (pipeline,) = osync["pipelines"]
        assert (pipeline["model"], pipeline["size"], pipeline["recoveries"]) == ("big:latest", 1000, 2)
        ready, waiting = pipeline["stages"]
        assert (ready["state"], ready["frame_busy_s"], ready["queued"]) == ("ready", 0.1, 1)
        assert waiting["state"] == "waiting"
        async with made.proxy.client.get("/metrics") as answer:
            text = await answer.text()
        assert 'osync_nodes{state="up"} 1.0' in text
        assert 'osync_nodes{state="unusable"} 0.0' in text
        assert 'osync_shard_memory_bytes{node="s1"}' in text
        assert 'node="s2"' not in text
        assert 'osync_pipeline_recoveries_total{model="big:latest",pipeline="p0"} 2.0' in text
        assert (
            'osync_pipeline_stage_busy_seconds_total{model="big:latest",node="s1",pipeline="p0",stage="0"} 0.4' in text
        )
        async with made.proxy.client.post("/api/nodes/s1/drain") as answer:
            assert answer.status == 404


async def test_no_usable_node_is_not_blamed_on_shards():
    async with proxy(Shard("s1")) as running, running.client.get("/readyz") as answer:
        assert answer.status == 503
        assert "no node is known" in await answer.text()


async def test_the_plan_is_told(tmp_path, models):
    async with cluster(tmp_path, Shard("s1"), Shard("s2")) as made:
        client = made.proxy.client
        async with client.get("/api/plan?model=big&stages=2&shards=s1,s2&context=128") as answer:
            told = await answer.json()
        assert answer.status == 200
        assert told["model"] == "big:latest"
        assert told["decision"]["is_split"]
        assert "no node has it" in told["decision"]["reason"]
        assert [stage["shard"] for stage in told["plan"]["stages"]] == ["s1:50051", "s2:50051"]
        assert told["table"]["rows"][-1][0] == "all"
        async with client.get("/api/plan?model=big&shards=nobody") as answer:
            told = await answer.json()
        assert (told["plan"], told["lent_bytes"]) == (None, 0)
        assert "no shard may be used" in told["reason"]
        for query, status in (("", 400), ("?model=none", 404), ("?model=big&stages=x", 400)):
            async with client.get("/api/plan" + query) as answer:
                assert answer.status == status


async def test_an_idle_pipeline_makes_room_for_another(tmp_path, models):
    write_model(models / "other.gguf", "llama", 3, vocabulary="gpt2")
    async with cluster(tmp_path, Shard("s1"), Shard("s2")) as made:
        made.coordinator.holds_one = True
        assert (await ask(made))[0] == 200
        assert (await ask(made, model="other"))[0] == 200
        assert [runner.closed for _, _, runner in made.coordinator.loaded] == [True, False]


async def test_a_pipeline_is_among_the_models_of_the_status(tmp_path, models):
    async with cluster(tmp_path, Sized("a", models=("big:latest",)), Shard("s1"), Shard("s2")) as made:
        await ask(made, options={"distributed": True})
        async with made.proxy.client.get("/api/status") as answer:
            rows = {row["name"]: row for row in (await answer.json())["osync"]["models"]}
    assert [host["node_id"] for host in rows["big:latest"]["hosts"]] == ["a"]
    assert rows["big:latest"]["loaded_on"] == [PIPELINES]
    assert [host["node_id"] for host in rows["big:f32"]["hosts"]] == [PIPELINES]


async def test_the_plan_of_a_small_model_says_that_a_node_serves_it(tmp_path, models):
    async with cluster(tmp_path, Sized("a", models=("big:latest",)), Shard("s1"), Shard("s2")) as made:
        await ask(made, options={"distributed": True})
        async with made.proxy.client.get("/api/plan?model=big") as answer:
            told = await answer.json()
        assert (told["decision"]["is_split"], told["decision"]["node"]) == (False, "a")
        assert told["plan"]["stages"]


async def test_what_is_plain_is_looked_at_again_when_a_nodes_models_change(tmp_path, models):
    node = Sized("a", models=("big:latest",))
    async with cluster(tmp_path, node, Shard("s1"), Shard("s2")) as made:
        assert (await ask(made))[2] == "a"
        node.models = ()
        assert (await ask(made))[2] == PIPELINES
        node.models = ("big:latest",)
        assert (await ask(made))[2] == "a"


class Slow(Sized):
    """A node that is a shard too, and was measured to be slow."""

    def state(self) -> NodeState | None:
        state = super().state()
        return state and replace(state, shard=ShardState("llama 1", s_per_byte=self.s_per_byte))

    s_per_byte = 1e-6


async def test_a_large_model_is_split_where_that_is_faster(tmp_path, models):
    node = Slow("a", models=("big:latest",), parameters="138K")
    shards = Shard("s1"), Shard("s2")
    async with cluster(tmp_path, node, *shards, distributed_threshold="100K") as made:
        assert (await ask(made))[2] == PIPELINES
    async with cluster(tmp_path, node, *shards, distributed_threshold="1M") as made:
        assert (await ask(made))[2] == "a"
        assert made.planner.plans == 0
    node.s_per_byte = 1e-12
    async with cluster(tmp_path, node, *shards, distributed_threshold="100K") as made:
        assert (await ask(made))[2] == "a"
        assert made.planner.plans == 1
