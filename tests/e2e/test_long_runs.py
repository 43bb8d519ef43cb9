"""No prompt ends the process: llama.cpp's regular expressions overrun the stack on long runs without a space."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemons import ROOT
from tests.fakes.tiny import tiny

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CHILD = """
import sys
from pathlib import Path
from osync.engine.llama import Model
from osync.engine.vocabulary import Vocabulary
for path in sys.argv[1:]:
    words = Vocabulary(Model.load(Path(path)))
    for run in ("a", " ", "1", "\\u4e16", "!", "a\\u0301", "\\n"):
        count = len(words.tokenize(run * 40_000))
        assert count > 100, (path, run, count)
    short = words.tokenize("the an in")
    assert words.tokenize("x" * 5000 + " the an in")[-len(short):] == words.tokenize(" the an in")[-len(short):]
print("all")
"""


def test_long_runs_are_tokenized(tmp_path: Path):
    paths = []
    for pre in ("default", "deepseek-llm", "deepseek-coder", "falcon", "tekken", "gpt-4o", "bloom", "superbpe"):
        model = tiny(vocabulary="gpt2")
        model.metadata["tokenizer.ggml.pre"] = ("str", pre)
        paths.append(tmp_path / f"{pre}.gguf")
        paths[-1].write_bytes(model.data())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.endswith("all\n")
