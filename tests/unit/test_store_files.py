"""The files of an Ollama's store, given to shards by a node that fronts the Ollama."""

from __future__ import annotations

from pathlib import Path

import pytest

from osync.backend.absent import NoBackend
from osync.config import Settings
from osync.daemon.shard import StoreFiles, blobs_of
from tests.fakes.gguf import gguf
from tests.unit.test_store import ollama_store


def test_a_model_is_found_by_the_digest_that_ollama_shows(tmp_path: Path):
    digest = ollama_store(tmp_path, [("model", gguf())])
    find = blobs_of(Settings(models_dir=(tmp_path,)), NoBackend(), None)
    path = find(digest)
    assert path is not None
    assert path.read_bytes() == gguf()
    assert find(path.name.removeprefix("sha256-")) == path


def test_one_that_comes_later_is_found_and_unknown_ones_cost_one_look_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = 100.0
    monkeypatch.setattr("osync.daemon.shard.time.monotonic", lambda: now)
    files = StoreFiles(Settings(models_dir=(tmp_path,)))
    assert files.find("0" * 64) is None
    digest = ollama_store(tmp_path, [("model", gguf())])
    assert files.find(digest) is None
    now += 3.0
    assert files.find(digest) is not None
