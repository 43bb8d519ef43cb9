"""Ollama's `options` and `keep_alive`: what a request may ask of sampling, the runner and its lifetime."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from osync.errors import BadRequest

FOREVER = math.inf
"""A keep_alive without end."""

_MAX_SECONDS = (2**63 - 1) / 1e9  # Go's durations are int64 nanoseconds
_INT32 = 2**31 - 1
_FLOAT32 = 3e38

_INTEGERS = {"num_keep", "num_predict", "top_k", "repeat_last_n"}
_FLOATS = {"top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"}
_RUNNER = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"}
_POSITIVE = {"num_ctx", "num_batch", "num_thread"}
_ACTIVATIONS = ("f32", "f16", "q8")
_UNUSED = {"draft_num_predict"}  # Ollama's, checked as such


class InvalidOption(BadRequest):
    """An option of the wrong type: Ollama answers 500 to it."""

    status = 500


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a request asks of the runner; None: whatever it has. A real change reloads the model."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    stages: int | None = None
    """Over shards: at most so many."""
    shards: tuple[str, ...] | None = None
    """Over shards: only these, by address, node id or host name."""
    activation_dtype: str | None = None
    """Over shards: what stages send each other: f32, f16 or q8."""


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """Keyword arguments for SamplingOptions (only those given), and the runner's options."""

    sampling: dict[str, Any]
    runner: RunnerOptions


def parse_options(raw: Mapping[str, Any]) -> ParsedOptions:
    """Check an `options` object as Ollama does: types, no ranges; unknown keys and nulls are ignored.

    What int32 and float32 cannot hold becomes the nearest that they can. Raises InvalidOption.
    """
    sampling: dict[str, Any] = {}
    runner: dict[str, Any] = {}
    for key, value in raw.items():
        if value is None:
            continue
        if key in _INTEGERS:
            sampling[key] = _integer(key, value)
        elif key in _FLOATS:
            sampling[key] = _float(key, value)
        elif key == "seed":
            sampling[key] = _seed(key, value)
        elif key == "stop":
            sampling[key] = _strings(key, value)
        elif key in _RUNNER:
            number = _integer(key, value)
            if number > 0 or key not in _POSITIVE:  # else it leaves the choice to the runner, as absent does
                runner[key] = number
        elif key == "use_mmap":
            if not isinstance(value, bool):
                raise InvalidOption(f'option "{key}" must be of type boolean')
            runner[key] = value
        elif key in _PIPELINE:
            runner[key] = _PIPELINE[key](value)
        elif key in _UNUSED:
            _number(key, value, "integer")
    return ParsedOptions(sampling, RunnerOptions(**runner))


def _number(key: str, value: object, kind: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InvalidOption(f'option "{key}" must be of type {kind}')
    return value


def _integer(key: str, value: object) -> int:
    # Go truncates floats; the engine counts in int32.
    return int(max(-_INT32, min(_INT32, _number(key, value, "integer"))))


def _float(key: str, value: object) -> float:
    return float(max(-_FLOAT32, min(_FLOAT32, _number(key, value, "float32"))))


def _seed(key: str, value: object) -> int:
    """Keep a seed's low 32 bits, as llama.cpp does: clients draw them from 64, and each must differ."""
    number = _number(key, value, "integer")
    if isinstance(number, float):
        number = max(-1e300, min(1e300, number))  # not infinite
    return (int(number) + 2**31) % 2**32 - 2**31


def _strings(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise InvalidOption(f'option "{key}" must be of type array')
    if not all(isinstance(item, str) for item in value):
        raise InvalidOption(f'option "{key}" must be of an array of strings')
    return tuple(item for item in value if item)


def _stages(value: object) -> int | None:
    return max(0, _integer("stages", value)) or None


def _shards(value: object) -> tuple[str, ...] | None:
    """Read the names of shards: an array, or one string with commas; none leaves the choice."""
    names = value.split(",") if isinstance(value, str) else _strings("shards", value)
    return tuple(sorted({name.strip() for name in names if name.strip()})) or None


def _activation(value: object) -> object:
    if value not in _ACTIVATIONS:
        raise InvalidOption(f'option "activation_dtype" must be one of {", ".join(_ACTIVATIONS)}')
    return value


_PIPELINE: Mapping[str, Callable[[object], object]] = {
    "stages": _stages,
    "shards": _shards,
    "activation_dtype": _activation,
}


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)", re.ASCII)
_MAX_DURATION_TEXT = 100


def parse_duration(text: str) -> float:
    """Read a Go duration such as 1h30m, -1s or 300ms, in seconds. Raises BadRequest in Go's words."""
    shown = '"' + text[:_MAX_DURATION_TEXT].replace("\\", "\\\\").replace('"', '\\"') + '"'
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    if not rest or len(text) > _MAX_DURATION_TEXT:
        raise BadRequest(f"time: invalid duration {shown}")
    total, at = 0.0, 0
    while at < len(rest):
        part = _PART.match(rest, at)
        if part is None:
            raise BadRequest(f"time: invalid duration {shown}")
        number, unit = part.groups()
        if not unit:
            raise BadRequest(f"time: missing unit in duration {shown}")
        if unit not in _UNITS:
            raise BadRequest(f'time: unknown unit "{unit}" in duration {shown}')
        total += float(number) * _UNITS[unit]
        at = part.end()
    if total > _MAX_SECONDS:
        raise BadRequest(f"time: invalid duration {shown}")
    return sign * total


def parse_keep_alive(value: object) -> float | None:
    """Read a request's keep_alive in seconds; negative: FOREVER; null: None. Raises BadRequest."""
    if value is None:
        return None
    if isinstance(value, str):
        seconds = parse_duration(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(max(-_MAX_SECONDS, min(_MAX_SECONDS, value)))
    else:
        kind = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}.get(type(value), "string")
        raise BadRequest(f"Unsupported type: '{kind}'")
    return FOREVER if seconds < 0 or seconds >= _MAX_SECONDS else seconds


def parse_lifetime(text: str) -> float:
    """Read OLLAMA_KEEP_ALIVE or OLLAMA_LOAD_TIMEOUT: a duration or bare seconds; negative: FOREVER."""
    text = text.strip()
    try:
        seconds = float(int(text))
    except ValueError:
        seconds = parse_duration(text)
    return FOREVER if seconds < 0 or seconds >= _MAX_SECONDS else seconds
