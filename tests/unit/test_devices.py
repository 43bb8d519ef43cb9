"""Which devices the settings choose, the types of a KV cache, threads, and what a layer takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from osync.engine import llama
from osync.engine.devices import Accelerators, layer_bytes, select
from osync.engine.gguf import read_header
from osync.engine.llama import cache_types, default_threads
from osync.errors import ConfigError, NotSupported
from osync.types import EngineDevice
from tests.fakes import gguf

CPU = EngineDevice("CPU", kind="cpu", backend="CPU")
CUDA = [EngineDevice(f"CUDA{i}", kind="gpu", backend="CUDA") for i in range(2)]
VULKAN = EngineDevice("Vulkan0", kind="gpu", backend="Vulkan")
IGPU = EngineDevice("Vulkan1", kind="igpu", backend="Vulkan")
METAL = EngineDevice("MTL0", kind="gpu", backend="MTL")
RPC = EngineDevice("RPC0", kind="gpu", backend="RPC")
BLAS = EngineDevice("BLAS", kind="accel", backend="BLAS")


@pytest.mark.parametrize(
    ("settings", "devices", "chosen"),
    [
        ({}, [CPU], []),
        ({}, [CUDA[0], CPU, BLAS], [0]),
        ({}, [*CUDA, VULKAN, IGPU, CPU], [0, 1]),  # Vulkan would show the same cards again
        ({}, [VULKAN, IGPU, CPU], [0]),
        ({}, [IGPU, CPU], [0]),
        ({}, [RPC, CPU], []),
        ({"igpu": "off"}, [IGPU, CPU], []),
        ({"igpu": "on"}, [VULKAN, IGPU, CPU], [0, 1]),
        ({"vulkan": False}, [VULKAN, CPU], []),
        ({"device": "cpu"}, [*CUDA, CPU], []),
        ({"device": "vulkan"}, [*CUDA, VULKAN, CPU], [2]),
        ({"device": "metal"}, [METAL, BLAS, CPU], [0]),
        ({"main_gpu": 1}, [*CUDA, CPU], [0, 1]),
        ({"main_gpu": 0}, [CPU], []),  # what clients send anywhere
    ],
)
def test_devices_are_chosen_as_the_settings_say(settings, devices, chosen):
    assert list(select(Accelerators(**settings), devices, ["CPU"])) == chosen


@pytest.mark.parametrize(
    ("settings", "built_with", "words"),
    [
        ({"device": "cuda"}, ["CPU"], 'CMAKE_ARGS="-DGGML_CUDA=on" pip install'),
        ({"device": "vulkan"}, ["CPU"], "-DGGML_VULKAN=on"),
        ({"device": "metal"}, ["CPU"], "(it has: CPU)"),
        ({"device": "cuda"}, ["CUDA", "CPU"], "built for it and finds none; check the driver"),
        ({"main_gpu": 2, "device": "auto"}, ["CUDA"], "main_gpu 2 is not there: the engine sees 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_a_config_error_that_says_what_to_do(settings, built_with, words):
    devices = [*CUDA, CPU] if "main_gpu" in settings else [CPU]
    with pytest.raises(ConfigError) as caught:
        select(Accelerators(**settings), devices, built_with)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "types"),
    [
        (("f16", "off"), ("f16", "f16")),
        (("q8_0", "auto"), ("q8_0", "q8_0")),
        (("q4_0", "on", 64, 64), ("q4_0", "q4_0")),
        (("q8_0", "off"), ("q8_0", "f16")),
        (("q8_0", "on", 80, 64), ("f16", "q8_0")),
        (("q8_0", "on", 64, 80), ("q8_0", "f16")),
    ],
)
def test_values_are_quantized_only_with_flash_attention(arguments, types):
    assert cache_types(*arguments) == types


def test_a_cache_type_that_does_not_exist_is_refused():
    with pytest.raises(NotSupported, match="'q9' is not one of f32, f16, q8_0, q4_0"):
        cache_types("q9", "on")


def test_threads_leave_a_core_where_that_costs_little():
    assert [default_threads(n) for n in (1, 2, 4, 7, 8, 64)] == [1, 2, 4, 7, 7, 63]


def test_a_layer_takes_its_tensors_and_its_part_of_the_cache(tmp_path: Path):
    tensors = [
        gguf.tensor("token_embd.weight", (32,), 0),
        gguf.tensor("blk.0.a", (32,), 128),
        gguf.tensor("blk.1.a", (32,), 256),
        gguf.tensor("blk.1.b", (32,), 384),
    ]
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf.gguf(tensors=tensors))
    header = read_header(file)
    cache = header.kv_bytes_per_token() * 1000 // 2
    assert cache > 0
    assert layer_bytes(header, 1000) == ([128 + cache, 256 + cache], 128)
    assert layer_bytes(header, 1000, "q8_0") == ([128 + cache * 17 // 32, 256 + cache * 17 // 32], 128)


def test_what_cannot_be_locked_is_noticed_and_not_an_error():
    llama.take_errors()
    llama._forward_log(3, b"warning: failed to mlock 98304-byte buffer: Cannot allocate memory\nTry ulimit -l", None)
    assert llama._errors.unlocked == "warning: failed to mlock 98304-byte buffer: Cannot allocate memory"
    assert llama.take_errors() == []
    assert llama._errors.unlocked == ""
