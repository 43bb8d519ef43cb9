"""Files that are no models: a clear error each, and a daemon that lives."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import pytest

from tests.daemons import processes
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine


def ask(url: str, model: str) -> tuple[int, str]:
    body = json.dumps({"model": model, "prompt": "hi", "stream": False, "options": {"num_predict": 1}}).encode()
    try:
        with urllib.request.urlopen(f"{url}/api/generate", body, timeout=50) as answer:
            return answer.status, json.load(answer)["response"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def test_broken_files_are_told_apart_and_the_daemon_lives(tmp_path: Path, models_dir: Path):
    models = tmp_path / "models"
    models.mkdir()
    good = models_dir / "SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.copy(good, models)
    data = good.read_bytes()
    (models / "garbage.gguf").write_bytes(b"this is no model" * 1000)
    (models / "empty.gguf").write_bytes(b"")
    (models / "cut-header.gguf").write_bytes(data[:5000])
    (models / "cut-tensors.gguf").write_bytes(data[: len(data) // 2])
    writer = gguf.GGUFWriter(models / "alien.gguf", "martian")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with processes(tmp_path) as owner:
        daemon = owner.ready(owner.osyncd("--backend", "engine", "--models-dir", str(models)))
        for name in ("garbage", "empty", "cut-header", "cut-tensors", "alien"):
            status, text = ask(daemon.url, name)
            assert status == 500, (name, status, text)
            assert name in text or "gguf" in text.lower() or "martian" in text, (name, text)
        status, _ = ask(daemon.url, MODEL)
        assert status == 200
        assert daemon.popen.poll() is None
