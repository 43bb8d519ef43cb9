"""The gateway's catalogue and model management over several Ollamas."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.integration.rig import EngineBackend, Pieces, rig

OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"


def ollama(*models: str | FakeModel, **more: object) -> FakeOllama:
    return FakeOllama(models=models, **more)  # type: ignore[arg-type]


# Catalogue


async def test_tags_are_merged_over_nodes_and_unknown_fields_survive() -> None:
    a, b = FakeModel("a", modified_at=OLD), FakeModel("b", modified_at=NEW)
    async with rig(ollama(a), ollama(a, b), engines=(EngineBackend("c:q4_1"),)) as cluster:
        reply = await cluster.ask("GET", "/api/tags")
        assert reply.status == 200
        assert [row["name"] for row in reply.json["models"]] == ["c:q4_1", "b:latest", "a:latest"]
        assert reply.json["models"][2] == a.tag_row()
        head = await cluster.ask("HEAD", "/api/tags")
        assert head.status == 200


async def test_the_majority_digest_is_the_one_shown() -> None:
    odd = FakeModel("m", digest="f" * 64, modified_at=NEW)
    even = FakeModel("m", digest="1" * 64, modified_at=OLD)
    async with rig(ollama(odd), ollama(even), ollama(even)) as cluster:
        rows = (await cluster.ask("GET", "/api/tags")).json["models"]
        assert [row["digest"] for row in rows] == [even.digest]
        reply = await cluster.ask("POST", "/api/show", {"model": "m"})
        assert reply.node in {"n1", "n2"}


async def test_one_node_that_breaks_leaves_the_others_answer() -> None:
    first, second = ollama("a"), ollama("b")
    async with rig(first, second) as cluster:
        await first.close()
        reply = await cluster.ask("GET", "/api/tags")
        assert reply.status == 200
        assert [row["name"] for row in reply.json["models"]] == ["b:latest"]


async def test_no_models_is_an_empty_list_and_null_for_openai() -> None:
    async with rig(ollama()) as cluster:
        assert (await cluster.ask("GET", "/api/tags")).json == {"models": []}
        assert (await cluster.ask("GET", "/api/ps")).json == {"models": []}
        assert (await cluster.ask("GET", "/v1/models")).json == {"object": "list", "data": None}


async def test_an_empty_cluster_says_how_to_add_a_node_but_tells_its_version() -> None:
    async with rig() as cluster:
        assert (await cluster.ask("GET", "/api/version")).json == {"version": "0.33.0"}
        for method, target in [("GET", "/api/tags"), ("GET", "/api/ps"), ("POST", "/api/show"), ("GET", "/v1/models"),
                               ("POST", "/api/pull"), ("DELETE", "/api/delete"), ("POST", "/api/copy")]:  # fmt: skip
            body = {"model": "m", "source": "m", "destination": "x"}
            reply = await cluster.ask(method, target, body)
            assert reply.status == 503
            assert "--servers" in str(reply.json["error"])


async def test_version_is_the_lowest() -> None:
    async with rig(ollama(version="0.30.1"), ollama(version="0.9.12")) as cluster:
        assert (await cluster.ask("GET", "/api/version")).json == {"version": "0.9.12"}


async def test_ps_has_one_row_for_a_model_loaded_twice() -> None:
    first, second = ollama("m"), ollama("m")
    async with rig(first, second) as cluster:
        for node in ("n0", "n1"):
            reply = await cluster.ask(
                "POST", "/api/generate", {"model": "m", "prompt": "x"}, headers=(("X-Osync-Node", node),)
            )
            assert reply.status == 200
        rows = (await cluster.ask("GET", "/api/ps")).json["models"]
        assert [row["name"] for row in rows] == ["m:latest"]


async def test_a_slow_node_does_not_hold_the_others_over_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osync.gateway.catalogue.PS_TIMEOUT_S", 0.2)
    slow, quick = ollama("m"), ollama("m")
    async with rig(slow, quick) as cluster:
        pin = (("X-Osync-Node", "n1"),)
        await cluster.ask("POST", "/api/generate", {"model": "m", "prompt": "x"}, headers=pin)
        slow.ps_delay_s = 30.0
        reply = await cluster.ask("GET", "/api/ps")
        assert [row["name"] for row in reply.json["models"]] == ["m:latest"]
        alone = await cluster.ask("GET", "/api/ps", headers=(("X-Osync-Node", "n0"),))
        assert alone.status == 504
        assert "n0" in alone.json["error"]


async def test_show_passes_the_answer_of_a_node_that_has_the_model() -> None:
    model = FakeModel("ns/m:7b")
    async with rig(ollama("a"), ollama(model)) as cluster:
        reply = await cluster.ask("POST", "/api/show", {"name": "NS/M:7b", "verbose": True})
        assert reply.status == 200
        assert reply.node == "n1"
        assert reply.json["tensors"]
        assert cluster.fakes[0].received("/api/show") == []


async def test_show_finds_what_no_state_lists_yet() -> None:
    async with rig(ollama("a"), ollama("b")) as cluster:
        cluster.fakes[1].store.add(FakeModel("fresh"))
        assert (await cluster.ask("POST", "/api/show", {"model": "fresh"})).status == 200


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "missing request body"),
        (b"{}", 400, "model is required"),
        (b'{"model":"a b"}', 400, "invalid model name"),
        (b'{"model":"gone"}', 404, "model 'gone:latest' not found"),
    ],
)
async def test_show_refuses_in_ollamas_words(body: bytes, status: int, text: str) -> None:
    async with rig(ollama("a")) as cluster:
        reply = await cluster.ask("POST", "/api/show", body)
        assert (reply.status, reply.json) == (status, {"error": text})


async def test_openai_models_of_both_kinds_of_nodes() -> None:
    async with rig(ollama("a"), engines=(EngineBackend("c:q4_1"),)) as cluster:
        rows = (await cluster.ask("GET", "/v1/models")).json["data"]
        assert {row["id"] for row in rows} == {"a:latest", "c:q4_1"}
        engine = await cluster.ask("GET", "/v1/models/c:q4_1")
        assert (engine.node, engine.json["object"], engine.json["owned_by"]) == ("e0", "model", "library")
        assert engine.json["created"] == 1777939200
        assert (await cluster.ask("GET", "/v1/models/a")).json["id"] == "a"
        missing = await cluster.ask("GET", "/v1/models/x")
        assert missing.status == 404
        assert missing.json["error"]["type"] == "not_found_error"


# Pull and push


async def test_pull_goes_to_the_node_with_most_room_and_relays_progress() -> None:
    async with rig(ollama(), ollama()) as cluster:
        for fake in cluster.fakes:
            fake.store.registry["m:latest"] = FakeModel("m")
        reply = await cluster.ask("POST", "/api/pull", {"model": "m"})
        assert reply.header("content-type") == "application/x-ndjson"
        assert reply.node == "n1"
        assert reply.lines[0] == {"status": "pulling manifest"}
        assert reply.lines[-1] == {"status": "success"}
        assert [line["completed"] for line in reply.lines if "completed" in line] == [
            91_728_032 * step // 4 for step in (1, 2, 3, 4)
        ]
        assert cluster.having("m") == [1]


async def test_pull_without_stream_is_one_object_and_a_failure_is_a_500() -> None:
    async with rig(ollama()) as cluster:
        cluster.fakes[0].store.registry["m:latest"] = FakeModel("m")
        reply = await cluster.ask("POST", "/api/pull", {"name": "m", "stream": False})
        assert (reply.status, reply.json) == (200, {"status": "success"})
        failed = await cluster.ask("POST", "/api/pull", {"name": "none", "stream": False})
        assert (failed.status, failed.json) == (500, {"error": "pull model manifest: file does not exist"})
        streamed = await cluster.ask("POST", "/api/pull", {"name": "none"})
        assert streamed.status == 200
        assert streamed.lines[-1] == {"error": "pull model manifest: file does not exist"}


async def test_identical_pulls_share_one_and_the_last_to_leave_ends_it() -> None:
    async with rig(ollama()) as cluster:
        fake = cluster.fakes[0]
        fake.store.registry["m:latest"] = FakeModel("m")
        fake.store.gate.hold()
        first, first_task = cluster.begin("POST", "/api/pull", {"model": "m"})
        await first.changes.until(lambda: len(first.lines) == 2)
        second, second_task = cluster.begin("POST", "/api/pull", {"model": "M:latest"})
        await second.changes.until(lambda: len(second.lines) == 2)
        assert len(fake.received("/api/pull")) == 1
        first_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first_task
        fake.store.gate.release(2)
        await second.changes.until(lambda: second.lines[-1].get("completed"))
        assert fake.cancelled == 0
        second_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second_task
        await fake.changes.until(lambda: fake.cancelled == 1)
        assert not cluster.gateway.context.pulls
        fake.store.gate.release()
        third = await cluster.ask("POST", "/api/pull", {"model": "m"})
        assert third.lines[-1] == {"status": "success"}
        assert len(fake.received("/api/pull")) == 2


async def test_a_pull_that_breaks_says_so_in_its_last_line() -> None:
    async with rig(ollama()) as cluster:
        fake = cluster.fakes[0]
        fake.store.registry["m:latest"] = FakeModel("m")
        fake.store.gate.hold()
        reply, task = cluster.begin("POST", "/api/pull", {"model": "m"})
        await reply.changes.until(lambda: len(reply.lines) == 2)
        await fake.close()
        await task
        assert "error" in reply.lines[-1]


async def test_push_goes_to_a_node_that_has_the_model() -> None:
    async with rig(ollama("a"), ollama("me/b")) as cluster:
        reply = await cluster.ask("POST", "/api/push", {"model": "me/b"})
        assert reply.node == "n1"
        assert reply.lines[-1] == {"status": "success"}


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create", "/api/copy", "/api/show"])
async def test_bodies_that_are_no_json_are_refused(path: str) -> None:
    async with rig(ollama("a")) as cluster:
        assert (await cluster.ask("POST", path, b"")).json == {"error": "missing request body"}
        for body in (b"{", b"nope", b"[]", b'{"model":5,"source":5}'):
            reply = await cluster.ask("POST", path, body)
            assert reply.status == 400, body
            assert reply.json["error"]


# Copy and delete


async def test_copy_and_delete_happen_wherever_the_model_is() -> None:
    async with rig(ollama("m", "x"), ollama("m"), ollama("x")) as cluster:
        reply = await cluster.ask("POST", "/api/copy", {"source": "m", "destination": "n"})
        assert (reply.status, reply.body) == (200, b"")
        assert cluster.having("n") == [0, 1]
        reply = await cluster.ask("DELETE", "/api/delete", {"model": "n"})
        assert (reply.status, reply.body) == (200, b"")
        assert cluster.having("n") == []
        assert cluster.having("m") == [0, 1]


async def test_copy_and_delete_of_what_nobody_has_are_404_in_ollamas_words() -> None:
    async with rig(ollama("a"), ollama("a")) as cluster:
        reply = await cluster.ask("POST", "/api/copy", {"source": "m", "destination": "n"})
        assert (reply.status, reply.json) == (404, {"error": 'model "m" not found'})
        reply = await cluster.ask("DELETE", "/api/delete", {"name": "m"})
        assert (reply.status, reply.json) == (404, {"error": "model 'm' not found"})
        reply = await cluster.ask("POST", "/api/copy", {"source": "a", "destination": "-"})
        assert (reply.status, reply.json) == (400, {"error": 'destination "-" is invalid'})


async def test_a_node_without_the_model_that_cannot_be_asked_is_no_failure() -> None:
    async with rig(ollama("m"), ollama("other")) as cluster:
        await cluster.fakes[1].close()
        assert (await cluster.ask("DELETE", "/api/delete", {"model": "m"})).status == 200


async def test_a_half_done_delete_names_who_did_and_who_did_not() -> None:
    async with rig(ollama("m"), engines=(EngineBackend("m"),)) as cluster:
        reply = await cluster.ask("DELETE", "/api/delete", {"model": "m"})
        assert reply.status == 502
        assert reply.json["error"].startswith("model 'm' deleted on n0; failed on e0: ")


# Create


async def test_create_from_a_model_runs_on_every_node_that_has_it() -> None:
    async with rig(ollama("base"), ollama("base"), ollama("other")) as cluster:
        reply = await cluster.ask("POST", "/api/create", {"model": "mine", "from": "base"})
        assert reply.status == 200
        assert reply.lines[-1] == {"status": "success"}
        assert [line for line in reply.lines if line.get("status") == "success"] == [{"status": "success"}]
        assert cluster.having("mine") == [0, 1]
        whole = await cluster.ask("POST", "/api/create", {"model": "two", "from": "base", "stream": False})
        assert (whole.status, whole.json) == (200, {"status": "success"})
        assert cluster.having("two") == [0, 1]


async def test_create_succeeds_only_after_every_node_did() -> None:
    async with rig(ollama("base"), ollama("base")) as cluster:
        slow = cluster.fakes[1]
        slow.store.gate.hold()
        reply, task = cluster.begin("POST", "/api/create", {"model": "mine", "from": "base"})
        await cluster.settled(lambda: cluster.having("mine") == [0])
        await reply.changes.until(lambda: reply.lines[-1] == {"status": "writing manifest"})
        assert not task.done()
        slow.store.gate.release()
        await task
        assert reply.lines[-1] == {"status": "success"}
        assert cluster.having("mine") == [0, 1]


async def test_a_create_that_fails_on_one_node_names_it() -> None:
    async with rig(ollama("base"), ollama("base")) as cluster:
        broken = cluster.fakes[1]
        broken.store.gate.hold()
        reply, task = cluster.begin("POST", "/api/create", {"model": "mine", "from": "base"})
        await cluster.settled(lambda: cluster.having("mine") == [0] and broken.received("/api/create"))
        await broken.close()
        await task
        assert reply.lines[-1]["error"].startswith("created on n0; failed on n1: ")
        assert {"status": "success"} not in reply.lines


async def test_a_create_that_ollama_refuses_is_refused_in_its_words() -> None:
    async with rig(ollama("a"), ollama("a")) as cluster:
        reply = await cluster.ask("POST", "/api/create", {"model": "mine"})
        assert (reply.status, reply.json) == (400, {"error": "neither 'from' or 'files' was specified"})


async def test_engines_alone_answer_that_they_cannot() -> None:
    async with rig(engines=(EngineBackend("m"),)) as cluster:
        for path in ("/api/pull", "/api/create", "/api/push"):
            assert (await cluster.ask("POST", path, {"model": "m", "from": "m"})).status == 501


# What one node answers


async def test_unknown_routes_go_to_the_designated_node_untouched() -> None:
    async with rig(ollama("a"), ollama("a"), engines=(EngineBackend("m"),)) as cluster:
        reply = await cluster.ask("POST", "/api/new?x=1", Pieces(b"one", b"two"))
        assert (reply.status, reply.body, reply.node) == (404, b"404 page not found", "n0")
        seen = cluster.fakes[0].received("/api/new")[0]
        assert (seen.target, seen.body) == ("/api/new?x=1", b"onetwo")
        me = await cluster.ask("POST", "/api/me")
        assert me.status == 401
        assert me.json["signin_url"]
        wrong = await cluster.ask("PUT", "/api/tags")
        assert (wrong.status, wrong.body) == (405, b"405 method not allowed")


async def test_a_pinned_node_is_the_one_that_answers() -> None:
    async with rig(ollama("a"), ollama("b")) as cluster:
        reply = await cluster.ask("GET", "/api/tags", headers=(("X-Osync-Node", "n1"),))
        assert [row["name"] for row in reply.json["models"]] == ["b:latest"]
        gone = await cluster.ask("GET", "/api/tags", headers=(("X-Osync-Node", "n7"),))
        assert gone.status == 503
