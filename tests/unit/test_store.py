"""The model store: names, both layouts, broken files, digests."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from osync.engine.files import file_name
from osync.engine.store import ModelStore
from osync.errors import BadRequest, ModelNotFound, ModelUnusable
from tests.fakes.gguf import gguf, write


def names(store: ModelStore) -> set[str]:
    return {m.info.name for m in store.models}


def scanned(*directories, state=None) -> ModelStore:
    store = ModelStore(directories, state)
    store.scan()
    return store


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", ("smollm2-135m-instruct", "q4_1")),
        ("gemma-3-270m-it-Q4_K_M.gguf", ("gemma-3-270m-it", "q4_k_m")),
        ("Model-UD-IQ2_XXS.GGUF", ("model", "ud-iq2_xxs")),
        ("big-Q8_0-00001-of-00003.gguf", ("big", "q8_0")),
        ("a b (1)-fp16.gguf", ("a-b-1-", "f16")),
        ("plain.gguf", ("plain", "")),
        ("-x.gguf", ("x", "")),
        ("Q4_0.gguf", ("q4_0", "")),
    ],
)
def test_file_names_become_model_names(file, name):
    assert file_name(file) == name


def test_a_file_is_found_by_its_quantization_and_alone_by_its_stem(tmp_path):
    write(tmp_path / "Tiny.Q4_1.gguf")
    store = scanned(tmp_path)
    assert names(store) == {"tiny:q4_1", "tiny:latest"}
    for name in ("tiny:q4_1", "TINY", "tiny:latest", "registry.ollama.ai/library/Tiny:Q4_1"):
        assert store.find(name).path.name == "Tiny.Q4_1.gguf"
    info = store.find("tiny").info
    assert (info.quantization, info.family, info.context_length) == ("Q4_1", "llama", 4096)
    assert info.modified_at.endswith("Z")


def test_two_quantizations_have_no_bare_stem(tmp_path):
    write(tmp_path / "tiny.Q4_1.gguf")
    write(tmp_path / "sub" / "tiny.Q8_0.gguf", general__file_type=7)
    store = scanned(tmp_path)
    assert names(store) == {"tiny:q4_1", "tiny:q8_0"}
    with pytest.raises(ModelNotFound, match="model 'tiny' not found"):
        store.find("tiny")


def test_a_file_dropped_in_appears_and_a_removed_one_goes(tmp_path):
    store = scanned(tmp_path)
    assert store.models == ()
    path = write(tmp_path / "a-Q4_1.gguf")
    assert store.scan() is True
    assert store.scan() is False
    path.unlink()
    assert store.scan() is True
    assert store.models == ()


def test_a_broken_file_is_not_listed_and_says_why_by_name(tmp_path):
    (tmp_path / "bad-Q4_0.gguf").write_bytes(gguf()[:-400])
    store = scanned(tmp_path)
    assert store.models == ()
    for name in ("bad:q4_0", "bad"):
        with pytest.raises(ModelUnusable, match="truncated"):
            store.find(name)
    (tmp_path / "bad-Q4_0.gguf").write_bytes(gguf())
    assert store.scan() is True
    assert store.find("bad").info.name == "bad:latest"


def test_what_is_no_language_model_is_not_listed(tmp_path):
    write(tmp_path / "mmproj.gguf", general__architecture="clip")
    store = scanned(tmp_path)
    assert store.models == ()
    with pytest.raises(ModelUnusable, match="not a language model"):
        store.find("mmproj")


def test_a_split_file_counts_whole_and_needs_all_parts(tmp_path):
    first = write(tmp_path / "big-Q4_1-00001-of-00002.gguf")
    with pytest.raises(ModelUnusable, match="part 2 of 2 is missing"):
        scanned(tmp_path).find("big")
    (tmp_path / "big-Q4_1-00002-of-00002.gguf").write_bytes(b"x" * 1000)
    store = scanned(tmp_path)
    assert names(store) == {"big:q4_1", "big:latest"}
    assert store.find("big").info.size == first.stat().st_size + 1000


def test_names_that_are_none(tmp_path):
    with pytest.raises(BadRequest, match="invalid model name"):
        scanned(tmp_path).find("a b")


def ollama_store(
    root: Path,
    layers: list[tuple[str, bytes]],
    config: dict[str, str] | None = None,
    name: str = "registry.ollama.ai/library/Smol/latest",
) -> str:
    (root / "blobs").mkdir(parents=True, exist_ok=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs" / f"sha256-{digest}").write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                   **blob(json.dumps(config or {}).encode())},
        "layers": [{"mediaType": f"application/vnd.ollama.image.{kind}", **blob(data)} for kind, data in layers],
    }  # fmt: skip
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(manifest).encode()
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def test_an_ollama_store_with_all_its_layers(tmp_path):
    digest = ollama_store(
        tmp_path,
        [
            ("model", gguf()),
            ("template", b"{{ .Prompt }}"),
            ("system", b"Be brief."),
            ("params", b'{"stop": ["X"], "temperature": 0.5}'),
            ("messages", b'[{"role": "user", "content": "hi"}]'),
            ("license", b"MIT"),
        ],
        {"model_family": "llama", "model_type": "135M", "file_type": "Q4_1"},
    )
    model = scanned(tmp_path).find("smol")
    assert model.info.name == "Smol:latest"
    assert model.info.digest == digest
    assert (model.info.parameter_size, model.info.quantization) == ("135M", "Q4_1")
    assert (model.system, model.template, model.licenses) == ("Be brief.", "{{ .Prompt }}", ("MIT",))
    assert model.parameters == {"stop": ["X"], "temperature": 0.5}
    assert model.messages == ({"role": "user", "content": "hi"},)


def test_manifests_that_lie_are_faults_not_crashes(tmp_path):
    base = tmp_path / "manifests" / "registry.ollama.ai" / "library"
    for number, text in enumerate(
        ["", "[]", "{}", '{"layers": 3}', '{"layers": [{}]}', '{"layers": [null]}',
         '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../../etc", "size": 1}]}',
         '{"layers": [], "config": []}'],
    ):  # fmt: skip
        path = base / f"m{number}" / "latest"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with pytest.raises(ModelUnusable):
            scanned(tmp_path).find(f"m{number}")


def test_the_digest_becomes_the_files_own_and_is_remembered(tmp_path):
    path = write(tmp_path / "models" / "a-Q4_1.gguf")
    store = scanned(tmp_path / "models", state=tmp_path / "state")
    before = store.find("a").info.digest
    assert store.pending_digests() == (path,)
    assert scanned(tmp_path / "models").find("a").info.digest == before  # stable
    store.digest_file(path, threading.Event())
    assert store.scan() is True
    final = hashlib.sha256(path.read_bytes()).hexdigest()
    assert store.find("a").info.digest == final
    again = scanned(tmp_path / "models", state=tmp_path / "state")
    assert again.find("a").info.digest == final
    assert again.pending_digests() == ()


def test_a_stopped_digest_leaves_nothing(tmp_path):
    path = write(tmp_path / "a-Q4_1.gguf")
    store = scanned(tmp_path)
    stop = threading.Event()
    stop.set()
    store.digest_file(path, stop)
    assert store.pending_digests() == (path,)


def test_directories_that_are_not_there_hold_nothing(tmp_path):
    assert scanned(tmp_path / "none").models == ()
