"""The trial of a model file: what its process's end means, and what is remembered of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from osync.engine.trial import Trials
from osync.errors import ModelUnusable


class Rig:
    """Trials whose process is a script that a test writes; `runs` counts them."""

    def __init__(self, folder: Path, script: str) -> None:
        self.file = folder / "m.gguf"
        self.file.write_bytes(b"x")
        self.log = folder / "runs"
        self.log.touch()
        head = f"import os, sys, time\nopen({str(self.log)!r}, 'a').write('.')\n"
        self.trials = Trials((sys.executable, "-I", "-c", head + script))

    @property
    def runs(self) -> int:
        return self.log.stat().st_size

    async def fault(self, deadline_s: float = 30.0) -> str:
        try:
            await self.trials.check(self.file, deadline_s)
        except ModelUnusable as error:
            return str(error)
        return ""


OK = "print('{\"ok\": true}')"


async def test_a_good_file_is_tried_once(tmp_path):
    rig = Rig(tmp_path, OK)
    assert [await rig.fault(), await rig.fault()] == ["", ""]
    assert rig.runs == 1
    rig.file.write_bytes(b"another")
    assert await rig.fault() == ""
    assert rig.runs == 2


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("print('{\"refused\": \"unknown architecture\"}')", "cannot load m.gguf: unknown architecture"),
        ("print('/a/b.cpp:7: GGML_ASSERT(n > 0) failed', file=sys.stderr, flush=True); os.abort()",
         "cannot load m.gguf: llama.cpp breaks on it: GGML_ASSERT(n > 0) failed"),
        ("sys.stderr.write(\"terminate called after throwing 'std::out_of_range'\"); sys.stderr.flush(); os.abort()",
         "terminate called after throwing 'std::out_of_range'"),
        ("os.kill(os.getpid(), 11)", "llama.cpp breaks on it: it does not say why"),
        ("sys.stderr.write('x' * 1000000 + '\\nend'); sys.stderr.flush(); os.abort()", "breaks on it: end"),
    ],
)  # fmt: skip
async def test_a_bad_file_says_why_and_is_not_tried_again(tmp_path, script, text):
    rig = Rig(tmp_path, script)
    first = await rig.fault()
    assert text in first
    assert await rig.fault() == first
    assert rig.runs == 1


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("os.kill(os.getpid(), 9)", "killed by the system"),
        ("raise SystemExit('no module named x')", "could not be tried: no module named x"),
    ],
)
async def test_what_is_not_the_files_fault_is_tried_again(tmp_path, script, text):
    rig = Rig(tmp_path, script)
    assert text in await rig.fault()
    assert text in await rig.fault()
    assert rig.runs == 2


async def test_a_trial_that_does_not_end_is_ended(tmp_path):
    rig = Rig(tmp_path, "time.sleep(600)")
    assert await rig.fault(deadline_s=0.5) == "timed out loading m.gguf after 0.5 s"


async def test_a_file_that_is_not_there(tmp_path):
    rig = Rig(tmp_path, OK)
    rig.file.unlink()
    assert "cannot read m.gguf" in await rig.fault()


async def test_no_program_to_try_with(tmp_path):
    rig = Rig(tmp_path, OK)
    rig.trials = Trials((str(tmp_path / "none"),))
    assert "no process to try m.gguf in" in await rig.fault()
