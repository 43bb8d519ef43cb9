"""What Ollama's clients count on, asked of the real model through proxy and node."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Process, processes, wait_for
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "num_predict": 12}


def post(server: Process, path: str, body: Any) -> tuple[int, str, bytes]:
    """Return status, content type and body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def generate(server: Process, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """Return the whole answer of /api/generate."""
    status, kind, body = post(server, "/api/generate", {"model": model, "stream": False, **fields})
    assert (status, kind) == (200, "application/json; charset=utf-8"), body
    answer: dict[str, Any] = json.loads(body)
    return answer


def test_a_final_object_has_ollamas_keys_in_ollamas_order_and_plausible_numbers(engine: Process):
    answer = generate(engine, prompt="Say hi.", options=GREEDY | {"num_predict": 4})
    assert list(answer) == [
        "model", "created_at", "response", "done", "done_reason", "context", "total_duration", "load_duration",
        "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    ]  # fmt: skip
    assert len(answer["context"]) == answer["prompt_eval_count"] + answer["eval_count"]
    parts = sum(answer[f"{part}_duration"] for part in ("load", "prompt_eval", "eval"))
    assert 0 < parts <= answer["total_duration"]


def test_one_token_has_a_duration_too(engine: Process):
    answer = generate(engine, prompt="Say hi.", options=GREEDY | {"num_predict": 1})
    assert answer["eval_count"] == 1
    assert answer["eval_duration"] > 0


@pytest.mark.parametrize("more", [{}, {"num_predict": 0}])
def test_num_predict_bounds_the_answer(engine: Process, more: dict[str, int]):
    answer = generate(engine, prompt="Count to a hundred.", options=GREEDY | more)
    assert answer.get("eval_count", 0) == (GREEDY | more)["num_predict"]
    assert answer["done_reason"] == "length"


def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(engine: Process):
    whole = generate(engine, prompt="Tell me a story.", options=GREEDY)["response"]
    for start, end in ((3, 12), (5, 7), (0, 1)):
        stop = whole[start:end]
        answer = generate(engine, prompt="Tell me a story.", options=GREEDY | {"stop": ["never that", stop]})
        assert (answer["response"], answer["done_reason"]) == (whole[: whole.index(stop)], "stop")


def test_characters_are_never_cut_between_lines(engine: Process):
    def ask(seed: int) -> tuple[str, str]:
        options = {"temperature": 0.5, "seed": seed, "num_predict": 16}
        prompt = "😀🎉👩‍👩‍👧 你好世界 😀🎉👩‍👩‍👧 你好世界 😀🎉"
        request = {"model": MODEL, "prompt": prompt, "raw": True, "options": options}
        _, kind, body = post(engine, "/api/generate", request)
        lines = [json.loads(line.decode()) for line in body.splitlines()]
        assert kind == "application/x-ndjson"
        assert lines[-1]["done"]
        return "".join(line["response"] for line in lines), body.decode()

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, range(4)))
    assert any(ord(character) > 0x2000 for text, _ in texts for character in text)
    assert not any("\\ud8" in body for _, body in texts)


def test_a_fixed_seed_repeats_alone_whatever_ran_before(engine: Process):
    def ask(seed: int) -> str:
        options = {"seed": seed, "num_predict": 10}
        return str(generate(engine, prompt="Tell me a story about the sea.", options=options)["response"])

    first = ask(7)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(ask, range(8, 12)))  # evaluated beside each other: their caches have other last bits
    assert ask(7) == first
    assert len({first, *others}) > 2


def test_the_context_that_comes_back_goes_on(engine: Process):
    first = generate(engine, prompt="My name is Bob.", options=GREEDY)
    second = generate(engine, prompt="And yours?", context=first["context"], options=GREEDY)
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["prompt_eval_count"] > len(first["context"])


def test_a_whole_hosts_worth_of_threads_is_not_to_be_had(engine: Process):
    answer = generate(engine, prompt="Hi.", options=GREEDY | {"num_thread": 10_000, "num_predict": 2})
    assert answer["eval_count"] == 2


def test_a_batch_smaller_than_the_requests_at_once(engine: Process):
    options = GREEDY | {"num_batch": 1, "num_ctx": 256, "num_predict": 4}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: generate(engine, prompt=f"Count {n}.", options=options), range(6)))
    assert [answer["eval_count"] for answer in answers] == [4] * 6
    assert engine.get("/api/ps")["models"][0]["context_length"] == 256


