"""Models of the fake Ollama: their facts, names, and the text that they answer."""

from __future__ import annotations

import functools
import hashlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
FOREVER_S = 292 * 365 * 86400.0  # MaxInt64 nanoseconds, as Ollama has it


def token(index: int) -> str:
    """Return token `index` of every answer."""
    return f"{index} "


@functools.lru_cache(maxsize=256)
def expected_text(count: int, start: int = 0) -> str:
    """Return the text of `count` tokens: what a complete answer must be."""
    return "".join(token(i) for i in range(start, start + count))


def canonical(name: str) -> str:
    """Return the name with its tag, as Ollama displays it."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def rfc3339(seconds: float) -> str:
    """Return Unix time as Ollama writes times, in UTC."""
    whole = int(seconds)
    return f"{_second(whole)}.{int((seconds - whole) * 1e6):06d}Z"


@functools.lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def keep_alive_s(value: object, default: float) -> float:
    """Return seconds; negative is for ever. Raises ValueError in Go's words."""
    if value is None:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(min(value, FOREVER_S)) if value >= 0 else FOREVER_S
    if not isinstance(value, str):
        kind = {bool: "bool", list: "[]interface {}"}.get(type(value), "map[string]interface {}")
        raise ValueError(f"Unsupported type: '{kind}'")
    text = value
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
    parts = _DURATION.findall(rest)
    if "".join(n + u for n, u in parts) != rest or not parts:
        if rest == "0":
            return 0.0
        raise ValueError(f'time: missing unit in duration "{text}"')
    total = sign * sum(float(n) * _UNITS[u] for n, u in parts)
    return min(total, FOREVER_S) if total >= 0 else FOREVER_S


@dataclass(slots=True)
class FakeModel:
    """One model on the fake's disk. `extra` are fields of /api/tags that nobody knows of."""

    name: str
    digest: str = ""
    size: int = 91_728_032
    modified_at: str = "2026-01-02T03:04:05.000006Z"
    family: str = "llama"
    parameter_size: str = "134.52M"
    quantization: str = "Q4_1"
    context_length: int = 8192
    embedding_length: int = 576
    capabilities: tuple[str, ...] = ("completion", "tools")
    extra: dict[str, Any] = field(default_factory=lambda: {"x_new_field": {"of": "a newer Ollama"}})

    def __post_init__(self) -> None:
        self.name = canonical(self.name)
        self.digest = self.digest or hashlib.sha256(self.name.encode()).hexdigest()

    def details(self, *, tags: bool = False) -> dict[str, Any]:
        """Return `details` as show and ps have them, with tags' two more fields if asked."""
        details: dict[str, Any] = {
            "parent_model": "",
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization,
        }
        if tags:
            details |= {"context_length": self.context_length, "embedding_length": self.embedding_length}
        return details

    def tag_row(self) -> dict[str, Any]:
        """Return its row of /api/tags."""
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": self.modified_at,
            "size": self.size,
            "digest": self.digest,
            "details": self.details(tags=True),
            "capabilities": list(self.capabilities),
            **self.extra,
        }

    def show(self) -> dict[str, Any]:
        """Return the answer of /api/show."""
        return {
            "license": "Apache-2.0",
            "modelfile": f"FROM {self.name}",
            "parameters": f'{"stop":30s} "<|im_end|>"',
            "template": "{{ .Prompt }}",
            "details": self.details(),
            "model_info": {
                "general.architecture": self.family,
                "general.parameter_count": 134515008,
                f"{self.family}.context_length": self.context_length,
                f"{self.family}.embedding_length": self.embedding_length,
                f"{self.family}.block_count": 30,
            },
            "capabilities": list(self.capabilities),
            "modified_at": self.modified_at,
        }
