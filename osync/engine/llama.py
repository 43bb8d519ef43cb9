"""llama.cpp, loaded on first use: the library, its log, models and contexts.

Everything here but `library` must run in an `EngineThread`: it blocks.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from osync.errors import ModelUnusable, NotSupported

if TYPE_CHECKING:
    from osync.engine.tap import Tap

log = structlog.get_logger("osync.engine")

_GGML_DEBUG, _GGML_WARNING, _GGML_ERROR, _GGML_CONTINUED = 1, 3, 4, 5  # enum ggml_log_level in ggml.h
_COMPUTE_BUFFER = re.compile(r"(?:compute|output) buffer size = +([\d.]+) MiB")
_lock = threading.Lock()
_library: Any = None
_log_callback: Any = None
_errors = threading.local()
"""`.lines`: what llama.cpp called an error in this thread since the list was last emptied."""


def library() -> Any:
    """Return llama.cpp's C API, initialized once. Raises NotSupported where it is not installed."""
    global _library, _log_callback
    with _lock:
        if _library is None:
            # libgomp's threads wait for each other about 500 times a token. By default they spin for milliseconds,
            # which is 10 to 100 times slower as soon as anything else wants a core; never to spin halves the speed
            # of an idle host (docs/decisions.md). It must be said before the library is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
            try:
                import llama_cpp.llama_cpp as api
            except ModuleNotFoundError as error:
                raise NotSupported(
                    "this osync has no engine: llama.cpp is not installed (pip install 'osync[engine]')"
                ) from error
            except (ImportError, OSError, RuntimeError) as error:
                raise NotSupported(
                    f"llama.cpp is installed and cannot be loaded: {error} (to build it again: "
                    "pip install --force-reinstall 'osync[engine]')"
                ) from error
            _log_callback = api.llama_log_callback(_forward_log)
            api.llama_log_set(_log_callback, None)
            api.llama_backend_init()
            _library = api
        return _library


def _forward_log(level: int, text: bytes | None, _: object) -> None:
    if level in {_GGML_DEBUG, _GGML_CONTINUED}:  # thousands of lines per load
        return
    line = (text or b"").decode("utf-8", "replace").strip()
    if len(line) < 2:  # the dots of llama.cpp's own progress bar
        return
    if level == _GGML_ERROR:
        lines = getattr(_errors, "lines", None)
        if lines is not None and len(lines) < 16:
            lines.append(line)
    elif level == _GGML_WARNING and "mlock" in line and hasattr(_errors, "lines"):
        _errors.unlocked = line.splitlines()[0]
    elif (match := _COMPUTE_BUFFER.search(line)) is not None:
        _errors.compute_bytes = getattr(_errors, "compute_bytes", 0) + compute_bytes(match)
    log.debug("llama_log", line=line)


def compute_bytes(line: re.Match[str]) -> int:
    """Read the size of a context's buffer that llama.cpp names in its log, its only account of it."""
    return int(float(line.group(1)) * (1 << 20))


def take_errors() -> list[str]:
    """Return what llama.cpp called an error in this thread since the last time."""
    lines: list[str] = getattr(_errors, "lines", [])
    _errors.lines, _errors.unlocked = [], ""
    return lines


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


LEAVE_ONE_FROM = 8
"""Cores from which on one is left to the event loop: there it costs an eighth of the speed at most."""


def default_threads(available: int) -> int:
    """Return how many threads compute best on so many cores while the event loop lives beside them."""
    return available - 1 if available >= LEAVE_ONE_FROM else max(1, available)


