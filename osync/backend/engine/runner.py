"""What this backend needs of a loaded model, and llama.cpp's way to give it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from osync.coordinator.request import Final, Piece
from osync.coordinator.runner import Runner, RunnerSettings
from osync.engine.llama import library
from osync.engine.sampling import SamplingOptions


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


def probe_library() -> EngineLibrary:
    """Load llama.cpp; blocking. Raises NotSupported where it is not installed."""
    api = library()
    return EngineLibrary(
        version=f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
        has_gpu=bool(api.llama_supports_gpu_offload()),
    )


async def load_runner(path: Path, settings: RunnerSettings) -> EngineRunner:
    """Load a GGUF file with llama.cpp."""
    return await Runner.load(path, settings)
