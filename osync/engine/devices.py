"""What llama.cpp can compute on here: its devices, which of them the settings choose, and where layers go."""

from __future__ import annotations

import ctypes
import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from osync.core import offload
from osync.core.offload import Offload
from osync.engine.gguf import GGUFHeader, read_header
from osync.engine.llama import KV_TYPES, Model, cache_types, library, threads_for
from osync.errors import ConfigError, ModelUnusable
from osync.types import EngineDevice, EngineReport

log = structlog.get_logger("osync.engine")

COMPUTE_RESERVE: Final = 400 << 20
"""Bytes of each accelerator for compute buffers and the driver's own, roughly."""

_KINDS: Final = ("cpu", "gpu", "igpu", "accel")  # enum ggml_backend_dev_type
_BACKENDS: Final = {"cuda": ("CUDA",), "metal": ("Metal", "MTL"), "vulkan": ("Vulkan",)}
_BUILD: Final = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}
_NUMA: Final = {"off": 0, "distribute": 1, "isolate": 2, "numactl": 3}  # enum ggml_numa_strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """Which devices models may go to."""

    device: str = "auto"
    vulkan: bool = True
    igpu: str = "auto"
    main_gpu: int = -1
    """The only one to use, by its place among those that may be used; -1: as fits."""
    spread: bool = False
    """Over all of them, also what fits on one."""
    overhead: int = 0
    """Bytes of each to leave free."""


def list_devices() -> tuple[EngineDevice, ...]:
    """Return all devices with their memory as it is now; blocking. Raises NotSupported without llama.cpp."""
    ggml = _ggml()
    return tuple(_describe(ggml, ggml.ggml_backend_dev_get(i)) for i in range(ggml.ggml_backend_dev_count()))


def backends() -> tuple[str, ...]:
    """Return the parts that llama.cpp was built with, such as CPU and CUDA, whether or not there is a device."""
    ggml = _ggml()
    found = (ggml.ggml_backend_reg_get(i) for i in range(ggml.ggml_backend_reg_count()))
    return tuple(ggml.ggml_backend_reg_name(one).decode("utf-8", "replace") for one in found)


