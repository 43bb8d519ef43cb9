"""The store with a preferred quantization: which file a name means, and what takes a full-precision file's place."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from osync.engine.quantize import Quantizer, source_of
from osync.engine.store import ModelStore
from osync.errors import ModelNotFound, ModelUnusable
from tests.fakes.gguf import write

Q4_0, Q5_0, Q8_0, F16 = 2, 8, 7, 1


def store(tmp_path: Path, prefer: str) -> ModelStore:
    made = ModelStore((tmp_path / "models",), tmp_path / "state", prefer=prefer)
    made.scan()
    return made


def add(tmp_path: Path, name: str, kind: int) -> Path:
    path = tmp_path / "models" / name
    path.parent.mkdir(exist_ok=True)
    return write(path, general__file_type=kind)


@pytest.mark.parametrize(
    ("prefer", "meant"),
    [("q4_0", "Q5_0"), ("q5_0", "Q5_0"), ("q8_0", "Q8_0"), ("q4_k_m", None), ("", None)],
)
def test_of_several_files_the_compatible_one_is_meant(tmp_path, prefer, meant):
    add(tmp_path, "tiny.Q8_0.gguf", Q8_0)
    add(tmp_path, "tiny.Q5_0.gguf", Q5_0)
    found = store(tmp_path, prefer)
    assert found.pending_quantizations == ()
    if meant is None:
        with pytest.raises(ModelNotFound):
            found.find("tiny")
    else:
        assert found.find("tiny").info.quantization == meant


def test_full_precision_is_served_until_it_is_quantized_and_by_its_tag_for_ever(tmp_path):
    source = add(tmp_path, "tiny.F16.gguf", F16)
    models = store(tmp_path, "q4_0")
    assert models.find("tiny").info.quantization == "F16"
    [wanted] = models.pending_quantizations
    assert wanted.path == source

    target = Quantizer(tmp_path / "state" / "quantized", "q4_0").target(wanted)
    target.parent.mkdir(parents=True)
    write(target, general__file_type=Q4_0)
    assert models.scan()
    assert models.pending_quantizations == ()
    for name in ("tiny", "tiny:latest", "tiny:q4_0"):
        assert models.find(name).path == target
        assert models.find(name).info.quantization == "Q4_0"
    assert models.find("tiny:f16").path == source
    assert models.find("tiny:f16").info.digest != models.find("tiny").info.digest

    write(source, general__file_type=F16, general__name="another state of it")
    models.scan()
    assert models.find("tiny").path == source
    assert len(models.pending_quantizations) == 1


@pytest.mark.parametrize(("prefer", "kind"), [("f16", F16), ("q4_0", Q4_0), ("q8_0", Q4_0)])
def test_nothing_is_made_of_what_has_lost_already_or_is_as_asked(tmp_path, prefer, kind):
    add(tmp_path, "tiny.gguf", kind)
    assert store(tmp_path, prefer).pending_quantizations == ()


def test_what_cannot_be_quantized_is_served_as_it_is_and_not_tried_again(tmp_path, monkeypatch):
    source = add(tmp_path, "tiny.F16.gguf", F16)
    models = store(tmp_path, "q4_0")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    [wanted] = models.pending_quantizations
    models.quantize(wanted, threading.Event())
    models.scan()
    assert models.pending_quantizations == ()
    assert models.find("tiny").path == source


def test_stop_ends_the_process_and_leaves_nothing(tmp_path, monkeypatch):
    source = add(tmp_path, "tiny.F16.gguf", F16)
    maker = Quantizer(tmp_path / "quantized", "q4_0")
    script = tmp_path / "slow.py"
    script.write_text("import time\ntime.sleep(600)\n")
    real = subprocess.Popen
    started = []

    def start(arguments, **rest):
        started.append(real([arguments[0], str(script)], **rest))
        return started[-1]

    monkeypatch.setattr("subprocess.Popen", start)
    stop = threading.Event()
    stop.set()
    assert maker.make(source_of(source), stop) is None
    assert started[0].returncode is not None
    assert list((tmp_path / "quantized").iterdir()) == []
    assert not maker.has_failed(source_of(source))


def test_a_process_that_dies_is_an_error_with_its_reason(tmp_path, monkeypatch):
    source = add(tmp_path, "tiny.F16.gguf", F16)
    maker = Quantizer(tmp_path / "quantized", "q4_0")
    script = tmp_path / "dying.py"
    script.write_text("import sys\nsys.exit('the tensors are wrong')\n")
    real = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda arguments, **rest: real([arguments[0], str(script)], **rest))
    with pytest.raises(ModelUnusable, match="the tensors are wrong"):
        maker.make(source_of(source), threading.Event())
    assert maker.has_failed(source_of(source))
    assert list((tmp_path / "quantized").iterdir()) == []
