"""/api/embed and /api/embeddings of the engine backend, with a runner that needs no llama.cpp."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from osync.engine.embedding import normalized
from osync.errors import CapacityError
from tests.fakes.gguf import write
from tests.integration.test_engine_backend import Rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    write(tmp_path / "models" / "tiny-Q4_1.gguf")
    write(tmp_path / "models" / "vec-F16.gguf", general__architecture="bert", bert__pooling_type=1)
    rig = Rig(tmp_path, context_window=8)
    await rig.backend.start()
    await rig.until(lambda: rig.backend.state().ok and len(rig.backend.state().models) == 4)
    yield rig
    await rig.backend.close()
    assert all(r.closed for r in rig.engine.runners)


async def embed(rig: Rig, **body: object):
    return await rig.call("POST", "/api/embed", {"model": "vec", **body})


@pytest.mark.parametrize("model", ["vec", "tiny"])
async def test_one_text_and_several(rig: Rig, model: str):
    answer = await embed(rig, model=model, input="hallo")
    found = answer.json()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert list(found) == [
        "model", "embeddings", "total_duration", "load_duration", "prompt_eval_count",
    ]  # fmt: skip
    assert found["model"] == model
    assert found["prompt_eval_count"] == 5
    assert found["total_duration"] >= found["load_duration"] > 0
    assert found["embeddings"] == [pytest.approx(list(normalized([5, ord("h"), 1])))]
    several = (await embed(rig, model=model, input=["hallo", "", "x"])).json()
    assert several["embeddings"][0] == found["embeddings"][0]
    assert [round(math.hypot(*row), 5) for row in several["embeddings"]] == [1, 1, 1]
    assert several["prompt_eval_count"] == 6
    (runner,) = rig.engine.runners
    assert runner.settings.embeds is (model == "vec")


async def test_numbers_are_written_as_float32(rig: Rig):
    text = (await embed(rig, input="hallo")).body.decode()
    digits = text[text.index("[[") + 2 : text.index("]]")].split(",")
    assert len(digits) == 3
    assert all(len(one.lstrip("-0.").replace(".", "")) <= 9 for one in digits), digits


@pytest.mark.parametrize("body", [{"input": ""}, {"input": []}, {"input": None}, {}])
async def test_no_input_loads(rig: Rig, body: dict[str, object]):
    answer = await embed(rig, **body)
    assert (answer.status, answer.json()) == (200, {"model": "vec", "embeddings": []})
    assert [m.name.partition(":")[0] for m in rig.backend.state().loaded] == ["vec"]
    assert (await rig.call("POST", "/api/embeddings", {"model": "vec", **body})).json() == {"embedding": []}


@pytest.mark.parametrize("value", [5, {"a": 1}, ["a", 5], [["a"]], True])
async def test_input_of_other_types_is_refused_before_a_load(rig: Rig, value: object):
    answer = await embed(rig, input=value)
    assert (answer.status, answer.json()) == (400, {"error": "invalid input type"})
    assert rig.engine.loads == 0


async def test_dimensions_cut_and_normalize_again(rig: Rig):
    cut = (await embed(rig, input=["hallo"], dimensions=2)).json()["embeddings"]
    assert cut == [pytest.approx(list(normalized([5, ord("h")])))]
    whole = (await embed(rig, input=["hallo"])).json()["embeddings"]
    for dimensions in (0, 3, 99, -1, None):
        assert (await embed(rig, input=["hallo"], dimensions=dimensions)).json()["embeddings"] == whole
    answer = await embed(rig, input="a", dimensions="2")
    assert answer.status == 400
    assert "dimensions" in answer.json()["error"]


async def test_truncate(rig: Rig):
    assert (await embed(rig, input="a" * 20)).status == 200
    answer = await embed(rig, input="a" * 20, truncate=False)
    assert (answer.status, answer.json()) == (400, {"error": "the input length exceeds the context length"})


async def test_keep_alive_and_options(rig: Rig):
    await embed(rig, input="a", keep_alive=0)
    await rig.until(lambda: not rig.backend.state().loaded)
    await embed(rig, input="a", options={"num_ctx": 6}, keep_alive=-1)
    assert rig.engine.runners[-1].settings.context_length == 6
    (loaded,) = rig.backend.state().loaded
    assert loaded.expires_at > "2200"
    answer = await embed(rig, input="a", options={"num_ctx": "many"})
    assert (answer.status, answer.json()) == (500, {"error": 'option "num_ctx" must be of type integer'})
    assert (await embed(rig, input="a", keep_alive="10")).status == 400


async def test_the_older_route(rig: Rig):
    answer = await rig.call("POST", "/api/embeddings", {"model": "vec", "prompt": "hallo"})
    assert (answer.status, list(answer.json())) == (200, ["embedding"])
    assert answer.json()["embedding"] == pytest.approx(list(normalized([5, ord("h"), 1])))
    assert (await rig.call("POST", "/api/embeddings", {"model": "vec", "prompt": 5})).status == 400


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
async def test_absent_models(rig: Rig, path: str):
    answer = await rig.call("POST", path, {"model": "Nothing", "input": "x"})
    assert answer.status == 404
    assert answer.json() == {"error": 'model "Nothing" not found, try pulling it first'}
    answer = await rig.call("POST", path, {"input": "x"})
    assert (answer.status, answer.json()) == (400, {"error": "model is required"})
    assert (await rig.call("GET", path)).status == 405


async def test_a_full_queue_is_503(rig: Rig):
    rig.engine.refuses = CapacityError("server busy, please try again.  maximum pending requests exceeded")
    answer = await embed(rig, input="x")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")


async def test_an_embedding_model_says_so_and_writes_no_text(rig: Rig):
    tags = {m["name"]: m["capabilities"] for m in (await rig.call("GET", "/api/tags")).json()["models"]}
    assert (tags["vec:f16"], tags["tiny:q4_1"]) == (["embedding"], ["completion"])
    shown = await rig.call("POST", "/api/show", {"model": "vec"})
    assert shown.json()["capabilities"] == ["embedding"]
    answer = await rig.call("POST", "/api/generate", {"model": "vec", "prompt": "x"})
    assert (answer.status, answer.json()) == (400, {"error": '"vec" does not support generate'})
    answer = await rig.call("POST", "/api/chat", {"model": "vec", "messages": []})
    assert (answer.status, answer.json()) == (400, {"error": '"vec" does not support chat'})
    assert rig.engine.loads == 0


async def test_a_long_answer_is_whole(rig: Rig):
    texts = [chr(97 + n % 26) * (n % 7 + 1) for n in range(20_000)]
    answer = await embed(rig, input=texts)
    rows = orjson.loads(answer.body)["embeddings"]
    assert len(rows) == 20_000
    assert rows[19_999] == pytest.approx(list(normalized([len(texts[-1]), ord(texts[-1][0]), 1])), abs=1e-6)