def threads_for(wanted: int) -> int:
    """Return how many threads to compute with; 0 asks for the default. Never more than cores: they wait for each
    other at every node of the graph, so a thousand would bring the whole host to a stop."""
    return max(1, min(wanted or default_threads(cores()), cores()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """What a context is made with; lengths in tokens."""

    context_length: int
    """Of one sequence."""
    sequences: int = 1
    n_batch: int = 512
    threads: int = 0
    flash_attention: str = "auto"
    kv_type: str = "f16"
    kept_tokens: int = 0
    """Of sequences that nobody runs, in plain memory beside the context."""
    unified: bool = True
    """One KV buffer for all sequences: prompts and single tokens share an evaluation at no cost.
    Apart, where a sequence's cells lie does not depend on its neighbours: needed for identical bits."""


KV_TYPES = {"f32": (0, 4.0), "f16": (1, 2.0), "q8_0": (8, 34 / 32), "q4_0": (2, 18 / 32)}
"""ggml's number and bytes per value of each type that a KV cache may have."""
_FLASH = {"auto": -1, "off": 0, "on": 1}
_BLOCK = 32
"""Values that a quantized cache packs together; a head that is no multiple of it cannot be quantized."""


def cache_types(kv_type: str, flash_attention: str, key_length: int = 0, value_length: int = 0) -> tuple[str, str]:
    """Return the types of keys and values that a KV cache gets where one is asked for; lengths of a head, 0: unknown.

    llama.cpp reads quantized values by flash attention alone: with it off they stay f16, and keys are quantized.
    Raises NotSupported for a type that does not exist.
    """
    if kv_type not in KV_TYPES:
        raise NotSupported(f"KV cache type {kv_type!r} is not one of {', '.join(KV_TYPES)}")
    if kv_type in {"f16", "f32"}:
        return kv_type, kv_type
    keys = "f16" if key_length % _BLOCK else kv_type
    return keys, "f16" if flash_attention == "off" or value_length % _BLOCK else kv_type


class Model:
    """A model file in memory. `free` waits until nobody borrows it; afterwards borrowing fails."""

    def __init__(self, pointer: Any, path: Path, gpu_layers: int) -> None:
        self.api = library()
        self.path = path
        self._pointer = pointer
        self._users = 0
        self._idle = threading.Condition()
        api = self.api
        self.vocabulary_pointer = api.llama_model_get_vocab(pointer)
        self.vocabulary_size: int = api.llama_vocab_n_tokens(self.vocabulary_pointer)
        self.layers: int = api.llama_model_n_layer(pointer)
        self.train_context_length: int = api.llama_model_n_ctx_train(pointer)
        self.size_bytes: int = api.llama_model_size(pointer)
        self.compute_bytes = 0
        """Of all its contexts, as llama.cpp accounts for them; one that was freed still counts."""
        self.can_truncate = not (api.llama_model_is_recurrent(pointer) or api.llama_model_is_hybrid(pointer))
        self.gpu_layers = 0
        if api.llama_supports_gpu_offload():
            self.gpu_layers = self.layers + 1 if gpu_layers < 0 else min(gpu_layers, self.layers + 1)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        gpu_layers: int = 0,
        devices: Any = None,
        single: bool = False,
        use_mmap: bool = True,
        memory_lock: bool = False,
        cancelled: threading.Event | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Model:
        """Load a GGUF file; ends early with ModelUnusable once `cancelled` is set.

        `devices` is llama.cpp's null-terminated list of where the `gpu_layers` go (None: all that there are);
        `single` if that is one device. With `memory_lock`, what cannot be locked is logged.
        """
        api = library()
        _check_file(path)

        def step(done: float, _: object) -> bool:
            if progress is not None:
                progress(done)
            return cancelled is None or not cancelled.is_set()

        params = api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = _load_mode(api, use_mmap, memory_lock)
        if devices is not None:
            params.devices = ctypes.cast(devices, ctypes.c_void_p)
        if single:
            params.split_mode, params.main_gpu = api.LLAMA_SPLIT_MODE_NONE, 0
        callback = api.llama_progress_callback(step)
        params.progress_callback = callback
        take_errors()
        pointer = api.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            lines = take_errors()
            if cancelled is not None and cancelled.is_set():
                raise ModelUnusable(f"loading {path.name} was cancelled")
            raise ModelUnusable(f"cannot load {path.name}: {reason(lines)}")
        if memory_lock and (why := getattr(_errors, "unlocked", "")):
            log.warning("memory_not_locked", file=path.name, reason=why, text="raise ulimit -l, or LimitMEMLOCK")
        model = cls(pointer, path, gpu_layers)
        try:
            model._check_kind()
        except BaseException:
            model.free()
            raise
        return model

    @classmethod
    def load_vocabulary(cls, path: Path) -> Model:
        """Load only the vocabulary of a GGUF file, which may have no tensors. Raises ModelUnusable."""
        api = library()
        _check_file(path)
        params = api.llama_model_default_params()
        params.vocab_only = True
        take_errors()
        pointer = api.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise ModelUnusable(f"cannot load the vocabulary of {path.name}: {reason(take_errors())}")
        return cls(pointer, path, 0)

    def _check_kind(self) -> None:
        api, name = self.api, self.path.name
        if self.vocabulary_size < 1:
            raise ModelUnusable(f"cannot use {name}: it has no vocabulary")
        if api.llama_model_has_encoder(self._pointer) or not api.llama_model_has_decoder(self._pointer):
            raise NotSupported(f"cannot generate text with {name}: it is an encoder model")
        if api.llama_model_is_diffusion(self._pointer):
            raise NotSupported(f"cannot generate text with {name}: it is a diffusion model")

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """Yield the C pointer and keep the model alive meanwhile; from any thread."""
        with self._idle:
            if not self._pointer:
                raise ModelUnusable(f"model {self.path.name} was unloaded")
            self._users += 1
        try:
            yield self._pointer
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def free(self) -> None:
        """Give the memory back; blocks until the last borrower is through."""
        with self._idle:
            self._idle.wait_for(lambda: self._users == 0)
            pointer, self._pointer = self._pointer, None
        if pointer:
            self.api.llama_model_free(pointer)

    def metadata(self, key: str) -> str:
        """Return a value of the file's metadata as text, empty where absent."""
        buffer = ctypes.create_string_buffer(256)
        with self.borrow() as pointer:
            length = self.api.llama_model_meta_val_str(pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def head_lengths(self) -> tuple[int, int]:
        """Return the values in one head's key and value."""
        with self.borrow() as pointer:
            width = self.api.llama_model_n_embd(pointer) // max(1, self.api.llama_model_n_head(pointer))
        arch = self.metadata("general.architecture")
        texts = [self.metadata(f"{arch}.attention.{part}_length") for part in ("key", "value")]
        key, value = (int(text) if text.isdigit() else width for text in texts)
        return key, value

    def kv_bytes_per_token(self, kv_type: str, flash_attention: str = "auto") -> int:
        """Estimate one token's KV cache over all layers from the file's metadata."""
        with self.borrow() as pointer:
            heads = self.api.llama_model_n_head_kv(pointer) or max(1, self.api.llama_model_n_head(pointer))
        lengths = self.head_lengths()
        types = cache_types(kv_type, flash_attention, *lengths)
        per_head = sum(length * KV_TYPES[name][1] for length, name in zip(lengths, types, strict=True))
        return int(per_head * heads * self.layers)

    def new_context(self, settings: ContextSettings, tap: Tap | None = None) -> Any:
        """Return a new context's pointer; who gets it frees it before the model, and keeps the tap until then."""
        api = self.api
        keys, values = cache_types(settings.kv_type, settings.flash_attention, *self.head_lengths())
        if settings.flash_attention not in _FLASH:
            raise NotSupported(f"flash attention {settings.flash_attention!r} is not auto, on or off")
        if not 1 <= settings.sequences <= api.llama_max_parallel_sequences():
            raise NotSupported(f"llama.cpp cannot hold {settings.sequences} sequences at once")
        params = api.llama_context_default_params()
        params.n_ctx = settings.context_length * settings.sequences
        params.n_batch = params.n_ubatch = settings.n_batch
        params.n_seq_max = settings.sequences
        # Logits are kept for so many rows only: with a large vocabulary a whole batch of them is half a GB.
        params.n_outputs_max = max(settings.sequences, min(MAX_SAMPLED, settings.n_batch))
        if tap is not None:  # which reads all rows
            params.n_outputs_max = settings.n_batch
            params.cb_eval, params.cb_eval_user_data = tap.callback, tap.data
        params.n_threads = params.n_threads_batch = threads_for(settings.threads)
        # Left to itself, llama.cpp would refuse quantized values where it finds flash attention slower.
        params.flash_attn_type = _FLASH["auto" if values in {"f16", "f32"} else "on"]
        if settings.flash_attention != "auto":
            params.flash_attn_type = _FLASH[settings.flash_attention]
        params.type_k, params.type_v = KV_TYPES[keys][0], KV_TYPES[values][0]
        if settings.kv_type not in {"f16", "f32"} and "f16" in {keys, values}:
            is_off = settings.flash_attention == "off"
            log.warning(
                "kv_cache_not_quantized",
                file=self.path.name,
                wanted=settings.kv_type,
                keys=keys,
                values=values,
                reason="values need flash attention, which is off" if is_off else f"heads are no multiple of {_BLOCK}",
            )
        params.kv_unified = settings.unified
        params.no_perf = True
        take_errors()
        _errors.compute_bytes = 0
        with self.borrow() as pointer:
            context = api.llama_init_from_model(pointer, params)
        self.compute_bytes += _errors.compute_bytes
        if not context:
            raise ModelUnusable(f"cannot make a context for {self.path.name}: {reason(take_errors())}")
        if not api.llama_get_memory(context):
            api.llama_free(context)
            raise NotSupported(f"cannot generate text with {self.path.name}: it is an embedding model")
        return context

    def new_embedding_context(
        self, settings: ContextSettings, *, sequences: int, n_batch: int, n_ctx: int, pooling: int, outputs: int
    ) -> Any:
        """Return a context that gives embeddings for up to `sequences` at once; who gets it frees it before the model.

        `n_batch` tokens are one evaluation, `n_ctx` cells are shared by all sequences, `outputs` is how many tokens
        have one: as many as are evaluated, where they are pooled.
        """
        api = self.api
        keys, values = cache_types(settings.kv_type, settings.flash_attention, *self.head_lengths())
        params = api.llama_context_default_params()
        params.embeddings, params.pooling_type = True, pooling
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_seq_max, params.n_outputs_max = sequences, outputs
        params.n_threads = params.n_threads_batch = threads_for(settings.threads)
        params.flash_attn_type = _FLASH[settings.flash_attention]
        params.type_k, params.type_v = KV_TYPES[keys][0], KV_TYPES[values][0]
        params.kv_unified = True
        params.no_perf = True
        take_errors()
        with self.borrow() as pointer:
            context = api.llama_init_from_model(pointer, params)
        if not context:
            raise ModelUnusable(f"cannot make an embedding context for {self.path.name}: {reason(take_errors())}")
        return context


MAX_SAMPLED = 64
"""Rows of one evaluation that may be sampled where sequences do not need more."""


def _load_mode(api: Any, use_mmap: bool, memory_lock: bool) -> int:
    if memory_lock and not api.llama_supports_mlock():
        log.warning("memory_not_locked", reason="this platform cannot lock memory")
        memory_lock = False
    names = {(True, True): "MMAP_MLOCK", (False, True): "MLOCK", (True, False): "MMAP", (False, False): "NONE"}
    mode: int = getattr(api, f"LLAMA_LOAD_MODE_{names[use_mmap, memory_lock]}")
    return mode


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelUnusable(f"cannot read {path.name}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelUnusable(f"cannot load {path.name}: it is not a GGUF file")


def reason(lines: list[str]) -> str:
    """Pick the line that says most: the last of the loader's own, without its function's name."""
    for line in lines:
        if "error loading model" in line:
            return line.partition("error loading model: ")[2] or line
    return lines[0] if lines else "llama.cpp does not say why"
