"""Settings of the engine: Ollama's variables by Ollama's values, and nonsense refused at start."""

from __future__ import annotations

import pytest

from osync.config import load
from osync.errors import ConfigError


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("OLLAMA_FLASH_ATTENTION", "1", "flash_attention", "on"),
        ("OLLAMA_FLASH_ATTENTION", "false", "flash_attention", "off"),
        ("OLLAMA_KV_CACHE_TYPE", "Q8_0", "kv_cache_type", "q8_0"),
        ("OLLAMA_NUMA", "true", "numa", "distribute"),
        ("OLLAMA_NUMA", "0", "numa", "off"),
        ("OLLAMA_NUMA", "isolate", "numa", "isolate"),
        ("OLLAMA_MEMORY_LOCK", "1", "memory_lock", True),
        ("OLLAMA_QUANTIZE", "Q4_K_M", "quantize", "q4_k_m"),
        ("OLLAMA_KEEP_ALIVE", "-1", "keep_alive", "-1"),
        ("OLLAMA_LOAD_TIMEOUT", "10m", "load_timeout", "10m"),
        ("OLLAMA_CONTEXT_WINDOW", "4096", "context_window", 4096),
        ("OLLAMA_CONTEXT_LENGTH", "2048", "context_window", 2048),
        ("OLLAMA_DEBUG", "1", "log_level", "DEBUG"),
        ("OLLAMA_DEBUG", "2", "log_level", "DEBUG"),
        ("OLLAMA_DEBUG", "false", "log_level", "INFO"),
        ("OLLAMA_LOG_LEVEL", "warn", "log_level", "WARNING"),
        ("OLLAMA_LLM_LIBRARY", "cuda_v13", "device", "cuda"),
        ("OLLAMA_LLM_LIBRARY", "cpu_avx2", "device", "cpu"),
        ("OLLAMA_LLM_LIBRARY", "rocm", "device", "auto"),
        ("OLLAMA_SCHED_SPREAD", "1", "sched_spread", True),
        ("OLLAMA_GPU_OVERHEAD", "536870912", "gpu_overhead", "536870912"),
        ("OLLAMA_VULKAN", "0", "vulkan", False),
        ("OLLAMA_IGPU_ENABLE", "1", "igpu", "on"),
        ("OSYNC_MEMORY", "12GiB", "memory", "12GiB"),
    ],
)
def test_each_variable_of_ollama_is_read_by_its_own_values(variable: str, value: str, name: str, expected: object):
    assert getattr(load({}, {variable: value}).settings, name) == expected


def test_a_level_by_name_beats_debug():
    env = {"OLLAMA_DEBUG": "1", "OSYNC_LOG_LEVEL": "ERROR"}
    assert load({}, env).settings.log_level == "ERROR"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"memory": "plenty"}, "memory: 'plenty' is no amount of memory"),
        ({"memory": "120%"}, "more than there is"),
        ({"memory": "0"}, "more than nothing"),
        ({"gpu_overhead": "-1"}, "gpu_overhead: '-1' is no amount"),
        ({"quantize": "q9"}, "'q9' is not one of q4_0"),
        ({"kv_cache_type": "q5_1"}, "'q5_1' is not one of f32, f16, q8_0, q4_0"),
        ({"numa": "mirror"}, "'mirror' is not one of off, distribute"),
        ({"device": "npu"}, "'npu' is not one of auto, cpu, cuda"),
        ({"main_gpu": "-2"}, "main_gpu must be -1 or more"),
        ({"log_level": "1"}, "'1' is not one of DEBUG"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(flags: dict[str, str], words: str):
    with pytest.raises(ConfigError) as caught:
        load(flags, {})
    assert words in str(caught.value)
