"""Embeddings through a proxy and a node: the clients of Ollama and OpenAI, and the typed gRPC API."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import ollama
import openai
import pytest

from osync.pb import inference_pb2 as pb
from osync.pb import inference_pb2_grpc
from tests.daemons import Process, processes
from tests.e2e.conftest import MODEL
from tests.fakes import minilm

if importlib.util.find_spec("llama_cpp") is None or minilm.source() is None:
    pytest.skip("needs llama.cpp and the small embedding model", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

EMBED = "minilm:f16"
TEXTS = ["A cat sits on the mat.", "A kitten is resting on a rug.", "Stock prices fell sharply today."]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def proxy(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("embed")
    source = minilm.source()
    assert source is not None
    minilm.write(folder / "models" / "minilm-F16.gguf", source)
    with processes(folder) as owner:
        node = owner.osyncd(
            "--role", "node", "--backend", "engine", "--context-window", "512",
            "--models-dir", str(folder / "models"), "--models-dir", str(models_dir), name="node",
        )  # fmt: skip
        made = owner.osyncd("--role", "proxy", "--servers", f"127.0.0.1:{node.grpc_port}", name="proxy")
        yield owner.ready(made)


@pytest.fixture
def client(proxy: Process) -> Iterator[ollama.Client]:
    with ollama.Client(host=proxy.url) as made:
        yield made


@pytest.fixture
def openai_client(proxy: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_similar_texts_are_closer(client: ollama.Client):
    answer = client.embed(EMBED, TEXTS)
    a, b, c = answer.embeddings
    assert len(a) == 384
    assert [cosine(v, v) for v in (a, b, c)] == pytest.approx([1.0] * 3, abs=1e-5)
    assert cosine(a, b) > 0.5 > 0.2 > max(cosine(a, c), cosine(b, c))
    assert answer.prompt_eval_count and answer.total_duration and answer.load_duration
    alone = client.embed(EMBED, TEXTS[1]).embeddings[0]
    assert cosine(alone, b) > 0.999
    older = client.embeddings(EMBED, TEXTS[1]).embedding
    assert cosine(older, b) > 0.999


def test_dimensions_and_truncation(client: ollama.Client):
    whole = client.embed(EMBED, TEXTS[0]).embeddings[0]
    short = client.embed(EMBED, TEXTS[0], dimensions=64).embeddings[0]
    norm = cosine(whole[:64], whole[:64]) ** 0.5
    assert list(short) == pytest.approx([v / norm for v in whole[:64]], abs=1e-5)
    assert client.embed(EMBED, "word " * 2000).prompt_eval_count == 512
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length") as caught:
        client.embed(EMBED, "word " * 2000, truncate=False)
    assert caught.value.status_code == 400
    assert list(client.embed(EMBED, "").embeddings) == []


def test_openai_float_and_base64(openai_client: openai.OpenAI, client: ollama.Client):
    native = client.embed(EMBED, TEXTS).embeddings
    packed = openai_client.embeddings.create(model=EMBED, input=TEXTS)  # asks for base64 and decodes it
    plain = openai_client.embeddings.create(model=EMBED, input=TEXTS, encoding_format="float")
    for answer in (packed, plain):
        assert [row.index for row in answer.data] == [0, 1, 2]
        for row, expected in zip(answer.data, native, strict=True):
            assert row.embedding == pytest.approx(list(expected), abs=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    cut = openai_client.embeddings.create(model=EMBED, input=TEXTS[0], dimensions=8).data[0].embedding
    assert len(cut) == 8
    assert cosine(cut, cut) == pytest.approx(1.0, abs=1e-5)
    assert len(openai_client.embeddings.create(model=EMBED, input="").data) == 1
    with pytest.raises(openai.BadRequestError, match="invalid input"):
        openai_client.embeddings.create(model=EMBED, input=[])
    with pytest.raises(openai.BadRequestError, match="invalid input type"):
        openai_client.embeddings.create(model=EMBED, input=[[1, 2, 3]])
    with pytest.raises(openai.NotFoundError, match="nothing"):
        openai_client.embeddings.create(model="nothing", input="x")


def test_a_generative_model_embeds_too(client: ollama.Client):
    a, b, c = client.embed(MODEL, TEXTS).embeddings
    assert len(a) == 576
    assert cosine(a, b) > cosine(a, c)
    assert client.generate(MODEL, "Say hello.", options={"num_predict": 4}).eval_count
    sizes = {m.model: m.size for m in client.ps().models}
    assert sizes[MODEL] and sizes[MODEL] > 100 << 20


def test_an_embedding_model_writes_no_text(client: ollama.Client):
    with pytest.raises(ollama.ResponseError, match=f'"{EMBED}" does not support generate') as caught:
        client.generate(EMBED, "x")
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match=f'"{EMBED}" does not support chat') as caught:
        client.chat(EMBED, [{"role": "user", "content": "x"}])
    assert caught.value.status_code == 400
    assert client.show(EMBED).capabilities == ["embedding"]
    assert client.show(MODEL).capabilities == ["completion"]


def test_typed_grpc(proxy: Process, client: ollama.Client):
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        answer = stub.Embed(pb.EmbedRequest(model=EMBED, input=TEXTS, dimensions=32), timeout=60)
        native = client.embed(EMBED, TEXTS, dimensions=32)
        assert answer.prompt_eval_count == native.prompt_eval_count
        for row, expected in zip(answer.embeddings, native.embeddings, strict=True):
            assert list(row.values) == pytest.approx(list(expected), abs=1e-5)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(model=EMBED, input=["word " * 999], truncate=False), timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
