"""What passes the checks and the trial is loaded and used by the real llama.cpp, in a process that lives."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from osync.engine.gguf import read_header
from osync.engine.plausible import check_plausible
from osync.engine.trial import Trials
from osync.errors import ModelUnusable
from tests.daemons import ROOT, processes
from tests.fakes.tiny import lies, scrambled, tiny

pytestmark = pytest.mark.engine

EVERY = 8
"""One in so many of the named lies is given to llama.cpp: each takes some 0.1 s."""
SEEDS = range(1000, 1050)


def trying(what: str, paths: list[str]) -> tuple[int, list[tuple[str, str]], str]:
    """Give files to tests.fakes.trying; return its code, its (result, path) lines, and its last words."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.trying", what],
        input="\n".join(paths), capture_output=True, text=True, cwd=ROOT, timeout=300, errors="replace", check=False,
    )  # fmt: skip
    words = {"PASSED", "REFUSED", "DIED", "BEGIN", "ANSWERED"}
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return done.returncode, [(word, path) for word, _, path in lines if word in words], done.stderr[-500:]


@pytest.mark.timeout(240)
def test_no_file_kills_the_process_that_serves(tmp_path: Path):
    honest = [("honest", tiny().data()), ("honest too", tiny(vocabulary="gpt2").data())]
    files: dict[str, str] = {}
    corpus = [*honest, *list(lies())[::EVERY], *((f"seed {seed}", scrambled(seed)) for seed in SEEDS)]
    for number, (name, data) in enumerate(corpus):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        try:
            header = read_header(path)
            check_plausible(header, path.name)
        except ModelUnusable:
            continue
        if header.tensors and header.text("tokenizer.ggml.model") not in {"none", "no_vocab"}:
            files[str(path)] = name
    assert len(files) > 90
    code, results, words = trying("trial", list(files))
    assert code == 0, words
    assert len(results) == len(files)
    count = Counter(result for result, _ in results)
    assert count["PASSED"] > 30
    assert count["REFUSED"] > 30
    passed = [path for result, path in results if result == "PASSED"]
    assert passed[:2] == [str(tmp_path / "0.gguf"), str(tmp_path / "1.gguf")]
    code, results, words = trying("load", passed)
    last = next((files[path] for result, path in reversed(results) if result == "BEGIN"), "")
    assert code == 0, f"the process died of {last!r}: {words}"
    assert ("ANSWERED", passed[0]) in results
    assert ("ANSWERED", passed[1]) in results


async def test_the_real_trial_tells_good_from_bad(tmp_path: Path):
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(tiny().data())
    model = tiny()
    model.tensor("output_norm.weight").kind = 1  # a norm in f16: llama.cpp aborts when it evaluates
    bad.write_bytes(model.data())
    trials = Trials()
    await trials.check(good)
    with pytest.raises(ModelUnusable, match=r"cannot load bad\.gguf: llama\.cpp breaks on it"):
        await trials.check(bad)


def test_a_daemon_survives_a_model_that_llama_cpp_aborts_on(tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "good.gguf").write_bytes(tiny().data())
    killer = tiny()
    killer.tensor("blk.0.ffn_norm.weight").kind = 1
    (models / "killer.gguf").write_bytes(killer.data())

    def ask(url: str, model: str) -> tuple[int, dict[str, str]]:
        body = json.dumps({"model": model, "prompt": "hi", "stream": False, "options": {"num_predict": 2}}).encode()
        try:
            with urllib.request.urlopen(f"{url}/api/generate", body, timeout=50) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    with processes(tmp_path) as owner:
        daemon = owner.ready(owner.osyncd("--backend", "engine", "--models-dir", str(models)))
        for _ in range(2):
            status, answer = ask(daemon.url, "killer")
            assert status == 500
            assert "llama.cpp breaks on it" in answer["error"]
        status, answer = ask(daemon.url, "good")
        assert (status, answer["done_reason"]) == (200, "length")
        assert daemon.popen.poll() is None
