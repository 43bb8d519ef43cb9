"""What this backend needs of a loaded model, and llama.cpp's way to give it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from osync.config import Settings, parse_memory
from osync.coordinator.embedding import Embeddings
from osync.coordinator.embedding_runner import EmbeddingRunner
from osync.coordinator.request import Final, Piece
from osync.coordinator.runner import Runner, RunnerSettings
from osync.engine import devices
from osync.engine.devices import Accelerators
from osync.engine.sampling import SamplingOptions
from osync.engine.trial import Trials
from osync.types import EngineReport

log = structlog.get_logger("osync.engine")

_trials = Trials()
"""What is known of files is true for the whole process."""


class Words(Protocol):
    """The part of a vocabulary that is needed here."""

    size: int
    bos_text: str
    eos_text: str


class EngineRunner(Protocol):
    """A loaded model; `osync.coordinator.runner.Runner` is one."""

    context_length: int
    parallel: int
    """Requests at once; where memory is short, fewer than the settings ask for."""
    size_bytes: int
    size_vram: int

    @property
    def vocabulary(self) -> Words:
        """The model's vocabulary."""
        ...

    def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Final, None]:
        """Yield pieces of an answer, at last a Final. Closing the iterator cancels the request."""
        ...

    async def embed(self, texts: Sequence[str], *, truncate: bool = True) -> Embeddings:
        """Return an embedding of each text. Cancelled, what is not evaluated yet never is."""
        ...

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens."""
        ...

    async def close(self) -> None:
        """Give all memory back."""
        ...


Load = Callable[[Path, RunnerSettings], Awaitable[EngineRunner]]


@dataclass(frozen=True, slots=True)
class EngineLibrary:
    """What is known of the installed llama.cpp."""

    version: str
    has_gpu: bool = False
    """True if models may go to an accelerator."""
    report: EngineReport | None = None


def accelerators(settings: Settings) -> Accelerators:
    """Return which devices the settings let models go to."""
    return Accelerators(
        device=settings.device,
        vulkan=settings.vulkan,
        igpu=settings.igpu,
        main_gpu=settings.main_gpu,
        spread=settings.sched_spread,
        overhead=parse_memory(settings.gpu_overhead)[0],
    )


def probe_library(settings: Settings | None = None) -> EngineLibrary:
    """Load llama.cpp as the settings say, and see what it can do; blocking.

    Raises NotSupported where it is not installed, ConfigError where it has not the device that is asked for.
    """
    settings = settings or Settings()
    devices.set_numa(settings.numa)
    found = devices.report(
        accelerators(settings),
        flash_attention="off" if settings.deterministic else settings.flash_attention,
        kv_type=settings.kv_cache_type,
        numa=settings.numa,
        threads=settings.threads,
    )
    if found.kv_cache_values != settings.kv_cache_type:
        log.warning(
            "kv_cache_values_not_quantized",
            wanted=settings.kv_cache_type,
            keys=found.kv_cache_keys,
            values=found.kv_cache_values,
            reason="quantized values need flash attention, which --deterministic turns off"
            if settings.deterministic
            else "quantized values need flash attention, which is off; say --flash-attention on",
        )
    return EngineLibrary(
        version=found.version,
        has_gpu=any(d.used and d.kind != "cpu" for d in found.devices),
        report=found,
    )


async def load_runner(path: Path, settings: RunnerSettings) -> EngineRunner:
    """Load a GGUF file with llama.cpp, after a trial if it is seen for the first time."""
    await _trials.check(path, settings.load_timeout_s)
    if settings.embeds:
        return await EmbeddingRunner.load(path, settings)
    return await Runner.load(path, settings)