def select(wanted: Accelerators, devices: Sequence[EngineDevice], built_with: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the accelerators that models may go to; none: the processor computes.

    Raises ConfigError, saying how to build llama.cpp, where a device is asked for that is not there.
    """
    if wanted.device == "cpu":
        return ()
    names = _BACKENDS.get(wanted.device)
    found = [
        (i, d)
        for i, d in enumerate(devices)
        if d.kind in {"gpu", "igpu"}
        and (d.backend in names if names else d.backend != "RPC" and (wanted.vulkan or d.backend != "Vulkan"))
    ]
    if names and not found:
        raise ConfigError(_missing(wanted.device, names, built_with))
    discrete = [pair for pair in found if pair[1].kind == "gpu"]
    if wanted.igpu == "off" or (wanted.igpu == "auto" and discrete):
        found = discrete
    if not names:  # the same card under two drivers counts once: the vendor's own comes first
        own = [pair for pair in found if pair[1].backend != "Vulkan"]
        found = own or found
    if wanted.main_gpu >= len(found) and found:
        raise ConfigError(
            f"main_gpu {wanted.main_gpu} is not there: the engine sees {len(found)} GPU{'s' * (len(found) > 1)}, "
            "numbered from 0"
        )
    return tuple(i for i, _ in found)


def _missing(device: str, names: Sequence[str], built_with: Sequence[str]) -> str:
    if any(name in built_with for name in names):
        return (
            f"device {device}: llama.cpp is built for it and finds none; check the driver "
            "(and CUDA_VISIBLE_DEVICES or GGML_VK_VISIBLE_DEVICES), or say --device auto"
        )
    return (
        f"device {device}: this llama.cpp was built without it (it has: {', '.join(built_with) or 'nothing'}); "
        f'build it again: CMAKE_ARGS="{_BUILD[device]}" pip install --force-reinstall --no-cache-dir '
        "--no-binary llama-cpp-python 'osync[engine]', or say --device auto"
    )


def require(wanted: Accelerators) -> tuple[EngineDevice, ...]:
    """Return the accelerators that models may go to; blocking. Raises ConfigError or NotSupported."""
    devices = list_devices()
    chosen = select(wanted, devices, backends())
    if wanted.main_gpu >= 0 and not chosen:
        raise ConfigError(f"main_gpu {wanted.main_gpu} is not there: the engine sees no GPU")
    return tuple(devices[i] for i in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a file is brought into memory."""

    accelerators: Accelerators = Accelerators()
    gpu_layers: int = -1
    """-1: as many as fit beside the KV cache."""
    kv_tokens: int = 0
    """Of all sequences together."""
    kv_type: str = "f16"
    flash_attention: str = "auto"
    use_mmap: bool = True
    memory_lock: bool = False


def load_model(
    path: Path,
    settings: LoadSettings,
    *,
    cancelled: threading.Event | None = None,
    progress: Callable[[float], None] | None = None,
) -> Model:
    """Load a GGUF file, its layers on the devices that they fit on; blocking. Raises as `Model.load` does."""
    plan, devices = _place(path, settings)
    return Model.load(
        path,
        gpu_layers=plan.layers,
        devices=devices,
        single=len(plan.devices) == 1,
        use_mmap=settings.use_mmap,
        memory_lock=settings.memory_lock,
        cancelled=cancelled,
        progress=progress,
    )


def _place(path: Path, settings: LoadSettings) -> tuple[Offload, Any]:
    """Decide which layers go where; the second is llama.cpp's list of devices."""
    accelerators = settings.accelerators
    devices = list_devices()
    try:
        chosen = select(accelerators, devices, backends())
    except ConfigError as error:
        raise ModelUnusable(f"cannot load {path.name}: {error}") from error
    plan = Offload(0, ())
    ggml = _ggml()
    if chosen and settings.gpu_layers != 0:
        layers, output = layer_bytes(read_header(path), settings.kv_tokens, settings.kv_type, settings.flash_attention)
        plan = offload.plan(
            layers,
            output,
            [devices[i].memory_free for i in chosen],
            reserve=COMPUTE_RESERVE + accelerators.overhead,
            wanted=settings.gpu_layers,
            main=accelerators.main_gpu,
            spread=accelerators.spread,
        )
        names = ",".join(devices[chosen[i]].name for i in plan.devices)
        log.info("layers_placed", file=path.name, offloaded=plan.layers, of=len(layers) + 1, devices=names or "CPU")
    handles = [ggml.ggml_backend_dev_get(chosen[i]) for i in plan.devices]
    return plan, (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def layer_bytes(
    header: GGUFHeader, kv_tokens: int, kv_type: str = "f16", flash_attention: str = "auto"
) -> tuple[list[int], int]:
    """Return the bytes of each layer with its part of the KV cache, and those of the output layer."""
    count = header.block_count
    sizes, output, embedding = [0] * count, 0, 0
    for tensor in header.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() and int(parts[1]) < count:
            sizes[int(parts[1])] += tensor.size_bytes
        elif parts[0] == "output":
            output += tensor.size_bytes
        elif parts[0] == "token_embd":
            embedding += tensor.size_bytes
    keys, values = cache_types(kv_type, flash_attention)
    scale = (KV_TYPES[keys][1] + KV_TYPES[values][1]) / 2 / KV_TYPES["f16"][1]
    cache = int(header.kv_bytes_per_token() * scale * kv_tokens / count) if count else 0
    return [size + cache for size in sizes], output or embedding  # without an output layer, the embedding is used


def set_numa(strategy: str) -> None:
    """Tell llama.cpp how to use a host with several memory nodes; once, before a model is loaded."""
    if strategy != "off":
        library().llama_numa_init(_NUMA[strategy])


def report(
    accelerators: Accelerators,
    *,
    flash_attention: str = "auto",
    kv_type: str = "f16",
    numa: str = "off",
    threads: int = 0,
) -> EngineReport:
    """Say what llama.cpp was built with and how the settings use it; blocking. Raises ConfigError, NotSupported."""
    api, ggml = library(), _ggml()
    devices = list_devices()
    chosen = set(select(accelerators, devices, backends()))
    used = chosen or {i for i, d in enumerate(devices) if d.kind == "cpu"}
    keys, values = cache_types(kv_type, flash_attention)
    commit = ggml.ggml_commit
    commit.restype = ctypes.c_char_p
    return EngineReport(
        version=f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
        commit=(commit() or b"").decode("utf-8", "replace"),
        system_info=api.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
        gpu_offload=bool(api.llama_supports_gpu_offload()),
        mmap=bool(api.llama_supports_mmap()),
        mlock=bool(api.llama_supports_mlock()),
        rpc=bool(api.llama_supports_rpc()),
        flash_attention="on" if values not in {"f16", "f32"} else flash_attention,
        kv_cache_keys=keys,
        kv_cache_values=values,
        numa=numa,
        threads=threads_for(threads),
        devices=tuple(
            EngineDevice(d.name, d.description, d.kind, d.backend, d.memory_total, d.memory_free, i in used)
            for i, d in enumerate(devices)
        ),
    )


def _describe(ggml: Any, device: Any) -> EngineDevice:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = ggml.ggml_backend_dev_type(device)
    return EngineDevice(
        name=ggml.ggml_backend_dev_name(device).decode("utf-8", "replace"),
        description=ggml.ggml_backend_dev_description(device).decode("utf-8", "replace").strip(),
        kind=_KINDS[kind] if 0 <= kind < len(_KINDS) else "other",
        backend=ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)).decode("utf-8", "replace"),
        memory_total=total.value,
        memory_free=min(free.value, total.value or free.value),
    )


_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "ggml_backend_dev_count": (ctypes.c_size_t, []),
    "ggml_backend_dev_get": (ctypes.c_void_p, [ctypes.c_size_t]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_backend_dev_description": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_backend_dev_type": (ctypes.c_int, [ctypes.c_void_p]),
    "ggml_backend_dev_memory": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_backend_dev_backend_reg": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_reg_count": (ctypes.c_size_t, []),
    "ggml_backend_reg_get": (ctypes.c_void_p, [ctypes.c_size_t]),
    "ggml_backend_reg_name": (ctypes.c_char_p, [ctypes.c_void_p]),
}


def _ggml() -> Any:
    """Return ggml's functions: libllama's own handle finds them in the libraries that it was linked to."""
    library()
    from llama_cpp.llama_cpp import _lib as linked

    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(linked, name)
        function.restype, function.argtypes = result, arguments
    return linked