def test_clients_that_leave_in_numbers_lose_no_slot(engine: Process):
    def leave(number: int) -> None:
        body = json.dumps({"model": MODEL, "prompt": f"A long story {number}. " * 20}).encode()
        with socket.create_connection(("127.0.0.1", engine.port)) as connection:
            head = f"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(100)))
        answers = list(pool.map(lambda n: generate(engine, prompt="Hi.", options=GREEDY), range(4)))
    assert all(answer["done"] for answer in answers)
    wait_for(lambda: _load(engine)["active"] == _load(engine)["queued"] == 0, engine)


def _load(engine: Process) -> dict[str, int]:
    nodes = engine.get("/api/status")["osync"]["nodes"]
    load: dict[str, int] = next(node["load"] for node in nodes if node["load"]["slots"])
    return load


def _blob(store: Path, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (store / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _manifest(store: Path, name: str, layers: dict[str, dict[str, Any]]) -> None:
    place = store / "manifests" / "registry.ollama.ai" / "library" / name
    place.mkdir(parents=True)
    rows = [{"mediaType": f"application/vnd.ollama.image.{kind}", **layer} for kind, layer in layers.items()]
    (place / "latest").write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": rows}))


@pytest.fixture(scope="module")
def small(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Path]]:
    """A daemon with both roles, two slots, a queue of two, one model at once, an Ollama store; and that store."""
    store = tmp_path_factory.mktemp("store")
    (store / "blobs").mkdir()
    weights = next(models_dir.glob("*.gguf")).read_bytes()
    own = {
        "model": _blob(store, weights),
        "template": _blob(store, b"{{ .System }}|{{ .Prompt }}|"),
        "system": _blob(store, b"SYS"),
        "params": _blob(store, json.dumps({"temperature": 0, "num_predict": 3, "num_ctx": 512}).encode()),
    }
    _manifest(store, "Own", own)
    _manifest(store, "gone", {"model": {"digest": "sha256:" + "0" * 64, "size": 5}})
    with processes(tmp_path_factory.mktemp("small")) as owner:
        daemon = owner.osyncd(
            "--backend", "engine", "--models-dir", str(store), "--parallel", "2", "--max-queue", "2",
            "--max-loaded-models", "1",
        )  # fmt: skip
        yield owner.ready(daemon), store


def test_an_ollama_stores_layers_are_defaults_that_a_request_overrides(small: tuple[Process, Path]):
    server, _ = small
    answer = generate(server, "oWN", prompt="Hi")
    assert (answer["model"], answer["eval_count"]) == ("oWN", 3)
    assert server.get("/api/ps")["models"][0]["context_length"] == 512
    assert generate(server, "own:latest", prompt="Hi", options={"num_predict": 2})["eval_count"] == 2
    longer = generate(server, "own", prompt="Hi", system="A rather longer text of the system")
    assert longer["prompt_eval_count"] > answer["prompt_eval_count"]


def test_weights_that_are_missing_are_named_with_their_model(small: tuple[Process, Path]):
    status, _, body = post(small[0], "/api/generate", {"model": "gone", "prompt": "x"})
    assert status == 500
    assert b"gone:latest" in body
    assert b"missing" in body
    assert b"Errno" not in body


def test_two_slots_and_a_queue_of_two_take_four_and_say_busy_to_the_rest(small: tuple[Process, Path]):
    server, _ = small

    def ask(number: int) -> tuple[int, str, bytes]:
        body = {"model": "own", "prompt": f"Count {number}", "options": {"num_predict": 32}}
        return post(server, "/api/generate", body)

    generate(server, "own", prompt="", keep_alive=0)
    for state in ("cold", "loaded"):
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        busy = b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
        assert [body for status, _, body in answers if status != 200] == [busy] * 8, state


def test_slots_are_those_of_the_runner(small: tuple[Process, Path]):
    assert _load(small[0])["slots"] == 2


def test_a_file_dropped_in_is_there_at_once_and_removed_it_gives_its_memory_back(
    small: tuple[Process, Path], models_dir: Path
):
    server, store = small
    file = store / "dropped.gguf"
    shutil.copy(next(models_dir.glob("*.gguf")), file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
    generate(server, "dropped", prompt="Hi", keep_alive=-1, options={"num_predict": 1, "num_ctx": 256})
    assert [row["name"] for row in server.get("/api/ps")["models"]] == ["dropped:latest"]  # one at once
    file.unlink()
    wait_for(lambda: server.get("/api/ps")["models"] == [], server)
    assert post(server, "/api/generate", {"model": "dropped", "prompt": "x"})[0] == 404
